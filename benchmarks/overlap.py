"""How much of a prepared set's test rows stands in its training rows too, word for word.

    python benchmarks/overlap.py --dataset_path DIR [--span 50]

Prints, by source, the share of tokens of the test rows that lie in a run of at least `--span` tokens which some
training row has. Runs are compared by a hash of 64 bits, so a rare one may be counted by accident.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from flags import run_command

from doge_lm.data.dataset import load_prepared
from doge_lm.errors import UserError

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits all over
ROWS_AT_ONCE = 1000


def span_hashes(ids: np.ndarray, span: int) -> np.ndarray:
    """A hash of each run of `span` tokens of a row, modulo 2^64: Σ_j BASE^(span - 1 - j) · (id_j + 1)."""
    count = len(ids) - span + 1
    hashes = np.zeros(max(count, 0), dtype=np.uint64)
    for offset in range(span):
        hashes = hashes * BASE + (ids[offset : offset + len(hashes)].astype(np.uint64) + np.uint64(1))
    return hashes


def covered(ids: np.ndarray, span: int, known: np.ndarray) -> np.ndarray:
    """Which tokens of a row lie in a run whose hash is among `known`, which is sorted."""
    hashes = span_hashes(ids, span)
    places = np.searchsorted(known, hashes)
    found = known[np.minimum(places, len(known) - 1)] == hashes if len(known) else np.zeros(len(hashes), dtype=bool)
    edges = np.zeros(len(ids) + 1, dtype=np.int64)
    np.add.at(edges, np.flatnonzero(found), 1)
    np.add.at(edges, np.flatnonzero(found) + span, -1)
    return edges.cumsum()[:-1] > 0


def rows_of(dataset: Dataset) -> Iterator[tuple[np.ndarray, str]]:
    """Ids and source of each row, read many at a time."""
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        batch = dataset[start : start + ROWS_AT_ONCE]
        for ids, source in zip(batch["input_ids"], batch["source"], strict=True):
            yield np.asarray(ids), str(source)


def overlap(train: Dataset, test: Dataset, span: int) -> dict[str, float]:
    """The share of covered tokens by source, and of all tokens under `all`."""
    hashes = [span_hashes(ids, span) for ids, _ in rows_of(train)]
    known = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, dtype=np.uint64)
    counts: dict[str, np.ndarray] = {}
    for ids, source in rows_of(test):
        inside = covered(ids, span, known)
        for name in (source, "all"):
            counts[name] = counts.get(name, np.zeros(2)) + np.array([inside.sum(), len(inside)])
    return {name: float(inside / tokens) for name, (inside, tokens) in sorted(counts.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path, required=True)
    parser.add_argument("--span", type=int, default=50)
    args = parser.parse_args()
    if args.span < 1:
        raise UserError(f"--span {args.span}: must be at least 1")
    prepared = load_prepared(args.dataset_path)
    shares = overlap(prepared.train, prepared.test, args.span)
    print(json.dumps({name: round(share, 5) for name, share in shares.items()}))
    return 0


if __name__ == "__main__":
    run_command(main)
