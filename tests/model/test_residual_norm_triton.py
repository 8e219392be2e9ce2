"""The kernel of "add, then RMSNorm" against the plain mathematics in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this machine")

from doge_lm.model import residual_norm_triton
from doge_lm.model.residual_norm_triton import MOST_FEATURES, add_norm, add_norm_and_keep, add_norm_backward

from .support import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-2
"""Large, so that a norm that leaves it out shows."""

# (M, d): no token, one token, one feature, rows that fill no tile, one tile and more than every program's first.
SIZES = [(0, 8), (1, 1), (1, 6), (33, 6), (33, 64), (1, 100), (33, 100), (8, 256), (33, 256), (70, 300), (3, 5000)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program has several tiles, and others none."""
    monkeypatch.setattr(residual_norm_triton, "SUMMING_PROGRAMS", 3)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(m: int, d: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A residual stream in float32 (M, d), rows of different lengths; a branch of the type given; the weight (d,)."""
    lengths = torch.logspace(-1.5, 1.5, max(m, 1), device=DEVICE)[:m, None]
    residual, branch = normal(m, d, seed=seed) * lengths, normal(m, d, seed=seed + 1) * lengths
    return residual, branch.to(dtype), 1 + 0.3 * normal(d, seed=seed + 2)


def plain(residual: Tensor, branch: Tensor, weight: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """s = residual + branch and s / √(mean s² + eps) ⊙ weight."""
    total = residual + branch
    return total, total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def assert_close(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Relative to the whole and to each row, to the precision of a type, by default of that found."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape, name
    if float(expected.norm()) == 0:
        assert not found.any(), name
        return
    tolerance = TOLERANCE[dtype or found.dtype]
    assert relative_error(found, expected) <= tolerance, name
    if found.ndim == 2:
        errors = (found.double() - expected.double()).norm(dim=1)
        assert bool((errors <= 2 * tolerance * (expected.double().norm(dim=1) + 1e-3)).all()), name


def assert_exact(
    tensors: tuple[Tensor, Tensor, Tensor], directions: tuple[Tensor | None, Tensor | None], eps: float = EPS
) -> None:
    """Both results and all gradients against the plain ones in float64; an output with direction None is not used."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    found, expected = add_norm(*leaves, eps), plain(*wide, eps)
    for name, one, other in zip(("sum", "normed"), found, expected, strict=True):
        assert_close(name, one, other)
    pairs = [(one, other, d) for one, other, d in zip(found, expected, directions, strict=True) if d is not None]
    torch.autograd.backward([one for one, _, _ in pairs], [d for _, _, d in pairs])
    torch.autograd.backward([other for _, other, _ in pairs], [d.double() for _, _, d in pairs])
    for name, leaf, other in zip(("residual", "branch", "weight"), leaves, wide, strict=True):
        if other.grad is None:
            assert leaf.grad is None, name
        else:
            assert leaf.grad is not None, name
            assert leaf.grad.dtype == leaf.dtype, name
            assert_close(name, leaf.grad, other.grad, tensors[1].dtype)  # by way of a sum in the branch's type


def directions_for(m: int, d: int, dtype: torch.dtype, used: str = "both") -> tuple[Tensor | None, Tensor | None]:
    total, normed = normal(m, d, seed=8), normal(m, d, seed=9, dtype=dtype)
    return (None if used == "normed" else total, None if used == "sum" else normed)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_results_and_gradients_are_those_of_the_plain_way_in_float64(
    sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    assert_exact(inputs(*sizes, dtype, seed=sum(sizes)), directions_for(*sizes, dtype))


@pytest.mark.parametrize("used", ["sum", "normed"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_of_the_two_results_is_used(dtype: torch.dtype, used: str) -> None:
    """The other has no gradient then; nor has the weight, where its product is not used."""
    assert_exact(inputs(33, 100, dtype), directions_for(33, 100, dtype, used))


def test_no_result_leads_to_the_loss() -> None:
    leaves = [x.requires_grad_() for x in inputs(5, 8)]
    total, _ = add_norm(*leaves, EPS)
    assert torch.autograd.grad(total.sum() * 0 + leaves[2].sum(), leaves)[2].eq(1).all()


def test_types() -> None:
    """The sum is of the residual's type; its norm of the branch's, or of the one asked for."""
    residual, branch, weight = inputs(4, 6)
    assert [x.dtype for x in add_norm(residual, branch, weight, EPS)] == [torch.float32, torch.bfloat16]
    assert [x.dtype for x in add_norm(residual, branch, weight, EPS, torch.float32)] == [torch.float32] * 2
    assert [x.dtype for x in add_norm(residual, branch.float(), weight, EPS)] == [torch.float32] * 2
    assert [x.dtype for x in add_norm(residual.bfloat16(), branch, weight, EPS)] == [torch.bfloat16] * 2


def test_the_type_asked_for_is_that_of_the_gradient() -> None:
    leaves = [x.requires_grad_() for x in inputs(33, 20)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    direction = normal(33, 20, seed=9)
    found, expected = add_norm(*leaves, EPS, torch.float32)[1], plain(*wide)[1]
    assert_close("normed", found, expected)
    grads = torch.autograd.grad(found, leaves, direction), torch.autograd.grad(expected, wide, direction.double())
    for name, one, other in zip(("residual", "branch", "weight"), *grads, strict=True):
        assert_close(name, one, other, torch.bfloat16)


def test_everything_in_bfloat16() -> None:
    """A model in bfloat16: the norm is that of the sum as it was stored."""
    residual, branch, weight = (x.bfloat16() for x in inputs(33, 100))
    total, normed = add_norm(residual, branch, weight, EPS, torch.float32)
    assert_close("normed", normed, plain(total.double(), torch.zeros_like(total).double(), weight.double())[1])
    assert_exact((residual, branch, weight), directions_for(33, 100, torch.bfloat16))


def test_the_sum_is_that_of_pytorch_to_the_bit() -> None:
    residual, branch, weight = inputs(33, 100)
    assert torch.equal(add_norm(residual, branch, weight, EPS)[0], residual + branch)


def test_the_gradient_of_the_branch_is_that_of_the_residual_rounded() -> None:
    leaves = [x.requires_grad_() for x in inputs(33, 100)]
    total, normed = add_norm(*leaves, EPS)
    residual_grad, branch_grad = torch.autograd.grad(total.sum() + normed.sum(), leaves[:2])
    error = (branch_grad.float() - residual_grad).abs()
    assert bool((error <= 2**-7 * residual_grad.abs()).all())  # Triton's interpreter cuts instead


@pytest.mark.parametrize("layout", ["parts of wider rows", "transposed", "one for all tokens"])
def test_tensors_that_are_not_contiguous(layout: str) -> None:
    m, d, dtype = 37, 20, torch.bfloat16
    tensors = [*inputs(m, d, dtype), *directions_for(m, d, dtype)]
    weight = tensors.pop(2)
    if layout == "parts of wider rows":
        tensors = [torch.cat((x, x.roll(1, 0), x), dim=1)[:, d : 2 * d] for x in tensors]
        weight = torch.stack((weight, weight + 1), dim=1)[:, 0]
    elif layout == "transposed":
        tensors = [x.t().contiguous().t() for x in tensors]
    else:
        tensors = [x[5:6].expand(m, -1) for x in tensors]
    assert not any(x.is_contiguous() for x in tensors)
    residual, branch, *directions = tensors
    assert_exact((residual, branch, weight), (directions[0], directions[1]))


def test_rows_of_zeros() -> None:
    """As padding gives them; and where eps is 0, the rows of a tile beyond the last token are no 0/0."""
    residual, branch, weight = inputs(5, 20)
    assert_exact((residual, branch, weight), directions_for(5, 20, torch.bfloat16), eps=0.0)
    residual[2], branch[2] = 0, 0
    assert_exact((residual, branch, weight), directions_for(5, 20, torch.bfloat16), eps=1e-6)


def test_it_is_the_norm_of_pytorch() -> None:
    residual, branch, weight = inputs(33, 64, torch.float32)
    expected = torch.nn.functional.rms_norm(residual + branch, (64,), weight, 1e-6)
    torch.testing.assert_close(add_norm(residual, branch, weight, 1e-6)[1], expected, rtol=1e-5, atol=1e-6)


def test_the_widest_rows() -> None:
    assert_exact(inputs(2, MOST_FEATURES), directions_for(2, MOST_FEATURES, torch.bfloat16))


def test_the_operators_are_sound() -> None:
    """PyTorch's own check: shapes and types of the fakes, no aliases, no changed arguments, the gradient's place."""
    tensors = tuple(x.requires_grad_() for x in inputs(6, 9))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for dtype, keep in ((torch.bfloat16, True), (torch.float32, False)):
        torch.library.opcheck(add_norm_and_keep, (*tensors, EPS, dtype, keep), test_utils=tests)
    total, normed = normal(6, 9, seed=5), normal(6, 9, seed=6, dtype=torch.bfloat16)
    saved, weight = tensors[0].detach(), tensors[2].detach()
    for sum_grad, kept, weight_d in ((None, saved, weight), (total, saved.bfloat16(), weight.bfloat16())):
        arguments = (sum_grad, normed, kept, weight_d, EPS, torch.float32, torch.bfloat16)
        torch.library.opcheck(add_norm_backward, arguments, test_utils=tests[:2])


@pytest.mark.parametrize(
    ("types", "kept_type"),
    [
        ((torch.float32, torch.bfloat16), torch.bfloat16),
        ((torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float32, torch.float16), torch.float32),
    ],
    ids=str,
)
def test_the_sum_is_kept_in_bfloat16_where_that_will_do(types: tuple[torch.dtype, ...], kept_type: torch.dtype) -> None:
    """And nothing else of its size; without a gradient nothing is written to be kept."""
    residual, branch, weight = inputs(33, 20)
    leaves = [x.detach().to(t).requires_grad_() for x, t in zip((residual, branch), types, strict=True)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        add_norm(*leaves, weight, EPS)
    assert [t.dtype for t in kept if t.ndim == 2] == [kept_type]
    with torch.no_grad():
        assert not add_norm_and_keep(*leaves, weight, EPS, types[1], False)[2].numel()


def test_a_sum_beyond_float16() -> None:
    """Its gradients are those of the sum in float32, whatever the type of the branch."""
    residual, _, weight = inputs(33, 20)
    leaves = [x.requires_grad_() for x in (1e6 * residual, normal(33, 20, seed=4).half(), weight)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    direction = normal(33, 20, seed=9)
    found = torch.autograd.grad(add_norm(*leaves, EPS, torch.float32)[1], leaves, direction)
    expected = torch.autograd.grad(plain(*wide)[1], wide, direction.double())
    assert relative_error(found[0], expected[0]) <= 1e-5
    assert relative_error(found[2], expected[2]) <= 1e-5


@pytest.mark.parametrize("used", ["both", "sum", "normed"])
def test_compiles_without_a_graph_break(used: str) -> None:
    """For one number of tokens, and then for any."""

    def value(residual: Tensor, branch: Tensor, weight: Tensor) -> Tensor:
        total, normed = add_norm(residual, branch, weight, EPS)
        parts = {"sum": [total], "normed": [normed], "both": [total, normed]}[used]
        return sum(x.float().square() for x in parts)  # type: ignore[return-value]

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    for m in (5, 40, 70):
        tensors = [x.requires_grad_() for x in inputs(m, 12)]
        found, expected = compiled(*tensors), value(*tensors)
        assert torch.equal(found, expected)
        grads = (torch.autograd.grad(x.sum(), tensors, allow_unused=True) for x in (found, expected))
        for one, other in zip(*grads, strict=True):
            if one is not None and other is not None:
                torch.testing.assert_close(one, other)
            else:  # compiled, a weight that is not used may have a gradient of zeros
                assert not any(x.any() for x in (one, other) if x is not None)


def test_results_are_the_same_every_time() -> None:
    leaves = [x.requires_grad_() for x in inputs(200, 130)]
    directions = directions_for(200, 130, torch.bfloat16)
    runs = [torch.autograd.grad(add_norm(*leaves, EPS), leaves, directions) for _ in range(3)]
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(run, runs[0], strict=True))
