"""Leaving rows out before they are tokenized: by length, by language, by overlap with benchmarks, and exact duplicates.

`Cleaner` says of one row at a time why it is to be left out; every process has its own. Duplicates need two passes over
a source: the first hashes the rows of every unit (`hash_rows`, `write_hashes`), `mark_duplicates` finds, out of core,
the rows of which an equal one stands before, and the second pass leaves those out (`load_drops`).

Overlap with a benchmark means that a row shares one n-gram with it (`doge_lm.data.ngrams`): 13 words in a row, or 20
characters in a row in scripts that put no spaces between words.
"""

import argparse
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from doge_lm.data.manifest import DEDUPLICATED_SUFFIX, read_record, write_record
from doge_lm.data.ngrams import NGRAM_RULE, Hashes, NgramIndex, benchmark_sha256
from doge_lm.data.sources import Row, TextRow, row_texts
from doge_lm.errors import UserError

# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CleaningSettings:
    """Which rows are left out.

    Attributes:
        min_characters: rows with fewer characters are left out. Of a text its prompt does not count, of a
            conversation all turns do.
        max_characters: rows with more characters are left out; 0 is no limit.
        languages: codes of the languages to keep (`en`), for all sources, or `NAME=en,zh` for one; empty keeps all.
        decontaminate: benchmark files, JSON lines, with which no row may share an n-gram.
        deduplicate: of rows that are equal, keep the first of the source.
        ngram_words: length of an n-gram in words.
        ngram_characters: length of an n-gram in characters, in scripts without spaces.
    """

    min_characters: int = 0
    max_characters: int = 0
    languages: tuple[str, ...] = ()
    decontaminate: tuple[Path, ...] = ()
    deduplicate: bool = False
    ngram_words: int = 13
    ngram_characters: int = 20

    @property
    def active(self) -> bool:
        """Whether any row at all may be left out."""
        return self.filtering or self.deduplicate

    @property
    def filtering(self) -> bool:
        """Whether a `Cleaner` has anything to do: any setting but `deduplicate`."""
        return bool(self.min_characters or self.max_characters or self.languages or self.decontaminate)

    def for_source(self, name: str) -> "CleaningSettings":
        """The settings as they hold for one source: `languages` are codes alone."""
        named = [
            entry.partition("=")[2] for entry in self.languages if entry.partition("=")[0] == name and "=" in entry
        ]
        if named:
            codes = [code for entry in named for code in entry.split(",")]
        else:
            codes = [entry for entry in self.languages if "=" not in entry]
        return replace(self, languages=tuple(dict.fromkeys(codes)))

    def identity(self) -> dict[str, Any]:
        """What the result depends on, by the names of the flags; benchmark files with their sha256.

        Raises:
            UserError: if a benchmark file is missing.
        """
        if not self.active:
            return {}
        return {
            "min_chars": self.min_characters,
            "max_chars": self.max_characters,
            "languages": sorted(self.languages),
            "decontaminate": {path.name: benchmark_sha256(path) for path in sorted(self.decontaminate)},
            "ngram_rule": NGRAM_RULE if self.decontaminate else None,
            "ngram_words": self.ngram_words,
            "ngram_chars": self.ngram_characters,
            "deduplicate": self.deduplicate,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `settings_from_args` reads."""
    group = parser.add_argument_group("cleaning", "rows that are left out, each counted in the accounting as dropped")
    group.add_argument(
        "--min_chars",
        type=int,
        default=0,
        metavar="N",
        help="leave out texts (without their prompts) and conversations of fewer characters",
    )
    group.add_argument("--max_chars", type=int, default=0, metavar="N", help="leave out those of more characters")
    group.add_argument(
        "--languages",
        nargs="+",
        default=[],
        metavar="CODE",
        help="keep only rows in these languages (`en zh`), or of one source (`NAME=en,zh`); what is given for a source "
        "replaces what is given for all. Program code is no language: leave such sources out. Needs the extra `clean`",
    )
    group.add_argument(
        "--decontaminate",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="leave out rows that share an n-gram with these benchmark files (.jsonl, .jsonl.gz, .jsonl.zst; all "
        "their strings count; n-grams mostly of numbers do not)",
    )
    group.add_argument("--ngram_words", type=int, default=13, metavar="N", help="words of an n-gram (default: 13)")
    group.add_argument(
        "--ngram_chars",
        type=int,
        default=20,
        metavar="N",
        help="characters of an n-gram, in scripts without spaces such as Chinese (default: 20)",
    )
    group.add_argument(
        "--deduplicate", action="store_true", help="of equal rows, keep the first of each source (reads it twice)"
    )


def settings_from_args(args: argparse.Namespace) -> CleaningSettings:
    """The settings that flags stand for.

    Raises:
        UserError: for a value that cannot be, an unknown language, a missing benchmark file, or a missing package.
    """
    for flag, value, least in (
        ("--min_chars", args.min_chars, 0),
        ("--max_chars", args.max_chars, 0),
        ("--ngram_words", args.ngram_words, 1),
        ("--ngram_chars", args.ngram_chars, 1),
    ):
        if value < least:
            raise UserError(f"{flag} {value} must be at least {least}")
    if args.max_chars and args.max_chars < args.min_chars:
        raise UserError(
            f"--max_chars {args.max_chars} is below --min_chars {args.min_chars}: every row would be left out"
        )
    settings = CleaningSettings(
        args.min_chars,
        args.max_chars,
        tuple(args.languages),
        tuple(args.decontaminate),
        args.deduplicate,
        args.ngram_words,
        args.ngram_chars,
    )
    _check_languages(settings.languages)
    names = [path.name for path in settings.decontaminate]
    for path in settings.decontaminate:
        if not path.is_file():
            raise UserError(f"--decontaminate {path} is not a file")
        if not path.name.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            raise UserError(f"--decontaminate {path}: readable are .jsonl, .jsonl.gz and .jsonl.zst")
        if names.count(path.name) > 1:
            raise UserError(f"--decontaminate: two files are called {path.name}; give one of them another name")
    return settings


def warnings_of_deduplicated(names: Iterable[str], done: str, way_out: str) -> list[str]:
    """Warnings where a source is used together with what near_duplicates made of it.

    Args:
        names: of all sources that are used.
        done: what is done with them, as in `merged`.
        way_out: what the user can do about it.
    """
    there = set(names)
    return [
        f"{name} and {name}{DEDUPLICATED_SUFFIX} are {done} together, though the second is made of the first and most "
        f"documents stand in both; {way_out}"
        for name in sorted(there)
        if f"{name}{DEDUPLICATED_SUFFIX}" in there
    ]


def _check_languages(languages: Sequence[str]) -> None:
    if not languages:
        return
    known = sorted(_known_languages())
    for entry in languages:
        name, separator, codes = entry.rpartition("=")
        if separator and not name:
            raise UserError(f"--languages {entry}: the name of the source before `=` is missing")
        for code in codes.split(",") if separator else [entry]:
            if code not in known:
                raise UserError(f"--languages {entry}: {code!r} is not a language code; known are {' '.join(known)}")


# ---------------------------------------------------------------------------------------------------------------
# One row at a time
# ---------------------------------------------------------------------------------------------------------------


class Cleaner:
    """Says of rows why they are to be left out. One a process: it holds the language model and the n-grams.

    Args:
        settings: as they hold for the source (`CleaningSettings.for_source`).
        index_dir: where `prepare_index` wrote the benchmarks' n-grams; they are mapped, so all processes share one
            copy. Without it they are gathered here.

    Raises:
        UserError: for a missing package or a benchmark file that cannot be read.
    """

    def __init__(self, settings: CleaningSettings, index_dir: Path | None = None) -> None:
        self._settings = settings
        self._languages = frozenset(settings.languages)
        self._index: NgramIndex | None = None
        if settings.decontaminate:
            of = settings.decontaminate, settings.ngram_words, settings.ngram_characters
            self._index = NgramIndex.build(*of) if index_dir is None else NgramIndex.open(*of, index_dir)

    def reason(self, row: Row) -> str | None:
        """Why a row is left out, in words for the accounting; None if it stays."""
        settings = self._settings
        texts = [row.text] if isinstance(row, TextRow) else [content for _, content in row.turns]
        length = sum(map(len, texts))
        if length < settings.min_characters:
            return f"fewer than {settings.min_characters} characters"
        if settings.max_characters and length > settings.max_characters:
            return f"more than {settings.max_characters} characters"
        if self._languages and not _is_in(texts, self._languages):
            return "other language"
        if self._index is not None and self._index.overlaps(row_texts(row)):
            return "overlap with a benchmark"
        return None


def prepare_index(settings: CleaningSettings, index_dir: Path) -> None:
    """Writes the n-grams of the benchmark files, for the `Cleaner`s of several processes; nothing without such files.

    Args:
        settings: names the files.
        index_dir: an existing directory. An index of the same benchmarks that is there already is kept.
    """
    if settings.decontaminate:
        NgramIndex.prepare(settings.decontaminate, settings.ngram_words, settings.ngram_characters, index_dir)


# ---------------------------------------------------------------------------------------------------------------
# Language
# ---------------------------------------------------------------------------------------------------------------

# Telling languages apart costs time by length, and the beginning of a text says enough.
_LANGUAGE_CHARACTERS = 2000
# In fewer letters than this no language can be told; such rows are kept.
_LANGUAGE_LETTERS = 20


@cache
def _identifier() -> Any:
    """The language model: a file of its package."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UserError("--languages needs the package py3langid: pip install 'doge-lm[clean]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def _known_languages() -> set[str]:
    return {str(code) for code in _identifier().labels}


# Written Mandarin is often taken for Wu or Cantonese.
_OTHER_CHINESE = frozenset({"wuu", "yue"})


def _is_in(texts: Sequence[str], languages: frozenset[str]) -> bool:
    """Whether a text is in one of some languages, or too short to tell."""
    sample = "\n".join(text[:_LANGUAGE_CHARACTERS] for text in texts)[:_LANGUAGE_CHARACTERS]
    # Short samples are rare: only those are looked at letter by letter.
    if len(sample) < 10 * _LANGUAGE_LETTERS and sum(map(str.isalpha, sample)) < _LANGUAGE_LETTERS:
        return True
    found = str(_identifier().classify(sample)[0])
    return found in languages or (found in _OTHER_CHINESE and "zh" in languages)


# ---------------------------------------------------------------------------------------------------------------
# Exact duplicates
# ---------------------------------------------------------------------------------------------------------------

# Hashes that are gathered before they are written.
_HASHED_ROWS = 2**14
# Rows that are compared at once: 24 bytes each on disk, and about 80 while they are sorted.
_PARTITION_ROWS = 2**20
_MOST_PARTITIONS = 4096
_RECORD = np.dtype([("high", np.uint64), ("low", np.uint64), ("row", np.int64)])
_DONE_NAME = "duplicates.json"


def hash_rows(rows: Iterable[Row]) -> Iterator[Hashes]:
    """128-bit hashes of rows, in order: arrays of shape (rows, 2), of some thousand rows each.

    Rows count as equal if their words are: the prompt and the text, or the speakers and contents of the turns, white
    space at either end and the kind of line ends aside.
    """
    digests = map(_row_digest, rows)
    while block := b"".join(itertools.islice(digests, _HASHED_ROWS)):
        yield np.frombuffer(block, ">u8").astype(np.uint64).reshape(-1, 2)


def _row_digest(row: Row) -> bytes:
    parts = [row.prompt, row.text] if isinstance(row, TextRow) else [part for turn in row.turns for part in turn]
    hasher = xxhash.xxh3_128()
    for part in parts:
        data = part.replace("\r\n", "\n").strip().encode("utf-8", "surrogatepass")
        # With its length, so that a boundary between two parts cannot move unseen.
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.digest()


def write_hashes(path: Path, hashes: Iterable[Hashes]) -> None:
    """Writes what `hash_rows` gives for a unit, whole or not at all; the name must end in `.npy`.

    A small file that is well compressed may hold any number of rows, so they are written as they come.
    """
    _write_blocks(path, hashes, np.dtype(np.uint64), (2,))


def _write_blocks(
    path: Path, blocks: Iterable[npt.NDArray[Any]], dtype: np.dtype[Any], row_shape: tuple[int, ...]
) -> None:
    """Writes an `.npy` file block by block, whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            rows = 0
            start = _write_header(file, dtype, (rows, *row_shape))
            for block in blocks:
                block.tofile(file)
                rows += len(block)
            file.seek(0)
            # numpy leaves room in the header for the number of rows to grow.
            if _write_header(file, dtype, (rows, *row_shape)) != start:
                raise AssertionError("the header of an .npy file has changed its size")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def drops_path(hash_path: Path, out_dir: Path) -> Path:
    """Where `mark_duplicates` puts the rows of a unit that are to be left out."""
    return out_dir / f"{hash_path.stem}.drops.npy"


def load_drops(path: Path) -> npt.NDArray[np.int64]:
    """The rows of a unit that are to be left out, by their number within the unit, ascending; mapped, not read."""
    # As a plain array over the same pages: `memmap` costs a look at its own attributes with every row.
    return np.asarray(np.load(path, mmap_mode="r"))


def mark_duplicates(hash_paths: Sequence[Path], out_dir: Path) -> int:
    """Finds the rows of which an equal one stands before, in the order of units and rows.

    Out of core: rows are dealt by their hash into files of about a million rows, and those are sorted one at a time,
    so that memory (about 150 MiB) does not grow with the number of rows, be it those of one unit, nor with how often
    one row is repeated. The disk takes 24 bytes a row meanwhile. Interrupted, it begins anew; finished, it does
    nothing.

    Args:
        hash_paths: the files of `write_hashes`, unit by unit.
        out_dir: one file a unit is written here, see `drops_path` and `load_drops`.

    Returns:
        How many rows are to be left out, in all.
    """
    counts = [len(np.load(path, mmap_mode="r")) for path in hash_paths]
    inputs = {path.name: count for path, count in zip(hash_paths, counts, strict=True)}
    done = read_record(out_dir / _DONE_NAME)
    if done is not None and done["inputs"] == inputs:
        return int(done["duplicates"])
    out_dir.mkdir(parents=True, exist_ok=True)
    partitions = out_dir / ".partitions"
    if partitions.exists():
        shutil.rmtree(partitions)
    partitions.mkdir()
    total = sum(counts)
    number = min(max(1, -(-total // _PARTITION_ROWS)), _MOST_PARTITIONS)
    _deal(hash_paths, partitions, number)
    marked = [_mark_partition(partitions / f"{index:05d}") for index in range(number)]
    duplicates = sum(map(len, marked))
    starts = np.concatenate([[0], np.cumsum(counts)])
    for path, begin, end in zip(hash_paths, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        _write_blocks(drops_path(path, out_dir), _drops(marked, begin, end), np.dtype(np.int64), ())
    del marked  # the files are mapped, and cannot be removed before on every platform
    shutil.rmtree(partitions)
    write_record(out_dir / _DONE_NAME, {"inputs": inputs, "rows": total, "duplicates": duplicates})
    return duplicates


def _drops(marked: Sequence[npt.NDArray[np.int64]], begin: int, end: int) -> Iterator[npt.NDArray[np.int64]]:
    """The marked rows from `begin` up to `end`, ascending and counted from `begin`, some rows at a time."""
    for first in range(begin, end, _PARTITION_ROWS):
        window = first, min(first + _PARTITION_ROWS, end)
        slices = [rows[slice(*np.searchsorted(rows, window))] for rows in marked if len(rows)]
        if slices:
            yield np.sort(np.concatenate(slices)) - begin


def _deal(hash_paths: Sequence[Path], partitions: Path, number: int) -> None:
    """Appends every row to the file of its partition, in order."""
    for index in range(number):
        (partitions / f"{index:05d}").touch()
    row = 0
    for path in hash_paths:
        hashes = np.load(path, mmap_mode="r")
        for begin in range(0, len(hashes), _PARTITION_ROWS):
            part = hashes[begin : begin + _PARTITION_ROWS]
            records = np.empty(len(part), _RECORD)
            records["high"], records["low"] = part[:, 0], part[:, 1]
            records["row"] = np.arange(row, row + len(part))
            row += len(part)
            chosen = (part[:, 0] >> np.uint64(32)) * np.uint64(number) >> np.uint64(32)
            order = np.argsort(chosen, kind="stable")
            bounds = np.searchsorted(chosen[order], np.arange(number + 1))
            records = records[order]
            for index in np.flatnonzero(np.diff(bounds)).tolist():
                with (partitions / f"{index:05d}").open("ab") as file:
                    records[bounds[index] : bounds[index + 1]].tofile(file)


def _mark_partition(path: Path) -> npt.NDArray[np.int64]:
    """The rows of a partition that repeat an earlier one, ascending, as a mapped file.

    A partition is read in pieces, and only hashes not seen before are remembered: those are spread evenly, while
    one row that is repeated without end makes a partition of any size.
    """
    marked_path = path.with_suffix(".marked")
    seen = np.empty(0, _RECORD)
    with path.open("rb") as source, marked_path.open("wb") as target:
        while len(piece := np.fromfile(source, _RECORD, _PARTITION_ROWS)):
            both = np.concatenate([seen, piece])
            order = np.lexsort((both["row"], both["low"], both["high"]))
            both = both[order]
            repeats = np.zeros(len(both), np.bool_)
            repeats[1:] = (both["high"][1:] == both["high"][:-1]) & (both["low"][1:] == both["low"][:-1])
            np.sort(both["row"][repeats]).tofile(target)
            seen = both[~repeats]
    path.unlink()
    if not marked_path.stat().st_size:
        return np.empty(0, np.int64)
    return np.memmap(marked_path, np.int64, "r")
