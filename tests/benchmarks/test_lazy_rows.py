"""`benchmarks/lazy_rows.py` measures every optimizer for every share."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lazy_rows.py"


def test_a_record_for_each_share() -> None:
    flags = ["--rows", "50", "--size", "6", "--shares", "0.1", "1", "--repetitions", "2"]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["share"] for record in records] == [0.1, 1.0]
    assert all(record[name] > 0 for record in records for name in ("fused", "default", "lazy"))
