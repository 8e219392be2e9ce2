"""AdamW that leaves alone the rows of a table whose gradient is zero: with many experts, most of them in every step.

For such a row AdamW reads and writes weight and moments only to let them decay. Here a row rests until a gradient
reaches it again, and then makes up for the steps that it missed:

- its moments decay as often as they would have: m ← β1^Δ m + (1 - β1) g, v ← β2^Δ v + (1 - β2) g²;
- its weight decays as much as it would have: by Π (1 - lr·λ) over the steps since its last one, with the learning
  rate that each of them had;
- the update itself is AdamW's, its corrections for the start of the moments by the number of steps of the run.

If every row has a gradient in every step, this is AdamW. Else it differs in two things. A resting row is not moved by
the moments of its past (as in `torch.optim.SparseAdam`). And whoever reads a resting row, the forward pass or a
checkpoint, reads it without the decay that it missed: at lr = 8e-4 and λ = 0.01, 0.8% larger after 1,000 steps.

Shapes, the one legend of this file:

    N  rows of a table     F  numbers of a row     R  rows with a gradient in this step
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from doge_lm.model.kernels import HAVE_TRITON, kernels_take

if HAVE_TRITON:
    from doge_lm.training import row_lazy_adamw_triton

# Without a kernel: so many numbers of each tensor stay in a core's cache from one operation to the next.
_PICKED_AT_ONCE = 2**17


class StepNumbers(NamedTuple):
    """What a step is to every row: its number, from 1, and the settings of AdamW.

    `log_decay` is Σ log(1 - lr·λ) over the steps so far, this one's included.
    """

    step: int
    lr: float
    log_decay: float
    beta1: float
    beta2: float
    eps: float

    @property
    def step_size(self) -> float:
        """The learning rate, corrected for the first moment's start at 0."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root_correction(self) -> float:
        """What the root of the second moment is divided by, as it started at 0."""
        return math.sqrt(1 - self.beta2**self.step)


class RowState(NamedTuple):
    """State of a table, in its type: the moments, and when each row was last updated.

    A step's number is exact in float32 up to 2^24, as is that of PyTorch's own AdamW. The sum of decays is rounded
    there, but what is rounded away at one update is made up for at the next: the differences add up to the whole.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    row_step: Tensor
    row_log_decay: Tensor


class RowLazyAdamW(torch.optim.Optimizer):
    """AdamW, with `lazy_rows=True` in a parameter group for tables (N, F) whose resting rows are left alone.

    Other groups are updated by PyTorch's fused AdamW. Memory: that of AdamW and two numbers a row.

    Args:
        params: parameters or groups of them, as any optimizer takes them.
        lr, betas, eps, weight_decay: as those of `torch.optim.AdamW`; λ is `weight_decay`.
    """

    # What a lazy group counts is a part of the group.
    GROUP_DEFAULTS: ClassVar[dict[str, Any]] = {"lazy_rows": False, "lazy_step": 0, "log_decay": 0.0}
    """What a parameter group has beside AdamW's settings, if it does not say otherwise."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        # `fused` tells PyTorch where the state "step" belongs.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, {**defaults, **self.GROUP_DEFAULTS})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: if a parameter of a lazy group is no table.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        shapes = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
        if group["lazy_rows"] and shapes:
            self.param_groups.pop()
            raise ValueError(f"lazy_rows wants tables of two dimensions, not {shapes[0]}; put it into another group")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        if group["lazy_rows"]:
            self._step_lazily(group)
        else:
            self._step_wholly(group)

    def _step_wholly(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        averages, squares, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            params, [p.grad for p in params], averages, squares, [], steps,
            fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    def _step_lazily(self, group: dict[str, Any]) -> None:
        rate = group["lr"] * group["weight_decay"]
        if not rate < 1:
            raise ValueError(f"lr · weight_decay is {rate}; it must be below 1, or a step would reverse the weights")
        group["lazy_step"] += 1
        group["log_decay"] += math.log1p(-rate)
        beta1, beta2 = group["betas"]
        numbers = StepNumbers(group["lazy_step"], group["lr"], group["log_decay"], beta1, beta2, group["eps"])
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                rows = {name: p.new_zeros(p.shape[0]) for name in ("row_step", "row_log_decay")}
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), **rows}
            update_rows(p, p.grad, RowState(**self.state[p]), numbers)


def update_rows(weight_NF: Tensor, grad_NF: Tensor, state: RowState, numbers: StepNumbers) -> None:
    """Update the rows whose gradient is not all zero, and their state, in place.

    On a GPU by one kernel, which nothing waits for; elsewhere by `update_rows_plainly`.
    """
    tensors = (weight_NF, grad_NF, *state)
    if kernels_take(weight_NF) and all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
        row_lazy_adamw_triton.update_rows(weight_NF, grad_NF, state, numbers)
    else:
        update_rows_plainly(weight_NF, grad_NF, state, numbers)


def update_rows_plainly(weight_NF: Tensor, grad_NF: Tensor, state: RowState, numbers: StepNumbers) -> None:
    """What `update_rows` says, by picking the rows; on a GPU the host waits for their number."""
    # Twice as fast on a CPU as `any`, and as exact: what is no number is not 0 either.
    touched_N = (grad_NF.amax(dim=1) != 0) | (grad_NF.amin(dim=1) != 0)
    rows_R = touched_N.nonzero().squeeze(1)
    for part_R in rows_R.split(max(1, _PICKED_AT_ONCE // weight_NF.shape[1])):
        _update_picked(part_R, weight_NF, grad_NF, state, numbers)


def _update_picked(rows_R: Tensor, weight_NF: Tensor, grad_NF: Tensor, state: RowState, numbers: StepNumbers) -> None:
    grad_RF = grad_NF[rows_R]
    missed_R1 = (numbers.step - state.row_step[rows_R]).unsqueeze(1)
    shrink_R1 = torch.expm1(numbers.log_decay - state.row_log_decay[rows_R]).unsqueeze(1)
    average_RF = state.exp_avg[rows_R].mul_(numbers.beta1**missed_R1)
    average_RF.add_(grad_RF, alpha=1 - numbers.beta1)
    square_RF = state.exp_avg_sq[rows_R].mul_(numbers.beta2**missed_R1)
    square_RF.addcmul_(grad_RF, grad_RF, value=1 - numbers.beta2)
    root_RF = square_RF.sqrt().div_(numbers.root_correction).add_(numbers.eps)
    weight_RF = weight_NF[rows_R]
    weight_RF.addcmul_(weight_RF, shrink_R1).addcdiv_(average_RF, root_RF, value=-numbers.step_size)
    weight_NF.index_copy_(0, rows_R, weight_RF)
    state.exp_avg.index_copy_(0, rows_R, average_RF)
    state.exp_avg_sq.index_copy_(0, rows_R, square_RF)
    state.row_step.index_fill_(0, rows_R, numbers.step)
    state.row_log_decay.index_fill_(0, rows_R, numbers.log_decay)
