"""A Triton kernel for the loss and its gradient where the logits of some tokens are at hand.

Powers are to the base 2, which is the GPU's own. With a small cap, no logit is far below it: powers are taken of the
logit less the cap, and no row is searched for its largest.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    R  tokens at a time        V  vocabulary        BLOCK  logits of a row that a program reads at a time
"""
# mypy: disable-error-code="no-untyped-def"
# (Arguments of kernels are pointers and numbers of the GPU.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_operator import INTERPRETED

ONE_PASS = 8192
"""The longest row that a program holds in registers. Of longer rows it reads a block at a time, twice; the second time
out of the cache. On an H200, 8,192 rows of 32,768 in bfloat16: 0.32 ms in blocks of 8,192, 0.33 of 16,384, 0.39 in
registers (copying them takes 0.26); with a cap of 15 0.43, 0.49 and 0.54. On another, of 16,384: 0.15 ms in two blocks,
0.25 in registers; with a cap 0.23 and 0.28."""

SMALL_CAP = 32.0
"""Up to this cap c, e^(-2c) is far above the smallest float32. A loss is off by some 1e-6 at 15, by up to 2e-5 here."""

PTX = not INTERPRETED and torch.version.hip is None
"""Whether a kernel may name an instruction of NVIDIA's: Triton's division takes three more than the reciprocal."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def _tanh(x):
    """By a power that cannot overflow, and near 0, where its difference to 1 would lose digits, by a series."""
    power = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - power) / (1.0 + power)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(square < 0.015625, near, tl.where(x < 0, -size, size))


@triton.jit
def _logits(logits_ptr, v, inside, CAP: tl.constexpr, SMALL: tl.constexpr, PTX: tl.constexpr):
    """The logits of tokens v, and the derivative by what was read; -inf outside.

    With a CAP they are CAP · tanh(logits / CAP), with a SMALL one less the CAP, in units of ln 2: CAP · (tanh(x) - 1)
    is -2 · CAP / (1 + exp(2x)), and the derivative that of tanh(x), 4 · (share - share²), without the 4.
    """
    x = tl.load(logits_ptr + v, mask=inside, other=float("-inf")).to(tl.float32)
    slope = 1.0
    if SMALL:
        share = _reciprocal(1.0 + tl.exp2(x * (2 * _LOG2_E / CAP)), PTX)
        x = tl.where(inside, share * (-2 * CAP * _LOG2_E), float("-inf"))
        slope = share - share * share
    elif CAP > 0:
        share = _tanh(x * (1.0 / CAP))
        x = tl.where(inside, CAP * share, float("-inf"))
        slope = 1.0 - share * share
    return x, slope


@triton.jit
def _powers(x, top, SMALL: tl.constexpr):
    """e^(x - top), of what `_logits` gives."""
    return tl.exp2(x) if SMALL else tl.exp2((x - top) * _LOG2_E)


@triton.jit
def _gradient(powers, total, is_target, slope, SMALL: tl.constexpr):
    """By what was read. With a SMALL cap, where the target has it all, its power is not 1 but as far off as the sum."""
    if SMALL:
        return (powers - tl.where(is_target, total, 0.0)) * (slope * (4 / total))
    return (powers * (1 / total) - is_target.to(tl.float32)) * slope


@triton.jit
def _sum_of_powers(logits_ptr, lane, V, CAP: tl.constexpr, SMALL: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr):
    """The largest logit of a row (0 with a SMALL cap) and the sum of e^(logit - largest), block by block."""
    if SMALL:
        powers = tl.zeros_like(lane).to(tl.float32)
        for begin in range(0, V, lane.shape[0]):
            v = begin + lane
            powers += _powers(_logits(logits_ptr, v, EVEN | (v < V), CAP, SMALL, PTX)[0], 0.0, SMALL)
        return 0.0, tl.sum(powers, axis=0)
    top = _LOWEST  # finite, or a block of nothing but -inf would give NaN
    total = 0.0
    for begin in range(0, V, lane.shape[0]):
        v = begin + lane
        x = _logits(logits_ptr, v, EVEN | (v < V), CAP, SMALL, PTX)[0]
        new_top = tl.maximum(top, tl.max(x, axis=0))
        total = total * _powers(top, new_top, SMALL) + tl.sum(_powers(x, new_top, SMALL), axis=0)
        top = new_top
    return top, total


@triton.jit
def _softmax_kernel(
    logits_ptr, targets_ptr, losses_ptr, V, row_stride, ignore_index, CAP: tl.constexpr, SMALL: tl.constexpr,
    GRADIENT: tl.constexpr, ONE_PASS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The loss of one row; with GRADIENT, its gradient in place of the row's logits.

    ONE_PASS needs BLOCK >= V, EVEN that BLOCK divides V, SMALL a CAP up to SMALL_CAP.
    """
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
        chosen = _logits(logits_ptr, target, True, CAP, SMALL, PTX)[0]
        if ONE_PASS:
            x, slope = _logits(logits_ptr, lane, EVEN | (lane < V), CAP, SMALL, PTX)
            top = 0.0 if SMALL else tl.max(x, axis=0)
            powers = _powers(x, top, SMALL)
            total = tl.sum(powers, axis=0)
            if GRADIENT:
                grad = _gradient(powers, total, lane == target, slope, SMALL)
                tl.store(logits_ptr + lane, grad.to(logits_ptr.dtype.element_ty), mask=EVEN | (lane < V))
        else:
            top, total = _sum_of_powers(logits_ptr, lane, V, CAP, SMALL, EVEN, PTX)
            if GRADIENT:
                for begin in range(0, V, BLOCK):
                    v = begin + lane
                    x, slope = _logits(logits_ptr, v, EVEN | (v < V), CAP, SMALL, PTX)
                    grad = _gradient(_powers(x, top, SMALL), total, v == target, slope, SMALL)
                    tl.store(logits_ptr + v, grad.to(logits_ptr.dtype.element_ty), mask=EVEN | (v < V))
        loss = tl.log(total / _powers(chosen, top, SMALL)) if SMALL else top - chosen + tl.log(total)
        tl.store(losses_ptr + row, tl.where(loss < 0, 0.0, loss))  # rounding alone can bring it below 0


def variant(v: int, gradient: bool, cap: float, one_pass: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants that the kernel is compiled with for rows of v logits, and the options of its launch."""
    whole = v <= one_pass
    block = triton.next_power_of_2(v if whole else one_pass)
    loss = {"CAP": cap, "SMALL": 0 < cap <= SMALL_CAP, "GRADIENT": gradient}
    row = {"ONE_PASS": whole, "EVEN": v % block == 0, "BLOCK": block}
    return {**loss, **row, "PTX": PTX}, {"num_warps": min(max(block // 1024, 4), 16)}


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
        constants, options = variant(v, gradient, cap, one_pass)
        _softmax_kernel[(rows,)](
            logits_RV, targets_R.contiguous(), losses_R, v, logits_RV.stride(0), ignore_index, **constants, **options
        )
    return losses_R
