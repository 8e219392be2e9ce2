"""Leaving rows out: lengths, languages, overlap with benchmarks, exact duplicates out of core."""

import argparse
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from doge_lm.data import cleaning as module
from doge_lm.data import ngrams
from doge_lm.data.cleaning import (
    Cleaner,
    CleaningSettings,
    add_arguments,
    drops_path,
    hash_rows,
    load_drops,
    mark_duplicates,
    prepare_index,
    settings_from_args,
    write_hashes,
)
from doge_lm.data.sources import ConversationRow, Row, TextRow
from doge_lm.errors import UserError
from tests.data.conftest import json_lines

QUESTION = "Natalia sold clips to forty eight of her friends in April, and then she sold half as many in May."
CHINESE = "机器学习是人工智能的一个分支，它研究如何让计算机从数据中学习规律并作出预测。"


def parse(*arguments: str) -> CleaningSettings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_from_args(parser.parse_args(arguments))


def benchmark(tmp_path: Path) -> Path:
    path = tmp_path / "bench.jsonl"
    path.write_bytes(json_lines([{"query": QUESTION, "nested": [{"choices": [CHINESE]}]}]))
    return path


def test_nothing_is_left_out_by_default() -> None:
    settings = parse()
    assert not settings.active
    assert settings.identity() == {}
    assert Cleaner(settings).reason(TextRow("")) is None


def test_lengths_count_texts_without_prompts_and_all_turns() -> None:
    cleaner = Cleaner(parse("--min_chars", "3", "--max_chars", "5"))
    assert cleaner.reason(TextRow("ab", "a long prompt")) == "fewer than 3 characters"
    assert cleaner.reason(TextRow("abcdef")) == "more than 5 characters"
    assert cleaner.reason(ConversationRow((("human", "ab"), ("gpt", "c")))) is None


@pytest.mark.parametrize("mapped", [False, True])
def test_overlap_in_words_and_in_characters(tmp_path: Path, mapped: bool) -> None:
    settings = parse("--decontaminate", str(benchmark(tmp_path)))
    if mapped:
        prepare_index(settings, tmp_path)
    cleaner = Cleaner(settings, tmp_path if mapped else None)
    words = QUESTION.upper().replace(",", " -- ").split()
    assert cleaner.reason(TextRow("Before. " + "\n".join(words[2:16]))) == "overlap with a benchmark"
    assert cleaner.reason(TextRow(" ".join(words[:12]) + " other " + " ".join(words[13:]))) is None
    assert cleaner.reason(TextRow("前文。" + CHINESE[3:25])) == "overlap with a benchmark"
    assert cleaner.reason(TextRow(CHINESE[:19])) is None
    assert cleaner.reason(ConversationRow((("human", QUESTION),))) == "overlap with a benchmark"


def test_an_overlap_is_found_wherever_it_stands_in_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "_WINDOW", 1000)
    monkeypatch.setattr(ngrams, "_WINDOW_OVERLAP", 200)
    cleaner = Cleaner(parse("--decontaminate", str(benchmark(tmp_path))))
    for place in range(0, 2000, 37):
        filler = "lorem ipsum dolor " * 200
        assert cleaner.reason(TextRow(filler[:place] + " " + QUESTION + " " + filler)) is not None
    assert cleaner.reason(TextRow(filler)) is None


def test_a_benchmark_without_any_ngram_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_bytes(json_lines([{"query": "too short"}]))
    with pytest.raises(UserError, match=r"short\.jsonl"):
        Cleaner(parse("--decontaminate", str(path)))


def test_the_identity_knows_the_benchmarks_content(tmp_path: Path) -> None:
    path = benchmark(tmp_path)
    before = parse("--decontaminate", str(path)).identity()
    path.write_bytes(path.read_bytes() + b"\n")
    assert parse("--decontaminate", str(path)).identity() != before


def test_languages_of_all_and_of_one_source() -> None:
    pytest.importorskip("py3langid")
    settings = parse("--languages", "en", "other=zh,de")
    assert settings.for_source("a").languages == ("en",)
    assert settings.for_source("other").languages == ("zh", "de")
    cleaner = Cleaner(settings.for_source("a"))
    assert cleaner.reason(TextRow(QUESTION)) is None
    assert cleaner.reason(TextRow(CHINESE)) == "other language"
    assert cleaner.reason(TextRow("短")) is None  # too short to tell
    with pytest.raises(UserError, match="xx"):
        parse("--languages", "xx")


def test_flags_that_cannot_be() -> None:
    with pytest.raises(UserError, match="--min_chars"):
        parse("--min_chars", "-1")
    with pytest.raises(UserError, match="every row"):
        parse("--min_chars", "9", "--max_chars", "8")
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        parse("--decontaminate", "missing.jsonl")


def test_what_counts_as_equal() -> None:
    rows: list[Row] = [
        TextRow("a\r\nb "),
        TextRow("a\nb"),
        TextRow("b", "a"),
        TextRow("ab"),
        ConversationRow((("human", "ab"),)),
    ]
    hashes = [tuple(pair) for block in hash_rows(rows) for pair in block.tolist()]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert list(hash_rows([])) == []


@pytest.mark.parametrize("partition_rows", [7, 2**20])
def test_duplicates_are_those_that_a_set_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_rows: int
) -> None:
    monkeypatch.setattr(module, "_PARTITION_ROWS", partition_rows)
    random = np.random.default_rng(0)
    texts = [[str(number) for number in random.integers(0, 60, size)] for size in (50, 0, 30, 80)]
    texts[3][10:60] = ["same"] * 50
    paths = [tmp_path / f"unit-{number}.npy" for number in range(len(texts))]
    for path, unit in zip(paths, texts, strict=True):
        write_hashes(path, hash_rows(map(TextRow, unit)))
    out = tmp_path / "drops"
    total = mark_duplicates(paths, out)
    seen: set[str] = set()
    expected = []
    for unit in texts:
        expected.append([row for row, text in enumerate(unit) if text in seen or seen.add(text)])  # type: ignore[func-returns-value]
    assert [load_drops(drops_path(path, out)).tolist() for path in paths] == expected
    assert total == sum(map(len, expected)) == mark_duplicates(paths, out)
    assert not (out / ".partitions").exists()


def test_memory_does_not_grow_with_the_duplicates_of_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PARTITION_ROWS", 2**12)
    rows = 2**18
    equal = np.ones((2**12, 2), np.uint64)
    write_hashes(tmp_path / "unit.npy", [equal] * (rows // len(equal)))
    tracemalloc.start()
    try:
        assert mark_duplicates([tmp_path / "unit.npy"], tmp_path) == rows - 1
        drops = load_drops(drops_path(tmp_path / "unit.npy", tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(drops, np.arange(1, rows))
    assert peak < 2**20  # the duplicates alone are 2 MiB


def test_hashes_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HASHED_ROWS", 2)
    blocks = list(hash_rows(map(TextRow, "abcde")))
    assert [len(block) for block in blocks] == [2, 2, 1]
    for name, parts in {"rows-1.npy": blocks, "rows-0.npy": []}.items():
        write_hashes(tmp_path / name, parts)
        expected = np.concatenate([np.empty((0, 2), np.uint64), *parts])
        assert np.array_equal(np.load(tmp_path / name, mmap_mode="r"), expected)
    assert len(list(tmp_path.iterdir())) == 2
