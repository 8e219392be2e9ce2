"""`doge-lm generate`: streaming, sampling flags, devices and errors."""

import io
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from doge_lm import DogeConfig, DogeForCausalLM
from doge_lm.cli import main
from doge_lm.data.tokenizer import encode_text, load_tokenizer
from doge_lm.inference import generate as generate_module
from tests.small_model import make_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model with the published tokenizer."""
    return make_model(tmp_path_factory.mktemp("generate") / "model", positions=64)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["generate", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_greedy_equals_the_model_step_by_step(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "  def f(x):\n    return"
    options = ("--max_new_tokens", "6", "--temperature", "0", "--repetition_penalty", "1.0", "--device", "cpu")
    status, out, _ = run(capsys, str(model_dir), prompt, *options)
    assert status == 0

    tokenizer = load_tokenizer(model_dir)
    model = DogeForCausalLM.from_pretrained(model_dir).eval()
    ids = [1, *encode_text(tokenizer, prompt)]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert out.startswith(prompt)


def test_streamed_and_whole_text_are_the_same(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (str(model_dir), "你好", "--max_new_tokens", "8", "--seed", "3")
    _, streamed, _ = run(capsys, *options)
    _, whole, _ = run(capsys, *options, "--no_stream")
    assert streamed == whole
    assert streamed.startswith("你好")


def test_several_texts_are_continued_as_each_alone(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max_new_tokens", "7", "--temperature", "0", "--device", "cpu")
    texts = ("Once upon", "床前明月光", "x")
    status, together, _ = run(capsys, str(model_dir), *texts, *options)
    assert status == 0
    assert together == "".join(run(capsys, str(model_dir), text, *options)[1] for text in texts)


@pytest.fixture
def llama_dir(model_dir: Path, tmp_path: Path) -> Path:
    """A small Llama with the same tokenizer."""
    copied(model_dir, tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.vocab_size = DogeConfig().vocab_size
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_of_transformers_is_continued_too(llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max_new_tokens", "5", "--seed", "1")
    status, out, err = run(capsys, str(llama_dir), "Once", "Twice", *options)
    assert status == 0, err
    assert out.startswith("Once")
    assert "\nTwice" in out
    assert run(capsys, str(llama_dir), "Once", "Twice", *options)[1] == out


def test_a_model_without_a_limit_of_positions_is_continued(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=DogeConfig().vocab_size)
    BloomForCausalLM(config).save_pretrained(copied(model_dir, tmp_path))
    status, out, err = run(capsys, str(tmp_path), "Once", "--max_new_tokens", "5", "--seed", "1")
    assert status == 0, err
    assert out.startswith("Once")


def test_compile_is_refused_for_other_models(llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, str(llama_dir), "Once", "--compile")
    assert (status, out) == (1, "")
    assert f"--compile is for Doge models, and {llama_dir} holds a LlamaForCausalLM" in err


@pytest.mark.parametrize("kind", ["model_dir", "llama_dir"])
def test_text_is_shown_while_it_grows(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt before the model runs, then each token before the next; as a whole only with --no_stream."""
    directory = request.getfixturevalue(kind)
    options = (str(directory), "Once upon", "--max_new_tokens", "6", "--seed", "2", "--device", "cpu")
    written: list[str] = []
    shown_before: list[str] = []

    def write(text: str) -> int:
        written.append(text)
        return len(text)

    def before_a_step(*_: object) -> None:
        shown_before.append("".join(written))

    load = generate_module.load_model

    def watched(*args: Any) -> Any:
        model = load(*args)
        model.register_forward_pre_hook(before_a_step)
        return model

    monkeypatch.setattr(generate_module, "load_model", watched)
    monkeypatch.setattr("sys.stdout.write", write)
    assert main(["generate", *options]) == 0
    streamed = "".join(written)
    assert shown_before[0] == "Once upon"
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown_before))
    assert len(set(shown_before)) >= 4  # of 6: some tokens spell nothing by themselves
    written.clear()
    shown_before.clear()
    assert main(["generate", *options, "--no_stream"]) == 0
    assert "".join(written) == streamed
    assert set(shown_before) == {""}
    monkeypatch.undo()
    capsys.readouterr()


def test_a_seed_repeats_and_another_differs(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: int) -> str:
        return run(capsys, str(model_dir), "Once", "--max_new_tokens", "12", "--temperature", "2", "--seed", str(seed))[
            1
        ]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_control_strings_in_the_prompt_stay_text(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, str(model_dir), "a </s> b [INST]", "--max_new_tokens", "1", "--seed", "1")
    assert out.startswith("a </s> b [INST]")


def test_the_prompt_can_come_from_standard_input(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\nand more\n"))
    options = ("--max_new_tokens", "1", "--temperature", "0")
    _, piped, _ = run(capsys, str(model_dir), "-", *options)
    _, given, _ = run(capsys, str(model_dir), "from a pipe\nand more", *options)
    assert piped == given  # the newline that ends the last line is not part of the text


def test_standard_input_is_asked_for_once(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = io.StringIO("from a pipe\n")
    monkeypatch.setattr("sys.stdin", piped)
    status, out, err = run(capsys, str(model_dir), "-", "x", "-", "--max_new_tokens", "1")
    assert (status, out) == (1, "")
    assert "- is given more than once" in err
    assert piped.read() == "from a pipe\n"


def test_text_that_is_not_utf8_is_an_error(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = run(capsys, str(model_dir), "bad \udcff")
    assert status == 1
    assert "not UTF-8" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"bad \xff"), encoding="utf-8"))
    status, _, err = run(capsys, str(model_dir), "-")
    assert status == 1
    assert "standard input" in err


def test_a_console_without_chinese_gets_utf8(model_dir: Path) -> None:
    command = [sys.executable, "-m", "doge_lm.cli", "generate", str(model_dir), "床前", "--max_new_tokens", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").startswith("床前")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--top_p", "1.5"),
        ("--temperature", "-1"),
        ("--temperature", "1e-320"),
        ("--max_new_tokens", "0"),
        ("--repetition_penalty", "0"),
        ("--seed", "99999999999999999999999"),
    ],
)
def test_a_flag_out_of_range_is_named(
    model_dir: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    status, _, err = run(capsys, str(model_dir), "x", flag, value)
    assert status == 1
    assert flag in err
    assert value in err


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_cannot_be_used_is_named(
    model_dir: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    status, _, err = run(capsys, str(model_dir), "x", "--device", device)
    assert status == 1
    assert f"--device {device}" in err


def test_a_directory_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, str(tmp_path), "x")
    assert status == 1
    assert str(tmp_path) in err
    assert "doge-lm train" in err


def test_a_text_that_is_too_long_is_an_error(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, str(model_dir), "word " * 100, "--max_new_tokens", "4")
    assert status == 1
    assert "64 positions" in err


def test_a_cut_checkpoint_is_an_error(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in model_dir.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    status, _, err = run(capsys, str(tmp_path), "x")
    assert status == 1
    assert str(tmp_path) in err


def copied(model_dir: Path, target: Path) -> Path:
    for path in model_dir.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_checkpoint_for_kernels_of_a_gpu_runs_on_a_cpu(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copied(model_dir, tmp_path)
    config = directory / "config.json"
    text = config.read_text(encoding="utf-8")
    assert '"cdmoe_path": "auto"' in text
    config.write_text(text.replace('"cdmoe_path": "auto"', '"cdmoe_path": "sparse"'), encoding="utf-8")
    model = generate_module.load_model(directory, torch.device("cpu"))
    assert model.config.cdmoe_path == "sparse"
    assert {layer.feed_forward.path for layer in model.model.layers} == {"auto"}
    options = ("hello", "--max_new_tokens", "6", "--temperature", "0", "--device", "cpu")
    assert run(capsys, str(directory), *options) == run(capsys, str(model_dir), *options)


def test_weights_of_another_shape_are_an_error(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(copied(model_dir, tmp_path) / "model.safetensors")
    weights["model.layers.0.feed_forward.keys"] = weights["model.layers.0.feed_forward.keys"][:, :4].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    status, _, err = run(capsys, str(tmp_path), "x")
    assert status == 1
    assert str(tmp_path) in err


def test_a_config_of_another_architecture_is_an_error(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied(model_dir, tmp_path) / "config.json").write_text('{"model_type": "doge"}', encoding="utf-8")
    status, _, err = run(capsys, str(tmp_path), "x")
    assert status == 1
    assert str(tmp_path) in err


def test_a_checkpoint_that_lacks_weights_is_an_error(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(copied(model_dir, tmp_path) / "model.safetensors")
    del weights["model.layers.0.attn.v_keys"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    status, _, err = run(capsys, str(tmp_path), "x")
    assert status == 1
    assert "v_keys" in err


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question about it would take the first line of a pipe for its answer."""
    (tmp_path / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["generate", str(tmp_path), "text"]) == 1
    assert "cannot be loaded" in capsys.readouterr().err
