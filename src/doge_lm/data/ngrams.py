"""N-grams of texts as 64-bit hashes, and an index of those of benchmarks: decontamination looks rows up in it.

An n-gram is some words in a row, or, in scripts that put no spaces between words, some characters in a row. Texts are
compared without case, punctuation, spacing and differences of form that NFKC removes. Not every n-gram of a benchmark
is evidence that a text was copied from it: one of which most words are numbers (`1, 2, 3, …`, a row of zeros) stands
in many texts, so such n-grams are left out of the index. Looking up asks no more than whether a hash is in the index.

Hashes are polynomials modulo 2^64: a word's over its characters, an n-gram's over its words (or its characters). So
the hash of any stretch is the difference of two running sums, divided by a power of the base, and a text takes a
handful of passes over flat arrays, whatever n is.
"""

import hashlib
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doge_lm.data.manifest import file_sha256, read_record, write_record
from doge_lm.data.sources import read_objects
from doge_lm.errors import UserError

NGRAM_RULE = 2
"""Goes up with every change of what counts as an n-gram, so that sets made by another rule are known."""

Hashes = npt.NDArray[np.uint64]
_Places = npt.NDArray[np.int64]

# Characters that are looked at at once: their arrays, of some 40 bytes a character, stay in a processor's cache.
# Longer texts are looked at in windows, which overlap by more than an n-gram of ordinary words is long; words that a
# window's edge cuts are not looked at in that window. Shorter ones are looked at together.
_WINDOW = 2**16
_WINDOW_OVERLAP = 2**12
# Bytes of the table that answers "no" for each n-gram of the benchmarks: with 8 of them, of all other n-grams one in
# eight has a byte that is not zero, and one in 64 a bit.
_FILTER_PER_NGRAM = 8
_FILTER_BITS = (16, 26)

# ---------------------------------------------------------------------------------------------------------------
# Characters
# ---------------------------------------------------------------------------------------------------------------

_SEPARATOR, _NUMBER, _LETTER, _UNSPACED = 0, 1, 2, 3

# Scripts whose words are not set apart by spaces: their n-grams are of characters.
_UNSPACED_RANGES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)


@cache
def _character_classes() -> npt.NDArray[np.uint8]:
    """For every code point: a separator, part of a word (numbers; letters and marks), or of a script without spaces."""
    by_category = {"N": _NUMBER, "L": _LETTER, "M": _LETTER}
    classes = np.fromiter(
        (by_category.get(unicodedata.category(chr(code))[0], _SEPARATOR) for code in range(sys.maxunicode + 1)),
        np.uint8,
        sys.maxunicode + 1,
    )
    for first, last in _UNSPACED_RANGES:
        part = classes[first : last + 1]
        part[part != _SEPARATOR] = _UNSPACED
    return classes


# Code points from here on, and those marked so in the table, are brought into normal form together with their
# neighbours, by `_normal`.
_FOLDED = 0x20000
_NEEDS_NEIGHBOURS = 0xFF
# Parts of Hangul syllables, which NFKC puts together.
_JAMO = ((0x1100, 0x11FF), (0xA960, 0xA97F), (0xD7B0, 0xD7FF))


@cache
def _folding() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """For the first code points, what each becomes in normal form, and its class there.

    Most become one character, whatever stands beside them, or separators alone, for which one stands here. The others
    have the class `_NEEDS_NEIGHBOURS`: marks and Jamo, which combine with what stands before them, Σ, of which the
    small letter depends on its place, and what becomes several characters.
    """
    classes = _character_classes()
    codes = np.arange(_FOLDED, dtype=np.uint32)
    folded_classes = np.full(_FOLDED, _NEEDS_NEIGHBOURS, np.uint8)
    for code in range(_FOLDED - 1):
        character = chr(code)
        normal = _normal(character)
        if _combines(character) or any(map(_combines, normal)) or character == "\u03a3":
            continue
        if len(normal) == 1:
            codes[code] = ord(normal)
        elif any(classes[ord(part)] != _SEPARATOR for part in normal):
            continue
        else:
            codes[code] = ord("\n")
        folded_classes[code] = classes[codes[code]]
    return codes, folded_classes


def _combines(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" or any(first <= ord(character) <= last for first, last in _JAMO)


@cache
def _ascii_classes() -> bytes:
    return bytes(_character_classes()[:256])


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


class _Block:
    """Some texts one after another in normal form, as code points and their classes; separators between and around.

    Args:
        texts: as they are.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        joined = "\n".join(["", *texts, ""])
        self.is_ascii = joined.isascii()
        self.codes: npt.NDArray[Any]
        if self.is_ascii:
            data = joined.lower().encode("ascii")
            self.codes = np.frombuffer(data, np.uint8)
            self.classes = np.frombuffer(data.translate(_ascii_classes()), np.uint8)
        else:
            folded, classes = _folding()
            self.codes = _code_points(joined)
            # Code points behind the table are taken for its last one, which is no character and left out of it.
            self.classes = np.take(classes, self.codes, mode="clip")
            if (self.classes == _NEEDS_NEIGHBOURS).any():
                texts = [_normal(text) for text in texts]
                self.codes = _code_points("\n".join(["", *texts, ""]))
                self.classes = np.take(_character_classes(), self.codes)
            else:
                self.codes = np.take(folded, self.codes)
        # Where the second text begins, and every later one.
        self.bounds = np.cumsum([len(text) + 1 for text in texts[:-1]], dtype=np.int64)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


# ---------------------------------------------------------------------------------------------------------------
# Hashes
# ---------------------------------------------------------------------------------------------------------------

_BASE = 0x9E3779B97F4A7C15
_CHARACTER_BASE = 0xD6E8FEB86659FD93
_INVERSES = {base: pow(base, -1, 2**64) for base in (_BASE, _CHARACTER_BASE)}


@cache
def _powers(base: int, bits: int) -> Hashes:
    """The powers of a number modulo 2^64, from the zeroth on, 2^bits of them."""
    factors = np.full(2**bits, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


class _Sums:
    """Running sums of values, each times a power of a base, from which the hash of any stretch of them is taken."""

    def __init__(self, values: npt.NDArray[Any], base: int) -> None:
        bits = len(values).bit_length()
        self._inverse = _powers(_INVERSES[base], bits)
        self._sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * _powers(base, bits)[: len(values)], out=self._sums[1:])

    def between(self, begins: _Places, ends: _Places) -> Hashes:
        """The hashes of stretches; `ends` are behind the last value of each."""
        hashes: Hashes = (self._sums[ends] - self._sums[begins]) * self._inverse[begins]
        return hashes

    def every(self, n: int) -> Hashes:
        """The hash of every n values in a row."""
        count = max(len(self._sums) - n, 0)
        hashes: Hashes = (self._sums[n:] - self._sums[:count]) * self._inverse[:count]
        return hashes


def ngram_hashes(texts: Iterable[str], words: int, characters: int, *, evidence_only: bool = False) -> Iterator[Hashes]:
    """Hashes of the n-grams of texts, some windows' worth at a time; equal n-grams have equal hashes.

    Args:
        texts: no n-gram goes from one to another.
        words: words of an n-gram.
        characters: characters of an n-gram in scripts without spaces.
        evidence_only: leave out the n-grams of words of which fewer than half have a letter, and those of characters
            of which fewer than half are of a script without spaces. What is left out here may be given otherwise.
    """
    batch: list[str] = []
    size = 0
    for text in texts:
        if len(text) > _WINDOW:
            yield from _windowed_hashes(text, words, characters, evidence_only=evidence_only)
            continue
        batch.append(text)
        size += len(text)
        if size >= _WINDOW:
            yield from _block_hashes(_Block(batch), words, characters, evidence_only=evidence_only)
            batch, size = [], 0
    if batch:
        yield from _block_hashes(_Block(batch), words, characters, evidence_only=evidence_only)


def _windowed_hashes(text: str, words: int, characters: int, *, evidence_only: bool) -> Iterator[Hashes]:
    overlap = max(_WINDOW_OVERLAP, 32 * words, 2 * characters)
    step = max(_WINDOW - overlap, overlap)
    for start in range(0, max(len(text) - overlap, 1), step):
        block = _Block([text[start : start + step + overlap]])
        cut = (start > 0, start + step + overlap < len(text))
        yield from _block_hashes(block, words, characters, evidence_only=evidence_only, cut=cut)


def _block_hashes(
    block: _Block, words: int, characters: int, *, evidence_only: bool, cut: tuple[bool, bool] = (False, False)
) -> Iterator[Hashes]:
    """Hashes of all n-grams of a block; `cut` says whether its first and its last word may not be whole."""
    yield _word_ngrams(block, words, evidence_only=evidence_only, cut=cut)
    if not block.is_ascii:
        yield _character_ngrams(block, characters, evidence_only=evidence_only)


def _word_ngrams(block: _Block, n: int, *, evidence_only: bool, cut: tuple[bool, bool]) -> Hashes:
    in_word = (block.classes == _LETTER) | (block.classes == _NUMBER)
    edges = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1
    begins, ends = edges[::2], edges[1::2]
    if cut[0]:
        begins, ends = begins[1:], ends[1:]
    if cut[1]:
        begins, ends = begins[:-1], ends[:-1]
    if len(begins) < n:
        return np.empty(0, np.uint64)
    spelled = _Sums(block.codes, _CHARACTER_BASE).between(begins, ends)
    # Scattered, so that short words are no small numbers.
    hashes = _Sums((spelled ^ (spelled >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9), _BASE).every(n)
    kept = _within_texts(begins, block.bounds, n)
    if evidence_only:
        letters = _running(block.classes == _LETTER)
        kept = _both(kept, _most(letters[ends] > letters[begins], n))
    return hashes if kept is None else hashes[kept]


def _character_ngrams(block: _Block, n: int, *, evidence_only: bool) -> Hashes:
    unspaced = block.classes == _UNSPACED
    if 2 * int(np.count_nonzero(unspaced)) < n:
        return np.empty(0, np.uint64)
    places = np.flatnonzero(block.classes)
    if len(places) < n:
        return np.empty(0, np.uint64)
    hashes = _Sums(block.codes[places], _CHARACTER_BASE).every(n)
    kept = _within_texts(places, block.bounds, n)
    if evidence_only:
        kept = _both(kept, _most(unspaced[places], n))
    return hashes if kept is None else hashes[kept]


def _within_texts(places: _Places, bounds: _Places, n: int) -> npt.NDArray[np.bool_] | None:
    """Which n in a row of things at some places do not go beyond the bound of a text; None for all of them."""
    if not len(bounds):
        return None
    kept = np.ones(len(places) - n + 1, np.bool_)
    across = (np.searchsorted(places, bounds)[:, None] - np.arange(1, n)).ravel()
    kept[across[(across >= 0) & (across < len(kept))]] = False
    return kept


def _most(marked: npt.NDArray[np.bool_], n: int) -> npt.NDArray[np.bool_]:
    """For every n in a row, whether at least half of them are marked."""
    counts = _running(marked)
    most: npt.NDArray[np.bool_] = 2 * (counts[n:] - counts[:-n]) >= n
    return most


def _running(marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """How many are marked before each place, and in all."""
    counts = np.zeros(len(marked) + 1, np.int64)
    np.cumsum(marked, out=counts[1:])
    return counts


def _both(one: npt.NDArray[np.bool_] | None, two: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return two if one is None else one & two


# ---------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------

# Changes whenever other n-grams or other hashes are kept.
_INDEX_VERSION = 1
# Hashes that are gathered before they are sorted.
_GATHERED = 2**22


class NgramIndex:
    """The n-grams of benchmarks: a sorted array of 64-bit hashes, and a small table that answers "no" at once.

    Args:
        hashes: sorted, each once.
        table: for the leading bits of a hash a byte, of which the bit is set that the three lowest bits of an n-gram
            with these leading bits name.
        words: as for `ngram_hashes`.
        characters: as for `ngram_hashes`.
    """

    def __init__(self, hashes: Hashes, table: npt.NDArray[np.uint8], words: int, characters: int) -> None:
        self._hashes = hashes
        self._table = table
        self._shift = np.uint64(64 - (len(table).bit_length() - 1))
        self._words = words
        self._characters = characters

    def __len__(self) -> int:
        return len(self._hashes)

    @classmethod
    def build(cls, paths: Sequence[Path], words: int, characters: int) -> "NgramIndex":
        """Gathers the n-grams of all strings of benchmark files: 8 bytes for each, and at most 16 for the table.

        Raises:
            UserError: for a file that cannot be read, or one without any n-gram, which could not guard anything.
        """
        parts = []
        for path in paths:
            found = _file_ngrams(path, words, characters)
            if not len(found):
                raise UserError(
                    f"--decontaminate {path}: no text in it has {words} words in a row, most of them with letters, or "
                    f"{characters} characters without spaces, so nothing could be compared; leave it out, or lower "
                    "--ngram_words"
                )
            parts.append(found)
        hashes = np.unique(np.concatenate(parts))
        bits = min(max((_FILTER_PER_NGRAM * len(hashes)).bit_length(), _FILTER_BITS[0]), _FILTER_BITS[1])
        table = np.zeros(2**bits, np.uint8)
        np.bitwise_or.at(table, hashes >> np.uint64(64 - bits), _lowest_bits(hashes))
        return cls(hashes, table, words, characters)

    @classmethod
    def prepare(cls, paths: Sequence[Path], words: int, characters: int, directory: Path) -> None:
        """Writes the index into a directory, for `open`; one of the same benchmarks that is there already is kept.

        Raises:
            UserError: as `build`.
        """
        hashes, table, record = _index_paths(paths, words, characters, directory)
        if read_record(record) is None:
            index = cls.build(paths, words, characters)
            save_array(hashes, index._hashes)
            save_array(table, index._table)
            write_record(record, {"ngrams": len(index)})

    @classmethod
    def open(cls, paths: Sequence[Path], words: int, characters: int, directory: Path) -> "NgramIndex":
        """Maps what `prepare` wrote, so that all processes share one copy.

        Raises:
            UserError: if it is not there.
        """
        hashes, table, record = _index_paths(paths, words, characters, directory)
        if read_record(record) is None:
            raise UserError(f"{record} is gone; something removed it while it was used: run the same command again")
        # As plain arrays over the same pages: `memmap` costs a look at its own attributes with every operation.
        arrays = [np.asarray(np.load(path, mmap_mode="r")) for path in (hashes, table)]
        return cls(arrays[0], arrays[1], words, characters)

    def overlaps(self, texts: Iterable[str]) -> bool:
        """Whether any of some texts shares an n-gram with the benchmarks."""
        return any(self._any(grams) for grams in ngram_hashes(texts, self._words, self._characters))

    def _any(self, grams: Hashes) -> bool:
        marks = self._table[grams >> self._shift]
        there = np.flatnonzero(marks)
        candidates = grams[there]
        candidates = candidates[(marks[there] & _lowest_bits(candidates)) != 0]
        if not len(candidates):
            return False
        places = np.searchsorted(self._hashes, candidates)
        return bool((self._hashes[np.minimum(places, len(self._hashes) - 1)] == candidates).any())


def _index_paths(paths: Sequence[Path], words: int, characters: int, directory: Path) -> tuple[Path, Path, Path]:
    """The hashes, the table, and the record, named by what they are made from."""
    made_from = [_INDEX_VERSION, words, characters, *(benchmark_sha256(path) for path in paths)]
    name = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    return directory / f"ngrams-{name}.npy", directory / f"ngrams-{name}-table.npy", directory / f"ngrams-{name}.json"


def _lowest_bits(hashes: Hashes) -> npt.NDArray[np.uint8]:
    return np.uint8(1) << (hashes & np.uint64(7)).astype(np.uint8)


def _file_ngrams(path: Path, words: int, characters: int) -> Hashes:
    """The distinct n-grams of all strings of a file of JSON lines that are evidence."""
    gathered = [np.empty(0, np.uint64)]
    pending = 0
    texts = (text for _, values in read_objects(path) for text in _strings(values))
    for grams in ngram_hashes(texts, words, characters, evidence_only=True):
        gathered.append(grams)
        pending += len(grams)
        if pending > _GATHERED:
            gathered, pending = [np.unique(np.concatenate(gathered))], 0
    return np.unique(np.concatenate(gathered))


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, however deep."""
    stack = [value]
    while stack:
        entry = stack.pop()
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            stack.extend(entry.values())
        elif isinstance(entry, list):
            stack.extend(entry)


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def benchmark_sha256(path: Path) -> str:
    """The sha256 of a benchmark file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"--decontaminate {path} cannot be read: {error.strerror}") from error


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Writes an array so that its file is there whole or not at all; the name must end in `.npy`."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
