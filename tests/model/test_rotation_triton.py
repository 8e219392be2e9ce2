"""The kernels of the rotation against plain ones in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this machine")

from doge_lm.model.rotation_triton import (
    normed_rotated_projections,
    normed_rotated_projections_backward,
    rotated_projections,
    rotated_projections_backward,
)

from .support import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

# (B, T, h, f, n, C): one token and the smallest head, columns left over and none, more tokens than a program takes.
SIZES = [(1, 1, 1, 2, 1, 8), (2, 9, 3, 10, 4, 64), (2, 40, 2, 6, 5, 32), (1, 33, 1, 16, 8, 40), (3, 5, 2, 4, 17, 40)]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def angles(rows: int, t: int, f: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (rows, T, f), each angle for feature i and i + f/2; no two rows alike."""
    turns = 10 * normal(rows, t, f // 2, seed=8).repeat(1, 1, 2)
    return turns.cos(), turns.sin()


def plain(product: Tensor, cos: Tensor, sin: Tensor, heads: int, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Feature i and i + f/2 as one complex number, turned by its angle."""
    b, t, _ = product.shape
    f = cos.shape[-1]
    turn = torch.complex(cos, sin)[..., None, : f // 2]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.reshape(b, t, heads, f).chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    d = heads * f
    return rotated(product[..., :d]), rotated(product[..., d : 2 * d]), product[..., 2 * d : 2 * d + values]


def assert_same(product: Tensor, cos: Tensor, sin: Tensor, heads: int, values: int, directions: list[Tensor]) -> None:
    """Outputs and gradients, to the precision of the product's type."""
    leaf, wide = product.detach().requires_grad_(), product.detach().double().requires_grad_()
    found = rotated_projections(leaf, cos, sin, heads, values)
    expected = plain(wide, cos.double(), sin.double(), heads, values)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (product.dtype, other.shape)
        assert relative_error(one, other) <= TOLERANCE[product.dtype]
    assert torch.equal(found[2].double(), expected[2])
    (grad,) = torch.autograd.grad(found, leaf, directions)
    (wide_grad,) = torch.autograd.grad(expected, wide, [direction.double() for direction in directions])
    assert (grad.dtype, grad.shape) == (product.dtype, product.shape)
    assert relative_error(grad, wide_grad) <= TOLERANCE[product.dtype]
    assert not grad[..., 2 * heads * cos.shape[-1] + values :].any(), "columns without meaning have no gradient"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("positions", ["for all rows", "for each row"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_outputs_and_gradients_are_the_plain_ones(sizes: tuple[int, ...], positions: str, dtype: torch.dtype) -> None:
    b, t, h, f, n, columns = sizes
    cos, sin = angles(1 if positions == "for all rows" else b, t, f)
    directions = [normal(b, t, *shape, seed=i, dtype=dtype) for i, shape in enumerate(((h, f), (h, f), (n,)))]
    assert_same(normal(b, t, columns, seed=5, dtype=dtype), cos, sin, h, n, directions)


def test_tensors_that_are_not_contiguous() -> None:
    """Gradients as attention gives them, heads first; features or tokens first; one number for all."""
    b, t, h, f, n, columns = SIZES[1]
    cos, sin = angles(1, t, f)
    for product in (
        normal(b, t, 2 * columns, seed=5)[..., 3 : columns + 3],
        normal(t, b, columns, seed=5).transpose(0, 1),
        normal(columns, b, t, seed=5).permute(1, 2, 0),
    ):
        assert not product.is_contiguous()
        query, key = normal(b, h, t, f, seed=1).transpose(1, 2), normal(f, h, t, b, seed=2).permute(3, 2, 1, 0)
        for scores in (normal(b, n, t, seed=3).transpose(1, 2), normal(1, 1, 1, seed=3).expand(b, t, n)):
            assert_same(product, cos, sin, h, n, [query, key, scores])


EPS = 0.02


def plain_normed(
    product: Tensor, query_gains: Tensor, key_gains: Tensor, cos: Tensor, sin: Tensor, heads: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x / √(mean x² + ε), times the gains, of each head's queries and keys, and then the plain rotation."""
    d, f = heads * cos.shape[-1], cos.shape[-1]

    def normed(x: Tensor, gains: Tensor) -> Tensor:
        of_heads = x.unflatten(-1, (heads, f))
        return (of_heads / (of_heads.square().mean(-1, keepdim=True) + EPS).sqrt() * gains).flatten(-2)

    query, key = normed(product[..., :d], query_gains), normed(product[..., d : 2 * d], key_gains)
    return plain(torch.cat((query, key, product[..., 2 * d :]), dim=-1), cos, sin, heads, values)


def assert_same_normed(product: Tensor, sizes: tuple[int, ...], rows: int, directions: list[Tensor]) -> None:
    """Outputs and gradients with norms, to the precision of the product's type."""
    _, t, h, f, n, _ = sizes
    cos, sin = angles(rows, t, f)
    gains = [1 + 0.5 * normal(f, seed=seed) for seed in (11, 12)]
    leaves = [x.detach().requires_grad_() for x in (product, *gains)]
    wide = [x.detach().double().requires_grad_() for x in (product, *gains)]
    found = normed_rotated_projections(*leaves, cos, sin, h, n, EPS)
    expected = plain_normed(*wide, cos.double(), sin.double(), h, n)
    grads = torch.autograd.grad(found, leaves, directions)
    wide_grads = torch.autograd.grad(expected, wide, [direction.double() for direction in directions])
    for one, other in zip((*found, *grads), (*expected, *wide_grads), strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) <= TOLERANCE[product.dtype]
    assert [x.dtype for x in grads] == [product.dtype, torch.float32, torch.float32]
    assert not grads[0][..., 2 * h * f + n :].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("positions", ["for all rows", "for each row"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_with_norms(sizes: tuple[int, ...], positions: str, dtype: torch.dtype) -> None:
    b, t, h, f, n, columns = sizes
    directions = [normal(b, t, *shape, seed=i, dtype=dtype) for i, shape in enumerate(((h, f), (h, f), (n,)))]
    product = normal(b, t, columns, seed=5, dtype=dtype)
    assert_same_normed(product, sizes, 1 if positions == "for all rows" else b, directions)


def test_with_norms_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program takes several tiles, and the last ones fewer."""
    monkeypatch.setattr("doge_lm.model.rotation_triton.SUMMING_PROGRAMS", 3)
    sizes = (2, 41, 2, 6, 5, 32)
    b, t, h, f, n, columns = sizes
    directions = [normal(b, t, *shape, seed=i) for i, shape in enumerate(((h, f), (h, f), (n,)))]
    assert_same_normed(normal(b, t, columns, seed=5), sizes, 1, directions)


def test_with_norms_of_tensors_that_are_not_contiguous() -> None:
    b, t, h, f, n, columns = SIZES[1]
    query, key = normal(b, h, t, f, seed=1).transpose(1, 2), normal(f, h, t, b, seed=2).permute(3, 2, 1, 0)
    for product in (
        normal(b, t, 2 * columns, seed=5)[..., 3 : columns + 3],
        normal(columns, b, t, seed=5).permute(1, 2, 0),
    ):
        assert_same_normed(product, SIZES[1], 1, [query, key, normal(b, n, t, seed=3).transpose(1, 2)])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_no_tokens(shape: tuple[int, int]) -> None:
    product = torch.empty(*shape, 16, device=DEVICE, requires_grad=True)
    cos, sin = angles(1, shape[1], 2)
    found = rotated_projections(product, cos, sin, 3, 4)
    assert [out.shape for out in found] == [(*shape, 3, 2), (*shape, 3, 2), (*shape, 4)]
    torch.cat([out.flatten() for out in found]).sum().backward()
    assert product.grad is not None
    assert product.grad.shape == product.shape
    gains = torch.ones(2, device=DEVICE, requires_grad=True)
    normed = normed_rotated_projections(product, gains, gains, cos, sin, 3, 4, EPS)
    torch.cat([out.flatten() for out in normed]).sum().backward()
    assert gains.grad is not None
    assert not gains.grad.any()


def test_the_operators_are_sound() -> None:
    """PyTorch's own check: shapes and types of the fakes, no aliases, no changed arguments, the gradient's place."""
    b, t, h, f, n, columns = SIZES[1]
    cos, sin = angles(1, t, f)
    product = normal(b, t, columns, seed=5, dtype=torch.bfloat16).requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(rotated_projections, (product, cos, sin, h, n), test_utils=tests)
    parts = [out.detach() for out in rotated_projections(product, cos, sin, h, n)]
    torch.library.opcheck(rotated_projections_backward, (*parts, cos, sin, columns), test_utils=tests[:2])


def test_the_operators_with_norms_are_sound() -> None:
    b, t, h, f, n, columns = SIZES[1]
    cos, sin = angles(1, t, f)
    product = normal(b, t, columns, seed=5, dtype=torch.bfloat16).requires_grad_()
    gains = [normal(f, seed=seed).requires_grad_() for seed in (1, 2)]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    inputs = (product, *gains, cos, sin)
    torch.library.opcheck(normed_rotated_projections, (*inputs, h, n, EPS), test_utils=tests)
    parts = [out.detach() for out in normed_rotated_projections(*inputs, h, n, EPS)]
    torch.library.opcheck(
        normed_rotated_projections_backward, (*parts, *(x.detach() for x in inputs), EPS), test_utils=tests[:2]
    )


def test_compiles_without_a_graph_break() -> None:
    """For one number of tokens, and then for any."""

    def turned(product: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, scores = rotated_projections(product, cos, sin, 3, 4)
        return (query * key).sum((2, 3)) * scores.sum(-1)

    compiled = torch.compile(turned, fullgraph=True, backend="aot_eager")
    for t in (5, 9, 40):
        product, (cos, sin) = normal(2, t, 64, seed=5).requires_grad_(), angles(1, t, 10)
        found, expected = compiled(product, cos, sin), turned(product, cos, sin)
        torch.testing.assert_close(found, expected)
        (one,) = torch.autograd.grad(found.sum(), product)
        (other,) = torch.autograd.grad(expected.sum(), product)
        torch.testing.assert_close(one, other)
