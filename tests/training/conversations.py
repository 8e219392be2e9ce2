"""Conversations, a set of them by the project's own commands, and a base model, for the tests of tuning."""

import json
from pathlib import Path
from pydoc_data.topics import topics

from doge_lm.cli import main

LENGTH = 128

TUNE = {
    "sequence_length": LENGTH,
    "sequences_per_step": 4,
    "per_device_train_batch_size": 2,
    "per_epoch_max_steps": 5,
    "num_train_epochs": 2,
    "learning_rate": 3e-3,
    "bf16": False,
    "torch_compile": False,
    "logging_steps": 1,
    "eval_steps": 5,
    "save_steps": 4,
    "per_device_eval_batch_size": 4,
}


def conversations(count: int = 90) -> list[dict]:
    """Of one to three turns, in both languages; some with a system text."""
    rows = []
    for index, (name, text) in enumerate(sorted(topics.items()) * 3):
        if index == count:
            return rows
        words = [word for word in text.split() if len(word) < 9]
        turns = [{"from": "system", "value": f"Be {index}."}] if index % 5 == 0 else []
        for turn in range(1 + index % 3):
            answer = " ".join(words[3 * turn : 3 * turn + 2 + index % 2])
            question = f"What is {name[:6]}?" if index % 2 else f"什么{name[:6]}？"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer or "Nothing."}]
        rows.append({"conversations": turns})
    return rows


def make_conversations(place: Path, tokenizer_path: Path) -> Path:
    """A prepared set of them; returns its place."""
    place.mkdir(parents=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in conversations())
    (place / "talk.jsonl").write_text(lines, encoding="utf-8")
    where = ["--datasets_dir", str(place), "--save_dir", str(place)]
    commands = (
        ["download_datasets", "--save_dir", str(place), "--local", f"talk={place / 'talk.jsonl'}"],
        ["preprocess_datasets", *where, "--tokenizer_path", str(tokenizer_path), "--max_len", str(LENGTH)],
        ["merge_datasets", *where, "--test_size", "6"],
    )
    for command in commands:
        assert main(command) == 0
    return place / "finetune"
