"""How the Triton kernels of this package become operators of PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), as they were decorated: on a CPU, for tests."""

SUMMING_PROGRAMS = 3 if INTERPRETED else 4 * 132
"""Programs of a kernel that goes over all tokens and leaves one row each to be summed, as for the gradient of gains.

Four at once fit on each of the 132 multiprocessors of an H100 or H200. A number that does not depend on the tokens
keeps the shapes of a compiled step fixed. The interpreter runs one after the other.
"""


def operator(name: str) -> Callable[[Callable], Any]:
    """Make a function that launches kernels (through `launcher`) an operator that `torch.compile` takes whole.

    It sees through the operator and launches the kernels itself: the way through PyTorch's dispatcher and Triton's
    launcher takes longer than most of these kernels run. Interpreted kernels it must not see.
    """
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return make(name, mutates_args=())


def launcher(kernel: Any) -> Any:
    """The kernel, to be called as `launcher(kernel)[grid](…)` in an `operator`."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its last dimension contiguous, as kernels that take strides of rows read it."""
    return x if x.stride(-1) == 1 else x.contiguous()
