"""The value of Inner Function Attention as one Triton kernel a pass.

In plain PyTorch the gains of all tokens are written out in float32, as is their gradient; here they stay in
registers.

Shapes, the one legend of this file:

    M  tokens             BM  tokens of a program      BN  n, rounded up to a power of 2
    d  hidden size        BF  features of a tile
    n  inner values       p   programs
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_operator import INTERPRETED, by_rows, launcher, operator

MOST_VALUES = 32
"""Inner values that the kernels are made for: a program holds the scores of all."""

_BM, _BF = 32, 128
_BM_BACKWARD, _BF_BACKWARD, _WARPS_BACKWARD = 64, 64, 4
_LEAST_OF_A_PRODUCT = 16  # rows or columns that `tl.dot` takes


@triton.jit
def _choice(scores_ptr, m, there, n, score_stride, BN: tl.constexpr):
    """The scores of BM tokens in float32, (BM, BN), and the place of each one's highest, of equals the first."""
    j = tl.arange(0, BN)
    at = m[:, None] * score_stride + j[None, :]
    scores = tl.load(scores_ptr + at, mask=there[:, None] & (j < n)[None, :], other=float("-inf")).to(tl.float32)
    scores = tl.where(there[:, None], scores, 0.0)
    place = tl.argmax(scores, axis=1, tie_break_left=True)
    return scores, tl.minimum(place, n - 1)  # scores that are no numbers must not lead out of the table


@triton.jit
def _inner_value_kernel(
    x_ptr, scores_ptr, table_ptr, out_ptr, M, d, n, x_stride, score_stride,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    _, place = _choice(scores_ptr, m, m < M, n, score_stride, BN)
    for begin in range(0, d, BF):
        f = begin + tl.arange(0, BF)
        mask = (m < M)[:, None] & (f < d)[None, :]
        gain = tl.load(table_ptr + place[:, None] * d + f[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + m[:, None] * x_stride + f[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + m[:, None] * d + f[None, :], (x * gain).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _inner_value_backward_kernel(
    grad_ptr, x_ptr, scores_ptr, table_ptr, x_grad_ptr, score_grad_ptr, table_parts_ptr, M, d, n,
    grad_stride, x_stride, score_stride,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of BM tokens; of the table's, the part that these add.

    The two sums, over features and over tokens, are matrix products: of grad ⊙ x with the table, and of the choice as
    ones and zeros with grad ⊙ x. In a short type grad ⊙ x is taken in two parts, high and low digits; and the first
    product takes the table less its first row, which changes no gradient of a softmax: rows near 1 would lose their
    differences. The factors are in x's type; with WIDE in float32: the interpreter has no products of bfloat16.
    """
    kind = x_ptr.dtype.element_ty
    factors: tl.constexpr = tl.float32 if WIDE else kind
    program = tl.program_id(0).to(tl.int64)
    m = program * BM + tl.arange(0, BM)
    scores, place = _choice(scores_ptr, m, m < M, n, score_stride, BN)
    j = tl.arange(0, BN)
    chosen = tl.where(place[None, :] == j[:, None], 1.0, 0.0).to(factors)
    products = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, d, BF):
        f = begin + tl.arange(0, BF)
        mask = (m < M)[:, None] & (f < d)[None, :]
        grad = tl.load(grad_ptr + m[:, None] * grad_stride + f[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + m[:, None] * x_stride + f[None, :], mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(table_ptr + place[:, None] * d + f[None, :], mask=mask, other=0.0).to(tl.float32)
        to = m[:, None] * d + f[None, :]
        tl.store(x_grad_ptr + to, (grad * gain).to(x_grad_ptr.dtype.element_ty), mask=mask)
        both = grad * x
        high = both.to(kind)
        # Transposed as it is read: f down, the rows of the table across.
        inside = (f < d)[:, None] & (j < n)[None, :]
        row = tl.load(table_ptr + j[None, :] * d + f[:, None], mask=inside, other=0.0).to(tl.float32)
        first = tl.load(table_ptr + f, mask=f < d, other=0.0).to(tl.float32)
        less_first = (row - first[:, None]).to(kind).to(factors)
        products = tl.dot(high.to(factors), less_first, products, input_precision="ieee")
        part = tl.dot(chosen, high.to(factors), input_precision="ieee")
        if kind != tl.float32:
            low = (both - high.to(tl.float32)).to(kind).to(factors)
            products = tl.dot(low, less_first, products, input_precision="ieee")
            part = tl.dot(chosen, low, part, input_precision="ieee")
        to = (program * n + j)[:, None] * d + f[None, :]
        tl.store(table_parts_ptr + to, part, mask=(j < n)[:, None] & (f < d)[None, :])
    powers = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    soft = powers / tl.sum(powers, axis=1)[:, None]
    score_grad = soft * (products - tl.sum(soft * products, axis=1)[:, None])
    to = m[:, None] * n + j[None, :]
    there = (m < M)[:, None] & (j < n)[None, :]
    tl.store(score_grad_ptr + to, score_grad.to(score_grad_ptr.dtype.element_ty), mask=there)


@operator("doge_lm::inner_value")
def inner_value(x_Md: Tensor, scores_Mn: Tensor, table_nd: Tensor) -> Tensor:
    """v = x ⊙ E[argmax s], with the gradient of a softmax for the choice (straight-through).

    Args:
        x_Md: of float32 or a shorter type, as `scores_Mn`.
        scores_Mn: s.
        table_nd: E, in float32 where its rows start near 1.

    Returns:
        (M, d), in x's type.
    """
    m, d = x_Md.shape
    out_Md = x_Md.new_empty((m, d))
    if out_Md.numel():
        x_Md, scores_Mn = by_rows(x_Md), by_rows(scores_Mn)
        n = scores_Mn.shape[1]
        launcher(_inner_value_kernel)[(triton.cdiv(m, _BM),)](
            x_Md, scores_Mn, table_nd.contiguous(), out_Md, m, d, n, x_Md.stride(0), scores_Mn.stride(0),
            BM=_BM, BN=triton.next_power_of_2(n), BF=_BF,
        )  # fmt: skip
    return out_Md


@operator("doge_lm::inner_value_backward")
def inner_value_backward(
    grad_Md: Tensor, x_Md: Tensor, scores_Mn: Tensor, table_nd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, s and E, in their types."""
    (m, d), n = x_Md.shape, scores_Mn.shape[1]
    x_grad_Md, score_grad_Mn = x_Md.new_empty((m, d)), scores_Mn.new_empty((m, n))
    programs = triton.cdiv(m, _BM_BACKWARD)
    parts_pnd = table_nd.new_empty((programs, n, d), dtype=torch.float32)
    if m * d:
        grad_Md, x_Md, scores_Mn = by_rows(grad_Md), by_rows(x_Md), by_rows(scores_Mn)
        launcher(_inner_value_backward_kernel)[(programs,)](
            grad_Md, x_Md, scores_Mn, table_nd.contiguous(), x_grad_Md, score_grad_Mn, parts_pnd, m, d,
            n, grad_Md.stride(0), x_Md.stride(0), scores_Mn.stride(0),
            BM=_BM_BACKWARD, BN=max(_LEAST_OF_A_PRODUCT, triton.next_power_of_2(n)), BF=_BF_BACKWARD,
            WIDE=INTERPRETED, num_warps=_WARPS_BACKWARD,
        )  # fmt: skip
    return x_grad_Md, score_grad_Mn, parts_pnd.sum(0).to(table_nd.dtype)


@inner_value.register_fake
def _(x_Md: Tensor, scores_Mn: Tensor, table_nd: Tensor) -> Tensor:
    return x_Md.new_empty(x_Md.shape)


@inner_value_backward.register_fake
def _(grad_Md: Tensor, x_Md: Tensor, scores_Mn: Tensor, table_nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(like.new_empty(like.shape) for like in (x_Md, scores_Mn, table_nd))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_Md: Tensor) -> tuple[Tensor, ...]:
    return inner_value_backward(grad_Md, *ctx.saved_tensors)


inner_value.register_autograd(_backward, setup_context=_save)
