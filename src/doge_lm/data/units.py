r"""The files of a source, cut into units: what one process does at a time, and what an interrupted run need not redo.

The cut depends on the files alone (their names and sizes, and the row groups of `.parquet`), never on the number of
processes:

- small files are bundled, in their order, until they come to a unit;
- a plain `.jsonl` is cut into ranges of bytes; a range has the lines that begin in it;
- a `.parquet` is cut into ranges of row groups;
- a compressed file is a unit if it is small, or one of many; otherwise the parent unpacks it, cuts it at line ends
  and puts it into files (*spools*) that are removed as soon as they are done.

A unit is named by two numbers, its place in the plan and, of a file that the parent unpacks, its place in there.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from doge_lm.data.manifest import Kind, read_record, write_record
from doge_lm.data.sources import BadInputError, Location, Part, Row, file_suffix, scan_rows, unpacked_chunks
from doge_lm.errors import UserError

# A unit of text, unpacked. Small sources have small units, so that several processes share even those; large ones
# have large units, so that their number stays in the thousands.
MIN_UNIT_BYTES = 16 * 2**20
MAX_UNIT_BYTES = 256 * 2**20
_USUAL_UNITS = 2048
_MOST_UNITS = 2**14
# Sizes of packed files, unpacked: a rough guess that serves to make units of about the same size.
_UNPACKED = {".jsonl": 1, ".txt": 1, ".jsonl.gz": 4, ".jsonl.zst": 4, ".parquet": 3}
# What opening a file costs, in bytes of text.
_FILE_COST = 4 * 2**10
# From so many compressed files on, each is a unit: there is enough to do for all processes.
_MANY_FILES = 64
_MAX_WHOLE_FILE = 256 * 2**20
# A unit's numbers in one: 15 bits for its place, 16 for that within a file.
_PART_BITS = 16
_TAKE_IN_AGAIN = "wait until it is whole, and take the source in again with `doge-lm download_datasets`"


@dataclass(frozen=True, slots=True)
class Segment:
    """A file, or a part of one.

    Attributes:
        path: the file.
        bytes: its whole size, when the units were planned.
        part: None for the whole file.
    """

    path: Path
    bytes: int
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What one process does at a time.

    Attributes:
        place: place in the plan.
        part: place within a file that is unpacked by the parent; 0 otherwise.
        segments: what to read. With `spool`, one segment that names the file unpacked.
        spool: lines copied out of the file, or None.
        fault: why the file goes on no further behind these lines, or None.
    """

    place: int
    part: int
    segments: tuple[Segment, ...]
    spool: Path | None = None
    fault: BadInputError | None = None

    @property
    def name(self) -> str:
        """The unit's numbers, as they stand in the names of its files."""
        return unit_name(self.place, self.part)

    @property
    def number(self) -> int:
        """Both numbers in one, below 2^31 and ascending as the units are."""
        return self.place << _PART_BITS | self.part


@dataclass(frozen=True, slots=True)
class Stream:
    """A large compressed file, which the parent unpacks and cuts into units."""

    place: int
    path: Path
    bytes: int


def unit_name(place: int, part: int = 0) -> str:
    """The name of a unit, of its two numbers."""
    return f"{place:05d}-{part:05d}" if part else f"{place:05d}"


# ---------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------


def usual_unit_bytes(files: Iterable[tuple[Path, int]]) -> int:
    """The size of a unit for a source of such files (path and size)."""
    total = sum(_weight(path, size) for path, size in files)
    return max(MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, total // _USUAL_UNITS), total // _MOST_UNITS)


def plan_units(files: Sequence[tuple[Path, int]], unit_bytes: int) -> list[Unit | Stream]:
    """Cuts the files of a source into units.

    Args:
        files: path and size of each, in the order in which they are read.
        unit_bytes: about how much text a unit has, unpacked.
    """
    compressed = sum(_is_compressed(path) for path, _ in files)
    groups: list[tuple[Segment, ...] | Segment] = []
    bundle: list[Segment] = []
    bundled = 0

    def close_bundle() -> None:
        nonlocal bundle, bundled
        if bundle:
            groups.append(tuple(bundle))
        bundle, bundled = [], 0

    for path, size in files:
        weight = _weight(path, size)
        if weight > unit_bytes:
            close_bundle()
            if _is_compressed(path) and (compressed < _MANY_FILES or size > _MAX_WHOLE_FILE):
                groups.append(Segment(path, size))
            else:
                groups += [(segment,) for segment in _cut(path, size, unit_bytes)]
            continue
        if bundled + weight > unit_bytes:
            close_bundle()
        bundle.append(Segment(path, size))
        bundled += weight
    close_bundle()
    return [
        Stream(place, group.path, group.bytes) if isinstance(group, Segment) else Unit(place, 0, group)
        for place, group in enumerate(groups)
    ]


def _is_compressed(path: Path) -> bool:
    return file_suffix(path) in (".jsonl.gz", ".jsonl.zst")


def _weight(path: Path, size: int) -> int:
    return size * _UNPACKED[file_suffix(path) or ".txt"] + _FILE_COST


def _cut(path: Path, size: int, unit_bytes: int) -> list[Segment]:
    """Cuts a large file, if it can be cut, into parts of equal size."""
    suffix = file_suffix(path)
    if suffix == ".jsonl":
        count = max(1, -(-size // unit_bytes))
        cuts = [size * index // count for index in range(count + 1)]
        return [Segment(path, size, Part(cuts[index], cuts[index + 1])) for index in range(count)]
    if suffix == ".parquet":
        return [Segment(path, size, part) for part, _ in parquet_parts(path, unit_bytes)] or [Segment(path, size)]
    return [Segment(path, size)]


def parquet_parts(path: Path, part_bytes: int) -> list[tuple[Part, int]]:
    """Cuts a `.parquet` at row groups: parts of at most so many bytes of data, or of one row group; and their bytes.

    Empty for a file that is damaged: whoever reads it will say what is wrong.
    """
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return []
    parts = []
    start = rows = before = filled = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if filled and filled + group.total_byte_size > part_bytes:
            parts.append((Part(start, index, before), filled))
            start, before, filled = index, rows, 0
        filled += group.total_byte_size
        rows += group.num_rows
    return [*parts, (Part(start, metadata.num_row_groups, before), filled)]


# ---------------------------------------------------------------------------------------------------------------
# Unpacking in the parent
# ---------------------------------------------------------------------------------------------------------------


def unpack_stream(
    stream: Stream,
    folder: Path,
    unit_bytes: int,
    is_done: Callable[[str], bool],
    *,
    stop_at_faults: bool,
) -> Iterator[Unit]:
    """Unpacks a compressed file, unit by unit, each only when it is asked for.

    Args:
        stream: the file.
        folder: where the spools go; whoever has done a unit removes its spool. A record of the number of units is
            kept there, so that a file that is done is not unpacked again.
        unit_bytes: bytes of a unit, but for the last line, which is whole.
        is_done: whether the unit of a name is done; such a unit comes without a spool.
        stop_at_faults: raise what is wrong with the file; otherwise the last unit carries it.

    Yields:
        The units in order.

    Raises:
        BadInputError: if the file is cut off or damaged, and `stop_at_faults`.
        UserError: if the file is not as large as it was.
    """
    record = folder / f"stream-{stream.place:05d}.json"
    segments = (Segment(stream.path, stream.bytes),)
    known = read_record(record)
    names = [] if known is None else [unit_name(stream.place, part) for part in range(known["units"])]
    if names and all(map(is_done, names)):
        yield from (Unit(stream.place, part, segments) for part in range(len(names)))
        return
    check_size(stream.path, stream.bytes)
    part = 0
    before = 0
    chunks = _Chunks(unpacked_chunks(stream.path, file_suffix(stream.path) or ""), stop_at_faults=stop_at_faults)
    while chunks.more or part == 0:
        name = unit_name(stream.place, part)
        spool = None if is_done(name) else folder / f"spool-{name}.jsonl"
        lines = _fill(spool, chunks, unit_bytes)
        fault = None if chunks.more else chunks.fault
        yield Unit(stream.place, part, (Segment(stream.path, stream.bytes, Part(0, 0, before)),), spool, fault)
        part += 1
        before += lines
    check_size(stream.path, stream.bytes)
    write_record(record, {"units": part})


class _Chunks:
    """A stream of bytes of which a part can be put back; a fault ends it."""

    def __init__(self, chunks: Iterator[bytes], *, stop_at_faults: bool) -> None:
        self.fault: BadInputError | None = None
        self._chunks = chunks
        self._stop_at_faults = stop_at_faults
        self._held = b""  # comes after what was put back
        self._next = self._read()

    @property
    def more(self) -> bool:
        return bool(self._next)

    def take(self) -> bytes:
        taken, self._next = self._next, b""
        self._next = self._read()
        return taken

    def put_back(self, rest: bytes) -> None:
        self._held, self._next = self._next, rest

    def _read(self) -> bytes:
        if self._held:
            held, self._held = self._held, b""
            return held
        try:
            return next(self._chunks, b"")
        except BadInputError as error:
            if self._stop_at_faults:
                raise
            self.fault = error
            return b""


def _fill(spool: Path | None, chunks: _Chunks, unit_bytes: int) -> int:
    """Writes lines into a spool until it has a unit's bytes; returns their number. Without a spool it only counts."""
    if spool is None:
        return _copy(None, chunks, unit_bytes)
    try:
        with spool.open("wb") as file:
            return _copy(file, chunks, unit_bytes)
    except BaseException:  # a full disk, a damaged file: nobody will read what there is of it
        spool.unlink(missing_ok=True)
        raise


def remove_spools(folder: Path) -> None:
    """Removes the spools that `unpack_stream` has put into a folder, which need not be there any more."""
    for spool in folder.glob("spool-*"):
        spool.unlink(missing_ok=True)


def _copy(file: IO[bytes] | None, chunks: _Chunks, unit_bytes: int) -> int:
    filled = lines = 0
    while chunks.more:
        chunk = chunks.take()
        cut = chunk.find(b"\n", max(0, unit_bytes - filled)) + 1 if filled + len(chunk) > unit_bytes else 0
        piece = chunk[:cut] if cut else chunk
        if file is not None:
            file.write(piece)
        filled += len(piece)
        lines += piece.count(b"\n")
        if cut:
            if cut < len(chunk):
                chunks.put_back(chunk[cut:])
            break
    return lines


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


def read_unit(
    unit: Unit, kind: Kind, max_document_bytes: int, *, count_lines: bool
) -> Iterator[tuple[Location, Row] | BadInputError]:
    """Reads the rows of a unit, and between them what is wrong with the input; see `scan_rows`.

    Raises:
        UserError: if a file is not as large as it was when the units were planned.
    """
    for segment in unit.segments:
        if unit.spool is None:
            check_size(segment.path, segment.bytes)
        yield from scan_rows(
            segment.path if unit.spool is None else unit.spool,
            kind,
            part=segment.part if unit.spool is None else _whole(unit.spool, segment),
            max_document_bytes=max_document_bytes,
            count_lines=count_lines,
            shown_as=segment.path,
        )
        if unit.spool is None:
            check_size(segment.path, segment.bytes)
    if unit.fault is not None:
        yield unit.fault


def _whole(spool: Path, segment: Segment) -> Part:
    before = segment.part.before if segment.part is not None else 0
    return Part(0, spool.stat().st_size, before)


def check_size(path: Path, size: int, what_to_do: str = _TAKE_IN_AGAIN) -> None:
    """Checks that a file has the size that it had when it was found.

    Raises:
        UserError: if it has not, or is gone; the message ends with what the user is to do.
    """
    try:
        found = os.stat(path).st_size
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist any more; {what_to_do}") from error
    if found != size:
        raise UserError(f"{path} changes while it is read: it has {found:,} bytes, but had {size:,}; {what_to_do}")
