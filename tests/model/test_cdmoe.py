"""The CDMoE operator against brute force over all experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from doge_lm.model.cdmoe import cdmoe, cdmoe_route, folded_keys, folding_pays, key_table_sizes, product_topk

from . import reference
from .support import relative_error

PATHS = ["gather", "dense"]

# (n1, n2, H, k, e, d): square, rectangular, prime × k, one row in the first table, k above a table, k = N.
GRID = [
    (4, 4, 1, 2, 8, 5),
    (3, 4, 2, 3, 6, 7),
    (2, 9, 1, 4, 4, 3),
    (5, 7, 3, 5, 10, 4),
    (3, 13, 2, 2, 6, 9),
    (2, 3, 2, 5, 4, 8),
    (2, 3, 2, 6, 4, 5),
    (4, 4, 2, 16, 6, 3),
    (1, 6, 2, 3, 4, 5),
    (3, 3, 4, 1, 2, 6),
]

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (torch.nn.functional.silu, reference.silu),
    # Neither of these is zero at zero: an expert that was not chosen must still add nothing.
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + torch.exp(-x))),
    "cos": (torch.cos, torch.cos),
}


def draw(
    n1: int, n2: int, heads: int, e: int, d: int, *, tokens: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Inputs of the operator, of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "c": normal(tokens, e),
        "queries": normal(tokens, heads, e),
        "keys": normal(heads, n1 + n2, e // 2),
        "down_embed": normal(n1 * n2, e) / math.sqrt(e),
        "up_embed": normal(n1 * n2, d),
    }


def operate(inputs: dict[str, Tensor], n1: int, k: int, act: Callable[[Tensor], Tensor], path: str) -> Tensor:
    """Route and apply."""
    weights, experts = cdmoe_route(inputs["queries"], inputs["keys"], n1, k)
    return cdmoe(inputs["c"], weights, experts, inputs["down_embed"], inputs["up_embed"], act, path=path)


class Produced(TorchDispatchMode):
    """Records how many elements each operation's result holds; views cost nothing and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("path", [*PATHS, "auto"])
@pytest.mark.parametrize("sizes", GRID, ids=lambda sizes: "x".join(map(str, sizes)))
def test_equals_reference(sizes: tuple[int, ...], path: str, act: str) -> None:
    n1, n2, heads, k, e, d = sizes
    inputs = draw(n1, n2, heads, e, d, seed=sum(sizes))
    expected = reference.cdmoe(
        inputs["c"],
        inputs["queries"],
        inputs["keys"],
        n1,
        k,
        inputs["down_embed"],
        inputs["up_embed"],
        ACTIVATIONS[act][1],
    )
    found = operate(inputs, n1, k, ACTIVATIONS[act][0], path)
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_expert_chosen_by_several_heads_counts_each_time(path: str) -> None:
    """Its activation is taken of each weight apart: act(w1 u) + act(w2 u), not act((w1 + w2) u)."""
    c = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    weights = torch.tensor([[[0.3, 0.7], [0.9, 0.1]]], dtype=torch.float64)
    experts = torch.tensor([[[2, 0], [2, 3]]])
    down = torch.tensor([[1.0, 0.5], [9.0, 9.0], [-1.0, 2.0], [0.25, 0.0]], dtype=torch.float64)
    up = torch.eye(4, dtype=torch.float64)
    found = cdmoe(c, weights, experts, down, up, torch.sigmoid, path=path)
    inner = {0: 2.0, 2: 3.0, 3: 0.25}

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [
        sigmoid(0.7 * inner[0]),
        0.0,
        sigmoid(0.3 * inner[2]) + sigmoid(0.9 * inner[2]),
        sigmoid(0.1 * inner[3]),
    ]
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sizes", [(2, 3, 2, 2, 4, 3), (3, 3, 1, 4, 2, 2), (2, 2, 2, 4, 4, 3)], ids=str)
@pytest.mark.parametrize("act", ["silu", "sigmoid"])
def test_gradcheck(sizes: tuple[int, ...], path: str, act: str) -> None:
    n1, n2, heads, k, e, d = sizes
    inputs = draw(n1, n2, heads, e, d, tokens=3, seed=sum(sizes))
    names = list(inputs)

    def function(*tensors: Tensor) -> Tensor:
        return operate(dict(zip(names, tensors, strict=True)), n1, k, ACTIVATIONS[act][0], path)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("path", PATHS)
def test_gradients_equal_the_reference(path: str) -> None:
    """`gradcheck` differentiates what was computed; this differentiates what should have been."""
    n1, n2, heads, k, e, d = 3, 4, 2, 3, 6, 5
    inputs = draw(n1, n2, heads, e, d, seed=5)
    found = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    expected = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    direction = torch.randn(6, d, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    (operate(found, n1, k, torch.nn.functional.silu, path) * direction).sum().backward()
    out = reference.cdmoe(**expected, n1=n1, k=k, act=reference.silu)
    (out * direction).sum().backward()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.grad, expected[name].grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("n1", "n2", "heads", "k"),
    [(16, 16, 1, 2), (16, 32, 1, 2), (24, 32, 2, 4), (3, 7, 3, 7), (2, 50, 1, 20), (5, 5, 2, 25), (1, 9, 2, 4)],
)
def test_route_finds_the_best_of_all(n1: int, n2: int, heads: int, k: int) -> None:
    """Exactly the k best experts of each of many tokens, and the softmax of their scores."""
    e = 8
    for seed in range(5):
        inputs = draw(n1, n2, heads, e, 1, tokens=100, seed=seed)
        queries, keys = inputs["queries"], inputs["keys"]
        weights, experts = cdmoe_route(queries, keys, n1, k)
        assert weights.shape == experts.shape == (100, heads, k)
        assert experts.dtype == torch.int64
        scores = torch.empty(100, heads, n1 * n2, dtype=torch.float64)
        for i in range(n1):
            for j in range(n2):
                joined = torch.cat([keys[:, i], keys[:, n1 + j]], dim=-1)
                scores[:, :, i * n2 + j] = (queries * joined).sum(-1)
        best_scores, best = scores.topk(k, dim=-1)
        assert torch.equal(experts.sort(-1).values, best.sort(-1).values)
        expected = torch.zeros_like(scores).scatter(-1, best, best_scores.softmax(-1))
        found = torch.zeros_like(scores).scatter(-1, experts, weights)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_experts", [6, 12, 64, 256, 512, 768, 1024])
def test_every_expert_is_reachable_at_its_public_row(num_experts: int) -> None:
    """Expert (i, j) is row i·n2 + j; the first table and the first half of the query belong to i."""
    n1, n2 = key_table_sizes(num_experts)
    half = n1 + n2
    keys = torch.eye(half).expand(2, half, half)
    first = torch.arange(n1).repeat_interleave(n2)
    second = torch.arange(n2).repeat(n1)
    aimed = torch.cat([torch.eye(half)[first], torch.eye(half)[n1 + second]], dim=-1)
    queries = torch.stack([aimed, aimed.flip(0)], dim=1)
    _, experts = cdmoe_route(queries, keys, n1, 1)
    assert torch.equal(experts[:, 0, 0], torch.arange(num_experts))
    assert torch.equal(experts[:, 1, 0], torch.arange(num_experts).flip(0))


@pytest.mark.parametrize("equal", ["all keys zero", "rows twice"])
def test_ties_still_give_k_different_experts(equal: str) -> None:
    n1, n2, heads, k, e = 4, 6, 2, 7, 8
    inputs = draw(n1, n2, heads, e, 1, tokens=20)
    keys = inputs["keys"]
    if equal == "all keys zero":
        keys = torch.zeros_like(keys)
    else:
        keys[:, 1], keys[:, n1 + 2] = keys[:, 0], keys[:, n1]
    weights, experts = cdmoe_route(inputs["queries"], keys, n1, k)
    assert all(len(set(row)) == k for row in experts.flatten(0, 1).tolist())
    assert int(experts.min()) >= 0
    assert int(experts.max()) < n1 * n2
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, heads, dtype=torch.float64))
    if equal == "all keys zero":
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / k))


@pytest.mark.parametrize("path", [*PATHS, "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(path: str, dtype: torch.dtype, tolerance: float) -> None:
    """The operator on given routes, at a size like a preset's: relative error against float64 on the same inputs."""
    n1, n2, heads, k, e, d, tokens = 16, 16, 2, 4, 64, 48, 64
    low = draw(n1, n2, heads, e, d, tokens=tokens, dtype=dtype)
    weights, experts = cdmoe_route(low["queries"].double(), low["keys"].double(), n1, k)
    weights = weights.to(dtype)
    found = cdmoe(low["c"], weights, experts, low["down_embed"], low["up_embed"], torch.nn.functional.silu, path=path)
    assert found.dtype == dtype
    wide = {name: tensor.double() for name, tensor in low.items()}
    rows = []
    for m in range(tokens):
        pairs = [(weights[m, h, i].double(), int(experts[m, h, i])) for h in range(heads) for i in range(k)]
        rows.append(
            reference.experts_output(
                wide["c"][m],
                [w for w, _ in pairs],
                [x for _, x in pairs],
                wide["down_embed"],
                wide["up_embed"],
                reference.silu,
            )
        )
    assert relative_error(found, torch.stack(rows)) <= tolerance


@pytest.mark.parametrize("path", [*PATHS, "auto"])
def test_bfloat16_gradients(path: str) -> None:
    n1, n2, heads, k, e, d, tokens = 8, 8, 2, 3, 32, 24, 40
    low = draw(n1, n2, heads, e, d, tokens=tokens, dtype=torch.bfloat16)
    weights, experts = cdmoe_route(low["queries"].double(), low["keys"].double(), n1, k)
    names = ["c", "down_embed", "up_embed"]
    gradients = {}
    for dtype in (torch.bfloat16, torch.float64):
        leaves = {name: low[name].detach().clone().to(dtype).requires_grad_() for name in names}
        share = weights.bfloat16().to(dtype).requires_grad_()
        out = cdmoe(
            leaves["c"], share, experts, leaves["down_embed"], leaves["up_embed"], torch.nn.functional.silu, path=path
        )
        out.backward(torch.ones_like(out))
        gradients[dtype] = {name: leaf.grad for name, leaf in leaves.items()} | {"weights": share.grad}
    for name, wide in gradients[torch.float64].items():
        assert relative_error(gradients[torch.bfloat16][name], wide) <= 2e-2, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_route_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    """What is chosen is as good as the best to the precision given, and the weights are the softmax of its scores."""
    n1, n2, heads, k, e, tokens = 24, 32, 2, 4, 64, 50
    low = draw(n1, n2, heads, e, 1, tokens=tokens, dtype=dtype)
    weights, experts = cdmoe_route(low["queries"], low["keys"], n1, k)
    assert all(len(set(row)) == k for row in experts.flatten(0, 1).tolist())
    queries, keys = low["queries"].double(), low["keys"].double()
    first = torch.einsum("mhe,hne->mhn", queries[..., : e // 2], keys[:, :n1])
    second = torch.einsum("mhe,hne->mhn", queries[..., e // 2 :], keys[:, n1:])
    scores = (first[..., :, None] + second[..., None, :]).flatten(2)
    chosen = scores.gather(-1, experts)
    best = scores.topk(k, dim=-1).values
    scale = float(scores.std())
    assert float((best - chosen.sort(-1, descending=True).values).max()) <= tolerance * 4 * scale
    # A score carries the precision of its inputs' type; a softmax weight moves by at most as much as the scores do.
    assert relative_error(weights, chosen.softmax(-1)) <= tolerance * 4 * scale


def test_paths_agree_in_float32_at_preset_size() -> None:
    n1, n2, heads, k, e, d = 16, 16, 1, 2, 256, 256
    inputs = draw(n1, n2, heads, e, d, tokens=128, dtype=torch.float32)
    outs = [operate(inputs, n1, k, torch.nn.functional.silu, path) for path in PATHS]
    assert relative_error(outs[0], outs[1]) <= 1e-5


def route_cost(n1: int, n2: int) -> tuple[int, int, int]:
    """Multiply-adds, elements produced in all, and the largest tensor of routing 32 tokens."""
    inputs = draw(n1, n2, 2, 16, 1, tokens=32, dtype=torch.float32)
    with FlopCounterMode(display=False) as flops:
        cdmoe_route(inputs["queries"], inputs["keys"], n1, 4)
    with Produced() as produced:
        cdmoe_route(inputs["queries"], inputs["keys"], n1, 4)
    return flops.get_total_flops(), sum(produced.elements), max(produced.elements)


def test_routing_cost_grows_as_the_root_of_the_number_of_experts() -> None:
    """From 1,024 to 16,384 experts everything grows at most four times, and nothing holds a score for each expert."""
    small, large = route_cost(32, 32), route_cost(128, 128)
    assert small[0] > 0
    assert large[0] == 4 * small[0]
    assert large[1] <= 4.05 * small[1]
    assert large[2] < 32 * 2 * 128 * 128 / 16


def test_gather_cost_does_not_depend_on_the_number_of_experts() -> None:
    costs = []
    for n in (16, 128):
        inputs = draw(n, n, 2, 16, 24, tokens=32, dtype=torch.float32)
        weights, experts = cdmoe_route(inputs["queries"], inputs["keys"], n, 4)
        arguments = (inputs["c"], weights, experts, inputs["down_embed"], inputs["up_embed"], torch.nn.functional.silu)
        with FlopCounterMode(display=False) as flops:
            cdmoe(*arguments, path="gather")
        with Produced() as produced:
            cdmoe(*arguments, path="gather")
        costs.append((flops.get_total_flops(), sum(produced.elements)))
    assert costs[0] == costs[1]


def test_dense_path_scores_all_experts_at_once() -> None:
    """What the dense-masked path is: two matrix products over all N, whatever k is."""
    n, heads, e, d, tokens = 8, 2, 16, 24, 32
    for k in (1, 5):
        inputs = draw(n, n, heads, e, d, tokens=tokens, dtype=torch.float32)
        weights, experts = cdmoe_route(inputs["queries"], inputs["keys"], n, k)
        with FlopCounterMode(display=False) as flops:
            cdmoe(
                inputs["c"],
                weights,
                experts,
                inputs["down_embed"],
                inputs["up_embed"],
                torch.nn.functional.silu,
                path="dense",
            )
        assert flops.get_total_flops() == 2 * tokens * n * n * (e + d)


def test_auto_gathers_for_very_many_experts_and_few_tokens() -> None:
    """One token at a time over a quarter of a million experts must not touch them all."""
    n, e, d = 512, 4, 4
    inputs = draw(n, n, 1, e, d, tokens=1, dtype=torch.float32)
    weights, experts = cdmoe_route(inputs["queries"], inputs["keys"], n, 2)
    with Produced() as produced:
        cdmoe(inputs["c"], weights, experts, inputs["down_embed"], inputs["up_embed"], torch.nn.functional.silu)
    assert max(produced.elements) < n * n


def test_unknown_path_is_an_error() -> None:
    inputs = draw(2, 2, 1, 4, 3)
    weights, experts = cdmoe_route(inputs["queries"], inputs["keys"], 2, 1)
    with pytest.raises(ValueError, match="scattered"):
        cdmoe(inputs["c"], weights, experts, inputs["down_embed"], inputs["up_embed"], torch.tanh, path="scattered")


def test_the_sparse_path_says_what_it_needs() -> None:
    inputs = draw(2, 2, 1, 4, 3)  # in float64
    weights, experts = cdmoe_route(inputs["queries"], inputs["keys"], 2, 1)
    with pytest.raises(ValueError, match="needs Triton, a GPU, float32 or less"):
        cdmoe(inputs["c"], weights, experts, inputs["down_embed"], inputs["up_embed"], torch.tanh, path="sparse")


@pytest.mark.parametrize(
    ("num_experts", "tables"),
    [(256, (16, 16)), (512, (16, 32)), (768, (24, 32)), (1024, (32, 32)), (12, (3, 4)), (64, (8, 8)), (90, (9, 10))],
)
def test_key_tables_are_as_near_square_as_the_number_factors(num_experts: int, tables: tuple[int, int]) -> None:
    assert key_table_sizes(num_experts) == tables


def test_key_tables_multiply_to_the_number_of_experts() -> None:
    for a in range(2, 12):
        for b in range(a, 12):
            n1, n2 = key_table_sizes(a * b)
            assert n1 * n2 == a * b
            assert a <= n1 <= n2


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens(path: str) -> None:
    """An empty batch gives an empty result, not an error."""
    inputs = draw(3, 4, 2, 6, 5, tokens=0)
    assert operate(inputs, 3, 2, torch.nn.functional.silu, path).shape == (0, 5)


@pytest.mark.parametrize("path", PATHS)
def test_compiles_without_a_graph_break(path: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in draw(3, 4, 2, 6, 5).items()}

    def function(tensors: dict[str, Tensor]) -> Tensor:
        return operate(tensors, 3, 2, torch.nn.functional.silu, path)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(inputs)
    found = compiled(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected_grads = torch.autograd.grad(expected.sum(), list(inputs.values()))
    found_grads = torch.autograd.grad(found.sum(), list(inputs.values()))
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------- the order of the choice, and folding


def scores_of_tables(kind: str, *sizes: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(M, H, n1) and (M, H, n2): any scores, many that are equal, all equal, or sums that are equal by rounding."""
    m, heads, n1, n2 = sizes
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(m, heads, n, generator=generator, dtype=torch.float64) for n in (n1, n2))
    if kind == "rounded":
        first, second = (first * 2).round() / 2, (second * 2).round() / 2
    elif kind == "equal":
        first, second = torch.zeros_like(first), torch.ones_like(second)
    elif kind == "swallowed":  # of the second scores hardly a digit is left in a sum
        first, second = first.round() / torch.finfo(dtype).eps, second * 4
    return first.to(dtype), second.to(dtype)


def best_of_all_pairs(first: Tensor, second: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of one head sorted by sum, then the first score, i, the second score and j: experts and their sums."""
    n1, n2 = len(first), len(second)
    i, j = (grid.ravel() for grid in np.meshgrid(np.arange(n1), np.arange(n2), indexing="ij"))
    first_of_pair, second_of_pair = first.numpy()[i], second.numpy()[j]
    sums = first_of_pair + second_of_pair
    order = np.lexsort((j, -second_of_pair, i, -first_of_pair, -sums))[:k]  # the last key sorts first
    return (i * n2 + j)[order], sums[order]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["any", "rounded", "equal", "swallowed"])
@pytest.mark.parametrize(
    ("n1", "n2", "heads", "k"),
    [(4, 4, 1, 1), (3, 5, 2, 4), (2, 3, 1, 6), (2, 3, 3, 5), (1, 6, 2, 3), (1, 6, 1, 6), (4, 7, 2, 9), (16, 32, 1, 4)],
)
def test_the_order_of_the_choice(n1: int, n2: int, heads: int, k: int, kind: str, dtype: torch.dtype) -> None:
    """Of equal sums the better i comes first, then the better j; of equal scores the lower row is the better."""
    for seed in range(3):
        first, second = scores_of_tables(kind, 7, heads, n1, n2, seed=seed, dtype=dtype)
        weights, experts = product_topk(first, second, k)
        assert weights.dtype == dtype
        for m in range(7):
            for h in range(heads):
                expected, sums = best_of_all_pairs(first[m, h], second[m, h], k)
                assert experts[m, h].tolist() == expected.tolist()
                powers = np.exp(sums.astype(np.float64) - sums[0])
                tolerance = 1e-12 if dtype == torch.float64 else 1e-6
                np.testing.assert_allclose(weights[m, h].numpy(), powers / powers.sum(), rtol=tolerance, atol=tolerance)


def test_the_choice_of_short_types_is_that_of_their_values() -> None:
    """bfloat16 scores are added in float32, where few sums are equal that were not."""
    first, second = scores_of_tables("any", 40, 2, 5, 7, seed=1, dtype=torch.bfloat16)
    weights, experts = product_topk(first, second, 9)
    expected_weights, expected = product_topk(first.float(), second.float(), 9)
    assert weights.dtype == torch.float32
    assert torch.equal(experts, expected)
    assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize(("n1", "n2", "heads", "e"), [(3, 4, 2, 6), (1, 5, 1, 2), (16, 16, 1, 32), (4, 9, 3, 10)])
def test_folded_keys_give_the_scores_of_queries(n1: int, n2: int, heads: int, e: int) -> None:
    inputs = draw(n1, n2, heads, e, 1, tokens=11)
    c, keys = inputs["c"], inputs["keys"]
    weight = torch.randn(heads * e, e, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    folded = folded_keys(weight, keys, n1)
    assert folded.shape == (heads, n1 + n2, e)
    for h in range(heads):
        for row in range(n1 + n2):
            half = slice(h * e, h * e + e // 2) if row < n1 else slice(h * e + e // 2, (h + 1) * e)
            queries = c @ weight[half].T
            torch.testing.assert_close(c @ folded[h, row], queries @ keys[h, row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [(3, 4), (16, 16), (32, 32), (7, 40), (256, 256)], ids=str)
@pytest.mark.parametrize("e", [6, 32, 64])
def test_folding_pays_where_it_takes_fewer_operations(e: int, rows: tuple[int, int]) -> None:
    """Counted as they run, for 1 token to 1,000."""
    n1, n2 = rows
    heads = 2
    for tokens in (1, 5, 16, 33, 100, 1000):
        inputs = draw(n1, n2, heads, e, 1, tokens=tokens, dtype=torch.float32)
        c, weight = inputs["c"], torch.zeros(heads * e, e)
        with FlopCounterMode(display=False) as by_queries:
            cdmoe_route((c @ weight.T).unflatten(1, (heads, e)), inputs["keys"], n1, 1)
        with FlopCounterMode(display=False) as by_folding:
            _ = c @ folded_keys(weight, inputs["keys"], n1).flatten(0, 1).T
        fewer = by_folding.get_total_flops() < by_queries.get_total_flops()
        assert folding_pays(tokens, e, n1 + n2) == fewer, tokens
