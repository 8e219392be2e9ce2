"""Prepares a whole corpus with the commands a user types, and measures time, anonymous memory and disk of each stage.

    python benchmarks/synthetic_corpus.py --save_dir CORPUS --gigabytes 20 --text_dir ../shared/data
    python benchmarks/prepare_large.py --corpus CORPUS --save_dir DIR --tokenizer_path ./tokenizer [--num_proc 2]

Every folder of the corpus is a source. Prints a table and one line of JSON, with the time for 2 TB on 16 cores that
follows from it. The exit status is 1 if a process was above the bound: 1 GiB for the command's own process and
300 MiB for each worker.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from memory import Measurement, measure

from doge_lm.data.manifest import Manifest

MIB = 2**20
MAIN_BOUND, WORKER_BOUND = 1024 * MIB, 300 * MIB
TARGET_BYTES, TARGET_CORES = 2 * 10**12, 16
FORMULA = "hours = seconds · (2 TB / corpus on disk) · (processes / 16) / 3600"


def disk_bytes(folder: Path) -> int:
    """The sizes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def stages(args: argparse.Namespace) -> dict[str, tuple[list[str], str]]:
    """The command of each stage, and the folder that it writes."""
    place, num_proc = str(args.save_dir), str(args.num_proc)
    sources = sorted(path for path in args.corpus.iterdir() if path.is_dir())
    local = [part for path in sources for part in ("--local", f"{path.name}={path}")]
    folders = ["--datasets_dir", place, "--save_dir", place, "--num_proc", num_proc]
    tokenizer = ["--tokenizer_path", str(args.tokenizer_path), "--max_len", str(args.max_len)]
    return {
        "download --local": (["download_datasets", "--save_dir", place, "--num_proc", num_proc, *local], "raw"),
        "preprocess": (["preprocess_datasets", *folders, *tokenizer, *args.preprocess_flag], "tokenized"),
        "merge": (["merge_datasets", *folders], "pretrain"),
    }


def within_bound(measured: Measurement, workers: int) -> bool:
    """Whether no process, nor all together, held more than the bound at any sample."""
    return (
        measured.peak("main") <= MAIN_BOUND
        and measured.peak("worker") <= WORKER_BOUND
        and measured.peak_of_sum_bytes <= MAIN_BOUND + workers * WORKER_BOUND
    )


def run_stage(command: list[str], folder: Path, num_proc: int) -> dict[str, Any]:
    """Runs one stage and says what it took.

    Raises:
        RuntimeError: if the command fails.
    """
    measured = measure([sys.executable, "-m", "doge_lm.cli", *command], stdout=sys.stderr)
    if measured.exit_status:
        raise RuntimeError(f"{' '.join(command)} ended with status {measured.exit_status}")
    return {
        "wall_seconds": measured.wall_seconds,
        "cpu_seconds": measured.cpu_seconds,
        "main_peak_bytes": measured.peak("main"),
        "worker_peak_bytes": measured.peak("worker"),
        "peak_of_sum_bytes": measured.peak_of_sum_bytes,
        "within_bound": within_bound(measured, num_proc),
        "disk_bytes": disk_bytes(folder),
        "processes": [[process.role, process.peak_bytes] for process in measured.processes],
    }


def estimated_hours(seconds: float, corpus_bytes: int, num_proc: int) -> float:
    """The time for `TARGET_BYTES` on `TARGET_CORES`, if time goes by bytes and cores."""
    return seconds * (TARGET_BYTES / corpus_bytes) * (num_proc / TARGET_CORES) / 3600


def table(stages_done: dict[str, dict[str, Any]]) -> str:
    """One line a stage."""
    lines = [
        "| stage | time, s | CPU, s | main, MiB | worker, MiB | sum, MiB | disk, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage in stages_done.items():
        sizes = " | ".join(
            f"{stage[key] / MIB:,.0f}" for key in ("main_peak_bytes", "worker_peak_bytes", "peak_of_sum_bytes")
        )
        lines.append(
            f"| {name} | {stage['wall_seconds']:,.1f} | {stage['cpu_seconds']:,.1f} | {sizes} | "
            f"{stage['disk_bytes'] / 10**9:,.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a folder with a folder of files for each source")
    parser.add_argument("--save_dir", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--max_len", type=int, default=2048)
    parser.add_argument("--preprocess_flag", action="append", default=[], help="e.g. --preprocess_flag=--deduplicate")
    args = parser.parse_args()
    if args.save_dir.exists():
        parser.error(f"--save_dir {args.save_dir} is there already")
    corpus_bytes = disk_bytes(args.corpus)
    done = {}
    for name, (command, folder) in stages(args).items():
        done[name] = run_stage(command, args.save_dir / folder, args.num_proc)
    accounts = Manifest.read(args.save_dir / "pretrain").accounting.values()
    tokens, text = sum(entry.tokens_in for entry in accounts), sum(entry.bytes_in for entry in accounts)
    seconds = sum(stage["wall_seconds"] for stage in done.values())
    estimate = {
        "formula": FORMULA,
        "hours_if_2TB_are_files_on_disk": estimated_hours(seconds, corpus_bytes, args.num_proc),
        "hours_if_2TB_are_text": estimated_hours(seconds, text, args.num_proc),
    }
    print(table(done))
    print(f"{tokens:,} tokens of {text:,} bytes of text ({corpus_bytes:,} bytes of files) in {seconds:,.1f} s")
    print(
        f"2 TB on {TARGET_CORES} cores: {estimate['hours_if_2TB_are_text']:,.1f} h if 2 TB are text, "
        f"{estimate['hours_if_2TB_are_files_on_disk']:,.1f} h if they are files as these ({FORMULA})"
    )
    print(json.dumps({"stages": done, "tokens": tokens, "text_bytes": text, "corpus_bytes": corpus_bytes,
                      "seconds": seconds, "num_proc": args.num_proc, "estimate": estimate}))  # fmt: skip
    return 0 if all(stage["within_bound"] for stage in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
