"""Muon for the matrices of linear maps, AdamW for all else: a step in which no direction is larger than another.

The update of a matrix is the nearest matrix whose singular values are all equal (Keller Jordan, "Muon: an optimizer
for hidden layers in neural networks", 2024):

- M ← μ M + (1 - μ) G, and ahead of it, after Nesterov, U = (1 - μ) G + μ M;
- O = the orthogonal factor of U, roughly: five Newton–Schulz steps X ← a X + (b A + c A²) X with A = X Xᵀ, which bring
  the singular values of X = U / ‖U‖ into about [0.7, 1.2], and those below some 0.002 part of the way;
- W ← (1 - lr·λ) W - lr · √max(1, rows / columns) · O.

The root makes the change of an output as large for a map that widens as for one that does not. (Moonlight,
arXiv 2502.16982, has 0.2·√max(rows, columns) instead, the size of an update by AdamW, to take AdamW's learning rate.)

PyTorch's own `torch.optim.Muon` goes from matrix to matrix, some 20 kernels each. In a small model these take longer to
start than to run, so here matrices of one shape are stacked, wide and tall ones together, and each kernel runs once for
a shape.

Shapes, the one legend of this file:

    S  matrices of a stack     R  rows     C  columns, not fewer than rows
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from doge_lm.training.row_lazy_adamw import RowLazyAdamW

_STEPS = 5
# a, b and c: steep at 0, and by choice not quite convergent at 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7


class Muon(RowLazyAdamW):
    """Muon in groups with `muon=True`; every other group is updated as by `RowLazyAdamW`, so by fused AdamW.

    A group of Muon's has its `lr`, `weight_decay` (λ) and `momentum` (μ); `betas` and `eps` mean nothing there. State:
    one `momentum_buffer` like the matrix. Nothing waits for the device. Matrices of a group are stacked, so few groups
    are faster than many; for the time of a step they are held a few times over.

    Args:
        params, lr, betas, eps, weight_decay: as `RowLazyAdamW` takes them.
    """

    GROUP_DEFAULTS: ClassVar[dict[str, Any]] = {**RowLazyAdamW.GROUP_DEFAULTS, "muon": False, "momentum": 0.95}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: if a parameter of a group of Muon's is no matrix or is divided among devices, if such a group is
                to be lazy, or as for `RowLazyAdamW`.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["muon"]:
            return
        try:
            _refuse_unfit(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _step_group(self, group: dict[str, Any]) -> None:
        if group["muon"]:
            self._step_matrices(group)
        else:
            super()._step_group(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                _refuse_unfit(group)  # FSDP puts other parameters into the groups of an optimizer that is there
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        grads = [p.grad for p in params]
        averages = [self.state[p]["momentum_buffer"] for p in params]
        momentum, lr = group["momentum"], group["lr"]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        updates = scaled_orthogonal(torch._foreach_lerp(grads, averages, momentum))
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr)


def _refuse_unfit(group: dict[str, Any]) -> None:
    if group["lazy_rows"]:
        raise ValueError("a group can have muon or lazy_rows, not both")
    for p in group["params"]:
        if isinstance(p, DTensor):
            raise ValueError("muon wants whole matrices, not parameters divided among devices (DTensor); use AdamW")
        if p.ndim != 2:
            raise ValueError(f"muon wants matrices, not {tuple(p.shape)}; put it into another group")


def scaled_orthogonal(updates: Sequence[Tensor]) -> list[Tensor]:
    """Of each matrix the orthogonal factor, roughly, times √max(1, rows / columns); in its type and layout.

    Args:
        updates: matrices of any shapes, on one device and of one type.

    Returns:
        A matrix for each of them, in their order; they share memory with one another, not with the updates.
    """
    places: dict[tuple[int, int], list[int]] = {}
    for place, update in enumerate(updates):
        places.setdefault((update.shape[0], update.shape[1]), []).append(place)
    # A shape and its transpose make one stack.
    stacked: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rows, columns in places:
        stacked.setdefault((min(rows, columns), max(rows, columns)), []).append((rows, columns))
    found = list(updates)
    for shapes in stacked.values():
        stacks = [torch.stack([updates[place] for place in places[shape]]) for shape in shapes]
        wide_SRC = torch.cat([stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks])
        parts = newton_schulz(wide_SRC).split([len(stack) for stack in stacks])
        for shape, part_SRC in zip(shapes, parts, strict=True):
            for place, result in zip(places[shape], _in_shape(part_SRC, shape, wide_SRC.dtype), strict=True):
                found[place] = result
    return found


def _in_shape(wide_SRC: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Sequence[Tensor]:
    """The matrices of a stack, turned as their weights are, scaled, each in one piece for `torch._foreach_add_`."""
    rows, columns = shape
    if rows <= columns:
        return wide_SRC.to(dtype).unbind()
    turned = wide_SRC.mT.to(dtype, memory_format=torch.contiguous_format)
    return turned.mul_(math.sqrt(rows / columns)).unbind()


def newton_schulz(matrices_SRC: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Each matrix with its singular values brought near 1, by five steps of a polynomial of degree 5; zero stays zero.

    Args:
        matrices_SRC: as many columns as rows or more; else it is right too, but slower.
        dtype: what the steps are computed in; by default bfloat16, which is precise enough, as they do not converge
            anyway, and float32 on a CPU, where few have fast products in bfloat16.

    Returns:
        The matrices (S, R, C) in that type.
    """
    if dtype is None:
        dtype = torch.float32 if matrices_SRC.device.type == "cpu" else torch.bfloat16
    a, b, c = _COEFFICIENTS
    norm_S11 = torch.linalg.vector_norm(matrices_SRC, dim=(1, 2), keepdim=True)
    x_SRC = (matrices_SRC / (norm_S11 + _EPSILON)).to(dtype)
    for _ in range(_STEPS):
        gram_SRR = torch.bmm(x_SRC, x_SRC.mT)
        factor_SRR = torch.baddbmm(gram_SRR, gram_SRR, gram_SRR, beta=b, alpha=c)
        x_SRC = torch.baddbmm(x_SRC, factor_SRR, x_SRC, beta=a)
    return x_SRC


def hidden_matrices(model: PreTrainedModel) -> set[str]:
    """Names of the weights of all linear maps but the head."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
