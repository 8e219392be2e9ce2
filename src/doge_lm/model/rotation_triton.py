"""Queries, keys and scores out of their one matrix product, queries and keys rotated: one Triton kernel a pass.

Left to `torch.compile`, putting the three gradients together again takes four times as long as moving them. Queries and
keys that have a norm are normed on the way, before they are rotated.

Shapes, the one legend of this file:

    B  batch      h  heads                     n   inner values
    T  tokens     f  features of a head        C   columns of the product: h·f queries, h·f keys, n scores, the rest
    BM  tokens of a program                    BF  f/2, rounded up to a power of 2
    p  programs of the backward pass with norms
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .triton_operator import SUMMING_PROGRAMS, by_rows, launcher, operator

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
def _inverse_rms(first, second, half, eps: tl.constexpr):
    """1/√(mean x² + eps) of BM rows that come in halves, (BM, 1)."""
    return tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * half) + eps)[:, None]


@triton.jit
def _rotation_kernel(
    product_ptr, query_gains_ptr, key_gains_ptr, cos_ptr, sin_ptr, query_ptr, key_ptr, scores_ptr,
    M, angle_rows, product_stride, h, half, n,
    eps: tl.constexpr, NORMED: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    f = tl.arange(0, BF)[None, :]
    mask = (m < M)[:, None] & (f < half)
    cos1, cos2, sin1, sin2 = _angles(cos_ptr, sin_ptr, m % angle_rows, half, mask, BF)
    row_ptr = product_ptr + m[:, None] * product_stride
    for head in range(2 * h):
        first = tl.load(row_ptr + head * 2 * half + f, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(row_ptr + head * 2 * half + half + f, mask=mask, other=0.0).to(tl.float32)
        if NORMED:
            gains_ptr = query_gains_ptr if head < h else key_gains_ptr
            inverse = _inverse_rms(first, second, half, eps)
            first *= inverse * tl.load(gains_ptr + f, mask=f < half, other=0.0)
            second *= inverse * tl.load(gains_ptr + half + f, mask=f < half, other=0.0)
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


@triton.jit
def _normed_turn_back(grad_ptr, x_ptr, to_ptr, gains1, gains2, half, mask, cos1, cos2, sin1, sin2, eps: tl.constexpr):
    """The gradient of one head back through rotation and norm; returns that of the gains, row by row, in two halves.

    With g = grad·gains, r = 1/rms(x) and x̂ = r·x, the norm's gradient is r·(g − x̂·mean(g·x̂)).
    """
    first = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(grad_ptr + half, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + half, mask=mask, other=0.0).to(tl.float32)
    inverse = _inverse_rms(x1, x2, half, eps)
    x1 *= inverse
    x2 *= inverse
    grad1, grad2 = first * cos1 + second * sin2, second * cos2 - first * sin1
    part1, part2 = grad1 * x1, grad2 * x2
    grad1 *= gains1
    grad2 *= gains2
    mean = ((tl.sum(grad1 * x1, axis=1) + tl.sum(grad2 * x2, axis=1)) / (2 * half))[:, None]
    tl.store(to_ptr, (inverse * (grad1 - x1 * mean)).to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(to_ptr + half, (inverse * (grad2 - x2 * mean)).to(to_ptr.dtype.element_ty), mask=mask)
    return part1, part2


@triton.jit
def _normed_backward_kernel(
    query_ptr, key_ptr, scores_ptr, product_ptr, query_gains_ptr, key_gains_ptr, cos_ptr, sin_ptr, out_ptr, parts_ptr,
    M, T, angle_rows, product_stride, h, half, n, C,
    query_b, query_t, query_h, key_b, key_t, key_h, scores_stride,
    eps: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Every p-th tile's gradients, as of `_rotation_backward_kernel`; of the gains', the part that these add."""
    f = tl.arange(0, BF)[None, :]
    there = f < half
    query1 = tl.load(query_gains_ptr + f, mask=there, other=0.0)
    query2 = tl.load(query_gains_ptr + half + f, mask=there, other=0.0)
    key1 = tl.load(key_gains_ptr + f, mask=there, other=0.0)
    key2 = tl.load(key_gains_ptr + half + f, mask=there, other=0.0)
    sums1, sums2 = tl.zeros((BM, BF), tl.float32), tl.zeros((BM, BF), tl.float32)
    sums3, sums4 = tl.zeros((BM, BF), tl.float32), tl.zeros((BM, BF), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0)):
        m = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        mask = (m < M)[:, None] & there
        cos1, cos2, sin1, sin2 = _angles(cos_ptr, sin_ptr, m % angle_rows, half, mask, BF)
        x_ptr = product_ptr + m[:, None] * product_stride + f
        to_ptr = out_ptr + m[:, None] * C + f
        from_query_ptr = query_ptr + (m // T * query_b + m % T * query_t)[:, None] + f
        from_key_ptr = key_ptr + (m // T * key_b + m % T * key_t)[:, None] + f
        for head in range(h):
            at = head * 2 * half
            part1, part2 = _normed_turn_back(
                from_query_ptr + head * query_h, x_ptr + at, to_ptr + at, query1, query2, half, mask,
                cos1, cos2, sin1, sin2, eps,
            )  # fmt: skip
            sums1 += part1
            sums2 += part2
            at += 2 * h * half
            part1, part2 = _normed_turn_back(
                from_key_ptr + head * key_h, x_ptr + at, to_ptr + at, key1, key2, half, mask,
                cos1, cos2, sin1, sin2, eps,
            )  # fmt: skip
            sums3 += part1
            sums4 += part2
        j = tl.arange(0, BN)[None, :]
        left = (m < M)[:, None] & (j < C - 4 * h * half)
        scores = tl.load(scores_ptr + m[:, None] * scores_stride + j, mask=left & (j < n), other=0.0)
        tl.store(out_ptr + m[:, None] * C + 4 * h * half + j, scores, mask=left)
    to_ptr = parts_ptr + tl.program_id(0) * 4 * half + tl.arange(0, BF)
    there = tl.arange(0, BF) < half
    tl.store(to_ptr, tl.sum(sums1, axis=0), mask=there)
    tl.store(to_ptr + half, tl.sum(sums2, axis=0), mask=there)
    tl.store(to_ptr + 2 * half, tl.sum(sums3, axis=0), mask=there)
    tl.store(to_ptr + 3 * half, tl.sum(sums4, axis=0), mask=there)


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
    return _rotated(product_BTC, None, cos_BTf, sin_BTf, heads, values, 0.0)


def _empty_parts(product_BTC: Tensor, heads: int, values: int, f: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for queries, keys and scores."""
    b, t, _ = product_BTC.shape
    query_BThf, key_BThf = (product_BTC.new_empty((b, t, heads, f)) for _ in range(2))
    return query_BThf, key_BThf, product_BTC.new_empty((b, t, values))


def _rotated(
    product_BTC: Tensor,
    gains: tuple[Tensor, Tensor] | None,
    cos_BTf: Tensor,
    sin_BTf: Tensor,
    heads: int,
    values: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, t, _), f = product_BTC.shape, cos_BTf.shape[-1]
    query_BThf, key_BThf, scores_BTn = _empty_parts(product_BTC, heads, values, f)
    if b * t:
        product_MC = by_rows(product_BTC.flatten(0, 1))
        launcher(_rotation_kernel)[(triton.cdiv(b * t, _BM),)](
            product_MC, *(gains or (cos_BTf, cos_BTf)), cos_BTf, sin_BTf, query_BThf, key_BThf, scores_BTn,
            b * t, cos_BTf.shape[0] * t, product_MC.stride(0), heads, f // 2, values,
            eps=eps, NORMED=gains is not None,
            BM=_BM, BF=triton.next_power_of_2(f // 2), BN=triton.next_power_of_2(values),
        )  # fmt: skip
    return query_BThf, key_BThf, scores_BTn


@operator("doge_lm::normed_rotated_projections")
def normed_rotated_projections(
    product_BTC: Tensor,
    query_gains_f: Tensor,
    key_gains_f: Tensor,
    cos_BTf: Tensor,
    sin_BTf: Tensor,
    heads: int,
    values: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rotated_projections`, with an RMSNorm of each head's queries and keys before they are rotated.

    Args:
        query_gains_f, key_gains_f: float32, (f), the weights of the norms, which the heads share.
        eps: of the norms, above 0, added to the mean of the squares.
    """
    gains = query_gains_f.contiguous(), key_gains_f.contiguous()
    return _rotated(product_BTC, gains, cos_BTf, sin_BTf, heads, values, eps)


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


@operator("doge_lm::normed_rotated_projections_backward")
def normed_rotated_projections_backward(
    query_BThf: Tensor,
    key_BThf: Tensor,
    scores_BTn: Tensor,
    product_BTC: Tensor,
    query_gains_f: Tensor,
    key_gains_f: Tensor,
    cos_BTf: Tensor,
    sin_BTf: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of the product, (B, T, C), and of both gains, (2, f), by those of the three results."""
    b, t, h, f = query_BThf.shape
    columns = product_BTC.shape[-1]
    out_BTC = query_BThf.new_empty((b, t, columns))
    parts_p2f = query_gains_f.new_empty((SUMMING_PROGRAMS, 2, f))
    query_BThf, key_BThf, scores_Mn = by_rows(query_BThf), by_rows(key_BThf), by_rows(scores_BTn.flatten(0, 1))
    product_MC = by_rows(product_BTC.flatten(0, 1))
    launcher(_normed_backward_kernel)[(SUMMING_PROGRAMS,)](
        query_BThf, key_BThf, scores_Mn, product_MC, query_gains_f.contiguous(), key_gains_f.contiguous(),
        cos_BTf, sin_BTf, out_BTC, parts_p2f, b * t, t, cos_BTf.shape[0] * t, product_MC.stride(0), h, f // 2,
        scores_Mn.shape[1], columns, *query_BThf.stride()[:3], *key_BThf.stride()[:3], scores_Mn.stride(0),
        eps=eps, BM=_BM, BF=triton.next_power_of_2(f // 2), BN=triton.next_power_of_2(columns - 2 * h * f),
    )  # fmt: skip
    return out_BTC, parts_p2f.sum(0)


@rotated_projections.register_fake
def _(product_BTC: Tensor, cos_BTf: Tensor, sin_BTf: Tensor, heads: int, values: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_parts(product_BTC, heads, values, cos_BTf.shape[-1])


@rotated_projections_backward.register_fake
def _(
    query_BThf: Tensor, key_BThf: Tensor, scores_BTn: Tensor, cos_BTf: Tensor, sin_BTf: Tensor, columns: int
) -> Tensor:
    return query_BThf.new_empty((*query_BThf.shape[:2], columns))


@normed_rotated_projections.register_fake
def _(
    product_BTC: Tensor,
    query_gains_f: Tensor,
    key_gains_f: Tensor,
    cos_BTf: Tensor,
    sin_BTf: Tensor,
    heads: int,
    values: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_parts(product_BTC, heads, values, cos_BTf.shape[-1])


@normed_rotated_projections_backward.register_fake
def _(
    query_BThf: Tensor,
    key_BThf: Tensor,
    scores_BTn: Tensor,
    product_BTC: Tensor,
    query_gains_f: Tensor,
    key_gains_f: Tensor,
    cos_BTf: Tensor,
    sin_BTf: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return query_BThf.new_empty(product_BTC.shape), query_gains_f.new_empty((2, query_gains_f.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    product_BTC, cos_BTf, sin_BTf, _, _ = inputs
    ctx.columns = product_BTC.shape[-1]
    ctx.save_for_backward(cos_BTf, sin_BTf)


def _backward(ctx: Any, query: Tensor, key: Tensor, scores: Tensor) -> tuple[Tensor | None, ...]:
    return rotated_projections_backward(query, key, scores, *ctx.saved_tensors, ctx.columns), None, None, None, None


rotated_projections.register_autograd(_backward, setup_context=_save)


def _save_normed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _normed_backward(ctx: Any, query: Tensor, key: Tensor, scores: Tensor) -> tuple[Tensor | None, ...]:
    grad_BTC, gains_2f = normed_rotated_projections_backward(query, key, scores, *ctx.saved_tensors, ctx.eps)
    return grad_BTC, gains_2f[0], gains_2f[1], None, None, None, None, None


normed_rotated_projections.register_autograd(_normed_backward, setup_context=_save_normed)
