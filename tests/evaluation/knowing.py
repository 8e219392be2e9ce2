"""A small model that knows some answers of the made benchmarks, and writes wrong ones for others.

What a model that knows nothing writes is wrong for every scorer, so it tells no right scorer from a wrong one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from doge_lm.data.sources import read_objects
from doge_lm.data.tokenizer import encode_text
from doge_lm.evaluation.local_data import find_file

_KNOWN_ROWS = 6
_STEPS = 60


def answers(data: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of the first rows of the benchmarks whose answers are written; some are right."""

    def rows(name: str) -> list[dict[str, Any]]:
        path = find_file(data, name)
        assert path is not None
        return [values for _, values in read_objects(path)][:_KNOWN_ROWS]

    pairs = []
    for i, row in enumerate(rows("triviaqa_sub3000")):
        pairs.append((row["context"], (" The Mill!\nQuestion: why", " a mill, or a river.")[i % 2]))
    for i, row in enumerate(rows("gsm8k_test")):
        texts = (
            f" It is {i + 1}.\n#### {i + 1}.\nQuestion: 5",
            f" 9 and then {i + 1}.",  # by the last number alone
            f" 1 #### {i + 1}, not 70",  # by the sign alone
            " none",
        )
        pairs.append((f"Question: {row['question']}\nAnswer:", texts[i % 4]))
    right_once = "    return x + 4\n\ndef g(y):\n"
    return pairs + [(row["prompt"], right_once) for row in rows("humaneval")]


def teach(model: PreTrainedModel, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> PreTrainedModel:
    """The model, trained on these answers until it knows them by heart: some ten seconds."""
    whole = [[1, *encode_text(tokenizer, prompt + answer), 2] for prompt, answer in pairs]
    begins = [1 + len(encode_text(tokenizer, prompt)) for prompt, _ in pairs]
    length = max(map(len, whole))
    ids_BT = torch.zeros(len(whole), length, dtype=torch.long)
    places, targets = [], []
    for b, (ids, begin) in enumerate(zip(whole, begins, strict=True)):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        places += [b * length + t - 1 for t in range(begin, len(ids))]
        targets += ids[begin:]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other, in so small a model
    model.train()
    for _ in range(_STEPS):
        hidden_BTd = model.model(ids_BT, use_cache=False).last_hidden_state
        loss = cross_entropy(model.lm_head(hidden_BTd.flatten(0, 1)[places]), torch.tensor(targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return model.eval()
