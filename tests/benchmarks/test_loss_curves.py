"""`benchmarks/loss_curves.py`: three runs of train.py on the same data, and their distances."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import needs_all
from tests.training.support import World, make_settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import loss_curves  # noqa: E402


def test_distances_of_curves() -> None:
    one = dict(enumerate(map(float, range(8))))
    other = {step: loss + step // 2 for step, loss in one.items()}
    assert loss_curves.quarters(one, other) == [0.0, 1.0, 2.0, 3.0]
    assert loss_curves.last_quarter(one) == 6.5
    with pytest.raises(AssertionError):
        loss_curves.quarters(one, {0: 0.0})


@needs_all
def test_the_three_runs_start_alike_and_are_compared(tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    config = tmp_path / "config.yaml"
    settings = make_settings({"hidden_dropout": 0.0}, sequences_per_step=4)
    config.write_text(settings.to_yaml(), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "loss_curves.py"), "--preset", str(config)]
    command += ["--dataset_path", str(world.data), "--tokenizer_path", str(world.tokenizer_path), "--steps", "8"]
    command += ["--output_dir", str(tmp_path / "out"), "--set", "logging_steps=1"]
    command += ["--json", str(tmp_path / "c.json"), "--png", str(tmp_path / "c.png")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "c.json").read_text())["curves"]
    assert set(curves) == {"fast", "plain", "eager"}
    assert len(curves["fast"]) == 8
    first = [curve["1"] for curve in curves.values()]
    assert max(first) - min(first) < 1e-4  # the same weights and data, in float32 on a CPU
    assert "| fast from plain |" in done.stdout
    assert (tmp_path / "c.png").stat().st_size > 1000
