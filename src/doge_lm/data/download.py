"""`doge-lm download_datasets`: public sources from the hub, or files of the user's own, into `SAVE_DIR/raw/NAME`.

The files of a source of the catalogue are fetched from the hub, several at once, and each is written as shards
`part-FILE-NUMBER.jsonl.zst` of the fields that are kept; an interrupted run goes on where it ended. Files of the user's
own stay where they are, and only `source.json` is written, which refers to them.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from tqdm import tqdm

from doge_lm.data.contents import CONTENTS_ENDPOINT, CONTENTS_VARIABLE, ContentFetcher
from doge_lm.data.hub import Hub, HubFile, Listing
from doge_lm.data.manifest import (
    RAW_FOLDER,
    SOURCE_NAME,
    InputFile,
    Kind,
    RawSource,
    atomic_directory,
    is_made,
    made_already,
    read_record,
    resumable_directory,
    without_rows,
    write_record,
)
from doge_lm.data.parquet import BrokenPageError, open_parquet, parquet_batches
from doge_lm.data.sources import (
    ALL_SOURCES_DISK_BYTES,
    CATALOGUE,
    SUFFIXES,
    BadInputError,
    CatalogueEntry,
    estimated_disk_bytes,
    file_suffix,
    find_files,
    read_objects,
    row_kind,
    scan_rows,
)
from doge_lm.data.transfer import DEFAULT_RETRIES, Client, DiskGuard, RateLimit
from doge_lm.data.workers import Workers, check_num_proc
from doge_lm.errors import UserError

_SHARD_BYTES = 2**28  # of JSON lines, before compression
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PROGRESS = "progress"
_IDS_PER_UNIT = 10_000
_CONTENTS_IN_FLIGHT = 16  # in each process
_DISK_CHECK_BYTES = 2**24
# For telling what files of the user's own hold: whether a document is too large is for preprocessing to say.
_LOCAL_DOCUMENT_BYTES = 2**28
# How far each file is looked at, once one of them has told the kind.
_LOCAL_ROWS = 100
_PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `download_datasets`."""
    terabytes = ALL_SOURCES_DISK_BYTES / 10**12
    parser.epilog = (
        f"All sources together need about {terabytes:.0f} TB of disk for the whole path from download to merged sets. "
        "HF_ENDPOINT chooses another hub."
    )
    parser.add_argument("--save_dir", type=Path, required=True, help="DIR/raw/NAME is written for each source")
    parser.add_argument(
        "--cache_dir",
        type=Path,
        help="where files of the hub lie until they are written as shards (default: DIR/cache)",
    )
    parser.add_argument(
        "--num_proc",
        type=int,
        default=1,
        help="files fetched at once, and processes that write shards, each of which fetches "
        f"{_CONTENTS_IN_FLIGHT} of python-edu's contents at once (default: 1)",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help=f"sources of the catalogue: {', '.join(CATALOGUE)} (default: all; none, if --local is given)",
    )
    parser.add_argument(
        "--max_rows",
        type=int,
        help="take only the first rows of each source of the catalogue; whole files are fetched until these are there",
    )
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
    parser.add_argument("--max_rate", type=float, metavar="MB", help="fetch at most so many MB a second in all")
    parser.add_argument(
        "--min_free_disk", type=float, default=1.0, metavar="GB", help="stop before less is free (default: 1)"
    )
    parser.add_argument(
        "--ignore_estimate",
        action="store_true",
        help="begin even if the sources are estimated to need more disk than is free (the estimate is of the whole "
        "path, as if all of it went to this disk)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=DEFAULT_RETRIES,
        help=f"how often a transfer that brings nothing new is tried again (default: {DEFAULT_RETRIES})",
    )
    parser.add_argument("--keep_cache", action="store_true", help="keep the files of the hub after they are written")
    parser.add_argument(
        "--overwrite", action="store_true", help="make sources of the catalogue anew, whatever was there"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `download_datasets`."""
    check_num_proc(args.num_proc)
    if args.max_rows is not None and args.max_rows < 1:
        raise UserError(f"--max_rows {args.max_rows} is not possible; it must be at least 1")
    if args.retries < 0:
        raise UserError(f"--retries {args.retries} is not possible; it must be at least 0")
    if args.max_rate is not None and not args.max_rate > 0:
        raise UserError(f"--max_rate {args.max_rate} is not possible; it must be more than 0")
    if not args.min_free_disk >= 0:
        raise UserError(f"--min_free_disk {args.min_free_disk} is not possible; it must be at least 0")
    local = _parse_local(args.local)
    names = _chosen(args.datasets, local)
    taken = [take_local(name, path, args.save_dir / RAW_FOLDER / name) for name, path in local.items()]
    if names:
        print(announce(names, args.save_dir, args.max_rows, ignore_estimate=args.ignore_estimate))
    settings = DownloadSettings(
        cache_dir=args.cache_dir or args.save_dir / "cache",
        num_proc=args.num_proc,
        max_rows=args.max_rows,
        max_rate=None if args.max_rate is None else args.max_rate * 10**6,
        min_free_disk=round(args.min_free_disk * 10**9),
        retries=args.retries,
        contents_endpoint=args.contents_endpoint or os.environ.get(CONTENTS_VARIABLE) or CONTENTS_ENDPOINT,
        keep_cache=args.keep_cache,
        overwrite=args.overwrite,
    )
    taken += [download(name, args.save_dir / RAW_FOLDER / name, settings) for name in names]
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

    The kind is read off the first good row: text is for pre-training, a conversation for fine-tuning. What is faulty
    before it, empty, left aside or of the other kind is said on stderr; what becomes of it is for preprocessing to
    decide.

    Raises:
        UserError: if there is nothing readable at the path, no file holds a good row, or the name is one of the
            catalogue that is for something else.
    """
    files = find_files(path)
    if aside := _left_aside(path):
        _warn(name, f"left aside: {aside} (readable are {', '.join(SUFFIXES)})")
    kind = _kind_of(name, path, files)
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


def _kind_of(name: str, path: Path, files: list[Path]) -> Kind:
    """What the first good row of the files is for, after a look at the beginning of each of them."""
    first: dict[Kind, Path] = {}  # the first file of each kind
    fault: BadInputError | None = None
    faults = 0
    empty: list[str] = []
    for file in tqdm(files, f"{name}: looking", unit=" files", disable=None):
        if "pretrain" in first and file_suffix(file) == ".txt":
            continue  # it could tell nothing new, and would be read whole
        items = scan_rows(file, max_document_bytes=_LOCAL_DOCUMENT_BYTES)
        found = False
        for item in islice(items, _LOCAL_ROWS) if first else items:
            found = True
            if not isinstance(item, BadInputError):
                first.setdefault(row_kind(item[1]), file)
                break
            fault = fault or item
            faults += 1
        if not found:
            empty.append(str(file))
    if empty:
        _warn(name, without_rows(empty))
    if not first:
        raise UserError(
            f"--local {name}: there is not one good row in {path}" + (f"; the first fault: {fault}" if fault else "")
        )
    if fault:
        more = f" (and {faults - 1:,} more)" if faults > 1 else ""
        _warn(name, f"{fault}{more}; preprocess_datasets will stop there, or leave it out with --on_error skip")
    kind, *others = first
    for other in others:
        _warn(
            name,
            f"{first[kind]} is for {kind}, but {first[other]} for {other}: the source is taken for {kind}, and the "
            "rows of the other kind are bad input; put them into a folder of their own, and give it another --local "
            "NAME=PATH",
        )
    return kind


def _left_aside(path: Path) -> str:
    """How many files of a folder are of no readable kind, by suffix; empty if there are none."""
    counts: Counter[str] = Counter()
    for entry in path.rglob("*") if path.is_dir() else ():
        hidden = any(part.startswith(".") for part in entry.relative_to(path).parts)
        if not hidden and file_suffix(entry) is None and entry.is_file():
            packed = entry.suffix.lower() in _PACKED_SUFFIXES
            counts["".join(entry.suffixes[-2 if packed else -1 :]).lower() or "without a suffix"] += 1
    return ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items()))


def _warn(name: str, message: str) -> None:
    print(f"warning: --local {name}: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------
# Sources of the catalogue
# ---------------------------------------------------------------------------------------------------------------


def announce(names: list[str], save_dir: Path, max_rows: int | None, *, ignore_estimate: bool = False) -> str:
    """What the chosen sources will need, after checking that it is there.

    Raises:
        UserError: if the disk has less than that free, unless `ignore_estimate`.
    """
    needs = {name: estimated_disk_bytes(CATALOGUE[name], max_rows) for name in names}
    need, free = sum(needs.values()), _free_bytes(save_dir)
    raw = save_dir / RAW_FOLDER
    # What a source that was begun has taken is not free any more; --min_free_disk looks after the rest of it.
    begun = {name for name in names if (raw / name).exists() or (raw / f".tmp-{name}").exists()}
    if not ignore_estimate and sum(size for name, size in needs.items() if name not in begun) > free:
        raise UserError(
            f"{', '.join(names)} need about {_gb(need)} from download to merged sets, but only {_gb(free)} are free at "
            f"{save_dir}; choose fewer sources with --datasets, or their beginnings with --max_rows; or, if the later "
            "stages write to another disk, give --ignore_estimate: --min_free_disk ends the run before the disk is full"
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


@dataclass(frozen=True)
class DownloadSettings:
    """How a source is downloaded. Only `max_rows` and `contents_endpoint` change the result.

    Attributes:
        cache_dir: where files of the hub lie until they are written as shards.
        num_proc: files fetched at once, and processes that write shards.
        max_rows: take only the first rows.
        max_rate: bytes a second, over everything.
        min_free_disk: bytes to leave free.
        retries: how often a fault may follow another.
        contents_endpoint: where python-edu's texts come from.
        keep_cache: leave the files of the hub where they are.
        overwrite: make a source anew that was made with other settings.
    """

    cache_dir: Path
    num_proc: int = 1
    max_rows: int | None = None
    max_rate: float | None = None
    min_free_disk: int = 0
    retries: int = DEFAULT_RETRIES
    contents_endpoint: str = CONTENTS_ENDPOINT
    keep_cache: bool = False
    overwrite: bool = False

    def identity(self, entry: CatalogueEntry) -> dict[str, Any]:
        """What the result depends on, under the names of the flags."""
        identity: dict[str, Any] = {
            "repository": entry.hub_id,
            "configuration": entry.config or "",
            "fields": list(entry.fields),
            "--max_rows": self.max_rows,
        }
        if entry.contents_from_software_heritage:
            identity["--contents_endpoint"] = self.contents_endpoint
        return identity

    def rate_share(self, entry: CatalogueEntry) -> float | None:
        """Bytes a second for each process that fetches: this one alone, or also those that write, if they fetch."""
        if self.max_rate is None or not entry.contents_from_software_heritage:
            return self.max_rate
        return self.max_rate / (self.num_proc + 1)


def download(name: str, target: Path, settings: DownloadSettings) -> RawSource:
    """Downloads one source of the catalogue into `target`; goes on where an interrupted run of the same ended.

    Args:
        name: of the catalogue.
        target: `SAVE_DIR/raw/NAME`.
        settings: how.

    Raises:
        UserError: if the hub or the contents cannot be read, the disk is full, or other settings were used before.
    """
    entry = CATALOGUE[name]
    identity = settings.identity(entry)
    if is_made(target, identity, lambda folder: RawSource.read(folder).settings, overwrite=settings.overwrite):
        print(made_already(target))
        return RawSource.read(target)
    with resumable_directory(target, identity, overwrite=settings.overwrite) as folder:
        # It takes its place in the folder at once, and last: then only the tidying may be left to do.
        if not (folder / SOURCE_NAME).exists():
            _Download(name, entry, folder, _cache_folder(target, settings), settings).run(identity)
        shutil.rmtree(folder / _PROGRESS, ignore_errors=True)
        source = RawSource.read(folder)
    if not settings.keep_cache:
        shutil.rmtree(_cache_folder(target, settings), ignore_errors=True)
    return source


def _cache_folder(target: Path, settings: DownloadSettings) -> Path:
    """The cache of one target: two that are made at once with the same --cache_dir do not meet."""
    place = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:12]
    return settings.cache_dir / f"{target.name}-{place}"


@dataclass(frozen=True)
class _Unit:
    """Some rows of one file of the hub, written by one process.

    Attributes:
        name: `FILE` or `FILE-NUMBER`, in the order of the rows.
        hub_id: for messages.
        hub_path: the file on the hub, for messages.
        path: the file on disk.
        begin: the first row.
        end: the row behind the last one, or None for the end of the file.
        fields: the columns that are kept.
        contents: the texts are to be fetched by blob id.
    """

    name: str
    hub_id: str
    hub_path: str
    path: Path
    begin: int
    end: int | None
    fields: tuple[str, ...]
    contents: bool


class _Download:
    """The download of one source into a folder that may hold what an earlier run has finished.

    `progress/listing.json` pins the revision and the files; `progress/file-FILE.json` says how many rows of a file are
    taken, and `progress/unit-NAME.json` that the shards of a unit are written.
    """

    def __init__(self, name: str, entry: CatalogueEntry, folder: Path, cache: Path, settings: DownloadSettings) -> None:
        self._name = name
        self._entry = entry
        self._folder = folder
        self._progress = folder / _PROGRESS
        self._cache = cache
        self._settings = settings
        self._guard = DiskGuard(settings.min_free_disk)

    def run(self, identity: dict[str, Any]) -> None:
        """Does what is left to do, and writes `source.json`."""
        self._progress.mkdir(exist_ok=True)
        self._cache.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob("*.part"):
            unfinished.unlink()
        client = Client(self._settings.num_proc, RateLimit(self._settings.rate_share(self._entry)))
        hub = Hub(client, self._settings.retries, self._guard)
        listing = self._listing(hub)
        self._fetch_and_write(hub, client, listing)
        self._finish(identity, listing)

    def _listing(self, hub: Hub) -> Listing:
        path = self._progress / "listing.json"
        known = read_record(path)
        if known is not None:
            return Listing.from_json(known)
        listing = hub.list_files(self._entry)
        write_record(path, listing.to_json())
        return listing

    def _fetch_and_write(self, hub: Hub, client: Client, listing: Listing) -> None:
        num_proc = self._settings.num_proc
        start = _WriterSettings(
            self._folder,
            self._settings.contents_endpoint,
            self._settings.retries,
            self._settings.rate_share(self._entry),
            self._settings.min_free_disk,
        )
        left: dict[str, int] = {}
        bar = tqdm(total=len(listing.files), desc=self._name, unit=" files", disable=None)
        with bar, ThreadPoolExecutor(num_proc) as pool, Workers(num_proc, _start_writer, (start,)) as workers:
            try:
                for unit, _ in workers.unordered(_write_unit, self._units(hub, listing, pool, left, bar)):
                    left[unit.name[:5]] -= 1
                    if not left[unit.name[:5]]:
                        bar.update()
                        if not self._settings.keep_cache:
                            unit.path.unlink(missing_ok=True)
            finally:
                client.stop.set()

    def _units(
        self, hub: Hub, listing: Listing, pool: ThreadPoolExecutor, left: dict[str, int], bar: "tqdm[Any]"
    ) -> Iterator[_Unit]:
        """The units that are not written yet, as their files arrive; counts those of each file in `left`."""
        remaining = self._settings.max_rows
        for index, arriving in self._files(hub, listing, pool):
            if remaining == 0:
                return
            path = self._cached(index, listing.files[index])
            if arriving is not None:
                arriving.result()
            rows = self._rows_taken(index, path, remaining)
            units = self._units_of(index, listing.files[index], path, rows)
            todo = [unit for unit in units if read_record(self._unit_record(unit.name)) is None]
            left[f"{index:05d}"] = len(todo)
            if not todo:
                bar.update()
                if not self._settings.keep_cache:
                    path.unlink(missing_ok=True)
            yield from todo
            if remaining is not None and rows is not None:
                remaining -= rows

    def _files(
        self, hub: Hub, listing: Listing, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, "Future[None] | None"]]:
        """The files in order, some fetched ahead; those that are written already are not fetched."""
        # Which files are needed for the first rows shows only when those before them are there.
        ahead = 0 if self._settings.max_rows is not None else self._settings.num_proc
        arriving: deque[tuple[int, Future[None] | None]] = deque()
        for index, file in enumerate(listing.files):
            future = None
            if not self._is_written(index, file):
                future = pool.submit(hub.fetch, self._entry, listing.revision, file, self._cached(index, file))
            arriving.append((index, future))
            if len(arriving) > ahead:
                yield arriving.popleft()
        yield from arriving

    def _cached(self, index: int, file: HubFile) -> Path:
        # Git's id: a file of another revision that was left there is not taken for this one.
        return self._cache / f"{index:05d}-{file.git_id[:12]}-{Path(file.path).name}"

    def _is_written(self, index: int, file: HubFile) -> bool:
        plan = read_record(self._progress / f"file-{index:05d}.json")
        if plan is None:
            return False
        units = self._units_of(index, file, self._cached(index, file), plan["rows"])
        return all(self._unit_record(unit.name).exists() for unit in units)

    def _rows_taken(self, index: int, path: Path, remaining: int | None) -> int | None:
        """How many rows of a file are taken, from the record or from the file; None for all of JSON lines."""
        record = self._progress / f"file-{index:05d}.json"
        plan = read_record(record)
        if plan is None:
            plan = {"rows": _count_rows(path, remaining, self._entry.contents_from_software_heritage)}
            write_record(record, plan)
        rows: int | None = plan["rows"]
        return rows

    def _units_of(self, index: int, file: HubFile, path: Path, rows: int | None) -> list[_Unit]:
        entry, name = self._entry, f"{index:05d}"
        if not entry.contents_from_software_heritage or rows is None:
            return [_Unit(name, entry.hub_id, file.path, path, 0, rows, entry.fields, False)]
        begins = range(0, rows, _IDS_PER_UNIT)
        return [
            _Unit(
                f"{name}-{begin // _IDS_PER_UNIT:05d}",
                entry.hub_id,
                file.path,
                path,
                begin,
                min(begin + _IDS_PER_UNIT, rows),
                entry.fields,
                True,
            )
            for begin in begins
        ]

    def _unit_record(self, name: str) -> Path:
        return self._progress / f"unit-{name}.json"

    def _finish(self, identity: dict[str, Any], listing: Listing) -> None:
        counts = {"rows": 0}
        files: list[InputFile] = []
        for path in sorted(self._progress.glob("unit-*.json")):
            record = read_record(path)
            if record is None:
                raise UserError(f"{path} is not readable any more; remove {self._folder} and begin anew")
            files += [InputFile(**file) for file in record["files"]]
            for reason, count in record["counts"].items():
                counts[reason] = counts.get(reason, 0) + count
        if not files:
            shutil.rmtree(self._folder)
            found = ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())
            raise UserError(f"{self._name}: not one row could be taken ({found})")
        config = self._entry.config
        RawSource(
            name=self._name,
            kind=self._entry.kind,
            origin=self._entry.hub_id if config is None else f"{self._entry.hub_id} ({config})",
            licence=self._entry.licence,
            files=files,
            counts=counts,
            revision=listing.revision,
            settings=identity,
        ).write(self._folder)


# ---------------------------------------------------------------------------------------------------------------
# Files of the hub into shards, in processes
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _WriterSettings:
    folder: Path
    contents_endpoint: str
    retries: int
    max_rate: float | None
    min_free_disk: int


class _Writer:
    """What a process needs to write units."""

    def __init__(self, settings: _WriterSettings) -> None:
        self._settings = settings
        self._guard = DiskGuard(settings.min_free_disk)
        self._rate = RateLimit(settings.max_rate)

    def write(self, unit: _Unit) -> None:
        """Writes the shards of a unit, and then its record."""
        rows: Iterator[dict[str, Any]] = _rows_of(unit)
        counts: dict[str, int] = {}
        client = Client(_CONTENTS_IN_FLIGHT, self._rate)
        try:
            if unit.contents:
                fetcher = ContentFetcher(
                    self._settings.contents_endpoint, _CONTENTS_IN_FLIGHT, client, self._settings.retries
                )
                rows, counts = fetcher.fill_in(rows), fetcher.counts
            rows_written, files = write_shards(self._settings.folder, f"part-{unit.name}", rows, self._guard)
        finally:
            client.stop.set()
        record = {"files": [asdict(file) for file in files], "counts": {"rows": rows_written, **counts}}
        write_record(self._settings.folder / _PROGRESS / f"unit-{unit.name}.json", record)


_writer: _Writer | None = None


def _start_writer(settings: _WriterSettings) -> None:
    global _writer  # noqa: PLW0603 - one a process
    _writer = _Writer(settings)


def _write_unit(unit: _Unit) -> None:
    assert _writer is not None
    _writer.write(unit)


def _count_rows(path: Path, limit: int | None, must_know: bool) -> int | None:
    """The rows of a file, at most `limit`; None for JSON lines of which all are taken, unless the number is needed."""
    if path.suffix == ".parquet":
        with _sound_parquet(path) as file:
            rows: int = file.metadata.num_rows
            return rows if limit is None else min(rows, limit)
    if limit is None and not must_know:
        return None
    return sum(1 for _ in islice(read_objects(path), limit))


def _rows_of(unit: _Unit) -> Iterator[dict[str, Any]]:
    """The rows of a unit, reduced to the fields that are kept. What is in the fields is for preprocessing to judge."""
    if unit.path.suffix == ".parquet":
        yield from _parquet_rows(unit)
        return
    for _, values in islice(read_objects(unit.path), unit.begin, unit.end):
        _check_fields(unit, list(values))
        yield {name: values[name] for name in unit.fields}


def _parquet_rows(unit: _Unit) -> Iterator[dict[str, Any]]:
    with _sound_parquet(unit.path) as file:
        _check_fields(unit, file.schema_arrow.names)
        end = file.metadata.num_rows if unit.end is None else unit.end
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number >= end:
                return
            if number + size > unit.begin:
                seen = number
                for batch in parquet_batches(unit.path, file, group, unit.fields):
                    begin, stop = max(unit.begin - seen, 0), min(end - seen, batch.num_rows)
                    if begin < stop:
                        yield from batch.slice(begin, stop - begin).to_pylist()
                    seen += batch.num_rows
            number += size


@contextlib.contextmanager
def _sound_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with open_parquet(path) as file:
            yield file
    except (pa.ArrowException, BrokenPageError) as error:
        raise UserError(f"{path}, as it stands on the hub, is not a sound parquet file: {error}") from error


def _check_fields(unit: _Unit, there: list[str]) -> None:
    for name in unit.fields:
        if name not in there:
            raise UserError(f"{unit.hub_id} has no field `{name}` any more in {unit.hub_path} (fields there: {there})")


def write_shards(
    folder: Path,
    stem: str,
    rows: Iterable[dict[str, Any]],
    guard: DiskGuard,
    shard_bytes: int | None = None,
) -> tuple[int, list[InputFile]]:
    """Writes rows as `STEM-00000.jsonl.zst`, ...; a shard ends when its JSON lines reach `shard_bytes`.

    Returns:
        The number of rows, and the files.
    """
    limit = _SHARD_BYTES if shard_bytes is None else shard_bytes
    files: list[InputFile] = []
    count = 0
    lines = map(_json_line, rows)
    line = next(lines, None)
    while line is not None:
        path = folder / f"{stem}-{len(files):05d}.jsonl.zst"
        part = path.with_name(path.name + ".part")
        written, unchecked = 0, _DISK_CHECK_BYTES
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        with part.open("wb") as file, compressor.stream_writer(file, closefd=False) as stream:
            while line is not None and written < limit:
                unchecked += len(line)
                if unchecked > _DISK_CHECK_BYTES:
                    guard.check(folder, len(line))
                    unchecked = 0
                stream.write(line)
                written += len(line)
                count += 1
                line = next(lines, None)
        with part.open("rb+") as again:
            os.fsync(again.fileno())  # the record that comes after it must not outlive it
            sha256 = hashlib.file_digest(again, "sha256").hexdigest()
        part.replace(path)
        files.append(InputFile(path.name, path.stat().st_size, sha256))
    return count, files


def _json_line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: kept as it is, for preprocessing to find
        return json.dumps(row).encode("ascii") + b"\n"
