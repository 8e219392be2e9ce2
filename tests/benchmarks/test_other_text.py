"""`benchmarks/other_text.py`: conversations and Python files become texts, the same at every run."""

import json
import sys
from pathlib import Path

import pytest

from doge_lm.errors import UserError
from tests.benchmarks.conftest import Command

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import other_text


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_turns_and_files_become_texts(command: Command, tmp_path: Path) -> None:
    contents = [(f"question {n} ", "", "答") for n in range(9)]
    turns = [[{"from": "human", "value": content} for content in each] for each in contents]
    talk = write_rows(tmp_path / "talk.jsonl", [*({"conversations": each} for each in turns), {"conversations": []}])
    code = tmp_path / "code" / "deep"
    code.mkdir(parents=True)
    (code / "long.py").write_text("x = 1\n" * 500, encoding="utf-8")
    (code / "short.py").write_text("x = 1\n", encoding="utf-8")
    for out in ("a", "b"):
        sources = ("--conversations", f"zh={talk}", "--python", str(tmp_path / "code"))
        command(other_text, str(tmp_path / out), *sources, "--most", "5")
    found = texts_of(tmp_path / "a" / "zh.jsonl")
    assert len(set(found)) == 5
    assert set(found) <= {f"question {n}\n\n答" for n in range(9)}
    assert texts_of(tmp_path / "a" / "python.jsonl") == ["x = 1\n" * 500]
    assert (tmp_path / "a" / "zh.jsonl").read_bytes() == (tmp_path / "b" / "zh.jsonl").read_bytes()


@pytest.mark.parametrize("row", [{"text": "no turns"}, {"conversations": [{"from": "human"}]}, {"conversations": 3}])
def test_a_row_without_turns_is_named(tmp_path: Path, row: object) -> None:
    path = write_rows(tmp_path / "talk.jsonl", [{"conversations": [{"from": "human", "value": "yes"}]}, row])
    with pytest.raises(UserError, match=r"talk\.jsonl.*2.*`conversations`"):
        other_text.conversation_texts(path)


def test_a_folder_without_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--python .*: no Python file"):
        other_text.python_texts(tmp_path)
