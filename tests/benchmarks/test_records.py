"""`benchmarks/records.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import records  # noqa: E402


@pytest.mark.parametrize(
    ("argument", "recorded"),
    [
        ("/a/b/out.json", "out.json"),
        ("--json=/a/out.json", "--json=out.json"),
        ("C:\\a\\out.json", "out.json"),
        ("benchmarks/x.py", "benchmarks/x.py"),
        ("doge:a=1,b=3e-2", "doge:a=1,b=3e-2"),
    ],
)
def test_a_record_names_no_folder_of_a_machine(argument: str, recorded: str) -> None:
    assert records.without_folders(argument) == recorded


def test_a_record_says_what_it_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "benchmarks" / "x.py"), "--json", str(tmp_path / "out.json")])
    path = tmp_path / "out.json"
    records.write_whole(path, records.circumstances())
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["command"] == "python x.py --json out.json"
    assert all(written[name] for name in ("torch", "transformers", "python"))
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


def test_table() -> None:
    assert records.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
