"""`doge-lm export`: what is written is the model, in another form, or nothing is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from doge_lm import DogeForCausalLM
from doge_lm.cli import main
from doge_lm.data.tokenizer import load_tokenizer
from doge_lm.inference import export as export_module
from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.inference.loading import load_model
from tests.conftest import REPOSITORY, needs_all
from tests.model.support import draw_large_weights, random_ids, relative_error
from tests.small_model import make_model

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
LINEAR = ("_proj.weight", "queries.weight", "lm_head.weight")


def make_loud_model(place: Path, **changes: Any) -> Path:
    """A small model whose every part shows in its logits, with the published tokenizer."""
    model = DogeForCausalLM.from_pretrained(make_model(place, **changes))
    draw_large_weights(model, seed=3)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_loud_model(tmp_path_factory.mktemp("export") / "model")


def make_onnx(model_dir: Path, place: Path) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", str(model_dir), "--output_dir", str(place), "--format", "onnx"]) == 0
    return place


@pytest.fixture(scope="module")
def onnx_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_onnx(model_dir, tmp_path_factory.mktemp("export") / "onnx")


def logits_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def some_ids(batch: int = 2, length: int = 17, seed: int = 0) -> Tensor:
    return random_ids(batch, length, vocab_size=32768, seed=seed)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a run that is refused, and that leaves nothing behind."""
    place = Path(str(arguments[arguments.index("--output_dir") + 1]))
    before = sorted(place.parent.rglob("*"))
    assert main(["export", *map(str, arguments)]) == 1
    after = [path for path in sorted(place.parent.rglob("*")) if not path.name.endswith(".lock")]
    assert after == before
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# For transformers
# ---------------------------------------------------------------------------------------------------------------


def test_an_export_runs_in_plain_transformers(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a checkpoint's directory, with files that do not belong to a model, in another type."""
    place = tmp_path / "exported"
    assert main(["export", str(model_dir), "--output_dir", str(place), "--dtype", "bfloat16"]) == 0
    assert "the likeliest token is the same for" in capsys.readouterr().out
    assert {tensor.dtype for tensor in load_file(place / "model.safetensors").values()} == {torch.bfloat16}
    ids = some_ids()
    expected = logits_of(DogeForCausalLM.from_pretrained(model_dir).bfloat16().eval(), ids)
    code = (
        "import sys, json; sys.modules['doge_lm'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): logits = model(torch.tensor(json.loads(sys.argv[2]))).logits\n"
        "torch.save((logits, tokenizer('[INST] a').input_ids), sys.argv[3])"
    )
    arguments = [str(place), json.dumps(ids.tolist()), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=tmp_path)
    logits, spelled = torch.load(tmp_path / "logits.pt")
    assert torch.equal(logits, expected)
    assert spelled == load_tokenizer(model_dir)("[INST] a").input_ids
    record = json.loads((place / "export.json").read_text(encoding="utf-8"))
    assert (record["dtype"], record["quantize"], record["format"]) == ("bfloat16", None, "transformers")
    assert 0 < record["change"]["relative_error"] < 0.1


def make_adapter(model_dir: Path, place: Path, base: str) -> Any:
    """An adapter on linear maps and tables; the model that wears it."""
    targets = ["q_proj", "o_proj", "v_queries", "shared_up_proj", "queries", "down_embed", "up_embed", "lm_head"]
    model = DogeForCausalLM.from_pretrained(model_dir).eval()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(place)
    return wrapped.eval()


@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_is_merged(model_dir: Path, tmp_path: Path, named: bool) -> None:
    place, adapter = tmp_path / "merged", tmp_path / "adapter"
    wrapped = make_adapter(model_dir, adapter, str(model_dir) if named else "gone/elsewhere")
    options = [] if named else ["--base_model", str(model_dir)]
    assert main(["export", str(adapter), "--output_dir", str(place), *options]) == 0
    ids = some_ids()
    model = load_model(place, CPU)
    assert type(model) is DogeForCausalLM
    found, expected = logits_of(model, ids), logits_of(wrapped, ids)
    assert relative_error(expected, logits_of(load_model(model_dir, CPU), ids)) > 0.01, "the adapter must show"
    assert relative_error(found, expected) < 1e-5
    load_tokenizer(place)


def test_adapters_that_do_not_fit_are_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, place = tmp_path / "adapter", tmp_path / "merged"
    make_adapter(model_dir, adapter, "gone/elsewhere")
    assert "names 'gone/elsewhere' as its model, which is not there" in refused(capsys, adapter, "--output_dir", place)
    other = tmp_path / "other"
    config = DogeForCausalLM.from_pretrained(model_dir).config
    config.hidden_size = 64
    DogeForCausalLM(config).save_pretrained(other)
    load_tokenizer(model_dir).save_pretrained(other)
    message = refused(capsys, adapter, "--output_dir", place, "--base_model", other)
    assert "does not fit its model" in message
    assert "an adapter itself" in refused(capsys, adapter, "--output_dir", place, "--base_model", adapter)
    assert "--base_model is for an adapter" in refused(capsys, model_dir, "--output_dir", place, "--base_model", other)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "q_proj.lora_A" in name))
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, adapter, "--output_dir", place, "--base_model", model_dir)
    assert "missing adapter keys" in message
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "give it with --base_model" in refused(capsys, adapter, "--output_dir", place)


# ---------------------------------------------------------------------------------------------------------------
# Few bits
# ---------------------------------------------------------------------------------------------------------------


def rounding_bound(kind: str, weight: Tensor) -> Tensor:
    """How far a weight may lie from what is kept of it."""
    if kind == "int8":  # symmetric, a scale for each row: half of its step, and the far end of the asymmetric range
        return weight.abs().amax(dim=1, keepdim=True).expand_as(weight) / 127.5 * 1.01
    # NF4: half of the widest gap of its levels, -1 to -0.696, times the largest of a block of 64
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    bound = (blocks.abs().amax(dim=1, keepdim=True) * (1 - 0.6961) / 2 * 1.01).expand_as(blocks)
    return bound.flatten()[: weight.numel()].view_as(weight)


def unpacked(module: torch.nn.Module) -> Tensor:
    """The matrix that a quantized linear map stands for, column by column from what it computes."""
    with torch.no_grad():
        return module(torch.eye(module.in_features)).t()  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_few_bits(model_dir: Path, tmp_path: Path, kind: str, package: str) -> None:
    pytest.importorskip(package)
    place = tmp_path / kind
    assert main(["export", str(model_dir), "--output_dir", str(place), "--quantize", kind]) == 0
    model, original = load_model(place, CPU), load_model(model_dir, CPU)
    kept, changed = dict(original.named_parameters()), 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = kept[f"{name}.weight"].detach()
            assert ((unpacked(module) - weight).abs() <= rounding_bound(kind, weight)).all(), name
            assert not torch.equal(unpacked(module), weight), name
            changed += 1
    assert changed == 2 * 7 + 1
    for name, tensor in model.named_parameters():
        if not name.endswith(LINEAR):
            assert torch.equal(tensor, kept[name]), name
    linear = sum(each.numel() for name, each in kept.items() if name.endswith(LINEAR))
    spared = (model_dir / "model.safetensors").stat().st_size - (place / "model.safetensors").stat().st_size
    assert spared > linear * (4 - (1.2 if kind == "int8" else 0.7))
    ids = some_ids()
    assert 1e-4 < relative_error(logits_of(model, ids), logits_of(original, ids)) < 0.5
    prompts, new = [[1, 5, 6, 7], [1, 9]], 6
    rows = Decoder(model).generate(prompts, Sampling(max_new_tokens=new, repetition_penalty=1.1))
    assert [len(row) for row in rows] == [new, new]
    for prompt, row in zip(prompts, rows, strict=True):
        greedy = Decoder(model).generate([prompt], Sampling(max_new_tokens=new))[0]
        following = logits_of(model, torch.tensor([prompt + greedy])).argmax(dim=-1)[0]
        assert following[len(prompt) - 1 : -1].tolist() == greedy
        assert len(row) == new


def test_a_quantized_model_stays_as_it_is(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    place = tmp_path / "int4"
    assert main(["export", str(model_dir), "--output_dir", str(place), "--quantize", "int4"]) == 0
    capsys.readouterr()
    assert "quantized already" in refused(capsys, place, "--output_dir", tmp_path / "again")
    assert main(["generate", str(place), "a", "--dtype", "bfloat16"]) == 1
    assert "leave --dtype bfloat16 out" in capsys.readouterr().err
    assert main(["generate", str(place), "a", "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_a_head_that_is_the_embedding_too_keeps_its_type(
    model_dir: Path, tmp_path: Path, kind: str, package: str
) -> None:
    pytest.importorskip(package)
    tied, place = tmp_path / "tied", tmp_path / kind
    config = DogeForCausalLM.from_pretrained(model_dir).config
    config.tie_word_embeddings = True
    DogeForCausalLM(config).save_pretrained(tied)
    load_tokenizer(model_dir).save_pretrained(tied)
    assert main(["export", str(tied), "--output_dir", str(place), "--quantize", kind]) == 0
    model = load_model(place, CPU)
    assert model.lm_head.weight is model.model.word_embed.weight
    assert torch.equal(model.lm_head.weight, load_model(tied, CPU).lm_head.weight)


# ---------------------------------------------------------------------------------------------------------------
# ONNX
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_a_model_for_the_kernels_of_a_gpu_is_quantized_without_one(
    model_dir: Path, tmp_path: Path, kind: str, package: str
) -> None:
    """Its configuration keeps them; the weights are those of the same model without them."""
    pytest.importorskip(package)
    model = DogeForCausalLM.from_pretrained(model_dir)
    model.config.cdmoe_path = "sparse"
    model.save_pretrained(tmp_path / "sparse")
    load_tokenizer(model_dir).save_pretrained(tmp_path / "sparse")
    for source, name in ((model_dir, "plain"), (tmp_path / "sparse", "for-kernels")):
        place = tmp_path / name
        assert main(["export", str(source), "--output_dir", str(place), "--quantize", kind]) == 0
    assert json.loads((tmp_path / "for-kernels" / "config.json").read_text(encoding="utf-8"))["cdmoe_path"] == "sparse"
    logits = [logits_of(load_model(tmp_path / name, CPU), some_ids()) for name in ("plain", "for-kernels")]
    assert torch.equal(*logits)


def test_onnx_computes_the_same_with_a_cache_and_padding(model_dir: Path, onnx_dir: Path) -> None:
    """Prompts of several sizes, steps of one token and of several, rows with padding: one file for all."""
    assert_onnx_computes_the_same(model_dir, onnx_dir)


@pytest.mark.parametrize(
    "shifts",
    [
        pytest.param(["key_shift"], marks=needs_all),
        pytest.param(["key_shift", "feed_forward_shift"], marks=needs_all),
        pytest.param(["attention_shift", "dense_skips", "value_residual"], marks=needs_all),
        ["key_shift", "attention_shift", "feed_forward_shift", "dense_skips", "value_residual"],
    ],
    ids="+".join,
)
def test_onnx_keeps_the_newest_inputs_of_shifts(shifts: list[str], tmp_path: Path) -> None:
    others: dict[str, Any] = {"qk_norm": True}
    if "feed_forward_shift" in shifts:
        others |= {"num_cdmmoe_experts": 0, "private_expert_intermediate_size": 32, "embedding_multiplier": 4.0}
        others |= {"final_logit_softcapping": 2.0}
    model_dir = make_loud_model(tmp_path / "model", **others, **dict.fromkeys(shifts, True))
    assert_onnx_computes_the_same(model_dir, make_onnx(model_dir, tmp_path / "onnx"))


def assert_onnx_computes_the_same(model_dir: Path, onnx_dir: Path) -> None:
    import numpy as np  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(onnx_dir / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    model = load_model(model_dir, CPU)
    for lengths, ends in (([40], (1, 2, 40)), ([9, 5, 7], (6, 7, 8, 9)), ([70, 1], (70,)), ([3, 2], (3, 3 + 0))):
        longest = max(lengths)
        ids = some_ids(len(lengths), longest, seed=longest)
        mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
        expected = logits_of(model, ids, mask)
        heads = model.config.num_attention_heads
        shape, newest = (len(lengths), heads, 0, 32 // heads), (len(lengths), 32, 1)
        past = {
            name: np.full(newest if name.endswith("_before") else shape, 7, np.float32) for name in names[2:]
        }  # the first tokens see nothing of it
        start = 0
        for end in dict.fromkeys(ends):
            inputs = {"input_ids": ids[:, start:end].numpy(), "attention_mask": mask[:, :end].numpy()}
            logits, *present = session.run(None, {**inputs, **past})
            past = dict(zip(past, present, strict=True))
            seen = mask[:, start:end].bool()
            assert relative_error(torch.from_numpy(logits)[seen], expected[:, start:end][seen]) < 1e-5
            assert np.isfinite(logits).all()
            start = end


def test_the_loop_in_the_guide_writes_what_the_model_writes(model_dir: Path, onnx_dir: Path, tmp_path: Path) -> None:
    """Without torch and transformers."""
    text = (REPOSITORY / "docs/export.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "onnxruntime" in block)
    (tmp_path / "onnx").symlink_to(onnx_dir)
    bare = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'doge_lm']))\n"
    done = subprocess.run(
        [sys.executable, "-c", bare + code], cwd=tmp_path, capture_output=True, encoding="utf-8", check=True
    )
    tokenizer, model = load_tokenizer(model_dir), load_model(model_dir, CPU)
    prompt = tokenizer("Once upon a time").input_ids
    row = Decoder(model).generate([prompt], Sampling(max_new_tokens=20), eos_token_id=tokenizer.eos_token_id)[0]
    ids = [index for index in prompt + row if index != tokenizer.eos_token_id]
    assert done.stdout == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_what_a_graph_cannot_hold_is_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, onnx = tmp_path / "out", ("--format", "onnx")
    assert "leave it out" in refused(capsys, model_dir, "--output_dir", place, *onnx, "--quantize", "int8")
    message = refused(capsys, model_dir, "--output_dir", place, *onnx, "--dtype", "bfloat16")
    assert "leave --dtype bfloat16 out" in message
    pytest.importorskip("onnxscript")
    scaled = tmp_path / "scaled"
    config = DogeForCausalLM.from_pretrained(model_dir).config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    DogeForCausalLM(config).save_pretrained(scaled)
    load_tokenizer(model_dir).save_pretrained(scaled)
    assert "positions of the type 'dynamic'" in refused(capsys, scaled, "--output_dir", place, *onnx)


# ---------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------


def test_only_an_export_is_overwritten(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, foreign = tmp_path / "exported", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "is not empty" in refused(capsys, model_dir, "--output_dir", foreign)
    assert "not made by doge-lm" in refused(capsys, model_dir, "--output_dir", foreign, "--overwrite")
    assert "is what is to be exported" in refused(capsys, model_dir, "--output_dir", model_dir, "--overwrite")
    assert main(["export", str(model_dir), "--output_dir", str(place)]) == 0
    capsys.readouterr()
    assert "is not empty" in refused(capsys, model_dir, "--output_dir", place)
    options = ("--overwrite", "--dtype", "bfloat16")
    assert main(["export", str(model_dir), "--output_dir", str(place), *options]) == 0
    assert load_model(place, CPU).dtype == torch.bfloat16


def test_a_model_that_loads_differently_is_not_published(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_changed(path: Path, *args: Any) -> Any:
        model = load_model(path, *args)
        if path != model_dir:
            with torch.no_grad():
                model.lm_head.weight[7] *= 1.001
        return model

    monkeypatch.setattr(export_module, "load_model", load_changed)
    assert "does not load as the same model" in refused(capsys, model_dir, "--output_dir", tmp_path / "exported")


def test_too_little_space_is_said_first(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = export_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda place: usage)
    assert "free some space" in refused(capsys, model_dir, "--output_dir", tmp_path / "deep" / "exported")


def test_other_models_and_none_are_refused(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = tmp_path / "llama"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(llama)
    assert "doge-lm export takes Doge models" in refused(capsys, llama, "--output_dir", tmp_path / "out")
    assert "holds no model" in refused(capsys, tmp_path / "nothing", "--output_dir", tmp_path / "out")
    bare = tmp_path / "bare"
    DogeForCausalLM.from_pretrained(model_dir).save_pretrained(bare)
    assert "tokenizer" in refused(capsys, bare, "--output_dir", tmp_path / "out")
