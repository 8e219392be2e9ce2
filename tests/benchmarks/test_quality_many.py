"""Several rows at a time: each numbered, finished or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Command

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import quality_many  # noqa: E402

# In the place of quality.py: a row that names a speed of 0 logs and never ends.
STAND_IN = """
import argparse, json, pathlib, time
parser = argparse.ArgumentParser()
parser.add_argument("run")
parser.add_argument("--output_dir", type=pathlib.Path)
parser.add_argument("--micro_batch", type=int)
parser.add_argument("--preset")
parser.add_argument("--sequence_length", type=int, default=0)
args = parser.parse_args()
log = args.output_dir / "a-name" / "log"
log.mkdir(parents=True)
line = json.dumps({"tokens_seen": 640, "loss": 5.00004, "tokens_per_second": 1})
(log / LOG_NAME).write_text(line + "\\n" + json.dumps({"eval_loss": 1}) + "\\n" + line[:9])
print("begun", flush=True)
if "seed=0" in args.run:
    time.sleep(3600)
row = {"run": args.run, "eval_loss": 3.5, "curve": {}, "micro_batch": args.micro_batch}
if args.preset:
    row |= {"preset": args.preset, "sequence_length": args.sequence_length}
(args.output_dir / "quality.jsonl").write_text(json.dumps(row) + "\\n")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that runs in the place of quality.py."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN.replace("LOG_NAME", repr(quality_many.LOG_NAME)), encoding="utf-8")
    monkeypatch.setattr(quality_many, "QUALITY", path)
    return path


@pytest.mark.usefixtures("stand_in")
def test_rows_run_side_by_side_and_what_is_cut_off_keeps_its_curve(command: Command, tmp_path: Path) -> None:
    rows, place = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text(
        "# two that end\ndoge:seed=1\n\nllama:seed=2  # and not\ndoge:seed=0\ndoge:seed=3", encoding="utf-8"
    )
    flags = [str(rows), "--first", "7", "--processes", "2", "--seconds", "20", "--output_dir", str(place)]
    flags += ["--", "--micro_batch", "4"]
    printed = command(quality_many, *flags)
    found = [json.loads(line) for line in (place / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    end = {"eval_loss": 3.5, "curve": {}, "micro_batch": 4}
    assert found == [
        {"row": 7, "run": "doge:seed=1", **end},
        {"row": 8, "run": "llama:seed=2", **end},
        {"row": 9, "run": "doge:seed=0", "unfinished": True, "curve": {"640": 5.0}, "output": "begun\n"},
        {"row": 10, "run": "doge:seed=3", **end},
    ]
    assert "9 unfinished doge:seed=0" in printed
    assert "9/output.txt ends with: begun" in printed.replace("\\", "/")
    with pytest.raises(quality_many.UserError, match="is not empty"):
        command(quality_many, *flags)


@pytest.mark.usefixtures("stand_in")
def test_a_rows_own_flags_stand_above_those_for_all(command: Command, tmp_path: Path) -> None:
    rows, place = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("doge:seed=1 --preset doge2_25M --sequence_length 64\nllama:seed=2  # as all\n", encoding="utf-8")
    flags = [str(rows), "--first", "7", "--output_dir", str(place)]
    command(quality_many, *flags, "--", "--preset", "doge_80M", "--sequence_length", "32")
    found = [json.loads(line) for line in (place / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["run"], row["preset"], row["sequence_length"]) for row in found] == [
        ("doge:seed=1", "doge2_25M", 64),
        ("llama:seed=2", "doge_80M", 32),
    ]


@pytest.mark.usefixtures("stand_in")
def test_rows_that_are_asked_for_keep_their_numbers(command: Command, tmp_path: Path) -> None:
    rows, place = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("doge:seed=1\nllama:seed=2\ndoge:seed=3\n", encoding="utf-8")
    flags = [str(rows), "--first", "7", "--output_dir", str(place), "--only", "9", "8"]
    with pytest.raises(quality_many.UserError, match="--only 6: the rows are 7 to 9"):
        command(quality_many, *flags, "6")
    assert not place.exists()
    command(quality_many, *flags)
    found = [json.loads(line) for line in (place / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["row"], row["run"]) for row in found] == [(8, "llama:seed=2"), (9, "doge:seed=3")]
    assert not (place / "7").exists()


@pytest.mark.usefixtures("stand_in")
def test_a_file_says_its_numbers_itself(command: Command, tmp_path: Path) -> None:
    rows, place = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("# What was left. Numbers from 41. More: the log.\ndoge:seed=1\n", encoding="utf-8")
    with pytest.raises(quality_many.UserError, match=r"--first 40: the rows of .*rows\.txt have numbers from 41"):
        command(quality_many, str(rows), "--first", "40", "--output_dir", str(place))
    command(quality_many, str(rows), "--output_dir", str(place))
    assert json.loads((place / "rows.jsonl").read_text(encoding="utf-8"))["row"] == 41
    rows.write_text("doge:seed=1\n", encoding="utf-8")
    with pytest.raises(quality_many.UserError, match=r"rows\.txt does not say `# Numbers from N\.`; give --first"):
        command(quality_many, str(rows), "--output_dir", str(tmp_path / "other"))


def test_the_files_of_rows_are_named_by_their_numbers() -> None:
    files = sorted((quality_many.QUALITY.parent / "rows").glob("*.txt"))
    assert files
    assert [f"from-{quality_many.first_number(path, None)}" for path in files] == [path.stem for path in files]


def test_a_file_is_no_folder(command: Command, tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("doge:seed=1\n", encoding="utf-8")
    with pytest.raises(quality_many.UserError, match=r"rows\.txt is a file; name a folder"):
        command(quality_many, str(rows), "--first", "1", "--output_dir", str(rows))


def test_the_end_by_a_signal_collects_what_is_there(tmp_path: Path, stand_in: Path) -> None:
    """In a process of its own, since the signal is its own."""
    rows, place = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("doge:seed=1\ndoge:seed=0\n", encoding="utf-8")
    code = f"""
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
import quality_many
quality_many.QUALITY = Path({str(stand_in)!r})
place = Path({str(place)!r})
sys.argv = ["quality_many.py", {str(rows)!r}, "--first", "1", "--processes", "2", "--output_dir", str(place)]
def end():
    while not ((place / "1" / "quality.jsonl").exists() and list(place.glob("2/*/log/*.jsonl"))):
        time.sleep(0.1)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end, daemon=True).start()
sys.exit(quality_many.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 130, done.stderr
    first, second = map(json.loads, (place / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["eval_loss"] == 3.5
    assert second["unfinished"]
    assert second["curve"] == {"640": 5.0}


def test_files_cut_off_cost_no_other_row(tmp_path: Path) -> None:
    log = tmp_path / "3" / "a-name" / "log"
    log.mkdir(parents=True)
    (tmp_path / "3" / "quality.jsonl").write_text("", encoding="utf-8")
    (log / quality_many.LOG_NAME).write_text('{"loss": {"a": 1}', encoding="utf-8")
    assert quality_many.record(3, "doge:", tmp_path) == {"row": 3, "run": "doge:", "unfinished": True, "curve": {}}


def test_what_never_began_has_no_curve(tmp_path: Path) -> None:
    assert quality_many.record(3, "doge:", tmp_path) == {"row": 3, "run": "doge:", "unfinished": True, "curve": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("doge:seed=1\nmamba:seed=1\n", r"line 2: .*must be doge or llama"),
        ("doge@no_expert:seed=1", r"line 1: .*no_expert is no change of a doge"),
        ("doge:sede=1", r"line 1: .*seed"),
        ("doge:seed", r"line 1: .*'seed' is no KEY=VALUE"),
        ("doge:seed=1 --preset", r"line 1: '--preset': behind a row may stand --preset and --sequence_length"),
        ("doge:seed=1 --tokens 5", r"line 1: '--tokens 5': behind a row may stand"),
        ("doge:seed=1 --preset no_such", r"line 1: .*no_such"),
        ("doge:seed=1 --sequence_length x", r"line 1: .*sequence_length"),
        ("doge:as_is=true", r"line 1: .*as_is=true measures a preset; say which by --preset NAME"),
        ("# nothing\n", "has no row"),
    ],
)
def test_rows_are_looked_through_before_any_begins(tmp_path: Path, text: str, message: str) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text(text, encoding="utf-8")
    with pytest.raises(quality_many.UserError, match=message):
        quality_many.read_rows(rows)


def test_a_row_that_failed_says_what_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "output.txt").write_text("error: no such thing\n", encoding="utf-8")
    found = quality_many.record(3, "doge:", tmp_path)
    assert found["unfinished"]
    assert found["output"] == "error: no such thing\n"


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "rows").iterdir()), ids=lambda path: path.name)
def test_the_recorded_files_can_be_read(path: Path) -> None:
    assert quality_many.read_rows(path)
