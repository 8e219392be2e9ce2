"""A Doge as one ONNX file with a cache, for onnxruntime: the same graph takes prompts and single tokens.

Inputs, B rows of T new tokens behind P earlier ones:

    input_ids                 (B, T) int64
    attention_mask            (B, P + T) int64, 0 at padding, which is on the left
    past_key_values.N.key     (B, heads, P, features of a head) float32, for each layer N; P is 0 at the start
    past_key_values.N.value   the same
    past_key_values.N.key_before           with `key_shift` (B, d, 1) float32: the newest key before its shift; any at
                                           the start
    past_key_values.N.attention_before     the same of the input of attention, with `attention_shift`
    past_key_values.N.feed_forward_before  the same of the input of the feed-forward, with `feed_forward_shift`

Outputs: `logits` (B, T, vocabulary), and `present.N.key` and `present.N.value` (B, heads, P + T, features) and so on,
which are the next step's past. Positions are counted from the mask. The logits of padding are numbers without meaning.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxscript import opset18 as op
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import UserError
from ..model import DogeForCausalLM
from ..model.modeling_doge import DogeCDMoE

MODEL_NAME = "model.onnx"
# A protobuf, and so an ONNX file with its weights in it, ends at 2 GiB.
MOST_BYTES_IN_ONE_FILE = 1_800_000_000
STEPS_CHECKED = 4
TOLERANCE = 1e-4
"""Relative error of logits that passes: the order of sums differs, and float32 has some 1e-7 for each."""

# Their frequencies depend on the length that was seen, by a branch that no graph can hold.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


def export_onnx(model: DogeForCausalLM, directory: Path) -> None:
    """Write `model.onnx`, and beside it `model.onnx.data` where the weights need more than one file.

    Args:
        model: in float32, on the CPU, in evaluation mode.
        directory: is there.

    Raises:
        UserError: for a model that a graph cannot hold.
    """
    rope = (model.config.rope_parameters or {}).get("rope_type", "default")
    if rope in _ROPE_BY_LENGTH:
        raise UserError(
            f"--format onnx cannot hold positions of the type {rope!r}, whose frequencies follow the length; "
            "use the other format"
        )
    step, examples = _Step(model).eval(), _example(model)
    with torch.no_grad(), _by_gather(model):
        exported = torch.export.export(step, examples, dynamic_shapes=_dynamic_shapes(model), strict=False)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            input_names=input_names(model),
            output_names=["logits", *(f"present.{name}" for name in _cache_names(model))],
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    assert program is not None
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    program.save(directory / MODEL_NAME, external_data=size > MOST_BYTES_IN_ONE_FILE)


def input_names(model: DogeForCausalLM) -> list[str]:
    """The names of the inputs, in their order."""
    return ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in _cache_names(model))]


class OnnxRunner:
    """Runs an exported file in onnxruntime on the CPU, and keeps the cache between two calls.

    Args:
        directory: holds `model.onnx`.
        threads: of one operator; None takes all cores.
    """

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(directory / MODEL_NAME, options, ["CPUExecutionProvider"])
        self._past_inputs = [each for each in self._session.get_inputs() if each.name.startswith("past_key_values.")]
        self._past: list[NDArray[np.float32]] = []

    def reset(self) -> None:
        """Forget the earlier tokens."""
        self._past = []

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Those of new tokens (B, T), which become part of the cache; the mask (B, S) is of all tokens so far."""
        if not self._past:
            # Of keys and values no column yet; of newest inputs one, which the first token does not see.
            rests = [[size if isinstance(size, int) else 0 for size in each.shape[1:]] for each in self._past_inputs]
            self._past = [np.zeros((len(input_ids), *rest), np.float32) for rest in rests]
        past = {each.name: array for each, array in zip(self._past_inputs, self._past, strict=True)}
        logits, *self._past = self._session.run(
            None, {"input_ids": input_ids, "attention_mask": attention_mask, **past}
        )
        return logits


def largest_error(model: DogeForCausalLM, runner: OnnxRunner, rows: Sequence[Sequence[int]]) -> float:
    """The largest relative error of logits, over prompts with padding on the left and the steps behind them.

    Args:
        model: the original.
        runner: of the file that was made from it.
        rows: token ids of different lengths, each longer than `STEPS_CHECKED`.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    runner.reset()
    errors, start = [], 0
    for end in range(longest - STEPS_CHECKED, longest + 1):
        found = torch.from_numpy(runner.logits(ids[:, start:end].numpy(), mask[:, :end].numpy()))
        seen = mask[:, start:end].bool()
        difference, size = (found - expected[:, start:end])[seen].norm(), expected[:, start:end][seen].norm()
        errors.append(float(difference / size))
        start = end
    return math.inf if any(map(math.isnan, errors)) else max(errors)


class _Step(nn.Module):
    """The model with a flat cache: what becomes the graph."""

    def __init__(self, model: DogeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = DynamicCache(config=self.model.config)
        parts = len(_parts(self.model))
        for layer in range(self.model.config.num_hidden_layers):
            key, value, *newest = past[layer * parts : (layer + 1) * parts]
            cache.update(key, value, layer)
            for index, newest_Bd1 in enumerate(newest):
                cache.update_conv_state(newest_Bd1, layer, index)
        new, seen = input_ids.shape[1], attention_mask.shape[1]
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, seen - new :]
        columns = torch.arange(seen)
        lines = columns[seen - new :, None]
        # Padding sees itself, or its softmax would be over nothing.
        sees = ((columns <= lines) & attention_mask.bool()[:, None, None]) | (columns == lines)
        mask = torch.zeros_like(sees, dtype=torch.float32).masked_fill(~sees, torch.finfo(torch.float32).min)
        out = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        present = []
        for layer in out.past_key_values.layers:
            present += [layer.keys, layer.values, *(layer.conv_states.values() if parts > 2 else ())]
        return out.logits, *present


def _stable_sort(values: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """`aten::sort.stable`, which the exporter lacks: ONNX promises of TopK that of equals the lower index is first."""
    length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)


def _cache_names(model: DogeForCausalLM) -> list[str]:
    return [f"{layer}.{part}" for layer in range(model.config.num_hidden_layers) for part in _parts(model)]


def _parts(model: DogeForCausalLM) -> list[str]:
    """What is kept for each layer; the newest inputs in the order of their states."""
    return ["key", "value", *(f"{name}_before" for name in model.config.shifts)]


def _example(model: DogeForCausalLM) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Inputs to trace with; no size is 0 or 1, which the tracer would take for fixed."""
    config, batch, new, past = model.config, 2, 3, 5
    shape = (batch, config.num_attention_heads, past, config.hidden_size // config.num_attention_heads)
    newest = (batch, config.hidden_size, 1)
    shapes = [newest if name.endswith("_before") else shape for name in _cache_names(model)]
    ids, mask = torch.ones(batch, new, dtype=torch.long), torch.ones(batch, past + new, dtype=torch.long)
    return ids, mask, [torch.zeros(each) for each in shapes]


def _dynamic_shapes(model: DogeForCausalLM) -> tuple[Any, Any, Any]:
    dim = torch.export.Dim
    batch, new, past = dim("batch"), dim("tokens"), dim("past")
    kept = [{0: batch} if name.endswith("_before") else {0: batch, 2: past} for name in _cache_names(model)]
    return {0: batch, 1: new}, {0: batch, 1: dim.AUTO}, kept


@contextmanager
def _by_gather(model: DogeForCausalLM) -> Iterator[None]:
    """Have the experts gathered whatever the number of tokens: the other paths are chosen by it."""
    before = {module: module.path for module in model.modules() if isinstance(module, DogeCDMoE)}
    try:
        for module in before:
            module.path = "gather"
        yield
    finally:
        for module, path in before.items():
            module.path = path
