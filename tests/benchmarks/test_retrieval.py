"""The benchmark of expert retrieval runs small on a CPU, and its ways compute what they claim to."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.benchmarks.conftest import Command

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import retrieval  # noqa: E402

SMALL = ["--experts", "16", "64", "--tokens", "40", "--size", "8", "--k", "2", "--device", "cpu"]
QUICK = ["--moe_experts", "3", "4", "--loop_experts", "16", "--warm_up", "1", "--repetitions", "1", "--rounds", "2"]


def parse(monkeypatch: pytest.MonkeyPatch, *flags: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *SMALL, *QUICK, *flags])
    return retrieval.parse_arguments()


def test_a_small_run_has_a_record_for_each_way(command: Command, tmp_path: Path) -> None:
    printed = command(retrieval, *SMALL, *QUICK, "--json", str(tmp_path / "a.json"))
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found["device"] == "CPU"
    assert found["torch"] == torch.__version__
    assert found["settings"]["moe_experts"] == [3, 4]
    assert [check["experts"] for check in found["checks"]] == [16, 64]
    assert all(check["float64_same_choice"] and check["measured_type_highest_sums"] for check in found["checks"])
    ways = [
        *(("retrieval", way) for way in ("product keys", "folded", "no queries", "ordinary")),
        *(("layer", way) for way in ("product keys", "no queries", "ordinary", "model")),
        *(("mixture", way) for way in ("E=3", "E=4 loop", "E=4 grouped", "E=N loop", "E=N grouped")),
    ]
    records = found["records"]
    assert [(r["experts"], r["group"], r["way"]) for r in records] == [(n, *way) for n in (16, 64) for way in ways]
    reasons = {(r["experts"], r["way"]): r.pop("error") for r in records if "error" in r}
    assert reasons == {
        (16, "E=3"): "16 is no multiple of 3",
        (64, "E=3"): "64 is no multiple of 3",
        **{(n, f"E={e} grouped"): "needs a GPU and bfloat16" for n in (16, 64) for e in ("4", "N")},
        (64, "E=N loop"): "more than 16 experts, each some kernels (--loop_experts)",
    }
    measured = [r for r in records if (r["experts"], r["way"]) not in reasons]
    bases = {(r["experts"], r["group"]): r for r in measured if r["way"] == "product keys"}
    for record in measured:
        base = bases[record["experts"], record["group"].replace("mixture", "layer")]
        assert record["forward_ms"] > 0
        assert record["both_ratio"] == pytest.approx(record["both_ms"] / base["both_ms"])
        assert record["forward_ratio"] == pytest.approx(record["forward_ms"] / base["forward_ms"])
    for record in (r for r in records if r["group"] == "mixture" and r["way"] != "E=3"):
        assert record["moe_experts"] * record["width"] == record["experts"]
    assert printed.count("| product keys |") == 4
    assert "16 is no multiple of 3" in printed


@pytest.mark.parametrize(("experts", "heads", "k"), [(7, 1, 3), (24, 2, 4), (256, 1, 8), (512, 2, 5)])
def test_product_keys_find_what_an_ordinary_router_finds(experts: int, heads: int, k: int) -> None:
    check = retrieval.check_float64(experts, heads, k, 16)
    assert check["float64_same_choice"]
    assert check["float64_weights_difference"] < 1e-12


def test_ordinary_matrix_is_the_sum_of_two_rows() -> None:
    keys = torch.randn(2 + 3, 4, dtype=torch.float64)
    matrix = retrieval.ordinary_matrix(keys, 2)
    for i in range(2):
        for j in range(3):
            assert torch.equal(matrix[i * 3 + j], keys[i] + keys[2 + j])


def test_a_wrong_choice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch)
    assert retrieval.check_device(args, 64)
    product_topk = retrieval.product_topk

    def second_best(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
        _, experts = product_topk(first, second, k + 1)
        return product_topk(first, second, k)[0], experts[..., 1:]

    monkeypatch.setattr(retrieval, "product_topk", second_best)
    assert not retrieval.check_device(args, 64)
    assert not retrieval.check_float64(64, 1, 2, 8)["float64_same_choice"]


def mixture_case(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Leaves, of 5 experts of width 8 over 12 tokens, choices that leave one expert out, and a direction."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 16), (12, 2), (5, 8, 16), (5, 8, 16))
    leaves = tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes)
    experts = torch.rand(12, 4, generator=generator).topk(2).indices
    experts += (experts >= 2).long()  # none is expert 2
    direction = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    leaves = tuple(leaf.to(dtype).detach().requires_grad_() for leaf in leaves)
    return leaves, experts, direction.to(dtype)


def token_by_token(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for m, choice in enumerate(experts.tolist()):
        row = torch.zeros_like(x[m])
        for place, e in enumerate(choice):
            inner = up[e] @ x[m]
            row = row + weights[m, place] * (down[e].T @ (inner / (1 + torch.exp(-inner))))
        rows.append(row)
    return torch.stack(rows)


# `torch._grouped_mm` takes no float64.
@pytest.mark.parametrize(("way", "dtype"), [("loop", torch.float64), ("grouped", torch.float32)])
def test_mixtures_are_the_sum_over_chosen_experts(way: str, dtype: torch.dtype) -> None:
    (x, weights, up, down), experts, direction = mixture_case(torch.float64)
    expected = token_by_token(x, weights, experts, up, down)
    gradients = torch.autograd.grad(expected, (x, weights, up, down), direction)
    assert not gradients[2][2].any()
    leaves, experts, direction = mixture_case(dtype)
    found = retrieval.MIXTURES[way](*leaves[:2], experts, *leaves[2:])
    torch.testing.assert_close(found, expected.to(dtype))
    for one, other in zip(torch.autograd.grad(found, leaves, direction), gradients, strict=True):
        torch.testing.assert_close(one, other.to(dtype))


def test_ways_that_are_one_model_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, "--heads", "2")
    drawn = retrieval.Drawn(args, 24)
    ways = {(way.group, way.name): way for way in retrieval.ways_of(args, 24, drawn)}
    for one, other in (
        (("retrieval", "product keys"), ("retrieval", "folded")),
        (("layer", "product keys"), ("layer", "model")),
    ):
        first, second = (ways[name].call(*ways[name].leaves) for name in (one, other))
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    model = ways["layer", "model"]
    gradients = torch.autograd.grad(model.call(*model.leaves).square().sum(), model.leaves)
    assert all(gradient.any() for gradient in gradients)


def test_a_mixture_of_width_1_is_its_tiny_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, "--moe_k", "3")
    drawn = retrieval.Drawn(args, 16)
    way = next(way for way in retrieval.ways_of(args, 16, drawn) if way.name == "E=N loop")
    x, router, down, up = way.leaves
    weights, experts = retrieval.route_ordinarily(x, 3, router)
    assert torch.equal(experts.squeeze(1), (x @ router.T).topk(3).indices)
    inner = torch.einsum("md,mkd->mk", x, down[experts.squeeze(1)])
    expected = torch.einsum("mk,mkd->md", weights.squeeze(1) * torch.nn.functional.silu(inner), up[experts.squeeze(1)])
    torch.testing.assert_close(way.call(*way.leaves), expected)


def test_what_does_not_fit_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, "--most_bytes", str(40 * 16 * 4), "--moe_experts", "4", "1")
    ways = list(retrieval.ways_of(args, 64, retrieval.Drawn(args, 64)))
    reasons = {(way.group, way.name): way.reason for way in ways if way.reason}
    assert "--most_bytes" in reasons["retrieval", "ordinary"]
    assert "--most_bytes" in reasons["layer", "ordinary"]
    assert reasons["mixture", "E=1"] == "a token takes 2 (--moe_k)"

    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("CUDA out of memory.\nMore of it")

    monkeypatch.setattr(retrieval, "cdmoe_route", fails)
    records = {
        (r["group"], r["way"]): r for r in retrieval.measure(args, 64, retrieval.Clock(torch.device("cpu"), 1, 1))
    }
    assert records["retrieval", "product keys"]["error"] == "CUDA out of memory."
    assert math.isfinite(records["retrieval", "no queries"]["both_ms"])
    assert "both_ratio" not in records["retrieval", "no queries"]
    retrieval.table(list(records.values()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "7"], "--size 7: it must be even"),
        (["--k", "17"], "no token can choose 17 different experts of 16"),
        (["--tokens", "0"], "argument --tokens: '0' is no whole number of at least 1"),
        (["--experts", "many"], "argument --experts: 'many' is no whole number"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--json", "no/such/folder/a.json"], "there is no folder"),
    ],
)
def test_bad_flags(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(monkeypatch, *flags)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
