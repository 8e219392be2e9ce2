"""Triton kernels for the experts of a CDMoE, where there are too many to score them all.

The experts come down to three products with a table of rows that is indexed, each in the backward pass of the others:

    dots      S[m, k] = A[m] · T[x[m, k]]                                        (M, F), (N, F) -> (M, K)
    bag       Y[m]    = Σ_k W[m, k] T[x[m, k]]                                   (M, K), (N, F) -> (M, F)
    scatter   G[n]    = Σ W[m, k] A[m]  over all (m, k) with x[m, k] = n         (M, K), (M, F) -> (N, F)

`dots` with D and `bag` with U make the layer; what lies between them, the weights and the activation of M·K numbers,
is left to PyTorch. In `scatter` no two programs add to one row: the assignments are sorted by row and cut into chunks
of equal length, so a row that many tokens take costs no more than others. Where a chunk cuts the run of a row, the
parts are added up in order by a second kernel. So the result is the same every time.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    M  tokens              N  rows of the table        A  assignments, M·K
    K  rows of a token     F  features
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = bool(triton.knobs.runtime.interpret)  # as the kernels are decorated

CHUNK = 64
"""Assignments that one program of `scatter` sums: a matrix product with as many rows."""


@triton.jit
def _dots_kernel(
    rows_ptr, table_ptr, index_ptr, out_ptr, K, F, row_stride, table_stride, BK: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """BK products of one token."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    index = tl.load(index_ptr + m * K + k, mask=k < K, other=0).to(tl.int64)
    sums = tl.zeros((BK,), tl.float32)
    for begin in range(0, F, BF):
        f = begin + tl.arange(0, BF)
        row = tl.load(rows_ptr + m * row_stride + f, mask=f < F, other=0.0).to(tl.float32)
        mask = (k < K)[:, None] & (f < F)[None, :]
        tile = tl.load(table_ptr + index[:, None] * table_stride + f[None, :], mask=mask, other=0.0)
        sums += tl.sum(tile.to(tl.float32) * row[None, :], axis=1)
    tl.store(out_ptr + m * K + k, sums, mask=k < K)


@triton.jit
def _bag_kernel(weights_ptr, table_ptr, index_ptr, out_ptr, K, F, table_stride, BK: tl.constexpr, BF: tl.constexpr):
    """BF features of one token."""
    m = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    sums = tl.zeros((BF,), tl.float32)
    for begin in range(0, K, BK):
        k = begin + tl.arange(0, BK)
        index = tl.load(index_ptr + m * K + k, mask=k < K, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        mask = (k < K)[:, None] & (f < F)[None, :]
        tile = tl.load(table_ptr + index[:, None] * table_stride + f[None, :], mask=mask, other=0.0)
        sums += tl.sum(tile.to(tl.float32) * weight[:, None], axis=0)
    tl.store(out_ptr + m * F + f, sums.to(out_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _scatter_kernel(
    weights_ptr, rows_ptr, keys_ptr, order_ptr, out_ptr, partial_ptr, A, K, F, row_stride,
    CHUNK: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BF features of the sums of one chunk, run by run: a (runs, CHUNK) matrix of weights times the chunk's rows."""
    chunk = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    lane = tl.arange(0, CHUNK)
    i = chunk * CHUNK + lane
    key = tl.load(keys_ptr + i, mask=i < A, other=-1)
    before = tl.load(keys_ptr + i - 1, mask=(i > 0) & (i < A), other=-1)
    after = tl.load(keys_ptr + i + 1, mask=i + 1 < A, other=-1)
    run = tl.cumsum(((lane > 0) & (key != before) & (i < A)).to(tl.int32), axis=0)

    assignment = tl.load(order_ptr + i, mask=i < A, other=0).to(tl.int64)
    weight = tl.load(weights_ptr + assignment, mask=i < A, other=0.0).to(tl.float32)
    mask = (i < A)[:, None] & (f < F)[None, :]
    rows = tl.load(rows_ptr + (assignment // K)[:, None] * row_stride + f[None, :], mask=mask, other=0.0)
    member = (run[None, :] == lane[:, None]) & (i < A)[None, :]
    sums = tl.dot(tl.where(member, weight[None, :], 0.0), rows.to(tl.float32), input_precision=PRECISION)

    # Of each run: its row of the table, and whether it goes on beyond the chunk on either side.
    row = tl.max(tl.where(member, key[None, :], -1), axis=1).to(tl.int64)
    cut = ((lane == 0) & (key == before)) | ((lane == CHUNK - 1) & (key == after))
    is_cut = tl.max((member & cut[None, :]).to(tl.int32), axis=1) > 0
    there = (row >= 0)[:, None] & (f < F)[None, :]
    whole = there & (is_cut == 0)[:, None]
    tl.store(out_ptr + row[:, None] * F + f[None, :], sums.to(out_ptr.dtype.element_ty), mask=whole)
    # Only the first and the last run of a chunk can be cut.
    place = 2 * chunk + tl.minimum(lane, 1)
    tl.store(partial_ptr + place[:, None] * F + f[None, :], sums, mask=there & is_cut[:, None])


@triton.jit
def _join_kernel(keys_ptr, out_ptr, partial_ptr, A, F, CHUNK: tl.constexpr, BF: tl.constexpr):
    """Adds up the parts of the run that begins in a chunk and goes on beyond it, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    end = (chunk + 1) * CHUNK
    key = tl.load(keys_ptr + end - 1, mask=end - 1 < A, other=-2)
    first = tl.load(keys_ptr + chunk * CHUNK)
    before = tl.load(keys_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    after = tl.load(keys_ptr + end, mask=end < A, other=-1)
    if (key == after) & (key != before):
        own = 2 * chunk + (first != key).to(tl.int64)
        sums = tl.load(partial_ptr + own * F + f, mask=f < F, other=0.0)
        while key == after:
            chunk += 1
            sums += tl.load(partial_ptr + 2 * chunk * F + f, mask=f < F, other=0.0)
            end = (chunk + 1) * CHUNK
            last = tl.load(keys_ptr + end - 1, mask=end - 1 < A, other=-2)
            after = tl.load(keys_ptr + end, mask=end < A, other=-1)
            after = tl.where(last == key, after, -1)  # a run that ends within this chunk does not go on
        tl.store(out_ptr + key.to(tl.int64) * F + f, sums.to(out_ptr.dtype.element_ty), mask=f < F)


def experts_output(
    c_Me: Tensor,
    weights_MK: Tensor,
    experts_MK: Tensor,
    down_embed: Tensor,
    up_embed: Tensor,
    act: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Σ over a token's experts of σ(w · (c·D_expert)) U_expert; the arguments are those of `cdmoe.cdmoe`.

    Reads the K rows of each token in both passes, and writes each row of a gradient once. The same sums are made in
    the same order every time.

    Args:
        c_Me: (M, e).
        weights_MK, experts_MK: (M, K).
        down_embed: D, (N, e).
        up_embed: U, (N, d).
        act: σ.
        dtype: of the result.

    Returns:
        (M, d).
    """
    experts_MK = experts_MK.contiguous()
    keys_A, order_A = sort_assignments(experts_MK)
    inner_MK = dots(c_Me, down_embed, experts_MK, keys_A, order_A)
    hidden_MK = act(weights_MK * inner_MK)
    return bag(hidden_MK, up_embed, experts_MK, keys_A, order_A, dtype)


def is_usable(x: Tensor) -> bool:
    """Whether the kernels can run on a tensor: on a GPU, or in Triton's interpreter, in float32 or a shorter type."""
    return (x.is_cuda or _INTERPRETED) and x.dtype != torch.float64


def sort_assignments(index_MK: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that all assignments take, ascending, and the number of each assignment: (A,) each, int32.

    Equal rows stay in the order of their tokens, so that sums are always made in the same order.
    """
    keys_A, order_A = index_MK.flatten().int().sort(stable=True)
    return keys_A, order_A.int()


@torch.library.custom_op("doge_lm::expert_dots", mutates_args=())
def dots(rows_MF: Tensor, table_NF: Tensor, index_MK: Tensor, keys_A: Tensor, order_A: Tensor) -> Tensor:
    """S[m, k] = rows[m] · table[index[m, k]], (M, K) in float32.

    Args:
        rows_MF: of any floating type.
        table_NF: of any floating type, not necessarily the same.
        index_MK: int64, contiguous, in [0, N).
        keys_A: from `sort_assignments`, as `order_A`; the backward pass sums by them.
        order_A: see there.
    """
    (m, f), k = rows_MF.shape, index_MK.shape[1]
    out_MK = rows_MF.new_empty((m, k), dtype=torch.float32)
    if out_MK.numel():
        rows_MF, table_NF = _by_rows(rows_MF), _by_rows(table_NF)
        strides, blocks = (rows_MF.stride(0), table_NF.stride(0)), {"BK": _block(k, 16), "BF": _block(f, 128)}
        grid = (m, triton.cdiv(k, blocks["BK"]))
        _dots_kernel[grid](rows_MF, table_NF, index_MK, out_MK, k, f, *strides, **blocks)
    return out_MK


@torch.library.custom_op("doge_lm::expert_bag", mutates_args=())
def bag(
    weights_MK: Tensor, table_NF: Tensor, index_MK: Tensor, keys_A: Tensor, order_A: Tensor, dtype: torch.dtype
) -> Tensor:
    """Y[m] = Σ_k weights[m, k] table[index[m, k]], (M, F) in `dtype`; the other arguments are those of `dots`."""
    (m, k), f = index_MK.shape, table_NF.shape[1]
    out_MF = table_NF.new_empty((m, f), dtype=dtype)
    if out_MF.numel():
        table_NF, block = _by_rows(table_NF), _block(f, 256)
        _bag_kernel[(m, triton.cdiv(f, block))](
            weights_MK.contiguous(), table_NF, index_MK, out_MF, k, f, table_NF.stride(0), BK=_block(k, 16), BF=block
        )  # fmt: skip
    return out_MF


@torch.library.custom_op("doge_lm::expert_scatter", mutates_args=())
def scatter(
    weights_MK: Tensor, rows_MF: Tensor, keys_A: Tensor, order_A: Tensor, num_rows: int, dtype: torch.dtype
) -> Tensor:
    """G[n] = Σ weights[m, k] rows[m] over the assignments of row n, (num_rows, F) in `dtype`; zeros where none."""
    (m, k), f = weights_MK.shape, rows_MF.shape[1]
    out_NF = rows_MF.new_zeros((num_rows, f), dtype=dtype)
    if m * k * f:
        rows_MF = _by_rows(rows_MF)
        chunks, block = triton.cdiv(m * k, CHUNK), max(16, _block(f, 128))
        partial = rows_MF.new_empty((2 * chunks, f), dtype=torch.float32)
        grid = (chunks, triton.cdiv(f, block))
        # TF32 keeps more bits than bfloat16 has; of float32 it would lose some.
        precision = "ieee" if rows_MF.dtype == torch.float32 else "tf32"
        _scatter_kernel[grid](
            weights_MK.contiguous(), rows_MF, keys_A, order_A, out_NF, partial, m * k, k, f, rows_MF.stride(0),
            CHUNK=CHUNK, BF=block, PRECISION=precision,
        )  # fmt: skip
        _join_kernel[grid](keys_A, out_NF, partial, m * k, f, CHUNK=CHUNK, BF=block)
    return out_NF


def _block(size: int, most: int) -> int:
    return min(triton.next_power_of_2(size), most)


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@dots.register_fake
def _(rows_MF: Tensor, table_NF: Tensor, index_MK: Tensor, keys_A: Tensor, order_A: Tensor) -> Tensor:
    return rows_MF.new_empty(index_MK.shape, dtype=torch.float32)


@bag.register_fake
def _(
    weights_MK: Tensor, table_NF: Tensor, index_MK: Tensor, keys_A: Tensor, order_A: Tensor, dtype: torch.dtype
) -> Tensor:
    return table_NF.new_empty((index_MK.shape[0], table_NF.shape[1]), dtype=dtype)


@scatter.register_fake
def _(
    weights_MK: Tensor, rows_MF: Tensor, keys_A: Tensor, order_A: Tensor, num_rows: int, dtype: torch.dtype
) -> Tensor:
    return rows_MF.new_empty((num_rows, rows_MF.shape[1]), dtype=dtype)


def _save_for_dots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dots_backward(ctx: Any, grad_MK: Tensor) -> tuple[Tensor | None, ...]:
    rows_MF, table_NF, index_MK, keys_A, order_A = ctx.saved_tensors
    rows = table = None
    if ctx.needs_input_grad[0]:
        rows = bag(grad_MK, table_NF, index_MK, keys_A, order_A, rows_MF.dtype)
    if ctx.needs_input_grad[1]:
        table = scatter(grad_MK, rows_MF, keys_A, order_A, table_NF.shape[0], table_NF.dtype)
    return rows, table, None, None, None


def _save_for_bag(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _bag_backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor | None, ...]:
    weights_MK, table_NF, index_MK, keys_A, order_A = ctx.saved_tensors
    weights = table = None
    if ctx.needs_input_grad[0]:
        weights = dots(grad_MF, table_NF, index_MK, keys_A, order_A).to(weights_MK.dtype)
    if ctx.needs_input_grad[1]:
        table = scatter(weights_MK, grad_MF, keys_A, order_A, table_NF.shape[0], table_NF.dtype)
    return weights, table, None, None, None, None


dots.register_autograd(_dots_backward, setup_context=_save_for_dots)
bag.register_autograd(_bag_backward, setup_context=_save_for_bag)
