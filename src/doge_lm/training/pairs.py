"""Pairs of answers for preference tuning: files of `prompt`, `chosen`, `rejected` -> token ids.

Each field is a text, or a list of messages: `{"role": "user" | "assistant" | "system", "content": ...}`, or
`{"from": "human" | "gpt" | "system", "value": ...}`. Without a `prompt`, `chosen` and `rejected` are conversations that
differ in the last answer. Everything goes through the tokenizer's chat template, as `doge-lm chat` does it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from doge_lm.data.sources import file_suffix, find_files, read_objects
from doge_lm.errors import UserError

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_PARQUET_ROWS = 256

Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A question and two answers.

    Attributes:
        prompt: what was said before.
        chosen: the better answer.
        rejected: the other.
    """

    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Pairs:
    """Pairs as token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    Attributes:
        train: what is trained on.
        test: what is held out: all pairs of some prompts.
        too_long: how many were left out, since they have more tokens than a sequence.
        sha256: stands for the files' content.
    """

    train: Dataset
    test: Dataset
    too_long: int
    sha256: str


def load_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, longest: int, test_share: float) -> Pairs:
    """Read all pairs of a file or a folder.

    Args:
        path: `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.parquet`, or a folder of them.
        tokenizer: with a chat template.
        longest: tokens of a prompt with an answer; longer ones are left out.
        test_share: share of the prompts that are held out, chosen by their words.

    Raises:
        UserError: naming file and line of what cannot be read, and if nothing is left for one of the two sets.
    """
    files = find_files(path)
    splits: dict[bool, list[dict[str, list[int]]]] = {False: [], True: []}
    too_long = 0
    for place, values in _objects(files):
        pair = parse_pair(values, place)
        ids = _encoded(pair, tokenizer, place)
        if len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"])) > longest:
            too_long += 1
        else:
            splits[_is_held_out(pair, test_share)].append(ids)
    total = sum(map(len, splits.values()))
    for held_out, name in ((False, "to train on"), (True, "held out")):
        if not splits[held_out]:
            left_out = f"; {too_long:,} have more than {longest:,} tokens (sequence_length)" if too_long else ""
            raise UserError(
                f"{path}: of {total + too_long:,} pairs none is {name}{left_out}; add data, or change dpo.test_share "
                f"(now {test_share})"
            )
    train, test = (Dataset.from_list(splits[held_out]) for held_out in (False, True))
    digest = hashlib.sha256(repr((longest, test_share)).encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Pairs(train, test, too_long, digest.hexdigest())


def parse_pair(values: dict[str, Any], place: str) -> Pair:
    """A row as a pair.

    Raises:
        UserError: naming the place and the field.
    """
    missing = [name for name in ("chosen", "rejected") if values.get(name) is None]
    if missing:
        raise UserError(f"{place}: the field {missing[0]!r} is missing; a row has prompt, chosen and rejected")
    chosen = _messages(values["chosen"], "assistant", f"{place}, chosen")
    rejected = _messages(values["rejected"], "assistant", f"{place}, rejected")
    if values.get("prompt") is not None:
        prompt = _messages(values["prompt"], "user", f"{place}, prompt")
        # Some sets repeat the prompt in front of the answers.
        chosen, rejected = (
            each[len(prompt) :] if each[: len(prompt)] == prompt else each for each in (chosen, rejected)
        )
    else:
        prompt = chosen[:-1]
        if not prompt or rejected[:-1] != prompt:
            raise UserError(
                f"{place}: without the field 'prompt', chosen and rejected must be conversations that differ in the "
                "last message alone"
            )
        chosen, rejected = chosen[-1:], rejected[-1:]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0][0] != "assistant" or not answer[0][1].strip():
            raise UserError(f"{place}: {name} must be one answer of the assistant, which is not empty")
    if not prompt or prompt[-1][0] != "user":
        raise UserError(f"{place}: the prompt must end with a message of the user")
    if chosen == rejected:
        raise UserError(f"{place}: chosen and rejected are the same; a pair needs two answers")
    return Pair(tuple(prompt), chosen[0][1], rejected[0][1])


def _objects(files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        if file_suffix(file) != ".parquet":
            for location, values in read_objects(file):
                yield str(location), values
            continue
        try:
            rows = (
                row
                for batch in pq.ParquetFile(file).iter_batches(batch_size=_PARQUET_ROWS)
                for row in batch.to_pylist()
            )
            for number, row in enumerate(rows, start=1):
                yield f"{file}, row {number}", row
        except pa.ArrowException as error:
            raise UserError(f"{file} is damaged ({error})") from error


def _messages(value: Any, role: str, where: str) -> list[tuple[str, str]]:
    """A text as one message of that role, or a list of messages."""
    if isinstance(value, str):
        return [(role, value)]
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a text or a list of messages, found {type(value).__name__}")
    messages = []
    for number, message in enumerate(value, start=1):
        speaker = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if speaker not in _ROLES or not isinstance(content, str):
            raise UserError(
                f"{where}: message {number} must have a role (user, assistant or system) and a content that is text"
            )
        messages.append((_ROLES[speaker], content))
    return messages


def _encoded(pair: Pair, tokenizer: PreTrainedTokenizerBase, place: str) -> dict[str, list[int]]:
    prompt = [{"role": role, "content": content} for role, content in pair.prompt]
    ends = [[], [{"role": "assistant", "content": pair.chosen}], [{"role": "assistant", "content": pair.rejected}]]
    try:
        before, chosen, rejected = (
            list(tokenizer.apply_chat_template([*prompt, *end], return_dict=False)) for end in ends
        )
    except TemplateError as error:
        raise UserError(f"{place}: {error}") from error
    # The template closes a question by a control token, so that an answer's ids do not depend on what is before.
    assert chosen[: len(before)] == before == rejected[: len(before)]
    return {"prompt_ids": before, "chosen_ids": chosen[len(before) :], "rejected_ids": rejected[len(before) :]}


def _is_held_out(pair: Pair, share: float) -> bool:
    words = "\0".join(content for _, content in pair.prompt).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "big") < share * 2**64
