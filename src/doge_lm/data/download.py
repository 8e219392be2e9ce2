"""`doge-lm download_datasets`: public sources from the hub, or files of the user's own, into `SAVE_DIR/raw/NAME`.

Sources of the catalogue are streamed and written as `part-00000.jsonl.zst`, ...; files of the user's own stay where
they are, and only `source.json` is written, which refers to them.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from doge_lm.data.manifest import FULL_DISK, RAW_FOLDER, InputFile, RawSource, atomic_directory
from doge_lm.data.sources import (
    ALL_SOURCES_DISK_BYTES,
    CATALOGUE,
    CatalogueEntry,
    Location,
    estimated_disk_bytes,
    find_files,
    parse_row,
    read_rows,
    row_kind,
)
from doge_lm.data.workers import check_num_proc
from doge_lm.errors import UserError

CONTENTS_VARIABLE = "DOGE_CONTENTS_ENDPOINT"
CONTENTS_ENDPOINT = "https://softwareheritage.s3.amazonaws.com"

_SHARD_BYTES = 2**28  # of JSON lines, before compression
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TRIES = 4
_TIMEOUT_SECONDS = 60
_THREADS_PER_PROCESS = 8
# A bucket that may not be listed answers 403 for a missing object; a bucket closed to us answers it for every one.
_MISSING_BEFORE_DOUBT = 100

ReadRows = Callable[[CatalogueEntry, Path | None], Iterator[dict[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `download_datasets`."""
    terabytes = ALL_SOURCES_DISK_BYTES / 10**12
    parser.epilog = (
        f"All sources together need about {terabytes:.0f} TB of disk for the whole path from download to merged sets. "
        "HF_ENDPOINT chooses another hub."
    )
    parser.add_argument("--save_dir", type=Path, required=True, help="DIR/raw/NAME is written for each source")
    parser.add_argument("--cache_dir", type=Path, help="the hub's cache (default: the usual place of `datasets`)")
    parser.add_argument(
        "--num_proc",
        type=int,
        default=1,
        help=f"python-edu: {_THREADS_PER_PROCESS} times as many contents are fetched at once (default: 1); the other "
        "sources are streamed one after another",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help=f"sources of the catalogue: {', '.join(CATALOGUE)} (default: all; none, if --local is given)",
    )
    parser.add_argument("--max_rows", type=int, help="take only the first rows of each source of the catalogue")
    parser.add_argument(
        "--local",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="files of your own (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, or a folder of them) as the source "
        "NAME, of the catalogue or new; may be repeated. If given without --datasets, only these are taken",
    )
    parser.add_argument(
        "--contents_endpoint",
        default=None,
        help=f"where python-edu's contents come from (default: {CONTENTS_VARIABLE}, or {CONTENTS_ENDPOINT})",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `download_datasets`."""
    check_num_proc(args.num_proc)
    if args.max_rows is not None and args.max_rows < 1:
        raise UserError(f"--max_rows {args.max_rows} is not possible; it must be at least 1")
    local = _parse_local(args.local)
    names = _chosen(args.datasets, local)
    taken = [take_local(name, path, args.save_dir / RAW_FOLDER / name) for name, path in local.items()]
    if names:
        print(announce(names, args.save_dir, args.max_rows))
    endpoint = args.contents_endpoint or os.environ.get(CONTENTS_VARIABLE) or CONTENTS_ENDPOINT
    for name in names:
        fetcher = ContentFetcher(endpoint, args.num_proc * _THREADS_PER_PROCESS)
        target = args.save_dir / RAW_FOLDER / name
        taken.append(download(name, target, args.cache_dir, args.max_rows, fetcher))
    for source in taken:
        size = sum(file.bytes for file in source.files)
        files = "1 file" if len(source.files) == 1 else f"{len(source.files):,} files"
        print(f"{source.name}: {source.kind}, {files} of {size:,} bytes, from {source.origin}")
        for reason, count in source.counts.items():
            print(f"{source.name}: {reason}: {count:,}")
    print(
        f"next: doge-lm preprocess_datasets --datasets_dir {args.save_dir} --save_dir {args.save_dir} "
        "--tokenizer_path ./tokenizer"
    )
    return 0


def _chosen(datasets: list[str] | None, local: dict[str, Path]) -> list[str]:
    if datasets is None:
        return [] if local else list(CATALOGUE)
    for name in datasets:
        if name not in CATALOGUE:
            raise UserError(f"--datasets {name}: no such source (there: {', '.join(CATALOGUE)})")
        if name in local:
            raise UserError(f"the source {name} is asked for twice, by --datasets and by --local")
    return list(dict.fromkeys(datasets))


# ---------------------------------------------------------------------------------------------------------------
# Files of the user's own
# ---------------------------------------------------------------------------------------------------------------


def _parse_local(values: list[str]) -> dict[str, Path]:
    local: dict[str, Path] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not path:
            raise UserError(f"--local {value!r} is not of the form NAME=PATH")
        if not _NAME.fullmatch(name):
            raise UserError(f"--local {value!r}: the name {name!r} may hold letters, digits, `.`, `_` and `-` only")
        if name in local:
            raise UserError(f"--local {name} is given twice; put the files into one folder, or choose two names")
        local[name] = Path(path).expanduser()
    return local


def take_local(name: str, path: Path, target: Path) -> RawSource:
    """Takes in files of the user's own by reference: writes `target/source.json`.

    The kind is read off the first row: text is for pre-training, a conversation for fine-tuning.

    Raises:
        UserError: if there is nothing readable at the path, the first row is faulty, or the name is one of the
            catalogue that is for something else.
    """
    files = find_files(path)
    first = next(read_rows(files), None)
    if first is None:
        raise UserError(f"--local {name}: there is not one row in {path}")
    kind = row_kind(first)
    if name in CATALOGUE and CATALOGUE[name].kind != kind:
        raise UserError(
            f"--local {name}: the rows of {path} are for {kind}, but {name} is a source for {CATALOGUE[name].kind}; "
            "choose another name"
        )
    source = RawSource(
        name=name,
        kind=kind,
        origin=str(path.resolve()),
        licence="the user's own",
        files=[InputFile(str(file.resolve()), file.stat().st_size) for file in files],
    )
    with atomic_directory(target) as folder:
        source.write(folder)
    return source


# ---------------------------------------------------------------------------------------------------------------
# Sources of the catalogue
# ---------------------------------------------------------------------------------------------------------------


def announce(names: list[str], save_dir: Path, max_rows: int | None) -> str:
    """What the chosen sources will need, after checking that it is there.

    Raises:
        UserError: if the disk has less than that free.
    """
    needs = {name: estimated_disk_bytes(CATALOGUE[name], max_rows) for name in names}
    need, free = sum(needs.values()), _free_bytes(save_dir)
    if need > free:
        raise UserError(
            f"{', '.join(names)} need about {_gb(need)} from download to merged sets, but only {_gb(free)} are free at "
            f"{save_dir}; choose fewer sources with --datasets, or their beginnings with --max_rows"
        )
    lines = [f"{name}: about {_gb(size)} of disk from download to merged set" for name, size in needs.items()]
    lines += [f"{name}: {CATALOGUE[name].note}" for name in names if CATALOGUE[name].note]
    lines.append(f"together about {_gb(need)}; {_gb(free)} are free at {save_dir}")
    return "\n".join(lines)


def _free_bytes(path: Path) -> int:
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _gb(size: int) -> str:
    return f"{size / 10**9:,.1f} GB"


def hub_rows(entry: CatalogueEntry, cache_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Streams the rows of a source from the hub, reduced to the fields that are kept.

    Raises:
        UserError: if the hub refuses, is out of reach, or the source lacks a field.
    """
    from datasets import load_dataset  # noqa: PLC0415 - heavy, and of no use for --local

    try:
        stream = load_dataset(
            entry.hub_id,
            entry.config,
            split="train",
            streaming=True,
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
        for row in stream:
            missing = [name for name in entry.fields if name not in row]
            if missing:
                raise UserError(f"{entry.hub_id} has no field `{missing[0]}` any more (fields there: {list(row)})")
            yield {name: row[name] for name in entry.fields}
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise  # the cache could not be written; `atomic_directory` says so
        # What `datasets` raises for a repository that is missing, gated or out of reach is one of these.
        login = " (it is gated: accept its conditions there and run `hf auth login`)" if "gated" in entry.note else ""
        raise UserError(f"{entry.hub_id} could not be read from the hub{login}: {error}") from error


def download(
    name: str,
    target: Path,
    cache_dir: Path | None = None,
    max_rows: int | None = None,
    fetcher: "ContentFetcher | None" = None,
    read: ReadRows = hub_rows,
) -> RawSource:
    """Downloads one source of the catalogue into `target`, whole or not at all.

    Args:
        name: of the catalogue.
        target: `SAVE_DIR/raw/NAME`.
        cache_dir: the hub's cache.
        max_rows: take only the first rows.
        fetcher: fetches the texts of a source that lists blob ids.
        read: gives the rows of a source.

    Raises:
        UserError: if the hub or the contents cannot be read, a row is faulty, or the disk is full.
    """
    entry = CATALOGUE[name]
    counts: dict[str, int] = {"rows": 0}
    with atomic_directory(target) as folder:
        rows: Iterable[dict[str, Any]] = islice(read(entry, cache_dir), max_rows)
        if entry.contents_from_software_heritage:
            fetcher = fetcher or ContentFetcher(CONTENTS_ENDPOINT, _THREADS_PER_PROCESS)
            rows = fetcher.fill_in(rows)
        total = entry.rows if max_rows is None else min(max_rows, entry.rows)
        files = write_shards(folder, _checked(tqdm(rows, name, total, disable=None, unit=" rows"), entry, counts))
        if fetcher is not None and entry.contents_from_software_heritage:
            counts.update(fetcher.counts)
        if not files:
            found = ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())
            raise UserError(f"{name}: not one row could be taken ({found})")
        source = RawSource(
            name=name,
            kind=entry.kind,
            origin=entry.hub_id if entry.config is None else f"{entry.hub_id} ({entry.config})",
            licence=entry.licence,
            files=files,
            counts=counts,
        )
        source.write(folder)
    return source


def _checked(rows: Iterable[dict[str, Any]], entry: CatalogueEntry, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Passes rows on that preprocessing will be able to read."""
    for number, row in enumerate(rows, start=1):
        parse_row(row, Location(Path(entry.hub_id), number, "row"), entry.kind)
        counts["rows"] += 1
        yield row


def write_shards(folder: Path, rows: Iterable[dict[str, Any]], shard_bytes: int = _SHARD_BYTES) -> list[InputFile]:
    """Writes rows as `part-00000.jsonl.zst`, ...; a shard ends when its JSON lines reach `shard_bytes`."""
    files: list[InputFile] = []
    lines = (json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n" for row in rows)
    line = next(lines, None)
    while line is not None:
        path = folder / f"part-{len(files):05d}.jsonl.zst"
        written = 0
        with path.open("wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as stream:
            while line is not None and written < shard_bytes:
                stream.write(line)
                written += len(line)
                line = next(lines, None)
        files.append(InputFile(path.name, path.stat().st_size))
    return files


# ---------------------------------------------------------------------------------------------------------------
# Contents by blob id
# ---------------------------------------------------------------------------------------------------------------

_MISSING = "contents missing in the bucket, skipped"
_NOT_TEXT = "contents not UTF-8, skipped"


@dataclass
class ContentFetcher:
    """Fetches the texts of python-edu from the Software Heritage bucket: gzip files named by blob id.

    Attributes:
        endpoint: the bucket's address; `endpoint/content/BLOB_ID` is fetched.
        threads: contents in flight.
        counts: what was skipped, with the reason.
    """

    endpoint: str
    threads: int
    counts: dict[str, int] = field(default_factory=lambda: {_MISSING: 0, _NOT_TEXT: 0})

    def fill_in(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Adds `text` to rows that hold a `blob_id`, in order; rows without a readable content are left out.

        Raises:
            UserError: if a content cannot be fetched after some tries, or none of the first ones is there.
        """
        pending: deque[tuple[dict[str, Any], Future[str | None]]] = deque()
        found = False
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for row in rows:
                    pending.append((row, pool.submit(self._fetch, row["blob_id"])))
                    if len(pending) >= 4 * self.threads:
                        filled = self._filled(*pending.popleft())
                        found = found or filled is not None
                        if filled is not None:
                            yield filled
                        elif not found:
                            self._doubt()
                for row, future in pending:
                    filled = self._filled(row, future)
                    if filled is not None:
                        yield filled
            finally:
                for _, future in pending:
                    future.cancel()

    def _doubt(self) -> None:
        if self.counts[_MISSING] >= _MISSING_BEFORE_DOUBT:
            raise UserError(
                f"none of the first {_MISSING_BEFORE_DOUBT} contents is at {self.endpoint}/content/; is it reachable, "
                "and the right --contents_endpoint?"
            )

    def _filled(self, row: dict[str, Any], future: "Future[str | None]") -> dict[str, Any] | None:
        try:
            text = future.result()
        except UnicodeDecodeError:
            self.counts[_NOT_TEXT] += 1
            return None
        if text is None:
            self.counts[_MISSING] += 1
            return None
        return {**row, "text": text}

    def _fetch(self, blob_id: str) -> str | None:
        """One content, or None if the bucket does not have it."""
        url = f"{self.endpoint.rstrip('/')}/content/{blob_id}"
        for attempt in range(1, _TRIES + 1):
            try:
                with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
                    return gzip.decompress(response.read()).decode("utf-8")
            except urllib.error.HTTPError as error:
                if error.code in (403, 404):
                    return None
                reason: Exception = error
            except (OSError, HTTPException, EOFError, zlib.error) as error:  # a broken connection, a cut body
                reason = error
            if attempt < _TRIES:
                time.sleep(0.25 * 2**attempt)
        raise UserError(f"{url} could not be fetched in {_TRIES} tries: {reason}") from reason
