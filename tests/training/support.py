"""A world of its own for the tests of training: a tokenizer of 400 pieces, a prepared set, a model of 41k weights."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from datasets import Dataset, DatasetDict

from doge_lm.data.manifest import Manifest, OutputFile, SampleCounts, SourceAccounting, TokenizerIdentity
from doge_lm.data.storage import row_features
from doge_lm.data.tokenizer import encode_batch, token_byte_lengths, tokenizer_sha256, train_tokenizer
from doge_lm.training.settings import parse_settings

ROOT = Path(__file__).parents[2]
LENGTH = 32
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
MODEL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_inner_values": 2,
    "inner_values_retrieval_size": 16,
    "cross_domain_intermediate_size": 64,
    "private_expert_intermediate_size": 16,
    "num_cdmmoe_experts": 16,
    "num_cdmmoe_experts_per_head": 2,
    "max_position_embeddings": 128,
    "hidden_dropout": 0.1,  # so that a resumed run must also restore the random numbers
}
TRAIN = {
    "sequence_length": LENGTH,
    "sequences_per_step": 8,
    "per_device_train_batch_size": 4,
    "per_epoch_max_steps": 6,
    "num_train_epochs": 2,
    "learning_rate": 3e-3,
    "bf16": False,
    "torch_compile": False,
    "logging_steps": 1,
    "eval_steps": 5,
    "save_steps": 3,
    "per_device_eval_batch_size": 4,
}


def make_settings(model=None, **train):
    """The tests' settings, with some `model:` and `train:` values changed."""
    return parse_settings({"model": {**MODEL, **(model or {})}, "train": {**TRAIN, **train}}, "test.yaml")


def make_tokenizer(directory):
    """Train the tests' tokenizer."""
    return train_tokenizer(list(topics.values()), MODEL["vocab_size"], directory)


def make_rows(tokenizer, count, group_start=0):
    """`count` rows of LENGTH tokens or a few less, one to three pieces in each, from the help texts of Python."""
    names = sorted(topics)
    widths = token_byte_lengths(tokenizer)
    stream = encode_batch(tokenizer, [topics[name] for name in names])
    pieces = [
        [tokenizer.bos_token_id, *ids[start : start + length - 1]]
        for ids in stream
        for start, length in zip(range(0, len(ids) - LENGTH, LENGTH), _lengths(), strict=False)
    ]
    rows = []
    for index in range(count):
        row, lengths = [], []
        while len(row) + len(pieces[0]) <= LENGTH:
            piece = pieces.pop(0)
            row += piece
            lengths.append(len(piece))
        spans = [1, 3] if index % 3 == 0 else []
        is_target = np.ones(len(row), bool)
        is_target[np.cumsum([0, *lengths[:-1]])] = False
        is_target[1:3] &= not spans
        rows.append(
            {
                "input_ids": row,
                "document_lengths": lengths,
                "context_spans": spans,
                "text_bytes": int(widths[np.array(row)][is_target].sum()),
                "source": ("english", "python")[index % 2],
                "group": group_start + index,
            }
        )
    return rows


def _lengths():
    while True:
        yield from (LENGTH, 9, 12, 7, LENGTH - 1, 20)


def make_set(directory, tokenizer_path, tokenizer, train_rows=50, test_rows=6, sequence_length=LENGTH):
    """Write a prepared set, as `merge_datasets` does."""
    rows = make_rows(tokenizer, train_rows + test_rows)
    features = row_features(np.dtype("uint16"))
    splits = {"train": rows[test_rows:], "test": rows[:test_rows]}
    data = DatasetDict({name: Dataset.from_list(part, features=features) for name, part in splits.items()})
    data.save_to_disk(str(directory))
    files = []
    for path in sorted(directory.rglob("*.arrow")):
        content = path.read_bytes()
        name = path.relative_to(directory).as_posix()
        files.append(OutputFile(name, len(content), len(splits[path.parent.name]), hashlib.sha256(content).hexdigest()))
    Manifest(
        stage="merged",
        name="pretrain",
        kind="pretrain",
        sequence_length=sequence_length,
        tokenizer=TokenizerIdentity(tokenizer_sha256(tokenizer_path), len(tokenizer), 0, 1, 2),
        settings={},
        inputs=[],
        files=files,
        accounting={"english": SourceAccounting()},
        samples={name: {"english": SampleCounts(samples=len(part))} for name, part in splits.items()},
    ).write(directory)
    return directory


class World:
    """Tokenizer and data of the tests in one directory, and commands that use them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.tokenizer_path = directory / "tokenizer"
        self.tokenizer = make_tokenizer(self.tokenizer_path)
        self.data = make_set(directory / "pretrain", self.tokenizer_path, self.tokenizer)

    def flags(self, place: Path, *flags, model=None, **train):
        """The flags of a run that writes into `place`."""
        place.mkdir(parents=True, exist_ok=True)
        config = place / "settings.yaml"
        config.write_text(make_settings(model, **train).to_yaml(), encoding="utf-8")
        return [
            *("--config_path", str(config), "--logging_dir", str(place / "log"), "--output_dir", str(place / "out")),
            *("--tokenizer_path", str(self.tokenizer_path)),
            *(() if train.get("stream") else ("--dataset_path", str(self.data))),
            *flags,
        ]


def start(flags, launcher=(), script="train.py"):
    """A script of the project as a process of its own, as a user starts it."""
    command = [sys.executable, *launcher, str(ROOT / script), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=one_thread()
    )


def one_thread():
    """An environment in which a process computes with one thread: as fast for so small a model, and kind to others."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(process):
    """Wait for a process that must succeed; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def log_lines(place, kind="train"):
    """The lines of one kind in a run's log."""
    text = (place / "log" / "train.jsonl").read_text(encoding="utf-8")
    return [record for record in map(json.loads, text.splitlines()) if record["kind"] == kind]


def losses(place):
    """Step to logged loss, exactly as logged."""
    return {record["step"]: record["loss"] for record in log_lines(place)}
