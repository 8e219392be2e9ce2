"""The picture of causes: every row that it names is on record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Command

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plot_causes


def test_every_panel_is_drawn_from_recorded_rows(command: Command, tmp_path: Path) -> None:
    picture = tmp_path / "causes.png"
    command(plot_causes, str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_number_belongs_to_one_row(tmp_path: Path) -> None:
    lines = [{"row": 1, "eval_loss": 3.0}, {"row": 2, "unfinished": True}, {"eval_loss": 2.0}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert plot_causes.read_losses(tmp_path) == {1: 3.0}
    (tmp_path / "b.jsonl").write_text(json.dumps(lines[0]), encoding="utf-8")
    with pytest.raises(ValueError, match="two rows 1"):
        plot_causes.read_losses(tmp_path)
