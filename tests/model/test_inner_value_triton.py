"""The kernel of the inner value against the plain mathematics in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this machine")

from doge_lm.model.inner_value_triton import MOST_VALUES, inner_value, inner_value_backward

from .support import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

# (M, d, n): one token and one value, rows that fill no tile and more than one, programs filled and one token more.
SIZES = [(1, 5, 1), (3, 5, 2), (32, 128, 2), (33, 130, 3), (70, 300, 8), (5, 24, 17), (2, 9, MOST_VALUES)]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(
    m: int, d: int, n: int, dtype: torch.dtype = torch.float32, kind: str = "any", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, d), scores (M, n) and the table (n, d), in float32 and near 1 as it starts."""
    scores = normal(m, n, seed=seed + 1)
    scores = {"any": scores, "rounded": scores.round(), "equal": torch.zeros_like(scores)}[kind]
    return normal(m, d, seed=seed, dtype=dtype), scores.to(dtype), 1 + 0.1 * normal(n, d, seed=seed + 2)


def first_of_the_highest(scores: Tensor) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, 0]


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As a kernel stores float32 numbers: rounded, but Triton's interpreter cuts the digits that bfloat16 has not."""
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        x = (x.view(torch.int32) & -0x10000).view(torch.float32)
    return x.to(dtype)


def plain(x: Tensor, scores: Tensor, table: Tensor) -> Tensor:
    """v = x ⊙ (choice E), where choice is one-hot and has the gradient of a softmax."""
    hard = torch.nn.functional.one_hot(first_of_the_highest(scores), scores.shape[1]).to(scores.dtype)
    soft = scores.softmax(-1)
    return x * ((hard + soft - soft.detach()) @ table)


def assert_gradients(tensors: tuple[Tensor, ...], direction: Tensor) -> None:
    """Those of the kernel against the plain ones in float64, each to the precision of its type."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    found = torch.autograd.grad(inner_value(*leaves), leaves, direction)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(plain(*wide), wide, direction.double())
    for name, one, other, leaf in zip(("x", "scores", "table"), found, expected, tensors, strict=True):
        assert (one.dtype, one.shape) == (leaf.dtype, leaf.shape), name
        if float(other.norm()) < 1e-9:  # the choice among one
            assert float(one.double().norm()) <= 1e-6, name
        else:
            assert relative_error(one, other) <= TOLERANCE[leaf.dtype], name


@pytest.mark.parametrize("kind", ["any", "rounded", "equal"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_the_value_is_exact(sizes: tuple[int, int, int], dtype: torch.dtype, kind: str) -> None:
    """The row of the first of the highest scores, times x, in float32 and then in x's type; no other row takes part."""
    x, scores, table = inputs(*sizes, dtype, kind, seed=sum(sizes))
    found = inner_value(x, scores, table)
    assert found.dtype == dtype
    assert torch.equal(found, stored(x.float() * table[first_of_the_highest(scores)], dtype))


@pytest.mark.parametrize("kind", ["any", "rounded", "equal"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_gradients_are_those_of_the_plain_way_in_float64(
    sizes: tuple[int, int, int], dtype: torch.dtype, kind: str
) -> None:
    for seed in range(2):
        tensors = inputs(*sizes, dtype, kind, seed=seed)
        assert_gradients(tensors, normal(*sizes[:2], seed=seed + 9, dtype=dtype))


def test_large_scores_keep_their_softmax() -> None:
    """exp(200) is beyond float32."""
    x, scores, table = inputs(40, 20, 3)
    scores = 200 + scores.sign() * torch.where(normal(40, 3, seed=5) > 0, 1.0, 300.0)
    assert_gradients((x, scores, table), normal(40, 20, seed=9))


def test_a_table_in_bfloat16() -> None:
    x, scores, table = inputs(40, 20, 3, torch.bfloat16)
    table = table.bfloat16()
    expected = x.float() * table[first_of_the_highest(scores)].float()
    assert torch.equal(inner_value(x, scores, table), stored(expected, torch.bfloat16))
    assert_gradients((x, scores, table), normal(40, 20, seed=9, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", ["parts of wider rows", "transposed", "one for all tokens"])
def test_tensors_that_are_not_contiguous(layout: str) -> None:
    m, d, n = 37, 20, 3
    x, scores, table = inputs(m, d, n)
    direction = normal(m, d, seed=9)
    if layout == "parts of wider rows":  # as one product for queries, keys and scores leaves them
        x, direction = (torch.cat((x, y, y), dim=1)[:, :d] for y in (x, direction))
        scores = torch.cat((normal(m, 48, seed=5), scores, normal(m, 5, seed=6)), dim=1)[:, 48 : 48 + n]
        table = torch.cat((table, table), dim=1)[:, :d]
    elif layout == "transposed":
        x, scores, table, direction = (y.t().contiguous().t() for y in (x, scores, table, direction))
    else:
        x, scores, direction = (y[:1].expand(m, -1) for y in (x, scores, direction))
    assert not x.is_contiguous()
    assert not scores.is_contiguous()
    assert torch.equal(inner_value(x, scores, table), x * table[first_of_the_highest(scores)])
    assert_gradients((x, scores, table), direction)


def test_no_tokens() -> None:
    tensors = [x.requires_grad_() for x in inputs(0, 8, 3)]
    out = inner_value(*tensors)
    assert out.shape == (0, 8)
    out.sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
def test_scores_that_are_no_numbers_choose_a_row_that_exists(n: int) -> None:
    """A diverged run must end with its message, not with a read out of a table."""
    x, scores, table = inputs(40, 8, n)
    scores[0], scores[1], scores[2], scores[3, -1] = math.nan, math.inf, -math.inf, math.nan
    found = inner_value(x, scores, table)
    rows = x.unsqueeze(1) * table  # (M, n, d)
    assert bool((found.unsqueeze(1) == rows).all(-1).any(-1).all())


def test_the_operators_are_sound() -> None:
    """PyTorch's own check: shapes and types of the fakes, no aliases, no changed arguments, the gradient's place."""
    tensors = tuple(x.requires_grad_() for x in inputs(6, 9, 3, torch.bfloat16))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(inner_value, tensors, test_utils=tests)
    grad = normal(6, 9, seed=5, dtype=torch.bfloat16)
    arguments = (grad, *(x.detach() for x in tensors))
    torch.library.opcheck(inner_value_backward, arguments, test_utils=tests[:2])


def test_compiles_without_a_graph_break() -> None:
    """For one number of tokens, and then for any."""

    def value(x: Tensor, scores: Tensor, table: Tensor) -> Tensor:
        return inner_value(x, scores, table)

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    for m in (5, 40, 70):
        tensors = [x.requires_grad_() for x in inputs(m, 12, 3)]
        found, expected = compiled(*tensors), inner_value(*tensors)
        assert torch.equal(found, expected)
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), tensors),
            torch.autograd.grad(expected.square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_results_are_the_same_every_time() -> None:
    leaves = [x.requires_grad_() for x in inputs(200, 130, 4, torch.bfloat16)]
    direction = normal(200, 130, seed=9, dtype=torch.bfloat16)
    runs = [torch.autograd.grad(inner_value(*leaves), leaves, direction) for _ in range(3)]
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(run, runs[0], strict=True))
