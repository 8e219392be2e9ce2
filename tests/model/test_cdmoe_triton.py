"""The kernels of the experts against plain indexing in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="there is no Triton for this machine")

from doge_lm.model import cdmoe_triton
from doge_lm.model.cdmoe import cdmoe
from doge_lm.model.cdmoe_triton import bag, dots, pick, scatter, scatter_and_dots, sort_assignments, spread

from .support import EVERY_VARIANT, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

CHUNK, LONGEST = 8, 13

# (M, K, N, F): one token, K = N, one row of a token, N = 2·3, rows that fill no block, chunks cut evenly and not, few
# tokens and many to a row.
SIZES = [
    (1, 1, 6, 5),
    (1, 6, 6, 33),
    (7, 1, 6, 40),
    (65, 3, 300, 17),
    (CHUNK, 1, 4, 16),
    (70 if EVERY_VARIANT else 40, 4, 12, 20),
    (12 if EVERY_VARIANT else 3, 20, 50, 130),
]
# Which rows are taken, and the type they have: the order of sums depends on the former alone.
PRODUCTS = [(kind, torch.float32) for kind in ("any", "one", "hot")] + [("hot", torch.bfloat16)]
if EVERY_VARIANT:
    PRODUCTS += [("any", torch.bfloat16), ("one", torch.bfloat16)]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that runs of rows are summed by one program and by several."""
    monkeypatch.setattr(cdmoe_triton, "CHUNK", CHUNK)
    monkeypatch.setattr(cdmoe_triton, "LONGEST", LONGEST)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def indices(m: int, k: int, n: int, kind: str, seed: int) -> Tensor:
    """Rows of the table: any, one alone, or one hot row among any."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, n, (m, k), generator=generator)
    if kind == "one":
        index[:] = n // 2
    if kind == "hot":
        index[torch.rand(m, k, generator=generator) < 0.8] = n - 1
    return index.to(DEVICE)


@pytest.mark.parametrize(("kind", "dtype"), PRODUCTS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_the_products_are_those_of_plain_indexing(sizes: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    m, k, n, f = sizes
    seed = sum(sizes)
    index = indices(m, k, n, kind, seed)
    rows, table = normal(m, f, seed=seed, dtype=dtype), normal(n, f, seed=seed + 1, dtype=dtype)
    weights = normal(m, k, seed=seed + 2)
    keys, order, starts = sort_assignments(index, n)
    taken = table.double()[index]
    found = dots(rows, table, table, index, keys, order, starts)
    assert found.dtype == torch.float32
    assert relative_error(found, torch.einsum("mf,mkf->mk", rows.double(), taken)) <= 1e-5
    found = bag(weights, table, table, index, keys, order, starts, dtype)
    assert found.dtype == dtype
    assert relative_error(found, torch.einsum("mk,mkf->mf", weights.double(), taken)) <= TOLERANCE[dtype]
    found = scatter(weights, rows, keys, order, starts, torch.float32)
    outer = (weights.double().unsqueeze(-1) * rows.double().unsqueeze(1)).flatten(0, 1)
    expected = torch.zeros(n, f, dtype=torch.float64, device=DEVICE).index_add_(0, index.flatten(), outer)
    assert relative_error(found, expected) <= 1e-5
    again, products = scatter_and_dots(weights, rows, table, keys, order, starts, torch.float32)
    assert torch.equal(again, found)
    assert relative_error(products, torch.einsum("mf,mkf->mk", rows.double(), taken)) <= 1e-5
    untouched = torch.ones(n, dtype=torch.bool, device=DEVICE)
    untouched[index.flatten()] = False
    assert not found[untouched].any()


@pytest.mark.parametrize("lengths", [[256], [257], [64, 300, 1, 0, 512], [0, 255, 257, 1, 64, 63, 1000]], ids=str)
def test_runs_of_the_lengths_that_ship(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """At and around the length from which a row is summed by chunks; runs begin and end within chunks and at them."""
    monkeypatch.undo()
    assert (cdmoe_triton.CHUNK, cdmoe_triton.LONGEST) == (64, 256)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))].to(DEVICE).unsqueeze(1)
    rows, weights = normal(len(index), 6, seed=1), normal(len(index), 1, seed=2)
    found = scatter(weights, rows, *sort_assignments(index, len(lengths)), torch.float32)
    expected = torch.zeros(len(lengths), 6, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, index.flatten(), weights.double() * rows.double())
    assert relative_error(found, expected) <= 1e-5
    assert torch.equal(found.any(dim=1).cpu(), torch.tensor(lengths) > 0)


def test_where_rows_begin() -> None:
    keys, order, starts = sort_assignments(torch.tensor([[4, 1], [1, 0]], device=DEVICE), 6)
    assert starts.tolist() == [0, 1, 3, 3, 3, 4, 4]
    assert order.tolist() == [3, 1, 2, 0]
    assert keys.tolist() == [0, 1, 1, 4]
    assert {x.dtype for x in (keys, order, starts)} == {torch.int32}
    for n in (2**8, 2**8 + 1, 2**15, 2**15 + 1):  # where the type that is sorted changes
        keys, order, starts = sort_assignments(torch.tensor([[n - 1, 0]], device=DEVICE), n)
        assert starts.tolist() == [0] + [1] * (n - 1) + [2]
        assert order.tolist() == [1, 0]


def gradients(path: str, dtype: torch.dtype, act: str, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    m, heads, k, n, e, d = 23, 2, 3, 20, 20, 24
    leaves = {
        "c": normal(m, e, seed=seed),
        "weights": normal(m, heads, k, seed=seed + 1).softmax(-1),
        "down": normal(n, e, seed=seed + 2),
        "up": normal(n, d, seed=seed + 3),
    }
    if path == "sparse":  # in float64 these are what the kernels are held against
        leaves = {name: leaf.to(torch.float32 if name == "weights" else dtype) for name, leaf in leaves.items()}
    else:
        leaves = {
            name: leaf.to(torch.float32 if name == "weights" else dtype).double() for name, leaf in leaves.items()
        }
    for leaf in leaves.values():
        leaf.requires_grad_()
    index = indices(m, heads * k, n, "hot", seed).view(m, heads, k)
    out = cdmoe(leaves["c"], leaves["weights"], index, leaves["down"], leaves["up"], getattr(F, act), path=path)
    out.backward(normal(m, d, seed=seed + 4).to(out.dtype))
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("act", ["silu", "sigmoid"])
@pytest.mark.parametrize("seed", range(3 if EVERY_VARIANT else 1))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_layer_and_its_gradients_are_those_of_the_gather_in_float64(
    dtype: torch.dtype, seed: int, act: str
) -> None:
    found, found_grads = gradients("sparse", dtype, act, seed)
    expected, expected_grads = gradients("gather", dtype, act, seed)
    assert found.dtype == dtype
    assert relative_error(found, expected) <= TOLERANCE[dtype]
    assert found_grads.keys() == expected_grads.keys() == {"c", "weights", "down", "up"}
    for name, grad in found_grads.items():
        assert relative_error(grad, expected_grads[name]) <= 2 * TOLERANCE[dtype], name


def test_results_are_the_same_every_time() -> None:
    first, first_grads = gradients("sparse", torch.bfloat16, "silu", 5)
    for _ in range(3 if EVERY_VARIANT else 1):
        again, again_grads = gradients("sparse", torch.bfloat16, "silu", 5)
        assert torch.equal(first, again)
        assert all(torch.equal(first_grads[name], again_grads[name]) for name in first_grads)


def test_tensors_that_are_not_contiguous() -> None:
    index = indices(9, 8, 10, "any", 0).t().contiguous().t()
    rows, table = normal(12, 9, seed=1).t()[:, :12], normal(10, 30, seed=2)[:, 3:15]
    weights = normal(8, 9, seed=3).t()
    keys, order, starts = sort_assignments(index, 10)
    plain = [x.contiguous() for x in (rows, table, index)]
    assert torch.equal(
        dots(rows, table, table, index.contiguous(), keys, order, starts),
        dots(*plain[:2], plain[1], plain[2], keys, order, starts),
    )
    for strided, whole in zip(
        (
            bag(weights, table, table, plain[2], keys, order, starts, torch.float32),
            scatter(weights, rows, keys, order, starts, rows.dtype),
        ),
        (
            bag(weights.contiguous(), plain[1], plain[1], plain[2], keys, order, starts, torch.float32),
            scatter(weights.contiguous(), plain[0], keys, order, starts, rows.dtype),
        ),
        strict=True,
    ):
        assert torch.equal(strided, whole)
    out = cdmoe(rows, weights.view(9, 8, 1), index.view(9, 8, 1), table, table, F.silu, path="sparse")
    assert relative_error(out, cdmoe(*(x.double() for x in (rows, weights.view(9, 8, 1))), index.view(9, 8, 1),
                                     table.double(), table.double(), F.silu, path="gather")) <= 1e-5  # fmt: skip


def test_no_tokens() -> None:
    table = normal(6, 8, seed=0).requires_grad_()
    c = normal(0, 8, seed=0).requires_grad_()
    index = torch.empty(0, 1, 2, dtype=torch.int64, device=DEVICE)
    out = cdmoe(c, normal(0, 1, 2, seed=0), index, table, table, F.silu, path="sparse")
    assert out.shape == (0, 8)
    out.sum().backward()
    assert table.grad is not None
    assert not table.grad.any()


def test_compiles_without_a_graph_break() -> None:
    m, k, n, f = 11, 4, 12, 8
    index = indices(m, k, n, "any", 1).view(m, 1, k)
    leaves = [normal(m, f, seed=2), normal(m, 1, k, seed=3), normal(n, f, seed=4), normal(n, f, seed=5)]
    for leaf in leaves:
        leaf.requires_grad_()

    def layer(c: Tensor, weights: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return cdmoe(c, weights, index, down, up, F.silu, path="sparse")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(*leaves), compiled(*leaves)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("operator", ["dots", "bag", "scatter", "scatter_and_dots"])
def test_the_operators_are_sound(operator: str) -> None:
    """PyTorch's own check: shapes and types of the fakes, no aliases, no changed arguments."""
    index = indices(6, 3, 5, "any", 2)
    keys, order, starts = sort_assignments(index, 5)
    rows, table, weights = normal(6, 8, seed=1), normal(5, 8, seed=2), normal(6, 3, seed=3)
    arguments = {
        "dots": (rows, table, table, index, keys, order, starts),
        "bag": (weights, table, table, index, keys, order, starts, torch.bfloat16),
        "scatter_and_dots": (weights, rows, table, keys, order, starts, torch.float32),
        "scatter": (weights, rows, keys, order, starts, torch.float32),
    }[operator]
    torch.library.opcheck(getattr(cdmoe_triton, operator), arguments,
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_autocast_gives_its_type() -> None:
    index = indices(9, 4, 12, "any", 1).view(9, 1, 4)
    c, weights, table = normal(9, 8, seed=2), normal(9, 1, 4, seed=3), normal(12, 8, seed=4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = cdmoe(c, weights, index, table, table, F.silu, path="sparse")
    assert found.dtype == torch.bfloat16
    expected = cdmoe(c.double(), weights.double(), index, table.double(), table.double(), F.silu, path="gather")
    assert relative_error(found, expected) <= 1e-2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["any", "one", "hot"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_values_are_spread_and_picked(sizes: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    m, k, n, _ = sizes
    index = indices(m, k, n, kind, sum(sizes))
    values, table = normal(m, k, seed=1).requires_grad_(), normal(m, n, seed=2, dtype=dtype).requires_grad_()
    found = spread(values, index, n, dtype)
    expected = torch.zeros(m, n, dtype=torch.float64, device=DEVICE).scatter_add(1, index, values.detach().double())
    assert found.dtype == dtype
    assert relative_error(found, expected) <= TOLERANCE[dtype]  # the interpreter cuts bfloat16, it does not round
    grad = normal(m, n, seed=3, dtype=dtype)
    (of_values,) = torch.autograd.grad(found, values, grad)
    assert torch.equal(of_values, grad.gather(1, index).float())
    picked = pick(table, index)
    assert torch.equal(picked, table.gather(1, index))
    grad = normal(m, k, seed=4, dtype=dtype)
    (of_table,) = torch.autograd.grad(picked, table, grad)
    assert torch.equal(of_table, spread(grad, index, n, dtype))
