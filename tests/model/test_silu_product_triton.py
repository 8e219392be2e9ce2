"""silu(h) Wᵀ by kernels that keep h alone, against float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this machine")

from doge_lm.model import cdmoe, modeling_doge
from doge_lm.model import silu_product_triton as kernels

from .support import relative_error, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6 if DEVICE == "cpu" else 2e-3, torch.bfloat16: 2e-2}  # a GPU may multiply in tf32
SHAPES = [(1, 1, 1), (5, 64, 3), (130, 192, 300), (33, 100, 16), (256, 64, 256)]


def leaf(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE, dtype).requires_grad_()


def reference(h: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result and gradients in float64."""
    h64, weight64 = (x.detach().double().requires_grad_() for x in (h, weight))
    out = (h64 * torch.sigmoid(h64)) @ weight64.t()
    return out.detach(), *torch.autograd.grad(out, (h64, weight64), grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    h, weight, grad = leaf(m, k, dtype=dtype, seed=m), leaf(n, k, dtype=dtype, seed=k), leaf(m, n, dtype=dtype, seed=n)
    out = kernels.silu_product(h, weight)
    found = (out, *torch.autograd.grad(out, (h, weight), grad.detach()))
    for one, other in zip(found, reference(h, weight, grad.detach()), strict=True):
        assert one.dtype == dtype
        assert relative_error(one, other) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 64, 1), (130, 192, 300), (257, 64, 512), (128, 1024, 256)], ids=str)
def test_fused_kernel(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter has no products of bfloat16
    h, weight = leaf(m, k, dtype=dtype, seed=m).detach(), leaf(n, k, dtype=dtype, seed=n).detach()
    expected, _, _ = reference(h, weight, torch.zeros(m, n, device=DEVICE))
    assert relative_error(kernels.fused_product(h, weight), expected) < TOLERANCE[dtype]


def test_rows_that_do_not_lie_side_by_side_and_none() -> None:
    wide, weight = leaf(7, 128, dtype=torch.float32, seed=1), leaf(16, 64, dtype=torch.float32, seed=2)
    h = wide[:, ::2]
    grad = torch.ones(16, 7, device=DEVICE).t()
    out = kernels.silu_product(h, weight)
    expected, h_grad, weight_grad = reference(h, weight, grad)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    out.backward(grad)
    assert wide.grad is not None
    assert weight.grad is not None
    assert relative_error(wide.grad[:, ::2], h_grad) < TOLERANCE[torch.float32]
    assert relative_error(weight.grad, weight_grad) < TOLERANCE[torch.float32]
    empty = leaf(0, 64, dtype=torch.float32, seed=3)
    out = kernels.silu_product(empty, weight)
    assert out.shape == (0, 16)
    (weight_grad,) = torch.autograd.grad(out.sum(), weight)
    assert not weight_grad.any()


def test_large_inputs_stay_numbers() -> None:
    h = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 88.0, 1e4]], device=DEVICE).repeat(1, 32).requires_grad_()
    weight = torch.ones(1, 192, device=DEVICE)
    out = kernels.silu_product(h, weight)
    (grad,) = torch.autograd.grad(out.sum(), h)
    expected, expected_grad, _ = reference(h, weight, torch.ones(1, 1, device=DEVICE))
    assert relative_error(out, expected) < 2e-3
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)


def test_autograd_keeps_no_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CDMoE that recomputes gives the same, and keeps W_up x where it kept σ(W_up x) beside it."""
    layer = tiny_model(cross_domain_intermediate_size=192).model.layers[0].feed_forward.to(DEVICE)
    x = leaf(2, 200, layer.shared_up_proj.in_features, dtype=torch.float32, seed=5)

    def run() -> tuple[list[Tensor], int]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            out = layer.shared(x)
        wide = {t.untyped_storage().data_ptr() for t in kept if t.shape[-1] == 192 and t.shape[0] != layer.n1}
        wide -= {p.untyped_storage().data_ptr() for p in layer.parameters()}
        parameters = [layer.shared_up_proj.weight, layer.shared_down_proj.weight, x]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), parameters)], len(wide)

    for module in (cdmoe, modeling_doge):
        monkeypatch.setattr(module, "kernels_take", lambda x: x.dtype != torch.float64)
    expected, before = run()
    layer.recomputes_activation = True
    found, after = run()
    assert (before, after) == (2, 1)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < (2e-3 if DEVICE == "cuda" else 1e-5)
    layer.shared_down_proj.register_forward_hook(lambda *_: None)
    assert run()[1] == before  # who watches the module sees it called
