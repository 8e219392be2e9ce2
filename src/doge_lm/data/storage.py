"""Rows on disk: arrow files that `datasets.load_from_disk` opens, written as a stream and read by random access.

The bytes of a file depend on its rows alone, so that equal input gives equal files, whoever wrote them.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from doge_lm.data.manifest import OutputFile, SampleCounts, file_sha256
from doge_lm.data.packing import PackedRow
from doge_lm.errors import UserError

if TYPE_CHECKING:
    # Named in annotations only: processes that write rows do without this import, and without its memory.
    from datasets import Features

# 65,536 samples of 2,048 tokens are 270 MB: a shard. A record batch is what one look-up has to find.
ROWS_PER_SHARD = 2**16
ROWS_PER_BATCH = 256
# The content of sets up to this size is checked whenever they are opened. Hashing runs at more than 1 GB/s, so that
# takes a few seconds at most; larger sets would keep a training waiting.
MAX_HASHED_BYTES = 4 * 2**30


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type that holds the ids: 16 bits where the vocabulary allows."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _columns(dtype: np.dtype[Any]) -> dict[str, dict[str, Any]]:
    """The columns of a prepared set, in the words of `datasets`."""

    def value(name: str) -> dict[str, Any]:
        return {"dtype": name, "_type": "Value"}

    def list_of(name: str) -> dict[str, Any]:
        return {"feature": value(name), "_type": "List"}

    return {
        "input_ids": list_of(dtype.name),
        "document_lengths": list_of("int32"),
        "context_spans": list_of("int32"),
        "text_bytes": value("int32"),
        "source": value("string"),
        "group": value("int64"),
    }


def row_features(dtype: np.dtype[Any]) -> "Features":
    """The columns of a prepared set, for token ids of a type (uint16 or uint32)."""
    from datasets import Features  # noqa: PLC0415

    return Features.from_dict(_columns(dtype))


def row_schema(dtype: np.dtype[Any]) -> pa.Schema:
    """The arrow schema of a prepared set: that of `row_features`, made without importing `datasets`."""
    metadata = {"huggingface": json.dumps({"info": {"features": _columns(dtype)}})}
    numbers = pa.list_(pa.int32())
    return pa.schema(
        {
            "input_ids": pa.list_(pa.from_numpy_dtype(dtype)),
            "document_lengths": numbers,
            "context_spans": numbers,
            "text_bytes": pa.int32(),
            "source": pa.string(),
            "group": pa.int64(),
        },
        metadata=metadata,
    )


def shard_name(index: int) -> str:
    """The name of the arrow file number `index` of a data set."""
    return f"data-{index:05d}.arrow"


class _Hashing:
    """A file open for writing that also takes the hash of what passes."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._hash.update(view)
        self.bytes += view.nbytes
        return self._file.write(view)

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        """Has everything written to the disk itself."""
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class ShardWriter:
    """Writes record batches into one arrow file. A context manager: the file is whole when the block ends."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._file = _Hashing(path)
        self._writer = pa.ipc.new_stream(pa.PythonFile(self._file, mode="w"), schema)
        self._rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends a record batch."""
        self._writer.write_batch(batch)
        self._rows += batch.num_rows

    def abandon(self) -> None:
        """Closes the file as it is, so that it can be removed on every platform."""
        self._file.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._writer.close()
                self._file.sync()
        finally:
            self._file.close()

    def output(self) -> OutputFile:
        """What was written; its path is the file's name."""
        return OutputFile(self._path.name, self._file.bytes, self._rows, self._file.hexdigest())


class RowWriter:
    """Writes the rows of one unit of a source as a stream into an arrow file, and counts them.

    The file takes its name only when it is whole, in `close`; until then it is called `NAME.PROCESS.part`.

    Args:
        path: the file; none is written if there is no row.
        source: the name of the source, for the column `source`.
        first_group: number of the unit's first group.
        dtype: type of the token ids.
    """

    def __init__(self, path: Path, source: str, first_group: int, dtype: np.dtype[Any]) -> None:
        self.counts = SampleCounts()
        self.output: OutputFile | None = None
        self._path = path
        self._part = path.with_name(f"{path.name}.{os.getpid()}.part")
        self._source = source
        self._first_group = first_group
        self._dtype = dtype
        self._schema = row_schema(dtype)
        self._rows: list[PackedRow] = []
        self._shard: ShardWriter | None = None

    def write(self, row: PackedRow) -> None:
        """Appends a row."""
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        """Writes what is left, and puts the file in its place."""
        if self._rows:
            self._flush()
        if self._shard is None:
            return
        shard, self._shard = self._shard, None
        with shard:
            pass
        output = shard.output()
        self._part.replace(self._path)
        self.output = OutputFile(self._path.name, output.bytes, output.rows, output.sha256)

    def abandon(self) -> None:
        """Removes what a failure left half written; does nothing after `close`."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None
        self._part.unlink(missing_ok=True)

    def _flush(self) -> None:
        rows = self._rows
        if self._first_group:
            rows = [row._replace(group=self._first_group + row.group) for row in rows]
        batch = rows_to_batch(rows, self._source, self._dtype, self._schema)
        self._rows = []
        if self._shard is None:
            self._shard = ShardWriter(self._part, self._schema)
        self._shard.write(batch)
        self.counts.add(count_batch(batch))


def rows_to_batch(rows: Sequence[PackedRow], source: str, dtype: np.dtype[Any], schema: pa.Schema) -> pa.RecordBatch:
    """Makes a record batch of rows."""
    columns = [
        _lists([row.input_ids for row in rows], dtype),
        _lists([row.document_lengths for row in rows], np.dtype(np.int32)),
        _lists([row.context_spans for row in rows], np.dtype(np.int32)),
        pa.array(np.array([row.text_bytes for row in rows], np.int32)),
        pa.array([source] * len(rows), pa.string()),
        pa.array(np.array([row.group for row in rows], np.int64)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _lists(arrays: Sequence[npt.NDArray[Any]], dtype: np.dtype[Any]) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum(np.array([len(array) for array in arrays], np.int32), out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(dtype, copy=False)))


def count_batch(batch: pa.RecordBatch) -> SampleCounts:
    """Counts what lies in a record batch, from its columns alone."""
    lengths = batch.column("document_lengths").flatten().to_numpy(zero_copy_only=False)
    spans = batch.column("context_spans").flatten().to_numpy(zero_copy_only=False)
    tokens = int(lengths.sum(dtype=np.int64))
    context = int((spans[1::2] - spans[::2]).sum(dtype=np.int64))
    return SampleCounts(
        samples=batch.num_rows,
        tokens=tokens,
        pieces=len(lengths),
        targets=tokens - len(lengths) - context,
        context=context,
        padding=len(batch.column("input_ids").flatten()) - tokens,
        text_bytes=int(batch.column("text_bytes").to_numpy(zero_copy_only=False).sum(dtype=np.int64)),
    )


def describe_dataset(
    directory: Path, columns: "Features | np.dtype[Any]", files: Sequence[OutputFile], split: str | None
) -> None:
    """Writes `dataset_info.json` and `state.json`, by which `datasets.load_from_disk` knows a directory.

    The fingerprint is taken from the content, since `datasets` keys its caches by it.

    Args:
        directory: holds the files.
        columns: the type of the token ids, or the features themselves.
        files: the arrow files, in order.
        split: the split that they are, or None.
    """
    features = _columns(columns) if isinstance(columns, np.dtype) else columns.to_dict()
    info = {"description": "", "citation": "", "homepage": "", "license": "", "features": features}
    (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8", newline="\n")
    fingerprint = hashlib.sha256("".join(file.sha256 for file in files).encode("ascii")).hexdigest()[:16]
    state: dict[str, Any] = {
        "_data_files": [{"filename": file.path} for file in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (directory / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8", newline="\n")


def describe_dataset_dict(directory: Path, splits: Sequence[str]) -> None:
    """Writes `dataset_dict.json`, by which `datasets.load_from_disk` knows a directory of splits."""
    text = json.dumps({"splits": list(splits)})
    (directory / "dataset_dict.json").write_text(text, encoding="utf-8", newline="\n")


def check_files(directory: Path, files: Sequence[OutputFile]) -> None:
    """Checks that arrow files are as they were written.

    Their sizes are always checked, their content (by its sha256) only if they have at most `MAX_HASHED_BYTES` in all.

    Raises:
        UserError: naming the file that is missing, of another size or of other content.
    """
    for file in files:
        path = directory / file.path
        if not path.is_file():
            raise UserError(f"{path} is missing; make {directory} again")
        size = path.stat().st_size
        if size != file.bytes:
            state = "truncated" if size < file.bytes else "longer than it was written"
            raise UserError(f"{path} is {state}: {size:,} of {file.bytes:,} bytes; make {directory} again")
    if sum(file.bytes for file in files) > MAX_HASHED_BYTES:
        return
    for file in files:
        path = directory / file.path
        found = file_sha256(path)
        if found != file.sha256:
            raise UserError(
                f"{path} is damaged: its sha256 is {found[:12]}..., it was written as {file.sha256[:12]}...; make "
                f"{directory} again"
            )


def flat_values(column: pa.Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values of a column of lists or strings (the bytes of these), without a copy, and where each row begins.

    Args:
        column: without nulls; it may be a slice.

    Returns:
        The values of all rows one after another, and the offsets of the rows in them, with one more for the end.
    """
    if pa.types.is_string(column.type):
        _, bounds, data = column.buffers()
        offsets = np.frombuffer(bounds, np.int32)[column.offset : column.offset + len(column) + 1]
        values = np.frombuffer(data or b"", np.uint8)
    else:
        offsets = column.offsets.to_numpy()
        values = column.values.to_numpy(zero_copy_only=True)
    offsets = offsets.astype(np.int64)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an arrow file, as memory maps, one at a time: no row is read before it is asked for.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        with pa.memory_map(str(path)) as source:
            yield from pa.ipc.open_stream(source)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a sound arrow file: {error}; make {path.parent} again") from error
