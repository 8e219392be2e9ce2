"""Rows for training straight from a source of text, tokenized and packed on the fly: no prepared set, no shards.

A source (a file, a folder, or a data set on the hub) is read as **chunks**: a range of lines of a plain `.jsonl`, a
row group of a `.parquet`, a small file, or a stretch of rows of what can only be read from front to back (a large
compressed file or row group, the hub). Chunks that follow each other are joined into **blocks** of about 16 MiB of
text, which worker processes turn into packed rows. In every epoch the parts of files, and the large compressed files
as such, are permuted by the seed; the hub is read in its own order; and the rows of every block are permuted. So the
stream depends on the source, the seed and the tokenizer, and never on the number of workers.

Where the stream stands is a small value (`StreamState`): the place of a block in the source, and the number of rows
before it. A resumed run begins there, and does that one block again; text that is not what it was is refused. What is
held at any time are the few blocks in the workers' hands.

The test set is taken first: documents of up to 16 places by turns, until they fill the rows that are asked for. A
document that equals one of them, wherever it stands, is never given for training. Of `.parquet`, one place at a time
is open, since an open one may hold hundreds of MiB: a place is read some way, closed, and later opened again.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np

from doge_lm.data.documents import Tokenizing, batch_rows, nothing_to_learn
from doge_lm.data.encoders import Backend, load_encoder, take_texts
from doge_lm.data.manifest import MAX_IDENTITY_BYTES, hash_ends
from doge_lm.data.packing import BestFitPacker, PackedRow
from doge_lm.data.sources import (
    MAX_DOCUMENT_BYTES,
    TOO_LARGE,
    BadInputError,
    Location,
    Part,
    Row,
    TextRow,
    file_suffix,
    find_files,
    parse_row,
    row_characters,
    row_texts,
    scan_rows,
)
from doge_lm.data.storage import id_dtype, row_features
from doge_lm.data.units import check_size, parquet_parts
from doge_lm.data.workers import Workers
from doge_lm.errors import UserError

if TYPE_CHECKING:
    # Named in annotations only: the workers do without this import, and without its memory.
    from datasets import Dataset

SOURCE_NAME = "stream"
"""The `source` of all rows: a packed row may hold documents of several files."""

_BLOCK_BYTES = 16 * 2**20
# The size of a part of a file: a block joins several, of different files.
_PART_BYTES = 4 * 2**20
# A compressed file up to this size is read by a worker, whole; a larger one by the parent, stretch by stretch.
_SMALL_FILE_BYTES = 2 * 2**20
# A row group of a `.parquet` up to this size likewise.
_SMALL_GROUP_BYTES = 64 * 2**20
# How often text is larger than its compressed form, about.
_UNPACKED = 4
_TEST_LANES = 16
# What is held of each of these places while others are read: more than a test set of the usual size takes of one.
_LANE_BYTES = 2**20
# What a row takes beside its text.
_ROW_BYTES = 2**8
# Documents on which the backends are compared.
_SAMPLE_ROWS = 200
_SAMPLE_CHARACTERS = 10**6
# Epochs count from 0; the test set is drawn by a number that none of them will have.
_TEST_EPOCH = 2**32 - 1
_NOTHING = "the stream gives no row to train on: it is empty, or all of its documents are held out or bad"
_KEEP_STILL = (
    "a stream needs files that stay as they are until the run ends: stream a copy of them, or a folder of their own"
)
_ONE_PROCESS = (
    "a RowStream is read in the process that made it, and has worker processes of its own; give the DataLoader "
    "num_workers=0"
)

Place = dict[str, Any]
"""A place in a source, as JSON values. The empty one is the beginning."""

_Item = tuple[Location | str, Row] | BadInputError


# ---------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------


class FilePart(NamedTuple):
    """A part of a file, or (where `part` is None) all of it, which a worker reads.

    Attributes:
        path: the file.
        size: its size when the source was opened.
        part: the part.
        bytes: of text in it, about.
    """

    path: Path
    size: int
    part: Part | None
    bytes: int

    def items(self, *, count_lines: bool) -> Generator[_Item, None, None]:
        """The rows, and what is wrong between them; see `scan_rows`. Closing it closes the file.

        Raises:
            UserError: if the file is not as large as it was.
        """
        check_size(self.path, self.size, _KEEP_STILL)
        limit = MAX_DOCUMENT_BYTES
        yield from scan_rows(self.path, part=self.part, max_document_bytes=limit, count_lines=count_lines)
        check_size(self.path, self.size, _KEEP_STILL)

    @property
    def counted_from(self) -> str:
        """Where in the file lines are counted from, for messages, unless they were counted from its beginning."""
        return "" if self.part is None else self.part.counted_from


class Stretch(NamedTuple):
    """Rows that the parent has read."""

    rows: list[_Item]
    bytes: int
    counted_from: str = ""

    def items(self, *, count_lines: bool) -> Iterator[_Item]:
        """The rows, and what is wrong between them."""
        return iter(self.rows)


Chunk = FilePart | Stretch


class StreamSource(Protocol):
    """What a stream reads."""

    @property
    def identity(self) -> str:
        """Stands for the content: a run is resumed with the same one only."""

    @property
    def content(self) -> dict[str, str]:
        """What is read, by name, each with what stands for its content; `StreamState` keeps it."""

    def way_back(self, content: dict[str, str]) -> str:
        """What a user can do whose run was made with another content."""

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
        files = [(file, file.stat().st_size) for file in find_files(path)]
        root = path if path.is_dir() else path.parent
        whole = sum(size for _, size in files) <= MAX_IDENTITY_BYTES
        self.content = {
            file.relative_to(root).as_posix(): _content_hash(file, size, whole=whole) for file, size in files
        }
        self.identity = hashlib.sha256(json.dumps(self.content).encode()).hexdigest()
        self._units = [unit for file, size in files for unit in _units_of(file, size)]

    def way_back(self, content: dict[str, str]) -> str:
        """See `StreamSource`."""
        return "put the text back as it was, or start anew with --overwrite in place of --resume_from_checkpoint"

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
        return [chain.from_iterable(map(_closed_chunks_of, units)) for units in lanes]

    def _order(self, seed: int, epoch: int) -> list[FilePart]:
        permutation = np.random.RandomState([seed, epoch]).permutation(len(self._units))
        return [self._units[index] for index in permutation]


def _content_hash(path: Path, size: int, *, whole: bool) -> str:
    """A hash of a file's size and content: all of it, or the two ends."""
    digest = hashlib.sha256(str(size).encode())
    try:
        with path.open("rb") as file:
            if whole:
                while data := file.read(2**20):
                    digest.update(data)
            else:
                hash_ends(file, size, digest)
    except OSError:
        return ""  # whoever reads it will say what is wrong
    return digest.hexdigest()[:16]  # one of these for each file goes into every checkpoint


def _units_of(path: Path, size: int) -> list[FilePart]:
    suffix = file_suffix(path)
    whole = FilePart(path, size, None, size if suffix in (".jsonl", ".txt") else _UNPACKED * size)
    if suffix == ".parquet":
        return [FilePart(path, size, *part) for part in parquet_parts(path, 0)] or [whole]
    if suffix == ".jsonl":
        bounds = [*range(0, size, _PART_BYTES), size]
        return [FilePart(path, size, Part(start, stop), stop - start) for start, stop in pairwise(bounds)]
    return [whole]


def _chunks_of(unit: FilePart) -> Iterator[Chunk]:
    suffix = file_suffix(unit.path) or ""
    compressed = suffix.endswith((".zst", ".gz")) and unit.bytes > _UNPACKED * _SMALL_FILE_BYTES
    if compressed or (suffix == ".parquet" and unit.bytes > _SMALL_GROUP_BYTES):
        yield from _stretches(unit.items(count_lines=True))
    else:
        yield unit


def _closed_chunks_of(unit: FilePart) -> Iterator[Chunk]:
    """As `_chunks_of`, but a row group is not left open when a chunk is taken: for many units by turns."""
    if file_suffix(unit.path) != ".parquet":
        yield from _chunks_of(unit)
        return
    passed: int | None = 0
    while passed is not None:
        stretch, passed = _stretch_behind(unit, passed)
        yield stretch


def _stretch_behind(unit: FilePart, passed: int) -> tuple[Stretch, int | None]:
    """The rows of a unit behind so many, up to `_LANE_BYTES`, and how many are passed then; None at the end.

    Of what is not to be learned from only the first is there, which is enough for an error: of empty rows there may be
    millions in a few bytes.
    """
    rows: list[_Item] = []
    size = 0
    whole = True
    with closing(unit.items(count_lines=True)) as items:
        for number, item in enumerate(islice(items, passed, None), start=passed + 1):
            if isinstance(item, BadInputError) or nothing_to_learn(item[1]) is not None:
                if whole:
                    rows.append(item)
                whole = False
                continue
            rows.append(item)
            size += row_characters(item[1]) + _ROW_BYTES
            if size >= _LANE_BYTES:
                return Stretch(rows, size), number
    return Stretch(rows, size), None


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
        self.content = {name: version}
        self._name = name
        self._load = load

    def way_back(self, content: dict[str, str]) -> str:
        """See `StreamSource`."""
        if self._name not in content:
            return "stream what it was, or start anew with --overwrite in place of --resume_from_checkpoint"
        return f"read what it was then with --set stream={self._name}@{content[self._name]}"

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
        for number, values in enumerate(self._readable(rows, done), start=done + 1):
            location = Location(Path(self._name), number, "row")
            try:
                row = parse_row(values, location)
                if (characters := row_characters(row)) > MAX_DOCUMENT_BYTES:
                    message = f"{location} has more than {MAX_DOCUMENT_BYTES:,} characters; cut the document up"
                    raise BadInputError(message, TOO_LARGE, characters)
            except BadInputError as error:
                yield error
            else:
                yield location, row

    def _readable(self, rows: Iterator[dict[str, Any]], done: int) -> Iterator[dict[str, Any]]:
        try:
            for values in rows:
                yield values
                done += 1
        # The network fails in the words of whichever HTTP library the hub's client is built on, and a damaged file in
        # those of its reader. What could be tried again `datasets` has tried.
        except Exception as error:
            raise UserError(
                f"stream {self._name}: reading on behind row {done:,} fails ({type(error).__name__}: {error}); if it "
                "is the network, run again with --resume_from_checkpoint, which goes on from the last checkpoint"
            ) from error


def open_source(text: str) -> StreamSource:
    """Opens what the setting `stream` names.

    Args:
        text: a file or a folder, or `OWNER/NAME`, `OWNER/NAME:CONFIG` or either with `@REVISION` (a commit, branch or
            tag) of a data set on the hub, of which the split `train` is read.

    Raises:
        UserError: if it is neither.
    """
    path = Path(text)
    if path.exists():
        return FileSource(path)
    if text.startswith((".", "/", "~")) or "\\" in text:  # no name of the hub looks like that
        raise UserError(f"stream {text}: there is no such file or folder")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?", text)
    if match is None:
        raise UserError(
            f"stream {text}: there is no such file or folder, and it is no data set of the hub (OWNER/NAME or "
            "OWNER/NAME:CONFIG, with @REVISION or without) either"
        )
    return _open_hub(match[1], match[2], match[3])


def _open_hub(name: str, config: str | None, revision: str | None) -> HubSource:
    from datasets import load_dataset  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415

    try:
        # First, as its errors say what is wrong.
        load_dataset(name, config, split="train", streaming=True, revision=revision)
        commit = HfApi().dataset_info(name, revision=revision).sha
    # Whatever is wrong with the network, the repository or its configuration: the user asked for exactly this.
    except Exception as error:
        raise UserError(
            f"stream {name}: it is no file or folder here, and the hub does not open it as a data set: {error}"
        ) from error
    load = partial(load_dataset, name, config, split="train", streaming=True, revision=commit)
    return HubSource(f"{name}:{config}" if config else name, str(commit), load)


def refuse_changes(before: dict[str, str], source: StreamSource) -> None:
    """Checks that a source holds what a run was begun with.

    Args:
        before: the `content` of the source then.
        source: the source now.

    Raises:
        UserError: naming the first file that is gone, new or of other content.
    """
    now = source.content
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not changed:
        return
    name = changed[0]
    what = "is not there any more" if name not in now else "is new" if name not in before else "is not what it was"
    others = f" (so it is with {len(changed) - 1:,} more)" if len(changed) > 1 else ""
    raise UserError(
        f"the checkpoint was made while other text was streamed: {name} {what}{others}; {source.way_back(before)}"
    )


def sample_texts(source: StreamSource, seed: int) -> list[str]:
    """Some texts from several places of a source; bad input is passed over here, since it will be met again."""
    lanes = [
        (item[1] for chunk in lane for item in chunk.items(count_lines=False) if not isinstance(item, BadInputError))
        for lane in source.lanes(seed)
    ]
    texts = (text for row in _by_turns(lanes) for text in row_texts(row))
    return take_texts(texts, _SAMPLE_CHARACTERS, _SAMPLE_ROWS)


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
        backend: what tokenizes; the ids are the same.
    """

    tokenizer_path: Path
    sequence_length: int
    seed: int = 233
    skip_bad_rows: bool = False
    backend: Backend = "tokenizers"


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
        encoder = load_encoder(settings.tokenizer_path, settings.backend)
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
        # The lines before a part are counted for an error that ends the run, not for each of many that are skipped.
        for item in chunk.items(count_lines=not self._settings.skip_bad_rows):
            if isinstance(item, BadInputError):
                self._skip(item.reason, str(item), chunk)
                continue
            location, row = item
            reason = nothing_to_learn(row)
            if reason is None:
                yield row
            else:
                self._skip(reason, f"{location}: {reason}", chunk)

    def _skip(self, reason: str, message: str, chunk: Chunk) -> None:
        if not self._settings.skip_bad_rows:
            raise UserError(f"{message}; mend or remove it, or let --set stream_on_error=skip leave out such rows")
        self.skipped[reason] += 1
        self.examples.setdefault(reason, message + chunk.counted_from)


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
        there = tokens // settings.sequence_length
        less = f"give --set stream_test_rows={there // 10 or 1}, for example, or " if there > 1 else ""
        raise UserError(
            f"the stream holds about {there:,} rows of {settings.sequence_length:,} tokens in all, too few to hold "
            f"{rows:,} out as the test set; {less}stream more text"
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


def held_out_dataset(held_out: HeldOut, vocab_size: int) -> "Dataset":
    """The held-out rows in the form of a prepared set."""
    from datasets import Dataset  # noqa: PLC0415

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
        content: of the source; a run goes on with the same one only.
    """

    row: int = 0
    epoch: int = 0
    place: Place = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)


class RowStream:
    """The rows of a run by their numbers, which must be asked for in ascending order; some may be left out.

    So it stands in for a data set that is read by index, in the process that made it (a DataLoader has no workers of
    its own for it). Where several processes train, each has a stream, reads it all and takes its share of every batch.

    Args:
        source: what is read.
        settings: what becomes of the text.
        held_out: what is never given.
        length: rows of the run.
        workers: processes that tokenize and pack; 1 works in this process.
        start: where to begin; rows before it cannot be asked for.
        report: told of the first bad row of every kind that is left out.

    Raises:
        UserError: if `start` is of other text.
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
        self._process = os.getpid()
        self._start = start or StreamState(content=source.content)
        refuse_changes(self._start.content, source)
        self._stack = ExitStack()
        self._workers = self._stack.enter_context(
            Workers(workers, _start_worker, (settings, held_out.digests), flag="stream_workers")
        )
        # The blocks that were given lately, the current one last; its rows; and the number of the row behind it.
        self._states: list[StreamState] = []
        self._rows: list[PackedRow] = []
        self._end = self._start.row
        self._skipped = Counter(self._start.skipped)
        self._reported: set[str] = set(self._start.skipped)
        self._blocks = self._read()

    def __len__(self) -> int:
        return self._length

    def __reduce__(self) -> NoReturn:
        raise TypeError(_ONE_PROCESS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if os.getpid() != self._process:
            raise RuntimeError(_ONE_PROCESS)
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
        if not self._states and row >= self._start.row:
            return self._start  # nothing was read yet: a run that had ended, say
        passed = sum(state.row <= row for state in self._states)
        if passed == 0 or row > self._end:
            raise ValueError(f"row {row} is not among those that the stream has given last")
        del self._states[: passed - 1]
        return self._states[0]

    @property
    def skipped(self) -> dict[str, int]:
        """Bad rows that were left out so far, by reason, those of the current block among them."""
        return dict(self._skipped)

    def close(self) -> None:
        """Ends the processes."""
        self._blocks.close()
        self._stack.close()

    def _advance(self, block: _PackedBlock) -> None:
        """Takes the next block for the current one."""
        here = StreamState(self._end, block.epoch, block.place, dict(self._skipped), self._source.content)
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
