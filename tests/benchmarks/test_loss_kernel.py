"""`benchmarks/loss_kernel.py`: its reference, and what it counts without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from doge_lm.errors import UserError

triton = pytest.importorskip("triton", reason="there is no Triton for this machine")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "loss_kernel.py"
sys.path.insert(0, str(ROOT / "benchmarks"))

import loss_kernel  # noqa: E402


def test_a_cap_costs_few_instructions(tmp_path: Path) -> None:
    """Of the special functions, those of a tanh in each of the two passes. Kernels must not be interpreted for it."""
    path = tmp_path / "counts.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    sizes = ("--one_pass", "4096", "--vocab_size", "8192")
    command = [sys.executable, str(SCRIPT), "--instructions", *sizes, "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["triton"] == triton.__version__
    plain, capped = record["rows"]
    assert (plain["cap"], capped["cap"]) == (0, 15)
    assert 2 <= plain["special functions"] < 2.5
    assert 6 <= capped["special functions"] < 6.5
    assert 10 < plain["instructions"] < capped["instructions"] < 2 * plain["instructions"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--caps", "0", "nan"), "--caps nan: give 0 for none, or a number from 0.001 to below 1e+06"),
        (("--caps", "-1"), "--caps -1: give 0"),
        (("--one_pass", "3000"), "--one_pass 3000: give a power of two from 128 to 1,048,576"),
        (("--one_pass", "64"), "--one_pass 64: give"),
        (("--vocab_size", "1"), "--vocab_size 1: give at least 128"),
        (("--json", "nowhere/out.json"), "there is no folder nowhere"),
        (("--instructions",), "unset TRITON_INTERPRET"),
    ],
)
def test_what_does_not_fit_is_refused(flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["loss_kernel.py", *flags])
    with pytest.raises(UserError, match=re.escape(message)):
        loss_kernel.main()


def test_times_ask_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["loss_kernel.py"])
    with pytest.raises(UserError, match="times need an NVIDIA GPU; without one, --instructions"):
        loss_kernel.main()


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_reference_is_the_derivative(cap: float) -> None:
    logits, targets = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 3, 4])
    losses, grad = loss_kernel.reference(logits, targets, cap)
    step = 1e-6
    moved = logits.clone()
    moved[1, 3] += step
    found = (loss_kernel.reference(moved, targets, cap)[0] - losses)[1] / step
    torch.testing.assert_close(found, grad[1, 3], rtol=1e-4, atol=1e-6)
    assert (loss_kernel.reference(moved, targets, cap)[0] - losses)[[0, 2]].abs().max() == 0


def test_instructions_are_read_off_a_listing() -> None:
    listing = (
        "        /*0000*/           MUFU.EX2 R1, R2 ;",
        ".L_x_0:",
        "        /*0010*/      @!P0 FMUL R1, R1, R1 ;",
    )
    assert loss_kernel.INSTRUCTION.findall("\n".join(listing)) == ["MUFU", "FMUL"]
