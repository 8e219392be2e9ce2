"""The kernels of `benchmarks/silu_product.py` against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this machine")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import silu_product  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("seed", [0, 1])
def test_fused_product_is_that_of_the_silu(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, weight = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((32, 64), (48, 64)))
    found = silu_product.fused_product(h, weight, (16, 16, 32, 4, 2), tanh=False)
    expected = torch.nn.functional.silu(h.double()) @ weight.double().t()
    assert float((found.double() - expected).norm() / expected.norm()) < (1e-3 if DEVICE == "cuda" else 1e-6)


def test_gradient_kernel() -> None:
    h = torch.randn(4, silu_product.BLOCK, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    grad = torch.randn(h.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(h), h, grad)
    silu_product._silu_gradient_kernel[(4,)](h.detach(), grad, BLOCK=silu_product.BLOCK)
    torch.testing.assert_close(grad, expected)
