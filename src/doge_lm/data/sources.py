r"""Where text comes from: the catalogue of public sources, and the readers of files.

Files are read as a stream, in bounded memory, whatever their size: `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.parquet`
and `.txt`, or folders of them in sorted order. JSON lines are cut at `\n` only: texts contain U+2028, U+0085 and
form feeds, at which `str.splitlines` would cut too. Every error names the file and the line (or the row).

Two ways to read: `read_rows` ends at the first thing that is wrong; `scan_rows` gives what is wrong as `BadInputError`,
between the rows, and goes on behind it. The latter also reads a part of a file only (`Part`).

A row carries either

- `text` and optionally `prompt`: a document for pre-training; or
- `conversations`, a list of `{"from": "human" | "gpt" | "system", "value": ...}`, or `messages`, a list of
  `{"role": "user" | "assistant" | "system", "content": ...}`: a conversation for fine-tuning.
"""

import argparse
import contextlib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import zstandard

from doge_lm.data.manifest import Kind
from doge_lm.data.parquet import BrokenPageError, LargePagesError, open_parquet, parquet_batches
from doge_lm.errors import UserError

# A line, or a text file (one document each), above this is refused: it must be held in memory whole.
MAX_DOCUMENT_BYTES = 8 * 2**20
# Compressed data is taken in small bites, since a bite may unpack to many thousand times its size.
_COMPRESSED_CHUNK = 2**10
_PLAIN_CHUNK = 2**20
_BOM = b"\xef\xbb\xbf"

# What can be wrong, as it stands in the accounting.
INVALID_JSON = "line that is no JSON object"
INVALID_UTF8 = "invalid UTF-8"
LONE_SURROGATE = "lone surrogate"
BAD_FIELD = "field that is missing or of a wrong type"
TOO_LARGE = "document above --max_document_bytes"
BROKEN_FILE = "rest of a file that is cut off or damaged"
UNREADABLE_FILE = "file that cannot be read"
LARGE_PAGES = "row group of a parquet file with pages that are too large"
WRONG_COLUMNS = "parquet file with missing columns or columns of another type"

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
FIELDS = ("text", "prompt", "conversations", "messages")


# ---------------------------------------------------------------------------------------------------------------
# The catalogue
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CatalogueEntry:
    """A public source on the Hugging Face hub.

    Rows and sizes are rounded from the data sets' own pages and serve for estimates only.

    Attributes:
        hub_id: the repository on the hub.
        config: the configuration of the repository, or None.
        fields: the fields that are kept of each row.
        kind: what the source is for.
        licence: as its page states it.
        rows: approximate number of rows.
        text_gb: approximate size of the kept text in GB (10^9 bytes), uncompressed.
        contents_from_software_heritage: the rows hold blob ids, and each text must be fetched by its id.
        note: what a user must know before downloading.
    """

    hub_id: str
    config: str | None
    fields: tuple[str, ...]
    kind: Kind
    licence: str
    rows: int
    text_gb: float
    contents_from_software_heritage: bool = False
    note: str = ""


_INFINITY_NOTE = "gated: accept its conditions on the hub and log in with `hf auth login` first"

CATALOGUE: dict[str, CatalogueEntry] = {
    "cosmopedia-v2": CatalogueEntry(
        hub_id="HuggingFaceTB/smollm-corpus",
        config="cosmopedia-v2",
        fields=("prompt", "text"),
        kind="pretrain",
        licence="odc-by",
        rows=39_134_000,
        text_gb=212,
    ),
    "python-edu": CatalogueEntry(
        hub_id="HuggingFaceTB/smollm-corpus",
        config="python-edu",
        fields=("blob_id", "repo_name", "path"),
        kind="pretrain",
        licence="odc-by (the list; each file keeps its own licence)",
        rows=7_678_000,
        text_gb=14,
        contents_from_software_heritage=True,
        note="the texts are fetched one by one from the Software Heritage bucket",
    ),
    "chinese-cosmopedia": CatalogueEntry(
        hub_id="opencsg/chinese-cosmopedia",
        config=None,
        fields=("text",),
        kind="pretrain",
        licence="apache-2.0, and the OpenCSG community licence in its repository",
        rows=15_000_000,
        text_gb=180,
    ),
    "infinity-instruct-0625": CatalogueEntry(
        hub_id="BAAI/Infinity-Instruct",
        config="0625",
        fields=("conversations",),
        kind="finetune",
        licence="cc-by-sa-4.0",
        rows=660_000,
        text_gb=2.2,
        note=_INFINITY_NOTE,
    ),
    "infinity-instruct-7M": CatalogueEntry(
        hub_id="BAAI/Infinity-Instruct",
        config="7M",
        fields=("conversations",),
        kind="finetune",
        licence="cc-by-sa-4.0",
        rows=7_449_000,
        text_gb=11,
        note=_INFINITY_NOTE,
    ),
    "infinity-instruct-Gen": CatalogueEntry(
        hub_id="BAAI/Infinity-Instruct",
        config="Gen",
        fields=("conversations",),
        kind="finetune",
        licence="cc-by-sa-4.0",
        rows=1_457_000,
        text_gb=4,
        note=_INFINITY_NOTE,
    ),
}

# "About 2 TB" is the published figure for the whole path over all sources: the hub's cache, raw shards, tokenized
# and merged sets. A source's share of it goes by its text.
ALL_SOURCES_DISK_BYTES = 2 * 10**12
_ALL_TEXT_GB = sum(entry.text_gb for entry in CATALOGUE.values())


def estimated_disk_bytes(entry: CatalogueEntry, max_rows: int | None = None) -> int:
    """Approximate disk that the whole path takes for a source, or for its first rows."""
    share = entry.text_gb / _ALL_TEXT_GB
    part = 1.0 if max_rows is None else min(1.0, max_rows / entry.rows)
    return round(ALL_SOURCES_DISK_BYTES * share * part)


# ---------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------

Role = Literal["human", "gpt", "system"]

_ROLES: dict[str, Role] = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class TextRow:
    """A document for pre-training; `prompt` is empty when there is none."""

    text: str
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A conversation for fine-tuning: (role, content) in the order of the file, not yet checked for alternation."""

    turns: tuple[tuple[Role, str], ...]


Row = TextRow | ConversationRow


class LinesBefore:
    """The lines of a file that begin before a byte: counted when an error asks for them, and then only once."""

    def __init__(self, path: Path, end: int) -> None:
        self._path = path
        self._end = end
        self._count: int | None = None

    def __int__(self) -> int:
        if self._count is None:
            self._count = 0
            left, last = self._end, b"\n"
            with self._path.open("rb") as file:
                while left > 0 and (chunk := file.read(min(left, _PLAIN_CHUNK))):
                    self._count += chunk.count(b"\n")
                    left, last = left - len(chunk), chunk[-1:]
            self._count += last != b"\n"  # a line that ends behind the byte
        return self._count


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a file that an error can name.

    Attributes:
        path: the file.
        number: of the line or row, from 1; where a part of a file is read, from the start of the part.
        unit: what `number` counts.
        before: lines or rows of the file before the part.
    """

    path: Path
    number: int
    unit: Literal["line", "row", "file"]
    before: LinesBefore | int = 0

    def __str__(self) -> str:
        if self.unit == "file":
            return str(self.path)
        return f"{self.path}, {self.unit} {int(self.before) + self.number:,}"


class BadInputError(UserError):
    """A row or a file that is not as it must be.

    Attributes:
        reason: what is wrong, in the words of the accounting.
        bytes: how much of the input it is about.
        is_row: it is about one row; otherwise about (the rest of) a file, or a row group.
    """

    def __init__(self, message: str, reason: str, bytes_: int = 0, *, is_row: bool = True) -> None:
        super().__init__(message)
        self.reason = reason
        self.bytes = bytes_
        self.is_row = is_row

    @property
    def with_flag(self) -> str:
        """The message, with the flag that lets the row pass; for commands that have `add_bad_input_arguments`."""
        return f"{self}, or raise --max_document_bytes" if self.reason == TOO_LARGE else str(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # The usual way of pickling exceptions knows the message alone.
        return _bad_input, (str(self), self.reason, self.bytes, self.is_row)


def _bad_input(message: str, reason: str, bytes_: int, is_row: bool) -> BadInputError:
    return BadInputError(message, reason, bytes_, is_row=is_row)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file: the lines that begin in a range of bytes, or a range of row groups.

    Attributes:
        start: the first byte, or row group.
        stop: the first one behind the part.
        before: lines or rows of the file before the part; None if they were not counted.
    """

    start: int
    stop: int
    before: int | None = None

    @property
    def counted_from(self) -> str:
        """Where in the file lines are counted from, for messages, unless they were counted from its beginning."""
        if self.before is not None or self.start == 0:
            return ""
        return f" (lines counted from byte {self.start:,} of the file)"


HOW_TO_SKIP = "; mend or remove it, or let `--on_error skip` drop and count what is bad"
"""The end of an error message of commands that have `add_bad_input_arguments`."""


def add_bad_input_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the flags `--on_error` and `--max_document_bytes`.

    Args:
        parser: of a command that reads rows.
        what: what is bad input to it, before what is to all: `a, b, `.
    """
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help=f"bad input ({what}invalid JSON or UTF-8, a missing field, a document that is too large, a damaged "
        "file): stop with an error that names file and line (default), or skip it and count it as dropped",
    )
    parser.add_argument(
        "--max_document_bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        metavar="N",
        help=f"larger documents are bad input (default: {MAX_DOCUMENT_BYTES:,})",
    )


def read_rows(files: Iterable[Path], kind: Kind | None = None) -> Iterator[Row]:
    """Reads the rows of files one after another, holding one row (or a few) in memory.

    Args:
        files: paths of files, of the kinds in `SUFFIXES`.
        kind: what every row must be for; None takes either.

    Raises:
        UserError: naming file and line, for a broken archive, invalid JSON or UTF-8, a row that is not an object,
            and a missing or ill-typed field.
    """
    return (row for _, row in read_located_rows(files, kind))


def read_located_rows(files: Iterable[Path], kind: Kind | None = None) -> Iterator[tuple[Location, Row]]:
    """Reads rows as `read_rows` does, each with the place where it stands."""
    for path in files:
        for item in scan_rows(path, kind):
            if isinstance(item, BadInputError):
                raise item
            yield item


def scan_rows(
    path: Path,
    kind: Kind | None = None,
    *,
    part: Part | None = None,
    max_document_bytes: int | None = None,
    count_lines: bool = True,
    shown_as: Path | None = None,
) -> Iterator[tuple[Location, Row] | BadInputError]:
    """Reads the rows of one file or of a part of it, and goes on behind what is wrong with one.

    Args:
        path: the file.
        kind: what every row must be for; None takes either.
        part: a part of a `.jsonl` or `.parquet` file; the whole file by default.
        max_document_bytes: `MAX_DOCUMENT_BYTES` by default; what is larger is bad input, and is never held in memory
            (in parquet it is, for a moment, with the page that it stands in).
        count_lines: let errors in a part of a file say the number of the line in the file, for which the lines before
            the part must be counted.
        shown_as: the file that errors name, where JSON lines were copied out of another one.

    Yields:
        The rows, each with its place, and between them what is wrong. What is wrong with a file is the last; a row
        group of a `.parquet` that cannot be read is passed over.

    Raises:
        UserError: if the suffix is unknown, or the file does not exist.
    """
    limit = max_document_bytes or MAX_DOCUMENT_BYTES
    for item in _scan_objects(path, part, limit, count_lines=count_lines, shown_as=shown_as):
        if isinstance(item, BadInputError):
            yield item
            continue
        try:
            row = parse_row(item.values, item.location, kind)
        except BadInputError as error:
            error.bytes = item.bytes
            yield error
        else:
            yield item.location, row


def row_texts(row: Row) -> list[str]:
    """All words of a row: prompt and text, or what is said in each turn."""
    return [row.prompt, row.text] if isinstance(row, TextRow) else [content for _, content in row.turns]


def row_characters(row: Row) -> int:
    """Characters of all words of a row: near enough to its bytes for deciding where something is cut."""
    return sum(map(len, row_texts(row)))


def row_kind(row: Row) -> Kind:
    """What a row is for: text for pre-training, a conversation for fine-tuning."""
    return "pretrain" if isinstance(row, TextRow) else "finetune"


def parse_row(values: dict[str, Any], location: Location, kind: Kind | None = None) -> Row:
    """Takes the fields that matter out of a row.

    Args:
        values: the row's fields; others than `FIELDS` are ignored.
        location: for error messages.
        kind: what the row must be for. A row that has both a text and a conversation is read as this says
            (as text, where it is None).

    Raises:
        UserError: if a field is missing or has a wrong type.
    """
    has_turns = values.get("conversations") is not None or values.get("messages") is not None
    # A parquet table has every column in every row: there, the null one is the one that is meant to be absent.
    has_text = "text" in values and not (has_turns and values["text"] is None)
    if has_text and kind != "finetune":
        text = _string(values, "text", location)
        prompt = "" if values.get("prompt") is None else _string(values, "prompt", location)
        return TextRow(text, prompt)
    if has_turns and kind != "pretrain":
        return ConversationRow(_turns(values, location))
    wanted = {"pretrain": "`text`", "finetune": "`conversations` or `messages`", None: "`text` or `conversations`"}[
        kind
    ]
    present = ", ".join(f"`{name}`" for name in list(values)[:8]) or "none"
    raise BadInputError(f"{location}: the field {wanted} is missing (fields there: {present})", BAD_FIELD)


def _turns(values: dict[str, Any], location: Location) -> tuple[tuple[Role, str], ...]:
    field, role_key, content_key = (
        ("conversations", "from", "value")
        if values.get("conversations") is not None
        else ("messages", "role", "content")
    )
    turns = values[field]
    if not isinstance(turns, list):
        raise BadInputError(f"{location}: the field `{field}` is {_type_name(turns)}, not a list", BAD_FIELD)
    parsed: list[tuple[Role, str]] = []
    for number, turn in enumerate(turns, start=1):
        where = _Turn(location, number, field)
        if not isinstance(turn, dict):
            raise BadInputError(f"{where} is {_type_name(turn)}, not an object", BAD_FIELD)
        role = _ROLES.get(_string(turn, role_key, where))
        if role is None:
            raise BadInputError(
                f"{where}: unknown speaker {turn[role_key]!r} in `{role_key}`; known are {', '.join(sorted(_ROLES))}",
                BAD_FIELD,
            )
        parsed.append((role, _string(turn, content_key, where)))
    return tuple(parsed)


class _Turn(NamedTuple):
    """A turn of a conversation; its name is put together only when an error needs it."""

    location: Location
    number: int
    field: str

    def __str__(self) -> str:
        return f"{self.location}, turn {self.number} of `{self.field}`"


def _string(values: dict[str, Any], field: str, where: Location | _Turn) -> str:
    if field not in values:
        present = ", ".join(f"`{name}`" for name in list(values)[:8]) or "none"
        raise BadInputError(f"{where}: the field `{field}` is missing (fields there: {present})", BAD_FIELD)
    value = values[field]
    if not isinstance(value, str):
        raise BadInputError(f"{where}: the field `{field}` is {_type_name(value)}, not a string", BAD_FIELD)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInputError(
                f"{where}: the field `{field}` holds a lone surrogate ({value[error.start]!a}), which is not text",
                LONE_SURROGATE,
            ) from None
    return value


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def find_files(path: Path) -> list[Path]:
    """The readable files at a path: the file itself, or those of a folder and its subfolders in sorted order.

    Hidden files and folders are left out. The order is by the parts of the relative path, the same on every
    platform.

    Raises:
        UserError: if the path is missing, the file has an unknown suffix, or the folder holds no readable file.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file():
        if file_suffix(path) is None:
            raise UserError(f"{path} is of an unknown kind; readable are {', '.join(SUFFIXES)}")
        return [path]
    found = [
        entry
        for entry in path.rglob("*")
        if not any(part.startswith(".") for part in entry.relative_to(path).parts)
        and file_suffix(entry) is not None
        and entry.is_file()
    ]
    if not found:
        raise UserError(f"the folder {path} holds no readable file ({', '.join(SUFFIXES)})")
    return sorted(found, key=lambda entry: entry.relative_to(path).parts)


def file_suffix(path: Path) -> str | None:
    """Which of `SUFFIXES` a file has, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


class _Object(NamedTuple):
    """A row as it stands in a file, before its fields are looked at; `bytes` is its size there."""

    location: Location
    values: dict[str, Any]
    bytes: int


def read_objects(path: Path) -> Iterator[tuple[Location, dict[str, Any]]]:
    """Reads the rows of one file as objects, with the place of each.

    A text file is one document, `{"text": ...}`. A byte order mark at the start is skipped, blank lines between
    JSON lines too; CRLF line ends of a text file become LF.

    Raises:
        UserError: as `read_rows`.
    """
    for item in _scan_objects(path, None, MAX_DOCUMENT_BYTES):
        if isinstance(item, BadInputError):
            raise item
        yield item.location, item.values


def read_text(path: Path) -> str:
    """A file of any suffix as one text, as a `.txt` file is read.

    Raises:
        UserError: if it is not there or cannot be read, is above `MAX_DOCUMENT_BYTES`, or is no UTF-8; it names the
            byte.
    """
    try:
        [item] = _scan_text(path, MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    text: str = item.values["text"]
    return text


def _scan_objects(
    path: Path, part: Part | None, limit: int, *, count_lines: bool = True, shown_as: Path | None = None
) -> Iterator[_Object | BadInputError]:
    suffix = file_suffix(path)
    if suffix is None:
        raise UserError(f"{path} is of an unknown kind; readable are {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            yield from _scan_parquet(path, part, limit)
        elif suffix == ".txt":
            yield from _scan_text(path, limit)
        else:
            yield from _scan_json_lines(path, suffix, part, limit, count_lines=count_lines, shown_as=shown_as or path)
    except BadInputError as error:
        yield error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        yield BadInputError(
            f"{path} cannot be read: {error.strerror or error}", UNREADABLE_FILE, _size_or_zero(path), is_row=False
        )


def _size_or_zero(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _scan_text(path: Path, limit: int) -> Iterator[_Object]:
    size = path.stat().st_size
    if size > limit:
        raise BadInputError(
            f"{path} has more than {limit:,} bytes; a text file is one document: cut it into several, or write it as "
            ".jsonl with one document a line",
            TOO_LARGE,
            size,
        )
    location = Location(path, 1, "file")
    text = _decode(path.read_bytes().removeprefix(_BOM), location)
    yield _Object(location, {"text": text.replace("\r\n", "\n")}, size)


def _scan_json_lines(
    path: Path, suffix: str, part: Part | None, limit: int, *, count_lines: bool, shown_as: Path
) -> Iterator[_Object | BadInputError]:
    before: LinesBefore | int = 0
    if part is None:
        chunks = unpacked_chunks(path, suffix)
    else:
        chunks = _lines_of_range(path, part)
        if part.before is not None:
            before = part.before
        elif count_lines and part.start:
            before = LinesBefore(path, part.start)
    starts_file = part is None or (part.start == 0 and not part.before)
    for number, line in enumerate(split_lines(chunks, limit), start=1):
        location = Location(shown_as, number, "line", before)
        if isinstance(line, int):
            yield BadInputError(
                f"{location} has more than {limit:,} bytes; cut the document up",
                TOO_LARGE,
                line,
            )
            continue
        content = line.removeprefix(_BOM) if number == 1 and starts_file else line
        if not content or content.isspace():
            continue
        try:
            values = _parse_json(content, location)
        except BadInputError as error:
            yield error
        else:
            yield _Object(location, values, len(content))


def _parse_json(line: bytes, location: Location) -> dict[str, Any]:
    try:
        values = json.loads(_decode(line, location))
    except json.JSONDecodeError as error:
        raise BadInputError(
            f"{location}: invalid JSON: {error.msg} (column {error.colno})", INVALID_JSON, len(line)
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise BadInputError(f"{location}: JSON that cannot be read: {error}", INVALID_JSON, len(line)) from error
    if not isinstance(values, dict):
        raise BadInputError(
            f"{location}: a row must be an object, this is {_type_name(values)}", INVALID_JSON, len(line)
        )
    return values


def _decode(data: bytes, location: Location) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{location}: invalid UTF-8 at byte {error.start + 1:,}: {error.reason}", INVALID_UTF8, len(data)
        ) from error


def split_lines(chunks: Iterator[bytes], limit: int) -> Iterator[bytes | int]:
    r"""Cuts a stream of bytes at `\n`. Each byte is looked at once, however long a line is.

    Args:
        chunks: the stream.
        limit: lines of more bytes are not kept.

    Yields:
        The lines without their ends; for one above the limit only the number of its bytes.

    Raises:
        BadInputError: what `chunks` raises, its bytes being those of the line that it broke off.
    """
    pending: list[bytes] = []
    pending_bytes = 0

    def take() -> bytes | int:
        return b"".join(pending) if pending_bytes <= limit else pending_bytes

    try:
        for chunk in _in_pieces(chunks):
            lines = chunk.split(b"\n")
            pending_bytes += len(lines[0])
            if pending_bytes <= limit:
                pending.append(lines[0])
            else:
                pending.clear()
            if len(lines) == 1:
                continue
            yield take()
            for line in lines[1:-1]:
                yield line if len(line) <= limit else len(line)
            pending, pending_bytes = [lines[-1]], len(lines[-1])
    except BadInputError as error:
        error.bytes = error.bytes or pending_bytes
        raise
    if pending_bytes:
        yield take()


def _in_pieces(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of limited size: the lines of a piece are split off together, and may be empty each."""
    for chunk in chunks:
        for begin in range(0, len(chunk), _PLAIN_CHUNK):
            yield chunk[begin : begin + _PLAIN_CHUNK]


def unpacked_chunks(path: Path, suffix: str) -> Iterator[bytes]:
    """The content of a file of JSON lines, unpacked, in chunks.

    Raises:
        BadInputError: if the file is cut off or damaged.
    """
    if suffix != ".jsonl" and path.stat().st_size == 0:  # even an empty archive has a header
        raise BadInputError(f"{path} is empty, which no archive is; get the file again", BROKEN_FILE, is_row=False)
    if suffix.endswith(".zst"):
        return _zst_chunks(path)
    if suffix.endswith(".gz"):
        return _gz_chunks(path)
    return _plain_chunks(path)


def _lines_of_range(path: Path, part: Part) -> Iterator[bytes]:
    r"""The bytes of the lines that begin in a range; the byte before a line's first is `\n`."""
    with path.open("rb") as file:
        position = part.start
        if part.start:
            file.seek(part.start - 1)
            position = _skip_line(file, part.start - 1)
        while position < part.stop and (chunk := file.read(min(_PLAIN_CHUNK, part.stop - position))):
            position += len(chunk)
            yield chunk
            if position >= part.stop and not chunk.endswith(b"\n"):
                yield from _rest_of_line(file)


def _skip_line(file: IO[bytes], position: int) -> int:
    """Reads to the end of a line; returns the position behind it."""
    while piece := file.readline(_PLAIN_CHUNK):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position


def _rest_of_line(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.readline(_PLAIN_CHUNK):
        yield piece
        if piece.endswith(b"\n"):
            return


def _plain_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_PLAIN_CHUNK):
            yield chunk


def _gz_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while True:
            try:
                chunk = file.read1(_PLAIN_CHUNK)  # `read` would throw away what came before the place of a fault
            except EOFError as error:
                raise BadInputError(
                    f"{path} is truncated: the gzip stream breaks off; get the file again", BROKEN_FILE, is_row=False
                ) from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise BadInputError(f"{path} is not a sound gzip file: {error}", BROKEN_FILE, is_row=False) from error
            if not chunk:
                return
            yield chunk


def _zst_chunks(path: Path) -> Iterator[bytes]:
    # `stream_reader` of zstandard ends quietly where a file was cut off, so the frames are followed by hand.
    decompressor = zstandard.ZstdDecompressor()
    with path.open("rb") as file:
        frame = None
        while data := file.read(_COMPRESSED_CHUNK):
            while data:
                if frame is None:
                    frame = decompressor.decompressobj()
                try:
                    chunk = frame.decompress(data)
                except zstandard.ZstdError as error:
                    if "too much memory" in str(error):
                        raise BadInputError(
                            f"{path} was packed with a larger window than is unpacked here (`zstd --long`); unpack it "
                            f"with `zstd -d --long=31 {path.name}`, or pack it without --long",
                            UNREADABLE_FILE,
                            _size_or_zero(path),
                            is_row=False,
                        ) from error
                    raise BadInputError(
                        f"{path} is not a sound zstd file: {error}", BROKEN_FILE, is_row=False
                    ) from error
                if chunk:
                    yield chunk
                data = b""
                if frame.eof:
                    data = frame.unused_data
                    frame = None
        if frame is not None:
            raise BadInputError(
                f"{path} is truncated: the zstd frame breaks off; get the file again", BROKEN_FILE, is_row=False
            )


def _scan_parquet(path: Path, part: Part | None, limit: int) -> Iterator[_Object | BadInputError]:
    number = 0
    before = (part.before or 0) if part else 0
    try:
        with open_parquet(path) as file:
            columns = _parquet_columns(path, file.schema_arrow)
            for group in range(part.start, part.stop) if part else range(file.num_row_groups):
                try:
                    for batch in parquet_batches(path, file, group, columns):
                        for index in range(batch.num_rows):
                            number += 1
                            yield _parquet_row(batch, index, Location(path, number, "row", before), limit)
                except LargePagesError as error:  # before its first row
                    number += file.metadata.row_group(group).num_rows
                    yield BadInputError(str(error), LARGE_PAGES, error.bytes, is_row=False)
    except (pa.ArrowException, BrokenPageError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise BadInputError(
            f"{path} is not a sound parquet file (after row {before + number:,}): {error}",
            BROKEN_FILE,
            0 if number else _size_or_zero(path),
            is_row=False,
        ) from error


def _parquet_row(batch: pa.RecordBatch, index: int, location: Location, limit: int) -> _Object | BadInputError:
    # Bytes of a row: for a batch of one row `nbytes` looks at offsets only, and copies nothing.
    size = batch.slice(index, 1).nbytes
    if size > limit:
        return BadInputError(
            f"{location} has more than {limit:,} bytes; cut the document up",
            TOO_LARGE,
            size,
        )
    try:
        return _Object(location, {name: batch.column(name)[index].as_py() for name in batch.schema.names}, size)
    except UnicodeDecodeError as error:
        return BadInputError(f"{location}: invalid UTF-8: {error.reason}", INVALID_UTF8, size)


def _parquet_columns(path: Path, schema: pa.Schema) -> list[str]:
    size = _size_or_zero(path)
    columns = [name for name in FIELDS if name in schema.names]
    if not columns:
        present = ", ".join(f"`{name}`" for name in schema.names[:8]) or "none"
        raise BadInputError(
            f"{path}: the column `text` or `conversations` is missing (columns there: {present})",
            WRONG_COLUMNS,
            size,
            is_row=False,
        )
    for name in columns:
        if schema.names.count(name) > 1:
            raise BadInputError(f"{path}: several columns are called `{name}`", WRONG_COLUMNS, size, is_row=False)
        type_ = schema.field(name).type
        of_strings = pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_null(type_)
        of_lists = pa.types.is_list(type_) or pa.types.is_large_list(type_)
        if not (of_strings if name in ("text", "prompt") else of_lists):
            wanted = "strings" if name in ("text", "prompt") else "lists of turns"
            raise BadInputError(
                f"{path}: the column `{name}` holds {type_}, not {wanted}", WRONG_COLUMNS, size, is_row=False
            )
    return columns
