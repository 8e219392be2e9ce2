"""`benchmarks/export.py`: a row for each form, with size, loss and speed of the same run."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from doge_lm.data.dataset import PackedCollator, load_prepared
from doge_lm.data.download import take_local
from doge_lm.data.merge import merge
from doge_lm.data.preprocess import PreprocessSettings, preprocess
from doge_lm.data.tokenizer import load_tokenizer
from doge_lm.errors import UserError
from doge_lm.evaluation.scorer import make_scorer
from doge_lm.evaluation.texts import score_texts
from doge_lm.inference.loading import load_model
from tests.benchmarks.conftest import Command
from tests.small_model import make_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import export as benchmark  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def prepared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources in rows of 32 tokens, with prompts, which are no targets, and documents of more than a row."""
    place = tmp_path_factory.mktemp("prepared")
    for name, word in (("bottles", "green bottles"), ("stones", "灰石 stones")):
        file = place / f"{name}.jsonl"
        rows = [{"prompt": f"Count {i}.", "text": f"{i} {word} fall. " * (1 + 3 * i % 17)} for i in range(40)]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        take_local(name, file, place / "raw" / name)
    preprocess(place, place, model, PreprocessSettings(sequence_length=32))
    merge(place, place, test_size=24)
    return place / "pretrain"


def test_held_out_rows_are_scored_by_their_own_labels(model: Path, prepared: Path) -> None:
    groups = benchmark.held_out_rows(prepared, limit=5)
    test = load_prepared(prepared).test
    assert {name: len(rows) for name, rows in groups.items()} == {"bottles": 5, "stones": 5}
    network, tokenizer = load_model(model, torch.device("cpu")), load_tokenizer(model)
    found = benchmark.score_rows(make_scorer(network, tokenizer, 256), groups, window=512)
    for name, rows in groups.items():
        expected = [row for row in test if row["source"] == name][:5]
        assert [row["input_ids"].tolist() for row in rows] == [row["input_ids"].tolist() for row in expected]
        nats = []
        for row in expected:
            labels = PackedCollator(0, len(row["input_ids"]))([row])["labels"][0]
            begin, total = 0, 0.0
            for length in row["document_lengths"].tolist():
                ids = torch.from_numpy(row["input_ids"][begin : begin + length].astype("int64"))
                with torch.no_grad():
                    logprobs = network(ids[None]).logits[0].double().log_softmax(-1)
                places = [t for t in range(1, length) if labels[begin + t] != -100]
                total -= sum(logprobs[t - 1, ids[t]].item() for t in places)
                begin += length
            nats.append(total)
        assert found[name].nats == pytest.approx(nats, rel=1e-5)
        assert found[name].bytes == [int(row["text_bytes"]) for row in expected]
        bits = sum(nats) / math.log(2) / sum(found[name].bytes)
        assert found[name].scores.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert any(len(row["document_lengths"]) > 1 for rows in groups.values() for row in rows)
    assert any(len(row["context_spans"]) for rows in groups.values() for row in rows)


@pytest.mark.parametrize("length", [2, 7, 64])
def test_windows_cover_the_targets_of_a_row_once(prepared: Path, length: int) -> None:
    for row in load_prepared(prepared).test:
        labels = PackedCollator(0, len(row["input_ids"]))([row])["labels"][0]
        found = benchmark.target_windows(row, length)
        assert [i for _, targets in found for i in targets] == labels[labels != -100].tolist()
        for context, targets in found:
            assert context
            assert targets
            assert len(context) + len(targets) <= length + 1


def test_a_set_of_another_tokenizer_is_refused(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="another tokenizer"):
        benchmark.check_tokenizer(prepared, tmp_path)


def test_texts_are_scored_as_by_the_command(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"{number} green bottles hanging on the wall. " * number}) for number in (1, 2, 3)]
    file.write_text("\n".join(lines), encoding="utf-8")
    scorer = make_scorer(load_model(model, torch.device("cpu")), load_tokenizer(model), 256)
    args = argparse.Namespace(texts=[f"en={file}"], window=16, limit=2)
    assert benchmark.scoring(args)(scorer) == score_texts(scorer, {"en": [file]}, 16, 2)


@pytest.mark.slow
def test_a_small_run_has_all_figures(command: Command, model: Path, prepared: Path, tmp_path: Path) -> None:
    for package in ("torchao", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    target = tmp_path / "out.json"
    read = ["--dataset_path", str(prepared), "--limit", "3"]
    rows = ["float32", "int8", "onnx"]
    sizes = ["--window", "16", "--prompt_tokens", "4", "--new_tokens", "3", "--repetitions", "1"]
    torch.set_num_threads(1)  # threads wait for each other in so small a model
    output = command(benchmark, str(model), *read, *sizes, "--rows", *rows, "--json", str(target))
    records = json.loads(target.read_text(encoding="utf-8"))["records"]
    assert list(records) == rows
    assert all(f"| {name} |" in output for name in rows)
    assert all(record["tokens_per_second"] > 0 for record in records.values())
    assert records["int8"]["bytes"] < 0.7 * records["float32"]["bytes"]
    original = records["float32"]["bits_per_byte"]["bottles"]
    assert records["onnx"]["bits_per_byte"]["bottles"] == pytest.approx(original, rel=1e-5)
    assert records["int8"]["bits_per_byte"]["bottles"] == pytest.approx(original, rel=0.01)
    difference, _ = records["int8"]["difference"]["bottles"]
    assert difference == pytest.approx(records["int8"]["bits_per_byte"]["bottles"] - original, abs=1e-9)
