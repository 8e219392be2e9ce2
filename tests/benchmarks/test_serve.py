"""`benchmarks/serve.py`: a small run compares every answer, counts tokens, and ends the server."""

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Command
from tests.conftest import REPOSITORY
from tests.small_model import make_model

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import serve


@pytest.mark.slow
def test_a_small_run_has_all_figures(command: Command, tmp_path: Path) -> None:
    place, target = make_model(tmp_path / "small"), tmp_path / "out.json"
    sizes = ["--clients", "4", "--seconds", "1", "--requests", "8", "--max_tokens", "12", "--fuzz", "20"]
    command(serve, str(place), *sizes, "--json", str(target), "--flags", "--max_slots", "4")
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["answers"] >= 4
    assert found["tokens"] >= 2 * found["answers"]
    assert (found["different"], found["errors"], found["exit_status"]) == (0, [], 0)
    assert found["greedy_like_decoder"] == [6, 6]
    assert found["memory"]
    assert sum(found["fuzz"]["statuses"].values()) == 20
    assert all(status.startswith("4") for status in found["fuzz"]["statuses"])
    assert found["fuzz"]["health_after"] == 200
