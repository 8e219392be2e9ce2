"""Attention within the documents of packed rows: equal to a dense mask, without its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from doge_lm.model.document_attention import (
    CumulativeLengths,
    cumulative_lengths,
    document_attention,
    document_groups,
    document_layout,
    document_starts,
    padded_lengths,
)

from .support import random_ids, tiny_model

ROWS = {
    "several": [[5, 1, 7, 3], [8, 8]],
    "all of length 1": [[1] * 6, [1] * 6],
    "whole rows": [[9], [9]],
    "a row of one beside pieces": [[12], [1, 1, 9, 1], [4, 4, 4]],
    "one row": [[3, 2]],
}


def positions_of(rows: list[list[int]], first: int = 0) -> Tensor:
    """Positions of packed rows, given the lengths of their documents."""
    return torch.stack([torch.cat([torch.arange(length) + first for length in lengths]) for lengths in rows])


def allowed(position_ids: Tensor) -> Tensor:
    """(B, 1, T, T), true where a query sees a key, told by plain loops."""
    batch, length = position_ids.shape
    seen = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b, row in enumerate(position_ids.tolist()):
        start = 0
        for t in range(length):
            if t > 0 and row[t] != row[t - 1] + 1:
                start = t
            seen[b, 0, t, start : t + 1] = True
    return seen


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in out if isinstance(out, tuple | list) else (out,):
            if isinstance(found, Tensor):
                self.numel = max(self.numel, found.numel())
        return out


def attend(
    position_ids: Tensor, dtype: torch.dtype, *, dense: bool, features: int = 6, heads: int = 2
) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of queries, keys and values, for one fixed loss."""
    generator = torch.Generator().manual_seed(0)
    shape = (*position_ids.shape, heads, features)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    for leaf in leaves:
        leaf.requires_grad_()
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    if dense:
        scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~allowed(position_ids), -torch.inf)
        output = (scores.softmax(-1) @ value).transpose(1, 2)
    else:
        output = document_attention(query, key, value, document_groups(position_ids), 0.3)
    return output.detach(), list(torch.autograd.grad((output * weight).sum(), leaves))


@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_groups_equal_a_dense_mask(rows: list[list[int]], first: int) -> None:
    position_ids = positions_of(rows, first)
    expected, expected_gradients = attend(position_ids, torch.float64, dense=True)
    found, gradients = attend(position_ids, torch.float64, dense=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-12)


def test_groups_in_bfloat16() -> None:
    position_ids = positions_of(ROWS["several"])
    expected, expected_gradients = attend(position_ids, torch.float64, dense=True)
    found, gradients = attend(position_ids, torch.bfloat16, dense=False)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=0.1)


def test_cumulative_lengths() -> None:
    starts, longest = cumulative_lengths(positions_of([[5, 1, 7, 3], [8, 8]]))
    assert starts.tolist() == [0, 5, 6, 13, 16, 24, 32]
    assert starts.dtype == torch.int32
    assert longest == 16


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_padded_lengths_are_the_same_in_as_many_numbers_as_tokens(rows: list[list[int]], compiled: bool) -> None:
    position_ids = positions_of(rows)
    find = torch.compile(padded_lengths, fullgraph=True, backend="aot_eager") if compiled else padded_lengths
    starts, longest = find(position_ids)
    expected = cumulative_lengths(position_ids)
    assert starts.dtype == torch.int32
    assert starts.shape == (position_ids.numel() + 1,)
    assert torch.equal(starts[: len(expected.starts)], expected.starts)
    assert set(starts[len(expected.starts) :].tolist()) <= {position_ids.numel()}
    assert longest == expected.longest


def test_a_document_starts_wherever_positions_do_not_go_on() -> None:
    position_ids = torch.tensor([[4, 5, 6, 0, 1, 0, 0, 7]])
    assert document_starts(position_ids).tolist() == [[True, False, False, True, False, True, True, True]]


def gradients_of(model: Any, ids: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(ids, labels=ids, **inputs)
    out.loss.backward()
    return out.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_model_equals_a_dense_mask(rows: list[list[int]], use_cache: bool, checkpointing: bool) -> None:
    """Logits and every gradient against the eager model with its T×T mask."""
    position_ids = positions_of(rows)
    ids = random_ids(*position_ids.shape)
    expected, expected_gradients = gradients_of(
        tiny_model(attention="eager", dtype=torch.float64), ids, position_ids=position_ids, use_cache=False
    )
    model = tiny_model(dtype=torch.float64).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, gradients = gradients_of(model, ids, position_ids=position_ids, use_cache=use_cache and not checkpointing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-7)


def test_one_row_of_positions_serves_the_whole_batch() -> None:
    model, ids = tiny_model(), random_ids(3, 9)
    position_ids = positions_of([[4, 5]])
    with torch.no_grad():
        found = model(ids, position_ids=position_ids, use_cache=False).logits
        expected = model(ids, position_ids=position_ids.expand(3, -1), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_tensor_is_as_large_as_a_mask() -> None:
    """Forward and backward of a training step; the eager model shows that a T×T tensor would be seen."""
    length = 600
    position_ids = positions_of([[250, 1, 49, 300]])
    ids = random_ids(*position_ids.shape)
    largest = {}
    for attention in ("sdpa", "eager"):
        model = tiny_model(attention=attention).train()
        with LargestTensor() as watch:
            model(ids, position_ids=position_ids, labels=ids, use_cache=False).loss.backward()
        largest[attention] = watch.numel
    assert largest["sdpa"] < length * length <= largest["eager"]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["as it is", "compiled", "compiled, lengths given"])
def test_attention_on_a_gpu_equals_a_dense_mask(way: str) -> None:
    """FlashAttention in bfloat16, forward and backward, from positions to gradients, in every row.

    The operator alone: in a whole model, rounding changes the experts of some tokens, and with them what follows.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, starts: Tensor | None) -> Tensor:
        layout = document_layout(position_ids, q.dtype, q.shape[-1], starts)
        assert isinstance(layout, CumulativeLengths)
        return document_attention(q, k, v, layout, 0.3)

    run = attention if way == "as it is" else torch.compile(attention, fullgraph=True, dynamic=False)
    for rows in ([[200, 1, 55], [256], [1] * 256], [[3, 125, 128], [100, 156], [255, 1]]):
        position_ids = positions_of(rows)
        starts = None
        if way == "compiled, lengths given":
            starts = cumulative_lengths(position_ids).starts
            starts = torch.nn.functional.pad(starts, (0, 400 - len(starts)), value=position_ids.numel()).cuda()
        expected, expected_gradients = attend(position_ids, torch.float64, dense=True, features=64)
        generator = torch.Generator().manual_seed(0)
        shape = (*position_ids.shape, 2, 64)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().cuda() for _ in range(4)]
        *leaves, weight = tensors
        for leaf in leaves:
            leaf.requires_grad_()
        output = run(*(leaf.transpose(1, 2) for leaf in leaves), position_ids.cuda(), starts)
        gradients = torch.autograd.grad((output * weight).sum(), leaves)
        torch.testing.assert_close(output.double().cpu(), expected, rtol=0.02, atol=0.05)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            difference = (gradient.double().cpu() - expected_gradient).norm()
            assert float(difference) <= 0.02 * float(expected_gradient.norm())
