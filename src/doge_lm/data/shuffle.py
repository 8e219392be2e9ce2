"""A true permutation of rows, out of core: rows are dealt to buckets at random, then each bucket is permuted.

**Dealing** goes over the units (arrow files) of the sources in order, a *run* of units at a time. Every row draws a
bucket, and the run's rows are written to one arrow file, sorted by bucket. **Shuffling** gathers a bucket from all
runs, permutes it and writes it as a shard. Independent draws, and a uniform permutation within each bucket, make a
uniform permutation of all rows. All data is read once and written once in each of the two steps, in long stretches.

Token ids are never held as anonymous memory, but for the rows of one record batch: they are copied from memory map
to file. Draws depend on the seed and on the unit or the bucket alone, so the bytes are the same for any number of
processes, and a step that was interrupted goes on where it was.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from doge_lm.data.manifest import OutputFile, SampleCounts, read_record, write_record
from doge_lm.data.storage import ROWS_PER_BATCH, ShardWriter, flat_values, read_batches, row_schema
from doge_lm.errors import UserError

Indices = npt.NDArray[np.int64]
# Rows of a record batch of a dealt run at most: 1,024 of 2,048 tokens are 4 MB.
_DEALT_BATCH_ROWS = 1024
# Dealt runs that a process keeps open: an operating system allows some 1,000 files. Others are opened for each bucket.
_MOST_OPEN = 512
# Numbers of record batches in a run: there are at most as many as rows.
BOUND_DTYPE = np.dtype(np.int32)
# Draws that are passed over at once.
_PASSED_DRAWS = 2**20
# What draws are for: one stream of random numbers each.
_STREAMS = {"candidates": 0, "test": 1, "repeats": 2, "deal": 3, "deal test": 4, "permute": 5}


def random_stream(seed: int, purpose: str, *numbers: int) -> np.random.RandomState:
    """Random numbers for one purpose and one thing (a unit of a source, a bucket).

    By NumPy's legacy generator, whose stream is frozen (NEP 19): a seed means the same order with every later numpy.
    """
    return np.random.RandomState([seed, _STREAMS[purpose], *numbers])


@dataclass(frozen=True)
class UnitFile:
    """An arrow file of a source, or a part of one.

    Attributes:
        path: the file.
        name: of the source.
        source: its number; with `number` it is what the random draws of the rows depend on.
        number: of the file among those of the source.
        rows: how many there are.
        bytes: of the rows, about.
        begin: the first row of a part; None for the whole file.
    """

    path: Path
    name: str
    source: int
    number: int
    rows: int
    bytes: int
    begin: int | None = None

    def parts(self, most_rows: int) -> "list[UnitFile]":
        """Parts of about the same size, of at most so many rows; the file itself if it has no more."""
        count = -(-self.rows // max(1, most_rows))
        if count < 2:
            return [self]
        cuts = [self.rows * index // count for index in range(count + 1)]
        return [
            replace(self, rows=end - begin, bytes=self.bytes * (end - begin) // self.rows, begin=begin)
            for begin, end in pairwise(cuts)
        ]


def runs_of(units: Sequence[UnitFile], run_bytes: int, run_units: int) -> list[list[UnitFile]]:
    """Consecutive units, of at most so many bytes and units together, but at least one unit."""
    runs: list[list[UnitFile]] = []
    size = 0
    for unit in units:
        if not runs or size + unit.bytes > run_bytes or len(runs[-1]) == run_units:
            runs.append([])
            size = 0
        runs[-1].append(unit)
        size += unit.bytes
    return runs


# ---------------------------------------------------------------------------------------------------------------
# Rows of record batches
# ---------------------------------------------------------------------------------------------------------------


class RowGatherer:
    """Gathers rows of record batches in any order; their values are only touched when they are gathered.

    Args:
        batches: with the columns of `row_schema`.
        schema: of the batches that are made.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> None:
        counts = np.array([batch.num_rows for batch in batches], np.int64)
        self._schema = schema
        self._batch_of = np.repeat(np.arange(len(batches)), counts)
        self._columns: list[_Lists | npt.NDArray[Any]] = []
        for field in schema:
            parts = [batch.column(field.name) for batch in batches]
            if pa.types.is_list(field.type) or pa.types.is_string(field.type):
                self._columns.append(_Lists(parts))
            else:
                numbers = [part.to_numpy() for part in parts]
                self._columns.append(np.concatenate(numbers or [np.empty(0, field.type.to_pandas_dtype())]))

    def __len__(self) -> int:
        return len(self._batch_of)

    def gather(self, indices: Indices) -> pa.RecordBatch:
        """Rows by number, in the order asked for; a row may be asked for more than once."""
        arrays = []
        for field, column in zip(self._schema, self._columns, strict=True):
            if isinstance(column, np.ndarray):
                arrays.append(pa.array(column[indices], field.type))
                continue
            offsets, values = column.gather(self._batch_of, indices)
            if pa.types.is_string(field.type):
                arrays.append(pa.StringArray.from_buffers(len(indices), pa.py_buffer(offsets), pa.py_buffer(values)))
            else:
                arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, field.type.value_type)))
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)


class _Lists:
    """A column of lists or strings, over record batches: where each row lies in its batch's values."""

    def __init__(self, parts: Sequence[pa.Array]) -> None:
        views = [flat_values(part) for part in parts]
        self._values = [values for values, _ in views]
        self._begins = np.concatenate([np.empty(0, np.int64), *(offsets[:-1] for _, offsets in views)])
        self._ends = np.concatenate([np.empty(0, np.int64), *(offsets[1:] for _, offsets in views)])

    def gather(self, batch_of: Indices, indices: Indices) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
        """Offsets and values of the rows asked for."""
        begins, ends = self._begins[indices], self._ends[indices]
        offsets = np.zeros(len(indices) + 1, np.int32)
        np.cumsum(ends - begins, out=offsets[1:])
        places = zip(batch_of[indices].tolist(), begins.tolist(), ends.tolist(), strict=True)
        parts = [self._values[batch][begin:end] for batch, begin, end in places]
        return offsets, np.concatenate(parts or [np.empty(0, np.uint8)])


def count_rows(batch: pa.RecordBatch, times: Indices) -> SampleCounts:
    """Counts what lies in the rows of a record batch, each taken so many times."""
    ids = np.diff(flat_values(batch.column("input_ids"))[1])
    lengths, offsets = flat_values(batch.column("document_lengths"))
    spans, span_offsets = flat_values(batch.column("context_spans"))
    signs = np.where(np.arange(len(spans)) % 2, 1, -1)  # every row has an even number of them
    tokens, pieces = _row_sums(lengths, offsets), np.diff(offsets)
    context = _row_sums(spans * signs, span_offsets)
    return SampleCounts(
        samples=int(times.sum()),
        tokens=int(tokens @ times),
        pieces=int(pieces @ times),
        targets=int((tokens - pieces - context) @ times),
        context=int(context @ times),
        padding=int((ids - tokens) @ times),
        text_bytes=int(batch.column("text_bytes").to_numpy().astype(np.int64) @ times),
    )


def _row_sums(values: npt.NDArray[Any], offsets: Indices) -> Indices:
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return sums[offsets[1:]] - sums[offsets[:-1]]


# ---------------------------------------------------------------------------------------------------------------
# Dealing
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What is dealt of a unit: its test rows once each, all others `copies` times, and `extra` of them once more.

    Attributes:
        unit: a file, or a part of one.
        test: the rows of the test set, numbered within the unit.
        copies: of all others.
        extra: how many of them are dealt once more, chosen at random.
        before: what is dealt of the parts of the file before this one, training and test rows: as many draws are
            passed over, so that it does not matter where a file is parted (but for `extra`).
    """

    unit: UnitFile
    test: tuple[int, ...]
    copies: int
    extra: int
    before: tuple[int, int] = (0, 0)

    @property
    def dealt(self) -> tuple[int, int]:
        """How many rows are dealt to the training and to the test set."""
        return (self.unit.rows - len(self.test)) * self.copies + self.extra, len(self.test)


@dataclass(frozen=True)
class Buckets:
    """How many buckets there are of each split; those of the test set are numbered after those of the training set."""

    seed: int
    train: int
    test: int


@dataclass
class Dealt:
    """What became of the rows of one source: dealt by split, or not at all; `again`: all but the first of a row."""

    train: SampleCounts
    test: SampleCounts
    left_out: SampleCounts
    again: SampleCounts

    @classmethod
    def none(cls) -> "Dealt":
        """Nothing yet."""
        return cls(SampleCounts(), SampleCounts(), SampleCounts(), SampleCounts())

    @classmethod
    def from_json(cls, values: dict[str, dict[str, int]]) -> "Dealt":
        """From what `asdict` made."""
        return cls(**{name: SampleCounts(**counts) for name, counts in values.items()})

    def add(self, other: "Dealt") -> None:
        """Adds what became of other rows of the source."""
        for name, counts in vars(self).items():
            counts.add(getattr(other, name))


@dataclass(frozen=True)
class DealTask:
    """A run to be dealt into `path`, with `path` + `.json` as its record."""

    path: Path
    shares: list[Share]
    buckets: Buckets
    dtype: np.dtype[Any]


def record_path(path: Path) -> Path:
    """Where the record lies that says that an arrow file is finished."""
    return path.with_name(path.name + ".json")


def deal(task: DealTask) -> dict[str, Any]:
    """Deals a run, unless its record says that this is done and the file has the size it was written with.

    Returns:
        The record: `bytes`, the size of the file; `bounds`, the record batches at which each bucket begins; and
        `sources`, a `Dealt` for each name.
    """
    done = read_record(record_path(task.path))
    if done is not None and task.path.is_file() and task.path.stat().st_size == done.get("bytes"):
        return done
    batches = [batch for share in task.shares for batch in unit_batches(share.unit)]
    rows, buckets, sources = _draw(task, batches)
    order = np.argsort(buckets, kind="stable")
    limits = np.searchsorted(buckets[order], np.arange(task.buckets.train + task.buckets.test + 1))
    bounds = [0]
    schema = row_schema(task.dtype)
    gatherer = RowGatherer(batches, schema)
    with pa.OSFile(str(task.path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for begin, end in zip(limits[:-1].tolist(), limits[1:].tolist(), strict=True):
            parts = range(begin, end, _DEALT_BATCH_ROWS)
            for part in parts:
                writer.write_batch(gatherer.gather(rows[order[part : min(part + _DEALT_BATCH_ROWS, end)]]))
            bounds.append(bounds[-1] + len(parts))
    with task.path.open("rb+") as again:
        os.fsync(again.fileno())  # the record must not outlive it
        size = again.seek(0, os.SEEK_END)
    record = {"bounds": bounds, "bytes": size, "sources": {name: asdict(dealt) for name, dealt in sources.items()}}
    write_record(record_path(task.path), record)
    return record


def unit_batches(unit: UnitFile) -> Iterator[pa.RecordBatch]:
    """The record batches of a unit, as memory maps, one at a time: a unit of very short rows has very many.

    Raises:
        UserError: if the file is missing or damaged, or does not hold the rows that its manifest says.
    """
    begin = unit.begin or 0
    end = begin + unit.rows
    rows = 0
    for batch in read_batches(unit.path):
        before, rows = rows, rows + batch.num_rows
        if before >= begin and rows <= end:
            yield batch
        elif (first := max(begin, before)) < (last := min(end, rows)):
            yield batch.slice(first - before, last - first)
        if rows >= end and unit.begin is not None:
            break
    if rows < end or (rows > end and unit.begin is None):
        raise UserError(f"{unit.path} holds {rows:,} rows, not {end:,}; run `doge-lm preprocess_datasets` again")


def _draw(task: DealTask, batches: list[pa.RecordBatch]) -> tuple[Indices, Indices, dict[str, Dealt]]:
    """Which rows of a run are dealt, numbered over `batches`, to which buckets; and what that comes to."""
    rows: list[Indices] = []
    buckets: list[Indices] = []
    sources: dict[str, Dealt] = {}
    begin, batch = 0, 0
    for share in task.shares:
        unit, seed = share.unit, task.buckets.seed
        copies = _copies(share, seed)
        train = np.repeat(np.arange(unit.rows), copies)
        test = np.array(share.test, np.int64)
        rows += [begin + train, begin + test]
        draws, draws_test = (random_stream(seed, name, unit.source, unit.number) for name in ("deal", "deal test"))
        buckets.append(_draw_buckets(draws, task.buckets.train, share.before[0], len(train)))
        buckets.append(task.buckets.train + _draw_buckets(draws_test, task.buckets.test, share.before[1], len(test)))
        in_test = np.isin(np.arange(unit.rows), test)
        done = 0
        dealt = sources.setdefault(unit.name, Dealt.none())
        while done < unit.rows:
            part = slice(done, done + batches[batch].num_rows)
            _count(dealt, batches[batch], copies[part], in_test[part])
            done, batch = part.stop, batch + 1
        begin += unit.rows
    return np.concatenate(rows), np.concatenate(buckets), sources


def _draw_buckets(stream: np.random.RandomState, buckets: int, before: int, count: int) -> Indices:
    """`count` draws of a stream, behind those that are passed over."""
    for begin in range(0, before, _PASSED_DRAWS):
        stream.randint(0, buckets, min(_PASSED_DRAWS, before - begin), np.int64)
    return stream.randint(0, buckets, count, np.int64)


def _copies(share: Share, seed: int) -> Indices:
    """How often each row of a unit goes into the training set."""
    unit = share.unit
    copies = np.full(unit.rows, share.copies, np.int64)
    copies[list(share.test)] = 0
    if share.extra:
        others = np.setdiff1d(np.arange(unit.rows), share.test)
        part = () if unit.begin is None else (unit.begin,)
        stream = random_stream(seed, "repeats", unit.source, unit.number, *part)
        chosen = stream.permutation(len(others))[: share.extra]
        copies[others[chosen]] += 1
    return copies


def _count(dealt: Dealt, batch: pa.RecordBatch, copies: Indices, in_test: npt.NDArray[np.bool_]) -> None:
    dealt.train.add(count_rows(batch, copies))
    dealt.test.add(count_rows(batch, in_test.astype(np.int64)))
    dealt.left_out.add(count_rows(batch, ((copies == 0) & ~in_test).astype(np.int64)))
    dealt.again.add(count_rows(batch, np.maximum(copies - 1, 0)))


# ---------------------------------------------------------------------------------------------------------------
# Shuffling
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShuffleTask:
    """A bucket to be written as the shard `path`, with its record at `record`."""

    bucket: int
    path: Path
    record: Path


_worker: dict[str, Any] = {}  # a process keeps the dealt runs open here between buckets


def start_shuffling(runs: list[Path], bounds: Path, seed: int, dtype: np.dtype[Any]) -> None:
    """Makes this process ready for `shuffle`.

    Args:
        runs: the dealt files.
        bounds: holds for each, as `BOUND_DTYPE`, the record batches at which each bucket begins, one more for the
            last one's end. In a file, since in a large set these are runs x buckets numbers for every process.
        seed: fixes the order.
        dtype: type of the token ids.
    """
    table = np.memmap(bounds, BOUND_DTYPE, "r").reshape(len(runs), -1)
    _worker.update(runs=runs, bounds=table, seed=seed, schema=row_schema(dtype), readers={})


def stop_shuffling() -> None:
    """Lets go of the files, if they were read in this process."""
    _worker.clear()


def shuffle(task: ShuffleTask) -> tuple[OutputFile, dict[str, SampleCounts]]:
    """Gathers, permutes and writes a bucket, unless its record says that this is done.

    Returns:
        The file, and what lies in it by source.
    """
    done = read_record(task.record)
    if done is None:
        done = _write_bucket(task)
        write_record(task.record, done)
    return OutputFile(**done["file"]), {name: SampleCounts(**entry) for name, entry in done["sources"].items()}


def _write_bucket(task: ShuffleTask) -> dict[str, Any]:
    schema = _worker["schema"]
    gatherer = RowGatherer(list(_bucket_batches(task.bucket)), schema)
    order = random_stream(_worker["seed"], "permute", task.bucket).permutation(len(gatherer))
    counts: dict[str, SampleCounts] = {}
    with ShardWriter(task.path, schema) as shard:
        for begin in range(0, len(order), ROWS_PER_BATCH):
            batch = gatherer.gather(order[begin : begin + ROWS_PER_BATCH])
            shard.write(batch)
            names = batch.column("source").dictionary_encode()
            for number, name in enumerate(names.dictionary.to_pylist()):
                part = count_rows(batch, (names.indices.to_numpy() == number).astype(np.int64))
                counts.setdefault(name, SampleCounts()).add(part)
    return {
        "file": asdict(shard.output()),
        "sources": {name: asdict(counts[name]) for name in sorted(counts)},
    }


def _bucket_batches(bucket: int) -> Iterator[pa.RecordBatch]:
    bounds = _worker["bounds"][:, bucket : bucket + 2].tolist()
    for path, (begin, end) in zip(_worker["runs"], bounds, strict=True):
        if begin == end:
            continue
        reader = _worker["readers"].get(path)
        if reader is None:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if len(_worker["readers"]) < _MOST_OPEN:
                _worker["readers"][path] = reader
        for number in range(begin, end):
            yield reader.get_batch(number)
