"""The experts' hidden values by kernels against plain indexing in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="there is no Triton for this machine")

from doge_lm.model import cdmoe
from doge_lm.model.cdmoe import key_table_sizes, merged_cdmoe, merges
from doge_lm.model.expert_hidden_triton import chosen_hidden, chosen_hidden_backward

from .support import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # the interpreter cuts bfloat16 where a GPU rounds

# (M, N, H, k): one token and no more, k = N, one head and more, N prime and 2·3, columns that fill no power of 2,
# several experts of a token by several heads, more rows than a program takes.
SIZES = [
    (1, 4, 1, 1),
    (7, 6, 1, 6),
    (9, 7, 2, 3),
    (33, 16, 1, 2),
    (70, 12, 3, 4),
    (5, 256, 2, 4),
    (3, 1024, 2, 16),
    (3, 6, 16, 4),
]


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def plain(product: Tensor, num_experts: int, n1: int, heads: int, k: int) -> Tensor:
    """Every expert's score written out, the k best by a stable sort, and a sum over choices."""
    dots, rest = product[:, :num_experts], product[:, num_experts:]
    rows = n1 + num_experts // n1
    hidden = torch.zeros_like(dots)
    for head in range(heads):
        scores = rest[:, head * rows : (head + 1) * rows]
        sums = (scores[:, :n1, None] + scores[:, None, n1:]).flatten(1)
        best, experts = sums.sort(dim=1, descending=True, stable=True)
        weights = best[:, :k].softmax(dim=1)
        x = weights * dots.gather(1, experts[:, :k])
        hidden = hidden.scatter_add(1, experts[:, :k], x / (1 + (-x).exp()))
    return hidden


def make_product(sizes: tuple[int, ...], dtype: torch.dtype, seed: int, padding: int = 3) -> Tensor:
    m, num_experts, heads, _ = sizes
    return 2 * normal(m, num_experts + heads * sum(key_table_sizes(num_experts)) + padding, seed=seed, dtype=dtype)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_values_and_gradients_are_the_plain_ones(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    m, num_experts, heads, k = sizes
    n1 = key_table_sizes(num_experts)[0]
    product = make_product(sizes, dtype, seed).requires_grad_()
    wide = product.detach().double().requires_grad_()
    hidden, inner, weights, experts = chosen_hidden(product, num_experts, n1, heads, k)
    expected = plain(wide, num_experts, n1, heads, k)
    assert (hidden.shape, hidden.dtype, hidden.is_contiguous()) == ((m, num_experts), dtype, True)
    assert (weights.shape, experts.shape) == ((m, heads, k), (m, heads, k))
    assert torch.equal(inner, product.detach().gather(1, experts.flatten(1)).view_as(experts))
    assert not inner.requires_grad
    assert not weights.requires_grad
    assert relative_error(hidden, expected) <= TOLERANCE[dtype]
    direction = normal(m, num_experts, seed=seed + 9, dtype=dtype)
    (found,) = torch.autograd.grad(hidden, product, direction)
    (wanted,) = torch.autograd.grad(expected, wide, direction.double())
    assert found.dtype == dtype
    assert relative_error(found, wanted) <= TOLERANCE[dtype]
    keys = slice(num_experts, None)  # small beside the rest, so looked at apart
    if k > 1:  # else the weight is 1, whatever the scores
        assert relative_error(found[:, keys], wanted[:, keys]) <= 2 * TOLERANCE[dtype]
    assert not found[:, -3:].any()


def test_the_choice_is_that_of_the_other_paths() -> None:
    sizes = (40, 16, 2, 3)
    product = make_product(sizes, torch.float32, seed=1).round()  # many equal scores
    _, _, weights, experts = chosen_hidden(product, 16, 4, 2, 3)
    scores = product[:, 16:32].unflatten(1, (2, 8)).cpu()
    plain_weights, plain_experts = cdmoe.product_topk(scores[..., :4], scores[..., 4:], 3)
    assert torch.equal(experts.cpu(), plain_experts)
    torch.testing.assert_close(weights.cpu(), plain_weights)


def test_no_tokens_and_rows_apart() -> None:
    wide = make_product((6, 16, 1, 2), torch.float32, seed=2, padding=0)
    hidden = chosen_hidden(wide[:0], 16, 4, 1, 2)[0]
    assert hidden.shape == (0, 16)
    apart = torch.cat((wide, wide), dim=1)[:, : wide.shape[1]]
    assert apart.stride(0) != wide.stride(0)
    results = [chosen_hidden(each, 16, 4, 1, 2) for each in (wide, apart, wide.t().contiguous().t())]
    assert all(torch.equal(results[0][0], each[0]) for each in results[1:])
    grad = normal(6, 16, seed=3, dtype=torch.float32)
    grads = [
        chosen_hidden_backward(each, *results[0][1:], 4, 24) for each in (grad, torch.cat((grad, grad), dim=1)[:, :16])
    ]
    assert torch.equal(grads[0], grads[1])


def test_scores_that_are_no_numbers_lead_nowhere_else() -> None:
    product = make_product((4, 16, 1, 2), torch.float32, seed=4)
    product[1] = torch.nan
    hidden, _, _, experts = chosen_hidden(product, 16, 4, 1, 2)
    assert (experts >= 0).all()
    assert (experts < 16).all()
    assert torch.isfinite(hidden[[0, 2, 3]]).all()


def test_merged_layer_is_the_layer_of_two_steps() -> None:
    """Values and all gradients of c, D, U and keys, in float64 by the plain parts."""
    m, e, d, num_experts, heads, k = 37, 10, 14, 30, 2, 3
    n1, n2 = key_table_sizes(num_experts)
    shapes = [(m, e), (heads, n1 + n2, e), (num_experts, e), (num_experts, d)]
    leaves = [normal(*shape, seed=seed, dtype=torch.float32).requires_grad_() for seed, shape in enumerate(shapes)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = merged_cdmoe(leaves[0], leaves[1].flatten(0, 1), *leaves[2:], n1, heads, k)
    c, keys, down, up = wide
    scores = torch.einsum("me,hne->mhn", c, keys)
    weights, experts = cdmoe.product_topk(scores[..., :n1].cpu(), scores[..., n1:].cpu(), k)
    expected = cdmoe.cdmoe(c, weights.to(DEVICE), experts.to(DEVICE), down, up, nn.SiLU(), "gather")
    assert relative_error(found, expected) <= 1e-5
    direction = normal(m, d, seed=9, dtype=torch.float32)
    gradients = torch.autograd.grad(found, leaves, direction)
    wanted = torch.autograd.grad(expected, wide, direction.double())
    assert all(relative_error(one, other) <= 1e-5 for one, other in zip(gradients, wanted, strict=True))


def test_where_the_merged_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    c = torch.zeros(64, 8)
    monkeypatch.setattr(cdmoe, "kernels_take", lambda _: True)
    assert merges(c, 256, 2, "auto")
    assert merges(c, 8192, 2, "dense")
    assert not merges(c, 16384, 2, "dense")
    assert not merges(c, 16384, 2, "auto")
    assert not merges(c, 256, 65, "auto")
    assert not merges(c, 256, 2, "gather")
    assert not merges(c[:8], 256, 2, "auto")  # decoding
    monkeypatch.setattr(cdmoe, "kernels_take", lambda _: False)
    assert not merges(c, 256, 2, "auto")


def test_the_operators_are_sound_and_keep_little() -> None:
    """PyTorch's own check; and for the backward pass no tensor is kept that has a number for each expert."""
    product = make_product((6, 16, 2, 3), torch.float32, seed=5).requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(chosen_hidden, (product, 16, 4, 2, 3), test_utils=tests)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        hidden, *rest = chosen_hidden(product, 16, 4, 2, 3)
    assert {tuple(t.shape) for t in kept} == {(6, 2, 3)}
    arguments = (hidden.detach(), *rest, 4, product.shape[1])
    torch.library.opcheck(chosen_hidden_backward, arguments, test_utils=tests[:2])
