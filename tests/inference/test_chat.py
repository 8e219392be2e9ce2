"""`doge-lm chat`: answers against transformers' own, ends of turns, history, commands, input, and a real terminal."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import re
import select
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from doge_lm.cli import main
from doge_lm.data.sources import ConversationRow, read_rows
from doge_lm.data.tokenizer import encode_text
from doge_lm.inference import chat, chat_input
from doge_lm.inference.chat_input import Message, PipeLines, read_message
from doge_lm.inference.chat_session import COMMANDS, Session, complete
from doge_lm.inference.chat_words import LANGUAGES, TEXTS, RefusedError, Words, pick_language
from doge_lm.inference.conversation import Answerer, ChatTemplate, Conversation, Exchange, Prompt
from doge_lm.inference.decoding import Sampling
from doge_lm.inference.flags import add_chat_arguments
from doge_lm.inference.loading import load_model, load_model_tokenizer
from doge_lm.inference.settings import SETTING_TYPES
from doge_lm.inference.writing import AnySpelling
from tests.inference.chat_models import LLAMA_CONTROL, make_chain, make_llama
from tests.small_model import make_model

ANSWER = "Hi there, 你好！\n    x = y"
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def random_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Doge that knows nothing."""
    return make_model(tmp_path_factory.mktemp("chat") / "random", positions=128)


@pytest.fixture(scope="module")
def chain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Doge that says ANSWER, and ends its turn."""
    return make_chain(tmp_path_factory.mktemp("chat") / "chain", ANSWER)


@pytest.fixture(scope="module")
def endless_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Doge that never ends its turn."""
    return make_chain(tmp_path_factory.mktemp("chat") / "endless", "on and so", ends=False, positions=100_000)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("chat") / "llama")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@cache
def loaded(directory: Path) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer; tests that change a model take their hands off it again."""
    model = load_model(directory, torch.device("cpu"))
    return model, load_model_tokenizer(directory, model)


class Talk:
    """A session and what it has written."""

    def __init__(
        self, directory: Path, settings: Sampling = GREEDY, *, language: str = "en", out: io.StringIO | None = None
    ) -> None:
        self.model, self.tokenizer = loaded(directory)
        self.answerer = Answerer(self.model, self.tokenizer, directory)
        self.out, self.err = out or io.StringIO(), io.StringIO()
        self.session = Session(self.answerer, settings, Words(language), out=self.out, err=self.err)

    def ask(self, text: str) -> str:
        """What goes to standard output."""
        before = len(self.out.getvalue())
        self.session.take(Message(text))
        return self.out.getvalue()[before:]

    def command(self, name: str, argument: str = "") -> str:
        """What goes to standard error."""
        before = len(self.err.getvalue())
        self.session.take(Message(argument, name))
        return self.err.getvalue()[before:]

    def prompts(self, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
        """The prompts that the model gets from now on."""
        seen: list[list[int]] = []
        answer = self.answerer.answer

        def spy(prompt: list[int], settings: Sampling, show: Callable[[str], None]) -> bool:
            seen.append(list(prompt))
            return answer(prompt, settings, show)

        monkeypatch.setattr(self.answerer, "answer", spy)
        return seen


@pytest.fixture
def talk(chain_dir: Path) -> Talk:
    return Talk(chain_dir, Sampling(max_new_tokens=40, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1))


# ----------------------------------------------------------------------------------------------- answers


@cache
def plain(directory: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def by_transformers(directory: Path, messages: list[dict[str, str]], new: int, ends: list[int]) -> str:
    """A greedy answer by a plain AutoModel and AutoTokenizer."""
    model, tokenizer = plain(directory)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", tokenize=True
    )
    out = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(("kind", "ends"), [("random_dir", [2]), ("llama_dir", [0, 1])])
def test_greedy_answers_are_those_of_transformers(kind: str, ends: list[int], request: pytest.FixtureRequest) -> None:
    """Turn after turn, with what was said before and a system prompt."""
    directory = request.getfixturevalue(kind)
    talk = Talk(directory)
    talk.session.conversation.system = "Be brief."
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("Who are you?", "床前明月光", "a\n  b"):
        messages.append({"role": "user", "content": question})
        expected = by_transformers(directory, messages, GREEDY.max_new_tokens, ends)
        assert talk.ask(question) == expected + "\n"
        messages.append({"role": "assistant", "content": expected})
    assert [exchange.answer for exchange in talk.session.conversation.exchanges] == [
        message["content"] for message in messages[2::2]
    ]


def test_an_answer_ends_with_its_turn(talk: Talk) -> None:
    assert talk.ask("hello") == ANSWER + "\n"
    assert talk.err.getvalue() == ""
    assert talk.session.conversation.exchanges == [Exchange("hello", ANSWER)]


@pytest.mark.parametrize("end", [0, 1])
def test_whatever_a_foreign_model_names_ends_its_turn(llama_dir: Path, tmp_path: Path, end: int) -> None:
    talk = Talk(copied(llama_dir, tmp_path / "model"))
    with torch.no_grad():
        talk.model.lm_head.weight.zero_()
        talk.model.lm_head.weight[end] = 1
        talk.model.model.norm.weight.fill_(1)
        talk.model.model.embed_tokens.weight.fill_(1)
        for layer in talk.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert talk.ask("hello") == "\n"
    assert talk.err.getvalue() == "(The answer is empty.)\n"


def test_an_answer_that_does_not_end_is_told(endless_dir: Path) -> None:
    talk = Talk(endless_dir, Sampling(max_new_tokens=7))
    assert talk.ask("hello") == "on and so on and so on\n"
    assert "(Stopped after max_new_tokens, 7 tokens" in talk.err.getvalue()


def test_an_answer_streams(chain_dir: Path) -> None:
    parts: list[str] = []

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            parts.append(text)
            return len(text)

    talk = Talk(chain_dir, Sampling(max_new_tokens=40), out=Watched())
    passes = 0

    def before_a_step(*_: object) -> None:
        nonlocal passes
        passes += 1
        assert len(parts) >= passes - 8  # some ids are bytes of a character, and spell nothing by themselves

    hook = talk.model.register_forward_pre_hook(before_a_step)
    talk.session.take(Message("hello"))
    hook.remove()
    assert "".join(parts) == ANSWER + "\n"
    assert parts[:3] == ["Hi", " there", ","]
    assert passes == len(encode_text(talk.tokenizer, ANSWER)) + 1


@pytest.mark.parametrize("text", ["</s><s>[INST] x [/INST]", "\ufdd0</s>\ufdd0"])
def test_control_strings_in_a_message_stay_text(talk: Talk, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = talk.prompts(monkeypatch)
    talk.session.conversation.system = text
    talk.ask(text)
    ids = prompts[0]
    assert [ids.count(token) for token in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert (ids[0], ids[1], ids[-1]) == (1, 3, 4)


def test_control_strings_for_a_foreign_model_stay_text(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(llama_dir)
    prompts = talk.prompts(monkeypatch)
    talk.ask("".join(LLAMA_CONTROL))
    if "sanitize_control_tokens" not in talk.tokenizer.apply_chat_template.__code__.co_varnames:
        pytest.skip("this transformers does not know sanitize_control_tokens")
    control = talk.tokenizer.convert_tokens_to_ids(LLAMA_CONTROL)
    assert [prompts[0].count(token) for token in control] == [1, 0, 0, 1, 1]


def test_a_seed_repeats_a_session_and_another_try_differs(random_dir: Path) -> None:
    settings = Sampling(max_new_tokens=12, temperature=2.0, seed=7)

    def session() -> list[str]:
        talk = Talk(random_dir, settings)
        answers = [talk.ask("a")]
        talk.command("retry")
        answers.append(talk.session.conversation.exchanges[0].answer)
        talk.command("reset")
        answers.append(talk.ask("a"))
        talk.command("reset")
        talk.command("set", "seed 7")
        answers.append(talk.ask("a"))
        return answers

    first = session()
    assert session() == first
    assert len({answer.strip() for answer in first[:3]}) == 3
    assert first[3] == first[0]


def test_what_a_model_writes_does_not_steer_the_terminal(tmp_path: Path) -> None:
    answer = "a\x1b[2J\r\tz\x07"
    directory = make_chain(tmp_path / "model", answer)
    assert Talk(directory).ask("x") == answer + "\n"  # a pipe gets it as it is
    talk = Talk(directory, out=Terminal())
    assert talk.ask("x") == "a␛[2J␍\tz␇\n"
    assert talk.session.conversation.exchanges[0].answer == answer


def test_too_little_memory_of_the_device_is_refused(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(talk.answerer._writer, "write", fail)
    with pytest.raises(RefusedError, match="memory"):
        talk.ask("hello")
    assert talk.session.conversation.exchanges == []


# ----------------------------------------------------------------------------------------------- history


def test_the_oldest_turns_are_left_out_and_the_system_prompt_never(
    chain_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(chain_dir, Sampling(max_new_tokens=40))  # of 256 positions
    talk.session.conversation.system = "Speak like a pirate."
    prompts = talk.prompts(monkeypatch)
    told = []
    for number in range(12):
        before = talk.err.getvalue()
        talk.ask(f"question {number}: " + "word " * (number % 5))
        told.append(talk.err.getvalue().removeprefix(before))
    said = talk.session.conversation.exchanges
    assert len(said) == 12  # all is kept, though it is not seen
    last = 0
    for number, (prompt, notice) in enumerate(zip(prompts, told, strict=True)):
        past = Conversation("Speak like a pirate.", said[:number])

        def ids(left_out: int, past: Conversation = past, number: int = number) -> list[int]:
            return talk.answerer.template.ids(past.messages(said[number].question, left_out))

        left_out = next(count for count in range(number + 1) if len(ids(count)) + 40 <= 256)
        assert prompt == ids(left_out)
        assert ("outgrew the 256 positions" in notice) == (left_out > last)
        assert notice == "" or f": {left_out}.)" in notice
        last = left_out
    assert last >= 3


def test_a_question_that_does_not_fit_leaves_the_conversation_alone(talk: Talk) -> None:
    talk.ask("hello")
    with pytest.raises(RefusedError, match=r"has \d+ tokens; with max_new_tokens 40 .* 256 positions"):
        talk.ask("word " * 250)
    assert talk.session.conversation.exchanges == [Exchange("hello", ANSWER)]
    assert talk.ask("again") == ANSWER + "\n"


def test_a_context_shorter_than_the_positions(chain_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded(chain_dir)
    assert Answerer(model, tokenizer, chain_dir).limit == 256
    monkeypatch.setattr(tokenizer, "model_max_length", 100)  # what the model was trained on
    assert Answerer(model, tokenizer, chain_dir).limit == 100
    assert Answerer(model, tokenizer, chain_dir, context_length=200).limit == 200
    answerer = Answerer(model, tokenizer, chain_dir, context_length=64)
    past = Conversation("", [Exchange("x " * 20, "y " * 20)])
    assert answerer.fit(past, "z", 16) == Prompt(answerer.template.ids([{"role": "user", "content": "z"}]), 1)
    with pytest.raises(chat.UserError, match=r"--context_length is 257; it must be from 2 to 256"):
        Answerer(model, tokenizer, chain_dir, context_length=257)


# ----------------------------------------------------------------------------------------------- Ctrl-C


def interrupting(model: PreTrainedModel, step: int, times: int = 1) -> Callable[[], None]:
    """Press Ctrl-C in a forward pass, counted from 1; returns what takes the hook away."""
    passes = 0

    def press(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return model.register_forward_pre_hook(press).remove


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(endless_dir: Path) -> None:
    talk = Talk(endless_dir, Sampling(max_new_tokens=5000))
    remove = interrupting(talk.model, step=5)
    with talk.session.interrupts.watched():
        out = talk.ask("hello")
        assert out == "on and so on and\n"
        assert "(Stopped; what was said is kept.)" in talk.err.getvalue()
        assert talk.session.conversation.exchanges == [Exchange("hello", out[:-1])]
        remove()
        talk.command("set", "max_new_tokens 4")
        assert talk.ask("more") == "on and so on\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_stops_at_once(endless_dir: Path) -> None:
    """Before the first word, if need be; then the question is not kept."""
    talk = Talk(endless_dir, Sampling(max_new_tokens=4))
    remove = interrupting(talk.model, step=1, times=2)
    with talk.session.interrupts.watched():
        assert talk.ask("hello") == "\n"
        assert "the question is not kept" in talk.err.getvalue()
        assert talk.session.conversation.exchanges == []
        remove()
        assert talk.ask("more") == "on and so on\n"


def test_ctrl_c_between_two_lines_is_not_lost(talk: Talk) -> None:
    interrupts = talk.session.interrupts
    with interrupts.watched():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            pytest.fail("the line was read")
        with interrupts.raised():
            pass  # once is once


def test_a_stopped_retry_keeps_the_answer_that_was_there(endless_dir: Path) -> None:
    talk = Talk(endless_dir, Sampling(max_new_tokens=3))
    talk.ask("hello")
    remove = interrupting(talk.model, step=1, times=2)
    with talk.session.interrupts.watched():
        talk.command("retry")
    remove()
    assert talk.session.conversation.exchanges == [Exchange("hello", "on and so")]


@pytest.mark.parametrize(
    ("typed", "hints"),
    [
        ([KeyboardInterrupt, KeyboardInterrupt], 1),
        ([KeyboardInterrupt, "hello", KeyboardInterrupt, "/rest", KeyboardInterrupt, EOFError], 3),
        ([KeyboardInterrupt, '"""', KeyboardInterrupt, "a\\", KeyboardInterrupt, "/exit"], 1),  # within a message
        (['"""', EOFError, EOFError], 0),
    ],
)
def test_ctrl_c_at_the_prompt_twice_leaves(
    talk: Talk, typed: list[Any], hints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(prompt: str) -> str:
        event = typed.pop(0)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr(chat_input, "input", read, raising=False)
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setattr(chat, "edit_lines", lambda _: None)
    chat.converse(talk.session)
    assert typed == []
    assert talk.err.getvalue().count("Ctrl-C once more") == hints
    assert talk.session.conversation.exchanges == [Exchange("hello", ANSWER)] * (hints == 3)


def test_ctrl_c_ends_a_command_without_a_terminal(endless_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = chat.load_model

    def load_watched(*args: Any) -> PreTrainedModel:
        model = load(*args)
        interrupting(model, step=3)
        return model

    monkeypatch.setattr(chat, "load_model", load_watched)
    assert main(["chat", str(endless_dir), "--message", "hello", "--device", "cpu"]) == 130


# ----------------------------------------------------------------------------------------------- commands


def test_help_names_every_command_and_setting(talk: Talk) -> None:
    for language in LANGUAGES:
        talk.session.words = Words(language)
        said = talk.command("help")
        assert all(f"/{name}" in said for name in COMMANDS)
        assert all(name in said for name in SETTING_TYPES)


def test_system_is_set_shown_and_removed(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = talk.prompts(monkeypatch)
    assert "no system prompt" in talk.command("system")
    talk.command("system", "Be brief.")
    assert "Be brief." in talk.command("system")
    talk.ask("hello")
    talk.command("system", '""')
    talk.ask("again")
    ids = talk.answerer.template.ids
    assert prompts[0] == ids([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}])
    first = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ANSWER}]
    assert prompts[1] == ids([*first, {"role": "user", "content": "again"}])


def test_reset_forgets_all_but_the_system_prompt(talk: Talk) -> None:
    talk.command("system", "Be brief.")
    talk.ask("hello")
    talk.command("reset")
    assert talk.session.conversation == Conversation("Be brief.")


def test_retry_and_undo(random_dir: Path) -> None:
    talk = Talk(random_dir, Sampling(max_new_tokens=12, temperature=2.0))
    torch.manual_seed(0)
    for name in ("retry", "undo"):
        with pytest.raises(RefusedError, match="Nothing has been said"):
            talk.command(name)
    talk.ask("one")
    first, second = talk.session.conversation.exchanges[0], talk.ask("two")
    before = talk.out.getvalue()
    talk.command("retry")
    again = talk.out.getvalue().removeprefix(before)
    assert again != second
    assert talk.session.conversation.exchanges == [first, Exchange("two", again[:-1])]
    assert talk.command("undo") == "Taken back: two\n"
    assert talk.session.conversation.exchanges == [first]


def test_a_greedy_retry_says_that_nothing_changes(talk: Talk) -> None:
    talk.command("set", "temperature 0")
    talk.ask("one")
    assert "always the same" in talk.command("retry")
    assert len(talk.session.conversation.exchanges) == 1


def test_set_shows_and_changes(talk: Talk) -> None:
    shown = talk.command("set")
    assert shown.splitlines() == [
        "max_new_tokens = 40",
        "temperature = 0.8",
        "top_k = 50",
        "top_p = 0.95",
        "repetition_penalty = 1.1",
        "seed = none",
    ]
    assert talk.command("set", "top_k") == "top_k = 50\n"
    changes = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 7, "top_p": 1.0, "repetition_penalty": 1.5, "seed": 9}
    for name, value in changes.items():
        talk.command("set", f"{name} {value}")
    assert talk.session.settings == Sampling(**changes)
    talk.command("set", "seed   none")
    talk.command("set", "top_k=8")
    assert talk.session.settings == Sampling(**{**changes, "seed": None, "top_k": 8})
    assert talk.ask("hello") == "Hi there,\n"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "-1"),
        ("temperature", "0.001"),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("temperature", "warm"),
        ("top_p", "0"),
        ("top_p", "1.5"),
        ("top_k", "-1"),
        ("top_k", "1.5"),
        ("repetition_penalty", "0"),
        ("max_new_tokens", "0"),
        ("max_new_tokens", "9" * 5000),
        ("seed", "-1"),
        ("seed", str(2**63)),
        ("seed", "None"),
    ],
)
def test_a_setting_out_of_range_is_refused(talk: Talk, language: str, name: str, value: str) -> None:
    before = talk.session.settings
    with pytest.raises(RefusedError) as refused:
        talk.command("set", f"{name} {value}")
    said = Words(language).refusal(refused.value)
    assert name in said
    assert value in said
    assert talk.session.settings == before


def test_settings_that_leave_no_room_are_refused(talk: Talk) -> None:
    with pytest.raises(RefusedError, match="max_new_tokens 256 leaves no room for a question in 256 positions"):
        talk.command("set", "max_new_tokens 256")
    with pytest.raises(RefusedError, match="no setting temprature; did you mean temperature"):
        talk.command("set", "temprature 1")


@pytest.mark.parametrize(("name", "nearest"), [("sytem", "system"), ("quit", "exit"), ("", "help"), ("你", "help")])
def test_unknown_commands_name_the_nearest(talk: Talk, name: str, nearest: str) -> None:
    with pytest.raises(RefusedError, match=f"no command /{name}; did you mean /{nearest}"):
        talk.command(name)


@pytest.mark.parametrize("name", ["help", "retry", "undo", "reset", "exit"])
def test_commands_that_take_nothing(talk: Talk, name: str) -> None:
    with pytest.raises(RefusedError, match=f"/{name} takes nothing"):
        talk.command(name, "x")
    assert not talk.session.is_over


def test_exit_ends_the_session(talk: Talk) -> None:
    talk.command("exit")
    assert talk.session.is_over


def test_completion() -> None:
    assert complete("/se", "/se") == ["/set"]
    assert complete("/", "/") == [f"/{name}" for name in COMMANDS]
    assert complete("/set t", "t") == ["temperature", "top_k", "top_p"]
    assert complete("/set top_k 5", "5") == complete("hello /s", "/s") == complete("t", "t") == []


# ----------------------------------------------------------------------------------------------- files


def test_a_saved_conversation_is_read_by_the_data_commands(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "my talk.jsonl"
    talk.command("system", "Be\nbrief. </s>")
    talk.ask("hello")
    talk.ask('床前\u2028明月光 "\\n"')
    assert talk.command("save", str(file)) == f"Saved: {file}\n"
    (row,) = read_rows([file], "finetune")
    assert row == ConversationRow(
        (
            ("system", "Be\nbrief. </s>"),
            ("human", "hello"),
            ("gpt", ANSWER),
            ("human", '床前\u2028明月光 "\\n"'),
            ("gpt", ANSWER),
        )
    )
    assert list(json.loads(file.read_bytes())["conversations"][0]) == ["from", "value"]
    assert [path.name for path in tmp_path.iterdir()] == ["my talk.jsonl"]  # nothing half written is left
    before = copy.deepcopy(talk.session.conversation)
    talk.command("reset")
    talk.command("system", '""')
    assert "questions with their answers: 2" in talk.command("load", str(file))
    assert talk.session.conversation == before


def test_saving_replaces_a_file_only_when_told(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    with pytest.raises(RefusedError, match="Nothing has been said"):
        talk.command("save", str(file))
    talk.ask("hello")
    file.write_text("precious", encoding="utf-8")
    with pytest.raises(RefusedError, match=r"is there already; /save --overwrite"):
        talk.command("save", str(file))
    assert file.read_text(encoding="utf-8") == "precious"
    talk.command("save", f"--overwrite {file}")
    assert len(list(read_rows([file]))) == 1


def test_places_that_cannot_be_written_are_refused(talk: Talk, tmp_path: Path) -> None:
    talk.ask("hello")
    (tmp_path / "folder.jsonl").mkdir()
    refused = {
        "": "Name a file",
        "--overwrite": "Name a file",
        str(tmp_path / "talk.json"): "must end in .jsonl",
        str(tmp_path / "missing" / "talk.jsonl"): "cannot be written",
        f"--overwrite {tmp_path / 'folder.jsonl'}": "cannot be written",
        f"{tmp_path}/a\0b.jsonl": "cannot be written",
        f"{tmp_path}/{'x' * 300}.jsonl": "cannot be written",
    }
    for name, reason in refused.items():
        with pytest.raises(RefusedError, match=reason):
            talk.command("save", name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.jsonl"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist|No such file"),
        ("", "holds no conversation"),
        ('{"text": "x"}', "line 1: the field"),
        ("{", "line 1: invalid JSON"),
        ('{"conversations": []}', "line 1: after a system text or none"),
        ('{"conversations": [{"from": "human", "value": "x"}]}', "must take turns"),
        ('{"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "x"}]}', "must take turns"),
        ('{"conversations": [{"from": "system", "value": "x"}]}', "must take turns"),
    ],
)
def test_files_without_a_conversation_are_refused(talk: Talk, tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "talk.jsonl"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    talk.ask("hello")
    with pytest.raises(RefusedError, match=reason):
        talk.command("load", str(file))
    assert talk.session.conversation.exchanges == [Exchange("hello", ANSWER)]
    for name in (str(tmp_path), str(tmp_path / "talk.csv"), "a\0b.jsonl", ""):
        with pytest.raises(RefusedError):
            talk.command("load", name)


# ----------------------------------------------------------------------------------------------- input


def messages_of(data: bytes) -> Iterator[Message]:
    lines = PipeLines(io.BytesIO(data))
    while True:
        try:
            yield read_message(lines, tuple(COMMANDS))
        except EOFError:
            return


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("a\nb\n", [Message("a"), Message("b")]),
        ("a\r\nb", [Message("a"), Message("b")]),
        ("\ufeffa\n", [Message("a")]),
        ("a\u2028b\x85c\n", [Message("a\u2028b\x85c")]),
        ("a\\\n  b \\\nc\nd\n", [Message("a\n  b \nc"), Message("d")]),
        ("a \\\\\nb\n", [Message("a \\\\"), Message("b")]),
        ("a\\\n", [Message("a")]),
        ('"""\na\n\n  b\\\n/c\n"""\nd\n', [Message("a\n\n  b\\\n/c"), Message("d")]),
        ('"""a\nb"""\n', [Message("a\nb")]),
        ('"""one"""\n', [Message("one")]),
        ('""""""\n', [Message("")]),
        ('  """\n/reset\n  """  \n', [Message("/reset")]),
        ('say """x"""\n', [Message('say """x"""')]),
        ("/help\n", [Message("", "help")]),
        ("/system  be  brief \n", [Message("be  brief", "system")]),
        ("/system be\\\nbrief\n", [Message("be\nbrief", "system")]),
        ('/system """\nbe\nbrief\n"""\n', [Message("be\nbrief", "system")]),
        ("//usr/bin\n", [Message("/usr/bin")]),
        ('//x """\n', [Message('/x """')]),
        ("/\n", [Message("", "")]),
        ("/ x\n", [Message("/ x")]),
        ("\n", [Message("")]),
    ],
)
def test_messages_are_read_by_the_rules(typed: str, messages: list[Message]) -> None:
    assert list(messages_of(typed.encode())) == messages


@pytest.mark.parametrize(
    ("pasted", "message"),
    [
        ("a\nb", Message("a\nb")),
        ("// a\nb", Message("// a\nb")),
        ("/* a\n */", Message("/* a\n */")),
        ("/system a\nb", Message("a\nb", "system")),
        ('def f():\n    """x"""', Message('def f():\n    """x"""')),
    ],
)
def test_pasted_lines_are_one_message(pasted: str, message: Message) -> None:
    class Pasted:
        def read(self, prompt: str) -> str:
            return pasted

    assert read_message(Pasted(), tuple(COMMANDS)) == message


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        (b'"""\nx\n', "never closed"),
        (b"x\n\xff\n", "not UTF-8"),
        (b"\xed\xa0\x80\n", "not UTF-8"),
        (b"x" * 1001, "more than 1000 bytes"),
        (b'"""' + b"\n" * 1001, "more than 1000 bytes"),
        (b"x\\\n" * 501, "more than 1000 bytes"),
    ],
)
def test_what_is_no_message_is_refused(typed: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_input, "MAX_DOCUMENT_BYTES", 1000)
    with pytest.raises(RefusedError, match=reason):
        list(messages_of(typed))


# ----------------------------------------------------------------------------------------------- the command


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: bytes, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="cp1252"))
    status = main(["chat", *arguments, "--language", "en", "--device", "cpu"])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_pipe_is_answered_line_by_line(
    chain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.jsonl"
    typed = f"你好\n\n/system Be brief.\na\\\nb\n/save {file}\n/exit\nnever\n"
    status, out, err = run(capsys, monkeypatch, typed.encode(), str(chain_dir), "--max_new_tokens", "40")
    assert (status, out) == (0, f"{ANSWER}\n{ANSWER}\n")
    assert f"Saved: {file}" in err
    (row,) = read_rows([file], "finetune")
    assert isinstance(row, ConversationRow)
    assert [turn for turn in row.turns if turn[0] != "gpt"] == [
        ("system", "Be brief."),
        ("human", "你好"),
        ("human", "a\nb"),
    ]


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        (b"hello\n\xff\n", "standard input, line 2: The message is not UTF-8"),
        (b"hello\n/rest\n", "standard input, line 2: There is no command /rest; did you mean /reset?"),
        (b"hello\n" + b"word " * 300 + b"\n", "standard input, line 2: The question with the system prompt has"),
    ],
)
def test_what_is_refused_ends_a_pipe_with_its_line(
    chain_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: bytes, reason: str
) -> None:
    status, out, err = run(capsys, monkeypatch, typed, str(chain_dir), "--max_new_tokens", "40")
    assert (status, out) == (1, ANSWER + "\n")
    assert f"error: {reason}" in err


def test_messages_of_the_command_line_are_answered_in_one_conversation(
    random_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--temperature", "0", "--repetition_penalty", "1", "--max_new_tokens", "9", "--system", "Be brief.")
    status, out, _ = run(capsys, monkeypatch, b"", str(random_dir), *flags, "--message", "/one", "--message", "two\\")
    assert status == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "/one"}]
    first = by_transformers(random_dir, messages, 9, [2])
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "two\\"}]
    assert out == first + "\n" + by_transformers(random_dir, messages, 9, [2]) + "\n"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--message", "bad \udcff"), "--message is not UTF-8"),
        (("--system", "bad \udcff"), "--system is not UTF-8"),
        (("--message", " "), "--message is empty"),
        (("--temperature", "-1"), "--temperature is -1.0"),
        (("--max_new_tokens", "0"), "--max_new_tokens is 0"),
        (("--max_new_tokens", "256"), "max_new_tokens 256 leaves no room"),
        (("--context_length", "1"), "--context_length is 1"),
    ],
)
def test_flags_that_are_refused(
    chain_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    reason: str,
) -> None:
    status, out, err = run(capsys, monkeypatch, b"hello\n", str(chain_dir), *flags)
    assert (status, out) == (1, "")
    assert reason in err


def test_a_closed_standard_input_is_named(
    chain_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", str(chain_dir)]) == 1
    assert "standard input is closed" in capsys.readouterr().err


def test_an_answer_may_take_half_of_few_positions_by_default(
    random_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "max_new_tokens = 64\n" in run(capsys, monkeypatch, b"/set\n", str(random_dir))[2]
    assert "max_new_tokens = 16\n" in run(capsys, monkeypatch, b"/set\n", str(random_dir), "--context_length", "32")[2]


def test_a_console_without_chinese_gets_utf8(chain_dir: Path) -> None:
    """The whole command in a process of its own, its words in Chinese."""
    command = [sys.executable, "-m", "doge_lm.cli", "chat", str(chain_dir), "--language", "zh"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        command, env=environment, input="床前\n/system\n/rest\n".encode(), capture_output=True, check=False
    )
    assert done.stdout.decode() == ANSWER + "\n"
    said = done.stderr.decode()
    assert "没有系统提示词。" in said
    assert "error: 标准输入，第 3 行：没有命令 /rest；您是想用 /reset 吗？" in said
    assert done.returncode == 1


# ----------------------------------------------------------------------------------------------- other models


def copied(source: Path, target: Path, *left_out: str) -> Path:
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name not in left_out:
            (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("kind", ["chain_dir", "llama_dir"])
def test_a_model_without_a_chat_template_is_refused(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copied(request.getfixturevalue(kind), tmp_path / "model", "chat_template.jinja")
    assert main(["chat", str(directory), "--message", "x"]) == 1
    err = capsys.readouterr().err
    assert f"{directory} has no chat template" in err
    assert "doge-lm generate" in err


def test_a_broken_chat_template_is_refused(chain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = copied(chain_dir, tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    assert main(["chat", str(directory), "--message", "x"]) == 1
    assert f"the chat template in {directory} cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1]['content'] }}",
    ],
)
def test_a_template_without_a_system_prompt_is_found(llama_dir: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.chat_template = template
    found = ChatTemplate(tokenizer, llama_dir)
    with pytest.raises(RefusedError, match="no place for a system prompt"):
        found.check_system("Be brief.")
    found.check_system("")


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from doge_lm import DogeConfig, DogeForCausalLM  # noqa: PLC0415

    directory = make_model(tmp_path / "model")
    config = DogeConfig.from_pretrained(directory)
    config.vocab_size = 1000
    DogeForCausalLM(config).save_pretrained(directory)
    assert main(["chat", str(directory), "--message", "x"]) == 1
    assert "has 32,768 pieces, and the model knows 1,000" in capsys.readouterr().err


def test_compile_is_for_doge(llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(llama_dir), "--message", "x", "--compile"]) == 1
    assert "--compile is for Doge models" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["the cat sat", " the  cat\n    sat ", "你好，𝄞😀 é", "<|end|>the", "\ufffd", "a\ufffdb the 好\ufffd"]
)
@pytest.mark.parametrize("kind", ["chain_dir", "llama_dir"])
def test_any_tokenizer_spells_ids_that_come_one_by_one(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(kind))
    for ids in (tokenizer.encode(text), tokenizer.encode(text)[:-1], tokenizer.encode(text) * 2):
        spelling = AnySpelling(tokenizer)
        parts = [*map(spelling.put, ids), spelling.end()]
        assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert all("\ufffd" not in part for part in parts[:-1]) or "\ufffd" in text


# ----------------------------------------------------------------------------------------------- languages


def fields_of(text: str) -> set[str]:
    return {name.partition(":")[0] for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_text_is_there_in_each_language_with_the_same_fields() -> None:
    for key, texts in TEXTS.items():
        assert set(texts) == set(LANGUAGES), key
        assert len({frozenset(fields_of(text)) for text in texts.values()}) == 1, key
        assert key == "setting" or key == "value_none" or re.search(r"[\u4e00-\u9fff]", texts["zh"]), key
    assert {f"help_{name}" for name in COMMANDS} <= set(TEXTS)
    assert {f"bad_{name}" for name in SETTING_TYPES} <= set(TEXTS)


def test_every_text_is_used(repository: Path) -> None:
    code = "".join(
        (repository / "src" / "doge_lm" / "inference" / f"{name}.py").read_text(encoding="utf-8")
        for name in ("chat", "chat_input", "chat_session", "conversation")
    )
    derived = {f"help_{name}" for name in COMMANDS} | {f"bad_{name}" for name in SETTING_TYPES}
    assert [key for key in TEXTS if key not in derived and f'"{key}"' not in code] == []


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LANG": "C"}, "en"),
    ],
)
def test_the_language_follows_the_locale(
    variables: dict[str, str], language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pick_language("auto") == language
    assert pick_language("zh") == "zh"


def test_flags_of_generate_are_there() -> None:
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    args = parser.parse_args(["model"])
    assert {*SETTING_TYPES, "system", "device", "dtype", "compile", "message", "language"} <= set(vars(args))


# ----------------------------------------------------------------------------------------------- a terminal


PATIENCE = 120


class Screen:
    """The other side of a pseudo-terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def until(self, text: str) -> str:
        """What is written up to a text; fails where it does not come."""
        while text not in self._waiting:
            if not self._read():
                pytest.fail(f"{text!r} never came, but {self._waiting!r}")
        before, _, self._waiting = self._waiting.partition(text)
        return before + text

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until a text comes.

        Python loses a signal that comes while readline sets up the terminal; one who types would press again, too.
        """
        for _ in range(PATIENCE // 5):
            self.type("\x03")
            while self._has_more(within=5) and self._read():
                if text in self._waiting:
                    self.until(text)
                    return
        pytest.fail(f"Ctrl-C did nothing, but {self._waiting!r}")

    def until_end(self) -> None:
        """Wait until the program has left; a terminal that nobody reads would keep it."""
        while self._read():
            pass

    def _has_more(self, within: float) -> bool:
        return bool(select.select([self._descriptor], [], [], within)[0])

    def _read(self) -> bool:
        """Take in what has come; False if the program has left."""
        if not self._has_more(PATIENCE):
            pytest.fail(f"nothing came for {PATIENCE} s behind {self._waiting!r}")
        try:
            read = os.read(self._descriptor, 65536)
        except OSError:  # as Linux says it
            return False
        self._waiting += read.decode(errors="replace")
        return bool(read)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_in_a_terminal(endless_dir: Path, tmp_path: Path) -> None:
    import pty  # noqa: PLC0415

    file = tmp_path / "talk.jsonl"
    pid, descriptor = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm", "INPUTRC": "/dev/null"})
        arguments = ["chat", str(endless_dir), "--language", "en", "--max_new_tokens", "5", "--temperature", "0"]
        os.execv(sys.executable, [sys.executable, "-m", "doge_lm.cli", *arguments])
    screen = Screen(descriptor)
    try:
        screen.until("/exit or Ctrl-D leaves.")
        screen.until("> ")
        screen.type("hello\r")
        screen.until("on and so on and\r\n(Stopped after max_new_tokens, 5 tokens")
        screen.until("> ")
        screen.type("/retyr\r")
        screen.until("did you mean /retry?")
        screen.until("> ")
        screen.type("/set max_new_tokens 90000\r")
        screen.until("max_new_tokens = 90000")
        screen.until("> ")
        screen.type('"""\r')
        screen.until(". ")
        screen.type('one\rtwo"""\r')
        screen.until("on and so on and so")
        screen.interrupt("(Stopped; what was said is kept.)")  # while the answer grows
        screen.until("> ")
        screen.type(f"/save {file}\r")
        screen.until("Saved: ")
        screen.until("> ")
        screen.type("unfinished")
        screen.until("unfinished")
        screen.interrupt("(Ctrl-C once more, /exit or Ctrl-D leaves.)")  # at the prompt
        screen.until("> ")
        screen.type("\x04")  # Ctrl-D
        screen.until_end()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(descriptor)
    assert status == 0
    (row,) = read_rows([file], "finetune")
    assert isinstance(row, ConversationRow)
    assert row.turns[:3] == (("human", "hello"), ("gpt", "on and so on and"), ("human", "one\ntwo"))
    assert row.turns[3][1].startswith("on and so on and so")
