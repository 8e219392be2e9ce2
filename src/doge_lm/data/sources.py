r"""Where text comes from: the catalogue of public sources, and the readers of files.

Files are read as a stream, in bounded memory, whatever their size: `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.parquet`
and `.txt`, or folders of them in sorted order. JSON lines are cut at `\n` only: texts contain U+2028, U+0085 and
form feeds, at which `str.splitlines` would cut too. Every error names the file and the line (or the row).

A row carries either

- `text` and optionally `prompt`: a document for pre-training; or
- `conversations`, a list of `{"from": "human" | "gpt" | "system", "value": ...}`, or `messages`, a list of
  `{"role": "user" | "assistant" | "system", "content": ...}`: a conversation for fine-tuning.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from doge_lm.data.manifest import Kind
from doge_lm.errors import UserError

# A line, or a text file (one document each), above this is refused: it must be held in memory whole.
MAX_DOCUMENT_BYTES = 256 * 2**20
# Compressed data is taken in small bites, since a bite may unpack to many times its size.
_COMPRESSED_CHUNK = 16 * 2**10
_PLAIN_CHUNK = 2**20
_PARQUET_ROWS = 64
_BOM = b"\xef\xbb\xbf"

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


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a file that an error can name; `number` counts from 1."""

    path: Path
    number: int
    unit: Literal["line", "row", "file"]

    def __str__(self) -> str:
        return str(self.path) if self.unit == "file" else f"{self.path}, {self.unit} {self.number:,}"


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
        for location, values in read_objects(path):
            yield location, parse_row(values, location, kind)


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
    raise UserError(f"{location}: the field {wanted} is missing (fields there: {present})")


def _turns(values: dict[str, Any], location: Location) -> tuple[tuple[Role, str], ...]:
    field, role_key, content_key = (
        ("conversations", "from", "value")
        if values.get("conversations") is not None
        else ("messages", "role", "content")
    )
    turns = values[field]
    if not isinstance(turns, list):
        raise UserError(f"{location}: the field `{field}` is {_type_name(turns)}, not a list")
    parsed: list[tuple[Role, str]] = []
    for number, turn in enumerate(turns, start=1):
        where = f"{location}, turn {number} of `{field}`"
        if not isinstance(turn, dict):
            raise UserError(f"{where} is {_type_name(turn)}, not an object")
        role = _ROLES.get(_string(turn, role_key, where))
        if role is None:
            raise UserError(
                f"{where}: unknown speaker {turn[role_key]!r} in `{role_key}`; known are {', '.join(sorted(_ROLES))}"
            )
        parsed.append((role, _string(turn, content_key, where)))
    return tuple(parsed)


def _string(values: dict[str, Any], field: str, where: Location | str) -> str:
    if field not in values:
        present = ", ".join(f"`{name}`" for name in list(values)[:8]) or "none"
        raise UserError(f"{where}: the field `{field}` is missing (fields there: {present})")
    value = values[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: the field `{field}` is {_type_name(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the field `{field}` holds a lone surrogate ({value[error.start]!a}), which is not text"
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
        if _suffix(path) is None:
            raise UserError(f"{path} is of an unknown kind; readable are {', '.join(SUFFIXES)}")
        return [path]
    found = [
        entry
        for entry in path.rglob("*")
        if not any(part.startswith(".") for part in entry.relative_to(path).parts)
        and _suffix(entry) is not None
        and entry.is_file()
    ]
    if not found:
        raise UserError(f"the folder {path} holds no readable file ({', '.join(SUFFIXES)})")
    return sorted(found, key=lambda entry: entry.relative_to(path).parts)


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_objects(path: Path) -> Iterator[tuple[Location, dict[str, Any]]]:
    """Reads the rows of one file as objects, with the place of each.

    A text file is one document, `{"text": ...}`. A byte order mark at the start is skipped, blank lines between
    JSON lines too; CRLF line ends of a text file become LF.

    Raises:
        UserError: as `read_rows`.
    """
    suffix = _suffix(path)
    if suffix is None:
        raise UserError(f"{path} is of an unknown kind; readable are {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix == ".txt":
            yield _read_text(path)
        else:
            yield from _read_json_lines(path, _chunks(path, suffix))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read_text(path: Path) -> tuple[Location, dict[str, Any]]:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{path} has more than {MAX_DOCUMENT_BYTES:,} bytes; a .txt file is one document: cut it into several, or "
            "write it as .jsonl with one document a line"
        )
    location = Location(path, 1, "file")
    text = _decode(path.read_bytes().removeprefix(_BOM), location)
    return location, {"text": text.replace("\r\n", "\n")}


def _read_json_lines(path: Path, chunks: Iterator[bytes]) -> Iterator[tuple[Location, dict[str, Any]]]:
    for number, line in enumerate(_split_lines(path, chunks), start=1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if not content or content.isspace():
            continue
        location = Location(path, number, "line")
        yield location, _parse_json(content, location)


def _parse_json(line: bytes, location: Location) -> dict[str, Any]:
    try:
        values = json.loads(_decode(line, location))
    except json.JSONDecodeError as error:
        raise UserError(f"{location}: invalid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise UserError(f"{location}: JSON that cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{location}: a row must be an object, this is {_type_name(values)}")
    return values


def _decode(data: bytes, location: Location) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: invalid UTF-8 at byte {error.start + 1:,}: {error.reason}") from error


def _split_lines(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    r"""Cuts a stream of bytes at `\n`. Each byte is looked at once, however long a line is."""
    pending: list[bytes] = []
    pending_bytes = 0
    number = 1
    for chunk in chunks:
        lines = chunk.split(b"\n")
        pending.append(lines[0])
        pending_bytes += len(lines[0])
        if pending_bytes > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{path}, line {number:,} has more than {MAX_DOCUMENT_BYTES:,} bytes; cut the document into several"
            )
        if len(lines) == 1:
            continue
        yield b"".join(pending)
        yield from lines[1:-1]
        number += len(lines) - 1
        pending = [lines[-1]]
        pending_bytes = len(lines[-1])
    last = b"".join(pending)
    if last:
        yield last


def _chunks(path: Path, suffix: str) -> Iterator[bytes]:
    if suffix.endswith(".zst"):
        return _zst_chunks(path)
    if suffix.endswith(".gz"):
        return _gz_chunks(path)
    return _plain_chunks(path)


def _plain_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_PLAIN_CHUNK):
            yield chunk


def _gz_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while True:
            try:
                chunk = file.read(_PLAIN_CHUNK)
            except EOFError as error:
                raise UserError(f"{path} is truncated: the gzip stream breaks off; get the file again") from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{path} is not a sound gzip file: {error}") from error
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
                    raise UserError(f"{path} is not a sound zstd file: {error}") from error
                if chunk:
                    yield chunk
                data = b""
                if frame.eof:
                    data = frame.unused_data
                    frame = None
        if frame is not None:
            raise UserError(f"{path} is truncated: the zstd frame breaks off; get the file again")


def _read_parquet(path: Path) -> Iterator[tuple[Location, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = _parquet_columns(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Location(path, number, "row"), values
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number:,}: invalid UTF-8: {error.reason}") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UserError(f"{path} is not a sound parquet file (after row {number:,}): {error}") from error


def _parquet_columns(path: Path, schema: pa.Schema) -> list[str]:
    columns = [name for name in FIELDS if name in schema.names]
    if not columns:
        present = ", ".join(f"`{name}`" for name in schema.names[:8]) or "none"
        raise UserError(f"{path}: the column `text` or `conversations` is missing (columns there: {present})")
    for name in columns:
        type_ = schema.field(name).type
        of_strings = pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_null(type_)
        of_lists = pa.types.is_list(type_) or pa.types.is_large_list(type_)
        if not (of_strings if name in ("text", "prompt") else of_lists):
            wanted = "strings" if name in ("text", "prompt") else "lists of turns"
            raise UserError(f"{path}: the column `{name}` holds {type_}, not {wanted}")
    return columns
