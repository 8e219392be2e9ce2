"""`doge-lm eval`: what it prints and writes, and what it refuses."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from doge_lm.cli import main
from doge_lm.data.tokenizer import load_tokenizer
from doge_lm.evaluation.report import RESULT_NAME, Results, table
from tests.conftest import REPOSITORY
from tests.small_model import make_model

from .benchmarks import make_benchmarks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("command")
    for seed, name in enumerate(("one", "two")):
        make_model(place / name, seed=seed)
    make_benchmarks(place / "data", count=5)
    (place / "text.txt").write_text("a text", encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def llama(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another architecture."""
    place = tmp_path_factory.mktemp("command") / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32768, max_position_embeddings=512, **sizes)).save_pretrained(place)
    load_tokenizer(world / "one").save_pretrained(place)
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["eval", *map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    return status, out, err


def test_results_are_printed_and_written(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data_dir", world / "data", "--tasks", "local_copa, local_blimp", "--texts", f"en={world / 'text.txt'}"]
    status, out, _ = run(capsys, world / "one", *flags, "--output_dir", tmp_path / "one")
    assert status == 0
    data = json.loads((tmp_path / "one" / RESULT_NAME).read_text(encoding="utf-8"))
    copa = data["tasks"]["local_copa"]
    metric = copa["metrics"]["acc"]
    assert f"| {metric['value']:.4f} | {metric['stderr']:.4f} | 0.5000 |" in " ".join(out.split())
    assert metric["over_chance"] == pytest.approx(metric["value"] - 0.5)
    assert metric["value"] == pytest.approx(sum(metric["samples"]) / 5)
    assert set(data["tasks"]["local_blimp"]["breakdown"]["acc"]) == {"kind0", "kind1", "kind2"}
    assert f"{data['texts']['en']['bits_per_byte']:.4f}" in out
    assert data["settings"]["dtype"] == "float32"
    again = Results.read(tmp_path / "one" / RESULT_NAME)
    assert again.as_dict() == data
    assert [path.name for path in (tmp_path / "one").iterdir()] == [RESULT_NAME]


def test_two_models_or_their_results_are_compared(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_dir", world / "data", "--tasks", "local_copa,local_winogrande", "--texts", world / "text.txt"]
    status, out, _ = run(capsys, world / "one", world / "two", *flags)
    assert status == 0
    expected = out[out.index("sample by sample") :]
    for name in ("one", "two"):
        assert run(capsys, world / name, *flags, "--output_dir", tmp_path / name)[0] == 0
    status, out, _ = run(capsys, tmp_path / "one", tmp_path / "two")
    assert status == 0
    assert out[out.index("sample by sample") :] == expected
    assert expected.count("local_") == 2
    assert "| text             | bits per byte |" in expected
    # other examples before the questions make other prompts, which are not compared
    assert run(capsys, world / "two", *flags, "--num_fewshot", 1, "--output_dir", tmp_path / "three")[0] == 0
    _, out, _ = run(capsys, tmp_path / "one", tmp_path / "three")
    assert "left out: local_copa: the samples or their prompts are not the same" in out


def test_a_whole_folder_of_benchmarks(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("copa", "humaneval"):
        (tmp_path / f"{name}.jsonl").write_bytes((world / "data" / f"{name}.jsonl").read_bytes())
    status, out, _ = run(capsys, world / "one", "--data_dir", tmp_path, "--limit", 2)
    assert status == 0
    assert out.count("left out: local_") == 11
    assert "| local_copa | acc" in out


def test_a_folder_without_benchmarks_is_told_shortly(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "humaneval.jsonl").write_bytes((world / "data" / "humaneval.jsonl").read_bytes())
    for folder, there in ((REPOSITORY / "benchmarks", 0), (tmp_path, 1)):
        status, _, err = run(capsys, world / "one", "--data_dir", folder)
        assert status == 1
        assert f"holds {there} of the 12 files" in err
        assert "the first that is missing is arc_challenge_test.jsonl" in err
        assert ("--run_code" in err) == (there == 1)
        assert len(err) < 300 + len(str(folder))


def write_task(folder: Path, rows: list[dict[str, Any]], task: str) -> None:
    """A task file `mine.yaml` over these rows; `task` is what it says but for its name and its data."""
    data = folder / "mine.json"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    head = f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    (folder / "mine.yaml").write_text(head + task, encoding="utf-8")


def test_a_task_file_of_ones_own(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": "one two", "a": ["three", "four", "five"], "y": 1}] * 4
    write_task(
        tmp_path,
        rows,
        """output_type: multiple_choice
doc_to_text: q
doc_to_choice: a
doc_to_target: y
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    )
    status, out, _ = run(capsys, world / "one", "--include_path", tmp_path, "--tasks", "mine")
    assert status == 0
    assert "0.3333" in out  # chance


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to evaluate on"),
        (["--suite", "local"], "--data_dir"),
        (["--data_dir", "{world}/none"], "is no folder"),
        (["--data_dir", "{world}/one"], "holds 0 of the 12 files"),
        (["--data_dir", "{world}/data", "--tasks", "local_cpa"], "did you mean local_copa"),
        (["--tasks", "local_copa"], "--data_dir"),
        (["--data_dir", "{world}/two", "--tasks", "local_copa"], "holds no copa.jsonl"),
        (["--data_dir", "{world}/data", "--limit", "0"], "--limit is 0"),
        (["--data_dir", "{world}/data", "--num_fewshot", "-1"], "--num_fewshot is -1"),
        (["--texts", "x={world}/none.txt"], "does not exist"),
        (["--texts", "{world}/text.txt", "--window", "1"], "--window is 1"),
        (["--texts", "{world}/text.txt", "--system", "be kind"], "--system is for --chat"),
        (["--tasks", "local_copa", "--data_dir", "{world}/data", "--include_path", "{world}/none"], "--include_path"),
    ],
)
def test_what_cannot_be_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    status, _, err = run(capsys, world / "one", *[flag.format(world=world) for flag in flags])
    assert status == 1
    assert message in err


def test_places_without_a_model_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data_dir", world / "data", "--tasks", "local_copa"]
    assert "neither a model" in run(capsys, tmp_path, *data)[2]
    (tmp_path / RESULT_NAME).write_text("{}", encoding="utf-8")
    assert "holds no results" in run(capsys, tmp_path)[2]
    assert "the results of one model" in run(capsys, world / "one", world / "two", *data, "--output_dir", "x")[2]


def test_damaged_results_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data_dir", world / "data", "--tasks", "local_copa", "--texts", f"x={world / 'text.txt'}"]
    assert run(capsys, world / "one", *flags, "--output_dir", tmp_path / "out")[0] == 0
    path = next((tmp_path / "out").rglob(RESULT_NAME))
    whole = json.loads(path.read_text(encoding="utf-8"))

    def refused(change: Callable[[Any], Any]) -> None:
        damaged = copy.deepcopy(whole)
        change(damaged)
        path.write_text(json.dumps(damaged), encoding="utf-8")
        status, out, err = run(capsys, path.parent, path.parent)
        assert (status, "holds no results" in err, "|" in out) == (1, True, False)

    metric = next(iter(whole["tasks"]["local_copa"]["metrics"].values()))
    refused(lambda data: data["tasks"]["local_copa"]["metrics"]["acc"].update(samples=["a"] * len(metric["samples"])))
    refused(lambda data: data["texts"]["x"].update(nats=[]))
    refused(lambda data: data["texts"]["x"].update(nats=["a"]))
    refused(lambda data: data["texts"]["x"].update(bytes_of_texts=[1]))


def test_a_task_that_needs_more_positions_than_there_are(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "short", positions=16)
    flags = ["--data_dir", world / "data", "--tasks", "local_triviaqa"]
    assert "16 positions" in run(capsys, tmp_path / "short", *flags)[2]


def test_a_task_file_that_is_wrong_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--include_path", tmp_path, "--tasks", "mine"]
    (tmp_path / "mine.yaml").write_text("task: mine\n  output: [\n", encoding="utf-8")
    error = run(capsys, world / "one", *flags)[2]
    assert "mine.yaml is no YAML" in error
    assert "line 2" in error
    good = "task: mine\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
    (tmp_path / "mine.yaml").write_text(f"{good}output_typ: x\n", encoding="utf-8")
    error = run(capsys, world / "one", *flags)[2]
    assert f"the task mine of {tmp_path / 'mine.yaml'} cannot be used" in error
    assert "output_typ" in error
    kwargs = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'none.json'}}}}}\n"
    (tmp_path / "mine.yaml").write_text(good + kwargs, encoding="utf-8")
    error = run(capsys, world / "one", *flags)[2]
    assert "none.json" in error
    assert "network" not in error


def test_a_place_for_results_is_tried_first(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    flags = ["--data_dir", world / "data", "--tasks", "local_copa", "--output_dir"]
    status, out, err = run(capsys, world / "one", *flags, tmp_path / "file")
    assert (status, out) == (1, "")
    assert "cannot be written to" in err


def test_earlier_results_are_not_replaced_unasked(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_dir", world / "data", "--tasks", "local_copa", "--limit", 2, "--output_dir", tmp_path]
    assert run(capsys, world / "one", *flags)[0] == 0
    before = (tmp_path / RESULT_NAME).read_bytes()
    status, out, err = run(capsys, world / "two", *flags)
    assert (status, out) == (1, "")
    assert "holds results already" in err
    assert (tmp_path / RESULT_NAME).read_bytes() == before
    assert run(capsys, world / "two", *flags, "--overwrite")[0] == 0
    assert Results.read(tmp_path / RESULT_NAME).model == str(world / "two")


@pytest.mark.slow
def test_nothing_but_results_is_said_where_there_is_no_terminal(world: Path, llama: Path, tmp_path: Path) -> None:
    """No bar of progress and no complaint of git, outside of a repository, by a Doge and by another model."""
    rows = [{"q": "one two", "a": " three"}, {"q": "four", "a": " five"}]
    write_task(
        tmp_path,
        rows,
        """output_type: loglikelihood
doc_to_text: q
doc_to_target: a
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    )
    flags = ["--data_dir", world / "data", "--tasks", "local_copa,local_triviaqa,mine", "--include_path", tmp_path]
    command = [sys.executable, "-m", "doge_lm.cli", "eval", world / "one", llama, *flags, "--device", "cpu"]
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "cache"),
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr
    assert "%|" not in done.stderr
    assert "examples" not in done.stderr
    assert "git" not in done.stderr


def test_a_standard_error_of_equal_samples_is_a_dash(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_dir", world / "data", "--tasks", "local_triviaqa", "--output_dir", tmp_path]
    status, out, _ = run(capsys, world / "one", *flags)
    assert status == 0
    assert Results.read(tmp_path / RESULT_NAME).tasks["local_triviaqa"].metrics["exact_match,stripped"].stderr == 0
    assert "| 5 | 0.0000 | - | 0.0000 | +0.0000 |" in " ".join(out.split())


def test_what_is_done_is_kept(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "late.jsonl").write_text('{"text": "good"}\n{"text": 3}\n', encoding="utf-8")
    flags = ["--data_dir", world / "data", "--tasks", "local_copa", "--texts", tmp_path / "late.jsonl"]
    status, out, err = run(capsys, world / "one", *flags, "--output_dir", tmp_path / "out")
    assert status == 1
    assert "line 2" in err
    assert "| local_copa | acc" in out
    assert set(Results.read(tmp_path / "out" / RESULT_NAME).tasks) == {"local_copa"}


def test_results_take_no_flags_and_are_whole(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data_dir", world / "data", "--tasks", "local_copa", "--output_dir", tmp_path]
    assert run(capsys, world / "one", *flags)[0] == 0
    assert "--tasks is for a model" in run(capsys, tmp_path, "--tasks", "local_copa")[2]
    data = json.loads((tmp_path / RESULT_NAME).read_text(encoding="utf-8"))
    del data["tasks"]["local_copa"]["metrics"]["acc"]["samples"][0]
    (tmp_path / RESULT_NAME).write_text(json.dumps(data), encoding="utf-8")
    assert "the samples of local_copa are not all there" in run(capsys, tmp_path)[2]


def test_chance_with_several_right_answers_and_by_mutual_information(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": "one two", "a": ["three", "four", "five"], "y": [0, 2]}] * 4
    (tmp_path / "mine.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "mine.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: a
"""
    several = (
        "task: several\ndoc_to_target: y\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    mutual = "task: mutual\ndoc_to_target: 1\nmetric_list: [{metric: acc_mutual_info, aggregation: mean, higher_is_better: true}]\n"  # noqa: E501
    for name, rest in (("several", several), ("mutual", mutual)):
        (tmp_path / f"{name}.yaml").write_text(text + rest, encoding="utf-8")
    flags = ["--include_path", tmp_path, "--tasks", "several,mutual", "--output_dir", tmp_path / "out"]
    assert run(capsys, world / "one", *flags)[0] == 0
    tasks = Results.read(tmp_path / "out" / RESULT_NAME).tasks
    assert tasks["several"].metrics["acc"].chance == pytest.approx(2 / 3)
    assert tasks["mutual"].metrics["acc_mutual_info"].chance == pytest.approx(1 / 3)


def test_a_perplexity_is_shown_and_not_compared(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": "one two", "a": word} for word in ("three", "four", "five")]
    write_task(
        tmp_path,
        rows,
        """output_type: loglikelihood
doc_to_text: q
doc_to_target: " {{a}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    )
    flags = ["--include_path", tmp_path, "--tasks", "mine"]
    status, out, _ = run(capsys, world / "one", world / "two", *flags)
    assert status == 0
    compared = out[out.index("sample by sample") :]
    assert "| mine | perplexity" in out
    assert "| mine | perplexity" not in compared
    assert "| mine | acc " in compared
    assert "left out: mine, perplexity: it is not a mean over samples" in compared


def test_tables_line_up() -> None:
    assert table(("a", "bc"), [("x", "1"), ("yyyy", "22")], left=1).splitlines() == [
        "| a    |  bc |",
        "| ---- | --: |",
        "| x    |   1 |",
        "| yyyy |  22 |",
    ]
