"""How rows are filled: waste, cut documents and speed of best-fit packing, concatenation and padding.

    python benchmarks/packing.py --data ../shared/data --tokenizer_path tokenizer

Prints the table of `docs/packing.md`. Only the packing is timed, one process, tokenized documents in and rows out.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from doge_lm.data.documents import PieceBatch, Tokenizing
from doge_lm.data.encoders import Encoder, choose_backend, load_encoder
from doge_lm.data.manifest import SourceAccounting
from doge_lm.data.packing import Packing, cutting_length, make_row_maker
from doge_lm.data.sources import read_rows

SETS = {
    "pre-training": ("english.jsonl.zst", "chinese.jsonl.zst", "python.jsonl.zst"),
    "conversations": ("instruct_en.jsonl.zst", "instruct_zh.jsonl.zst"),
}
PACKINGS: tuple[Packing, ...] = ("best_fit", "concat", "max_length")
HEADER = (
    "| data | T | packing | rows | empty | repeated | documents cut | of those shorter than T | largest group, rows "
    "| M tokens/s |"
)


def tokenize(encoder: Encoder, files: list[Path], length: int) -> Iterator[PieceBatch]:
    tokenizing = Tokenizing(encoder, length)
    rows = read_rows(files)
    while batch := list(islice(rows, 128)):
        yield tokenizing(batch)


def measure(name: str, batches: list[PieceBatch], packing: Packing, length: int, encoder: Encoder) -> str:
    account = SourceAccounting()
    for batch in batches:
        account.add(batch.account)
    maker = make_row_maker(packing, length, pad_token_id=encoder.special.pad, byte_lengths=encoder.byte_lengths)
    tokens = rows = 0
    groups: Counter[int] = Counter()
    begin = time.perf_counter()
    for batch in batches:
        for document in batch.documents():
            for row in maker.add(document):
                rows += 1
                tokens += int(row.document_lengths.sum())
                groups[row.group] += 1
    for row in maker.finish():
        rows += 1
        tokens += int(row.document_lengths.sum())
        groups[row.group] += 1
    seconds = time.perf_counter() - begin
    account.add(maker.changes)
    longer = sum(int((batch.lengths > length).sum()) for batch in batches) if packing == "concat" else None
    short_cut = 0 if longer is None else account.documents_cut - longer
    return (
        f"| {name} | {length:,} | {packing} | {rows:,} | {1 - tokens / (rows * length):.2%} "
        f"| {account.overlap / tokens:.2%} | {account.documents_cut:,} of {account.documents_kept:,} | {short_cut:,} "
        f"| {max(groups.values()):,} | {tokens / seconds / 1e6:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--max_len", type=int, nargs="+", default=[1024, 2048])
    args = parser.parse_args()
    backend, _ = choose_backend(args.tokenizer_path, "auto", [])
    encoder = load_encoder(args.tokenizer_path, backend)
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    for name, files in SETS.items():
        for length in args.max_len:
            for packing in PACKINGS:
                paths = [args.data / file for file in files]
                batches = list(tokenize(encoder, paths, cutting_length(packing, length)))
                print(measure(name, batches, packing, length, encoder), flush=True)


if __name__ == "__main__":
    main()
