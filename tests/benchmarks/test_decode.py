"""`benchmarks/decode.py`: a row for each way, batch and model, also where one fails; the peer is of Doge's size."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from doge_lm.errors import UserError
from doge_lm.training.plan import count_model
from doge_lm.training.settings import load_settings
from tests.benchmarks.conftest import Command
from tests.training.support import make_settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import decode  # noqa: E402


def test_a_small_run_has_all_rows(command: Command, tmp_path: Path) -> None:
    preset, target = tmp_path / "small.yaml", tmp_path / "out.json"
    preset.write_text(make_settings().to_yaml(), encoding="utf-8")
    sizes = ["--batch", "1", "3", "--prompt_tokens", "5", "--new_tokens", "4", "--repetitions", "1", "--device", "cpu"]
    ways = ["dynamic", "static", "graph"]
    printed = command(decode, "--preset", str(preset), *sizes, "--ways", *ways, "--json", str(target))
    found = json.loads(target.read_text(encoding="utf-8"))
    records = found["records"]
    expected = [(way, batch, model) for way in ways for batch in (1, 3) for model in ("llama", "doge")]
    assert [(record["way"], record["batch"], record["model"]) for record in records] == expected
    for record in records:
        assert "error" not in record
        assert record["tokens_per_second"] > 0
        assert ("ratio" in record) == (record["model"] == "doge")
    assert [(best["preset"], best["batch"]) for best in found["best"]] == [("small", 1), ("small", 3)]
    assert printed.count("| small |") == len(expected) + 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def records_of_a_run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[dict[str, Any]]:
    """A run of a small preset on the CPU whose Doge fails."""
    sizes = ["--prompt_tokens", "4", "--new_tokens", "2", "--repetitions", "1", "--device", "cpu", "--batch", "2"]
    models = decode.build_models(make_settings().model_config(), torch.device("cpu"), torch.float32, seed=0)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room\nfor this")

    monkeypatch.setattr(models["doge"], "forward", fail)
    monkeypatch.setattr(decode, "build_models", lambda *_: models)
    records: list[dict[str, Any]] = []
    decode.measure_preset("doge_25M", decode.parse([*sizes, *flags]), records.append)
    return records


def test_an_error_becomes_its_row_and_the_other_rows_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "make_prompts", lambda *_: [[3, 4, 5], [6]])
    llama, doge, *rest = records_of_a_run(monkeypatch, "--ways", "graph", "dynamic")
    assert doge["error"] == "RuntimeError: no room"
    assert "ratio" not in doge
    assert llama["tokens_per_second"] > 0
    assert [record["model"] for record in rest] == ["llama", "doge"]
    assert "no room" in decode.row(doge)
    assert decode.compare_best([llama, doge]) == []


def test_rows_are_those_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "make_prompts", lambda *_: [[3, 4, 5], [6]])
    records = records_of_a_run(monkeypatch, "--ways", "dynamic", "--models", "llama")
    assert [(record["way"], record["model"]) for record in records] == [("dynamic", "llama")]


def test_the_best_of_each_are_compared() -> None:
    def record(model: str, way: str, **figures: Any) -> dict[str, Any]:
        return {"preset": "x", "batch": 1, "model": model, "way": way, **figures}

    records = [
        record("llama", "graph", tokens_per_second=2.0),
        record("llama", "static", tokens_per_second=4.0),
        record("doge", "compiled", tokens_per_second=6.0),
        record("doge", "graph", tokens_per_second=5.0),
        record("doge", "static", error="no room"),
    ]
    expected = {"preset": "x", "batch": 1, "doge": "compiled", "llama": "static", "ratio": 1.5}
    assert decode.compare_best(records) == [expected]


def test_prompts_are_of_unequal_length() -> None:
    prompts = decode.make_prompts(5, 10, 60, seed=0)
    assert [len(prompt) for prompt in prompts] == [10, 9, 8, 7, 6]
    assert all(3 <= token < 60 for prompt in prompts for token in prompt)
    assert [len(prompt) for prompt in decode.make_prompts(1, 10, 60, seed=0)] == [10]
    assert len(decode.make_prompts(64, 127, 60, seed=0)[-1]) == 65


@pytest.mark.parametrize("way", ["dynamic", "static", "graph"])
@pytest.mark.parametrize("model", decode.MODELS)
def test_every_way_makes_the_same_tokens_and_as_many_as_asked(way: str, model: str) -> None:
    models = decode.build_models(make_settings().model_config(), torch.device("cpu"), torch.float32, seed=0)
    prompts = decode.make_prompts(3, 6, 60, seed=0)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(models[model](torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    run = decode.generate_by(way, models[model], prompts, 5)
    for new in (5, 1):
        found = run(new)
        rows = found[:, 6:].tolist() if isinstance(found, torch.Tensor) else found
        assert rows == [row[:new] for row in expected]


@pytest.mark.parametrize("preset", ["doge_25M", "doge_450M"])
def test_the_peer_is_as_large_with_an_aligned_width(preset: str) -> None:
    config = load_settings(preset).model_config()
    models = decode.build_models(config, torch.device("meta"), torch.float32, seed=0)
    assert models["llama"].config.intermediate_size % 64 == 0
    total = sum(parameter.numel() for parameter in models["llama"].parameters())
    assert abs(total / count_model(config).total - 1) < 0.02


@pytest.mark.parametrize("flag", ["--prompt_tokens", "--new_tokens", "--repetitions", "--batch"])
def test_a_number_below_one_is_named(flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        decode.parse([flag, "0"])


def test_more_tokens_than_positions_is_an_error() -> None:
    args = decode.parse(["--prompt_tokens", "20000", "--device", "cpu"])
    with pytest.raises(UserError, match="--prompt_tokens"):
        decode.measure_preset("doge_25M", args, lambda record: None)
