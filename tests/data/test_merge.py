"""Merging: a true shuffle fixed by the seed, a split by whole documents, the same for any number of processes."""

import json
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk

from doge_lm.cli import main
from doge_lm.data import manifest as manifest_module
from doge_lm.data import merge as module
from doge_lm.data import preprocess, shuffle, storage
from doge_lm.data import split as split_module
from doge_lm.data.download import take_local
from doge_lm.data.manifest import AccountingError, Manifest, file_sha256
from doge_lm.data.merge import merge
from doge_lm.data.mix import Mix
from doge_lm.data.shuffle import random_stream
from doge_lm.data.split import choose_test_groups, share_test_groups
from doge_lm.errors import UserError
from tests.data.conftest import conversation, json_lines, left_over
from tests.data.reference import pieces_in

Prepare = Callable[..., dict[str, Manifest]]


def marked_texts(name: str, count: int) -> list[dict[str, Any]]:
    """Texts of very different lengths that can be told apart wherever they are cut: a name in every few words."""
    return [{"text": f" <{name}{n}> lorem ipsum" * (3 + (n * n) % 97)} for n in range(count)]


def chats(count: int) -> list[dict[str, Any]]:
    return [conversation(("human", f"{n} plus {n}"), ("gpt", f"{2 * n}")) for n in range(count)]


def rows_of(path: Path) -> Any:
    return load_from_disk(str(path)).with_format("numpy")


def documents_of(rows: Any, tokenizer: Any) -> set[str]:
    """The marks that occur in rows; the last mark of a piece may be cut in two, so the ends are left out."""
    found = set()
    for row in rows:
        begin = 0
        for count in row["document_lengths"]:
            text = tokenizer.decode(row["input_ids"][begin : begin + count].tolist())
            found |= set(re.findall(r"<(\w+\d+)>", text))
            begin += count
    return found


@pytest.fixture
def two_sources(tmp_path: Path, prepare: Prepare) -> Path:
    """Two sources of text, one of conversations, tokenized."""
    sources = {"apple": marked_texts("apple", 150), "pear": marked_texts("pear", 100), "talk": chats(500)}
    prepare(sources, sequence_length=128)
    return tmp_path


def test_no_document_is_on_both_sides(two_sources: Path, tokenizer: Any) -> None:
    manifests = merge(two_sources, two_sources, test_size=30)
    made = rows_of(two_sources / "pretrain")
    train, test = (documents_of(made[split], tokenizer) for split in ("train", "test"))
    assert train.isdisjoint(test)
    assert train | test == {f"apple{n}" for n in range(150)} | {f"pear{n}" for n in range(100)}
    assert len(made["test"]) == 30
    keys = [{(row["source"], int(row["group"])) for row in made[split]} for split in ("train", "test")]
    assert keys[0].isdisjoint(keys[1])
    # There are documents of several rows, or nothing would have been shown.
    assert max(Counter((row["source"], int(row["group"])) for row in made["train"]).values()) > 2
    assert set(manifests) == {"pretrain", "finetune"}
    assert set(rows_of(two_sources / "finetune")["train"]["source"]) == {"talk"}


def test_nothing_is_lost_or_changed(two_sources: Path) -> None:
    merge(two_sources, two_sources, test_size=30)
    before = sum((pieces_in(rows_of(two_sources / "tokenized" / name)) for name in ("apple", "pear")), Counter())
    made = rows_of(two_sources / "pretrain")
    assert pieces_in(made["train"]) + pieces_in(made["test"]) == before
    manifest = Manifest.read(two_sources / "pretrain")
    for split in ("train", "test"):
        for name, counts in manifest.samples[split].items():
            rows = [row for row in made[split] if row["source"] == name]
            assert counts.samples == len(rows)
            assert counts.tokens == sum(row["document_lengths"].sum() for row in rows)
            assert counts.text_bytes == sum(int(row["text_bytes"]) for row in rows)
    assert manifest.accounting["apple"] == Manifest.read(two_sources / "tokenized" / "apple").accounting["apple"]


def order_of(folder: Path) -> list[tuple[str, int, int]]:
    return [(row["source"], int(row["group"]), int(row["input_ids"][1])) for row in rows_of(folder)["train"]]


def test_the_order_is_shuffled_and_fixed_by_the_seed(two_sources: Path, tmp_path: Path) -> None:
    for place, seed in (("one", 233), ("again", 233), ("other", 234)):
        merge(two_sources, tmp_path / place, seed=seed, test_size=30)
    one, again, other = (order_of(tmp_path / place / "pretrain") for place in ("one", "again", "other"))
    assert one == again != other
    # Sources are mixed all along: each tenth holds about its share of apples.
    apples = np.array([source == "apple" for source, _, _ in one])
    for tenth in np.array_split(apples, 10):
        assert abs(tenth.mean() - apples.mean()) < 0.35
    groups = np.array([group for source, group, _ in one if source == "apple"])
    assert abs(np.corrcoef(groups, np.arange(len(groups)))[0, 1]) < 0.25
    # The test set is not the last rows either.
    test = sorted(int(row["group"]) for row in rows_of(tmp_path / "one" / "pretrain")["test"])
    assert test[0] < max(groups) / 3


def test_the_order_of_a_seed_is_fixed_for_good(two_sources: Path) -> None:
    """Recorded when this was written: another order would make runs of another version not comparable."""
    assert random_stream(233, "candidates").permutation(10).tolist() == [9, 4, 5, 3, 2, 0, 8, 6, 1, 7]


def test_rows_lie_in_their_order(two_sources: Path) -> None:
    merge(two_sources, two_sources, test_size=30)
    for split in ("train", "test"):
        made = load_from_disk(str(two_sources / "pretrain"))[split]
        assert made._indices is None
        state = json.loads((two_sources / "pretrain" / split / "state.json").read_text(encoding="utf-8"))
        assert "_indices_data_files" not in state


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_bytes(
    two_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are made small, or there would be no work for a second process."""
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 16)
    for number in (1, 2):
        merge(two_sources, tmp_path / str(number), num_proc=number, test_size=30)
    for kind in ("pretrain", "finetune"):
        one, two = tmp_path / "1" / kind, tmp_path / "2" / kind
        files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
        assert len(files) > 4
        for file in files:
            assert (one / file).read_bytes() == (two / file).read_bytes(), file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many buckets and runs, and a test set chosen among some groups only: as in a large set."""
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 16)
    monkeypatch.setattr(module, "_RUN_BYTES", 1)
    monkeypatch.setattr(module, "_CANDIDATE_ROWS", 64)
    monkeypatch.setattr(module, "_CANDIDATE_TIMES", 4)
    monkeypatch.setattr(module, "_MOST_RUNS", 10**6)


@pytest.mark.usefixtures("small_steps")
def test_a_large_set_is_split_without_leaks(tmp_path: Path, prepare: Prepare) -> None:
    """Every other document occurs twice, in a source of its own."""
    other, twice = marked_texts("other", 150), marked_texts("twice", 150)
    sources = {"a": other + twice, "b": twice[::-1]}
    prepare(sources, sequence_length=128, padding="max_length")
    manifest = merge(tmp_path, tmp_path, test_size=30)["pretrain"]
    assert manifest.settings["candidates"] == "some"
    train, test = sides(tmp_path / "pretrain")
    assert train.isdisjoint(test)
    assert len(train | test) == 300
    made = rows_of(tmp_path / "pretrain")
    assert len(made["test"]) == 30
    before = sum((pieces_in(rows_of(tmp_path / "tokenized" / name)) for name in sources), Counter[Any]())
    assert pieces_in(made["train"]) + pieces_in(made["test"]) == before


@pytest.mark.usefixtures("small_steps")
def test_where_most_documents_are_repeated_more_are_looked_at(tmp_path: Path, prepare: Prepare) -> None:
    """Every document stands in two sources, but for every eighth: of 64 rows as candidates too few are of those."""
    texts = [{"text": f"text number {n}"} for n in range(300)]
    prepare(
        {"a": texts, "b": [text for n, text in enumerate(texts) if n % 8]}, sequence_length=64, padding="max_length"
    )
    manifest = merge(tmp_path, tmp_path, test_size=16)["pretrain"]
    assert manifest.settings["candidates"] == "some"
    assert manifest.split_counts("test").samples == 16
    train, test = sides(tmp_path / "pretrain")
    assert train.isdisjoint(test)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("left", [0, 12])
def test_a_large_set_of_repeats_says_so(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: int
) -> None:
    monkeypatch.setattr(module, "_MOST_CANDIDATE_ROWS", 128)
    texts = [{"text": f"text number {n % 40}"} for n in range(400)]
    prepare({"a": texts + [{"text": f"once {n}"} for n in range(left)]}, sequence_length=64, padding="max_length")
    flags = ["--datasets_dir", str(tmp_path), "--save_dir", str(tmp_path), "--test_size", "16"]
    status = main(["merge_datasets", *flags])
    out, err = capsys.readouterr()
    if left == 0:
        assert status == 1
        assert "stand elsewhere too" in err
        assert "--deduplicate" in err
        assert left_over(tmp_path) == []
    else:
        assert status == 0
        assert re.search(r"the test set has \d samples, not 16: most samples .*--deduplicate", out)


class Killed(BaseException):
    """What stands for SIGKILL: nothing in the package catches it."""


@pytest.mark.usefixtures("small_steps")
def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(
    two_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every n-th record, before and after it is written; what has a record is not made again."""
    merge(two_sources, tmp_path / "whole", test_size=30)
    expected = contents(tmp_path / "whole" / "pretrain")
    honest = shuffle.write_record
    for late in (False, True):
        made: list[str] = []
        left = [3]

        def write(path: Path, values: Any, late: bool = late, made: list[str] = made, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0 and not late:
                raise Killed
            honest(path, values)
            made.append(path.name)
            if left[0] == 0:
                raise Killed

        with monkeypatch.context() as patch:
            for place in (shuffle, module, split_module):
                patch.setattr(place, "write_record", write)
            kills = 0
            while True:
                left[0] = 3
                try:
                    merge(two_sources, tmp_path / str(late), test_size=30)
                    break
                except Killed:
                    kills += 1
                    assert not (tmp_path / str(late) / "finetune").exists() or kills > 3
        assert kills > 5
        assert contents(tmp_path / str(late) / "pretrain") == expected
        # Both kinds write records of the same names, each once.
        assert max(Counter(made).values()) <= 2
        assert left_over(tmp_path / str(late)) == []


def test_what_is_made_already_is_left_alone(two_sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = merge(two_sources, two_sources, test_size=30)
    before = (two_sources / "pretrain" / "manifest.json").stat().st_mtime_ns
    assert merge(two_sources, two_sources, test_size=30) == first
    assert "pretrain is made already, with the same settings; --overwrite" in capsys.readouterr().out
    left = two_sources / ".tmp-pretrain"
    left.mkdir()
    assert merge(two_sources, two_sources, test_size=30) == first
    assert f"{left} was left by an interrupted run" in capsys.readouterr().out
    assert (two_sources / "pretrain" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other settings \(seed: was 233, is 5\).*--overwrite"):
        merge(two_sources, two_sources, test_size=30, seed=5)
    merge(two_sources, two_sources, test_size=30, seed=5, overwrite=True)
    assert Manifest.read(two_sources / "pretrain").settings["seed"] == 5


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_one_kind_alone(tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    prepare({"a": marked_texts("a", 40) if kind == "pretrain" else chats(200)}, sequence_length=64)
    flags = ["--datasets_dir", str(tmp_path), "--save_dir", str(tmp_path), "--test_size", "5"]
    assert main(["merge_datasets", *flags]) == 0
    other = "finetune" if kind == "pretrain" else "pretrain"
    assert f"{other}: no source of this kind" in capsys.readouterr().out
    assert not (tmp_path / other).exists()
    assert len(rows_of(tmp_path / kind)["test"]) == 5


def test_groups_of_different_sources_are_different_groups(tmp_path: Path, prepare: Prepare) -> None:
    short = {name: [{"text": f"{name} number {n}"} for n in range(20)] for name in ("a", "b")}
    prepare(short, sequence_length=64, padding="max_length")
    assert merge(tmp_path, tmp_path, test_size=1)["pretrain"].split_counts("test").samples == 1


def whole_documents(rows: Any) -> set[tuple[int, ...]]:
    """The pieces of rows that a document begins with, as they are."""
    return {ids for ids, _ in pieces_in(rows) if ids[0] == 1}


def sides(folder: Path) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    made = rows_of(folder)
    return whole_documents(made["train"]), whole_documents(made["test"])


@pytest.mark.parametrize("padding", ["packed", "max_length"])
@pytest.mark.parametrize("within", [True, False])
def test_a_document_that_occurs_twice_is_on_one_side(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str], padding: str, within: bool
) -> None:
    """Within a source and across sources; half the texts are longer than a row."""
    other, twice = marked_texts("other", 120), marked_texts("twice", 40)
    sources = {"a": other + twice + twice[::-1]} if within else {"a": other + twice, "b": twice[::-1]}
    prepare(sources, sequence_length=128, padding=padding)
    place = ["--datasets_dir", str(tmp_path), "--save_dir", str(tmp_path), "--test_size", "60"]
    assert main(["merge_datasets", *place]) == 0
    assert "pretrain: 40 documents occur more than once; their samples stay" in capsys.readouterr().out
    assert Manifest.read(tmp_path / "pretrain").repeated_documents == 40
    train, test = sides(tmp_path / "pretrain")
    assert train.isdisjoint(test)
    assert len(train | test) == 160
    assert len(rows_of(tmp_path / "pretrain")["test"]) == 60


def test_a_conversation_that_occurs_twice_is_on_one_side(tmp_path: Path, prepare: Prepare) -> None:
    """With prompts longer than a row too, of which the first piece is left out, for it holds no target."""
    long = [conversation(("human", f"{n} plus " * 90), ("gpt", f"{n} " * 9)) for n in range(60)]
    prepare({"a": chats(80), "b": long}, place=tmp_path / "one", sequence_length=64, padding="max_length")
    once = rows_of(tmp_path / "one" / "tokenized" / "b")
    assert all(row["input_ids"][0] != 1 for row in once)
    prepare({"a": chats(80) + long, "b": chats(80)[::2] + long}, sequence_length=64)
    merge(tmp_path, tmp_path, test_size=20)
    made = rows_of(tmp_path / "finetune")
    train, test = ({ids for ids, _ in pieces_in(made[split])} for split in ("train", "test"))
    assert train.isdisjoint(test)
    assert len(made["test"]) == 20


def shingles(rows: Any, length: int) -> set[tuple[int, ...]]:
    """All runs of so many tokens in the pieces of rows."""
    pieces = {ids for ids, _ in pieces_in(rows)}
    return {ids[begin : begin + length] for ids in pieces for begin in range(len(ids) - length + 1)}


@pytest.mark.parametrize("candidates", ["all", "some"])
def test_concatenated_documents_that_occur_twice_are_on_one_side(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, candidates: str
) -> None:
    """Two copies are cut at different places; texts shorter and longer than a row, over several batches of rows."""
    if candidates == "some":
        monkeypatch.setattr(module, "_CANDIDATE_ROWS", 512)
        monkeypatch.setattr(module, "_MOST_CANDIDATE_ROWS", 512)
    draw = random_stream(1, "test")
    texts = [{"text": " ".join(map(str, draw.randint(100, 999, 10 + 9 * (n % 13))))} for n in range(700)]
    order = draw.permutation(760) % 700
    prepare({"a": [texts[n] for n in order]}, sequence_length=64, packing="concat")
    manifest = merge(tmp_path, tmp_path, test_size=150)["pretrain"]
    assert manifest.settings["candidates"] == candidates
    assert manifest.repeated_documents == 60 if candidates == "all" else 0 < manifest.repeated_documents <= 60
    made = rows_of(tmp_path / "pretrain")
    assert len(made["test"]) > 40
    assert shingles(made["train"], 30).isdisjoint(shingles(made["test"], 30))


def test_concatenated_conversations_with_rows_left_out_are_on_one_side(tmp_path: Path, prepare: Prepare) -> None:
    """Prompts longer than two rows: what is left of two copies begins at different places, or has a hole."""
    draw = random_stream(2, "test")

    def words(count: int) -> str:
        return " ".join(map(str, draw.randint(100, 999, count)))

    rows = [
        conversation(("human", words(70 + n)), ("gpt", words(12)), ("human", words(70)), ("gpt", words(12)))
        for n in range(40)
    ]
    fill = [conversation(("human", words(3)), ("gpt", words(5 + n % 7))) for n in range(900)]
    order = draw.permutation(1000)
    both = [(rows + rows + fill)[n] for n in order if n < 980]
    prepare({"a": both}, sequence_length=64, packing="concat")
    assert Manifest.read(tmp_path / "tokenized" / "a").accounting["a"].dropped  # or nothing would have been shown
    merge(tmp_path, tmp_path, test_size=150)
    made = rows_of(tmp_path / "finetune")
    assert len(made["test"]) > 40
    assert shingles(made["train"], 12).isdisjoint(shingles(made["test"], 12))


def test_repeats_that_leave_no_test_set_are_said(tmp_path: Path, prepare: Prepare) -> None:
    prepare({"a": [{"text": "the same again"}] * 30}, sequence_length=64, padding="max_length")
    with pytest.raises(
        UserError, match=r"choose a larger --test_size, or remove repeats \(1 document occurs more than once\)"
    ):
        merge(tmp_path, tmp_path, test_size=5)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("most", "cause"), [(16, "has more samples than can be looked at"), (10**6, "the smallest")])
def test_documents_longer_than_there_is_room_for(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, most: int, cause: str
) -> None:
    """Of no document are there candidates at first; those of a larger test set are found with more room."""
    monkeypatch.setattr(module, "_CANDIDATE_ROWS", 8)
    monkeypatch.setattr(module, "_MOST_CANDIDATE_ROWS", most)
    monkeypatch.setattr(module, "_CANDIDATE_TIMES", 2)
    words = " ".join(str(number) for number in range(100, 400))
    prepare({"a": [{"text": f"{n} {words}"} for n in range(4)]}, sequence_length=16, padding="max_length")
    smallest = min(Counter(int(row["group"]) for row in rows_of(tmp_path / "tokenized" / "a")).values())
    assert smallest > 16
    with pytest.raises(UserError, match=rf"{cause}.*; choose a larger --test_size, .* a larger --max_len"):
        merge(tmp_path, tmp_path, test_size=4)
    assert left_over(tmp_path) == []
    merge(tmp_path, tmp_path, test_size=smallest)
    assert len(rows_of(tmp_path / "pretrain")["test"]) == smallest


def test_padded_rows_are_merged_too(tmp_path: Path, prepare: Prepare, tokenizer: Any) -> None:
    prepare({"a": marked_texts("a", 40)}, sequence_length=64, padding="max_length")
    manifest = merge(tmp_path, tmp_path, test_size=7)["pretrain"]
    made = rows_of(tmp_path / "pretrain")
    assert manifest.split_counts("train").padding > 0
    assert documents_of(made["train"], tokenizer).isdisjoint(documents_of(made["test"], tokenizer))


# ---------------------------------------------------------------------------------------------------------------
# The choice of the test set
# ---------------------------------------------------------------------------------------------------------------


def test_the_choice_is_exact_where_there_is_one() -> None:
    sizes = np.array([5, 5, 5, 3, 3, 7, 1, 1])
    for wanted in range(1, 30):
        sums = {sum(sizes[list(some)]) for count in range(9) for some in combinations(range(8), count)}
        best = max(total for total in sums if total <= wanted)
        assert sizes[choose_test_groups(sizes, wanted, 233)].sum() == best


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_as_near_as_can_be(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.choice([4, 6, 9, 14], 12)
    wanted = int(generator.integers(5, 60))
    sums = {0}
    for size in sizes.tolist():
        sums |= {total + size for total in sums}
    best = max(total for total in sums if total <= wanted)
    assert sizes[choose_test_groups(sizes, wanted, seed)].sum() == best


def test_the_choice_is_at_random() -> None:
    sizes = np.ones(1000, np.int64)
    one, two = (choose_test_groups(sizes, 100, seed) for seed in (1, 2))
    assert one.sum() == two.sum() == 100
    assert (one & two).sum() < 40
    assert 20 < np.flatnonzero(one).min() + 20 < 100
    assert one[:500].sum() > 25


def test_a_size_that_groups_do_not_come_to_is_said(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    # Documents of several rows each, which nothing else shares: groups of one size.
    words = " ".join(str(number) for number in range(10, 60))
    prepare({"a": [{"text": f"{n} {words}"} for n in range(10)]}, sequence_length=64, padding="max_length")
    sizes = Counter(int(row["group"]) for row in rows_of(tmp_path / "tokenized" / "a"))
    assert len(set(sizes.values())) == 1
    smallest = min(sizes.values())
    assert smallest > 1
    with pytest.raises(UserError, match="every group of them is larger"):
        merge(tmp_path, tmp_path, test_size=smallest - 1)
    flags = ["--datasets_dir", str(tmp_path), "--save_dir", str(tmp_path), "--test_size", str(smallest + 1)]
    assert main(["merge_datasets", *flags]) == 0
    assert f"the test set has {smallest} samples, not {smallest + 1}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------


def test_too_few_samples_says_how_many_there_are(tmp_path: Path, prepare: Prepare) -> None:
    made = prepare({"a": marked_texts("a", 20)}, sequence_length=64)["a"].samples["all"]["a"].samples
    for size in (made, 1000):
        with pytest.raises(UserError, match=f"there are only {made} samples, so --test_size {size}"):
            merge(tmp_path, tmp_path, test_size=size)
    assert not (tmp_path / "pretrain").exists()
    merge(tmp_path, tmp_path, test_size=1)


def test_sources_that_do_not_fit_together(tmp_path: Path, prepare: Prepare) -> None:
    prepare({"a": marked_texts("a", 20), "b": marked_texts("b", 20)}, sequence_length=64)
    manifest = Manifest.read(tmp_path / "tokenized" / "b")
    manifest.tokenizer.sha256 = "another"
    manifest.write(tmp_path / "tokenized" / "b")
    with pytest.raises(UserError, match="'a' and 'b' were made with different tokenizers"):
        merge(tmp_path, tmp_path, test_size=2)
    prepare({"b": marked_texts("b", 20)}, place=tmp_path / "long", sequence_length=128)
    (tmp_path / "tokenized" / "b").rename(tmp_path / "away")
    (tmp_path / "long" / "tokenized" / "b").rename(tmp_path / "tokenized" / "b")
    with pytest.raises(UserError, match=r"'a' and 'b' were made with different --max_len \(64 and 128\)"):
        merge(tmp_path, tmp_path, test_size=2)


@pytest.mark.parametrize(
    ("setting", "values"), [("padding", ("packed", "max_length")), ("train_on_prompts", (False, True))]
)
def test_settings_that_differ_within_a_kind(
    tmp_path: Path, prepare: Prepare, setting: str, values: tuple[Any, Any]
) -> None:
    prepare({"a": marked_texts("a", 20), "b": marked_texts("b", 20)}, sequence_length=64, **{setting: values[0]})
    prepare({"talk": chats(40)}, place=tmp_path / "x", sequence_length=64, **{setting: values[1]})
    (tmp_path / "x" / "tokenized" / "talk").rename(tmp_path / "tokenized" / "talk")
    merge(tmp_path, tmp_path, test_size=2)  # kinds may differ
    prepare({"b": marked_texts("b", 20)}, place=tmp_path / "y", sequence_length=64, **{setting: values[1]})
    (tmp_path / "tokenized" / "b").rename(tmp_path / "away")
    (tmp_path / "y" / "tokenized" / "b").rename(tmp_path / "tokenized" / "b")
    message = f"'a' and 'b' were made with different --{setting} ({values[0]} and {values[1]})"
    with pytest.raises(UserError, match=re.escape(message)):
        merge(tmp_path, tmp_path, test_size=2)


def test_sources_of_other_sizes_and_limits_are_merged(tmp_path: Path, prepare: Prepare) -> None:
    prepare({"a": marked_texts("a", 20)}, sequence_length=64)
    prepare({"b": marked_texts("b", 20)}, place=tmp_path / "x", sequence_length=64, max_document_bytes=10_000)
    (tmp_path / "x" / "tokenized" / "b").rename(tmp_path / "tokenized" / "b")
    path = tmp_path / "tokenized" / "b" / "manifest.json"
    text = path.read_text(encoding="utf-8")
    assert '"unit_bytes": 16777216' in text  # what a small source has; a large one has larger units
    path.write_text(text.replace('"unit_bytes": 16777216', '"unit_bytes": 268435456'), encoding="utf-8")
    assert merge(tmp_path, tmp_path, test_size=2)["pretrain"].accounting.keys() == {"a", "b"}


def test_what_was_not_preprocessed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenized does not exist; run `doge-lm preprocess_datasets"):
        merge(tmp_path, tmp_path)
    (tmp_path / "tokenized").mkdir()
    with pytest.raises(UserError, match="holds no tokenized source"):
        merge(tmp_path, tmp_path)
    (tmp_path / "tokenized" / "a").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        merge(tmp_path, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "damaged"])
def test_a_damaged_source_is_named(tmp_path: Path, prepare: Prepare, damage: str) -> None:
    prepare({"a": marked_texts("a", 20)}, sequence_length=64)
    path = tmp_path / "tokenized" / "a" / "data-00000.arrow"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "damaged":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"data-00000.arrow is {damage}"):
        merge(tmp_path, tmp_path, test_size=2)


@pytest.mark.parametrize("options", [{"num_proc": 0}, {"test_size": 0}, {"seed": -1}, {"seed": 2**32}])
def test_flags_that_cannot_be(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(options))} .* is not possible"):
        merge(tmp_path, tmp_path, **options)


def test_a_set_of_someone_elses_is_not_replaced(tmp_path: Path, prepare: Prepare) -> None:
    prepare({"a": marked_texts("a", 20)}, sequence_length=64)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mine").write_bytes(b"x")
    with pytest.raises(UserError, match="was not made by doge-lm"):
        merge(tmp_path, tmp_path, test_size=2)


def test_a_full_disk_leaves_the_earlier_set(tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare({"a": marked_texts("a", 20)}, sequence_length=64)
    merge(tmp_path, tmp_path, test_size=2)
    before = Manifest.read(tmp_path / "pretrain")

    def full(self: Any, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage._Hashing, "write", full)
    with pytest.raises(UserError, match=r"the disk is full .*pretrain"):
        merge(tmp_path, tmp_path, test_size=3, overwrite=True)
    assert Manifest.read(tmp_path / "pretrain") == before
    # What is finished is kept, and the same command goes on with it.
    assert left_over(tmp_path) != []
    monkeypatch.undo()
    merge(tmp_path, tmp_path, test_size=3, overwrite=True)
    assert left_over(tmp_path) == []


def test_rows_that_get_lost_are_noticed(tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare({"a": marked_texts("a", 20)}, sequence_length=64)
    honest = shuffle.RowGatherer.gather
    monkeypatch.setattr(shuffle.RowGatherer, "gather", lambda self, indices: honest(self, indices[:-1]))
    with pytest.raises(AccountingError, match="does not add up"):
        merge(tmp_path, tmp_path, test_size=2)
    assert not (tmp_path / "pretrain").exists()


def test_every_source_gives_its_share_of_the_test_set() -> None:
    """Three sources: single rows, pairs, and two huge documents; the last can give nothing, the others make it up."""
    sizes = [1] * 600, [2] * 150, [50, 50]
    groups = np.repeat(np.arange(sum(map(len, sizes))), np.concatenate(sizes))
    row_source = np.repeat(np.arange(3), [sum(part) for part in sizes])
    chosen = share_test_groups(groups, row_source, 40, 233)
    taken = np.bincount(row_source[chosen[groups]], minlength=3)
    assert taken.sum() == 40
    assert taken[0] >= 24
    assert taken[1] >= 12
    assert taken[2] == 0
    proportional = share_test_groups(groups[:900], row_source[:900], 90, 233)
    assert np.bincount(row_source[:900][proportional[groups[:900]]]).tolist() == [60, 30]


def test_the_size_comes_before_the_shares() -> None:
    """Only both sources' odd groups together come to the size."""
    groups = np.repeat(np.arange(4), [3, 3, 4, 4])
    row_source = np.repeat(np.arange(2), [6, 8])
    chosen = share_test_groups(groups, row_source, 7, 233)
    assert np.bincount(groups)[chosen].sum() == 7


def test_a_test_set_that_takes_much_of_a_source_is_said(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare({"apple": marked_texts("apple", 60), "whole": marked_texts("whole", 1)}, sequence_length=64)
    rows = len(rows_of(tmp_path / "tokenized" / "apple"))
    flags = ["--datasets_dir", str(tmp_path), "--save_dir", str(tmp_path), "--test_size", str(rows // 2)]
    assert main(["merge_datasets", *flags]) == 0
    out = capsys.readouterr().out
    assert "samples of apple are in the test set; a smaller --test_size" in out
    assert main(["merge_datasets", *flags[:-1], "2", "--overwrite"]) == 0
    assert "nothing of whole is in the test set" in capsys.readouterr().out


def test_a_source_that_was_taken_in_anew_must_be_tokenized_anew(tmp_path: Path, prepare: Prepare) -> None:
    prepare({"apple": marked_texts("apple", 40)}, sequence_length=64)
    merge(tmp_path, tmp_path, test_size=3)
    (tmp_path / "own" / "apple.jsonl").write_bytes(json_lines(marked_texts("apple", 50)))
    take_local("apple", tmp_path / "own" / "apple.jsonl", tmp_path / "raw" / "apple")
    with pytest.raises(UserError, match=r"raw.apple names other files .* preprocess_datasets"):
        merge(tmp_path, tmp_path, test_size=3)


def test_other_content_of_the_same_size_must_be_tokenized_anew(tmp_path: Path, prepare: Prepare) -> None:
    prepare({"apple": marked_texts("apple", 40)}, sequence_length=64)
    own = tmp_path / "own" / "apple.jsonl"
    own.write_bytes(own.read_bytes().replace(b"lorem", b"other"))
    take_local("apple", own, tmp_path / "raw" / "apple")
    with pytest.raises(UserError, match=r"apple.jsonl has other content than when 'apple' .* preprocess_datasets"):
        merge(tmp_path, tmp_path, test_size=3)


def test_other_content_of_a_large_source_of_the_same_size_must_be_tokenized_anew(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only files that were written to are read; what was written anew with the same content is the same."""
    for part in (preprocess, manifest_module, module):
        monkeypatch.setattr(part, "MAX_IDENTITY_BYTES", 0)
    read: list[Path] = []

    def sha256(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr(module, "file_sha256", sha256)
    prepare({"apple": marked_texts("apple", 40), "pear": marked_texts("pear", 40)}, sequence_length=64)
    merge(tmp_path, tmp_path, test_size=3)
    assert read == []
    own = tmp_path / "own" / "apple.jsonl"
    content = own.read_bytes()
    own.write_bytes(content)
    os.utime(own, ns=(1, 1))
    merge(tmp_path, tmp_path, test_size=3)
    assert read == [own]
    middle = len(content) // 2
    own.write_bytes(content[:middle] + content[middle:].replace(b"lorem", b"other", 1))
    os.utime(own, ns=(2, 2))
    with pytest.raises(UserError, match=r"apple.jsonl has other content than when 'apple' .* preprocess_datasets"):
        merge(tmp_path, tmp_path, test_size=3)
    own.unlink()
    merge(tmp_path, tmp_path, test_size=3)


def test_a_test_set_of_more_than_half_is_refused(tmp_path: Path, prepare: Prepare) -> None:
    rows = prepare({"a": marked_texts("a", 40)}, sequence_length=64)["a"].samples["all"]["a"].samples
    with pytest.raises(UserError, match=f"more than half of the {rows} samples; .* such as {rows // 20},"):
        merge(tmp_path, tmp_path, test_size=rows // 2 + 1)


def test_a_small_set_gives_a_twentieth_to_the_test_set(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare({"talk": chats(200)}, sequence_length=64, padding="max_length")
    assert main(["merge_datasets", "--datasets_dir", str(tmp_path), "--save_dir", str(tmp_path)]) == 0
    assert "finetune: --test_size was not given, so it is 10: 5% of the samples" in capsys.readouterr().out
    assert Manifest.read(tmp_path / "finetune").split_counts("test").samples == 10


def test_a_source_beside_what_was_cleared_of_it_is_said(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare({"a": marked_texts("a", 40), "a-dedup": marked_texts("a", 30)}, sequence_length=64)
    merge(tmp_path, tmp_path)
    assert "warning: a and a-dedup are merged together" in capsys.readouterr().out


@pytest.mark.usefixtures("small_steps")
def test_a_dealt_file_that_lost_its_end_is_dealt_again(
    two_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a loss of power."""
    merge(two_sources, tmp_path / "whole", test_size=30)

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_shuffle", killed)
        with pytest.raises(Killed):
            merge(two_sources, tmp_path / "two", test_size=30)
    dealt = tmp_path / "two" / ".tmp-pretrain" / "work" / "dealt-00000.arrow"
    dealt.write_bytes(dealt.read_bytes()[:-1000])
    merge(two_sources, tmp_path / "two", test_size=30)
    assert contents(tmp_path / "two" / "pretrain") == contents(tmp_path / "whole" / "pretrain")


def test_runs_are_limited_by_the_rows_that_they_deal(two_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows, or many copies; the cut into runs changes no byte, nor does it matter how many files are open."""
    honest = module.deal
    counts: Counter[str] = Counter()

    def counted(task: Any) -> Any:
        counts["/".join(task.path.parts[-4:-2])] += 1
        return honest(task)

    monkeypatch.setattr(module, "deal", counted)
    merge(two_sources, two_sources / "one", test_size=30)
    monkeypatch.setattr(module, "_RUN_ROWS", 200)
    monkeypatch.setattr(shuffle, "_MOST_OPEN", 1)
    merge(two_sources, two_sources / "many", test_size=30)
    made = rows_of(two_sources / "one" / "pretrain")
    whole = (len(made["train"]) + len(made["test"])) / 200
    many = counts.pop("many/.tmp-pretrain")
    assert max(3, whole) <= many <= whole + 2  # the last run of either source has fewer rows
    assert counts == {"one/.tmp-pretrain": 1, "one/.tmp-finetune": 1, "many/.tmp-finetune": 1}
    assert contents(two_sources / "one" / "pretrain") == contents(two_sources / "many" / "pretrain")


@pytest.mark.parametrize("copies", [1, 2])
def test_a_unit_dealt_in_parts_is_dealt_as_a_whole(
    two_sources: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    """Into several shards, or it would not matter what the rows of a part draw; all rows equally often."""
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 64)
    mix = Mix.parse("apple=1")
    place = two_sources / "whole"
    taken = merge(two_sources, place, test_size=30, mix=mix)["pretrain"].settings["mixture"]["apple"]
    tokens = None if copies == 1 else copies * taken["tokens_there"]
    if tokens is not None:
        merge(two_sources, place, test_size=30, mix=mix, tokens=tokens, overwrite=True)
    rows = Manifest.read(two_sources / "tokenized" / "apple").samples["all"]["apple"].samples
    monkeypatch.setattr(module, "_RUN_ROWS", copies * -(-rows // 3))
    parted: list[int] = []
    honest = shuffle.UnitFile.parts

    def parts(self: Any, most_rows: int) -> Any:
        found = honest(self, most_rows)
        parted.append(len(found))
        return found

    monkeypatch.setattr(shuffle.UnitFile, "parts", parts)
    merge(two_sources, two_sources / "parts", test_size=30, mix=mix, tokens=tokens)
    assert parted[0] == 3
    one, other = Manifest.read(place / "pretrain"), Manifest.read(two_sources / "parts" / "pretrain")
    assert one.split_counts("train").samples == copies * (rows - 30)
    assert len(one.files) > 3
    assert one.files == other.files


def test_what_a_shuffling_process_is_given_does_not_grow_with_the_shards(
    two_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = module.start_shuffling
    sizes: list[int] = []

    def start(*arguments: Any) -> None:
        sizes.append(len(pickle.dumps(arguments)))
        honest(*arguments)

    monkeypatch.setattr(module, "start_shuffling", start)
    for rows in (1024, 16):
        monkeypatch.setattr(module, "ROWS_PER_SHARD", rows)
        merge(two_sources, two_sources / f"{rows:04d}", test_size=30)
    assert sizes[:2] == sizes[2:]


def free_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))


@pytest.mark.parametrize("mix", [None, "apple=0.9,pear=0.1"])
@pytest.mark.parametrize("times", [None, 40])
def test_a_set_that_the_disk_does_not_hold_is_refused(
    two_sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mix: str | None,
    times: int | None,
) -> None:
    """The estimate is near what is written, the set and once more what is dealt, and less room is refused."""
    weights = None if mix is None else Mix.parse(mix)
    there = [Manifest.read(two_sources / "tokenized" / name).split_counts("all").tokens for name in ("apple", "pear")]
    tokens = None if times is None else times * sum(there)
    honest = module._shuffle
    dealt: list[int] = []

    def shuffled(job: Any, folder: Path, runs: list[Path], *arguments: Any) -> Any:
        dealt.append(sum(path.stat().st_size for path in runs))
        return honest(job, folder, runs, *arguments)

    monkeypatch.setattr(module, "_shuffle", shuffled)
    free_disk(monkeypatch, 0)
    with pytest.raises(UserError, match=r"pretrain: .* bytes\) are free at .*\. Free some space") as raised:
        merge(two_sources, two_sources, test_size=30, mix=weights, tokens=tokens)
    assert ("choose fewer --tokens" in str(raised.value)) == (tokens is not None)
    assert left_over(two_sources) == []
    need = int(re.findall(r"\(([\d,]+) bytes\) are to be written", str(raised.value))[0].replace(",", ""))
    free_disk(monkeypatch, need)
    manifest = merge(two_sources, two_sources, test_size=30, mix=weights, tokens=tokens)["pretrain"]
    written = sum(file.bytes for file in manifest.files) + dealt[0]
    assert written == pytest.approx(need, rel=0.1)
    said = re.search(r"pretrain: about ([\d,]+) tokens and .* MB, and as much again", capsys.readouterr().out)
    assert said is not None
    assert int(said[1].replace(",", "")) == pytest.approx(manifest.split_counts("train").tokens, rel=0.1)


def test_what_an_interrupted_run_wrote_needs_no_room(two_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set is still to be written, and no more; what there is is kept where there is no room for that."""

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_shuffle", killed)
        with pytest.raises(Killed):
            merge(two_sources, two_sources, test_size=30)
    left = left_over(two_sources)
    size = sum(Manifest.read(two_sources / "tokenized" / name).files[0].bytes for name in ("apple", "pear"))
    free_disk(monkeypatch, size // 2)
    with pytest.raises(UserError, match="are to be written yet"):
        merge(two_sources, two_sources, test_size=30)
    assert left_over(two_sources) == left
    free_disk(monkeypatch, size)
    merge(two_sources, two_sources, test_size=30)


def test_very_short_documents_make_fewer_candidates(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the documents in their rows: what is held for each does not depend on its length."""
    prepare({"short": [{"text": f"{number}"} for number in range(3000)]}, sequence_length=128)
    honest = module.read_candidates
    rows: list[int] = []

    def read(*args: Any, **options: Any) -> Any:
        found = honest(*args, **options)
        rows.append(len(found.rows))
        return found

    monkeypatch.setattr(module, "read_candidates", read)
    merge(tmp_path, tmp_path / "all", test_size=3)
    monkeypatch.setattr(module, "_CANDIDATE_PIECES", 300)
    manifest = merge(tmp_path, tmp_path / "some", test_size=3)["pretrain"]
    assert manifest.settings["candidates"] == "some"
    assert manifest.split_counts("test").samples == 3
    assert rows[1] < rows[0] / 2
