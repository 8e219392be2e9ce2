"""Whether the Triton kernels of this package may run, and whether short cuts may be taken: the one place to ask.

`DOGE_LM_PLAIN=1` in the environment computes everything in plain PyTorch, module by module, as the mathematics is
written: to see whether a kernel or a short cut is to blame, and for what they are measured against.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

PLAIN = os.environ.get("DOGE_LM_PLAIN", "0") not in ("", "0")
# It comes with PyTorch for CUDA; there is none for some machines.
HAVE_TRITON = find_spec("triton") is not None


def kernels_take(x: Tensor) -> bool:
    """Whether kernels are to be used on a tensor: on a GPU, in float32 or a shorter type."""
    return HAVE_TRITON and not PLAIN and x.is_cuda and x.dtype != torch.float64
