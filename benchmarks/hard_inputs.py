"""Memory and time of preparing inputs that are small on disk and large when they are unpacked.

    python benchmarks/hard_inputs.py --work_dir DIR --tokenizer_path ./tokenizer [--rows 1e6] [--only NAME …]

The inputs, each a source of its own:

    pages          `.parquet`: a page of 144 MB among 20,000 tiny rows, one text of 0.9 MB in 900 rows, and a
                   dictionary of 120 MB
    conversations  `.parquet`: 250 conversations of 2.9 MB among 400,000 short ones in one row group
    repeated       `--rows` equal lines in one `.jsonl.zst` of some KB, with `--deduplicate`
    padded         `--rows` different short lines in one `.jsonl.zst`, each a padded sample of 16 tokens; merged too
    packed         the same, packed into samples of 2,048 tokens; merged too

Every stage is the command that a user types, with two processes. Prints a table of time and of the highest anonymous
memory of the command's own process, of any worker, and of all together at one moment; the exit status is 1 if all
together were above 1 GiB and 300 MiB for each worker.
"""

import argparse
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from memory import Measurement, measure

MIB = 2**20
NUM_PROC = 2
BOUND = 1024 * MIB + NUM_PROC * 300 * MIB
COMMAND = [sys.executable, "-m", "doge_lm.cli"]


def write_pages(folder: Path, rows: int) -> None:
    """`pages`; the number of rows is of no effect."""
    words = random.Random(0).randbytes(6 * 10**6).hex()
    skewed = ["a few words"] * 20_000 + [f"{number} {words}" for number in range(12)] + ["more words"] * 100
    pq.write_table(pa.table({"text": skewed}), folder / "a.parquet", row_group_size=10**6, compression="zstd")
    pq.write_table(pa.table({"text": [words[:900_000]] * 900}), folder / "b.parquet")
    pq.write_table(pa.table({"text": [f"{number} {words[:120_000]}" for number in range(1000)]}), folder / "c.parquet")


def write_conversations(folder: Path, rows: int) -> None:
    """`conversations`; the number of rows is of no effect."""
    question, answer = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "word " * 1000}
    short, long = [question, {"from": "gpt", "value": "So."}], [question, answer] * 580
    pq.write_table(
        pa.table({"conversations": [short] * 200_000 + [long] * 250 + [short] * 200_000}),
        folder / "a.parquet",
        row_group_size=10**6,
        compression="zstd",
    )


def write_repeated(folder: Path, rows: int) -> None:
    """`repeated`."""
    write_lines(folder, (b'{"text":"hello"}\n' * 1000 for _ in range(rows // 1000)))


def write_different(folder: Path, rows: int) -> None:
    """`padded` and `packed`."""
    blocks = (range(begin, begin + 1000) for begin in range(0, rows, 1000))
    write_lines(folder, (b"".join(b'{"text":"%07d"}\n' % number for number in block) for block in blocks))


def write_lines(folder: Path, blocks: Iterator[bytes]) -> None:
    """Packs lines into one file."""
    with (folder / "a.jsonl.zst").open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        for block in blocks:
            packed.write(block)


# How each is written, the flags of `preprocess_datasets`, and whether the result is merged.
INPUTS: dict[str, tuple[Callable[[Path, int], None], list[str], bool]] = {
    "pages": (write_pages, ["--on_error", "skip", "--max_chars", "1000"], False),
    "conversations": (write_conversations, ["--max_chars", "1000"], False),
    "repeated": (write_repeated, ["--deduplicate"], False),
    "padded": (write_different, ["--padding", "max_length", "--max_len", "16"], True),
    "packed": (write_different, [], True),
}


def prepare(name: str, args: argparse.Namespace) -> Iterator[tuple[str, Measurement]]:
    """Prepares one input; gives each stage with what it took.

    Raises:
        RuntimeError: if a command fails.
    """
    write, flags, merged = INPUTS[name]
    place = args.work_dir / f"hard_{name}"
    source = place / "own"
    source.mkdir(parents=True)
    try:
        write(source, int(args.rows))
        local = ["--save_dir", str(place), "--local", f"{name}={source}"]
        subprocess.run([*COMMAND, "download_datasets", *local], check=True, capture_output=True)
        folders = ["--datasets_dir", str(place), "--save_dir", str(place), "--num_proc", str(NUM_PROC)]
        stages = {"preprocess_datasets": [*folders, "--tokenizer_path", str(args.tokenizer_path), *flags]}
        if merged:
            stages["merge_datasets"] = folders
        for stage, arguments in stages.items():
            measured = measure([*COMMAND, stage, *arguments])
            if measured.exit_status:
                raise RuntimeError(f"{stage} of {name} ended with {measured.exit_status}")
            yield stage, measured
    finally:
        shutil.rmtree(place)


def main() -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--rows", type=float, default=1e6, help="of the inputs of lines (default: 1e6)")
    parser.add_argument("--only", nargs="+", choices=INPUTS, default=list(INPUTS))
    args = parser.parse_args()
    print("| input | stage | time, s | main, MiB | worker, MiB | all, MiB |\n|---|---|---|---|---|---|")
    highest = 0
    for name in args.only:
        for stage, measured in prepare(name, args):
            highest = max(highest, measured.peak_of_sum_bytes)
            peaks = (measured.peak("main"), measured.peak("worker"), measured.peak_of_sum_bytes)
            shown = " | ".join(f"{peak / MIB:,.0f}" for peak in peaks)
            print(f"| {name} | `{stage}` | {measured.wall_seconds:.0f} | {shown} |", flush=True)
    return int(highest > BOUND)


if __name__ == "__main__":
    sys.exit(main())
