"""Queries, keys and scores out of their one matrix product, queries and keys rotated: one Triton kernel a pass.

Left to `torch.compile`, putting the three gradients together again takes four times as long as moving them.

Shapes, the one legend of this file:

    B  batch      h  heads                     n   inner values
    T  tokens     f  features of a head        C   columns of the product: h·f queries, h·f keys, n scores, the rest
    BM  tokens of a program                    BF  f/2, rounded up to a power of 2
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .triton_operator import by_rows, launcher, operator

# The tokens of a program. It goes over the heads one by one with the angles in registers: a program for each head would
# read the angles, in float32, 2·h times, four times as much as it moves.
_BM = 8


@triton.jit
def _angles(cos_ptr, sin_ptr, row, half, mask, BF: tl.constexpr):
    """Cosines and sines of BM tokens for the first and for the second half of a head's features."""
    at = row[:, None] * (2 * half) + tl.arange(0, BF)[None, :]
    cos1, cos2 = tl.load(cos_ptr + at, mask=mask, other=0.0), tl.load(cos_ptr + at + half, mask=mask, other=0.0)
    sin1, sin2 = tl.load(sin_ptr + at, mask=mask, other=0.0), tl.load(sin_ptr + at + half, mask=mask, other=0.0)
    return cos1, cos2, sin1, sin2


@triton.jit
def _rotation_kernel(
    product_ptr, cos_ptr, sin_ptr, query_ptr, key_ptr, scores_ptr, M, angle_rows, product_stride, h, half, n,
    BM: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    f = tl.arange(0, BF)[None, :]
    mask = (m < M)[:, None] & (f < half)
    cos1, cos2, sin1, sin2 = _angles(cos_ptr, sin_ptr, m % angle_rows, half, mask, BF)
    row_ptr = product_ptr + m[:, None] * product_stride
    for head in range(2 * h):
        first = tl.load(row_ptr + head * 2 * half + f, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(row_ptr + head * 2 * half + half + f, mask=mask, other=0.0).to(tl.float32)
        out_ptr = query_ptr if head < h else key_ptr
        to = (m[:, None] * h + head % h) * 2 * half + f
        tl.store(out_ptr + to, (first * cos1 - second * sin1).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + to + half, (second * cos2 + first * sin2).to(out_ptr.dtype.element_ty), mask=mask)
    j = tl.arange(0, BN)[None, :]
    there = (m < M)[:, None] & (j < n)
    tl.store(scores_ptr + m[:, None] * n + j, tl.load(row_ptr + 4 * h * half + j, mask=there), mask=there)


@triton.jit
def _turn_back(grad_ptr, to_ptr, half, mask, cos1, cos2, sin1, sin2):
    """Rotate the gradient of one head back."""
    first = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(grad_ptr + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(to_ptr, (first * cos1 + second * sin2).to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(to_ptr + half, (second * cos2 - first * sin1).to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotation_backward_kernel(
    query_ptr, key_ptr, scores_ptr, cos_ptr, sin_ptr, out_ptr, M, T, angle_rows, h, half, n, C,
    query_b, query_t, query_h, key_b, key_t, key_h, scores_stride,
    BM: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of the columns that `_rotation_kernel` reads in the same program; of the rest, zeros."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    f = tl.arange(0, BF)[None, :]
    mask = (m < M)[:, None] & (f < half)
    cos1, cos2, sin1, sin2 = _angles(cos_ptr, sin_ptr, m % angle_rows, half, mask, BF)
    to_ptr = out_ptr + m[:, None] * C + f
    from_query_ptr = query_ptr + (m // T * query_b + m % T * query_t)[:, None] + f
    from_key_ptr = key_ptr + (m // T * key_b + m % T * key_t)[:, None] + f
    for head in range(h):
        _turn_back(from_query_ptr + head * query_h, to_ptr + head * 2 * half, half, mask, cos1, cos2, sin1, sin2)
        _turn_back(from_key_ptr + head * key_h, to_ptr + (h + head) * 2 * half, half, mask, cos1, cos2, sin1, sin2)
    j = tl.arange(0, BN)[None, :]
    there = (m < M)[:, None] & (j < C - 4 * h * half)
    scores = tl.load(scores_ptr + m[:, None] * scores_stride + j, mask=there & (j < n), other=0.0)
    tl.store(out_ptr + m[:, None] * C + 4 * h * half + j, scores, mask=there)


@operator("doge_lm::rotated_projections")
def rotated_projections(
    product_BTC: Tensor, cos_BTf: Tensor, sin_BTf: Tensor, heads: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the product of the inputs with W_q, W_k and the scores' matrix, and rotate queries and keys.

    Args:
        product_BTC: columns in that order; what stands beyond has no meaning.
        cos_BTf, sin_BTf: float32, (B or 1, T, f), contiguous; feature i of a head pairs with i + f/2.
        heads: h.
        values: n.

    Returns:
        Queries and keys (B, T, h, f), and scores (B, T, n), in the type of the product.
    """
    (b, t, _), f = product_BTC.shape, cos_BTf.shape[-1]
    query_BThf, key_BThf = (product_BTC.new_empty((b, t, heads, f)) for _ in range(2))
    scores_BTn = product_BTC.new_empty((b, t, values))
    if b * t:
        product_MC = by_rows(product_BTC.flatten(0, 1))
        launcher(_rotation_kernel)[(triton.cdiv(b * t, _BM),)](
            product_MC, cos_BTf, sin_BTf, query_BThf, key_BThf, scores_BTn, b * t, cos_BTf.shape[0] * t,
            product_MC.stride(0), heads, f // 2, values,
            BM=_BM, BF=triton.next_power_of_2(f // 2), BN=triton.next_power_of_2(values),
        )  # fmt: skip
    return query_BThf, key_BThf, scores_BTn


@operator("doge_lm::rotated_projections_backward")
def rotated_projections_backward(
    query_BThf: Tensor, key_BThf: Tensor, scores_BTn: Tensor, cos_BTf: Tensor, sin_BTf: Tensor, columns: int
) -> Tensor:
    """The gradient of the product, (B, T, C), by those of its three parts."""
    b, t, h, f = query_BThf.shape
    out_BTC = query_BThf.new_empty((b, t, columns))
    if b * t:
        query_BThf, key_BThf, scores_Mn = by_rows(query_BThf), by_rows(key_BThf), by_rows(scores_BTn.flatten(0, 1))
        launcher(_rotation_backward_kernel)[(triton.cdiv(b * t, _BM),)](
            query_BThf, key_BThf, scores_Mn, cos_BTf, sin_BTf, out_BTC, b * t, t, cos_BTf.shape[0] * t, h, f // 2,
            scores_Mn.shape[1], columns, *query_BThf.stride()[:3], *key_BThf.stride()[:3], scores_Mn.stride(0),
            BM=_BM, BF=triton.next_power_of_2(f // 2), BN=triton.next_power_of_2(columns - 2 * h * f),
        )  # fmt: skip
    return out_BTC


@rotated_projections.register_fake
def _(product_BTC: Tensor, cos_BTf: Tensor, sin_BTf: Tensor, heads: int, values: int) -> tuple[Tensor, Tensor, Tensor]:
    b, t, _ = product_BTC.shape
    query_BThf, key_BThf = (product_BTC.new_empty((b, t, heads, cos_BTf.shape[-1])) for _ in range(2))
    return query_BThf, key_BThf, product_BTC.new_empty((b, t, values))


@rotated_projections_backward.register_fake
def _(
    query_BThf: Tensor, key_BThf: Tensor, scores_BTn: Tensor, cos_BTf: Tensor, sin_BTf: Tensor, columns: int
) -> Tensor:
    return query_BThf.new_empty((*query_BThf.shape[:2], columns))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    product_BTC, cos_BTf, sin_BTf, _, _ = inputs
    ctx.columns = product_BTC.shape[-1]
    ctx.save_for_backward(cos_BTf, sin_BTf)


def _backward(ctx: Any, query: Tensor, key: Tensor, scores: Tensor) -> tuple[Tensor | None, ...]:
    return rotated_projections_backward(query, key, scores, *ctx.saved_tensors, ctx.columns), None, None, None, None


rotated_projections.register_autograd(_backward, setup_context=_save)
