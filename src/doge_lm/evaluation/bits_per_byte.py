"""Loss, perplexity and bits per byte of a model on a prepared set, by source.

Bits per byte is the measure that does not depend on the tokenizer: the bits that the model needs for the targets,
over the UTF-8 bytes of the text that they spell. A document's end token is a target without bytes, so its cost
counts too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from doge_lm.errors import UserError

IGNORED = -100


class Rows(Protocol):
    """A prepared set, as `datasets.Dataset` gives it: rows by index, columns by name."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class Reducer(Protocol):
    """What is needed of `accelerate.Accelerator` to add up over processes."""

    num_processes: int
    process_index: int

    def reduce(self, tensor: Tensor, reduction: str = ...) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Scores:
    """Sums over some rows. `nll` is the negative log-likelihood of all targets in nats."""

    nll: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a target."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits for the targets over bytes of their text."""
        return self.nll / (math.log(2) * self.bytes)

    def as_dict(self) -> dict[str, float]:
        """`loss`, `perplexity`, `bits_per_byte`, `tokens` and `bytes`."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Evaluation:
    """Scores of a whole set, and of each of its sources."""

    total: Scores
    by_source: dict[str, Scores]

    def as_dict(self) -> dict[str, Any]:
        """`{"total": {...}, "by_source": {name: {...}}}`, each as `Scores.as_dict`."""
        return {
            "total": self.total.as_dict(),
            "by_source": {name: scores.as_dict() for name, scores in self.by_source.items()},
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Rows,
    collator: Callable[[list[dict]], dict[str, Any]],
    batch_size: int,
    *,
    bf16: bool = False,
    reducer: Reducer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score every row of a prepared set once, in order, without sampling: the same result every time.

    Holds the logits of one batch at a time, and of one row in float32. In a distributed run every process scores
    its share of the batches and all get the same result.

    Args:
        model: a causal language model; it is left in the mode (training or not) in which it came.
        dataset: rows as `merge_datasets` writes them, with `source` and `text_bytes`.
        collator: rows to `input_ids`, `labels` (both (B, T); -100 where a token is no target) and what else the
            model takes; row b of the tensors is row b of the list.
        batch_size: rows of one forward pass.
        bf16: compute in bfloat16 by autocast.
        reducer: the `Accelerator` of a distributed run.
        progress: called with the number of rows done after each batch.

    Raises:
        UserError: if the set holds no target, or no text, to measure.
    """
    sources = sorted(set(dataset["source"]))
    sums = torch.zeros(len(sources), 3, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for rows in _shares(dataset, batch_size, reducer):
            nll_B, targets_B = _score(model, collator(rows), bf16)
            for row, nll, targets in zip(rows, nll_B, targets_B, strict=True):
                sums[sources.index(row["source"])] += torch.tensor([nll, targets, int(row["text_bytes"])])
            if progress is not None:
                progress(len(rows))
    finally:
        model.train(was_training)
    if reducer is not None and reducer.num_processes > 1:
        sums = reducer.reduce(sums.to(next(model.parameters()).device), reduction="sum").cpu()
    return _evaluation(sources, sums)


def _shares(dataset: Rows, batch_size: int, reducer: Reducer | None) -> Iterator[list[dict]]:
    """The batches of this process."""
    rank, world = (0, 1) if reducer is None else (reducer.process_index, reducer.num_processes)
    for start in range(rank * batch_size, len(dataset), world * batch_size):
        yield [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]


def _score(model: nn.Module, inputs: dict[str, Any], bf16: bool) -> tuple[Sequence[float], Sequence[int]]:
    """Summed negative log-likelihood and number of targets of each row."""
    device = next(model.parameters()).device
    inputs = send_to_device(inputs, device)
    labels_BT = inputs.pop("labels")
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        # `forward`, not the call: a model compiled for training would be compiled again for these shapes.
        logits_BTV = model.forward(**inputs, use_cache=False).logits
    nll_rows = [
        nn.functional.cross_entropy(logits_TV[:-1].float(), labels_T[1:], ignore_index=IGNORED, reduction="none")
        for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
    ]
    nll_BT = torch.stack(nll_rows).to("cpu").double()
    return nll_BT.sum(dim=1).tolist(), (labels_BT[:, 1:] != IGNORED).sum(dim=1).tolist()


def _evaluation(sources: list[str], sums: Tensor) -> Evaluation:
    def scores(row: Tensor) -> Scores:
        return Scores(row[0].item(), int(row[1].item()), int(row[2].item()))

    total = scores(sums.sum(dim=0))
    if total.tokens == 0 or total.bytes == 0:
        raise UserError("the set to evaluate on holds no text to predict; merge the datasets with another --test_size")
    # A source whose few rows spell no text has no bits per byte; its targets are in the total.
    measurable = {str(name): scores(row) for name, row in zip(sources, sums, strict=True) if row[1] > 0 and row[2] > 0}
    return Evaluation(total, measurable)
