"""Rows for training straight from a source of text, tokenized and packed on the fly: no prepared set, no shards.

A source (a file, a folder, or a data set on the hub) is read as **chunks**: a range of lines of a plain `.jsonl`, row
groups of a `.parquet`, a small file, or a stretch of rows of what can only be read from front to back (a large
compressed file, the hub). Chunks that follow each other are joined into **blocks** of about 16 MiB of text, which
worker processes turn into packed rows. In every epoch the parts of files, and the large compressed files as such, are
permuted by the seed; the hub is read in its own order; and the rows of every block are permuted. So the stream depends
on the source, the seed and the tokenizer, and never on the number of workers.

Where the stream stands is a small value (`StreamState`): the place of a block in the source, and the number of rows
before it. A resumed run begins there, and does that one block again. What is held at any time are the few blocks in
the workers' hands.

The test set is taken first: documents of up to 16 places by turns, until they fill the rows that are asked for. A
document that equals one of them, wherever it stands, is never given for training.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi

from doge_lm.data.documents import Tokenizing, batch_rows, nothing_to_learn
from doge_lm.data.encoders import load_encoder
from doge_lm.data.packing import BestFitPacker, PackedRow
from doge_lm.data.sources import (
    BadInputError,
    Location,
    Part,
    Row,
    TextRow,
    file_suffix,
    find_files,
    parse_row,
    row_characters,
    scan_rows,
)
from doge_lm.data.storage import id_dtype, row_features
from doge_lm.data.units import parquet_parts
from doge_lm.data.workers import Workers
from doge_lm.errors import UserError

SOURCE_NAME = "stream"
"""The `source` of all rows: a packed row may hold documents of several files."""

_BLOCK_BYTES = 16 * 2**20
# The size of a part of a file: a block joins several, of different files.
_PART_BYTES = 4 * 2**20
# A compressed file up to this size is read by a worker, whole; a larger one by the parent, stretch by stretch.
_SMALL_FILE_BYTES = 2 * 2**20
# How often text is larger than its compressed form, about.
_UNPACKED = 4
_TEST_LANES = 16
# Epochs count from 0; the test set is drawn by a number that none of them will have.
_TEST_EPOCH = 2**32 - 1
_NOTHING = "the stream gives no row to train on: it is empty, or all of its documents are held out or bad"

Place = dict[str, Any]
"""A place in a source, as JSON values. The empty one is the beginning."""

_Item = tuple[Location | str, Row] | BadInputError


# ---------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------


class FilePart(NamedTuple):
    """A part of a file, or (where `part` is None) all of it, which a worker reads."""

    path: Path
    part: Part | None
    bytes: int

    def items(self) -> Iterator[_Item]:
        """The rows, and what is wrong between them."""
        return scan_rows(self.path, part=self.part)


class Stretch(NamedTuple):
    """Rows that the parent has read."""

    rows: list[_Item]
    bytes: int

    def items(self) -> Iterator[_Item]:
        """The rows, and what is wrong between them."""
        return iter(self.rows)


Chunk = FilePart | Stretch


class StreamSource(Protocol):
    """What a stream reads."""

    @property
    def identity(self) -> str:
        """Stands for the content: a run is resumed with the same one only."""

    def chunks(self, seed: int, epoch: int, place: Place) -> Iterator[tuple[Place, Chunk]]:
        """The chunks of one epoch from a place on, each with its place."""

    def lanes(self, seed: int) -> list[Iterator[Chunk]]:
        """Chunks from several places at once, from which the test set is drawn."""


class FileSource:
    """The readable files at a path, as `doge_lm.data.sources.find_files` finds them.

    Args:
        path: a file or a folder.

    Raises:
        UserError: if nothing readable is there.
    """

    def __init__(self, path: Path) -> None:
        files = find_files(path)
        root = path if path.is_dir() else path.parent
        listed = [[file.relative_to(root).as_posix(), file.stat().st_size] for file in files]
        self.identity = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        self._units = [unit for file in files for unit in _units_of(file)]

    def chunks(self, seed: int, epoch: int, place: Place) -> Iterator[tuple[Place, Chunk]]:
        """See `StreamSource`. The place is the number of the unit in the epoch's order, and of the chunk within it."""
        first, skip = place.get("unit", 0), place.get("chunk", 0)
        for number, unit in enumerate(self._order(seed, epoch)[first:], start=first):
            for chunk_number, chunk in enumerate(_chunks_of(unit)):
                if number > first or chunk_number >= skip:
                    yield {"unit": number, "chunk": chunk_number}, chunk

    def lanes(self, seed: int) -> list[Iterator[Chunk]]:
        """See `StreamSource`."""
        order = self._order(seed, _TEST_EPOCH)
        lanes = [order[lane::_TEST_LANES] for lane in range(min(_TEST_LANES, len(order)))]
        return [chain.from_iterable(map(_chunks_of, units)) for units in lanes]

    def _order(self, seed: int, epoch: int) -> list[FilePart]:
        permutation = np.random.RandomState([seed, epoch]).permutation(len(self._units))
        return [self._units[index] for index in permutation]


def _units_of(path: Path) -> list[FilePart]:
    size, suffix = path.stat().st_size, file_suffix(path)
    if suffix == ".parquet":
        return [FilePart(path, *part) for part in parquet_parts(path, 0)] or [FilePart(path, None, size)]
    if suffix != ".jsonl":
        return [FilePart(path, None, size if suffix == ".txt" else _UNPACKED * size)]
    bounds = [*range(0, size, _PART_BYTES), size]
    return [FilePart(path, Part(start, stop), stop - start) for start, stop in pairwise(bounds)]


def _chunks_of(unit: FilePart) -> Iterator[Chunk]:
    compressed = (file_suffix(unit.path) or "").endswith((".zst", ".gz"))
    if compressed and unit.bytes > _UNPACKED * _SMALL_FILE_BYTES:
        yield from _stretches(unit.items())
    else:
        yield unit


def _stretches(items: Iterable[_Item]) -> Iterator[Stretch]:
    rows: list[_Item] = []
    size = 0
    for item in items:
        rows.append(item)
        size += item.bytes if isinstance(item, BadInputError) else row_characters(item[1])
        if size >= _PART_BYTES:
            yield Stretch(rows, size)
            rows, size = [], 0
    if rows:
        yield Stretch(rows, size)


class HubSource:
    """A data set of the hub (or any that `datasets` can stream), in its own order.

    The place is what `datasets.IterableDataset.state_dict` says, so that a resumed run need not read again what lies
    before it, but for the rest of a file.

    Args:
        name: for messages.
        version: stands for the content, as the commit of the repository does.
        load: opens the data set.
    """

    def __init__(self, name: str, version: str, load: Callable[[], Any]) -> None:
        self.identity = f"{name}@{version}"
        self._name = name
        self._load = load

    def chunks(self, seed: int, epoch: int, place: Place) -> Iterator[tuple[Place, Chunk]]:
        """See `StreamSource`."""
        data, row = self._load(), int(place.get("row", 0))
        if place:
            data.load_state_dict(place["state"])
        iterator = iter(data)
        while True:
            here = {"row": row, "state": json.loads(json.dumps(data.state_dict()))}
            stretch = next(_stretches(self._items(iterator, row)), None)
            if stretch is None:
                return
            yield here, stretch
            row += len(stretch.rows)

    def lanes(self, seed: int) -> list[Iterator[Chunk]]:
        """See `StreamSource`: there is one place only."""
        return [_stretches(self._items(iter(self._load()), 0))]

    def _items(self, rows: Iterator[dict[str, Any]], done: int) -> Iterator[_Item]:
        for number, values in enumerate(rows, start=done + 1):
            location = Location(Path(self._name), number, "row")
            try:
                yield location, parse_row(values, location)
            except BadInputError as error:
                yield error


def open_source(text: str) -> StreamSource:
    """Opens what the setting `stream` names.

    Args:
        text: a file or a folder, or `OWNER/NAME` or `OWNER/NAME:CONFIG` of a data set on the hub, of which the split
            `train` is read.

    Raises:
        UserError: if it is neither.
    """
    path = Path(text)
    if path.exists():
        return FileSource(path)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", text)
    if match is None:
        raise UserError(
            f"stream {text}: there is no such file or folder, and it is no data set of the hub (OWNER/NAME or "
            "OWNER/NAME:CONFIG) either"
        )
    return _open_hub(match[1], match[2])


def _open_hub(name: str, config: str | None) -> HubSource:
    try:
        load_dataset(name, config, split="train", streaming=True)  # first, as its errors say what is wrong
        commit = HfApi().dataset_info(name).sha
    # Whatever is wrong with the network, the repository or its configuration: the user asked for exactly this.
    except (OSError, ValueError) as error:
        raise UserError(
            f"stream {name}: it is no file or folder here, and the hub does not open it as a data set: {error}"
        ) from error
    load = partial(load_dataset, name, config, split="train", streaming=True, revision=commit)
    return HubSource(f"{name}:{config or ''}", str(commit), load)


# ---------------------------------------------------------------------------------------------------------------
# Chunks -> rows
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamSettings:
    """What becomes of the text.

    Attributes:
        tokenizer_path: as `doge_lm.data.tokenizer.load_tokenizer` opens it.
        sequence_length: tokens of a row.
        seed: of every order, below 2**32.
        skip_bad_rows: leave out, and count, what cannot be read or holds nothing to learn; otherwise it is an error.
    """

    tokenizer_path: Path
    sequence_length: int
    seed: int = 233
    skip_bad_rows: bool = False


@dataclass(frozen=True)
class HeldOut:
    """The rows of the test set, and the digests of its documents."""

    rows: list[PackedRow]
    digests: frozenset[bytes]


class _Block(NamedTuple):
    epoch: int
    place: Place
    chunks: list[Chunk]


class _PackedBlock(NamedTuple):
    epoch: int
    place: Place
    rows: list[PackedRow]
    skipped: dict[str, int]
    examples: dict[str, str]


def _digest(row: Row) -> bytes:
    parts = (row.prompt, row.text) if isinstance(row, TextRow) else [part for turn in row.turns for part in turn]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


class _Packing:
    """Chunks to rows; made once in each process."""

    def __init__(self, settings: StreamSettings, held_out: frozenset[bytes]) -> None:
        encoder = load_encoder(settings.tokenizer_path, "tokenizers")
        self.tokenizing = Tokenizing(encoder, settings.sequence_length)
        self._settings = settings
        self._held_out = held_out
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def block(self, block: _Block) -> _PackedBlock:
        """The rows of a block."""
        self.skipped, self.examples = Counter(), {}
        packer = BestFitPacker(self._settings.sequence_length)
        rows: list[PackedRow] = []
        for batch in batch_rows(self._training_rows(block.chunks)):
            for document in self.tokenizing(batch).documents():
                rows.extend(packer.add(document))
        rows.extend(packer.finish())
        return _PackedBlock(block.epoch, block.place, rows, dict(self.skipped), self.examples)

    def _training_rows(self, chunks: Iterable[Chunk]) -> Iterator[Row]:
        for chunk in chunks:
            for row in self.good_rows(chunk):
                if not self._held_out or _digest(row) not in self._held_out:
                    yield row

    def good_rows(self, chunk: Chunk) -> Iterator[Row]:
        """The rows of a chunk in which there is something to learn.

        Raises:
            UserError: naming the first bad row, unless they are skipped.
        """
        for item in chunk.items():
            if isinstance(item, BadInputError):
                self._skip(item.reason, str(item))
                continue
            location, row = item
            reason = nothing_to_learn(row)
            if reason is None:
                yield row
            else:
                self._skip(reason, f"{location}: {reason}")

    def _skip(self, reason: str, message: str) -> None:
        if not self._settings.skip_bad_rows:
            raise UserError(f"{message}; mend or remove it, or let --set stream_on_error=skip leave out such rows")
        self.skipped[reason] += 1
        self.examples.setdefault(reason, message)


def hold_out(source: StreamSource, settings: StreamSettings, rows: int) -> HeldOut:
    """Draws a test set: the same for the same source and settings.

    Args:
        source: what is streamed.
        settings: what becomes of the text.
        rows: how many rows.

    Raises:
        UserError: if the source does not hold as many, or a row is bad.
    """
    packing = _Packing(settings, frozenset())
    lanes: list[Iterator[Row]] = [
        chain.from_iterable(map(packing.good_rows, lane)) for lane in source.lanes(settings.seed)
    ]
    documents = []
    digests: set[bytes] = set()
    tokens = 0
    for row in _by_turns(lanes):
        digest = _digest(row)
        if digest in digests:
            continue
        digests.add(digest)
        for document in packing.tokenizing([row]).documents():
            documents.append(document)
            tokens += sum(len(piece.ids) for piece in document)
        if tokens >= rows * settings.sequence_length:
            break
    else:
        raise UserError(
            f"the stream holds about {tokens // settings.sequence_length:,} rows of {settings.sequence_length:,} "
            f"tokens in all, too few to hold {rows:,} out as the test set; --set stream_test_rows to much less, or "
            "stream more text"
        )
    packer = BestFitPacker(settings.sequence_length)
    packed = [row for document in documents for row in packer.add(document)]
    packed += packer.finish()
    return HeldOut(packed[:rows], frozenset(digests))


def _by_turns(lanes: Sequence[Iterator[Row]]) -> Iterator[Row]:
    waiting = list(lanes)
    while waiting:
        left = []
        for lane in waiting:
            row = next(lane, None)
            if row is not None:
                yield row
                left.append(lane)
        waiting = left


def row_values(row: PackedRow) -> dict[str, Any]:
    """A row with the columns of `doge_lm.data.storage.row_features`."""
    return {**row._asdict(), "source": SOURCE_NAME}


def held_out_dataset(held_out: HeldOut, vocab_size: int) -> Dataset:
    """The held-out rows in the form of a prepared set."""
    rows = [row_values(row) for row in held_out.rows]
    return Dataset.from_list(rows, features=row_features(id_dtype(vocab_size))).with_format("numpy")


_worker: dict[str, _Packing] = {}  # a process keeps its tokenizer here between blocks


def _start_worker(settings: StreamSettings, held_out: frozenset[bytes]) -> None:
    _worker["packing"] = _Packing(settings, held_out)


def _pack(block: _Block) -> _PackedBlock:
    return _worker["packing"].block(block)


# ---------------------------------------------------------------------------------------------------------------
# The stream
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamState:
    """Where a block begins.

    Attributes:
        row: rows of the stream before it.
        epoch: passes over the source before it.
        place: where it stands in the source.
        skipped: bad rows before it, by reason.
    """

    row: int = 0
    epoch: int = 0
    place: Place = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


class RowStream:
    """The rows of a run by their numbers, which must be asked for in ascending order; some may be left out.

    So it stands in for a data set that is read by index, in one process; with several, each reads it all and takes
    its share of every batch.

    Args:
        source: what is read.
        settings: what becomes of the text.
        held_out: what is never given.
        length: rows of the run.
        workers: processes that tokenize and pack; 1 works in this process.
        start: where to begin; rows before it cannot be asked for.
        report: told of the first bad row of every kind that is left out.
    """

    def __init__(
        self,
        source: StreamSource,
        settings: StreamSettings,
        held_out: HeldOut,
        *,
        length: int,
        workers: int = 1,
        start: StreamState | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self._source, self._settings, self._length, self._report = source, settings, length, report
        self._stack = ExitStack()
        self._workers = self._stack.enter_context(Workers(workers, _start_worker, (settings, held_out.digests)))
        self._start = start or StreamState()
        # The blocks that were given lately, the current one last; its rows; and the number of the row behind it.
        self._states: list[StreamState] = []
        self._rows: list[PackedRow] = []
        self._end = self._start.row
        self._skipped = Counter(self._start.skipped)
        self._reported: set[str] = set(self._start.skipped)
        self._blocks = self._read()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        while index >= self._end:
            self._advance(next(self._blocks))
        first = self._states[-1].row if self._states else self._end
        if index < first:
            raise IndexError(f"row {index} of the stream has passed: it stands at row {first}")
        return row_values(self._rows[index - first])

    def state(self, row: int) -> StreamState:
        """Where a run that has read `row` rows goes on: the state of a block from which on the row behind them comes.

        What lies before that block is forgotten.

        Raises:
            ValueError: if the stream has not come so far, or has forgotten the row.
        """
        if not self._states and row == self._start.row:
            return self._start
        passed = sum(state.row <= row for state in self._states)
        if passed == 0 or row > self._end:
            raise ValueError(f"row {row} is not among those that the stream has given last")
        del self._states[: passed - 1]
        return self._states[0]

    def close(self) -> None:
        """Ends the processes."""
        self._blocks.close()
        self._stack.close()

    def _advance(self, block: _PackedBlock) -> None:
        """Takes the next block for the current one."""
        here = StreamState(self._end, block.epoch, block.place, dict(self._skipped))
        random = np.random.RandomState([self._settings.seed, here.row >> 32, here.row & 0xFFFFFFFF])
        self._rows = [block.rows[index] for index in random.permutation(len(block.rows))]
        self._skipped.update(block.skipped)
        for reason, example in block.examples.items():
            if reason not in self._reported:
                self._reported.add(reason)
                self._report(f"left out (the first of its kind; the log counts them): {example}")
        self._states.append(here)
        self._end += len(block.rows)

    def _read(self) -> Generator[_PackedBlock, None, None]:
        """The packed blocks, without end.

        Raises:
            UserError: if a whole epoch gives no row.
        """
        epoch, whole, rows = self._start.epoch, not self._start.place, 0
        with closing(self._workers.map(_pack, self._to_pack())) as blocks:
            for block in blocks:
                if block.epoch > epoch:
                    if whole and rows == 0:
                        raise UserError(_NOTHING)
                    epoch, whole, rows = block.epoch, True, 0
                rows += len(block.rows)
                yield block

    def _to_pack(self) -> Iterator[_Block]:
        epoch, place = self._start.epoch, self._start.place
        while True:
            chunks: list[Chunk] = []
            first: Place | None = None
            size = 0
            for here, chunk in self._source.chunks(self._settings.seed, epoch, place):
                if not chunks:
                    first, size = here, 0
                chunks.append(chunk)
                size += chunk.bytes
                if size >= _BLOCK_BYTES:
                    yield _Block(epoch, first or {}, chunks)
                    chunks = []
            if chunks:
                yield _Block(epoch, first or {}, chunks)
            if first is None and not place:
                raise UserError(_NOTHING)
            epoch, place = epoch + 1, {}
