"""Writes a large corpus of distinct documents: real text repeated, each time with other words in some of its places.

    python benchmarks/synthetic_corpus.py --save_dir DIR [--gigabytes 20] [--text_dir ../shared/data] [--num_proc 2]

For each source of the text (`english`, `chinese`, `python`; without a text directory, the sources of Python's standard
library) `DIR/NAME/part-00000.jsonl.zst`, … are written, each of `--file_mb` MB of JSON lines, in proportion to the
text's own sizes. About every 60 characters a word (in Chinese, a character) is a place where a copy may have another
word of the same document; each copy changes half of the places, so no two documents are equal. The order of the
documents changes from copy to copy. A file depends on the seed and its number alone, so more processes write the same.
"""

import argparse
import io
import json
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import zstandard

TEXT_SOURCES = ("english", "chinese", "python")
PLACE_DISTANCE = 60  # characters from a place to the next
_WORD = re.compile(r"[A-Za-z]{3,}|[\u4e00-\u9fff]")
_WRITE_BYTES = 2**20


@dataclass(frozen=True)
class Template:
    """A document as JSON, cut at its places: `pieces[0] word pieces[1] word … pieces[-1]`."""

    pieces: list[bytes]
    words: list[bytes]

    def fill(self, rng: random.Random) -> bytes:
        """The document with about half of its words swapped for others of its own."""
        words = self.words
        if not words:
            return self.pieces[0]
        parts = [b""] * (2 * len(words) + 1)
        parts[0::2] = self.pieces
        count = len(words)
        chosen = rng.choices(words, k=count)
        keep = rng.getrandbits(count)
        parts[1::2] = [word if bit == "1" else other for word, other, bit in zip(
            words, chosen, f"{keep:0{count}b}", strict=True)]  # fmt: skip
        return b"".join(parts)


def make_template(row: dict[str, Any]) -> Template:
    """Cuts a row (`text`, and `prompt` where it has one) at its places."""
    text: str = row["text"]
    head = '{"prompt": ' + json.dumps(row["prompt"], ensure_ascii=False) + ", " if row.get("prompt") else "{"
    pieces, words = [head + '"text": "'], []
    begin, match = 0, _WORD.search(text)
    while match is not None:
        pieces[-1] += _escaped(text[begin : match.start()])
        words.append(match.group().encode())
        pieces.append("")
        begin = match.end()
        match = _WORD.search(text, begin + PLACE_DISTANCE)
    pieces[-1] += _escaped(text[begin:]) + '"}\n'
    return Template([piece.encode() for piece in pieces], words)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def read_text(text_dir: Path | None, source: str) -> Iterator[dict[str, Any]]:
    """The rows of a source; from Python's own sources where there is no text directory."""
    if text_dir is None:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            yield {"text": path.read_text(encoding="utf-8")}
        return
    with zstandard.open(text_dir / f"{source}.jsonl.zst", "rb") as file:
        yield from map(json.loads, io.BufferedReader(file, 2**20))


_templates: dict[str, list[Template]] = {}  # a process keeps the source that it worked on last


def _source_templates(text_dir: Path | None, source: str) -> list[Template]:
    if source not in _templates:
        _templates.clear()
        _templates[source] = [make_template(row) for row in read_text(text_dir, source)]
    return _templates[source]


def documents(templates: list[Template], seed: str) -> Iterator[bytes]:
    """Documents without end: permutation after permutation of all templates, each copy with other words."""
    rng = random.Random(seed)
    order = list(range(len(templates)))
    while True:
        rng.shuffle(order)
        for index in order:
            yield templates[index].fill(rng)


@dataclass(frozen=True)
class FileTask:
    """One file to write."""

    source: str
    number: int
    raw_bytes: int


@dataclass(frozen=True)
class FileDone:
    """A file that was written; `seconds` without what the process needs once for each source."""

    raw_bytes: int
    file_bytes: int
    documents: int
    seconds: float


def write_file(task: FileTask, *, save_dir: Path, text_dir: Path | None, seed: int, level: int) -> FileDone:
    """Writes one file, whole or not at all."""
    templates = _source_templates(text_dir, task.source)
    begin = time.monotonic()
    path = save_dir / task.source / f"part-{task.number:05d}.jsonl.zst"
    temporary = path.with_name(path.name + ".part")
    count = raw = pending = 0
    lines: list[bytes] = []
    with temporary.open("wb") as file, zstandard.ZstdCompressor(level=level).stream_writer(file, closefd=False) as out:
        for line in documents(templates, f"{seed} {task.source} {task.number}"):
            lines.append(line)
            count, raw, pending = count + 1, raw + len(line), pending + len(line)
            if pending >= _WRITE_BYTES or raw >= task.raw_bytes:
                out.write(b"".join(lines))
                lines, pending = [], 0
            if raw >= task.raw_bytes:
                break
    temporary.replace(path)
    return FileDone(raw, path.stat().st_size, count, time.monotonic() - begin)


def file_tasks(sizes: dict[str, int], total: int, file_bytes: int) -> list[FileTask]:
    """Shares `total` bytes out among sources in proportion to their sizes, and cuts each share into files."""
    tasks = []
    whole = sum(sizes.values())
    for source, size in sizes.items():
        left = total * size // whole
        number = 0
        while left > 0:
            tasks.append(FileTask(source, number, min(file_bytes, left)))
            left -= file_bytes
            number += 1
    return tasks


def write_corpus(
    save_dir: Path,
    total_bytes: int,
    *,
    text_dir: Path | None = None,
    file_bytes: int = 256 * 10**6,
    num_proc: int = 1,
    seed: int = 0,
    level: int = 1,
) -> dict[str, dict[str, float]]:
    """Writes the corpus.

    Args:
        save_dir: a folder that is not there yet.
        total_bytes: of JSON lines, before compression; each file ends with the document that reaches its size.
        text_dir: holds `english.jsonl.zst` and so on; None takes the sources of Python's standard library.
        file_bytes: of JSON lines, a file.
        num_proc: processes that write.
        seed: of the changes and the order.
        level: of zstd.

    Returns:
        For each source: files, raw_bytes, file_bytes, documents, core_seconds (of writing).
    """
    sources = ("python",) if text_dir is None else TEXT_SOURCES
    sizes = {source: sum(len(row["text"].encode()) for row in read_text(text_dir, source)) for source in sources}
    tasks = file_tasks(sizes, total_bytes, file_bytes)
    for source in sources:
        (save_dir / source).mkdir(parents=True)
    write = partial(write_file, save_dir=save_dir, text_dir=text_dir, seed=seed, level=level)
    with ProcessPoolExecutor(num_proc, mp_context=get_context("spawn")) as pool:
        done = list(pool.map(write, tasks))
    written = {}
    for source in sources:
        of_source = [file for task, file in zip(tasks, done, strict=True) if task.source == source]
        written[source] = {
            "files": len(of_source),
            "raw_bytes": sum(file.raw_bytes for file in of_source),
            "file_bytes": sum(file.file_bytes for file in of_source),
            "documents": sum(file.documents for file in of_source),
            "core_seconds": sum(file.seconds for file in of_source),
        }
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_dir", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--gigabytes", type=float, default=20, help="GB (10^9 bytes) of JSON lines (default: 20)")
    parser.add_argument("--text_dir", type=Path, help="real text; by default the sources of Python's standard library")
    parser.add_argument("--file_mb", type=float, default=256, help="MB of JSON lines a file (default: 256)")
    parser.add_argument("--num_proc", type=int, default=2, help="processes that write (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", type=int, default=1, help="of zstd (default: 1)")
    args = parser.parse_args()
    begin = time.monotonic()
    written = write_corpus(
        args.save_dir,
        round(args.gigabytes * 10**9),
        text_dir=args.text_dir,
        file_bytes=round(args.file_mb * 10**6),
        num_proc=args.num_proc,
        seed=args.seed,
        level=args.level,
    )
    raw = sum(source["raw_bytes"] for source in written.values())
    core_seconds = sum(source["core_seconds"] for source in written.values())
    print(
        json.dumps(
            {
                "sources": written,
                "raw_bytes": raw,
                "wall_seconds": time.monotonic() - begin,
                "mb_per_second_and_core": raw / 10**6 / core_seconds,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
