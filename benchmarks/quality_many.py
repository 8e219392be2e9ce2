"""Rows of `quality.py`, several at a time on one device, numbered; what a time limit cuts off keeps its curve.

    python benchmarks/quality_many.py ROWS.txt --processes 6 --output_dir OUT --seconds 550 --
        --dataset_path DIR --tokenizer_path DIR --micro_batch 64

ROWS.txt has a RUN a line, in the order in which they begin; `#` opens a comment. A row of another preset or length has
`--preset NAME` or `--sequence_length T` behind it. What stands behind `--` is handed on, ahead of a row's own flags.
Each row runs in a process of its own, and its number names its folder under OUT: they count from the N of a comment
`Numbers from N.`, or from --first. `--only 279 280` runs these alone. OUT/rows.jsonl has a line a row in the form of
`benchmarks/results`: the figures of `quality.py`, or `unfinished`, with the curve up to there and the end of what the
process wrote. Speeds mean nothing where rows share a device.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from flags import positive, run_command
from quality import DEFAULT_PRESET, OF_THE_ROW, UserError, check_preset_is_named, parse_row, training_curve

from doge_lm.data.sources import read_text
from doge_lm.training.callbacks import LOG_NAME
from doge_lm.training.settings import load_settings

QUALITY = Path(__file__).parent / "quality.py"
POLL_SECONDS = 0.5
FLAGS_OF_A_ROW = ("--preset", "--sequence_length")


class Row(NamedTuple):
    """A run, and the flags that stand behind it in the file."""

    run: str
    flags: list[str]


class Started(NamedTuple):
    """A row that runs."""

    number: int
    process: subprocess.Popen[bytes]


def read_row(line: str, preset: str | None) -> Row:
    """A line of a file of rows, its settings looked through; `preset` is what was given for all rows.

    Raises:
        UserError: for an unknown form, setting, preset or flag.
    """
    run, *flags = line.split()
    own = dict(zip(flags[::2], flags[1::2], strict=False))
    if len(flags) % 2 or not set(own) <= set(FLAGS_OF_A_ROW):
        raise UserError(
            f"{' '.join(flags)!r}: behind a row may stand {' and '.join(FLAGS_OF_A_ROW)}, each with a value"
        )
    _, _, changed = parse_row(run)
    preset = own.get("--preset", preset)
    check_preset_is_named(run, changed, preset)
    settings = [f"{key}={value}" for key, value in changed.items() if key not in OF_THE_ROW]
    if "--sequence_length" in own:
        settings.append(f"sequence_length={own['--sequence_length']}")
    load_settings(preset or DEFAULT_PRESET, settings)
    return Row(run, flags)


def read_rows(path: Path, preset: str | None = None) -> list[Row]:
    """The rows of a file, each looked through before any begins.

    Raises:
        UserError: for a file that cannot be read, or a row of an unknown form or setting; the message names its line.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        row = line.partition("#")[0].strip()
        if not row:
            continue
        try:
            rows.append(read_row(row, preset))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise UserError(f"{path} has no row")
    return rows


def first_number(path: Path, given: int | None) -> int:
    """The number of the first row: what the file says, or else --first.

    Raises:
        UserError: if neither says it, or the two differ.
    """
    stated = re.search(r"^#.*\bNumbers from (\d+)\.", read_text(path), re.MULTILINE)
    first = given if stated is None else int(stated[1])
    if first is None:
        raise UserError(f"{path} does not say `# Numbers from N.`; give --first, the number of its first row")
    if given not in (None, first):
        raise UserError(f"--first {given}: the rows of {path} have numbers from {first}")
    return first


def start(number: int, row: Row, folder: Path, handed_on: list[str]) -> Started:
    """Begin a row in a process of its own, which writes into OUT/NUMBER."""
    place = folder / str(number)
    place.mkdir(parents=True)
    command = [sys.executable, str(QUALITY), *handed_on, "--output_dir", str(place), *row.flags, row.run]
    with (place / "output.txt").open("wb") as output:
        return Started(number, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))


def stop(_signal: int, _frame: object) -> None:
    """End as by Ctrl-C: rows that run are killed, and what is there is collected."""
    raise KeyboardInterrupt


def numbered(rows: list[Row], first: int, only: list[int] | None) -> dict[int, Row]:
    """The rows by their numbers, or those of them that are asked for.

    Raises:
        UserError: for a number that no row has.
    """
    known = dict(enumerate(rows, first))
    if only is None:
        return known
    for number in only:
        if number not in known:
            raise UserError(f"--only {number}: the rows are {first} to {max(known)}")
    return {number: row for number, row in known.items() if number in only}


def run_all(rows: dict[int, Row], processes: int, folder: Path, seconds: float, handed_on: list[str]) -> None:
    """Run the rows, so many at a time; what runs when the time is over is killed, what waits does not begin."""
    end = time.monotonic() + seconds
    waiting = list(rows.items())
    running: list[Started] = []
    try:
        while (waiting or running) and time.monotonic() < end:
            for ended in [each for each in running if each.process.poll() is not None]:
                running.remove(ended)
                print(f"row {ended.number}: ended with {ended.process.returncode}", flush=True)
            while waiting and len(running) < processes:
                running.append(start(*waiting.pop(0), folder, handed_on))
            time.sleep(POLL_SECONDS)
    finally:
        for each in running:
            each.process.kill()
            each.process.wait()


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON; the last may be cut off, without its end, where a row was killed."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


def record(number: int, run: str, folder: Path) -> dict[str, Any]:
    """What is known of a row after its end."""
    place = folder / str(number)
    finished = place / "quality.jsonl"
    if finished.exists() and (figures := complete_lines(finished)):
        return {"row": number, **figures[0]}
    found: dict[str, Any] = {"row": number, "run": run, "unfinished": True, "curve": {}}
    for log in place.glob(f"*/log/{LOG_NAME}"):
        found["curve"] = training_curve(complete_lines(log))
    if (place / "output.txt").exists():
        found["output"] = (place / "output.txt").read_text(encoding="utf-8", errors="replace")[-500:]
    return found


def split_flags(flags: list[str]) -> tuple[list[str], list[str]]:
    """What stands ahead of `--`, and what behind it."""
    cut = flags.index("--") if "--" in flags else len(flags)
    return flags[:cut], flags[cut + 1 :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, metavar="ROWS.txt")
    parser.add_argument("--first", type=int, help="the number of the first row, where the file does not say it")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="rows to run, by number (default: all)")
    parser.add_argument("--processes", type=positive, default=1, help="rows at a time (default: 1)")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long (default: no limit)")
    given, handed_on = split_flags(sys.argv[1:])
    args = parser.parse_args(given)
    preset_parser = argparse.ArgumentParser(add_help=False)
    preset_parser.add_argument("--preset")
    listed = read_rows(args.rows, preset_parser.parse_known_args(handed_on)[0].preset)
    rows = numbered(listed, first_number(args.rows, args.first), args.only)
    if args.output_dir.is_file():
        raise UserError(f"--output_dir {args.output_dir} is a file; name a folder")
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise UserError(f"{args.output_dir} is not empty; rows would mix with others")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    interrupted = False
    try:
        run_all(rows, args.processes, args.output_dir, args.seconds, handed_on)
    except KeyboardInterrupt:
        interrupted = True
    records = [record(number, row.run, args.output_dir) for number, row in rows.items()]
    with (args.output_dir / "rows.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(each) + "\n" for each in records)
    for each in records:
        print(f"{each['row']:5} {each.get('eval_loss', 'unfinished'):>10} {each['run']}")
        if last := each.get("output", "").strip().rpartition("\n")[2]:
            print(f"      {args.output_dir / str(each['row']) / 'output.txt'} ends with: {last}")
    if interrupted:
        return 130
    return 0 if any("eval_loss" in each for each in records) else 1


if __name__ == "__main__":
    run_command(main)
