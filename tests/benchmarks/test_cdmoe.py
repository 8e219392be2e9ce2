"""The benchmark of the layer runs, on a CPU and small, and its ways compute the same."""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from tests.benchmarks.conftest import Command

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cdmoe as benchmark  # noqa: E402


def test_a_small_run_has_a_record_for_each_way(command: Command, tmp_path: Path) -> None:
    sizes = ["--experts", "16", "36", "--tokens", "40", "--size", "8", "--k", "2", "--repetitions", "2"]
    where = ["--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png"), "--device", "cpu"]
    paths = ["gather", "embedding_bag", "dense"]
    printed = command(benchmark, *sizes, *where, "--dtype", "float32", "--paths", *paths)
    records = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["records"]
    expected = [(n, way) for n in (16, 36) for way in ("route", *paths, *paths)]
    assert [(record["experts"], record["path"]) for record in records] == expected
    assert all(record["both_ms"] > 0 for record in records)
    assert printed.count("| gather |") == 4
    assert "| 1.00 |" in printed
    assert (tmp_path / "a.png").stat().st_size > 0


def test_all_ways_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    c, down, up = (torch.randn(n, 8, generator=generator) for n in (20, 12, 12))
    weights = torch.rand(20, 2, 3, generator=generator)
    experts = torch.randint(0, 12, (20, 2, 3), generator=generator)
    expected = benchmark.layer_of("gather")(c, weights, experts, down, up)
    for path in ("embedding_bag", "dense"):
        torch.testing.assert_close(benchmark.layer_of(path)(c, weights, experts, down, up), expected)
    inner = torch.einsum("me,mhke->mhk", c, down[experts])
    plain = torch.einsum("mhk,mhkd->md", F.silu(weights * inner), up[experts])
    torch.testing.assert_close(expected, plain)
