"""`benchmarks/decode.py`: a row for each model, way and batch, also where one fails; the peer is of Doge's size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from doge_lm.errors import UserError
from doge_lm.training.plan import count_model
from doge_lm.training.settings import load_settings
from tests.training.support import make_settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import decode  # noqa: E402


def test_a_small_run_has_all_rows(tmp_path: Path) -> None:
    preset, target = tmp_path / "small.yaml", tmp_path / "out.json"
    preset.write_text(make_settings().to_yaml(), encoding="utf-8")
    sizes = ["--batch", "1", "3", "--prompt_tokens", "5", "--new_tokens", "4", "--repetitions", "1", "--device", "cpu"]
    ways = ["dynamic", "static", "graph"]
    command = [sys.executable, str(ROOT / "benchmarks" / "decode.py"), "--preset", str(preset), *sizes]
    done = subprocess.run(
        [*command, "--ways", *ways, "--json", str(target)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(target.read_text(encoding="utf-8"))["records"]
    expected = [(batch, way, model) for batch in (1, 3) for way in ways for model in decode.MODELS]
    assert [(record["batch"], record["way"], record["model"]) for record in records] == expected
    for record in records:
        assert "error" not in record
        assert record["tokens_per_second"] > 0
        assert ("ratio" in record) == (record["model"] == "doge")
    assert done.stdout.count("| small |") == len(expected)


def test_an_error_becomes_its_row_and_the_other_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    args = decode.parse(["--prompt_tokens", "4", "--new_tokens", "2", "--repetitions", "1", "--device", "cpu"])
    models = decode.build_models(make_settings().model_config(), torch.device("cpu"), torch.float32, seed=0)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room\nfor this")

    monkeypatch.setattr(models["doge"], "forward", fail)
    doge, llama = decode.measure_pair("graph", models, torch.randint(3, 60, (2, 4)), args)
    assert doge["error"] == "RuntimeError: no room"
    assert "ratio" not in doge
    assert llama["tokens_per_second"] > 0
    assert "no room" in decode.row({"preset": "x", "parameters": 1, **doge})


@pytest.mark.parametrize("way", ["dynamic", "static", "graph"])
@pytest.mark.parametrize("model", decode.MODELS)
def test_every_way_makes_the_same_tokens_and_as_many_as_asked(way: str, model: str) -> None:
    models = decode.build_models(make_settings().model_config(), torch.device("cpu"), torch.float32, seed=0)
    ids = torch.randint(3, 60, (2, 4), generator=torch.Generator().manual_seed(0))
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            last = models[model](expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, last], dim=1)
    run = decode.generate_by(way, models[model], ids, 5)
    for new in (5, 1):
        found = run(new)
        rows = found[:, 4:].tolist() if isinstance(found, torch.Tensor) else found
        assert rows == expected[:, 4 : 4 + new].tolist()


@pytest.mark.parametrize("preset", ["doge_25M", "doge_450M"])
def test_the_peer_is_as_large_with_an_aligned_width(preset: str) -> None:
    config = load_settings(preset).model_config()
    models = decode.build_models(config, torch.device("meta"), torch.float32, seed=0)
    assert models["llama"].config.intermediate_size % 64 == 0
    total = sum(parameter.numel() for parameter in models["llama"].parameters())
    assert abs(total / count_model(config).total - 1) < 0.02


@pytest.mark.parametrize("flag", ["--prompt_tokens", "--new_tokens", "--repetitions", "--batch"])
def test_a_number_below_one_is_named(flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        decode.parse([flag, "0"])


def test_more_tokens_than_positions_is_an_error() -> None:
    args = decode.parse(["--prompt_tokens", "20000", "--device", "cpu"])
    with pytest.raises(UserError, match="--prompt_tokens"):
        decode.measure_preset("doge_25M", args, lambda record: None)
