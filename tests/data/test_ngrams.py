"""N-grams by flat arrays, against plain Python; and the index of benchmarks."""

import os
import unicodedata
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doge_lm.data import ngrams as module
from doge_lm.data.ngrams import NgramIndex, ngram_hashes
from doge_lm.errors import UserError
from tests.data.conftest import json_lines

# What is difficult: case that depends on the place, marks, Jamo, letters that become several, forms, other planes.
DIFFICULT = "aB3 ,\n\x00\u03a3\u03c3\u0301\u0130i\u1112\u1161\u11ab\uff9e\uff76\u2026\u00b4\u00bd\ufb01\uff21\uff0c"
DIFFICULT += "\u4e2d\u6587\u5b57\u0e01\u0e33\u3002\U00029fa8\U0001f600\ufdfa\u0663\u00e9"

Gram = tuple[str, ...]


def kind_of(character: str) -> str:
    """`word`, `unspaced`, or nothing for a separator."""
    if unicodedata.category(character)[0] not in "LMN":
        return ""
    code = ord(character)
    return "unspaced" if any(first <= code <= last for first, last in module._UNSPACED_RANGES) else "word"


def normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def word_grams(text: str, n: int) -> list[Gram]:
    words = ["".join(group) for kind, group in groupby(normal(text), key=kind_of) if kind == "word"]
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def character_grams(text: str, n: int) -> list[Gram]:
    kept = [character for character in normal(text) if kind_of(character)]
    return [tuple(kept[start : start + n]) for start in range(len(kept) - n + 1)]


def is_evidence(gram: Gram, holds: Callable[[str], bool]) -> bool:
    return 2 * sum(map(holds, gram)) >= len(gram)


def has_letter(word: str) -> bool:
    return any(unicodedata.category(character)[0] in "LM" for character in word)


def evidence(texts: Sequence[str], words: int, characters: int) -> set[Gram]:
    """The n-grams that count, those of characters marked by an empty string in front."""
    found = {gram for text in texts for gram in word_grams(text, words) if is_evidence(gram, has_letter)}
    return found | {
        ("", *gram)
        for text in texts
        for gram in character_grams(text, characters)
        if is_evidence(gram, lambda character: kind_of(character) == "unspaced")
    }


def hashes_of(texts: Sequence[str], words: int, characters: int) -> set[int]:
    return {value for part in ngram_hashes(texts, words, characters, evidence_only=True) for value in part.tolist()}


def random_texts(seed: int, alphabet: str, count: int = 40) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list(alphabet), int(size))) for size in random.integers(0, 120, count)]


@pytest.mark.parametrize("alphabet", ["aB ", "a1 -", "ab\u00e9 \u2019\uff21", DIFFICULT, "\u4e2d\u6587a \u3002"])
@pytest.mark.parametrize(("words", "characters"), [(1, 1), (2, 3), (5, 4), (13, 20)])
def test_ngrams_are_those_of_plain_python(alphabet: str, words: int, characters: int) -> None:
    for seed in range(5):
        texts = random_texts(seed, alphabet)
        together = evidence(texts, words, characters)
        assert len(hashes_of(texts, words, characters)) == len(together)
        # Equal n-grams have equal hashes, whatever text they stand in, and only those.
        one, other = texts[:20], texts[20:]
        shared = evidence(one, words, characters) & evidence(other, words, characters)
        assert len(hashes_of(one, words, characters) & hashes_of(other, words, characters)) == len(shared)


def test_windows_find_every_ngram_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW", 600)
    monkeypatch.setattr(module, "_WINDOW_OVERLAP", 100)
    random = np.random.default_rng(0)
    for alphabet in ("abc1  ", "abc\u00e9\u0301 \u4e2d\u6587 "):
        text = "".join(random.choice(list(alphabet), 5000))
        assert len(hashes_of([text], 3, 5)) == len(evidence([text], 3, 5))
        pieces = hashes_of([text[start : start + 300] for start in range(0, 5000, 150)], 3, 5)
        assert hashes_of([text], 3, 5) - pieces == set()
        # N-grams longer than a window.
        assert len(hashes_of([text[:1000]], 150, 700)) == len(evidence([text[:1000]], 150, 700)) > 0


def test_the_table_of_forms_leaves_out_what_combines() -> None:
    """Whatever NFKC puts together with the character before it must go through NFKC itself."""
    _, classes = module._folding()
    first = "aAk\u0915\u0b47\u1100\uac00\u3046\U00011131"
    for code in range(module._FOLDED):
        if classes[code] != module._NEEDS_NEIGHBOURS and not 0xD800 <= code < 0xE000:
            for before in first:
                pair = before + chr(code)
                apart = unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", chr(code))
                assert unicodedata.normalize("NFKC", pair) == apart, hex(code)
    seconds = {
        chr(int(parts[1], 16))
        for code in range(0x110000)
        if len(parts := unicodedata.decomposition(chr(code)).split()) == 2 and not parts[0].startswith("<")
    }
    assert all(ord(mark) >= module._FOLDED or classes[ord(mark)] == module._NEEDS_NEIGHBOURS for mark in seconds)


def write_benchmark(path: Path, *texts: str) -> Path:
    path.write_bytes(json_lines([{"query": text} for text in texts]))
    return path


def test_rows_of_numbers_are_no_evidence_but_prose_with_numbers_is(tmp_path: Path) -> None:
    numbers = "[[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]"
    primes = "2 3 5 7 11 13 17 19 23 29 31 37 41"
    prose = "In 1781 the 13 states agreed that 9 of 13 must assent before Congress may engage in any war."
    index = NgramIndex.build([write_benchmark(tmp_path / "b.jsonl", numbers, primes, prose, "x " + primes)], 13, 20)
    assert not index.overlaps([numbers])
    assert not index.overlaps([f"x = {primes}"])
    assert index.overlaps(["", "... " + prose[8:]])


def test_the_index_answers_as_sets_do(tmp_path: Path, library_rows: list[dict[str, Any]]) -> None:
    texts = [row["text"][:5000] for row in library_rows[:30]]
    guarded = [text[3000:3400] for text in texts[::7]] + ["import os\nimport sys\n", "0, " * 50]
    index = NgramIndex.build([write_benchmark(tmp_path / "b.jsonl", *guarded)], 8, 20)
    wanted = evidence(guarded, 8, 20)
    assert len(index) == len(wanted)
    expected = [not wanted.isdisjoint(evidence([text], 8, 20)) for text in texts]
    assert [index.overlaps([text]) for text in texts] == expected
    assert any(expected)
    assert not all(expected)


def test_an_index_that_is_there_is_kept_and_others_are_made_beside_it(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path / "b.jsonl", "one two three four")
    NgramIndex.prepare([path], 3, 20, tmp_path)
    before = {entry.name: os.stat(entry).st_ino for entry in tmp_path.glob("ngrams-*")}
    assert len(before) == 3
    NgramIndex.prepare([path], 3, 20, tmp_path)
    assert {entry.name: os.stat(entry).st_ino for entry in tmp_path.glob("ngrams-*")} == before
    assert not NgramIndex.open([path], 3, 20, tmp_path).overlaps(["five six seven"])
    with pytest.raises(UserError, match="is gone"):
        NgramIndex.open([path], 2, 20, tmp_path)
    write_benchmark(path, "one two three four", "five six seven")
    with pytest.raises(UserError, match="is gone"):
        NgramIndex.open([path], 3, 20, tmp_path)
    NgramIndex.prepare([path], 3, 20, tmp_path)
    assert NgramIndex.open([path], 3, 20, tmp_path).overlaps(["five six seven"])


def test_a_benchmark_must_be_readable_and_hold_something(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"numbers\.jsonl"):
        NgramIndex.prepare([write_benchmark(tmp_path / "numbers.jsonl", "1 2 3 4 5")], 3, 20, tmp_path)
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        NgramIndex.prepare([tmp_path / "gone.jsonl"], 3, 20, tmp_path)
