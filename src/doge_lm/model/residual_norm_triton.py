"""A branch added to the residual stream, and the RMSNorm of the sum, as one Triton kernel a pass.

Left to `torch.compile`, the backward pass takes one kernel for the norm's gradient in float32 and a second one to cast
it to the branch's type; here both are written while a row is in registers. For the backward pass the sum is kept in
bfloat16 where that is the branch's type: half of the memory, and the time to read it back pays for writing it. (In
float16 a sum might not be a number any more.)

Shapes, the one legend of this file:

    M  tokens             BM  tokens of a tile         p  programs of the backward pass
    d  hidden size        BF  d, rounded up to a power of 2
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_operator import SUMMING_PROGRAMS, by_rows, launcher, operator

MOST_FEATURES = 8192
"""The widest rows that the kernels are made for: a tile holds rows whole, in registers."""

_FORWARD_TILE, _BACKWARD_TILE = 4096, 2048
"""Elements of a tile that has several rows. The backward pass holds more of them at once, and is to stay below 128
registers a thread."""


@triton.jit
def _inverse_rms(x, there, eps: tl.constexpr, d: tl.constexpr):
    """1/√(mean x² + eps) of BM rows, (BM, 1); rows that are not there give a number even where eps is 0."""
    mean = tl.sum(x * x, axis=1) / d
    return tl.rsqrt(tl.where(there, mean, 1.0) + eps)[:, None]


@triton.jit
def _add_norm_kernel(
    residual_ptr, branch_ptr, weight_ptr, sum_ptr, normed_ptr, kept_ptr, M, residual_stride, branch_stride,
    eps: tl.constexpr, d: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    f = tl.arange(0, BF)
    mask = (m < M)[:, None] & (f < d)[None, :]
    residual = tl.load(residual_ptr + m[:, None] * residual_stride + f[None, :], mask=mask, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + m[:, None] * branch_stride + f[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + f, mask=f < d, other=0.0).to(tl.float32)
    stored = (residual + branch).to(sum_ptr.dtype.element_ty)
    x = stored.to(tl.float32)
    normed = x * _inverse_rms(x, m < M, eps, d) * weight[None, :]
    to = m[:, None] * d + f[None, :]
    tl.store(sum_ptr + to, stored, mask=mask)
    tl.store(normed_ptr + to, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    if KEEP:
        tl.store(kept_ptr + to, stored.to(kept_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_backward_kernel(
    sum_grad_ptr, normed_grad_ptr, x_ptr, weight_ptr, residual_grad_ptr, branch_grad_ptr, weight_parts_ptr, M,
    sum_grad_stride, normed_grad_stride,
    eps: tl.constexpr, d: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, SUM_GRAD: tl.constexpr,
):  # fmt: skip
    """Every p-th tile's gradients; of the weight's, the part that these add. x is the sum as it was kept.

    With g = grad·weight, r = 1/rms(x) and x̂ = r·x, the norm's gradient is r·(g − x̂·mean(g·x̂)).
    """
    f = tl.arange(0, BF)
    weight = tl.load(weight_ptr + f, mask=f < d, other=0.0).to(tl.float32)[None, :]
    weight_part = tl.zeros((BM, BF), tl.float32)  # summed over its rows only once, at the end
    for tile in range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0)):
        m = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        mask = (m < M)[:, None] & (f < d)[None, :]
        at = m[:, None] * d + f[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad_at = m[:, None] * normed_grad_stride + f[None, :]
        grad = tl.load(normed_grad_ptr + grad_at, mask=mask, other=0.0).to(tl.float32)
        if SUM_GRAD:  # loaded before the sums over rows, which wait for all warps
            grad_at = m[:, None] * sum_grad_stride + f[None, :]
            sum_grad = tl.load(sum_grad_ptr + grad_at, mask=mask, other=0.0).to(tl.float32)
        r = _inverse_rms(x, m < M, eps, d)
        x *= r
        weight_part += grad * x
        grad *= weight
        x_grad = r * (grad - x * (tl.sum(grad * x, axis=1) / d)[:, None])
        if SUM_GRAD:
            x_grad += sum_grad
        tl.store(residual_grad_ptr + at, x_grad.to(residual_grad_ptr.dtype.element_ty), mask=mask)
        tl.store(branch_grad_ptr + at, x_grad.to(branch_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(weight_parts_ptr + tl.program_id(0) * d + f, tl.sum(weight_part, axis=0), mask=f < d)


def _tile(d: int, elements: int) -> tuple[int, int, int]:
    """BM, BF and the warps of a tile."""
    width = triton.next_power_of_2(d)
    return max(1, elements // width), width, 4 if width <= elements else 8


def add_norm(
    residual_Md: Tensor, branch_Md: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """residual + branch and its RMSNorm, computed in float32.

    Args:
        residual_Md: of float32 or a shorter type, as the others; d is at most `MOST_FEATURES`.
        branch_Md: where it is in bfloat16, as under autocast, the backward pass sees the sum rounded to that.
        weight_d: of the norm.
        eps: of the norm, added to the mean of the squares.
        dtype: of the norm's result; None: that of the branch.

    Returns:
        The sum in the residual's type and its norm, each (M, d).
    """
    keep = torch.is_grad_enabled() and branch_Md.dtype == torch.bfloat16 != residual_Md.dtype
    sum_Md, normed_Md, _ = add_norm_and_keep(residual_Md, branch_Md, weight_d, eps, dtype or branch_Md.dtype, keep)
    return sum_Md, normed_Md


@operator("doge_lm::add_norm")
def add_norm_and_keep(
    residual_Md: Tensor, branch_Md: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm`, and if `keep` the sum in the branch's type, to be kept for the backward pass; or else no rows."""
    m, d = residual_Md.shape
    sum_Md, normed_Md = residual_Md.new_empty((m, d)), branch_Md.new_empty((m, d), dtype=dtype)
    kept_Md = branch_Md.new_empty((m if keep else 0, d))
    if sum_Md.numel():
        residual_Md, branch_Md = by_rows(residual_Md), by_rows(branch_Md)
        rows, width, warps = _tile(d, _FORWARD_TILE)
        launcher(_add_norm_kernel)[(triton.cdiv(m, rows),)](
            residual_Md, branch_Md, weight_d.contiguous(), sum_Md, normed_Md, kept_Md, m,
            residual_Md.stride(0), branch_Md.stride(0),
            eps=eps, d=d, BM=rows, BF=width, KEEP=keep, num_warps=warps,
        )  # fmt: skip
    return sum_Md, normed_Md, kept_Md


@operator("doge_lm::add_norm_backward")
def add_norm_backward(
    sum_grad_Md: Tensor | None,
    normed_grad_Md: Tensor,
    kept_Md: Tensor,
    weight_d: Tensor,
    eps: float,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of residual, branch and weight by those of the sum (None: 0) and of its norm, from the sum."""
    m, d = kept_Md.shape
    residual_grad_Md = kept_Md.new_empty((m, d), dtype=residual_dtype)
    branch_grad_Md = kept_Md.new_empty((m, d), dtype=branch_dtype)
    parts_pd = weight_d.new_empty((SUMMING_PROGRAMS, d), dtype=torch.float32)
    normed_grad_Md = by_rows(normed_grad_Md)
    given = sum_grad_Md is not None
    sum_grad_Md = normed_grad_Md if sum_grad_Md is None else by_rows(sum_grad_Md)  # some pointer, never read
    rows, width, warps = _tile(d, _BACKWARD_TILE)
    launcher(_add_norm_backward_kernel)[(SUMMING_PROGRAMS,)](
        sum_grad_Md, normed_grad_Md, kept_Md, weight_d.contiguous(), residual_grad_Md, branch_grad_Md, parts_pd, m,
        sum_grad_Md.stride(0), normed_grad_Md.stride(0), eps=eps,
        d=d, BM=rows, BF=width, SUM_GRAD=given, num_warps=warps,
    )  # fmt: skip
    return residual_grad_Md, branch_grad_Md, parts_pd.sum(0).to(weight_d.dtype)


@add_norm_and_keep.register_fake
def _(
    residual_Md: Tensor, branch_Md: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    m, d = residual_Md.shape
    kept_Md = branch_Md.new_empty((m if keep else 0, d))
    return residual_Md.new_empty((m, d)), branch_Md.new_empty((m, d), dtype=dtype), kept_Md


@add_norm_backward.register_fake
def _(
    sum_grad_Md: Tensor | None,
    normed_grad_Md: Tensor,
    kept_Md: Tensor,
    weight_d: Tensor,
    eps: float,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    residual_grad_Md, branch_grad_Md = (
        kept_Md.new_empty(kept_Md.shape, dtype=t) for t in (residual_dtype, branch_dtype)
    )
    return residual_grad_Md, branch_grad_Md, weight_d.new_empty(weight_d.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    residual_Md, branch_Md, weight_d, ctx.eps, _, keep = inputs
    ctx.dtypes = residual_Md.dtype, branch_Md.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2] if keep else output[0], weight_d)


def _backward(
    ctx: Any, sum_grad_Md: Tensor | None, normed_grad_Md: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if normed_grad_Md is None:
        return sum_grad_Md, sum_grad_Md, None, None, None, None  # autograd casts to the input's type
    gradients = add_norm_backward(sum_grad_Md, normed_grad_Md, *ctx.saved_tensors, ctx.eps, *ctx.dtypes)
    return *gradients, None, None, None


add_norm_and_keep.register_autograd(_backward, setup_context=_save)
