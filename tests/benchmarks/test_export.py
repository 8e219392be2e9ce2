"""`benchmarks/export.py`: a row for each form, with size, loss and speed of the same run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_model import make_model

ROOT = Path(__file__).parents[2]


def test_a_small_run_has_all_figures(tmp_path: Path) -> None:
    for package in ("torchao", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    model, texts, target = make_model(tmp_path / "model"), tmp_path / "texts.jsonl", tmp_path / "out.json"
    lines = [json.dumps({"text": f"{number} green bottles hanging on the wall. " * number}) for number in (1, 2, 3)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    rows = ["float32", "int8", "onnx"]
    sizes = ["--window", "16", "--prompt_tokens", "4", "--new_tokens", "3", "--repetitions", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "export.py"), str(model), "--texts", f"en={texts}", *sizes]
    done = subprocess.run(
        [*command, "--rows", *rows, "--json", str(target)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(target.read_text(encoding="utf-8"))["records"]
    assert list(records) == rows
    assert all(f"| {name} |" in done.stdout for name in rows)
    assert all(record["tokens_per_second"] > 0 for record in records.values())
    assert records["int8"]["bytes"] < 0.7 * records["float32"]["bytes"]
    original = records["float32"]["bits_per_byte"]["en"]
    assert records["onnx"]["bits_per_byte"]["en"] == pytest.approx(original, rel=1e-5)
    assert records["int8"]["bits_per_byte"]["en"] == pytest.approx(original, rel=0.01)
    difference, _ = records["int8"]["difference"]["en"]
    assert difference == pytest.approx(records["int8"]["bits_per_byte"]["en"] - original, abs=1e-9)
