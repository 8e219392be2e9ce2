"""What lies beside every result of the data path: manifests, token accounting, and directories that appear whole.

Three kinds of directory are made, and each says what it is in one JSON file:

- `raw/NAME/source.json` (`RawSource`): the files of a source, downloaded or the user's own;
- `tokenized/NAME/manifest.json` and `pretrain/manifest.json` (`Manifest`): settings, tokenizer, inputs, files with
  their sizes and hashes, and the token accounting.

`atomic_directory` writes a directory beside its place and renames it when it is whole; `resumable_directory` does so
too, but keeps what an interrupted run has finished. A lock keeps a second process from making the same one meanwhile.
`scratch_directory` is for what only one run needs, while it lasts.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from doge_lm.errors import UserError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SOURCE_NAME = "source.json"
RAW_FOLDER = "raw"
DEDUPLICATED_SUFFIX = "-dedup"
"""What near_duplicates puts behind the name of a source of which it keeps one of near duplicates."""
TOKENIZED_FOLDER = "tokenized"

Kind = Literal["pretrain", "finetune"]
KINDS: tuple[Kind, ...] = ("pretrain", "finetune")
_SHOWN_WITHOUT_ROWS = 3

_Record = TypeVar("_Record")


class AccountingError(RuntimeError):
    """The tokens that went in are not the tokens that came out: a bug in this package, never the user's fault."""


# ---------------------------------------------------------------------------------------------------------------
# Token accounting
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Dropped:
    """What was left out for one reason. `times` counts documents, turns or pieces, whichever the reason is about.

    `example` says of bad input that was skipped where the first of it stands; it is empty for everything else.
    """

    times: int = 0
    bytes: int = 0
    tokens: int = 0
    example: str = ""


@dataclass
class SampleCounts:
    """What lies in written rows, counted from the rows themselves."""

    samples: int = 0
    tokens: int = 0  # real tokens: everything but padding
    pieces: int = 0  # documents, or parts of documents that were cut
    targets: int = 0
    context: int = 0
    padding: int = 0
    text_bytes: int = 0

    def add(self, other: "SampleCounts") -> None:
        """Adds another count to this one."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))


@dataclass
class SourceAccounting:
    """The token accounting of one source, from the documents' side.

    Every token of a document is a target, the first token of its document, context, or dropped. `overlap` counts
    the tokens that stand twice (the first token of a piece that continues a document), which is why rows hold more
    tokens than documents do. Bytes are UTF-8 bytes of the documents' words; `joiner_bytes` were added between
    turns that had to be joined. `documents_dropped` are the documents of which nothing was kept; what could not be
    read, or was sorted out before it was tokenized, counts no tokens, and as it stands in its file if it could not be
    read: its bytes are those of the line.
    """

    documents_in: int = 0
    documents_kept: int = 0
    documents_dropped: int = 0
    documents_cut: int = 0
    bytes_in: int = 0
    joiner_bytes: int = 0
    bytes_trained: int = 0
    bytes_context: int = 0
    tokens_in: int = 0
    targets: int = 0
    first_tokens: int = 0
    context: int = 0
    overlap: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, *, times: int = 0, bytes_: int = 0, tokens: int = 0, example: str = "") -> None:
        """Counts something that was left out; the first example of a reason is kept."""
        entry = self.dropped.setdefault(reason, Dropped())
        entry.times += times
        entry.bytes += bytes_
        entry.tokens += tokens
        entry.example = entry.example or example

    def leave_out(self, reason: str, bytes_: int, *, is_document: bool = True, example: str = "") -> None:
        """Counts input that never came to the tokenizer: a document, or else (the rest of) a file."""
        self.drop(reason, times=1, bytes_=bytes_, example=example)
        self.bytes_in += bytes_
        self.documents_in += is_document
        self.documents_dropped += is_document

    def repair(self, reason: str, times: int = 1) -> None:
        """Counts something irregular that was kept, in a mended form."""
        if times:
            self.repaired[reason] = self.repaired.get(reason, 0) + times

    def add(self, other: "SourceAccounting") -> None:
        """Adds another account to this one."""
        for entry in fields(self):
            if entry.name not in ("dropped", "repaired"):
                setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        for reason, count in other.dropped.items():
            self.drop(reason, times=count.times, bytes_=count.bytes, tokens=count.tokens, example=count.example)
        for reason, times in other.repaired.items():
            self.repair(reason, times)

    def check(self, name: str, rows: SampleCounts) -> None:
        """Checks that everything that went in came out, or was counted as dropped.

        Args:
            name: the source, for the message.
            rows: what was counted in the rows that were written.

        Raises:
            AccountingError: if any sum does not add up.
        """
        dropped_tokens = sum(entry.tokens for entry in self.dropped.values())
        dropped_bytes = sum(entry.bytes for entry in self.dropped.values())
        kept = self.targets + self.first_tokens + self.context
        sums = {
            "documents in = kept + dropped": (self.documents_in, self.documents_kept + self.documents_dropped),
            "tokens in = targets + first tokens + context + dropped": (self.tokens_in, kept + dropped_tokens),
            "bytes in + joiners = trained + context + dropped": (
                self.bytes_in + self.joiner_bytes,
                self.bytes_trained + self.bytes_context + dropped_bytes,
            ),
            "tokens in rows = targets + first tokens + context + overlap": (rows.tokens, kept + self.overlap),
            "targets in rows": (rows.targets, self.targets),
            "context in rows": (rows.context, self.context),
            "pieces in rows = first tokens + overlap": (rows.pieces, self.first_tokens + self.overlap),
            "text bytes in rows = bytes trained": (rows.text_bytes, self.bytes_trained),
        }
        check_sums(name, sums)


def check_sums(name: str, sums: dict[str, tuple[int, int]]) -> None:
    """Raises `AccountingError` if the two numbers of any pair differ."""
    wrong = [f"{what}: {left} and {right}" for what, (left, right) in sums.items() if left != right]
    if wrong:
        raise AccountingError(f"the token accounting of {name} does not add up: " + "; ".join(wrong))


def accounting_table(accounts: dict[str, SourceAccounting], rows: dict[str, SampleCounts]) -> str:
    """The accounting of some sources as a table of plain text, one column a source, then what was dropped and mended.

    Args:
        accounts: source name -> its account.
        rows: source name -> what was counted in its rows.
    """
    lines: list[tuple[str, Callable[[str], int]]] = [
        ("documents in", lambda name: accounts[name].documents_in),
        ("  kept", lambda name: accounts[name].documents_kept),
        ("  dropped", lambda name: accounts[name].documents_dropped),
        ("  cut (longer than a sample)", lambda name: accounts[name].documents_cut),
        ("bad input (rows, rests of files; times)", lambda name: bad[name]),
        ("bytes in", lambda name: accounts[name].bytes_in),
        ("tokens in", lambda name: accounts[name].tokens_in),
        ("= targets", lambda name: accounts[name].targets),
        ("+ first tokens of documents", lambda name: accounts[name].first_tokens),
        ("+ context (prompts, the human's turns)", lambda name: accounts[name].context),
        ("+ dropped", lambda name: sum(entry.tokens for entry in accounts[name].dropped.values())),
        ("samples", lambda name: rows[name].samples),
        ("  overlap tokens", lambda name: accounts[name].overlap),
        ("  padding", lambda name: rows[name].padding),
    ]
    names = list(accounts)
    bad = {name: sum(entry.times for entry in accounts[name].dropped.values() if entry.example) for name in names}
    label_width = max(len(label) for label, _ in lines)
    widths = [max(len(name), *(len(f"{value(name):,}") for _, value in lines)) for name in names]
    table = [" " * label_width + "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True))]
    for label, value in lines:
        cells = "".join(f"  {value(name):>{width},}" for name, width in zip(names, widths, strict=True))
        table.append(f"{label:<{label_width}}{cells}")
    return "\n".join([*table, *(line for name in names for line in irregular_lines(name, accounts[name]))])


def irregular_lines(name: str, account: SourceAccounting) -> list[str]:
    """What was dropped of a source and what was mended, a line for each reason and its first example."""
    lines = []
    for reason, entry in sorted(account.dropped.items()):
        # What was left out before it came to the tokenizer has tokens too, but nobody knows how many.
        tokens = f"{entry.tokens:,}" if entry.tokens else "–"
        lines.append(f"{name}: dropped, {reason}: {entry.times:,} times, {entry.bytes:,} bytes, {tokens} tokens")
        if entry.example:
            lines.append(f"  the first: {entry.example}")
    return [*lines, *(f"{name}: kept, {reason}: {times:,} times" for reason, times in sorted(account.repaired.items()))]


# ---------------------------------------------------------------------------------------------------------------
# The manifest and the description of a raw source
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class TokenizerIdentity:
    """Which tokenizer made the ids, and the ids that the training needs."""

    sha256: str
    vocab_size: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int


@dataclass
class InputFile:
    """A file that was read. `path` is absolute, or relative to the directory that names it; `sha256` may be empty.

    `state` is what `file_state` says of an input that is too large to be hashed before anything else; else empty.
    """

    path: str
    bytes: int
    sha256: str = ""
    state: str = ""


@dataclass
class OutputFile:
    """An arrow file that was written. `path` is relative to the manifest, with forward slashes."""

    path: str
    bytes: int
    rows: int
    sha256: str


@dataclass
class Manifest:
    """How a tokenized source or a merged set was made, and what is in it.

    `samples` maps a split (`all` for a tokenized source; `train`, `test` for a merged set) to sources to counts.
    `repeated_documents` is the number of documents that occur more than once in a merged set. `settings` bear the names
    of their flags. `versions` are those of the packages, and what else the rows do not depend on. `files_without_rows`
    are inputs that could be read and hold nothing.
    """

    stage: Literal["tokenized", "merged"]
    name: str
    kind: Kind
    sequence_length: int
    tokenizer: TokenizerIdentity
    settings: dict[str, Any]
    inputs: list[InputFile]
    files: list[OutputFile]
    accounting: dict[str, SourceAccounting]
    samples: dict[str, dict[str, SampleCounts]]
    versions: dict[str, str] = field(default_factory=dict)
    repeated_documents: int = 0
    files_without_rows: list[str] = field(default_factory=list)

    def split_counts(self, split: str) -> SampleCounts:
        """The counts of one split, summed over its sources."""
        total = SampleCounts()
        for counts in self.samples[split].values():
            total.add(counts)
        return total

    def identity(self) -> "Identity":
        """What the result was made from; see `make_identity`."""
        return make_identity(self.kind, self.sequence_length, self.tokenizer, self.settings, self.inputs)

    def write(self, directory: Path) -> None:
        """Writes `manifest.json` into a directory, whole or not at all."""
        _write_json(directory / MANIFEST_NAME, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads `manifest.json` of a directory.

        Raises:
            UserError: if it is missing, is not JSON, is of another format version, or lacks a field.
        """
        path = directory / MANIFEST_NAME
        raw = _read_json(path)
        return _build(path, lambda: _manifest_from_json(raw))


@dataclass
class RawSource:
    """A source before tokenizing: `source.json`.

    `revision` is the hub's commit, and `settings` what it was downloaded with; both are empty for the user's own files.
    """

    name: str
    kind: Kind
    origin: str
    licence: str
    files: list[InputFile]
    counts: dict[str, int] = field(default_factory=dict)
    revision: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Writes `source.json` into a directory."""
        _write_json(directory / SOURCE_NAME, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "RawSource":
        """Reads `source.json` of a directory.

        Raises:
            UserError: if it is missing, is not JSON, is of another format version, or lacks a field.
        """
        path = directory / SOURCE_NAME
        raw = _read_json(path)
        return _build(path, lambda: _raw_source_from_json(raw))

    def paths(self, directory: Path) -> list[Path]:
        """The source's files, in the order in which they are read.

        Raises:
            UserError: if a file is missing, or has another size than when it was taken in.
        """
        found = []
        for entry in self.files:
            path = directory / entry.path  # an absolute path stays as it is
            if not path.is_file():
                raise UserError(
                    f"{path} of the source {self.name!r} is missing; run `doge-lm download_datasets` for it again"
                )
            size = path.stat().st_size
            if size != entry.bytes:
                raise UserError(
                    f"{path} of the source {self.name!r} has {size:,} bytes, but had {entry.bytes:,} when it was taken "
                    "in; run `doge-lm download_datasets` for it again"
                )
            found.append(path)
        return found


def without_rows(paths: Sequence[str]) -> str:
    """Says that some files of a source hold nothing, and names the first of them."""
    shown = ", ".join([*paths[:_SHOWN_WITHOUT_ROWS], *("…" for _ in paths[_SHOWN_WITHOUT_ROWS:][:1])])
    return f"{len(paths):,} of its files {'holds' if len(paths) == 1 else 'hold'} no row: {shown}"


def check_name(directory: Path, name: str) -> None:
    """Checks that a source's directory bears its name, so that no two sources have the same one.

    Raises:
        UserError: if it does not.
    """
    if directory.name != name:
        raise UserError(f"{directory} holds the source {name!r}; name the directory {name!r}, or make it again")


def package_versions(
    names: Iterable[str] = ("doge-lm", "datasets", "numpy", "pyarrow", "tokenizers"),
) -> dict[str, str]:
    """The versions of Python and of packages that a result may depend on."""
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _manifest_from_json(raw: dict[str, Any]) -> Manifest:
    if raw["stage"] not in ("tokenized", "merged"):
        raise ValueError(f"stage {raw['stage']!r}")
    values = dict(raw)
    values["kind"] = _kind(raw["kind"])
    values["tokenizer"] = TokenizerIdentity(**raw["tokenizer"])
    values["inputs"] = [InputFile(**entry) for entry in raw["inputs"]]
    values["files"] = [OutputFile(**entry) for entry in raw["files"]]
    values["accounting"] = {name: accounting_from_json(entry) for name, entry in raw["accounting"].items()}
    values["samples"] = {
        split: {name: SampleCounts(**entry) for name, entry in sources.items()}
        for split, sources in raw["samples"].items()
    }
    return Manifest(**values)


def _raw_source_from_json(raw: dict[str, Any]) -> RawSource:
    values = dict(raw)
    values["kind"] = _kind(raw["kind"])
    values["files"] = [InputFile(**entry) for entry in raw["files"]]
    return RawSource(**values)


def accounting_from_json(raw: dict[str, Any]) -> SourceAccounting:
    """The account that `dataclasses.asdict` made into plain values."""
    values = dict(raw)
    values["dropped"] = {reason: Dropped(**entry) for reason, entry in raw["dropped"].items()}
    return SourceAccounting(**values)


def _kind(value: str) -> Kind:
    for kind in KINDS:
        if value == kind:
            return kind
    raise ValueError(f"kind {value!r}")


def _build(path: Path, make: Callable[[], _Record]) -> _Record:
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not a description that doge-lm wrote ({error}); make the directory again"
        ) from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    document = {"format": "doge-lm", "format_version": FORMAT_VERSION, **values}
    write_text(path, json.dumps(document, ensure_ascii=False, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_why_missing(path)) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); make the directory again") from error
    if not isinstance(document, dict) or document.pop("format", None) != "doge-lm":
        raise UserError(f"{path} was not written by doge-lm")
    version = document.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this doge-lm reads version {FORMAT_VERSION}; make the directory "
            "again with this version"
        )
    return document


def _why_missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.is_file() else f"no such directory as {folder}"
        return f"{path} does not exist: {what}; check the path"
    if folder.name.startswith(_PARTIAL_PREFIX):
        return (
            f"{folder} is of a run that has not finished, so it has no {path.name}; give the same command again to go "
            "on with it"
        )
    return f"{path} does not exist, so {folder} was not made by doge-lm"


# ---------------------------------------------------------------------------------------------------------------
# What a directory was made from
# ---------------------------------------------------------------------------------------------------------------

Identity = dict[str, Any]
"""What a result depends on (settings, tokenizer, inputs): JSON values under the names that a user knows them by."""


# The content of inputs is part of the identity only up to this size in all: it must be read before anything else.
MAX_IDENTITY_BYTES = 4 * 2**30
# Of larger inputs, so much of each end is.
HASHED_END_BYTES = 2**16


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_ends(file: BinaryIO, size: int, digest: "hashlib._Hash") -> None:
    """Takes the two ends of an open file of a size into a digest, for what is too large to be read whole."""
    digest.update(file.read(HASHED_END_BYTES))
    file.seek(max(0, size - HASHED_END_BYTES))
    digest.update(file.read(HASHED_END_BYTES))


def file_state(path: Path) -> str:
    """What tells a large file from a changed one without reading all of it: when it was written, and its two ends.

    Empty for a file that cannot be read: whoever reads it will say what is wrong.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            hash_ends(file, found.st_size, digest)
    except OSError:
        return ""
    return f"written {found.st_mtime_ns} ns, ends {digest.hexdigest()[:16]}"


def check_taken_in(source: str, path: str, found: str, expected: str) -> None:
    """Checks that an input is what `download_datasets` took in, by its sha256 now and then (empty if not taken).

    Raises:
        UserError: if it is not.
    """
    if expected and found != expected:
        raise UserError(
            f"{path} of the source {source!r} is not what was taken in: its sha256 is {found[:12]}..., it was "
            f"{expected[:12]}...; run `doge-lm download_datasets` for it again"
        )


def make_identity(
    kind: Kind,
    sequence_length: int,
    tokenizer: TokenizerIdentity,
    settings: dict[str, Any],
    inputs: Sequence[InputFile],
) -> Identity:
    """What a result depends on, under the names of the flags; inputs as `path: [bytes, sha256]`.

    Where inputs have more than `MAX_IDENTITY_BYTES` in all, their `state` stands in place of the sha256.
    """
    small = sum(file.bytes for file in inputs) <= MAX_IDENTITY_BYTES
    return {
        "kind": kind,
        "tokenizer": tokenizer.sha256,
        "max_len": sequence_length,
        **settings,
        "inputs": {file.path: [file.bytes, file.sha256 if small else file.state] for file in inputs},
    }


def first_difference(before: Identity, now: Identity, prefix: str = "") -> str | None:
    """The first entry in which two identities differ, as `name: was X, is Y`; None if they are equal."""
    for name in dict.fromkeys([*now, *before]):
        one, two = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            found = first_difference(one, two, f"{prefix}{name} ")
            if found is not None:
                return found
        elif one != two:
            return f"{prefix}{name}: was {_shown(one)}, is {_shown(two)}"
    return None


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)


def is_made(target: Path, now: Identity, before: Callable[[Path], Identity], *, overwrite: bool) -> bool:
    """Whether a finished directory is there already, made from the same.

    Args:
        target: the finished directory's place.
        now: what it would be made from.
        before: reads what a finished directory was made from.
        overwrite: make it again, whatever it was made from.

    Raises:
        UserError: if it was made from something else, naming the first difference, unless `overwrite`.
    """
    _refuse_foreign(target)
    # A run that was killed right after it had put the directory in its place has left this. Else nothing is removed:
    # a finished directory may lie where nothing can be written.
    left = target / _IDENTITY_NAME
    if left.is_file():
        with explain_disk_errors(target):
            left.unlink(missing_ok=True)
    if overwrite or not target.is_dir() or not any(target.iterdir()):
        return False
    difference = first_difference(before(target), now)
    if difference is not None:
        raise UserError(
            f"{target} was made with other settings ({difference}); give the same settings again, choose another "
            "--save_dir, or make it anew with --overwrite"
        )
    return True


def made_already(target: Path) -> str:
    """What to say of a finished directory that `is_made`, and of what other runs left or are making beside it."""
    said = f"{target} is made already, with the same settings; --overwrite makes it anew"
    partial = partial_directory(target)
    if not partial.is_dir():
        return said
    lock = _try_lock(target)
    if lock is None:
        return f"{said}; another process is doing that at this moment"
    _unlock(lock)
    return (
        f"{said}\n{partial} was left by an interrupted run: give its settings and --overwrite to go on with it, or "
        "remove the directory"
    )


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Writes a small JSON file so that it is there whole or not at all, and survives a loss of power."""
    write_text(path, json.dumps(values, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, and survives a loss of power."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote, or None if there is no such file or it is not whole."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None


# ---------------------------------------------------------------------------------------------------------------
# Directories that appear whole or not at all
# ---------------------------------------------------------------------------------------------------------------

_IDENTITY_NAME = "identity.json"
_PARTIAL_PREFIX = ".tmp-"
# What a killed run was writing; thrown away by the next one.
PART_SUFFIX = ".part"

FULL_DISK = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


def partial_directory(target: Path) -> Path:
    """Where a directory is made until it is whole: `.tmp-NAME` beside it."""
    return target.with_name(f"{_PARTIAL_PREFIX}{target.name}")


@contextlib.contextmanager
def atomic_directory(target: Path, *, mark: str = MANIFEST_NAME, flag: str = "--save_dir") -> Iterator[Path]:
    """A directory that takes its place only when the block ends without an exception.

    The block writes into the yielded directory `.tmp-NAME`, a sibling of the target. What an interrupted run left
    there is removed first. While the block runs, `.tmp-NAME.lock` beside it is locked: of two runs that make the same
    target at once, the second ends with an error. An existing target is replaced if it is empty or one of ours (it
    holds the mark: `manifest.json` or `source.json`, if no other is given).

    Args:
        target: where the finished directory belongs.
        mark: the file by which a directory is known to be ours.
        flag: what chooses the target, for messages.

    Yields:
        The directory to write into.

    Raises:
        UserError: if the target is something that doge-lm did not make, another process is making it, the disk is
            full, or it cannot be written.
    """
    _refuse_foreign(target, mark)
    temporary = partial_directory(target)
    with explain_disk_errors(target, flag):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, flag):
            try:
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir()
                yield temporary
                _put_in_place(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


@contextlib.contextmanager
def resumable_directory(target: Path, identity: Identity, *, overwrite: bool) -> Iterator[Path]:
    """As `atomic_directory`, but an interrupted run's `.tmp-NAME` is kept and handed to the next run.

    It holds `identity.json` meanwhile. Who writes into it must put every file in place whole (under another name with
    `PART_SUFFIX` first, and then renamed), and say by a record (`write_record`, a name with `.json`) what is
    finished. A directory without a record is not worth keeping, and is removed when the block ends with an exception.

    Args:
        target: where the finished directory belongs.
        identity: what it is made from; an interrupted run's directory is gone on with only if this is the same.
        overwrite: throw an interrupted run's directory away if it was made from something else.

    Yields:
        The directory to write into.

    Raises:
        UserError: as `atomic_directory`, and if an interrupted run began with something else, unless `overwrite`.
    """
    _refuse_foreign(target)
    temporary = partial_directory(target)
    with explain_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _take_over(temporary, identity, overwrite=overwrite)
            try:
                yield temporary
            except BaseException:
                if not _has_records(temporary):
                    shutil.rmtree(temporary, ignore_errors=True)
                raise
            _put_in_place(temporary, target)
            # Only now: a run that is killed before the renaming must find its directory again.
            (target / _IDENTITY_NAME).unlink()


def _take_over(temporary: Path, identity: Identity, *, overwrite: bool) -> None:
    """Makes a partial directory ready: goes on with the one that is there, or begins anew."""
    if temporary.exists():
        before = read_record(temporary / _IDENTITY_NAME)
        difference = None if before is None else first_difference(before, json.loads(json.dumps(identity)))
        if difference is not None and not overwrite and _has_records(temporary):
            raise UserError(
                f"{temporary} is of an interrupted run with other settings ({difference}); give the same settings to "
                "go on with it, or throw it away with --overwrite"
            )
        if before is not None and difference is None:
            for path in temporary.rglob(f"*{PART_SUFFIX}"):
                path.unlink()
            return
        shutil.rmtree(temporary)
    temporary.mkdir()
    write_record(temporary / _IDENTITY_NAME, identity)


def _has_records(temporary: Path) -> bool:
    return any(path.name != _IDENTITY_NAME for path in temporary.rglob("*.json"))


@contextlib.contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """An empty directory for one run alone, `.tmp-NAME-NUMBER`; it is removed when the block ends.

    Runs that work at once have a number each. What killed runs left is removed first; the lock of a run that is alive
    tells its directory from those.

    Args:
        target: its folder, and NAME.

    Yields:
        The directory to write into.

    Raises:
        UserError: if its folder would lie in a file, the disk is full, or it cannot be written.
    """
    _refuse_in_a_file(target)
    with explain_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        there = {path.name.removesuffix(".lock") for path in target.parent.glob(f".tmp-{target.name}-[0-9]*")}
        for left in (target.with_name(name.removeprefix(".tmp-")) for name in sorted(there)):
            if (lock := _try_lock(left)) is not None:
                shutil.rmtree(partial_directory(left), ignore_errors=True)
                _unlock(lock)
        number = 0
        while (held := _try_lock(own := target.with_name(f"{target.name}-{number}"))) is None:
            number += 1
    temporary = partial_directory(own)
    try:
        with explain_disk_errors(target):
            temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(held)


@contextlib.contextmanager
def _locked(target: Path, flag: str = "--save_dir") -> Iterator[None]:
    """Holds the lock of a target; the operating system lets go of it if the process is killed."""
    lock = _try_lock(target)
    if lock is None:
        raise UserError(
            f"another process is writing {target} at this moment; wait until it has ended, or choose another {flag}"
        )
    try:
        yield
    finally:
        _unlock(lock)


def _try_lock(target: Path) -> BaseFileLock | None:
    """The lock of a target, or None if another process has it."""
    lock = FileLock(target.with_name(f".tmp-{target.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _unlock(lock: BaseFileLock) -> None:
    # Removed while it is held: filelock does not give out a lock on a file that is no longer there, so nobody who has
    # it open already can hold it beside a third one. Windows removes no open file; there the release does.
    with contextlib.suppress(PermissionError, FileNotFoundError):
        os.unlink(lock.lock_file)
    lock.release()


def _refuse_in_a_file(target: Path) -> None:
    for place in target.parents:
        if place.is_dir():
            return
        if os.path.lexists(place):
            raise UserError(
                f"{target} cannot be made: {place} is not a directory; choose another --save_dir, or move {place}"
            )


def _refuse_foreign(target: Path, mark: str = MANIFEST_NAME) -> None:
    _refuse_in_a_file(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, but a directory has to be written there; move it or choose another place")
    marks = (mark,) if mark != MANIFEST_NAME else (MANIFEST_NAME, SOURCE_NAME)
    if not any((target / name).is_file() for name in marks) and any(target.iterdir()):
        raise UserError(
            f"{target} exists and was not made by doge-lm (no {' or '.join(marks)} in it); it is not overwritten: move "
            "it or choose another place"
        )


@contextlib.contextmanager
def explain_disk_errors(target: Path, flag: str = "--save_dir") -> Iterator[None]:
    """Turns what the operating system says of a full or locked disk into a `UserError` that names the target.

    Raises:
        UserError: in place of an `OSError` that the user can mend.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise UserError(
                f"the disk is full ({error}): {target} could not be finished, and nothing half written was put there; "
                f"free some space and run the same command again, or choose another {flag}"
            ) from error
        if error.errno in _NOT_WRITABLE and _lies_under(error.filename, target.parent):
            # Permissions do not help where the whole disk can only be read.
            mend = "" if error.errno == errno.EROFS else ", or change the permissions"
            raise UserError(
                f"{target} cannot be written ({error.strerror}: {error.filename}); choose another {flag}{mend}"
            ) from error
        raise


def _lies_under(filename: object, folder: Path) -> bool:
    if not isinstance(filename, str | os.PathLike):
        return False
    path = Path(os.path.abspath(filename))
    top = Path(os.path.abspath(folder))
    return path.is_relative_to(top) or top.is_relative_to(path)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Renames; a directory cannot be renamed onto a full one, so the old one steps aside and comes back on failure."""
    aside = target.with_name(f".tmp-old-{target.name}")
    if aside.exists():  # of a run that was killed between the two renamings
        shutil.rmtree(aside)
    if not target.exists():
        temporary.rename(target)
        return
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)
