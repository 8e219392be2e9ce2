"""How fast a prepared set is read for training: time to the first batch, and tokens/s, cold and warm.

    python benchmarks/reading.py --work_dir DIR --prepared DATASETS/pretrain [--tokens 1e9]

The set is made by repeating the training rows of `--prepared`, in shards as `merge_datasets` writes them. One process
reads them in the training order. "Cold" asks the kernel to forget the files first (`posix_fadvise`), which a disk's
own cache does not hear. Prints one line of JSON.
"""

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa

from doge_lm.data.dataset import PackedCollator, PreparedSet, TrainingRows, load_prepared
from doge_lm.data.manifest import MANIFEST_NAME, OutputFile
from doge_lm.data.mix import parse_tokens
from doge_lm.data.storage import (
    ROWS_PER_SHARD,
    ShardWriter,
    describe_dataset,
    describe_dataset_dict,
    id_dtype,
    read_batches,
    row_schema,
    shard_name,
)
from doge_lm.training.order import StreamSampler

_SEED = 233


def main() -> None:
    """Makes the set, reads it, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="the set is made in it, and removed in the end")
    parser.add_argument("--prepared", type=Path, required=True, help="the set that is repeated")
    parser.add_argument("--tokens", type=parse_tokens, default=10**9, help="size of the set (default: 1e9)")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch (default: 32)")
    parser.add_argument("--batches", type=int, default=2000, help="batches to read each time (default: 2000)")
    args = parser.parse_args()
    folder = args.work_dir / "reading"
    try:
        tokens = make_set(args.prepared, folder, args.tokens)
        cold = measure(folder, args.rows, args.batches, cold=True)
        warm = measure(folder, args.rows, args.batches, cold=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"tokens": tokens, "cold": cold, "warm": warm, "peak_rss_with_maps_kib": peak}))


def make_set(prepared: Path, folder: Path, tokens: int) -> int:
    """Writes a set of at least so many tokens, the rows of another one over and over; gives how many it has."""
    before = load_prepared(prepared).manifest
    dtype = id_dtype(before.tokenizer.vocab_size)
    paths = {
        split: [prepared / file.path for file in before.files if file.path.startswith(f"{split}/")]
        for split in ("train", "test")
    }
    again: Iterator[pa.RecordBatch] = chain.from_iterable(
        repeat([batch for path in paths["train"] for batch in read_batches(path)])
    )
    files: dict[str, list[OutputFile]] = {"train": [], "test": []}
    for split in files:
        (folder / split).mkdir(parents=True)
    written = 0
    while written < tokens:
        with ShardWriter(folder / "train" / shard_name(len(files["train"])), row_schema(dtype)) as shard:
            rows = 0
            while rows < ROWS_PER_SHARD and written < tokens:
                batch = next(again)
                shard.write(batch)
                rows += batch.num_rows
                written += len(batch.column("input_ids").flatten())
        files["train"].append(shard.output())
    for path in paths["test"]:
        with ShardWriter(folder / "test" / path.name, row_schema(dtype)) as shard:
            for batch in read_batches(path):
                shard.write(batch)
        files["test"].append(shard.output())
    for split, outputs in files.items():
        describe_dataset(folder / split, dtype, outputs, split)
    describe_dataset_dict(folder, list(files))
    listed = [replace(file, path=f"{split}/{file.path}") for split, outputs in files.items() for file in outputs]
    replace(before, files=listed).write(folder)
    return written


def measure(folder: Path, rows: int, batches: int, *, cold: bool) -> dict[str, Any]:
    """Opens the set and reads batches in the training order."""
    if cold:
        forget(folder)
    start = time.perf_counter()
    prepared = load_prepared(folder)
    opened = time.perf_counter()
    stream = collated(prepared, rows, batches)
    next(stream)
    first = time.perf_counter()
    read = sum(batch["input_ids"].numel() for batch in stream)
    seconds = time.perf_counter() - first
    return {
        "seconds_to_open": round(opened - start, 3),
        "seconds_to_first_batch": round(first - start, 3),
        "tokens_per_second": round(read / seconds),
    }


def collated(prepared: PreparedSet, rows: int, batches: int) -> Iterator[dict[str, Any]]:
    """Batches as training gets them from one process."""
    tokenizer = prepared.manifest.tokenizer
    collator = PackedCollator(
        tokenizer.pad_token_id, prepared.manifest.sequence_length, vocab_size=tokenizer.vocab_size
    )
    training = TrainingRows(prepared.train)
    order = iter(StreamSampler(prepared.train_shards, rows * batches, _SEED))
    while numbers := list(islice(order, rows)):
        yield collator(training.__getitems__(numbers))


def forget(folder: Path) -> None:
    """Has the kernel drop the files' pages (Linux and other POSIX systems)."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != MANIFEST_NAME:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
