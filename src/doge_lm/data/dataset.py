"""The prepared set that training reads, and the collator that makes batches of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, load_from_disk
from torch.utils.data import Dataset as TorchDataset

from doge_lm.data.manifest import KINDS, MANIFEST_NAME, Manifest
from doge_lm.data.storage import check_files, flat_values
from doge_lm.errors import UserError

IGNORED_LABEL = -100
# Where the pieces of a batch have as many tokens on average, `cu_seq_lens_q` has its usual size. It says nothing of
# other batches but that there is one number for each token, which costs some time.
_USUAL_PIECE = 32
_FEWEST_PIECES = 64
# Of `doge_lm.model.document_attention`, which the processes that make batches need not load.
_BLOCK = 128
_HOW_TO_MAKE = (
    "make it with `doge-lm preprocess_datasets` and then `doge-lm merge_datasets` (`doge-lm download_datasets` comes "
    "before them; see --help of each)"
)
_COUNT_ROWS = 2**14


@dataclass(frozen=True)
class PreparedSet:
    """A training set and its test set, in numpy format, with the columns of `doge_lm.data.storage.row_features`.

    `train_shards` and `test_shards` are the rows of their arrow files, in order: the rows of a file lie side by side,
    so that an order that keeps to a file for a while reads the disk in long stretches.
    """

    train: Dataset
    test: Dataset
    manifest: Manifest
    train_shards: tuple[int, ...]
    test_shards: tuple[int, ...]


def load_prepared(path: str | Path) -> PreparedSet:
    """Opens what `merge_datasets` wrote, as memory maps.

    Of a set of up to 4 GiB the content of every file is checked first, by its sha256; of a larger one only the sizes.

    Args:
        path: `SAVE_DIR/pretrain` or `SAVE_DIR/finetune`.

    Raises:
        UserError: if it is missing, is not a prepared set, is of another format version, or a file is damaged.
    """
    directory = Path(path)
    if not directory.exists():
        raise UserError(f"there is no prepared data set at {directory}; {_HOW_TO_MAKE}")
    if not (directory / MANIFEST_NAME).is_file():
        inside = [directory / kind for kind in KINDS if (directory / kind / MANIFEST_NAME).is_file()]
        hint = f"did you mean {inside[0]}?" if inside else _HOW_TO_MAKE
        raise UserError(f"{directory} is not a prepared data set (no {MANIFEST_NAME} in it); {hint}")
    manifest = Manifest.read(directory)
    if manifest.stage != "merged":
        raise UserError(
            f"{directory} is a tokenized source, not a prepared data set; run `doge-lm merge_datasets` and give its "
            "result"
        )
    check_files(directory, manifest.files)
    try:
        loaded = load_from_disk(str(directory), keep_in_memory=False)
        train, test = loaded["train"], loaded["test"]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is damaged ({error}); run `doge-lm merge_datasets` again") from error
    train_shards, test_shards = (
        tuple(file.rows for file in manifest.files if file.path.startswith(f"{split}/")) for split in ("train", "test")
    )
    if (len(train), len(test)) != (sum(train_shards), sum(test_shards)):
        raise UserError(
            f"{directory} does not hold the rows that its manifest says; run `doge-lm merge_datasets` again"
        )
    return PreparedSet(train.with_format("numpy"), test.with_format("numpy"), manifest, train_shards, test_shards)


class TrainingRows(TorchDataset):
    """What training needs of the rows of a prepared set, by number; several at once in one look-up.

    Gives the columns that `PackedCollator` reads, as numpy arrays. `datasets` in numpy format gives the same numbers;
    to fetch 32 rows of 2,048 tokens takes it 2.2 ms, and this 0.45.

    Args:
        dataset: a split of a prepared set.
    """

    COLUMNS = ("input_ids", "document_lengths", "context_spans")

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._table = dataset.select_columns(list(self.COLUMNS)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        """The rows of these numbers, in this order (PyTorch's data loader asks for a batch so)."""
        table = self._table[indices]
        columns = [flat_values(table.column(name).combine_chunks()) for name in self.COLUMNS]
        bounds = [offsets.tolist() for _, offsets in columns]
        return [
            {
                name: values[ends[row] : ends[row + 1]]
                for name, (values, _), ends in zip(self.COLUMNS, columns, bounds, strict=True)
            }
            for row in range(len(indices))
        ]


def count_tokens(dataset: Dataset) -> int:
    """Real tokens of a prepared split (padding left out), without a loop over rows."""
    return sum(int(_values(batch, "document_lengths").sum()) for batch in _batches(dataset, ["document_lengths"]))


def count_targets(dataset: Dataset) -> int:
    """Tokens of a prepared split that the loss covers, without a loop over rows."""
    total = 0
    for batch in _batches(dataset, ["document_lengths", "context_spans"]):
        lengths = _values(batch, "document_lengths")
        spans = _values(batch, "context_spans")
        total += int(lengths.sum()) - len(lengths) - int((spans[1::2] - spans[::2]).sum())
    return total


def _batches(dataset: Dataset, columns: list[str]) -> Any:
    return dataset.select_columns(columns).with_format("arrow").iter(batch_size=_COUNT_ROWS)


def _values(table: pa.Table, column: str) -> np.ndarray:
    parts = [flat_values(chunk)[0] for chunk in table.column(column).chunks]
    return np.concatenate([np.empty(0, np.int64), *parts])


@dataclass(frozen=True)
class PackedCollator:
    """Rows of a prepared set -> a batch of fixed shape.

    Labels follow transformers' convention: the model shifts them, so `labels[b, t]` is `input_ids[b, t]` where token
    t is a target, and -100 where it is the first of its piece, context, or padding. There is no attention mask:
    padding stands to the right, where a causal model does not look.

    Attributes:
        pad_token_id: fills up rows that are shorter than `sequence_length`.
        sequence_length: T, the same for every batch.
        document_mask: also give `position_ids` that restart at 0 at every piece (and once more where the padding
            begins), by which attention can be kept within documents, and `cu_seq_lens_q`.
        vocab_size: if given, ids that are not below it are refused.
        document_blocks: with `document_mask`, where T is a multiple of 128, also give `document_blocks`.
    """

    pad_token_id: int
    sequence_length: int
    document_mask: bool = False
    vocab_size: int | None = None
    document_blocks: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            rows: B rows with `input_ids`, `document_lengths` and `context_spans`.

        Returns:
            `input_ids` and `labels`, and with `document_mask` `position_ids`: int64, (B, T). With it also
            `cu_seq_lens_q`, int32: where pieces begin in the B·T tokens, then B·T up to one of two sizes. If asked for,
            `document_blocks`: the fields of `doge_lm.model.document_attention.DocumentBlocks`.

        Raises:
            ValueError: if a row is longer than `sequence_length`.
            UserError: if a token id is outside the vocabulary.
        """
        T = self.sequence_length
        ids_BT = np.full((len(rows), T), self.pad_token_id, np.int64)
        # One extra column takes the ends of stretches that reach the end of a row.
        context_BT1 = np.zeros((len(rows), T + 1), np.int32)
        first_BT1 = np.zeros((len(rows), T + 1), np.bool_)
        for b, row in enumerate(rows):
            ids = row["input_ids"]
            if len(ids) > T:
                raise ValueError(f"a row of {len(ids)} tokens does not fit into sequence_length {T}")
            ids_BT[b, : len(ids)] = ids
            ends = np.cumsum(row["document_lengths"], dtype=np.int64)
            first_BT1[b, 0] = True
            first_BT1[b, ends] = True  # beginnings of the pieces behind the first, and of the padding
            spans = np.asarray(row["context_spans"], np.int64)
            context_BT1[b, spans[::2]] = 1
            context_BT1[b, spans[1::2]] -= 1  # where one span ends and the next begins, the two cancel
            filled = int(ends[-1]) if len(ends) else 0
            context_BT1[b, filled] += 1  # padding: open to the end
        if self.vocab_size is not None and ids_BT.max(initial=0) >= self.vocab_size:
            raise UserError(
                f"the data set holds the token id {ids_BT.max():,}, but the vocabulary has {self.vocab_size:,} ids: it "
                "is damaged, or was made with another tokenizer; run preprocess_datasets and merge_datasets again"
            )
        ignored_BT = (np.cumsum(context_BT1, axis=1)[:, :T] > 0) | first_BT1[:, :T]
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids_BT),
            "labels": torch.from_numpy(np.where(ignored_BT, IGNORED_LABEL, ids_BT)),
        }
        if self.document_mask:
            batch["position_ids"] = torch.from_numpy(_positions(first_BT1[:, :T]))
            batch["cu_seq_lens_q"] = torch.from_numpy(_cumulative_lengths(first_BT1[:, :T]))
            if self.document_blocks and T % _BLOCK == 0:
                blocks = _document_blocks(first_BT1[:, :T])
                batch["document_blocks"] = {name: torch.from_numpy(part) for name, part in blocks.items()}
        return batch


def _positions(first_BT: np.ndarray) -> np.ndarray:
    """Counts from 0 anew at every True; the first column is True."""
    index_BT = np.broadcast_to(np.arange(first_BT.shape[1], dtype=np.int64), first_BT.shape)
    return index_BT - np.maximum.accumulate(np.where(first_BT, index_BT, 0), axis=1)


def _cumulative_lengths(first_BT: np.ndarray) -> np.ndarray:
    """Where pieces begin, then B·T: of one of two sizes, since a compiled model is compiled anew for every size."""
    starts = np.flatnonzero(first_BT)
    tokens = first_BT.size
    usual = min(tokens, max(_FEWEST_PIECES, tokens // _USUAL_PIECE))
    lengths = np.full((usual if len(starts) <= usual else tokens) + 1, tokens, np.int32)
    lengths[: len(starts)] = starts
    return lengths


def _document_blocks(first_BT: np.ndarray) -> dict[str, np.ndarray]:
    """As `doge_lm.model.document_attention.document_blocks`, of where pieces begin."""
    documents_BT = np.cumsum(first_BT, axis=1, dtype=np.int32)
    first_BJ, last_BJ = documents_BT[:, ::_BLOCK], documents_BT[:, _BLOCK - 1 :: _BLOCK]
    blocks_in_row = first_BJ.shape[1]
    index_J = np.arange(blocks_in_row, dtype=np.int32)
    before_JJ = index_J[None, :] < index_J[:, None]
    full_BJJ = before_JJ & (first_BJ[:, None, :] == last_BJ[:, :, None])
    seen_BJJ = (before_JJ & (last_BJ[:, None, :] >= first_BJ[:, :, None])) | (index_J[None, :] == index_J[:, None])
    blocks = {"documents": documents_BT}
    for kind, listed_BJJ in (("partial", seen_BJJ & ~full_BJJ), ("full", full_BJJ)):
        # Listed columns first: twice as fast as argsort.
        indices_BJJ = np.sort(np.where(listed_BJJ, index_J, index_J + blocks_in_row), axis=-1) % blocks_in_row
        # Reshaped, since a dimension made by None has the stride 0, not the usual one.
        blocks[f"{kind}_counts"] = listed_BJJ.sum(-1, dtype=np.int32).reshape(-1, 1, blocks_in_row)
        blocks[f"{kind}_indices"] = indices_BJJ.reshape(-1, 1, blocks_in_row, blocks_in_row)
    return blocks
