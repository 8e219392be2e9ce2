"""Reading `.parquet` in bounded memory, by the sizes of pages, which only the body of a file tells.

Parquet is unpacked by pages. Writers mean them to be about 1 MiB, but look at their size only now and then, most often
after 1,024 values: a page of long texts may have hundreds of MB. A value may stand once in a dictionary page, and be
repeated in any number of rows. So neither the number of rows nor the size of a row group says what a batch takes.

Headers of pages are Thrift structs (compact protocol): https://github.com/apache/parquet-format,
`src/main/thrift/parquet.thrift`, and https://github.com/apache/thrift, `doc/specs/thrift-compact-protocol.md`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from doge_lm.data.workers import MOST_MEMORY, memory
from doge_lm.errors import UserError

# A batch is to have so many bytes, by the average row of each page.
_BATCH_BYTES = 2 * 2**20
# Values of a batch that stand in a dictionary once may come to so many bytes.
_REPEATED_BYTES = 8 * 2**20
# What pyarrow takes for each byte of a batch, while it is put together.
_BUILDING = 4
# A single row counts as no larger, although one of `MAX_DOCUMENT_BYTES` times ten would be held whole for a moment.
_LARGEST_ROW = 64 * 2**20
# Above this, a page is read row by row: neighbours of one batch may be its largest rows.
_LARGE_PAGE = 16 * 2**20
_MOST_ROWS = 1024

_HEADER_BYTES = 2**10
_MOST_HEADER_BYTES = 16 * 2**20
# parquet.thrift: PageType and Encoding
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_DELTA_BYTE_ARRAY = 7


class BrokenPageError(Exception):
    """A page header is not as it must be."""


class LargePagesError(UserError):
    """A row group can only be read in more memory than is taken for one; `bytes` is its size in the file."""

    def __init__(self, message: str, bytes_: int) -> None:
        super().__init__(message)
        self.bytes = bytes_


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a file to be read as a stream."""
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


def parquet_batches(path: Path, file: pq.ParquetFile, group: int, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Reads columns of a row group in as little memory as its pages allow.

    Args:
        path: the file.
        file: the same, as `open_parquet` opened it.
        group: number of the row group.
        columns: names of the top-level columns.

    Raises:
        LargePagesError: if that is too much, naming file, row group and column.
        BrokenPageError: if the pages are not sound.
        pyarrow.ArrowException: if what is in them is not.
    """
    with path.open("rb") as pages:
        plan = plan_reading(pages, file.metadata, group, columns)
    if plan.bytes > MOST_MEMORY:
        raise LargePagesError(
            f"{path}, row group {group:,}: the pages of the column `{plan.column}` take {plan.bytes / 2**20:,.0f} MiB "
            f"to unpack (at most {MOST_MEMORY / 2**20:,.0f} MiB are taken); write the file again with smaller pages "
            "(`pyarrow.parquet.write_table(..., use_dictionary=False, write_batch_size=16)`), or as .jsonl.zst",
            plan.packed,
        )
    with memory(plan.bytes):
        try:
            yield from file.iter_batches(plan.batch_rows, row_groups=[group], columns=list(columns), use_threads=False)
        finally:
            pa.default_memory_pool().release_unused()  # it keeps what large pages took


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a column chunk.

    Attributes:
        is_dictionary: it holds the values that other pages name by their numbers.
        packed: bytes of its body in the file.
        unpacked: bytes of its body unpacked.
        values: how many it has; with nested columns more or fewer than rows.
        shares: a value may take over bytes of the value before (DELTA_BYTE_ARRAY).
    """

    is_dictionary: bool
    packed: int
    unpacked: int
    values: int
    shares: bool = False


@dataclass(frozen=True, slots=True)
class ReadingPlan:
    """How a row group is to be read.

    Attributes:
        batch_rows: rows of a batch.
        bytes: memory that reading takes, at most but for rows of very many values, or above 64 MiB.
        column: the column that takes most of it.
        packed: bytes of the columns in the file.
    """

    batch_rows: int
    bytes: int
    column: str
    packed: int


def plan_reading(file: BinaryIO, metadata: pq.FileMetaData, group: int, columns: Collection[str]) -> ReadingPlan:
    """How some columns of a row group are to be read in little memory.

    A row is always held whole. Nested columns, such as conversations, are read row by row: headers of pages do not say
    how many values a row has.

    Args:
        file: the parquet file, opened for reading; its position is changed.
        metadata: of the file.
        group: number of the row group.
        columns: names of the top-level columns that are read.

    Raises:
        BrokenPageError: if the pages are not as the metadata says.
    """
    row_group = metadata.row_group(group)
    rows = _MOST_ROWS
    packed = 0
    costs: dict[str, int] = {}
    for index in range(row_group.num_columns):
        chunk = row_group.column(index)
        name = chunk.path_in_schema.partition(".")[0]
        if name not in columns:
            continue
        pages = list(chunk_pages(file, chunk))
        batch = 1 if chunk.path_in_schema != name else _batch_rows(pages)
        rows = min(rows, batch)
        packed += chunk.total_compressed_size
        costs[name] = costs.get(name, 0) + _reading_bytes(pages, batch)
    return ReadingPlan(rows, sum(costs.values()), max(costs, key=lambda name: costs[name], default=""), packed)


def _batch_rows(pages: list[Page]) -> int:
    if any(page.unpacked > _LARGE_PAGE for page in pages):
        return 1
    batch = _MOST_ROWS
    for page in pages:
        if page.is_dictionary or page.shares:
            batch = min(batch, _REPEATED_BYTES // max(1, page.unpacked))
        else:
            batch = min(batch, _BATCH_BYTES * page.values // max(1, page.unpacked))
    return max(1, batch)


def _reading_bytes(pages: list[Page], batch_rows: int) -> int:
    """Memory that a column takes: its dictionary, a page as it stands in the file and unpacked, and a batch.

    pyarrow holds the dictionary twice while it takes it in, and once from then on. For a page as it stands in the file,
    it keeps as much as for one unpacked.
    """
    dictionary = max((page.unpacked for page in pages if page.is_dictionary), default=0)
    taking_in = max((max(page.packed, page.unpacked) for page in pages if page.is_dictionary), default=0)
    data = max((max(page.packed, page.unpacked) + page.unpacked for page in pages if not page.is_dictionary), default=0)
    largest = max((page.unpacked for page in pages), default=0)
    shared = max((page.unpacked for page in pages if page.is_dictionary or page.shares), default=0)
    batch = _BUILDING * batch_rows * shared if batch_rows > 1 else 0
    return dictionary + max(taking_in, data) + max(min(largest, _LARGEST_ROW), batch)


def chunk_pages(file: BinaryIO, chunk: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a column chunk, by their headers alone.

    Args:
        file: the parquet file, opened for reading; its position is changed.
        chunk: the metadata of the chunk.

    Raises:
        BrokenPageError: if a header is not sound, or the pages do not have the values that the chunk has.
    """
    # Some writers give 0 where there is no dictionary.
    place = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    end = place + chunk.total_compressed_size
    left = chunk.num_values
    while left > 0:
        if place >= end:
            raise BrokenPageError(f"the column {chunk.path_in_schema} lacks {left:,} values")
        page, header_bytes = _read_page(file, place)
        if page is None:  # of a kind that readers pass over
            place += header_bytes
            continue
        place += header_bytes + page.packed
        left -= 0 if page.is_dictionary else page.values
        yield page


def _read_page(file: BinaryIO, place: int) -> tuple[Page | None, int]:
    """The page whose header begins at a byte, and the bytes of the header (of a page to pass over: and its body)."""
    length = _HEADER_BYTES
    while True:
        file.seek(place)
        data = file.read(length)
        reader = _CompactReader(data)
        try:
            header = reader.struct()
            return _page(header, reader.place)
        except IndexError as error:
            if len(data) < length or length >= _MOST_HEADER_BYTES:
                raise BrokenPageError(f"the header of the page at byte {place:,} breaks off") from error
            length *= 8
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise BrokenPageError(f"the header of the page at byte {place:,} is damaged") from error


def _page(header: dict[int, Any], length: int) -> tuple[Page | None, int]:
    kind, unpacked, packed = int(header[1]), int(header[2]), int(header[3])
    if kind not in (_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2):
        return None, length + packed
    details = header[{_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}[kind]]
    encoding = details[4 if kind == _DATA_PAGE_V2 else 2]
    values = int(details[1])
    if min(unpacked, packed, values) < 0:
        raise ValueError("a size below 0")
    return Page(kind == _DICTIONARY_PAGE, packed, unpacked, values, shares=encoding == _DELTA_BYTE_ARRAY), length


class _CompactReader:
    """Reads a struct of the compact protocol into dicts by the numbers of the fields.

    Raises `IndexError` where the data ends too early, and `ValueError` for what cannot be.

    Args:
        data: begins with the struct.
    """

    def __init__(self, data: bytes) -> None:
        self.place = 0
        self._data = data

    def struct(self) -> dict[int, Any]:
        """The next struct."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._integer()
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2 | 3:  # truth values as elements of a list, and bytes
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                self._skip(8)
            case 8:
                self._skip(self._varint())
            case 9 | 10:
                head = self._byte()
                self._values(head >> 4 if head >> 4 != 15 else self._varint(), (head & 15,))
            case 11:
                count = self._varint()
                kinds = self._byte() if count else 0
                self._values(count, (kinds >> 4, kinds & 15))
            case 12:
                return self.struct()
            case _:
                raise ValueError(f"unknown type {kind}")
        return None  # nothing that is looked at

    def _values(self, count: int, kinds: tuple[int, ...]) -> None:
        """Passes over the elements of a list, or the pairs of a map."""
        for _ in range(count):
            for kind in kinds:
                self._value(kind)

    def _byte(self) -> int:
        value = self._data[self.place]
        self.place += 1
        return value

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self._data):
            raise IndexError

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
