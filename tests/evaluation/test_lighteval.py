"""`doge-lm eval --engine lighteval`: the same samples are right as by the other engine, and what is refused.

lighteval lives in an environment of its own: what needs it is skipped where it is not.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import LlamaConfig, LlamaForCausalLM

from doge_lm.cli import main
from doge_lm.data.tokenizer import encode_text, load_tokenizer
from doge_lm.errors import UserError
from doge_lm.evaluation import command, harness
from doge_lm.evaluation.comparison import compare
from doge_lm.evaluation.harness import Choice, TaskResult
from doge_lm.evaluation.lighteval_results import Found, Guess, Sample, read_results
from doge_lm.evaluation.report import RESULT_NAME, Results
from doge_lm.evaluation.scorer import PlainScorer, make_scorer
from doge_lm.evaluation.suites import SUITES
from doge_lm.evaluation.texts import windows
from doge_lm.inference.loading import load_model
from tests.conftest import REPOSITORY
from tests.small_model import make_model

from .benchmarks import make_benchmarks

HERE = importlib.util.find_spec("lighteval") is not None
needs_lighteval = pytest.mark.skipif(not HERE, reason="lighteval is not installed: see constraints-lighteval.txt")
CHOICES = [name for name in SUITES["local"] if name not in {"local_gsm8k", "local_humaneval", "local_triviaqa"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lighteval")
    for seed, name in enumerate(("one", "two")):
        make_model(place / name, seed=seed)
    make_benchmarks(place / "data")
    return place


@pytest.fixture(scope="module")
def scorer(world: Path) -> PlainScorer:
    return make_scorer(load_model(world / "one", torch.device("cpu")), load_tokenizer(world / "one"), 2048)


@pytest.fixture(scope="module")
def engine() -> ModuleType:
    return importlib.import_module("doge_lm.evaluation.lighteval_engine")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["eval", *map(str, arguments), "--engine", "lighteval", "--device", "cpu"])
    out, err = capsys.readouterr()
    return status, out, err


def sample(gold: list[int], score: Any, choices: int = 4, kind: str = "a") -> Sample:
    return Sample(["question"], ["x"] * choices, gold, {"acc": score, "odd": {"a": 1}}, {"kind": kind})


def found(name: str, samples: list[Sample], value: float = 0.5, **more: Any) -> Found:
    guesses = {"acc": Guess.RIGHT_SHARE, "em": Guess.NOTHING}
    figures = {"acc": 0.5, "acc_stderr": 0.1, "odd": 3.0, "odd_stderr": float("nan"), "em": 0.0}
    return Found(name, 2, samples, guesses, {"acc": True}, {**figures, "acc": value}, **more)


def test_what_was_found_becomes_results() -> None:
    samples = [sample([0], 1, kind="a"), sample([1, 1, 2], True, kind="b"), sample([3], 0.0, choices=2, kind="b")]
    results = read_results([found("g:one", samples, breakdown="kind"), found("g:two", samples[:2], 1.0)])
    assert list(results) == ["g:one", "g:two", "g"]
    one = results["g:one"]
    assert (one.count, one.num_fewshot, list(one.metrics)) == (3, 2, ["acc", "odd", "em"])
    assert one.metrics["acc"].samples == [1.0, 1.0, 0.0]
    assert one.metrics["acc"].chance == pytest.approx((1 / 4 + 2 / 4 + 1 / 2) / 3)
    assert (one.metrics["acc"].stderr, one.metrics["odd"].stderr) == (0.1, None)
    assert (one.metrics["odd"].samples, one.metrics["odd"].chance) == ([], None)
    assert (one.metrics["acc"].higher_is_better, one.metrics["em"].chance) == (True, 0.0)
    assert one.breakdown == {"acc": {"a": (1.0, 1), "b": (0.5, 2)}}
    group = results["g"]
    assert (group.count, group.num_fewshot, group.identity) == (5, None, [])
    assert (group.metrics["acc"].value, group.metrics["acc"].stderr) == (0.75, None)
    assert group.metrics["acc"].chance == pytest.approx((one.metrics["acc"].chance + 0.375) / 2)
    assert (group.metrics["odd"].chance, group.metrics["em"].chance) == (None, 0.0)


def test_a_group_has_what_all_its_tasks_have() -> None:
    one, two = found("g:one", [sample([0], 1)]), found("g:two", [sample([0], 1)])
    less = replace(two, figures={"em": 0.5, "f1": 0.5})
    assert list(read_results([one, less])["g"].metrics) == ["em"]
    assert list(read_results([one, replace(two, figures={"f1": 0.5})])) == ["g:one", "g:two"]
    assert list(read_results([one, replace(two, num_fewshot=5)])) == ["g:one", "g:two"]
    assert list(read_results([found("g", one.samples), two])) == ["g", "g:two", "g:_average"]


def test_samples_are_paired_by_all_that_was_asked() -> None:
    same = [sample([0], 1), sample([1], 0)]
    first = read_results([found("t", same)])
    differences, left_out = compare(first, read_results([found("t", [sample([0], 0), sample([1], 0)], 0.0)]))
    assert [(of.metric, of.better, of.worse) for of in differences] == [("acc", 0, 1)]
    assert [line.partition(":")[0] for line in left_out] == ["t, odd", "t, em"]  # no figures by sample
    for other in ([same[1], same[0]], [sample([0], 1), sample([2], 0)]):
        assert compare(first, read_results([found("t", other)]))[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "doge"], "--suite doge is a list of lm-evaluation-harness's tasks"),
        (["--seed", "5", "--tasks", "piqa"], "--seed is for --engine harness"),
    ],
)
def test_flags_without_meaning_are_refused(
    world: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    status, _, err = run(capsys, world / "one", *flags)
    assert status == 1
    assert message in err


def test_the_constraints_pin_what_the_extra_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (REPOSITORY / "constraints-lighteval.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    asked, extras = [Requirement(text) for text in project["dependencies"]], ["lighteval"]
    for extra in extras:
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if requirement.name == project["name"]:
                extras += requirement.extras
            else:
                asked.append(requirement)
    assert {"torch", "lighteval", "lm-eval", "datasets", "xxhash"} <= {requirement.name for requirement in asked}
    for requirement in asked:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_without_lighteval_the_way_to_it_is_said(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "lighteval" else find(name))
    status, _, err = run(capsys, world / "one", "--data_dir", world / "data")
    assert status == 1
    assert "constraints-lighteval.txt" in err
    assert "'.[lighteval]'" in err


def test_a_lighteval_that_does_not_start_is_told(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "doge_lm.evaluation.lighteval_engine", raising=False)
    monkeypatch.setitem(sys.modules, "lighteval", ModuleType("lighteval"))  # a package without its parts
    for name in [name for name in sys.modules if name.startswith("lighteval.")]:
        monkeypatch.delitem(sys.modules, name)
    status, _, err = run(capsys, world / "one", "--data_dir", world / "data")
    assert status == 1
    assert "cannot be imported (" in err
    assert "constraints-lighteval.txt" in err


def shuffled(scores: list[float]) -> list[float]:
    """In lighteval's order."""
    order = list(scores)
    random.Random(42).shuffle(order)
    return order


def assert_same(mine: dict[str, TaskResult], its: dict[str, TaskResult]) -> None:
    """Sample by sample."""
    assert set(mine) == set(its)
    for name, result in mine.items():
        assert result.metrics.keys() == its[name].metrics.keys()
        assert result.breakdown == its[name].breakdown
        for metric, figure in result.metrics.items():
            other = its[name].metrics[metric]
            assert figure.samples == shuffled(other.samples)
            assert (figure.chance, figure.higher_is_better) == (other.chance, other.higher_is_better)
            assert (figure.value, figure.stderr) == pytest.approx((other.value, other.stderr))


@needs_lighteval
def test_the_same_samples_are_right_as_by_the_harness(world: Path, scorer: PlainScorer, engine: ModuleType) -> None:
    choice = Choice(CHOICES, world / "data")
    mine = engine.run_tasks(scorer, choice)
    assert set(mine) == set(CHOICES)
    assert_same(mine, harness.run_tasks(scorer, choice))


@needs_lighteval
def test_another_architecture_is_scored_too(world: Path, tmp_path: Path, engine: ModuleType) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32768, max_position_embeddings=512, **sizes)).save_pretrained(tmp_path)
    plain = make_scorer(load_model(tmp_path, torch.device("cpu")), load_tokenizer(world / "one"), 2048)
    choice = Choice(["local_arc_easy", "local_blimp"], world / "data")
    assert_same(engine.run_tasks(plain, choice), harness.run_tasks(plain, choice))


@needs_lighteval
def test_written_answers_are_judged_as_by_the_harness(
    world: Path, scorer: PlainScorer, engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "local_triviaqa": [" The Mill!", " mill", "\ta mill", "", "MILL ", " themill", "the mill", "mill,", " m-ill"],
        # the answers are 1, 2, … 9
        "local_gsm8k": [
            *(" 0 + 1 is 1.\n#### 1", " so 3, or 2.", " #### 2 and 3", " #### $4", "5", "#### 6.", "#### 1,0 or 7"),
            *("", "eight, nine: #### 9.0"),
        ],
        "local_humaneval": [f"    return x + {i % 3}\n" for i in range(9)],
    }

    def write(requests: Any, **_: Any) -> list[str]:
        found = []
        for request in requests:
            prompt = request.args[0]
            found.append(next(text for before, text in answers if prompt == before))
        return found

    monkeypatch.setattr(scorer, "generate_until", write)
    for name, own in texts.items():
        task = harness.load_local(world / "data", [name])[name]
        answers = [(task.doc_to_text(row), text) for row, text in zip(task.eval_docs, own, strict=True)]
        choice = Choice([name], world / "data", run_code=True)
        its = harness.run_tasks(scorer, choice)
        assert any(0 < sum(metric.samples) < 9 for metric in its[name].metrics.values())
        assert_same(engine.run_tasks(scorer, choice), its)


@needs_lighteval
def test_greedy_answers_are_those_of_the_harness(world: Path, scorer: PlainScorer, engine: ModuleType) -> None:
    model, seen = engine.ScorerModel(scorer, False, None, set()), []
    task = engine.load_tasks(Choice(["local_triviaqa"], world / "data", limit=3), print)["local_triviaqa|0"]
    generate = scorer.generate_until
    scorer.generate_until = lambda requests, **rest: seen.extend(generate(requests, **rest)) or seen
    try:
        docs = task.get_docs(3)
        responses = model.greedy_until(docs)
    finally:
        del scorer.generate_until
    assert [response.final_text for response in responses] == [[text] for text in seen]
    wish = {"until": ["\n", ".", ","], "max_gen_toks": 24, "do_sample": False}
    assert generate([Instance("generate_until", {}, (doc.query, wish), 0) for doc in docs]) == seen


@needs_lighteval
def test_examples_are_other_rows_in_the_form_of_the_task(
    world: Path, scorer: PlainScorer, engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[str, str]] = []
    encode = scorer.encode_pairs
    monkeypatch.setattr(scorer, "encode_pairs", lambda asked: pairs.extend(asked) or encode(asked))
    for name in ("local_openbookqa", "local_winogrande", "local_blimp"):
        pairs.clear()
        shots = 0 if name == "local_blimp" else 3
        result = engine.run_tasks(scorer, Choice([name], world / "data", num_fewshot=3))[name]
        assert result.num_fewshot == shots
        task = harness.load_local(world / "data", [name])[name]
        if name == "local_openbookqa":
            shown = [f"{row['query']} {row['choices'][row['gold']]}" for row in task.eval_docs]
            asked = [row["query"] for row in task.eval_docs]
        elif name == "local_winogrande":
            shown = [f"{row['context_options'][row['gold']]} {row['continuation']}" for row in task.eval_docs]
            asked = [context for row in task.eval_docs for context in row["context_options"]]
        else:
            shown, asked = [], [""]
        for context, _ in pairs:
            *examples, question = context.split("\n\n")
            assert question in asked
            assert len(examples) == shots
            assert len({shown.index(example) for example in examples}) == shots
            if name == "local_openbookqa":
                assert asked.index(question) not in {shown.index(example) for example in examples}
            if name == "local_winogrande":
                assert asked.index(question) // 2 not in {shown.index(example) for example in examples}


@needs_lighteval
def test_questions_in_the_form_of_a_chat(world: Path, scorer: PlainScorer, engine: ModuleType) -> None:
    own = make_scorer(scorer.model, scorer.tokenizer, 2048)
    model = engine.ScorerModel(own, True, "be kind", set())
    task = engine.load_tasks(Choice(["local_copa|1"], world / "data"), print)["local_copa|1"]
    doc = task.get_docs(1)[0]
    example = doc.fewshot_samples[0]
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": example.query},
        {"role": "assistant", "content": example.choices[example.gold_index]},
        {"role": "user", "content": doc.query},
    ]
    expected = own.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    pairs = list(zip(model.contexts(doc), doc.choices, strict=True))
    assert [context for _, context, _ in own.encode_pairs(pairs)] == [expected, expected]


TASKS = """
from lighteval.metrics.dynamic_metrics import LogLikelihoodAccMetric
from lighteval.metrics.metrics import Metrics
from lighteval.metrics.metrics_sample import LoglikelihoodAcc
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.metrics.normalizations import LogProbPMINorm, LogProbTokenNorm
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod

def ask(row, name):
    return Doc(row["q"], [" " + choice for choice in row["a"]], row["y"], unconditioned_query="so", task_name=name)

def read(row, name):
    return Doc(row["q"], [], 0, task_name=name)

def config(name, prompt, metrics, splits=("test",), select=None):
    return LightevalTaskConfig(name=name, prompt_function=prompt, hf_repo="FOLDER", hf_subset="default",
                               hf_avail_splits=splits, evaluation_splits=["test"], few_shots_select=select,
                               metrics=metrics)

class NoFile:
    def compute_corpus(self, items):
        return open("no such file")

TASKS_TABLE = [
    config("mine:one", ask, [Metrics.loglikelihood_acc]),
    config("mine:two", ask, [Metrics.loglikelihood_acc]),
    config("norms", ask, [LogLikelihoodAccMetric(LogProbPMINorm()), LogLikelihoodAccMetric(LogProbTokenNorm())]),
    config("texts", read, [Metrics.bits_per_byte]),
    config("train", ask, [Metrics.loglikelihood_acc], splits=["train", "test"]),
    config("mixed:acc", ask, [Metrics.loglikelihood_acc]),
    config("mixed:bits", read, [Metrics.bits_per_byte]),
    config("broken", ask, [SampleLevelMetric(
        metric_name="acc", sample_level_fn=LoglikelihoodAcc(), category=SamplingMethod.LOGPROBS,
        corpus_level_fn=NoFile().compute_corpus, higher_is_better=True)]),
    *[config(f"select_{way}", ask, [Metrics.loglikelihood_acc], select=way) for way in
      ("balanced", "random", "sequential", "random_sampling", "random_sampling_from_train")],
]
"""


@pytest.fixture(scope="module")
def mine(world: Path) -> Path:
    """A file with tasks on local rows."""
    folder = world / "rows"
    folder.mkdir()
    rows = [
        {"q": f"the old mill {i}", "a": ["grey stones", "a river of rain", "水"][: 2 + i % 2], "y": i % 2}
        for i in range(6)
    ]
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:2]), encoding="utf-8")
    file = world / "mine.py"
    file.write_text(TASKS.replace("FOLDER", str(folder)), encoding="utf-8")
    return file


@needs_lighteval
def test_tasks_of_ones_own(world: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--include_path", mine, "--tasks", "mine", "--output_dir", tmp_path]
    status, out, _ = run(capsys, world / "one", *flags)
    assert status == 0
    results = Results.read(tmp_path / RESULT_NAME)
    assert results.settings["engine"] == "lighteval"
    assert set(results.tasks) == {"mine:one", "mine:two", "mine"}
    assert results.tasks["mine:one"].metrics["acc"].chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert results.tasks["mine"].metrics["acc"].value == results.tasks["mine:one"].metrics["acc"].value
    assert "| mine     | acc    |     - |      12 |" in out
    status, out, _ = run(capsys, tmp_path, world / "two", *flags[:-2])
    assert status == 0
    assert "| mine:two | acc" in out[out.index("sample by sample") :]


@needs_lighteval
def test_a_group_whose_tasks_have_not_the_same_metrics(mine: Path, scorer: PlainScorer, engine: ModuleType) -> None:
    results = engine.run_tasks(scorer, Choice(["mixed"], include_path=[mine], limit=1))
    assert {name: list(result.metrics) for name, result in results.items()} == {
        "mixed:acc": ["acc"],
        "mixed:bits": ["bits_per_byte"],
    }


@needs_lighteval
def test_as_many_examples_as_there_are(world: Path, mine: Path, engine: ModuleType) -> None:
    """All other rows where a question is one of them, all rows where it is not, however they are chosen."""
    ways = [f"select_{way}" for way in ("balanced", "random", "sequential", "random_sampling")]
    names = [*ways, "select_random_sampling_from_train"]
    choice = Choice([*(f"{name}|5" for name in names), "train|2"], include_path=[mine])
    tasks = engine.load_tasks(choice, print)
    rows = [json.loads(line)["q"] for line in (world / "rows" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    for task in tasks.values():
        for doc in engine._docs(task, choice):
            shown = sorted(example.query for example in doc.fewshot_samples)
            assert shown == (rows[:2] if task.name == "train" else sorted(set(rows) - {doc.query}))


@needs_lighteval
def test_scores_for_their_length_or_information_and_of_whole_texts(
    world: Path, mine: Path, scorer: PlainScorer, engine: ModuleType
) -> None:
    from lighteval.tasks.requests import Doc  # noqa: PLC0415

    results = engine.run_tasks(scorer, Choice(["norms", "texts"], include_path=[mine]))
    rows = [json.loads(line) for line in (world / "rows" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    ids = [
        [(encode(scorer, row["q"]), encode(scorer, f"{row['q']} {c}"), encode(scorer, f"so {c}")) for c in row["a"]]
        for row in rows
    ]
    expected: dict[str, list[float]] = {"acc_norm_token": [], "acc_norm_pmi": []}
    for row, choices in zip(rows, ids, strict=True):
        own = [likelihood(scorer, whole, len(q)) for q, whole, _ in choices]
        alone = [likelihood(scorer, other, len(encode(scorer, "so"))) for _, _, other in choices]
        by_token = [score / (len(whole) - len(q)) for score, (q, whole, _) in zip(own, choices, strict=True)]
        by_information = [score - other for score, other in zip(own, alone, strict=True)]
        expected["acc_norm_token"].append(float(by_token.index(max(by_token)) == row["y"]))
        expected["acc_norm_pmi"].append(float(by_information.index(max(by_information)) == row["y"]))
    found = {name: metric.samples for name, metric in results["norms"].metrics.items()}
    assert found == {name: shuffled(scores) for name, scores in expected.items()}
    # a text longer than the model's positions is scored whole, each token once
    long = engine.ScorerModel(scorer, False, None, set()).loglikelihood_rolling([Doc("old mill " * 600, [], 0)])
    ids = encode(scorer, "old mill " * 600)
    assert len(ids) > 2 * scorer.max_length
    parts = windows(ids, scorer.max_length)
    assert long[0].logprobs[0] == pytest.approx(
        sum(likelihood(scorer, [*context, *rest], len(context)) for context, rest in parts), rel=1e-5
    )
    nats = sum(likelihood(scorer, encode(scorer, row["q"]), 1) for row in rows)
    size = sum(len(row["q"].encode()) for row in rows)
    assert results["texts"].metrics["bits_per_byte"].value == pytest.approx(-nats / size / math.log(2), rel=1e-5)


def encode(scorer: PlainScorer, text: str) -> list[int]:
    return [1, *encode_text(scorer.tokenizer, text)]


def likelihood(scorer: PlainScorer, ids: list[int], begin: int) -> float:
    """Of the tokens from `begin` on, by the whole logits in float64."""
    with torch.no_grad():
        logprobs = scorer.model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logprobs[t - 1, ids[t]].item() for t in range(begin, len(ids)))


@needs_lighteval
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--include_path", "{world}", "--tasks", "mine"], "give a Python file that holds TASKS_TABLE"),
        (["--include_path", "{world}/bad.py", "--tasks", "mine"], "bad.py cannot be imported (ZeroDivisionError"),
        (["--include_path", "{world}/empty.py", "--tasks", "mine"], "empty.py holds no TASKS_TABLE"),
        (["--include_path", "{mine}", "--tasks", "mine|2", "--num_fewshot", "1"], "or --num_fewshot"),
        (["--include_path", "{mine}", "--tasks", "mine|x"], "lighteval cannot read mine|x"),
        (["--include_path", "{mine}", "--tasks", "mine,mine:one|1"], "the task mine:one is named twice"),
        (["--include_path", "{mine}", "--tasks", "norms", "--chat"], "which --chat has no place for"),
        (["--include_path", "{mine}", "--tasks", "mine", "--num_fewshot", "6"], "6 examples are more than"),
        (["--include_path", "{mine}", "--tasks", "train|3"], "3 examples are more than the task train has: 2"),
        (["--include_path", "{mine}", "--tasks", "broken"], "a metric of the task broken|0 failed (FileNotFoundError"),
        (["--include_path", "{world}/none.py", "--tasks", "mine"], "none.py"),
        (["--include_path", "{world}/wrong.py", "--tasks", "mine"], "the task mine:one cannot be used (KeyError: 'r')"),
        (["--include_path", "{mine}", "--tasks", "texts", "--chat"], "which --chat has no place for"),
        (["--include_path", "{world}/taken.py", "--tasks", "mine"], "the name local_mine is one of a ready task"),
        (["--tasks", "local_copa"], "--data_dir"),
        (["--tasks", "local_copa@x=1", "--data_dir", "{world}/data"], "have no settings (@"),
        (["--tasks", "local_cpa", "--data_dir", "{world}/data"], "did you mean local_copa"),
        (["--tasks", "local_humaneval", "--data_dir", "{world}/data"], "--run_code"),
    ],
)
def test_what_cannot_be_is_refused(
    world: Path, mine: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (world / "bad.py").write_text("1 / 0", encoding="utf-8")
    (world / "empty.py").touch()
    (world / "taken.py").write_text(
        mine.read_text(encoding="utf-8").replace("mine:one", "local_mine"), encoding="utf-8"
    )
    (world / "wrong.py").write_text(mine.read_text(encoding="utf-8").replace('row["q"]', 'row["r"]'), encoding="utf-8")
    status, _, err = run(capsys, world / "one", *[flag.format(world=world, mine=mine) for flag in flags])
    assert status == 1
    assert message in err


@needs_lighteval
def test_what_does_not_fit_is_left_out_or_refused(world: Path, tmp_path: Path, engine: ModuleType) -> None:
    short = make_model(tmp_path / "short", positions=16)
    scorer = make_scorer(load_model(short, torch.device("cpu")), load_tokenizer(short), 2048)
    told: list[str] = []
    names = ["local_arc_easy", "local_gsm8k"]
    assert set(engine.run_tasks(scorer, Choice(names, world / "data", fitting=True), told.append)) == {names[0]}
    assert "local_gsm8k" in told[0]
    with pytest.raises(UserError, match="256 tokens, and this one has 16 positions"):
        engine.run_tasks(scorer, Choice(names, world / "data"))


@needs_lighteval
def test_programs_of_a_model_run_only_if_allowed(engine: ModuleType) -> None:
    from lighteval.tasks.lighteval_task import LightevalTask  # noqa: PLC0415
    from lighteval.tasks.tasks.lcb.main import TASKS_TABLE  # noqa: PLC0415

    task = LightevalTask(TASKS_TABLE[0])
    with pytest.raises(UserError, match="--run_code"):
        engine._check(task, Choice([]))
    engine._check(task, Choice([], run_code=True))


@needs_lighteval
@pytest.mark.slow
def test_tasks_of_lighteval_itself_without_a_network(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are known, the file that one of them fetches is left out, and the data cannot be had."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, err = run(capsys, world / "one", "--tasks", "arc:eazy")
    assert status == 1
    assert "left out: lighteval's tasks tiny:*" in out
    assert "did you mean arc:easy" in err
    status, _, err = run(capsys, world / "one", "--tasks", "arc")
    assert status == 1
    assert "the data of the task arc:" in err
    assert "check the network" in err
