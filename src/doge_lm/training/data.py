"""What a run reads: a prepared set, or a stream of text that is tokenized and packed meanwhile."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from doge_lm.data.dataset import TrainingRows, load_prepared
from doge_lm.data.encoders import choose_backend
from doge_lm.data.streaming import (
    HeldOut,
    RowStream,
    StreamSettings,
    StreamSource,
    StreamState,
    held_out_dataset,
    hold_out,
    open_source,
    sample_texts,
)
from doge_lm.data.tokenizer import tokenizer_sha256
from doge_lm.errors import UserError
from doge_lm.training.settings import TrainSettings

_HOW_TO_MAKE_DATA = (
    "make it with:\n"
    "  python scripts/download_datasets.py --save_dir ./datasets --cache_dir ./datasets/cache --num_proc 4\n"
    "  python scripts/preprocess_datasets.py --datasets_dir ./datasets --save_dir ./datasets "
    "--tokenizer_path ./tokenizer --max_len {sequence_length} --num_proc 4\n"
    "  python scripts/merge_datasets.py --datasets_dir ./datasets --save_dir ./datasets --num_proc 4\n"
    "or give the place of a prepared set with --dataset_path, or text with --set stream=PATH"
)


@dataclass(frozen=True)
class TrainingData:
    """Training and test set.

    Attributes:
        train: rows by index.
        test: rows by index, in numpy format.
        sha256: stands for the content.
        tokenizer_sha256: of the tokenizer that the rows are made with.
        shards: rows of each shard of a prepared training set.
        stream: the training set, if it is a stream.
    """

    train: TrainingRows | RowStream
    test: Dataset
    sha256: str
    tokenizer_sha256: str
    shards: tuple[int, ...] = ()
    stream: RowStream | None = None

    @property
    def rows(self) -> int:
        """Rows of the training set; 0 for a stream, which has no end."""
        return sum(self.shards)

    def opened(self) -> AbstractContextManager[object]:
        """A context at whose end the processes of a stream are ended."""
        return nullcontext() if self.stream is None else closing(self.stream)


def load_prepared_data(train: TrainSettings, tokenizer_path: Path, kind: str | None = None) -> TrainingData:
    """Opens the prepared set of the settings, of one kind ("pretrain", "finetune") or any.

    Raises:
        UserError: if it is missing or damaged, or was made for another tokenizer or sequence length.
    """
    path = Path(train.dataset_path)
    if not path.is_dir():
        how = _HOW_TO_MAKE_DATA.format(sequence_length=train.sequence_length)
        raise UserError(f"dataset_path {path} does not exist; {how}")
    data = load_prepared(path)
    if kind is not None and data.manifest.kind != kind:
        raise UserError(
            f"{path} is a set of the kind {data.manifest.kind!r}; give --dataset_path one of the kind {kind!r}, which "
            "merge_datasets writes beside it if there are such sources"
        )
    made_with = data.manifest.tokenizer
    if made_with.sha256 != tokenizer_sha256(tokenizer_path):
        raise UserError(
            f"{path} was made with another tokenizer than {tokenizer_path}; give the one it was made with by "
            "--tokenizer_path, or run preprocess_datasets and merge_datasets again with this one"
        )
    if data.manifest.sequence_length != train.sequence_length:
        raise UserError(
            f"{path} holds sequences of {data.manifest.sequence_length} tokens and sequence_length is "
            f"{train.sequence_length}; --set sequence_length={data.manifest.sequence_length}, or preprocess again with "
            f"--max_len {train.sequence_length}"
        )
    shards = tuple(file.rows for file in data.manifest.files if file.path.startswith("train/"))
    if sum(shards) != len(data.train):
        raise UserError(
            f"{path} is damaged: its manifest counts {sum(shards):,} rows of the training set, and the files hold "
            f"{len(data.train):,}; run merge_datasets again"
        )
    files = [[file.path, file.sha256] for file in data.manifest.files]
    sha256 = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return TrainingData(TrainingRows(data.train), data.test, sha256, made_with.sha256, shards)


@dataclass(frozen=True)
class StreamedText:
    """Text that is about to be streamed, and its test set.

    Attributes:
        source: the text.
        settings: what becomes of it.
        held_out: the test set.
        test: the same, as a prepared set gives it.
        workers: processes that tokenize and pack.
        note: what tokenizes, and why it is not the faster backend, for the user.
    """

    source: StreamSource
    settings: StreamSettings
    held_out: HeldOut
    test: Dataset
    workers: int
    note: str

    @classmethod
    def open(cls, train: TrainSettings, tokenizer_path: Path, vocab_size: int) -> "StreamedText":
        """Opens what the setting `stream` names, chooses what tokenizes it, and draws the test set.

        Raises:
            UserError: if it is not there, holds too little, or a row is bad.
        """
        assert train.stream is not None
        source = open_source(train.stream)
        backend, slow = choose_backend(tokenizer_path, "auto", sample_texts(source, train.seed))
        settings = StreamSettings(
            tokenizer_path, train.sequence_length, train.seed, train.stream_on_error == "skip", backend
        )
        held_out = hold_out(source, settings, train.stream_test_rows)
        test = held_out_dataset(held_out, vocab_size)
        note = slow or f"tokenizing with the faster backend `{backend}`"
        return cls(source, settings, held_out, test, train.stream_workers, note)

    def start(self, length: int, state: StreamState | None, report: Callable[[str], None]) -> TrainingData:
        """Training and test set of a run; the processes are started when the first row is asked for.

        Args:
            length: rows of the run.
            state: where to begin; at the beginning by default.
            report: told what tokenizes, and of the first bad row of every kind that is left out.

        Raises:
            UserError: if the state is of other text.
        """
        report(self.note)
        stream = RowStream(
            self.source,
            self.settings,
            self.held_out,
            length=length,
            workers=self.workers,
            start=state,
            report=report,
        )
        return TrainingData(
            stream, self.test, self.source.identity, tokenizer_sha256(self.settings.tokenizer_path), stream=stream
        )


class Opened(NamedTuple):
    """Data that was found and checked, before the run is planned.

    Attributes:
        rows: rows of the training set; None for a stream.
        start: gives the data of a run, of so many rows and from a state on (both matter to a stream only).
    """

    rows: int | None
    start: Callable[[int, StreamState | None, Callable[[str], None]], TrainingData]


def open_data(train: TrainSettings, tokenizer_path: Path, vocab_size: int) -> Opened:
    """Opens what the settings name: `stream`, or else `dataset_path`.

    Raises:
        UserError: see `load_prepared_data` and `StreamedText.open`.
    """
    if train.stream is not None:
        return Opened(None, StreamedText.open(train, tokenizer_path, vocab_size).start)
    data = load_prepared_data(train, tokenizer_path)
    return Opened(data.rows, lambda length, state, report: data)
