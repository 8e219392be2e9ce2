"""The kernel of the product-key choice against the plain one: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this machine")

from doge_lm.model import cdmoe
from doge_lm.model.routing_triton import product_topk, product_topk_backward

from .support import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

# (M, H, n1, n2, k): one token, no block filled, one block and one row more, k above a table, k = N, one row in the
# first table, tables whose rows fill no power of 2, and tables so large that a program takes few tokens.
SIZES = [
    (1, 1, 4, 4, 1),
    (7, 2, 3, 5, 4),
    (65, 1, 16, 16, 2),
    (23, 3, 2, 9, 5),
    (5, 2, 2, 3, 6),
    (6, 1, 1, 6, 6),
    (4, 2, 1, 7, 3),
    (9, 2, 24, 32, 16),
    (10, 1, 3, 1025, 3),
]
KINDS = ["any", "rounded", "equal"]


def scores(*shape: int, kind: str, seed: int, dtype: torch.dtype) -> Tensor:
    """Scores of order one: any, in steps of a half so that many are equal, or all equal."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    drawn = {"any": drawn, "rounded": (drawn * 2).round() / 2, "equal": torch.zeros_like(drawn)}[kind]
    return drawn.to(DEVICE, dtype)


def tables(
    sizes: tuple[int, ...], kind: str = "any", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(M, H, n1) and (M, H, n2), as the layer has them: parts of one tensor."""
    m, heads, n1, n2, _ = sizes
    first, second = scores(m, heads, n1 + n2, kind=kind, seed=seed, dtype=dtype).split([n1, n2], dim=-1)
    return first, second


def plain(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The choice without kernels, wherever the scores are."""
    weights, experts = cdmoe.product_topk(first.cpu(), second.cpu(), k)
    return weights.to(first.device), experts.to(first.device)


def gradients(sizes: tuple[int, ...], first: Tensor, second: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """Of both tables' scores, for a direction that is drawn; `wide`: by the plain way in float64."""
    m, heads, _, _, k = sizes
    direction = scores(m, heads, k, kind="any", seed=99, dtype=torch.float32)
    if wide:
        first, second, direction = first.double().cpu(), second.double().cpu(), direction.double().cpu()
    leaves = first.detach().requires_grad_(), second.detach().requires_grad_()
    weights, _ = (plain if wide else product_topk)(*leaves, k)
    found = torch.autograd.grad(weights, leaves, direction)
    return found[0].to(DEVICE), found[1].to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_the_choice_is_the_plain_one(sizes: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    m, heads, _, _, k = sizes
    for seed in range(2):
        first, second = tables(sizes, kind, dtype, seed)
        weights, experts = product_topk(first, second, k)
        expected_weights, expected = plain(first, second, k)
        assert weights.shape == experts.shape == (m, heads, k)
        assert (weights.dtype, experts.dtype) == (torch.float32, torch.int64)
        assert torch.equal(experts, expected)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_gradients_are_those_of_the_plain_choice_in_float64(
    sizes: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    first, second = tables(sizes, kind, dtype, seed=3)
    for found, expected in zip(
        gradients(sizes, first, second, wide=False), gradients(sizes, first, second, wide=True), strict=True
    ):
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        if float(expected.norm()) < 1e-9:  # a softmax over one, or a row that all pairs share
            assert float(found.double().norm()) <= 1e-5
        else:
            assert relative_error(found, expected) <= TOLERANCE[dtype]


def test_equal_sums_of_unequal_scores_keep_the_order() -> None:
    """2²⁴ + 1 is 2²⁴ in float32: the sums are equal, and the better second score must still come first."""
    first = torch.tensor([[[2.0**24, 2.0**24]]], device=DEVICE)
    second = torch.tensor([[[0.0, 1.0, -0.5]]], device=DEVICE)
    weights, experts = product_topk(first, second, 4)
    assert experts.flatten().tolist() == [1, 0, 2, 4]
    torch.testing.assert_close(weights.flatten(), torch.full((4,), 0.25, device=DEVICE))


@pytest.mark.parametrize("layout", ["heads first", "columns first", "every second", "one for all tokens"])
def test_tensors_that_are_not_contiguous(layout: str) -> None:
    sizes = m, heads, n1, n2, k = 11, 2, 3, 5, 4
    first, second = tables(sizes, seed=5)
    if layout == "heads first":
        first, second = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (first, second))
    elif layout == "columns first":
        first, second = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (first, second))
    elif layout == "every second":
        first, second = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in (first, second))
    else:
        first, second = first[:1].expand(m, heads, n1), second[:1].expand(m, heads, n2)
    assert not first.is_contiguous()
    weights, experts = product_topk(first, second, k)
    expected_weights, expected = product_topk(first.contiguous(), second.contiguous(), k)
    assert torch.equal(experts, expected)
    assert torch.equal(weights, expected_weights)
    found = gradients(sizes, first, second, wide=False)
    for grad, wide in zip(found, gradients(sizes, first, second, wide=True), strict=True):
        assert relative_error(grad, wide) <= 1e-5


def test_a_gradient_that_is_not_contiguous() -> None:
    first, second = (x.detach().requires_grad_() for x in tables((6, 2, 3, 4, 3)))
    weights, _ = product_topk(first, second, 3)
    direction = scores(3, 2, 6, kind="any", seed=1, dtype=torch.float32).permute(2, 1, 0)
    found = torch.autograd.grad(weights, (first, second), direction, retain_graph=True)
    expected = torch.autograd.grad(weights, (first, second), direction.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=str)
def test_no_tokens_or_heads(shape: tuple[int, int]) -> None:
    first, second = (torch.empty(*shape, n, device=DEVICE, requires_grad=True) for n in (3, 4))
    weights, experts = product_topk(first, second, 2)
    assert weights.shape == experts.shape == (*shape, 2)
    weights.sum().backward()
    assert first.grad is not None
    assert first.grad.shape == first.shape


@pytest.mark.parametrize("sizes", [(40, 2, 3, 5, 4), (40, 1, 1, 6, 6), (40, 1, 5, 7, 3)], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
def test_scores_that_are_no_numbers_choose_experts_that_exist(sizes: tuple[int, ...]) -> None:
    """A diverged run must end with its message, not with a read out of a table."""
    _, _, n1, n2, k = sizes
    first, second = (x.clone() for x in tables(sizes))
    generator = torch.Generator().manual_seed(0)
    for table in (first, second):
        for value in (math.nan, math.inf, -math.inf):
            table[(torch.rand(table.shape, generator=generator) < 0.2).to(DEVICE)] = value
        for row, value in enumerate((math.nan, math.inf, -math.inf)):
            table[row] = value
    _, experts = product_topk(first, second, k)
    assert int(experts.min()) >= 0
    assert int(experts.max()) < n1 * n2


def test_the_operators_are_sound() -> None:
    """PyTorch's own check: shapes and types of the fakes, no aliases, no changed arguments, the gradient's place."""
    first, second = (x.detach().requires_grad_() for x in tables((5, 2, 3, 4, 3), dtype=torch.bfloat16))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(product_topk, (first, second, 3), test_utils=tests)
    weights, experts = product_topk(first, second, 3)
    grad = torch.randn_like(weights)
    arguments = (grad, weights.detach(), experts, 3, 4, torch.bfloat16)
    torch.library.opcheck(product_topk_backward, arguments, test_utils=tests[:2])


def test_compiles_without_a_graph_break() -> None:
    """For one number of tokens, and then for any."""

    def choice(whole: Tensor) -> tuple[Tensor, Tensor]:
        return product_topk(whole[..., :3], whole[..., 3:], 4)

    compiled = torch.compile(choice, fullgraph=True, backend="aot_eager")
    for m in (5, 9, 13):
        whole = scores(m, 2, 8, kind="any", seed=m, dtype=torch.float32).requires_grad_()
        found, expected = compiled(whole), choice(whole)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0])
        (one,) = torch.autograd.grad(found[0].square().sum(), whole)
        (other,) = torch.autograd.grad(expected[0].square().sum(), whole)
        torch.testing.assert_close(one, other)


def test_results_are_the_same_every_time() -> None:
    sizes = (65, 2, 16, 16, 4)
    first, second = tables(sizes, "rounded", torch.bfloat16)
    runs = [(*product_topk(first, second, 4), *gradients(sizes, first, second, wide=False)) for _ in range(3)]
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(run, runs[0], strict=True))
