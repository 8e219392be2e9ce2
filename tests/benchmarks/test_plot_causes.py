"""The pictures of causes and of copying: every row that they name is on record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.benchmarks.conftest import Command

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plot_causes
import plot_positions
import plot_quality


def test_every_panel_is_drawn_from_recorded_rows(command: Command, tmp_path: Path) -> None:
    picture = tmp_path / "causes.png"
    command(plot_causes, str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_setting_of_a_panel_is_left_out() -> None:
    groups = tuple({f"{group}{at}": (2 * group + at,) for at in range(2)} for group in range(7))
    panel = plot_causes.Panel("more groups than colours", groups)
    axes = Figure().subplots()
    plot_causes.draw_panel(axes, panel, {row: float(row) for row in range(14)})
    assert plot_causes.settings_of(panel) == len(axes.lines) == len(axes.get_yticks()) == 14


def test_a_number_belongs_to_one_row(tmp_path: Path) -> None:
    lines = [{"row": 1, "eval_loss": 3.0}, {"row": 2, "unfinished": True}, {"eval_loss": 2.0}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert plot_causes.read_records(tmp_path) == {1: lines[0]}
    (tmp_path / "b.jsonl").write_text(json.dumps(lines[0]), encoding="utf-8")
    with pytest.raises(ValueError, match="two rows 1"):
        plot_causes.read_records(tmp_path)


def test_copying_is_drawn_by_position_as_the_mean_of_a_label(command: Command, tmp_path: Path) -> None:
    records = {1: {"repeat_curve": [2.0, 1.0]}, 2: {"repeat_curve": [4.0, 1.0]}, 3: {}}
    assert plot_positions.labelled_curves(["a=b=1", "c=2", "a=b=2"], records) == {
        "a=b": [[2.0, 1.0], [4.0, 1.0]],
        "c": [[4.0, 1.0]],
    }
    for choice, message in (("1", "LABEL=ROW"), ("a=x", "LABEL=ROW"), ("a=3", "no record of row 3"), ("a=4", "row 4")):
        with pytest.raises(plot_positions.UserError, match=message):
            plot_positions.labelled_curves([choice], records)
    command(plot_positions, str(tmp_path / "copy.png"), "Llama=230", "Llama=231", "Doge=233")
    assert (tmp_path / "copy.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_those_of_the_rows_that_are_named(command: Command, tmp_path: Path) -> None:
    rows = [{"row": 7, "run": "llama:"}, {"row": 9, "run": "doge:"}, {"run": "doge:", "eval_loss": 1.0}]
    assert plot_quality.picked(rows, ["b=9", "a=7", "b=7"]) == [("b", rows[1]), ("a", rows[0]), ("b", rows[0])]
    assert [row for _, row in plot_quality.picked(rows, None)] == [rows[2]]
    with pytest.raises(plot_positions.UserError, match="no record of row 1"):
        plot_quality.picked(rows, ["a=1"])
    results = Path(plot_causes.__file__).parent / "results"
    files = [str(results / name) for name in ("best-2026-11-29.jsonl", "rates-2026-11-29.jsonl")]
    command(plot_quality, *files, str(tmp_path / "curves.png"), "--rows", "Llama=293", "Doge=233", "Doge=234")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for benchmark, flags, message in (
        (plot_causes, ["out.png", "--results", str(tmp_path)], "no record of a row"),
        (plot_positions, ["out.png", "a=10000"], "no record of row 10000"),
        (plot_quality, [str(tmp_path / "none.jsonl"), "out.png"], "none.jsonl"),
    ):
        monkeypatch.setattr(sys, "argv", ["plot", *flags])
        with pytest.raises(SystemExit) as stopped:
            benchmark.main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
