"""`benchmarks/lazy_rows.py` measures every optimizer for every share."""

import json
import sys
from pathlib import Path

from tests.benchmarks.conftest import Command

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import lazy_rows


def test_a_record_for_each_share(command: Command) -> None:
    printed = command(lazy_rows, "--rows", "50", "--size", "6", "--shares", "0.1", "1", "--repetitions", "2")
    records = [json.loads(line) for line in printed.splitlines()]
    assert [record["share"] for record in records] == [0.1, 1.0]
    assert all(record[name] > 0 for record in records for name in ("fused", "default", "lazy"))
