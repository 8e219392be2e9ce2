"""A Triton kernel for the loss and its gradient where the logits of some tokens are at hand.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    R  tokens at a time        V  vocabulary
"""
# mypy: disable-error-code="no-untyped-def"
# (Arguments of kernels are pointers and numbers of the GPU.)

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_PASS = 16384
"""The longest row that a program holds in registers. Of longer rows it reads a block at a time, twice; the second time
out of the cache. On an H100, 8,192 rows of 32,768 in bfloat16: 0.41 ms in two blocks, 0.47 in registers (copying them
takes 0.37)."""


@triton.jit
def _tanh(x):
    """By a power that cannot overflow, and near 0, where its difference to 1 would lose digits, by a series."""
    power = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - power) / (1.0 + power)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(square < 0.015625, near, tl.where(x < 0, -size, size))


@triton.jit
def _logits(logits_ptr, v, V, CAP: tl.constexpr):
    """The logits of tokens v, with a CAP CAP · tanh(logits / CAP), and the derivative of that; behind the row -inf."""
    x = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
    slope = 1.0
    if CAP > 0:
        share = _tanh(x * (1.0 / CAP))
        x = tl.where(v < V, CAP * share, float("-inf"))
        slope = 1.0 - share * share
    return x, slope


@triton.jit
def _softmax_kernel(
    logits_ptr, targets_ptr, losses_ptr, V, row_stride, ignore_index,
    CAP: tl.constexpr, GRADIENT: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one row; with GRADIENT, its gradient in place of the row's logits. ONE_PASS needs BLOCK >= V."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    lane = tl.arange(0, BLOCK)
    if (target == ignore_index) | (target < 0) | (target >= V):
        tl.store(losses_ptr + row, tl.where(target == ignore_index, 0.0, float("nan")))
        if GRADIENT:
            for begin in range(0, V, BLOCK):
                v = begin + lane
                tl.store(logits_ptr + v, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=v < V)
    else:
        # Read before anything is written over it; the reductions below keep a program's threads in step.
        chosen = tl.load(logits_ptr + target).to(tl.float32)
        if CAP > 0:
            chosen = CAP * _tanh(chosen * (1.0 / CAP))
        if ONE_PASS:
            x, slope = _logits(logits_ptr, lane, V, CAP)
            top = tl.max(x, axis=0)
            powers = tl.exp(x - top)
            total = tl.sum(powers, axis=0)
            if GRADIENT:
                grad = (powers * (1 / total) - (lane == target).to(tl.float32)) * slope
                tl.store(logits_ptr + lane, grad.to(logits_ptr.dtype.element_ty), mask=lane < V)
        else:
            top = -3.0e38  # finite, or a block of nothing but -inf would give NaN
            total = 0.0
            for begin in range(0, V, BLOCK):
                v = begin + lane
                x = _logits(logits_ptr, v, V, CAP)[0]
                new_top = tl.maximum(top, tl.max(x, axis=0))
                total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), axis=0)
                top = new_top
            if GRADIENT:
                for begin in range(0, V, BLOCK):
                    v = begin + lane
                    x, slope = _logits(logits_ptr, v, V, CAP)
                    grad = (tl.exp(x - top) * (1 / total) - (v == target).to(tl.float32)) * slope
                    tl.store(logits_ptr + v, grad.to(logits_ptr.dtype.element_ty), mask=v < V)
        tl.store(losses_ptr + row, top + tl.log(total) - chosen)


def losses_and_gradient_by_kernel_(
    logits_RV: Tensor,
    targets_R: Tensor,
    ignore_index: int,
    gradient: bool,
    cap: float = 0.0,
    one_pass: int = ONE_PASS,
) -> Tensor:
    """As `linear_cross_entropy.losses_and_gradient_`; rows longer than `one_pass` are read twice, block by block."""
    (rows, v), losses_R = logits_RV.shape, logits_RV.new_empty(logits_RV.shape[0], dtype=torch.float32)
    if rows:
        whole = v <= one_pass
        block = triton.next_power_of_2(v if whole else one_pass)
        warps = block // 1024
        _softmax_kernel[(rows,)](
            logits_RV, targets_R.contiguous(), losses_R, v, logits_RV.stride(0), ignore_index,
            CAP=cap, GRADIENT=gradient, ONE_PASS=whole, BLOCK=block, num_warps=min(max(warps, 4), 16),
        )  # fmt: skip
    return losses_R
