"""Triton kernels for the experts of a CDMoE, where there are too many to score them all.

The experts come down to three products with a table of rows that is indexed, each in the backward pass of the others:

    dots      S[m, k] = A[m] · T[x[m, k]]                                        (M, F), (N, F) -> (M, K)
    bag       Y[m]    = Σ_k W[m, k] T[x[m, k]]                                   (M, K), (N, F) -> (M, F)
    scatter   G[n]    = Σ W[m, k] A[m]  over all (m, k) with x[m, k] = n         (M, K), (M, F) -> (N, F)

Where all experts are scored, `pick` and `spread` take the chosen out of the scores and put them back among zeros.

`dots` with D and `bag` with U make the layer; what lies between them, the weights and the activation of M·K numbers,
is left to PyTorch. The backward pass of `bag` is a `dots` and a `scatter` that read the same rows: one kernel.

The rows that are gathered are many times what the tables hold, so what counts is that they come from the second-level
cache: programs work through all tokens for one slice of the features before the next slice (`_width`).

In `scatter` no two programs add to one row: the assignments are sorted by row, and a program sums those of its rows. A
row that very many tokens take is summed by chunks of equal length instead, and a further kernel adds up these parts in
order; where most rows have few tokens or none, all of them are. So the result is the same every time, and no row holds
up the others.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    M  tokens              N  rows of the table        A  assignments, M·K           R  segments of a program
    K  rows of a token     F  features                 s  slices of the features     U  rows on their way at a time
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_operator import INTERPRETED, by_rows, launcher, operator

CHUNK = 64
"""Assignments of a chunk, where a row has too many for one program, or most have few; a multiple of `_UNROLLED`."""

LONGEST = 256
"""The most assignments of a row that one program sums; at least `CHUNK`, so that a longer run reaches a chunk's end."""

_NARROWEST = 128  # features, or too little is read of a row at a time
_WIDEST = 512  # features of a program, which is one warp: 16 numbers a lane
_FEW = 2  # assignments of a row on average, below which most are not worth a program: they go by chunks
_UNROLLED = 8  # rows whose loads are under way at a time
_JOINED = 16  # parts of a run that are added up at a time
_SPREAD_CELLS = 4096
# Of a second-level cache of 50 MB (H100), what a slice of the table may take.
_CACHE_BYTES = 32 * 2**20


@triton.jit
def _dots_kernel(
    rows_ptr, table_ptr, index_ptr, out_ptr, A, K, F, row_stride, table_stride,
    U: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The K products of one token over one slice of the features."""
    m = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    row = tl.load(rows_ptr + m * row_stride + f, mask=f < F, other=0.0).to(tl.float32)
    out_ptr += tl.program_id(1).to(tl.int64) * A + m * K
    lane = tl.arange(0, U)
    for begin in range(0, K, U):
        products = tl.zeros((U,), tl.float32)
        for u in tl.static_range(U):
            k = begin + u
            index = tl.load(index_ptr + m * K + k, mask=k < K, other=0).to(tl.int64)
            taken = tl.load(table_ptr + index * table_stride + f, mask=(f < F) & (k < K), other=0.0).to(tl.float32)
            products = tl.where(lane == u, tl.sum(row * taken, axis=0), products)
        tl.store(out_ptr + begin + lane, products, mask=begin + lane < K)


@triton.jit
def _bag_kernel(
    weights_ptr, table_ptr, index_ptr, out_ptr, K, F, table_stride, U: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """BF features of one token."""
    m = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    sums = tl.zeros((BF,), tl.float32)
    for begin in range(0, K, U):
        for u in tl.static_range(U):
            k = begin + u
            index = tl.load(index_ptr + m * K + k, mask=k < K, other=0).to(tl.int64)
            weight = tl.load(weights_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
            taken = tl.load(table_ptr + index * table_stride + f, mask=(f < F) & (k < K), other=0.0)
            sums += weight * taken.to(tl.float32)
    tl.store(out_ptr + m * F + f, sums.to(out_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _segment_sums(
    weights_ptr, rows_ptr, order_ptr, table_ptr, dots_ptr, begin, end, to, f, A, K, F, row_stride, table_stride,
    U: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """Σ weight · row over the assignments [begin, end) of each of R segments, for the features f: (R, BF).

    With DOTS, also these rows' products with row `to` of the table, (R,), to which the segment is assigned.
    """
    sums = tl.zeros((begin.shape[0], f.shape[0]), tl.float32)
    features = (f < F)[None, :]
    if DOTS:
        at = to[:, None] * table_stride + f[None, :]
        taken = tl.load(table_ptr + at, mask=(begin < end)[:, None] & features, other=0.0).to(tl.float32)
    for step in range(0, tl.max(end - begin, axis=0), U):
        # All U rows are on their way before the first is used: no load may pass a store.
        rows = ()
        for u in tl.static_range(U):
            there = begin + step + u < end
            assignment = tl.load(order_ptr + begin + step + u, mask=there, other=0).to(tl.int64)
            weight = tl.load(weights_ptr + assignment, mask=there, other=0.0).to(tl.float32)
            row_at = (assignment // K * row_stride)[:, None] + f[None, :]
            row = tl.load(rows_ptr + row_at, mask=there[:, None] & features, other=0.0)
            rows = rows + ((there, assignment, weight, row),)  # type: ignore[assignment]  # noqa: RUF005  (Triton knows no unpacking)
        for u in tl.static_range(U):
            there, assignment, weight, row = rows[u]
            row = row.to(tl.float32)
            if DOTS:
                tl.store(dots_ptr + assignment, tl.sum(row * taken, axis=1), mask=there)
            sums += weight[:, None] * row
    return sums


@triton.jit
def _scatter_kernel(
    weights_ptr, rows_ptr, order_ptr, starts_ptr, out_ptr, table_ptr, dots_ptr, N, A, K, F, row_stride, table_stride,
    LONGEST: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BF: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """BF features of R rows of the table, zeros where no token took the row; longer ones than LONGEST are left out."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    begin = tl.load(starts_ptr + n, mask=n < N, other=0)
    end = tl.load(starts_ptr + n + 1, mask=n < N, other=0)
    mine = (n < N) & (end - begin <= LONGEST)
    sums = _segment_sums(
        weights_ptr, rows_ptr, order_ptr, table_ptr, dots_ptr + tl.program_id(1).to(tl.int64) * A,
        begin, tl.where(mine, end, begin), n, f, A, K, F, row_stride, table_stride, U, DOTS,
    )  # fmt: skip
    tl.store(
        out_ptr + n[:, None] * F + f[None, :],
        sums.to(out_ptr.dtype.element_ty),
        mask=mine[:, None] & (f < F)[None, :],
    )


@triton.jit
def _run_at(keys_ptr, starts_ptr, at, there):
    """Of the run that holds the sorted assignment `at`: its row, its begin and its end."""
    row = tl.load(keys_ptr + at, mask=there, other=0).to(tl.int64)
    return row, tl.load(starts_ptr + row, mask=there, other=0), tl.load(starts_ptr + row + 1, mask=there, other=0)


@triton.jit
def _long_run_kernel(
    weights_ptr, rows_ptr, keys_ptr, order_ptr, starts_ptr, partial_ptr, table_ptr, dots_ptr, A, K, F,
    row_stride, table_stride,
    CHUNK: tl.constexpr, LONGEST: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BF: tl.constexpr,
    DOTS: tl.constexpr,
):  # fmt: skip
    """BF features of R parts of long runs. Each chunk has places for two: the run at its begin, another at its end."""
    place = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    first = place // 2 * CHUNK
    last = tl.minimum(first + CHUNK, A) - 1
    there = first < A
    row, begin, end = _run_at(keys_ptr, starts_ptr, tl.where(place % 2 == 0, first, last), there)
    mine = there & (end - begin > LONGEST) & ((place % 2 == 0) | (begin > first))
    begin = tl.maximum(begin, first)
    sums = _segment_sums(
        weights_ptr, rows_ptr, order_ptr, table_ptr, dots_ptr + tl.program_id(1).to(tl.int64) * A,
        begin, tl.where(mine, tl.minimum(end, last + 1), begin), row, f, A, K, F, row_stride, table_stride, U, DOTS,
    )  # fmt: skip
    tl.store(partial_ptr + place[:, None] * F + f[None, :], sums, mask=mine[:, None] & (f < F)[None, :])


@triton.jit
def _chunk_kernel(
    weights_ptr, rows_ptr, keys_ptr, order_ptr, out_ptr, partial_ptr, table_ptr, dots_ptr, A, K, F,
    row_stride, table_stride,
    CHUNK: tl.constexpr, U: tl.constexpr, BF: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """BF features of the sums of one chunk, run by run.

    A run that lies within the chunk is written to its row of the table. Of one that goes on before or beyond the chunk,
    which only the first and the last can, a part is left for `_join_kernel`. With DOTS, also these rows' products with
    the rows of the table that they are assigned to.
    """
    chunk = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    start = chunk * CHUNK
    key = tl.load(keys_ptr + start)
    went_on = key == tl.load(keys_ptr + start - 1, mask=chunk > 0, other=-1)
    is_first = chunk >= 0  # true: this run is the chunk's first
    sums = tl.zeros((BF,), tl.float32)
    for begin in range(0, CHUNK, U):
        # All U rows are on their way before the first is used: no load may pass a store.
        rows = ()
        for u in tl.static_range(U):
            i = start + begin + u
            assignment = tl.load(order_ptr + i, mask=i < A, other=0).to(tl.int64)
            weight = tl.load(weights_ptr + assignment, mask=i < A, other=0.0).to(tl.float32)
            at = assignment // K * row_stride + f
            row = tl.load(rows_ptr + at, mask=(f < F) & (i < A), other=0.0)
            rows = rows + ((assignment, weight, row),)  # type: ignore[assignment]  # noqa: RUF005  (Triton knows no unpacking)
        for u in tl.static_range(U):
            i = start + begin + u
            there = i < A
            assignment, weight, taken_row = rows[u]  # type: ignore[var-annotated]
            row = taken_row.to(tl.float32)
            after = tl.load(keys_ptr + i + 1, mask=i + 1 < A, other=-1)
            if DOTS:
                at = key.to(tl.int64) * table_stride + f
                taken = tl.load(table_ptr + at, mask=(f < F) & there, other=0.0).to(tl.float32)
                to = tl.program_id(1).to(tl.int64) * A + assignment
                tl.store(dots_ptr + to, tl.sum(row * taken, axis=0), mask=there)
            sums += weight * row
            ends = there & (key != after)
            goes_on = there & (key == after) & (begin + u == CHUNK - 1)
            cut = (ends & is_first & went_on) | goes_on
            whole = ends & (cut == 0)
            to = key.to(tl.int64) * F + f
            tl.store(out_ptr + to, sums.to(out_ptr.dtype.element_ty), mask=(f < F) & whole)
            place = 2 * chunk + tl.where(is_first, 0, 1)
            tl.store(partial_ptr + place * F + f, sums, mask=(f < F) & cut)
            sums = tl.where(ends, 0.0, sums)
            is_first = is_first & (ends == 0)
            key = after


@triton.jit
def _join_kernel(
    keys_ptr, starts_ptr, out_ptr, partial_ptr, A, F,
    CHUNK: tl.constexpr, LONGEST: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of the run that begins in a chunk and goes on beyond it, if it is longer than LONGEST."""
    chunk = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    first = chunk * CHUNK
    row, begin, end = _run_at(keys_ptr, starts_ptr, tl.minimum(first + CHUNK, A) - 1, chunk >= 0)
    begins = (end - begin > LONGEST) & (begin >= first) & (end > first + CHUNK)
    own = 2 * chunk + (begin > first).to(tl.int64)
    sums = tl.load(partial_ptr + own * F + f, mask=begins & (f < F), other=0.0)
    part = tl.arange(0, PARTS)
    last = tl.where(begins, (end - 1) // CHUNK, chunk)
    for start in range(chunk + 1, last + 1, PARTS):
        there = (start + part <= last)[:, None] & (f < F)[None, :]
        parts = tl.load(partial_ptr + 2 * (start + part)[:, None] * F + f[None, :], mask=there, other=0.0)
        sums += tl.sum(parts, axis=0)
    tl.store(out_ptr + row * F + f, sums.to(out_ptr.dtype.element_ty), mask=begins & (f < F))


@triton.jit
def _spread_kernel(
    values_ptr, index_ptr, out_ptr, M, K, N, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of BM rows: each value at its place, the sum where several share one, and zeros."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(K):
        index = tl.load(index_ptr + m * K + k, mask=m < M, other=-1).to(tl.int32)
        value = tl.load(values_ptr + m * K + k, mask=m < M, other=0.0).to(tl.float32)
        sums += tl.where(index[:, None] == n[None, :], value[:, None], 0.0)
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], sums.to(out_ptr.dtype.element_ty), mask=mask)


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

    The same sums are made in the same order every time.

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
    if torch.is_grad_enabled():
        keys_A, order_A, starts_N1 = sort_assignments(experts_MK, down_embed.shape[0])
    else:  # only a backward pass sums by them
        keys_A, order_A, starts_N1 = (experts_MK.new_empty(0, dtype=torch.int32) for _ in range(3))
    down_read, up_read = (_to_read(table, dtype, experts_MK.numel()) for table in (down_embed, up_embed))
    inner_MK = dots(c_Me, down_embed, down_read, experts_MK, keys_A, order_A, starts_N1)
    hidden_MK = act(weights_MK * inner_MK)
    return bag(hidden_MK, up_embed, up_read, experts_MK, keys_A, order_A, starts_N1, dtype)


def _to_read(table_NF: Tensor, dtype: torch.dtype, assignments: int) -> Tensor:
    """The table in the type of the computation, where more rows will be read than it has; or else as it is."""
    table_NF = table_NF.detach()
    return table_NF.to(dtype) if table_NF.shape[0] < assignments else table_NF


def is_usable(x: Tensor) -> bool:
    """Whether the kernels can run on a tensor: on a GPU, or in Triton's interpreter, in float32 or a shorter type."""
    return (x.is_cuda or INTERPRETED) and x.dtype != torch.float64


def sort_assignments(index_MK: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that all assignments take, ascending; the number of each assignment; where those of each row begin.

    Equal rows stay in the order of their tokens, so that sums are always made in the same order.

    Returns:
        (A,), (A,), and (N + 1,) with A at last, int32.
    """
    # A radix sort passes over the numbers once for each of their bytes.
    short = torch.uint8 if num_rows <= 2**8 else torch.int16 if num_rows <= 2**15 else torch.int32
    keys_A, order_A = index_MK.flatten().to(short).sort(stable=True)
    rows_N1 = torch.arange(num_rows + 1, device=index_MK.device, dtype=torch.int32)
    keys_A = keys_A.int()
    return keys_A, order_A.int(), torch.searchsorted(keys_A, rows_N1, out_int32=True)


@operator("doge_lm::expert_dots")
def dots(
    rows_MF: Tensor,
    table_NF: Tensor,
    read_NF: Tensor,
    index_MK: Tensor,
    keys_A: Tensor,
    order_A: Tensor,
    starts_N1: Tensor,
) -> Tensor:
    """S[m, k] = rows[m] · table[index[m, k]], (M, K) in float32.

    Args:
        rows_MF: of any floating type.
        table_NF: gets the gradient, in its own type.
        read_NF: the same table, in the type in which it is to be read.
        index_MK: int64, contiguous, in [0, N).
        keys_A: from `sort_assignments`, as `order_A` and `starts_N1`; the backward pass sums by them.
        order_A: see there.
        starts_N1: see there.
    """
    (m, f), k = rows_MF.shape, index_MK.shape[1]
    if not m * k * f:
        return rows_MF.new_zeros((m, k), dtype=torch.float32)
    rows_MF, read_NF = by_rows(rows_MF), by_rows(read_NF)
    block = _width(read_NF)
    slices = triton.cdiv(f, block)
    out_sMK = rows_MF.new_empty((slices, m, k), dtype=torch.float32)
    launcher(_dots_kernel)[(m, slices)](
        rows_MF, read_NF, index_MK, out_sMK, m * k, k, f, rows_MF.stride(0), read_NF.stride(0),
        U=_unrolled(k), BF=block, num_warps=1,
    )  # fmt: skip
    return _sum_of_slices(out_sMK)


@operator("doge_lm::expert_bag")
def bag(
    weights_MK: Tensor,
    table_NF: Tensor,
    read_NF: Tensor,
    index_MK: Tensor,
    keys_A: Tensor,
    order_A: Tensor,
    starts_N1: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Y[m] = Σ_k weights[m, k] table[index[m, k]], (M, F) in `dtype`; the other arguments are those of `dots`."""
    (m, k), f = index_MK.shape, read_NF.shape[1]
    if not m * k * f:
        return read_NF.new_zeros((m, f), dtype=dtype)
    out_MF = read_NF.new_empty((m, f), dtype=dtype)
    read_NF, block = by_rows(read_NF), _width(read_NF)
    launcher(_bag_kernel)[(m, triton.cdiv(f, block))](
        weights_MK.contiguous(), read_NF, index_MK, out_MF, k, f, read_NF.stride(0),
        U=_unrolled(k), BF=block, num_warps=1,
    )  # fmt: skip
    return out_MF


@operator("doge_lm::expert_scatter")
def scatter(
    weights_MK: Tensor, rows_MF: Tensor, keys_A: Tensor, order_A: Tensor, starts_N1: Tensor, dtype: torch.dtype
) -> Tensor:
    """G[n] = Σ weights[m, k] rows[m] over the assignments of row n, (N, F) in `dtype`; zeros where none."""
    return _scattered(weights_MK, rows_MF, keys_A, order_A, starts_N1, dtype, None)[0]


@operator("doge_lm::expert_scatter_and_dots")
def scatter_and_dots(
    weights_MK: Tensor,
    rows_MF: Tensor,
    read_NF: Tensor,
    keys_A: Tensor,
    order_A: Tensor,
    starts_N1: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`scatter` and `dots` of the same rows and index, which are read once."""
    return _scattered(weights_MK, rows_MF, keys_A, order_A, starts_N1, dtype, read_NF)


@operator("doge_lm::expert_spread")
def spread(values_MK: Tensor, index_MK: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The values at their places in rows of zeros, (M, columns) in `dtype`; where several share a place, their sum.

    What `zeros.scatter_add` gives in any order, by adding to memory, this gives in one, by writing once.
    """
    m, k = index_MK.shape
    out_MN = values_MK.new_empty((m, columns), dtype=dtype)
    if out_MN.numel():
        block = min(triton.next_power_of_2(columns), 256)
        rows = min(triton.next_power_of_2(m), _SPREAD_CELLS // block)
        launcher(_spread_kernel)[(triton.cdiv(m, rows), triton.cdiv(columns, block))](
            values_MK.contiguous(), index_MK.contiguous(), out_MN, m, k, columns, BM=rows, BN=block
        )
    return out_MN


@operator("doge_lm::expert_pick")
def pick(table_MN: Tensor, index_MK: Tensor) -> Tensor:
    """table[m, index[m, k]], (M, K): `gather`, with `spread` for its backward pass."""
    return table_MN.gather(1, index_MK)


def _scattered(
    weights_MK: Tensor,
    rows_MF: Tensor,
    keys_A: Tensor,
    order_A: Tensor,
    starts_N1: Tensor,
    dtype: torch.dtype,
    read_NF: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (m, k), f, n = weights_MK.shape, rows_MF.shape[1], starts_N1.shape[0] - 1
    few = m * k < _FEW * n
    if not m * k * f:
        return rows_MF.new_zeros((n, f), dtype=dtype), rows_MF.new_zeros((m, k), dtype=torch.float32)
    out_NF = (rows_MF.new_zeros if few else rows_MF.new_empty)((n, f), dtype=dtype)
    weights_MK, rows_MF = weights_MK.contiguous(), by_rows(rows_MF)
    given, read_NF = read_NF is not None, rows_MF if read_NF is None else by_rows(read_NF)  # some pointer, never read
    # A warp for a segment. With products, a program of one warp and 512 features was the fastest of nine, without them
    # one of four warps and 256 features each (docs/log.md, 2026-11-28, fourth round).
    segments, unrolled, most, warps = (1, _UNROLLED, _WIDEST, 1) if few or given else (4, 4, _WIDEST // 2, 4)
    chunks, block = triton.cdiv(m * k, CHUNK), min(triton.next_power_of_2(f), most)
    slices = triton.cdiv(f, block)
    partial = rows_MF.new_empty((2 * chunks, f), dtype=torch.float32)
    dots_sMK = rows_MF.new_empty((slices if given else 0, m, k), dtype=torch.float32)
    if few:
        launcher(_chunk_kernel)[(chunks, slices)](
            weights_MK, rows_MF, keys_A, order_A, out_NF, partial, read_NF, dots_sMK, m * k, k, f,
            rows_MF.stride(0), read_NF.stride(0),
            CHUNK=CHUNK, U=unrolled, BF=block, DOTS=given, num_warps=warps,
        )  # fmt: skip
    else:
        launcher(_scatter_kernel)[(triton.cdiv(n, segments), slices)](
            weights_MK, rows_MF, order_A, starts_N1, out_NF, read_NF, dots_sMK, n, m * k, k, f,
            rows_MF.stride(0), read_NF.stride(0),
            LONGEST=LONGEST, U=unrolled, R=segments, BF=block, DOTS=given, num_warps=warps,
        )  # fmt: skip
        launcher(_long_run_kernel)[(triton.cdiv(2 * chunks, segments), slices)](
            weights_MK, rows_MF, keys_A, order_A, starts_N1, partial, read_NF, dots_sMK, m * k, k, f,
            rows_MF.stride(0), read_NF.stride(0),
            CHUNK=CHUNK, LONGEST=LONGEST, U=unrolled, R=segments, BF=block, DOTS=given, num_warps=warps,
        )  # fmt: skip
    launcher(_join_kernel)[(chunks, slices)](
        keys_A, starts_N1, out_NF, partial, m * k, f,
        CHUNK=CHUNK, LONGEST=0 if few else LONGEST, BF=block, PARTS=_JOINED, num_warps=2,
    )  # fmt: skip
    return out_NF, _sum_of_slices(dots_sMK)


def _width(table_NF: Tensor) -> int:
    """Features to work through before the next: as many as leave the table's part of them in the cache, or the most
    where none would.
    """
    n, f = table_NF.shape
    fitting = _CACHE_BYTES // (n * table_NF.element_size())
    most = min(triton.next_power_of_2(f), _WIDEST)
    return min(most, 2 ** (fitting.bit_length() - 1)) if fitting >= _NARROWEST else most


def _unrolled(rows: int) -> int:
    return min(triton.next_power_of_2(rows), _UNROLLED)


def _sum_of_slices(parts_sMK: Tensor) -> Tensor:
    return parts_sMK[0] if parts_sMK.shape[0] == 1 else parts_sMK.sum(0)


@dots.register_fake
def _(
    rows_MF: Tensor,
    table_NF: Tensor,
    read_NF: Tensor,
    index_MK: Tensor,
    keys_A: Tensor,
    order_A: Tensor,
    starts_N1: Tensor,
) -> Tensor:
    return rows_MF.new_empty(index_MK.shape, dtype=torch.float32)


@bag.register_fake
def _(
    weights_MK: Tensor,
    table_NF: Tensor,
    read_NF: Tensor,
    index_MK: Tensor,
    keys_A: Tensor,
    order_A: Tensor,
    starts_N1: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return read_NF.new_empty((index_MK.shape[0], read_NF.shape[1]), dtype=dtype)


@scatter.register_fake
def _(
    weights_MK: Tensor, rows_MF: Tensor, keys_A: Tensor, order_A: Tensor, starts_N1: Tensor, dtype: torch.dtype
) -> Tensor:
    return rows_MF.new_empty((starts_N1.shape[0] - 1, rows_MF.shape[1]), dtype=dtype)


@scatter_and_dots.register_fake
def _(
    weights_MK: Tensor,
    rows_MF: Tensor,
    read_NF: Tensor,
    keys_A: Tensor,
    order_A: Tensor,
    starts_N1: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dots_MK = rows_MF.new_empty(weights_MK.shape, dtype=torch.float32)
    return rows_MF.new_empty((read_NF.shape[0], rows_MF.shape[1]), dtype=dtype), dots_MK


@spread.register_fake
def _(values_MK: Tensor, index_MK: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return values_MK.new_empty((index_MK.shape[0], columns), dtype=dtype)


@pick.register_fake
def _(table_MN: Tensor, index_MK: Tensor) -> Tensor:
    return table_MN.new_empty(index_MK.shape)


def _save_for_dots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_MF, table_NF, *others = inputs
    ctx.table_type = table_NF.dtype
    ctx.save_for_backward(rows_MF, *others)


def _dots_backward(ctx: Any, grad_MK: Tensor) -> tuple[Tensor | None, ...]:
    rows_MF, read_NF, index_MK, keys_A, order_A, starts_N1 = ctx.saved_tensors
    rows = table = None
    if ctx.needs_input_grad[0]:
        rows = bag(grad_MK, read_NF, read_NF, index_MK, keys_A, order_A, starts_N1, rows_MF.dtype)
    if ctx.needs_input_grad[1]:
        table = scatter(grad_MK, rows_MF, keys_A, order_A, starts_N1, ctx.table_type)
    return rows, table, None, None, None, None, None


def _save_for_bag(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights_MK, table_NF, *others, _ = inputs
    ctx.table_type = table_NF.dtype
    ctx.save_for_backward(weights_MK, *others)


def _bag_backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor | None, ...]:
    weights_MK, read_NF, index_MK, keys_A, order_A, starts_N1 = ctx.saved_tensors
    weights = table = None
    if ctx.needs_input_grad[1]:
        table, weights = scatter_and_dots(weights_MK, grad_MF, read_NF, keys_A, order_A, starts_N1, ctx.table_type)
    elif ctx.needs_input_grad[0]:
        weights = dots(grad_MF, read_NF, read_NF, index_MK, keys_A, order_A, starts_N1)
    return None if weights is None else weights.to(weights_MK.dtype), table, None, None, None, None, None, None


dots.register_autograd(_dots_backward, setup_context=_save_for_dots)
bag.register_autograd(_bag_backward, setup_context=_save_for_bag)


def _save_for_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values_MK, index_MK, _, _ = inputs
    ctx.type = values_MK.dtype
    ctx.save_for_backward(index_MK)


def _spread_backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    (index_MK,) = ctx.saved_tensors
    return pick(grad_MN, index_MK).to(ctx.type), None, None, None


def _save_for_pick(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table_MN, index_MK = inputs
    ctx.columns, ctx.type = table_MN.shape[1], table_MN.dtype
    ctx.save_for_backward(index_MK)


def _pick_backward(ctx: Any, grad_MK: Tensor) -> tuple[Tensor | None, ...]:
    (index_MK,) = ctx.saved_tensors
    return spread(grad_MK, index_MK, ctx.columns, ctx.type), None


spread.register_autograd(_spread_backward, setup_context=_save_for_spread)
pick.register_autograd(_pick_backward, setup_context=_save_for_pick)
