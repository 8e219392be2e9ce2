"""Opening a prepared set, and the collator against a slow, obvious one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from doge_lm.data import merge as merge_module
from doge_lm.data import storage
from doge_lm.data.dataset import PackedCollator, TrainingRows, count_targets, count_tokens, load_prepared
from doge_lm.data.manifest import FORMAT_VERSION, Manifest
from doge_lm.data.merge import merge
from doge_lm.errors import UserError
from doge_lm.model.document_attention import document_blocks
from tests.data.conftest import conversation

Prepare = Callable[..., dict[str, Manifest]]
LENGTH = 64


@pytest.fixture
def prepared(tmp_path: Path, prepare: Prepare) -> Path:
    texts = [{"text": "lorem ipsum " * (n % 50 + 1), "prompt": f"number {n}"} for n in range(60)]
    chats = [conversation(("human", f"{n} plus {n}"), ("gpt", f"{2 * n}")) for n in range(100)]
    prepare({"text": texts, "chat": chats}, sequence_length=LENGTH)
    merge(tmp_path, tmp_path, test_size=5)
    return tmp_path


def slow_batch(rows: list[Any], pad: int, length: int) -> dict[str, list[list[int]]]:
    """The collator's result, token by token."""
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        ids, labels, positions = [], [], []
        spans = list(zip(row["context_spans"][::2], row["context_spans"][1::2], strict=True))
        for count in row["document_lengths"]:
            for position in range(count):
                index = len(ids)
                token = int(row["input_ids"][index])
                context = any(start <= index < end for start, end in spans)
                ids.append(token)
                labels.append(-100 if position == 0 or context else token)
                positions.append(position)
        filling = length - len(ids)
        batch["input_ids"].append(ids + [pad] * filling)
        batch["labels"].append(labels + [-100] * filling)
        batch["position_ids"].append(positions + list(range(filling)))
    return batch


def random_row(generator: np.random.Generator, length: int, padded: bool) -> dict[str, Any]:
    lengths: list[int] = []
    while sum(lengths) < length - 2 and generator.random() < 0.9:
        lengths.append(int(generator.integers(2, length - sum(lengths) + 1)))
    lengths = lengths or [2]
    spans: list[int] = []
    begin = 0
    for count in lengths:
        inside = sorted(generator.choice(np.arange(1, count + 1), min(count, 4), replace=False).tolist())
        for start, end in zip(inside[::2], inside[1::2], strict=False):
            spans += [begin + start, begin + end]
        begin += count
    ids = generator.integers(3, 30_000, begin)
    if padded:
        ids = np.concatenate([ids, np.zeros(length - begin, np.int64)])
    return {
        "input_ids": ids.astype(np.uint16),
        "document_lengths": np.array(lengths, np.int32),
        "context_spans": np.array(spans, np.int32),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_the_collator_equals_a_slow_one(padded: bool, document_mask: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = [random_row(generator, 40, padded) for _ in range(8)]
    batch = PackedCollator(0, 40, document_mask)(rows)
    expected = slow_batch(rows, 0, 40)
    assert set(batch) == {"input_ids", "labels"} | ({"position_ids", "cu_seq_lens_q"} if document_mask else set())
    starts = batch.pop("cu_seq_lens_q", None)
    if starts is not None:
        assert starts.dtype == torch.int32
        begins = [at for at, position in enumerate(batch["position_ids"].flatten().tolist()) if position == 0]
        assert starts.tolist() == begins + [8 * 40] * (len(starts) - len(begins))
        assert len(starts) > len(begins)
    for name, values in batch.items():
        assert values.dtype == torch.int64
        assert values.shape == (8, 40)
        assert values.tolist() == expected[name]


def test_the_lengths_have_one_of_two_sizes() -> None:
    """A model is compiled for each; the compiler gives up after eight graphs, evaluation and last batches included."""
    collator = PackedCollator(0, 1024, True)
    sizes = []
    for pieces in (1, 8, 32, 64, 128, 512, 1024):
        row = {"input_ids": np.ones(1024), "document_lengths": [1024 // pieces] * pieces, "context_spans": []}
        lengths = collator([row] * 8)["cu_seq_lens_q"]
        assert lengths.unique().tolist() == [*range(0, 8 * 1024, 1024 // pieces), 8 * 1024]
        sizes.append(len(lengths) - 1)
    assert sizes == [256, 256, 256, 8192, 8192, 8192, 8192]
    for tokens in (1, 3, 40, 100):
        row = {"input_ids": np.ones(tokens), "document_lengths": [1] * tokens, "context_spans": []}
        assert PackedCollator(0, tokens, True)([row])["cu_seq_lens_q"].tolist() == list(range(tokens + 1))


@pytest.mark.parametrize("length", [128, 256, 1024])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_blocks_are_those_that_the_model_finds(length: int, batch_size: int) -> None:
    generator = np.random.default_rng(length)
    rows = [random_row(generator, length, padded=bool(b % 2)) for b in range(batch_size - 1)]
    rows.append({"input_ids": np.ones(length), "document_lengths": [1] * length, "context_spans": []})
    batch = PackedCollator(0, length, True, document_blocks=True)(rows)
    expected = document_blocks(batch["position_ids"])._asdict()
    assert list(batch["document_blocks"]) == list(expected)
    for name, part in batch["document_blocks"].items():
        assert part.dtype == torch.int32
        assert torch.equal(part, expected[name]), name
        assert part.stride() == expected[name].stride(), name  # a compiled model looks at these too


@pytest.mark.parametrize(
    ("length", "document_mask", "asked"), [(192, True, True), (64, True, True), (128, False, True), (128, True, False)]
)
def test_no_blocks_but_of_whole_ones(length: int, document_mask: bool, asked: bool) -> None:
    row = random_row(np.random.default_rng(0), length, padded=False)
    assert "document_blocks" not in PackedCollator(0, length, document_mask, document_blocks=asked)([row])


def test_spans_that_touch_each_other_and_the_end() -> None:
    row = {"input_ids": np.arange(3, 11), "document_lengths": [8], "context_spans": [1, 3, 3, 4, 6, 8]}
    assert PackedCollator(0, 8)([row])["labels"].tolist() == [[-100, -100, -100, -100, 7, 8, -100, -100]]
    labels = PackedCollator(0, 10)([row])["labels"].tolist()
    assert labels == [[-100, -100, -100, -100, 7, 8, -100, -100, -100, -100]]


def test_a_row_that_is_too_long_is_refused() -> None:
    row = {"input_ids": np.arange(9), "document_lengths": [9], "context_spans": []}
    with pytest.raises(ValueError, match="9 tokens does not fit into sequence_length 8"):
        PackedCollator(0, 8)([row])


def test_ids_outside_the_vocabulary_are_refused() -> None:
    row = {"input_ids": np.array([1, 5, 9], np.uint16), "document_lengths": [3], "context_spans": []}
    assert PackedCollator(0, 4, vocab_size=10)([row])["input_ids"].tolist() == [[1, 5, 9, 0]]
    with pytest.raises(UserError, match="holds the token id 9, but the vocabulary has 9 ids"):
        PackedCollator(0, 4, vocab_size=9)([row])


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_prepared_set_through_a_data_loader(prepared: Path, kind: str) -> None:
    prepared_set = load_prepared(prepared / kind)
    assert prepared_set.manifest.kind == kind
    collator = PackedCollator(prepared_set.manifest.tokenizer.pad_token_id, LENGTH, document_mask=True)
    targets = tokens = 0
    for batch in DataLoader(prepared_set.train, batch_size=4, collate_fn=collator):  # type: ignore[arg-type]
        targets += int((batch["labels"] != -100).sum())
        tokens += int((batch["input_ids"] != 0).sum())
        assert batch["input_ids"].shape[1] == LENGTH
        learned = batch["labels"] != -100
        assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    counts = prepared_set.manifest.split_counts("train")
    assert targets == counts.targets == count_targets(prepared_set.train)
    assert tokens == counts.tokens == count_tokens(prepared_set.train)
    assert len(prepared_set.test) == 5


def test_the_sizes_of_the_shards_are_known(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_prepared(prepared / "pretrain")
    assert (whole.train_shards, whole.test_shards) == ((len(whole.train),), (5,))
    monkeypatch.setattr(merge_module, "ROWS_PER_SHARD", 20)
    merge(prepared, prepared / "small", test_size=5)
    small = load_prepared(prepared / "small" / "pretrain")
    files = sorted((prepared / "small" / "pretrain" / "train").glob("*.arrow"))
    assert len(small.train_shards) == len(files) > 1
    assert list(small.train_shards) == [len(Dataset.from_file(str(file))) for file in files]


def test_counting_follows_a_selection(prepared: Path) -> None:
    train = load_prepared(prepared / "pretrain").train
    some = train.select([5, 2, 7])
    assert count_tokens(some) == sum(int(train[i]["document_lengths"].sum()) for i in (2, 5, 7))
    spans = [train[i]["context_spans"] for i in (2, 5, 7)]
    context = sum(int(span[1::2].sum() - span[::2].sum()) for span in spans)
    pieces = sum(len(train[i]["document_lengths"]) for i in (2, 5, 7))
    assert count_targets(some) == count_tokens(some) - pieces - context


def test_a_missing_set_says_which_commands_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`doge-lm preprocess_datasets` and then `doge-lm merge_datasets`") as raised:
        load_prepared(tmp_path / "none")
    assert str(tmp_path / "none") in str(raised.value)


def test_what_is_not_a_prepared_set(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean .*pretrain\?"):
        load_prepared(prepared)
    with pytest.raises(UserError, match="is not a prepared data set"):
        load_prepared(prepared / "raw")
    with pytest.raises(UserError, match="is a tokenized source"):
        load_prepared(prepared / "tokenized" / "text")


def test_another_version(prepared: Path) -> None:
    path = prepared / "pretrain" / "manifest.json"
    text = path.read_text(encoding="utf-8")
    now = f'"format_version": {FORMAT_VERSION}'
    assert now in text
    path.write_text(text.replace(now, '"format_version": 99'), encoding="utf-8")
    with pytest.raises(UserError, match=f"format version 99, this doge-lm reads version {FORMAT_VERSION}"):
        load_prepared(prepared / "pretrain")


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_a_truncated_arrow_file(prepared: Path, cut: int) -> None:
    path = prepared / "pretrain" / "train" / "data-00000.arrow"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"train/data-00000\.arrow is truncated") as raised:
        load_prepared(prepared / "pretrain")
    assert "merge_datasets" in str(raised.value) or "make" in str(raised.value)


def test_damage_that_leaves_the_size(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepared / "pretrain" / "train" / "data-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train/data-00000\.arrow is damaged: its sha256 is"):
        load_prepared(prepared / "pretrain")
    # Of a set too large to be hashed each time, only the sizes are looked at.
    monkeypatch.setattr(storage, "MAX_HASHED_BYTES", len(content) - 1)
    load_prepared(prepared / "pretrain")


def test_files_that_are_gone_or_broken(prepared: Path) -> None:
    shutil.copytree(prepared / "pretrain", prepared / "copy")
    (prepared / "copy" / "dataset_dict.json").unlink()
    with pytest.raises(UserError, match="is damaged"):
        load_prepared(prepared / "copy")
    arrow = prepared / "pretrain" / "test" / "data-00000.arrow"
    arrow.write_bytes(b"\0" * arrow.stat().st_size)
    with pytest.raises(UserError, match="is damaged"):
        load_prepared(prepared / "pretrain")
    arrow.unlink()
    with pytest.raises(UserError, match=r"data-00000\.arrow is missing"):
        load_prepared(prepared / "pretrain")


def test_training_rows_are_the_rows_of_the_set(prepared: Path) -> None:
    train = load_prepared(prepared / "finetune").train
    rows = TrainingRows(train)
    assert len(rows) == len(train) > 10
    numbers = np.random.default_rng(1).integers(0, len(train), 25).tolist()  # some twice
    for found, expected in zip([*rows.__getitems__(numbers), rows[3]], [train[n] for n in [*numbers, 3]], strict=True):
        assert set(found) == set(TrainingRows.COLUMNS)
        for name, values in found.items():
            assert np.array_equal(values, expected[name])
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_training_rows_through_workers_are_those_of_one_process(prepared: Path) -> None:
    rows = TrainingRows(load_prepared(prepared / "pretrain").train)
    collate = PackedCollator(0, LENGTH, document_mask=True)
    one, two = (
        list(DataLoader(rows, 4, collate_fn=collate, num_workers=n, multiprocessing_context="spawn" if n else None))
        for n in (0, 1)
    )
    assert len(one) == len(two) > 1
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
