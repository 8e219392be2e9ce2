"""Scores of the ready tasks against a scorer that shares nothing with the harness: one text at a time, in float64."""

from __future__ import annotations

import json
import math
import re
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from doge_lm.cli import main
from doge_lm.data.sources import read_objects
from doge_lm.data.tokenizer import encode_text, load_tokenizer
from doge_lm.errors import UserError
from doge_lm.evaluation.harness import Choice, TaskResult, local_suite, run_tasks
from doge_lm.evaluation.local_data import find_file
from doge_lm.evaluation.programs import passes
from doge_lm.evaluation.report import RESULT_NAME, Results
from doge_lm.evaluation.scorer import DogeScorer, PlainScorer, make_scorer
from doge_lm.evaluation.suites import SUITES, TASKS
from doge_lm.inference.decoding import Decoder
from doge_lm.inference.loading import load_model
from tests.small_model import make_model

from .benchmarks import KINDS, make_benchmarks
from .knowing import answers, teach

LIMIT = 12
WRITTEN_LIMIT = 6  # of tasks whose answers are written token by token
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("eval") / "model", positions=2048)


@pytest.fixture(scope="module")
def model(place: Path) -> PreTrainedModel:
    return load_model(place, CPU)


@pytest.fixture(scope="module", params=["made", "shared"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "made":
        return make_benchmarks(tmp_path_factory.mktemp("benchmarks"))
    shared: Path = request.getfixturevalue("shared_data")
    return shared / "eval"


class Plain:
    """Log-likelihoods and greedy continuations by the whole logits of one text, in float64."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)

    def score(self, context: str, continuation: str) -> float:
        kept = context.rstrip()
        whole = [1, *encode_text(self.tokenizer, context + continuation)]
        begin = 1 + len(encode_text(self.tokenizer, kept)) if kept else 1
        logprobs = self.logprobs(whole)
        return sum(logprobs[t - 1, whole[t]].item() for t in range(begin, len(whole)))

    @torch.no_grad()
    def write(self, context: str, most: int, stops: list[str]) -> str:
        """Token by token without a cache, up to the end token or the first stop."""
        ids = [1, *encode_text(self.tokenizer, context)]
        count = len(ids)
        before = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = ""
        while len(ids) < count + most and ids[-1] != 2 and not any(stop in text for stop in stops):
            ids.append(int(self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            # with the blank in front of its first word, which a text of its own would not have
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            assert text.startswith(before)
            text = text.removeprefix(before)
        return min((text.split(stop)[0] for stop in stops), key=len)


def rows(data: Path, name: str, limit: int = LIMIT) -> list[dict[str, Any]]:
    path = find_file(data, name)
    assert path is not None
    return [values for (_, values), _ in zip(read_objects(path), range(limit), strict=False)]


@dataclass(frozen=True)
class Expected:
    """What an independent scorer makes of one row.

    Attributes:
        asked: each (context, continuation) with its log-likelihood in nats, or (context, "") with what is written.
        scores: of the metrics, in order.
    """

    asked: dict[tuple[str, str], float | str]
    scores: tuple[float, ...]


def right(scores: list[float], lengths: list[int], gold: int) -> tuple[float, float]:
    """Whether the likeliest choice, and the likeliest for its length in characters, is the right one."""
    normed = [score / length for score, length in zip(scores, lengths, strict=True)]
    return float(scores.index(max(scores)) == gold), float(normed.index(max(normed)) == gold)


def chosen(plain: Plain, pairs: list[tuple[str, str]], lengths: list[int], gold: int) -> Expected:
    scores = [plain.score(*pair) for pair in pairs]
    return Expected(dict(zip(pairs, scores, strict=True)), right(scores, lengths, gold))


def of_choices(prompt: Callable[[dict[str, Any]], str]) -> Callable[[Plain, dict[str, Any]], Expected]:
    def score(plain: Plain, row: dict[str, Any]) -> Expected:
        pairs = [(prompt(row), f" {choice}") for choice in row["choices"]]
        return chosen(plain, pairs, [len(choice) for choice in row["choices"]], row["gold"])

    return score


def asked(row: dict[str, Any]) -> str:
    return f"{row['query']}\nAnswer:"


def of_names(plain: Plain, row: dict[str, Any]) -> Expected:
    pairs = [(option, f" {row['continuation']}") for option in row["context_options"]]
    return chosen(plain, pairs, [1, 1], row["gold"])


def of_pair(plain: Plain, row: dict[str, Any]) -> Expected:
    # The harness puts its blank between context and continuation before the first word, too.
    return chosen(plain, [("", f" {row[name]}") for name in ("sentence_good", "sentence_bad")], [1, 1], 0)


def bare(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter not in string.punctuation)


def of_trivia(plain: Plain, row: dict[str, Any]) -> Expected:
    text = plain.write(row["context"], 24, ["\n", ".", ","])
    found = any(bare(text.strip()) == bare(alias) for alias in row["aliases"])
    return Expected({(row["context"], ""): text}, (float(found),))


def number(text: str) -> str:
    """A number as it counts: without thousands' commas, and without the point that ends a sentence."""
    return text.replace(",", "").removesuffix(".")


def of_sum(plain: Plain, row: dict[str, Any]) -> Expected:
    prompt = f"Question: {row['question']}\nAnswer:"
    text = plain.write(prompt, 256, ["Question:"])
    answer = number(row["answer"].rpartition("#### ")[2].strip())
    signed = re.search("#### (-?[0-9,.]+)", text)
    numbers = re.findall("-?[0-9][0-9,.]*", text)
    strict = signed is not None and number(signed[1]) == answer
    return Expected({(prompt, ""): text}, (float(strict), float(bool(numbers) and number(numbers[-1]) == answer)))


def of_program(plain: Plain, row: dict[str, Any]) -> Expected:
    text = plain.write(row["prompt"], 384, ["\nclass", "\ndef", "\n#", "\nif", "\nprint"])
    program = f"{row['prompt']}{text}\n{row['test']}\ncheck({row['entry_point']})\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=60)
    return Expected({(row["prompt"], ""): text}, (float(done.returncode == 0),))


WRITTEN = {
    "local_triviaqa": ("triviaqa_sub3000", of_trivia, ("exact_match,stripped",)),
    "local_gsm8k": ("gsm8k_test", of_sum, ("exact_match,strict", "exact_match,flexible")),
    "local_humaneval": ("humaneval", of_program, ("pass_at_1",)),
}
REFERENCES = {
    "local_arc_easy": ("arc_easy_test", of_choices(asked), ("acc", "acc_norm")),
    "local_arc_challenge": (
        "arc_challenge_test",
        of_choices(lambda row: f"{row['query']}\nAnswer:"),
        ("acc", "acc_norm"),
    ),
    "local_openbookqa": ("openbookqa_test", of_choices(lambda row: row["query"]), ("acc", "acc_norm")),
    "local_piqa": ("piqa_valid", of_choices(lambda row: f"{row['query']}Answer:"), ("acc", "acc_norm")),
    "local_boolq": ("boolq_valid", of_choices(asked), ("acc",)),
    "local_commonsense_qa": ("commonsense_qa", of_choices(lambda row: row["query"]), ("acc",)),
    "local_copa": ("copa", of_choices(lambda row: row["query"]), ("acc",)),
    "local_winogrande": ("winogrande_xl_dev", of_names, ("acc",)),
    "local_blimp": ("blimp", of_pair, ("acc",)),
    **WRITTEN,
}


@pytest.fixture(scope="module")
def knowing(place: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Knows answers of the made benchmarks."""
    data = make_benchmarks(tmp_path_factory.mktemp("known"))
    return teach(load_model(place, CPU), load_tokenizer(place), answers(data))


@dataclass(frozen=True)
class Found:
    """What the harness made of all tasks, and what it asked the model and was told."""

    tasks: dict[str, TaskResult]
    told: dict[tuple[str, str], float | str]


@pytest.fixture(scope="module")
def found(place: Path, knowing: PreTrainedModel, data: Path) -> Found:
    scorer = make_scorer(knowing, load_tokenizer(place), 2048)
    told: dict[tuple[str, str], float | str] = {}
    score, write = scorer.loglikelihood, scorer.generate_until

    def scored(requests: list[Instance], **rest: Any) -> list[tuple[float, bool]]:
        answers = score(requests, **rest)
        told.update({request.args: answer for request, (answer, _) in zip(requests, answers, strict=True)})
        return answers

    def written(requests: list[Instance], **rest: Any) -> list[str]:
        texts = write(requests, **rest)
        told.update({(request.args[0], ""): text for request, text in zip(requests, texts, strict=True)})
        return texts

    scorer.loglikelihood, scorer.generate_until = scored, written
    tasks = run_tasks(scorer, Choice([name for name in REFERENCES if name not in WRITTEN], data, limit=LIMIT))
    tasks |= run_tasks(scorer, Choice(list(WRITTEN), data, limit=WRITTEN_LIMIT, run_code=True))
    return Found(tasks, told)


@pytest.mark.slow
@pytest.mark.parametrize("task", REFERENCES)
def test_scores_are_those_of_an_independent_scorer(
    place: Path, knowing: PreTrainedModel, data: Path, found: Found, task: str
) -> None:
    file, score, metrics = REFERENCES[task]
    result = found.tasks[task]
    plain = Plain(knowing, load_tokenizer(place))
    expected = [score(plain, row) for row in rows(data, file, result.count)]
    for row in expected:
        for asked, told in row.asked.items():
            assert found.told[asked] == (told if isinstance(told, str) else pytest.approx(told, rel=1e-5, abs=1e-4))
    assert set(metrics) == set(result.metrics)
    for i, metric in enumerate(metrics):
        mine = result.metrics[metric].samples
        assert mine == [row.scores[i] for row in expected]
        assert result.metrics[metric].value == pytest.approx(sum(mine) / len(mine))
        if len(rows(data, file)) == 9:  # the made rows
            assert 0 < sum(mine) < len(mine)  # else a scorer that knows nothing would agree


def test_every_ready_task_has_a_reference_and_a_file() -> None:
    assert set(SUITES["local"]) == set(REFERENCES)
    assert {file for file, _, _ in REFERENCES.values()} == set(KINDS)


@pytest.mark.slow
def test_chance_and_breakdown(found: Found, data: Path) -> None:
    tasks = found.tasks
    assert tasks["local_arc_easy"].metrics["acc_norm"].chance == 0.25
    assert tasks["local_winogrande"].metrics["acc"].chance == 0.5
    assert tasks["local_triviaqa"].metrics["exact_match,stripped"].chance == 0
    blimp = tasks["local_blimp"]
    parts = blimp.breakdown["acc"]
    assert sum(count for _, count in parts.values()) == blimp.count
    total = sum(value * count for value, count in parts.values())
    assert total / blimp.count == pytest.approx(blimp.metrics["acc"].value)
    assert set(parts) == {row["UID"] for row in rows(data, "blimp")}


@pytest.mark.slow
def test_a_model_that_knows_nothing_is_at_chance_on_winogrande(
    place: Path, model: PreTrainedModel, shared_data: Path
) -> None:
    scorer = make_scorer(model, load_tokenizer(place), 8192)
    metric = run_tasks(scorer, Choice(["local_winogrande"], shared_data / "eval"))["local_winogrande"].metrics["acc"]
    assert metric.stderr is not None
    assert abs(metric.value - 0.5) < 3 * metric.stderr
    assert len(metric.samples) == 1267


def test_continuations_are_the_greedy_ones(place: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """In batches with padding at the left, up to the first stop."""
    tokenizer = load_tokenizer(place)
    plain, scorer = Plain(model, tokenizer), make_scorer(model, tokenizer, 2048)
    prompts = ["Question: how many?\nAnswer:", "a", "the river 水 runs past a mill of grey stones"]
    whole = [plain.write(prompt, 24, ["\0"]) for prompt in prompts]
    stop = whole[2][5:7]
    stops = [stop, "\n", ".", ","]
    result = scorer.generate_until(
        [
            Instance("generate_until", {}, (prompt, {"until": stops, "max_gen_toks": 24, "do_sample": False}), 0)
            for prompt in prompts
        ]
    )
    assert result == [min((text.split(stop)[0] for stop in stops), key=len) for text in whole]


def test_writing_ends_with_the_last_stop_or_end(
    place: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before, and not much later; requests of other lengths are other batches."""
    tokenizer = load_tokenizer(place)
    scorer = make_scorer(model, tokenizer, 2048)
    plain = Plain(model, tokenizer)
    prompts = ["one", "two and"]
    long = [plain.write(prompt, 40, ["\0"]) for prompt in prompts]
    steps: list[int] = []
    generate = Decoder.generate

    def counting(self: Decoder, prompts: Any, sampling: Any, *, on_tokens: Any, **rest: Any) -> Any:
        return generate(self, prompts, sampling, on_tokens=lambda ids: (steps.append(len(ids)), on_tokens(ids)), **rest)

    monkeypatch.setattr(Decoder, "generate", counting)

    def ask(wishes: list[dict[str, Any]]) -> list[str]:
        asked = zip(prompts, wishes, strict=True)
        return scorer.generate_until(
            [Instance("generate_until", {}, (p, {"do_sample": False, **w}), 0) for p, w in asked]
        )

    stops = [text[3:6] for text in long]
    wishes = [{"until": [stop], "max_gen_toks": 40} for stop in stops]
    assert ask(wishes) == [text.split(stop)[0] for text, stop in zip(long, stops, strict=True)]
    assert len(steps) == 16
    assert ask([wishes[0], {**wishes[1], "max_gen_toks": 20}]) == ask(wishes)
    steps.clear()
    assert ask([wishes[0], {"until": ["\0"], "max_gen_toks": 40}]) == [long[0].split(stops[0])[0], long[1]]
    assert len(steps) == 40
    # the first token that it writes taken for the end
    first = encode_text(tokenizer, prompts[0])
    ending = int(plain.logprobs([1, *first])[-1].argmax())
    scorer.tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ending)
    assert ask([{"until": ["\0"], "max_gen_toks": 40}] * 2)[0] == ""


@pytest.mark.parametrize(
    ("task", "texts", "expected"),
    [
        (
            "local_triviaqa",
            [" The Mill!", " mill", " a mill", ""],
            {"exact_match,stripped": [1, 1, 0, 0]},
        ),
        (
            "local_gsm8k",  # the answers are 1, 2, 3, 4
            [" 0 + 1 is 1.\n#### 1", " so 3, or 2.", " #### 2 and 3", " #### $4"],
            {"exact_match,strict": [1, 0, 0, 0], "exact_match,flexible": [1, 1, 1, 1]},
        ),
    ],
)
def test_written_answers_count_when_they_are_right(
    place: Path,
    model: PreTrainedModel,
    tmp_path: Path,
    task: str,
    texts: list[str],
    expected: dict[str, list[float]],
) -> None:
    scorer = make_scorer(model, load_tokenizer(place), 2048)
    scorer.generate_until = lambda asked, **rest: texts
    metrics = run_tasks(scorer, Choice([task], make_benchmarks(tmp_path, count=4)))[task].metrics
    assert {name: metric.samples for name, metric in metrics.items()} == expected


@pytest.fixture(scope="module")
def llama(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of another architecture."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    load_tokenizer(place).save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_another_architecture_scores_as_by_the_harness_itself(llama: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    data = make_benchmarks(tmp_path / "data")
    tasks = ["local_arc_easy", "local_commonsense_qa", "local_winogrande", "local_blimp", "local_triviaqa"]
    flags = ["--tasks", ",".join(tasks), "--data_dir", str(data), "--device", "cpu"]
    assert main(["eval", str(llama), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    mine = Results.read(tmp_path / "out" / RESULT_NAME).tasks
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data_dir": str(data)})  # type: ignore[dict-item]
    theirs = simple_evaluate(
        "hf", f"pretrained={llama}", tasks=list(tasks), task_manager=manager, batch_size=4, device="cpu"
    )
    assert theirs is not None
    for task in tasks:
        for name, metric in mine[task].metrics.items():
            key = name if "," in name else f"{name},none"
            assert metric.value == theirs["results"][task][key]
            scores = [s[name.partition(",")[0]] for s in theirs["samples"][task]]
            assert metric.samples == scores


def requests(rng: torch.Generator, count: int, longest: int) -> Iterator[tuple[Any, list[int], list[int]]]:
    for i in range(count):
        lengths = [int(torch.randint(1, longest, (), generator=rng)) for _ in range(2)]
        context, rest = (torch.randint(3, 32768, (n,), generator=rng).tolist() for n in lengths)
        yield None, context, rest
        yield ("a", str(i)), context, [rest[0]]  # shares its row with the next
        yield ("b", str(i)), context, [5]
        yield None, [*context, rest[0]], [7]


@pytest.mark.parametrize("cap", [None, 0.5])
def test_likelihoods_are_those_of_the_harness_for_any_batch(
    place: Path, model: PreTrainedModel, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "final_logit_softcapping", cap)
    tokenizer = load_tokenizer(place)
    asked = list(requests(torch.Generator().manual_seed(3), 12, 40))
    asked.append((None, [1] * 2100, [9, 8]))  # cut from the left
    asked.append((None, [1], [4] * 2048))
    expected = PlainScorer(model, tokenizer, 2048, False)._loglikelihood_tokens(asked, disable_tqdm=True)
    for batch_tokens in (1, 100, 100_000):
        found = DogeScorer(model, tokenizer, batch_tokens, False)._loglikelihood_tokens(asked, disable_tqdm=True)
        for (mine, greedy), (its, is_greedy) in zip(found, expected, strict=True):
            assert mine == pytest.approx(its, rel=1e-5)
            assert greedy is is_greedy


def test_the_likeliest_continuation_is_told(place: Path, model: PreTrainedModel) -> None:
    ids = [1, 500, 600]
    with torch.no_grad():
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    scorer = DogeScorer(model, load_tokenizer(place), 64, False)
    assert [greedy for _, greedy in scorer._loglikelihood_tokens([(None, ids, [best]), (None, ids, [best - 1])])] == [
        True,
        False,
    ]


def test_examples_are_shown_and_never_the_question_itself(place: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    data = make_benchmarks(tmp_path)
    scorer = make_scorer(model, load_tokenizer(place), 2048)
    seen: list[tuple[str, str]] = []
    scored = scorer._loglikelihood_tokens
    scorer._loglikelihood_tokens = lambda asked, *rest: seen.extend(a[0] for a in asked) or scored(asked, *rest)
    result = run_tasks(scorer, Choice(["local_copa"], data, num_fewshot=3))
    assert result["local_copa"].num_fewshot == 3
    for context, _ in seen:
        parts = context.split("\n\n")
        assert len(parts) == 4
        assert not any(part.startswith(parts[-1]) for part in parts[:-1])


GOOD = "def f(x):\n    return x + 1\n\ndef check(f):\n    assert f(1) == 2\ncheck(f)\n"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (GOOD, True),
        (GOOD.replace("+ 1", "+ 2"), False),
        ("import sys\nsys.exit(0)\n" + GOOD, False),  # has passed no test
        ("import os\nos._exit(0)\n", False),
        ("x = (", False),
        ("from __future__ import annotations\n" + GOOD, True),
        ("print('\udcff')\nopen('/dev/null').read()\n", True),
        ("x = bytearray(2**33)\n", False),
        ("open('big', 'wb').write(bytes(2**24))\n", False),
    ],
)
def test_programs_pass_or_fail(program: str, expected: bool) -> None:
    assert passes(program) is expected


def test_a_program_that_never_ends_is_ended_with_what_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True: pass\n"
    assert not passes(program, seconds=1.5)
    time.sleep(3.5)
    assert not mark.exists()


def test_what_a_model_writes_keeps_its_indentation(
    place: Path, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of right programs pass."""
    data = make_benchmarks(tmp_path)
    tokenizer = load_tokenizer(place)
    scorer = make_scorer(model, tokenizer, 2048)
    documents = rows(data, "humaneval")

    def right_ones(self: Decoder, prompts: list[list[int]], sampling: Any, *, on_tokens: Any, **rest: Any) -> None:
        written = []
        for ids in prompts:
            [row] = [row for row in documents if ids == [1, *encode_text(tokenizer, row["prompt"])]]
            whole = [1, *encode_text(tokenizer, row["prompt"] + row["canonical_solution"])]
            written.append(whole[len(ids) :])
        for tokens in zip_longest(*written, fillvalue=2):
            on_tokens(list(tokens))

    monkeypatch.setattr(Decoder, "generate", right_ones)
    result = run_tasks(scorer, Choice(["local_humaneval"], data, run_code=True))["local_humaneval"]
    assert result.metrics["pass_at_1"].samples == [1.0] * len(documents)
    assert result.metrics["pass_at_1"].chance == 0


def test_chat_is_what_the_template_makes_of_it(place: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """Control tokens of the template and no others; an answer as the assistant's turn has it."""
    data = make_benchmarks(tmp_path)
    (data / "copa.jsonl").write_text(
        '{"query": "a </s> [INST] \\ufdd0<s>\\ufdd0", "choices": ["the mill", "B"], "gold": 0}\n', encoding="utf-8"
    )
    tokenizer = load_tokenizer(place)
    scorer = make_scorer(model, tokenizer, 2048)
    seen: list[tuple[list[int], list[int]]] = []
    scored = scorer._loglikelihood_tokens
    scorer._loglikelihood_tokens = lambda asked, *rest: seen.extend(a[1:] for a in asked) or scored(asked, *rest)
    run_tasks(scorer, Choice(["local_copa"], data, chat=True, system="Be kind."))
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a </s> [INST] \ufdd0<s>\ufdd0"},
    ]
    for (context, rest), answer in zip(seen, ("the mill", "B"), strict=True):
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}])["input_ids"]
        assert [*context, *rest, tokenizer.eos_token_id] == whole
        assert context == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    prompts: list[list[int]] = []
    scorer._write = lambda ids, wishes: prompts.extend(ids) or [""] * len(ids)
    run_tasks(scorer, Choice(["local_triviaqa"], data, limit=1, chat=True))
    question = [{"role": "user", "content": rows(data, "triviaqa_sub3000")[0]["context"]}]
    assert prompts == [tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]]


def test_examples_of_trivia_show_the_answer(place: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    scorer = make_scorer(model, load_tokenizer(place), 2048)
    asked: list[str] = []
    scorer.generate_until = lambda requests, **rest: asked.extend(r.args[0] for r in requests) or [""] * len(requests)
    run_tasks(scorer, Choice(["local_triviaqa"], make_benchmarks(tmp_path), num_fewshot=2))
    assert all(text.count("Answer: mill\n") == 2 for text in asked)


def test_damaged_weights_are_told(place: Path, tmp_path: Path) -> None:
    broken = load_model(place, CPU)
    with torch.no_grad():
        broken.model.final_layernorm.weight[0] = math.nan
    for kind in (DogeScorer, PlainScorer):
        with pytest.raises(UserError, match="no numbers"):
            run_tasks(
                kind(broken, load_tokenizer(place), 2048, False), Choice(["local_copa"], make_benchmarks(tmp_path))
            )


def test_what_does_not_fit_is_counted_or_refused(place: Path, tmp_path: Path) -> None:
    short = make_model(tmp_path / "short", positions=16)
    data = make_benchmarks(tmp_path / "data")
    scorer = make_scorer(load_model(short, CPU), load_tokenizer(short), 2048)
    run_tasks(scorer, Choice(["local_arc_easy"], data))
    rows_of_file = rows(data, "arc_easy_test")
    tokenizer = load_tokenizer(short)
    lengths = [
        1 + len(encode_text(tokenizer, f"{asked(row)} {choice}")) for row in rows_of_file for choice in row["choices"]
    ]
    assert scorer.cut_requests == sum(length > 17 for length in lengths) > 0
    row = {"query": "q", "choices": ["a", " ".join(["river"] * 30)], "gold": 0}
    (data / "copa.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match=r"' river river.*tokens.*16"):
        run_tasks(scorer, Choice(["local_copa"], data))
    told: list[str] = []
    assert set(run_tasks(scorer, Choice(["local_arc_easy", "local_gsm8k"], data, fitting=True), told.append)) == {
        "local_arc_easy"
    }
    assert "local_gsm8k" in told[0]
    with pytest.raises(UserError, match="--num_fewshot 9 asks for more examples"):
        run_tasks(scorer, Choice(["local_openbookqa"], data, num_fewshot=9))


def test_programs_of_a_model_run_only_if_allowed(
    place: Path, model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_benchmarks(tmp_path / "data", count=2)
    names, left_out = local_suite(data, run_code=False)
    assert "local_humaneval" not in names
    assert any("--run_code" in line for line in left_out)
    flags = ["eval", str(place), "--data_dir", str(data), "--tasks", "local_humaneval", "--device", "cpu"]
    assert main(flags) == 1
    assert "--run_code" in capsys.readouterr().err
    scorer = make_scorer(model, load_tokenizer(place), 2048)
    scorer.generate_until = lambda asked, **rest: [f"    return x + {i}\n" for i in (0, 7)]  # right, wrong
    result = run_tasks(scorer, Choice(["local_humaneval"], data, run_code=True))["local_humaneval"]
    assert result.metrics["pass_at_1"].samples == [1.0, 0.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "choices": ["a"], "gold": 1}', "'gold' must be a whole number from 0 to 0"),
        ('{"query": "q", "choices": ["a", 3], "gold": 0}', "'choices' must be a list of strings"),
        ('{"query": "q", "choices": ["a", "b"]}', "'gold' is missing"),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', "none of them empty"),
        ('{"query": "a \\ud800 b", "choices": ["a", "b"], "gold": 0}', "surrogate"),
        ('{"query": 3, "choices": ["a", "b"], "gold": 0}', "'query' must be a string"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "'gold' must be a whole number"),
        ("{", "JSON"),
    ],
)
def test_bad_rows_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    good = '{"query": "q", "choices": ["a", "b"], "gold": 0}'
    (tmp_path / "copa.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    assert main(["eval", str(place), "--data_dir", str(tmp_path), "--tasks", "local_copa", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "copa.jsonl" in error
    assert "line 2" in error
    assert message in error
