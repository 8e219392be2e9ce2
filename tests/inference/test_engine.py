"""The engine: many texts at once, each as if it were alone. Against runs without a cache, and against itself alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from doge_lm.inference import engine as engine_module
from doge_lm.inference import slots as slots_module
from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.inference.engine import Engine, EngineFullError, EngineStoppedError, Piece, Task
from doge_lm.inference.sampling import Rule
from doge_lm.inference.slots import Slots
from tests.inference.test_decoding import tiny_llama_config, uncached, uncached_model
from tests.model.support import FORMS, random_ids, tiny_model, with_and_without_shifts

END = 2
GREEDY = Rule(temperature=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several wait for each other at every product where the cores have other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Letters:
    """What ids spell: a letter each, in place of a tokenizer."""

    def bytes_of(self, index: int) -> bytes:
        return chr(0x4E00 + index).encode()


def letters(ids: list[int]) -> str:
    return "".join(chr(0x4E00 + index) for index in ids)


class Answer:
    """Gathers the pieces of one submission."""

    def __init__(self, count: int = 1) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()
        self.begun = threading.Event()
        self._left = count

    def take(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.begun.set()
        self._left -= piece.is_last
        if not self._left:
            self.ended.set()

    def text(self, index: int = 0) -> str:
        assert self.ended.wait(120)
        return "".join(piece.text for piece in self.pieces if piece.index == index)

    @property
    def last(self) -> Piece:
        assert self.ended.wait(120)
        return self.pieces[-1]


@contextmanager
def running(slots: Slots, **options: Any) -> Iterator[Engine]:
    spelling: Any = Letters()
    engine = Engine(slots, spelling, options.pop("end", END), **{"threads": 1, **options})
    try:
        yield engine
    finally:
        engine.stop()
    assert not engine._thread.is_alive()


def ask(engine: Engine, task: Task) -> Answer:
    answer = Answer()
    engine.submit([task], answer.take)
    return answer


def prompt_of(length: int, seed: int) -> list[int]:
    return random_ids(1, length, seed=seed)[0].tolist()


def mixed_tasks(count: int) -> list[Task]:
    """Prompts of 1 to 40 tokens, answers of 1 to 20, greedy and drawn."""
    draw = random.Random(0)
    rules = [GREEDY, GREEDY, Rule(), Rule(temperature=0.7, top_p=0.8), Rule(temperature=0.0, repetition_penalty=1.5)]
    return [
        Task(prompt_of(draw.randint(1, 40), seed), draw.randint(1, 20), rules[seed % len(rules)], seed=seed)
        for seed in range(count)
    ]


# ------------------------------------------------------------------------------------------------------ correctness


@with_and_without_shifts
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_are_those_of_runs_without_a_cache(
    attention: str, form: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where a near tie of two tokens is out of the question. Prompts are read in pieces of 16."""
    monkeypatch.setattr(slots_module, "CHUNK", 16)
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    reference = tiny_model(dtype=torch.float64, **form)
    slots = Slots(tiny_model(dtype=torch.float64, attention=attention, **form), 12, 128)
    tasks = [Task(prompt_of(length, length), 20, GREEDY) for length in [1, 2, 15, 16, 17, 33, 70, 100] * 3]
    with running(slots, end=-1) as engine:
        answers = [ask(engine, task) for task in tasks]
        found = [answer.text() for answer in answers]
    for task, text in zip(tasks[:8], found, strict=False):
        assert text == letters(uncached(uncached_model(reference), list(task.prompt), 20))
    assert found[:8] == found[8:16] == found[16:]


@with_and_without_shifts
@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_drawn_answers_are_those_of_the_decoder_with_the_seed(penalty: float, form: dict[str, bool]) -> None:
    decoder = Decoder(tiny_model(dtype=torch.float64, **form))
    rule = Rule(temperature=1.4, top_k=20, top_p=0.9, repetition_penalty=penalty)
    with running(Slots(tiny_model(dtype=torch.float64, **form), 8, 128)) as engine:
        tasks = [Task(prompt_of(5 + seed, seed), 25, rule, seed=seed) for seed in range(8)]
        answers = [ask(engine, task) for task in tasks]
        for seed, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
            settings = Sampling(25, 1.4, 20, 0.9, penalty, seed=seed)
            (row,) = decoder.generate([task.prompt], settings, eos_token_id=END)
            assert answer.text() == letters([token for token in row if token != END])
            assert answer.last.count == len(row)
            assert answer.last.finish_reason == ("stop" if row[-1] == END else "length")


def test_a_llama_is_served_as_well() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config()).double().eval()
    prompts = [prompt_of(length, length) for length in (1, 9, 30)]
    expected = [letters(uncached(uncached_model(model), prompt, 12)) for prompt in prompts]
    with running(Slots(model, 4, 64), end=-1) as engine:
        answers = [ask(engine, Task(prompt, 12, GREEDY)) for prompt in prompts]
        assert [answer.text() for answer in answers] == expected


@pytest.mark.parametrize(
    ("form", "experts"),
    [
        pytest.param(form, experts, id=f"{experts}-{name}")
        for name, form in FORMS.items()
        for experts in ([0] if form.get("num_cdmmoe_experts") == 0 else [12, 64])
    ],
)
def test_company_changes_no_bit(form: dict[str, Any], experts: int) -> None:
    """64 answers at once, joining and leaving at different times, have the log-probabilities of each alone, exactly."""
    sizes = {"hidden_size": 48, "vocab_size": 500, **form, "num_cdmmoe_experts": experts}
    if not experts:
        sizes["private_expert_intermediate_size"] = 48
    tasks = [Task(task.prompt, task.max_tokens, task.rule, task.seed, logprobs=2) for task in mixed_tasks(80)]

    def written(answer: Answer) -> list[Any]:
        assert answer.ended.wait(120)
        return [token for piece in answer.pieces for token in piece.tokens]

    slots = Slots(tiny_model(**sizes), 64, 128)
    assert slots.texts_are_independent
    with running(slots) as engine:
        together = [written(answer) for answer in [ask(engine, task) for task in tasks]]
        alone = [written(ask(engine, task)) for task in tasks]
    assert together == alone
    with running(Slots(tiny_model(**sizes), 1, 128)) as engine:  # nor does the number of slots
        assert [written(ask(engine, task)) for task in tasks[:20]] == alone[:20]


def test_rows_agree_with_two_threads_too() -> None:
    torch.set_num_threads(2)
    assert Slots(tiny_model(hidden_size=48, vocab_size=500), 16, 128).texts_are_independent


def test_where_rows_depend_on_their_number_all_are_taken() -> None:
    """A model that sees the size of the batch is found out, and served by steps of one size."""
    model = tiny_model()
    forward = model.forward

    def sees_size(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + 1e-6 * len(kwargs["input_ids"])
        return out

    model.forward = sees_size
    slots = Slots(model, 32, 128)
    assert slots.texts_are_independent
    assert not slots._fewer_rows
    with running(slots) as engine:
        tasks = mixed_tasks(20)
        together = [answer.text() for answer in [ask(engine, task) for task in tasks]]
        assert together == [ask(engine, task).text() for task in tasks]


def test_gaps_are_filled_so_that_steps_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(tiny_model(), 32, 128)
    rows: list[int] = []
    step = slots.step

    def watched(ids: list[int], places: list[int]) -> torch.Tensor:
        rows.append(len(ids))
        return step(ids, places)

    monkeypatch.setattr(slots, "step", watched)
    with running(slots, end=-1) as engine:
        short = [Task(prompt_of(3, seed), 4, GREEDY) for seed in range(24)]
        long = [Task(prompt_of(3, 50 + seed), 60, GREEDY) for seed in range(4)]
        many = Answer(28)
        engine.submit([*short, *long], many.take)
        texts = [many.text(24 + index) for index in range(4)]
        assert max(rows) > 24
        assert rows[-1] <= slots_module.ROWS
        assert texts == [ask(engine, task).text() for task in long]


def test_what_is_no_number_does_not_reach_the_next_text_in_its_slot() -> None:
    slots = Slots(tiny_model(), 1, 64)
    task = Task(prompt_of(3, 1), 10, GREEDY)
    with running(slots, end=-1) as engine:
        expected = ask(engine, task).text()
        with torch.inference_mode():
            for layer in slots._cache.layers:
                layer.keys[0, :, :40] = torch.nan
        slots.clear(0, 40)
        assert ask(engine, task).text() == expected
        assert all(not layer.keys[0].any() for layer in slots._cache.layers)  # it has left nothing behind


@pytest.mark.gpu
def test_answers_on_a_gpu_are_the_decoders() -> None:
    decoder = Decoder(tiny_model(dtype=torch.float64).cuda())
    tasks = [Task(prompt_of(length, length), 20, GREEDY) for length in (1, 9, 40, 100)]
    with running(Slots(tiny_model(dtype=torch.float64).cuda(), 8, 128), end=-1) as engine:
        found = [answer.text() for answer in [ask(engine, task) for task in tasks]]
    assert found == [letters(row) for task in tasks for row in decoder.generate([task.prompt], Sampling(20))]


# --------------------------------------------------------------------------------------------- ends and limits


def test_stop_strings_end_an_answer_and_free_its_slot() -> None:
    with running(Slots(tiny_model(), 2, 128), end=-1) as engine:
        free = ask(engine, Task(prompt_of(5, 1), 30, GREEDY)).text()
        stop = free[7:10]
        answer = ask(engine, Task(prompt_of(5, 1), 30, GREEDY, stops=("nothing", stop)))
        assert answer.text() == free[: free.index(stop)]
        assert answer.last.finish_reason == "stop"
        assert answer.last.count == free.index(stop) + 3
        assert engine.load().running == 0


def test_logprobs_are_those_of_the_model() -> None:
    model = tiny_model(dtype=torch.float64)
    prompt = prompt_of(6, 0)
    with running(Slots(model, 2, 128), end=-1) as engine:
        answer = ask(engine, Task(prompt, 8, Rule(temperature=1.5), seed=0, logprobs=3))
        text = answer.text()
        tokens = [token for piece in answer.pieces for token in piece.tokens]
    ids = [token.chosen.token for token in tokens]
    assert letters(ids) == text
    reference = tiny_model(dtype=torch.float64)
    logits = uncached_model(reference)(torch.tensor([prompt + ids]))[0]
    for place, token in enumerate(tokens):
        expected = logits[len(prompt) + place - 1].log_softmax(-1)
        assert token.offset == place
        assert token.chosen.logprob == pytest.approx(float(expected[token.chosen.token]))
        best = sorted(range(61), key=lambda index: -float(expected[index]))[:3]
        assert [one.token for one in token.likeliest] == best


def test_cancelled_answers_leave_their_slots_and_the_queue() -> None:
    with running(Slots(tiny_model(), 1, 256), end=-1) as engine:
        first, second, third = Answer(), Answer(), Answer()
        task = Task(prompt_of(3, 0), 200, GREEDY)
        going = engine.submit([task], first.take)
        waiting = engine.submit([task], second.take)
        assert first.begun.wait(60)
        waiting.cancel()
        assert engine.load().waiting == 0
        engine.submit([Task(prompt_of(3, 0), 5, GREEDY)], third.take)
        going.cancel()
        assert third.last.count == 5
        assert not first.ended.is_set()
        assert not second.pieces
        going.cancel()  # of no effect any more
        assert engine.load().running == 0


def test_a_full_queue_takes_all_of_a_submission_or_none() -> None:
    with running(Slots(tiny_model(), 2, 256), end=-1, max_waiting=3) as engine:
        task = Task(prompt_of(3, 0), 200, GREEDY)
        first = Answer(3)
        submission = engine.submit([task] * 3, first.take)
        with pytest.raises(EngineFullError):
            engine.submit([task] * 3, Answer().take)
        second = engine.submit([task] * 2, Answer().take)
        with pytest.raises(EngineFullError):
            engine.submit([task], Answer().take)
        submission.cancel()
        second.cancel()
        assert ask_when_free(engine, Task(prompt_of(3, 0), 2, GREEDY)).last.count == 2


def ask_when_free(engine: Engine, task: Task) -> Answer:
    while True:
        try:
            return ask(engine, task)
        except EngineFullError:
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task([], 1), "at least one token"),
        (Task([3], 0), "at least one token"),
        (Task([61], 1), "below 61"),
        (Task([-1], 1), "below 61"),
        (Task([3] * 60, 5), "more than 64"),
    ],
    ids=str,
)
def test_tasks_that_cannot_be_served_are_refused(task: Task, message: str) -> None:
    with running(Slots(tiny_model(), 1, 64)) as engine:
        with pytest.raises(ValueError, match=message):
            engine.submit([task], Answer().take)
        assert ask(engine, Task([3] * 60, 4, GREEDY)).last.is_last  # a context that is filled to the last column


def test_a_stop_ends_what_is_under_way_and_waits() -> None:
    with running(Slots(tiny_model(), 1, 256), end=-1) as engine:
        answers = Answer(2)
        engine.submit([Task(prompt_of(3, 0), 250, GREEDY)] * 2, answers.take)
        engine.stop()
        assert all(isinstance(piece.error, EngineStoppedError) for piece in answers.pieces[-2:])
        assert engine.failure is None
        with pytest.raises(EngineStoppedError):
            ask(engine, Task([3], 1))


def test_a_step_that_fails_is_told_to_all_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(tiny_model(), 2, 256)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(slots, "step", fail)
    with running(slots, end=-1) as engine:
        answers = Answer(3)
        engine.submit([Task(prompt_of(3, 0), 250, GREEDY)] * 3, answers.take)
        last = answers.last
        assert last.error is not None
        assert isinstance(last.error.__cause__, ZeroDivisionError)
        assert isinstance(engine.failure, ZeroDivisionError)
        with pytest.raises(EngineStoppedError):
            ask(engine, Task([3], 1))


def test_pieces_of_a_step_are_posted_together() -> None:
    posted: list[Callable[[], None]] = []
    with running(Slots(tiny_model(), 4, 64), end=-1, post=posted.append) as engine:
        answers = Answer(4)
        engine.submit([Task(prompt_of(3, seed), 6, GREEDY) for seed in range(4)], answers.take)
        while engine.load().running or engine.load().waiting:
            time.sleep(0.01)
    assert not answers.pieces
    for run in posted:
        run()
    assert answers.ended.is_set()
    assert len(posted) <= 6


@pytest.mark.parametrize("rope_type", ["dynamic"])
def test_positions_that_follow_the_longest_text_are_refused(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="depend on each other"):
        Slots(LlamaForCausalLM(LlamaConfig(**{**tiny_llama_config().to_dict(), "rope_parameters": rope})), 2, 32)
