"""The product-key choice of experts as one Triton kernel a pass.

In plain PyTorch it is two partial sorts, a grid of sums, a third sort, two look-ups and a softmax, and as much again in
the backward pass: a dozen kernels that each move a few numbers for a token. Here one program does it all for a few
tokens in registers.

Shapes, the one legend of this file:

    M  tokens          k  experts per head               BM      tokens of a program
    H  expert heads    n1, n2  rows of the key tables    BN, BK  n1, n2 and k, rounded up to a power of 2
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_operator import by_rows, launcher, operator

_CELLS = 8192  # of the scores that a program holds at a time


@triton.jit
def _best(scores, k: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, n):
    """The k highest of each row, (BM, BN), in falling order: values and places, (BM, BK); of equals, the first."""
    column = tl.arange(0, BN)[None, :]
    slot = tl.arange(0, BK)[None, :]
    values = tl.full((scores.shape[0], BK), float("-inf"), tl.float32)
    places = tl.zeros((scores.shape[0], BK), tl.int32)
    for i in range(k):
        highest, place = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        place = tl.minimum(place, n - 1)  # scores that are no numbers must not lead out of the table
        values = tl.where(slot == i, highest[:, None], values)
        places = tl.where(slot == i, place[:, None], places)
        scores = tl.where(column == place[:, None], float("-inf"), scores)
    return values, places


@triton.jit
def _pick(values, places, BK: tl.constexpr):
    """values[m, places[m, i]] for all i: (BM, BK) of (BM, BK) by (BM, BP)."""
    at = places[:, :, None] == tl.arange(0, BK)[None, None, :]
    return tl.sum(tl.where(at, values[:, None, :], 0), axis=2)


@triton.jit
def _topk_kernel(
    first_ptr, second_ptr, weights_ptr, experts_ptr, rows, heads, n1, n2,
    first_m, first_h, second_m, second_h,
    k: tl.constexpr, k1: tl.constexpr, k2: tl.constexpr, BK: tl.constexpr, BK1: tl.constexpr, BK2: tl.constexpr,
    BN1: tl.constexpr, BN2: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM rows of the M·H; best first, and of equal sums that with the better place in the first table's order."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = (row < rows)[:, None]  # the last program may repeat the last row, but does not store it
    row = tl.minimum(row, rows - 1)
    m, h = row // heads, row % heads

    column = tl.arange(0, BN1)[None, :]
    at = (m * first_m + h * first_h)[:, None] + column
    scores = tl.load(first_ptr + at, mask=column < n1, other=float("-inf")).to(tl.float32)
    values1, places1 = _best(scores, k1, BK1, BN1, n1)

    column = tl.arange(0, BN2)[None, :]
    at = (m * second_m + h * second_h)[:, None] + column
    scores = tl.load(second_ptr + at, mask=column < n2, other=float("-inf")).to(tl.float32)
    values2, places2 = _best(scores, k2, BK2, BN2, n2)

    sums = tl.reshape(values1[:, :, None] + values2[:, None, :], (BM, BK1 * BK2))
    sums, pairs = _best(sums, k, BK, BK1 * BK2, BK1 * BK2)
    i = _pick(places1, pairs // BK2, BK1)
    j = _pick(places2, pairs % BK2, BK2)

    slot = tl.arange(0, BK)[None, :]
    # Slots beyond k hold -inf and weigh nothing.
    powers = tl.exp(sums - tl.max(sums, axis=1)[:, None])
    weights = powers / tl.sum(powers, axis=1)[:, None]
    to = row[:, None] * k + slot
    tl.store(weights_ptr + to, weights, mask=there & (slot < k))
    tl.store(experts_ptr + to, (i.to(tl.int64) * n2 + j), mask=there & (slot < k))


@triton.jit
def _topk_backward_kernel(
    grad_ptr, weights_ptr, experts_ptr, first_ptr, second_ptr, rows, n1, n2,
    k: tl.constexpr, BN1: tl.constexpr, BN2: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The gradient of BM rows of both tables' scores: that of a softmax, added up at the chosen places."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < rows
    mean = tl.zeros((BM,), tl.float32)
    for i in range(k):
        weight = tl.load(weights_ptr + row * k + i, mask=there, other=0.0)
        mean += weight * tl.load(grad_ptr + row * k + i, mask=there, other=0.0).to(tl.float32)
    column1, column2 = tl.arange(0, BN1)[None, :], tl.arange(0, BN2)[None, :]
    first = tl.zeros((BM, BN1), tl.float32)
    second = tl.zeros((BM, BN2), tl.float32)
    for i in range(k):
        weight = tl.load(weights_ptr + row * k + i, mask=there, other=0.0)
        grad = tl.load(grad_ptr + row * k + i, mask=there, other=0.0).to(tl.float32)
        score = (weight * (grad - mean))[:, None]
        expert = tl.load(experts_ptr + row * k + i, mask=there, other=0).to(tl.int32)
        first += tl.where(column1 == (expert // n2)[:, None], score, 0.0)
        second += tl.where(column2 == (expert % n2)[:, None], score, 0.0)
    to = row[:, None] * n1 + column1
    tl.store(first_ptr + to, first.to(first_ptr.dtype.element_ty), mask=there[:, None] & (column1 < n1))
    to = row[:, None] * n2 + column2
    tl.store(second_ptr + to, second.to(second_ptr.dtype.element_ty), mask=there[:, None] & (column2 < n2))


def choose(first_MHn: Tensor, second_MHn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `product_topk` is as an operator: for use within another one."""
    m, heads, n1 = first_MHn.shape
    n2 = second_MHn.shape[2]
    weights_MHk = first_MHn.new_empty((m, heads, k), dtype=torch.float32)
    experts_MHk = first_MHn.new_empty((m, heads, k), dtype=torch.int64)
    if m * heads:
        first_MHn, second_MHn = by_rows(first_MHn), by_rows(second_MHn)
        k1, k2 = min(k, n1), min(k, n2)
        blocks = {name: triton.next_power_of_2(size) for name, size in
                  (("BK", k), ("BK1", k1), ("BK2", k2), ("BN1", n1), ("BN2", n2))}  # fmt: skip
        bm = _rows_of_a_program(max(blocks["BN1"], blocks["BN2"], blocks["BK1"] * blocks["BK2"]))
        launcher(_topk_kernel)[(triton.cdiv(m * heads, bm),)](
            first_MHn, second_MHn, weights_MHk, experts_MHk, m * heads, heads, n1, n2,
            *first_MHn.stride()[:2], *second_MHn.stride()[:2], k=k, k1=k1, k2=k2, BM=bm, **blocks,
        )  # fmt: skip
    return weights_MHk, experts_MHk


@operator("doge_lm::product_topk")
def product_topk(first_MHn: Tensor, second_MHn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `cdmoe.product_topk`, which says what it is, for scores in float32 or a shorter type."""
    return choose(first_MHn, second_MHn, k)


@operator("doge_lm::product_topk_backward")
def product_topk_backward(
    grad_MHk: Tensor, weights_MHk: Tensor, experts_MHk: Tensor, n1: int, n2: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of both tables' scores, (M, H, n1) and (M, H, n2) in `dtype`."""
    m, heads, k = grad_MHk.shape
    first_MHn = grad_MHk.new_empty((m, heads, n1), dtype=dtype)
    second_MHn = grad_MHk.new_empty((m, heads, n2), dtype=dtype)
    if m * heads:
        blocks = {"BN1": triton.next_power_of_2(n1), "BN2": triton.next_power_of_2(n2)}
        bm = _rows_of_a_program(max(blocks.values()))
        launcher(_topk_backward_kernel)[(triton.cdiv(m * heads, bm),)](
            grad_MHk.contiguous(), weights_MHk, experts_MHk, first_MHn, second_MHn, m * heads, n1, n2,
            k=k, BM=bm, **blocks,
        )  # fmt: skip
    return first_MHn, second_MHn


def _rows_of_a_program(columns: int) -> int:
    return max(1, min(64, _CELLS // columns))


@product_topk.register_fake
def _(first_MHn: Tensor, second_MHn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*first_MHn.shape[:2], k)
    return first_MHn.new_empty(shape, dtype=torch.float32), first_MHn.new_empty(shape, dtype=torch.int64)


@product_topk_backward.register_fake
def _(
    grad_MHk: Tensor, weights_MHk: Tensor, experts_MHk: Tensor, n1: int, n2: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = grad_MHk.shape[:2]
    return grad_MHk.new_empty((*shape, n1), dtype=dtype), grad_MHk.new_empty((*shape, n2), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    first_MHn, second_MHn, _ = inputs
    ctx.sizes = first_MHn.shape[2], second_MHn.shape[2], first_MHn.dtype
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_MHk: Tensor, _grad_experts: Tensor | None) -> tuple[Tensor, Tensor, None]:
    weights_MHk, experts_MHk = ctx.saved_tensors
    return (*product_topk_backward(grad_MHk, weights_MHk, experts_MHk, *ctx.sizes), None)


product_topk.register_autograd(_backward, setup_context=_save)
