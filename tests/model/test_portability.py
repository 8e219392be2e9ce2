"""A saved checkpoint carries its code: it loads where only torch and transformers are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from doge_lm import DogeForCausalLM

from .support import random_ids, tiny_model

# Refuses `doge_lm` however it might be found: the package may be installed in this very environment.
PRELUDE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"doge_lm", "tests"}:
            raise ModuleNotFoundError(f"{name} is refused here", name=name)
        return None

sys.meta_path.insert(0, Refuse())
try:
    import doge_lm
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("doge_lm could be imported")

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, inputs = sys.argv[1:3]
"""


def run_elsewhere(code: str, folder: Path, inputs: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in another directory, offline, without this package."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(elsewhere / "hf"),
        "HF_MODULES_CACHE": str(elsewhere / "modules"),
        "PYTHONPATH": "",
        "PYTHONIOENCODING": "utf-8",
    }
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder), str(inputs)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved model, and a file with ids and the logits they should get."""
    root = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(hidden_bias=True)
    model.save_pretrained(root / "model")
    ids = random_ids(2, 7)
    with torch.no_grad():
        out = model(ids, labels=ids)
        generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    save_file(
        {"ids": ids, "logits": out.logits.contiguous(), "loss": out.loss, "generated": generated},
        root / "inputs.safetensors",
    )
    return root / "model", root / "inputs.safetensors"


def test_checkpoint_carries_its_code(checkpoint: tuple[Path, Path]) -> None:
    folder, _ = checkpoint
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "doge_ifa"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_doge.DogeConfig",
        "AutoModel": "modeling_doge.DogeModel",
        "AutoModelForCausalLM": "modeling_doge.DogeForCausalLM",
    }
    modules = [
        "configuration_doge",
        "modeling_doge",
        "cdmoe",
        "cdmoe_triton",
        "routing_triton",
        "expert_hidden_triton",
        "inner_value_triton",
        "residual_norm_triton",
        "rotation_triton",
        "silu_product_triton",
    ]
    modules += [
        "kernels",
        "triton_operator",
        "document_attention",
        "linear_cross_entropy",
        "linear_cross_entropy_triton",
    ]
    for name in (f"{module}.py" for module in modules):
        text = (folder / name).read_text(encoding="utf-8")
        assert "doge_lm" not in [
            line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))
        ]


def test_loads_and_runs_without_this_package(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    """Config, base model and language model; equal logits, loss and text; and it can be saved and loaded once more."""
    code = """
expected = load_file(inputs)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    out = model(expected["ids"], labels=expected["ids"])
    generated = model.generate(expected["ids"][:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
assert torch.equal(out.logits, expected["logits"]), (out.logits - expected["logits"]).abs().max()
assert torch.equal(out.loss, expected["loss"])
assert torch.equal(generated, expected["generated"])
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "doge_ifa"
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "DogeModel"
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(expected["ids"]).logits, expected["logits"])
assert "doge_lm" not in sys.modules
print("all equal")
"""
    result = run_elsewhere(code, *checkpoint, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "all equal" in result.stdout


def test_plain_loading_without_this_package_fails_aloud(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    """Untrusted, there is an error that says so: never a model of another architecture with random weights."""
    code = """
for loader in (AutoModelForCausalLM, AutoModel, AutoConfig):
    try:
        loaded = loader.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "doge_ifa" in str(error), error
    else:
        raise SystemExit(f"{loader.__name__} silently gave {type(loaded)}")
print("all refused")
"""
    result = run_elsewhere(code, *checkpoint, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "all refused" in result.stdout


def test_auto_classes_load_it_with_this_package(checkpoint: tuple[Path, Path]) -> None:
    """Registered, it needs no trust; the weights are those saved."""
    folder, inputs = checkpoint
    expected = load_file(inputs)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is DogeForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=0)
