"""The update of `row_lazy_adamw` as one Triton kernel a table: no host waits, and nothing is picked or moved.

Every gradient is read, 4·N·F bytes in float32. A row that has one costs 28·F bytes more (gradient again, weight and
two moments read and written), a resting row nothing; AdamW takes 28·N·F in all.

Shapes, the one legend of this file:

    N  rows of a table     BR  rows of a program
    F  numbers of a row    BF  numbers of a row in a tile
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from doge_lm.training.row_lazy_adamw import RowState, StepNumbers

_TILE, _MOST_BF = 2048, 1024
"""Numbers of a tile, and the most of them from one row."""


@triton.jit
def _rows_kernel(
    weight_ptr, grad_ptr, average_ptr, square_ptr, row_step_ptr, row_log_decay_ptr, N, F,
    step, log_decay, step_size, root_correction,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, EPS: tl.constexpr,
    BR: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    found = tl.zeros((BR, BF), tl.int32)
    for begin in range(0, F, BF):
        f = begin + tl.arange(0, BF)
        grad = tl.load(grad_ptr + row[:, None] * F + f[None, :], mask=(row < N)[:, None] & (f < F)[None, :], other=0.0)
        found |= (grad != 0.0).to(tl.int32)
    touched = tl.max(found, axis=1) > 0
    if tl.max(touched.to(tl.int32), axis=0) > 0:
        missed = step - tl.load(row_step_ptr + row, mask=touched, other=0.0)
        # Most rows that are touched missed no step: for these the decay is β itself, not a rounded power of 2.
        decay1 = tl.where(missed == 1, BETA1, tl.exp2(missed * LOG2_BETA1))[:, None]
        decay2 = tl.where(missed == 1, BETA2, tl.exp2(missed * LOG2_BETA2))[:, None]
        x = log_decay - tl.load(row_log_decay_ptr + row, mask=touched, other=0.0)
        # exp(x) - 1, to all digits for the tiny x of one step too.
        shrink = tl.where(x > -0.01, x * (1 + x / 2 * (1 + x / 3)), tl.exp(x) - 1)[:, None]
        for begin in range(0, F, BF):
            f = begin + tl.arange(0, BF)
            mask = touched[:, None] & (f < F)[None, :]
            at = row[:, None] * F + f[None, :]
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
            average = tl.load(average_ptr + at, mask=mask, other=0.0) * decay1 + grad * (1 - BETA1)
            square = tl.load(square_ptr + at, mask=mask, other=0.0) * decay2 + grad * grad * (1 - BETA2)
            weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
            weight += weight * shrink - step_size * average / (tl.sqrt(square) / root_correction + EPS)
            tl.store(average_ptr + at, average, mask=mask)
            tl.store(square_ptr + at, square, mask=mask)
            tl.store(weight_ptr + at, weight, mask=mask)
        tl.store(row_step_ptr + row, tl.zeros((BR,), tl.float32) + step, mask=touched)
        tl.store(row_log_decay_ptr + row, tl.zeros((BR,), tl.float32) + log_decay, mask=touched)


def update_rows(weight_NF: Tensor, grad_NF: Tensor, state: RowState, numbers: StepNumbers) -> None:
    """`row_lazy_adamw.update_rows` for contiguous float32 tensors."""
    n, f = weight_NF.shape
    if not weight_NF.numel():
        return
    bf = min(triton.next_power_of_2(f), _MOST_BF)
    br = _TILE // bf
    log2_betas = [math.log2(beta) if beta else -math.inf for beta in (numbers.beta1, numbers.beta2)]
    # A whole number would be built into the kernel where it is 1, and compiled anew where 16 divides it.
    step = float(numbers.step)
    _rows_kernel[(triton.cdiv(n, br),)](
        weight_NF, grad_NF, *state, n, f, step, numbers.log_decay, numbers.step_size, numbers.root_correction,
        BETA1=numbers.beta1, BETA2=numbers.beta2, LOG2_BETA1=log2_betas[0], LOG2_BETA2=log2_betas[1], EPS=numbers.eps,
        BR=br, BF=bf,
    )  # fmt: skip
