"""`doge-lm serve` over HTTP: what it takes and gives, whom it serves, and how it ends."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from pydantic import ValidationError

from doge_lm.cli import main
from doge_lm.data.tokenizer import encode_text, load_tokenizer
from doge_lm.errors import UserError
from doge_lm.inference import gate, serve
from doge_lm.inference.api import ChatCompletion, ChatRequest, Completion, CompletionRequest
from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.inference.loading import load_model
from doge_lm.inference.server import Settings
from doge_lm.inference.service import Limits
from doge_lm.inference.slots import Slots
from tests.conftest import spare_what_is_there
from tests.inference.serving import Reply, Serving, rest_of, serving, serving_process
from tests.small_model import make_model

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several wait for each other at every product where the cores have other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Serving]:
    with serving(place) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


class Reference:
    """Greedy answers of the decoder, one prompt at a time."""

    def __init__(self, place: Path) -> None:
        self.tokenizer = load_tokenizer(place)
        self._decoder = Decoder(load_model(place, torch.device("cpu"), "float32"))

    def complete(self, prompt: str, count: int) -> str:
        ids = [self.tokenizer.bos_token_id, *encode_text(self.tokenizer, prompt)]
        (row,) = self._decoder.generate([ids], Sampling(count), eos_token_id=self.tokenizer.eos_token_id)
        whole = self.tokenizer.decode(ids + row, skip_special_tokens=True)
        return whole.removeprefix(self.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def reference(place: Path) -> Reference:
    return Reference(place)


# ------------------------------------------------------------------------------------------------- OpenAI's client


def test_models_are_listed(client: OpenAI, server: Serving) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve(server.model).id == server.model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_is_the_decoders(client: OpenAI, server: Serving, reference: Reference) -> None:
    found = client.completions.create(model=server.model, prompt="Once upon a time", max_tokens=20, temperature=0)
    assert found.choices[0].text == reference.complete("Once upon a time", 20)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    prompt_tokens = 1 + len(encode_text(reference.tokenizer, "Once upon a time"))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt_tokens, 20)
    assert found.usage.total_tokens == prompt_tokens + 20
    default = client.completions.create(model=server.model, prompt="Once", temperature=0)
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_a_stream_is_the_whole_in_parts(client: OpenAI, server: Serving) -> None:
    asked: Any = {"model": server.model, "prompt": ["Once", "In the end"], "max_tokens": 12, "n": 2, "seed": 3}
    whole = client.completions.create(**asked)
    texts, reasons, usages = [""] * 4, [None] * 4, []
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usages[-1] == whole.usage
    assert not any(usages[:-1])
    assert len(set(texts)) == 4  # the answers of one request have draws of their own


def test_a_conversation(client: OpenAI, server: Serving, reference: Reference) -> None:
    messages: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    asked: Any = {"model": server.model, "max_tokens": 15, "temperature": 0}
    found = client.chat.completions.create(**asked, messages=messages)
    ids = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (row,) = reference._decoder.generate([ids], Sampling(15), eos_token_id=2)
    assert found.choices[0].message.content == reference.tokenizer.decode(row, skip_special_tokens=True)
    assert found.choices[0].message.role == "assistant"
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids)

    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    same = client.chat.completions.create(**asked, messages=[{"role": "developer", "content": parts}, messages[1]])
    assert same.choices == found.choices

    stream = client.chat.completions.create(
        **asked, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == found.choices[0].message.content
    assert chunks[-1].usage == found.usage

    # The answer goes back as the client has it, empty fields and all.
    messages += [found.choices[0].message.model_dump(), {"role": "user", "content": "And now?"}]
    assert client.chat.completions.create(**asked, messages=messages).usage.prompt_tokens > len(ids)  # type: ignore[union-attr]


def test_logprobs(client: OpenAI, server: Serving) -> None:
    asked: Any = {"model": server.model, "max_tokens": 10, "temperature": 0}
    completion = client.completions.create(**asked, prompt="Once", logprobs=3).choices[0]
    assert completion.logprobs is not None
    assert completion.logprobs.tokens is not None
    assert len(completion.logprobs.tokens) == len(completion.logprobs.token_logprobs or []) == 10
    for token, logprob, best in zip(
        completion.logprobs.tokens,
        completion.logprobs.token_logprobs or [],
        completion.logprobs.top_logprobs or [],
        strict=True,
    ):
        assert best[token] == logprob == max(best.values()) < 0
    messages: Any = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(**asked, messages=messages, logprobs=True, top_logprobs=20).choices[0]
    assert chat.logprobs is not None
    content = chat.logprobs.content or []
    assert [len(token.top_logprobs) for token in content] == [20] * 10
    spelled = b"".join(bytes(token.bytes or []) for token in content)
    assert spelled.decode("utf-8", "replace").removeprefix(" ") == chat.message.content
    chunks = client.chat.completions.create(**asked, messages=messages, logprobs=True, top_logprobs=20, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in streamed if part for token in part.content or []] == content


def test_stop_strings(client: OpenAI, server: Serving, reference: Reference) -> None:
    text = reference.complete("Once upon a time", 40)
    stop = text[9:12]
    asked: Any = {"model": server.model, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    for given in (stop, [stop, "never"]):
        choice = client.completions.create(**asked, stop=given).choices[0]
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
        streamed = "".join(
            chunk.choices[0].text for chunk in client.completions.create(**asked, stop=given, stream=True)
        )
        assert streamed == choice.text


def test_a_seed_repeats(client: OpenAI, server: Serving) -> None:
    def draw(**options: Any) -> list[str]:
        found = client.completions.create(model=server.model, prompt="Once", max_tokens=16, n=2, **options)
        return [choice.text for choice in found.choices]

    assert draw(seed=7) == draw(seed=7) != draw(seed=8)
    assert draw(seed=-1) == draw(seed=-1)
    assert draw() != draw()


def test_ids_are_taken_as_they_are(client: OpenAI, server: Serving, reference: Reference) -> None:
    ids = [1, *encode_text(reference.tokenizer, "Once upon a time")]
    for prompt in (ids, [ids, ids]):
        found = client.completions.create(model=server.model, prompt=prompt, max_tokens=9, temperature=0)
        assert {choice.text for choice in found.choices} == {reference.complete("Once upon a time", 9)}


def test_bodies_are_of_the_described_form(server: Serving) -> None:
    Completion.model_validate(server.complete(logprobs=2, n=2).json)
    ChatCompletion.model_validate(server.chat(logprobs=True, top_logprobs=1, max_tokens=3).json)


# ----------------------------------------------------------------------------------------------- many at a time


def test_clients_at_the_same_time_get_what_each_would_get_alone(place: Path, reference: Reference) -> None:
    """64 streams at once, twice as many as there are slots; also those whose draws are seeded."""
    requests = [
        {
            "prompt": f"{number} " + "word " * (number % 7),
            "max_tokens": 5 + number % 20,
            "temperature": number % 2,
            "seed": number,
        }
        for number in range(64)
    ]
    with serving(place, slots=32) as server:

        def text(asked: dict[str, Any]) -> str:
            events = server.complete(**asked, stream=True).events
            return "".join(event["choices"][0]["text"] for event in events)

        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(text, requests))
        assert together[::3] == [text(asked) for asked in requests[::3]]
    for asked, found in zip(requests, together, strict=True):
        if asked["temperature"] == 0:
            assert found == reference.complete(asked["prompt"], asked["max_tokens"])


def test_a_slow_reader_holds_up_nobody(server: Serving) -> None:
    """One that never reads on, with more answers than the buffers of the connection hold."""
    server.wait_until_idle()
    before = server.finished(COMPLETE, 200)
    stuck = server.begin_stream(200, n=7, logprobs=5, stop=["never said"])
    try:
        assert server.complete(max_tokens=100).status == 200
        server.wait_until_idle()
        assert server.finished(COMPLETE, 200) == before + 1  # all is written, and the stuck one is not sent yet
        assert rest_of_events(stuck)[-1] == "[DONE]"
    finally:
        stuck.close()


def rest_of_events(connection: socket.socket) -> list[str]:
    """The data of the events of a stream, but for those that were read before."""
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        part = connection.recv(65536)
        assert part, received[-1000:]
        received += part
    return re.findall(r"^data: (.*)$", received.decode(), flags=re.MULTILINE)


def test_a_client_that_leaves_stops_its_answer(place: Path) -> None:
    with serving(place, slots=1, context=512) as server:
        connection = server.begin_stream(500)
        connection.close()
        server.wait_until_idle()
        assert server.metric("doge_lm_written_tokens_total") < 400
        # One that waits for the whole answer, and one that waits for a slot.
        blocking = server.begin_stream(500)
        before = server.metric("doge_lm_written_tokens_total")
        body = json.dumps({"model": server.model, "prompt": "a", "max_tokens": 500}).encode()
        waiting = socket.create_connection(("127.0.0.1", server.port))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        waiting.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while not server.metric("doge_lm_waiting"):
            time.sleep(0.01)
        waiting.close()
        while server.metric("doge_lm_waiting"):
            time.sleep(0.01)
        blocking.close()
        server.wait_until_idle()
        assert server.metric("doge_lm_written_tokens_total") < before + 450


def test_a_full_queue_is_told(place: Path) -> None:
    with serving(place, slots=1, queue=1, context=512) as server:
        first, second = server.begin_stream(500), None
        try:
            second = threading.Thread(target=server.complete, kwargs={"max_tokens": 1})
            second.start()
            while not server.metric("doge_lm_waiting"):
                time.sleep(0.01)
            refused = server.complete(max_tokens=1)
            assert refused.status == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.error["code"] == "queue_full"
            assert server.complete(max_tokens=1, n=3).error["param"] == "n"  # never fits
        finally:
            first.close()
            if second is not None:
                second.join()
        assert server.complete(max_tokens=1).status == 200


# ------------------------------------------------------------------------------------------- what is refused

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETE, {"prompt": "a", "unknown": 1}, "unknown"),
    (COMPLETE, {"prompt": "a", "echo": True}, "echo"),
    (COMPLETE, {"prompt": "a", "best_of": 2}, "best_of"),
    (COMPLETE, {"prompt": "a", "best_of": 3, "n": 2}, "best_of"),
    (COMPLETE, {"prompt": None}, "prompt"),
    (COMPLETE, {"prompt": "a", "tools": []}, "tools"),
    (COMPLETE, {"prompt": "a", "suffix": "b"}, "suffix"),
    (COMPLETE, {"prompt": "a", "temperature": -0.1}, "temperature"),
    (COMPLETE, {"prompt": "a", "temperature": 2.1}, "temperature"),
    (COMPLETE, {"prompt": "a", "temperature": "1"}, "temperature"),
    (COMPLETE, {"prompt": "a", "temperature": True}, "temperature"),
    (COMPLETE, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETE, {"prompt": "a", "top_k": -1}, "top_k"),
    (COMPLETE, {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
    (COMPLETE, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETE, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": 10**9}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "n": 0}, "n"),
    (COMPLETE, {"prompt": "a", "n": 129}, "n"),
    (COMPLETE, {"prompt": "a", "seed": 2**63}, "seed"),
    (COMPLETE, {"prompt": "a", "stop": ""}, "stop"),
    (COMPLETE, {"prompt": "a", "stop": ["a"] * 5}, "stop"),
    (COMPLETE, {"prompt": "a", "stop": ["\ud800"]}, "stop"),
    (COMPLETE, {"prompt": "a", "logprobs": 6}, "logprobs"),
    (COMPLETE, {"prompt": "a", "logprobs": True}, "logprobs"),
    (COMPLETE, {"prompt": "a", "stream": "yes"}, "stream"),
    (COMPLETE, {"prompt": "a", "stream_options": {}}, "stream_options"),
    (COMPLETE, {"prompt": "a", "stream": True, "stream_options": {"other": 1}}, "stream_options"),
    (COMPLETE, {}, "prompt"),
    (COMPLETE, {"prompt": []}, "prompt"),
    (COMPLETE, {"prompt": [[]]}, "prompt"),
    (COMPLETE, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETE, {"prompt": [-1]}, "prompt"),
    (COMPLETE, {"prompt": [32768]}, "prompt"),
    (COMPLETE, {"prompt": ["a"] * 200}, "prompt"),
    (COMPLETE, {"prompt": "\ud800"}, "prompt"),
    (COMPLETE, {"prompt": "word " * 300}, "prompt"),
    (COMPLETE, {"prompt": "a " * 200, "max_tokens": 100}, "prompt"),
    (COMPLETE, {"prompt": "x" * 100_000}, "prompt"),
    (CHAT, {"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"messages": USER, "functions": []}, "functions"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": USER, "logit_bias": {"1": 5}}, "logit_bias"),
    (CHAT, {"messages": USER, "store": True}, "store"),
    (CHAT, {"messages": USER, "service_tier": "priority"}, "service_tier"),
    (CHAT, {"messages": USER, "modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"messages": USER, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (CHAT, {"messages": USER, "echo": False}, "echo"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": USER, "logprobs": 3}, "logprobs"),
    (CHAT, {"messages": USER, "top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    (CHAT, {"messages": USER, "max_completion_tokens": 10**9}, "max_completion_tokens"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "name": 1}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "nickname": "b"}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}, *USER]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "messages"),
    (CHAT, {"messages": [*USER, *USER]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a"}, *USER]}, "messages"),
    (CHAT, {"messages": [*USER, {"role": "assistant", "content": "a"}]}, "messages"),
    (CHAT, {"messages": [*USER, {"role": "system", "content": "a"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 300}]}, "messages"),
]


@pytest.mark.parametrize(("path", "body", "field"), REFUSED, ids=lambda value: ascii(value)[:60])
def test_what_is_unknown_or_out_of_range_is_refused_by_name(
    server: Serving, path: str, body: dict[str, Any], field: str
) -> None:
    for stream in ({}, {"stream": True}) if "stream" not in body and field != "stream_options" else ({},):
        reply = server.post(path, **body, **stream)
        assert reply.status == 400
        assert reply.error["param"] == field
        assert reply.error["type"] == "invalid_request_error"


def test_what_says_nothing_about_the_answer_is_ignored(server: Serving) -> None:
    known = {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"}
    assert server.complete(max_tokens=1, **known).status == 200
    assert server.chat(max_tokens=1, response_format={"type": "text"}, **known).status == 200


def test_null_is_as_if_a_field_were_not_there(server: Serving) -> None:
    known = dict.fromkeys(["temperature", "stop", "seed", "n", "stream", "stream_options", "logprobs", "user"])
    others = dict.fromkeys(["tools", "logit_bias", "suffix", "reasoning_effort", "anything"])
    assert server.complete(max_tokens=1, **known, **others).status == 200
    message = {**USER[0], "refusal": None, "audio": None, "function_call": None, "tool_calls": None}
    asked = {"model": server.model, "messages": [message], "max_tokens": 1, **known, **others}
    assert server.ask("POST", CHAT, asked).status == 200


def test_what_asks_for_nothing_is_accepted(server: Serving, client: OpenAI) -> None:
    """As clients send it by default."""
    both: Any = {"logit_bias": {}, "store": False, "service_tier": "auto"}
    chat: Any = {"tools": [], "parallel_tool_calls": True, "modalities": ["text"], "max_tokens": 3, **GREEDY}
    messages: Any = [{"role": "user", "content": "Hello", "name": "somebody"}]
    found = [server.chat(max_tokens=3, **GREEDY).json["choices"]]
    for choice in ("none", "auto"):
        found.append(server.post(CHAT, messages=messages, tool_choice=choice, **both, **chat).json["choices"])
    assert found[0] == found[1] == found[2]
    for n, best_of in ((1, 1), (2, 1), (2, 2)):
        reply = server.complete(max_tokens=1, n=n, best_of=best_of, echo=False, **both)
        assert len(reply.json["choices"]) == n
    assert client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=1, tools=None, store=None, logit_bias={}  # type: ignore[arg-type]
    ).choices  # fmt: skip


def test_errors_say_where_and_what(server: Serving) -> None:
    """Each of one form, in one notation, and with what helps."""

    def message(path: str, **body: Any) -> str:
        return server.ask("POST", path, {"model": server.model, **body}).error["message"]

    assert message(COMPLETE, prompt="a", stop="") == "stop: String should have at least 1 character"
    assert message(COMPLETE, prompt="a", stop=["b", ""]) == "stop[1]: String should have at least 1 character"
    assert message(CHAT, messages=[{"role": "tool", "content": "a"}]).startswith("messages[0].role: ")
    unknown = message(CHAT, messages=[*USER, {**USER[0], "nickname": "b"}])
    assert unknown == "there is no field 'messages[1].nickname' here; leave it out"
    assert (
        message(COMPLETE, prompt="a", metadata=dict.fromkeys("abcdefghijklmnopq", ""))
        == "metadata: 17 items are more than 16"
    )
    assert message(CHAT, messages=[{**USER[0], "content": "\ud800"}]).startswith(
        "messages[0].content: the text holds a lone"
    )
    assert message(CHAT, messages=USER * 257) == "257 messages are more than the context of 256 tokens holds"
    digits = server.ask("POST", COMPLETE, raw=b'{"model": "small", "prompt": "a", "seed": ' + b"9" * 5000 + b"}")
    assert digits.error["message"] == "a number in the body has too many digits"
    assert message(CHAT, messages=USER, tools=[1]).startswith("tools: this server has nothing of the kind")


def test_another_model_is_not_found(server: Serving) -> None:
    reply = server.ask("POST", COMPLETE, {"model": "gpt-4", "prompt": "a"})
    assert (reply.status, reply.error["param"], reply.error["code"]) == (404, "model", "model_not_found")
    assert server.ask("POST", COMPLETE, {"prompt": "a"}).error["param"] == "model"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"NaN",
        b'{"model": "small", "prompt": "a", "temperature": NaN}', b'{"model": "small", "prompt": "a", "n": 1e999}',
        b'{"model": "small", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"\\ud800": 1}', b'{"model": "\\ud800", "prompt": "a"}', b'{"model": "small", "prompt": "\\u0000", "x": 1}',
    ],
    ids=lambda raw: ascii(raw[:40]),
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(server: Serving, raw: bytes) -> None:
    for path in (COMPLETE, CHAT):
        reply = server.ask("POST", path, raw=raw)
        assert reply.status in (400, 404)
        assert reply.error["message"]


WIDE: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETE, {"prompt": [[]] * 10_000}, "prompt[0]: List should have at least 1 item"),
    (COMPLETE, {"prompt": [[1]] * 10_000}, "prompt: List should have at most 2048 items"),
    (COMPLETE, {"prompt": [1.5] * 10_000}, "prompt: "),
    (COMPLETE, {"prompt": [1, "a"] * 10_000}, "prompt: "),
    (COMPLETE, {"prompt": "a", "stop": [1] * 10_000}, "stop"),
    (COMPLETE, {"prompt": "a", **{f"k{number}": 1 for number in range(10_000)}}, "there is no field 'k0' here"),
    (COMPLETE, {"prompt": "a", "metadata": {f"k{number}": 1 for number in range(10_000)}}, "metadata: "),
    (CHAT, {"messages": [{}] * 10_000}, "messages[0].role: Field required"),
    (CHAT, {"messages": [{"role": "user", "content": [{}] * 10_000}]}, "messages[0].content[0].type: Field required"),
    (CHAT, {"messages": [{**USER[0], **{f"k{number}": 1 for number in range(10_000)}}]}, "'messages[0].k0'"),
]


@pytest.mark.parametrize(("path", "body", "message"), WIDE, ids=lambda value: ascii(value)[:40])
def test_the_first_of_many_faults_is_enough(server: Serving, path: str, body: dict[str, Any], message: str) -> None:
    """Each takes time and memory, and a megabyte has room for hundreds of thousands."""
    whole = {"model": server.model, **body}
    with pytest.raises(ValidationError) as caught:
        (CompletionRequest if path == COMPLETE else ChatRequest).model_validate(whole)
    assert caught.value.error_count() < 6
    reply = server.ask("POST", path, whole)
    assert reply.status == 400
    assert message in reply.error["message"]
    assert len(reply.body) < 1000


def test_content_types(server: Serving) -> None:
    body = json.dumps({"model": server.model, "prompt": "a", "max_tokens": 1}).encode()
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        assert server.ask("POST", COMPLETE, raw=body, headers={"content-type": kind}).status == 200
    # A page of another site may send these without being asked whether it may.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert server.ask("POST", COMPLETE, raw=body, headers={"content-type": kind}).status == 415
    assert server.ask("POST", COMPLETE, raw=body, headers={"content-encoding": "gzip"}).status == 415


def test_paths_and_methods(server: Serving) -> None:
    for method, path, status in [
        ("GET", "/nothing", 404),
        ("GET", "/v1/", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/", 405),
        ("GET", "/docs", 404),
        ("GET", "/../serve.py", 404),
    ]:
        reply = server.ask(method, path, {} if method == "POST" else None)
        assert (reply.status, bool(reply.error["message"])) == (status, True)


def test_bodies_that_are_too_large(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "DISCARD_SECONDS", 0.5)
    with serving(place, max_body_bytes=2000) as server:
        assert server.complete("a " * 100, max_tokens=1).status == 200
        assert server.complete("a " * 1000).status == 413
        assert server.complete("a " * 5_000_000).error["code"] == "request_too_large"
        # Without a length, in chunks.
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b" " * 1024 + b"\r\n")
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")
        assert server.complete("a", max_tokens=1).status == 200


def test_a_body_that_does_not_come(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(gate, "DISCARD_SECONDS", 0.1)
    with (
        serving(place) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection,
    ):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


# ------------------------------------------------------------------------------------------- whom it serves


def test_the_api_key(place: Path) -> None:
    with serving(place, api_key="secret") as server:
        for headers in (
            {},
            {"authorization": "Bearer other"},
            {"authorization": "secret"},
            {"authorization": "Bearer \xe9"},
        ):
            for method, path in (("POST", COMPLETE), ("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")):
                reply = server.ask(method, path, {} if method == "POST" else None, headers)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        for path in ("/", "/chat.js", "/health"):
            assert server.ask("GET", path).status == 200
        assert server.ask("GET", "/metrics", headers={"authorization": "bearer secret"}).status == 200
        with OpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
            assert client.completions.create(model=server.model, prompt="a", max_tokens=1).choices


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1234", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7", 200),
        (socket.gethostname(), 200),
        ("LOCALHOST:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example@localhost", 403),
        ("localhost/evil.example", 403),
        ("", 403),
        ("[::1", 403),
        ("localhost:port", 403),
    ],
)
def test_names_that_are_not_the_servers_are_refused(server: Serving, host: str, status: int) -> None:
    """A page may have made its name lead here (DNS rebinding)."""
    assert server.ask("GET", "/v1/models", headers={"host": host}).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),  # behind a proxy
        ("http://localhost:8001", 403),
        ("http://localhost", 403),
        ("http://127.0.0.1:8000", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
        ("http://evil.example\\@localhost:8000", 403),
    ],
)
def test_pages_of_other_origins_are_refused(server: Serving, origin: str, status: int) -> None:
    headers = {"host": "localhost:8000", "origin": origin}
    body = {"model": server.model, "prompt": "a", "max_tokens": 1}
    assert server.ask("POST", COMPLETE, body, headers).status == status
    assert server.ask("GET", "/v1/models", headers=headers).status == status
    preflight = {**headers, "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in server.ask("OPTIONS", COMPLETE, headers=preflight).headers


def test_an_origin_and_a_host_can_be_allowed(place: Path) -> None:
    site = "https://chat.example"
    with serving(place, origins=frozenset({site}), hosts=frozenset({"gpu.example"}), api_key="k") as server:
        headers = {"host": "gpu.example:8000", "origin": site}
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        preflight = server.ask("OPTIONS", COMPLETE, headers={**headers, **asked})
        assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (200, site)
        body = {"model": server.model, "prompt": "a", "max_tokens": 1}
        reply = server.ask("POST", COMPLETE, body, {**headers, "authorization": "Bearer k"})
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, site)
        assert server.ask("GET", "/health", headers={**headers, "origin": "https://other.example"}).status == 403


def test_any_preflight_of_an_allowed_origin_succeeds(place: Path) -> None:
    """OpenAI's client in a browser sends headers of its own; a page of the Internet asks for a private network."""
    site = "https://chat.example"
    with serving(place, origins=frozenset({site}), api_key="k") as server:
        for method, asked in (("POST", "authorization,content-type,x-stainless-lang,x-stainless-os"), ("PUT", "x-any")):
            headers = {
                "access-control-request-method": method,
                "access-control-request-headers": asked,
                "access-control-request-private-network": "true",
            }
            reply = server.ask("OPTIONS", CHAT, headers={"origin": site, **headers})
            assert reply.status == 200
            assert reply.headers["access-control-allow-origin"] == site
            assert reply.headers["access-control-allow-headers"] == asked
            assert method in reply.headers["access-control-allow-methods"]
            assert reply.headers["access-control-allow-private-network"] == "true"
            other = server.ask("OPTIONS", CHAT, headers={"origin": "https://other.example", **headers})
            assert (other.status, other.error["code"]) == (403, "origin_not_allowed")
            assert not [name for name in other.headers if name.startswith("access-control")]


def test_a_page_of_an_allowed_origin_can_read_refusals(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(gate, "DISCARD_SECONDS", 0.1)
    site = "https://chat.example"
    with serving(place, origins=frozenset({site}), api_key="k", max_body_bytes=2000) as server:
        server.headers["origin"] = site
        key = {"authorization": "Bearer k"}

        def check(reply: Reply, status: int) -> None:
            assert reply.status == status
            assert reply.error["message"]
            assert reply.headers["access-control-allow-origin"] == site
            assert "origin" in reply.headers["vary"].lower()

        check(server.ask("POST", COMPLETE, {}), 401)
        check(server.ask("POST", COMPLETE, {}, {**key, "host": "other.example"}), 403)
        check(server.ask("POST", COMPLETE, raw=b" " * 3000, headers=key), 413)
        check(server.ask("POST", COMPLETE, {}, {**key, "content-type": "text/plain"}), 415)
        check(server.ask("POST", COMPLETE, raw=b"{", headers={**key, "content-length": "100"}), 408)
        check(server.ask("GET", "/nothing", headers=key), 404)
        server.headers["authorization"] = "Bearer k"
        stream = server.begin_stream(200)
        server.take_signal()
        while server.ask("GET", "/health").json != {"status": "draining"}:
            time.sleep(0.01)
        check(server.complete(), 503)
        stream.close()


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
def test_what_other_pages_embed_is_refused(server: Serving, site: str, status: int) -> None:
    """A browser sends no origin with an image or a script, but says whose they are. The page may be linked to."""
    for path in ("/v1/models", "/metrics"):
        assert server.ask("GET", path, headers={"sec-fetch-site": site}).status == status
    assert server.ask("GET", "/", headers={"sec-fetch-site": site, "sec-fetch-mode": "navigate"}).status == 200


def test_heads_without_bodies(server: Serving) -> None:
    for path in ("/", "/chat.js", "/health"):
        whole, head = server.ask("GET", path), server.ask("HEAD", path)
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]


def test_headers_that_are_there_twice_are_refused(server: Serving) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nOrigin: http://a\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_every_answer_forbids_what_the_page_does_not_need(server: Serving) -> None:
    for path in ("/", "/chat.js", "/health", "/nothing"):
        headers = server.ask("GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"


# --------------------------------------------------------------------------------------------- health and end


def test_health_and_metrics(server: Serving) -> None:
    assert server.ask("GET", "/health").json == {"status": "ok"}
    server.wait_until_idle()
    before = server.metric("doge_lm_written_tokens_total")
    server.complete(max_tokens=7, **GREEDY)
    assert server.metric("doge_lm_written_tokens_total") == before + 7
    text = server.ask("GET", "/metrics").body.decode()
    assert 'doge_lm_requests_total{method="POST",path="/v1/completions",status="200"}' in text
    server.ask("GET", "/some/strange/path")
    server.ask("BREW", "/health")
    text = server.ask("GET", "/metrics").body.decode()
    assert "strange" not in text
    assert "BREW" not in text


def test_a_failure_of_the_engine_ends_the_server(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command fails with it, so that the status of the process is not 0."""
    ports: Queue[int] = Queue()

    def announce(listening: socket.socket, *_: object) -> None:
        ports.put(listening.getsockname()[1])

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(serve, "_announce", announce)
    flags = ["--port", "0", "--device", "cpu", "--max_slots", "1", "--threads", "1", "--model_name", "m"]
    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(main, ["serve", str(place), *flags])
        server = Serving(ports.get(timeout=60), "m")
        assert server.complete(max_tokens=2).status == 200
        monkeypatch.setattr(Slots, "step", fail)
        reply = server.complete(max_tokens=5)
        assert (reply.status, reply.error["type"]) == (503, "server_error")
        with pytest.raises(ZeroDivisionError, match="a bug"):
            command.result(timeout=60)
    server.wait_until_gone()
    gc.unfreeze()  # what the command froze: the server and its model
    spare_what_is_there()


def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an answer take longer than a test waits for anything."""
    step = Slots.step

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return step(*args, **kwargs)

    monkeypatch.setattr(Slots, "step", slow)


@pytest.mark.parametrize(("drain_seconds", "signals"), [(0.1, 1), (1000.0, 2)], ids=["deadline", "second signal"])
def test_what_is_under_way_at_the_end_is_told(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    drain_seconds: float,
    signals: int,
) -> None:
    """A stream ends with an error, what waits is refused, and one that does not read is given up."""
    monkeypatch.setattr(serve, "_LAST_SECONDS", 0.3)
    with serving(place, slots=9, context=512, drain_seconds=drain_seconds) as server:
        stuck = server.begin_stream(500, n=7, logprobs=5, stop=["never said"])
        while server.metric("doge_lm_written_tokens_total") < 7 * 100:
            time.sleep(0.01)
        slow_steps(monkeypatch)
        stream = server.begin_stream(500)
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(server.complete, max_tokens=500) for _ in range(3)]
            while server.metric("doge_lm_waiting") + server.metric("doge_lm_running") < 4:
                time.sleep(0.01)
            for _ in range(signals):
                server.take_signal()
            for other in others:
                assert (other.result().status, other.result().error["code"]) == (503, "shutting_down")
        assert json.loads(rest_of_events(stream)[-1])["error"]["code"] == "shutting_down"
        stream.close()
        server.wait_until_gone()
        assert not reset_or_rest(stuck).endswith(b"0\r\n\r\n")
        stuck.close()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def reset_or_rest(connection: socket.socket) -> bytes:
    """All that still comes, to the end or until the connection is reset."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def test_a_body_that_still_comes_is_refused_when_the_server_drains(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, not when the answers that are under way have ended."""
    with serving(place, slots=1, context=512, drain_seconds=1000.0) as server:
        slow_steps(monkeypatch)
        stream = server.begin_stream(500)
        uploads = []
        for begun in (b"{", b""):  # one that is refused while it is read, and one of which nothing has come
            upload = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            upload.sendall(head + b"Content-Length: 500\r\n\r\n" + begun)
            uploads.append(upload)
        assert server.running is not None
        while server.running.state.requests < 3:
            time.sleep(0.01)
        server.take_signal()
        for upload in uploads:
            received = rest_of(upload)
            assert received.startswith(b"HTTP/1.1 503"), received
            assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "shutting_down"
            upload.close()
        assert server.metric("doge_lm_running") == 1
        stream.close()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.slow
def test_sigterm_lets_answers_end_and_takes_no_more(place: Path) -> None:
    """In a process of its own, with a key from the environment."""
    flags = ("--max_slots", "4", "--max_context", "512")
    with serving_process(place, *flags, environment={"DOGE_LM_API_KEY": "k"}) as (server, process):
        assert server.ask("GET", "/v1/models").status == 401
        server.headers["authorization"] = "Bearer k"
        stream = server.begin_stream(480)
        process.send_signal(signal.SIGTERM)
        while server.ask("GET", "/health").json != {"status": "draining"}:
            time.sleep(0.01)
        refused = server.complete(max_tokens=1)
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        received = b""
        while b"[DONE]" not in received:
            part = stream.recv(65536)
            assert part, received
            received += part
        stream.close()
        assert process.wait(60) == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_cleanly(place: Path) -> None:
    flags = ("--max_slots", "1", "--max_context", "512", "--threads", "1")
    with serving_process(place, *flags) as (server, process):
        with ThreadPoolExecutor(1) as pool:
            # More than are done before the signals come, one after the other.
            other = pool.submit(server.complete, max_tokens=500, n=100, stop=["never said"])
            while server.metric("doge_lm_waiting") < 90:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            while server.ask("GET", "/health").json != {"status": "draining"}:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert (other.result().status, other.result().error["code"]) == (503, "shutting_down")
        while process.poll() is None:  # one who presses Ctrl-C again and again
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        assert process.returncode == 0
        assert "Traceback" not in process.stdout.read()


# -------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("host", "shown", "warned"),
    [
        ("127.0.0.1", "127.0.0.1", False),
        ("127.0.0.2", "127.0.0.2", False),
        ("0.0.0.0", socket.gethostname(), True),
        ("::", socket.gethostname(), True),
    ],
)
def test_the_address_that_is_shown_can_be_opened_from_where_it_is_served(
    place: Path, capsys: pytest.CaptureFixture[str], host: str, shown: str, warned: bool
) -> None:
    slots = Slots(load_model(place, torch.device("cpu"), "float32"), 1, 64)
    try:
        listening = serve.listening_socket(host, 0)
    except UserError:
        pytest.skip(f"this machine has no {host}")
    with listening:
        serve._announce(listening, Settings("m", Limits(64, 64)), slots)
        port = listening.getsockname()[1]
    told = capsys.readouterr()
    assert f"chat page  http://{shown}:{port}/\n" in told.out
    assert f"API        http://{shown}:{port}/v1\n" in told.out
    assert ("all addresses of this machine" in told.out) == warned == ("warning: whoever" in told.err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--max_slots", "0"], "--max_slots is 0"),
        (["--max_slots", "100000000"], "lower --max_slots"),
        (["--max_context", "513"], "--max_context is 513; the model"),
        (["--drain_seconds", "-1"], "--drain_seconds is -1"),
        (["--drain_seconds", "nan"], "--drain_seconds is nan"),
        (["--allow_origin", "chat.example"], "--allow_origin chat.example"),
        (["--allow_origin", "https://chat.example/"], "--allow_origin https://chat.example/"),
        (["--model_name", ""], "--model_name"),
        (["--model_name", "a\udcff"], "--model_name"),
        (["--api_key", ""], "--api_key is empty"),
        (["--api_key", "a b"], "--api_key is empty, or holds spaces"),
    ],
)
def test_wrong_flags_are_named(place: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(place), "--port", "0", *flags]) == 1
    assert message in capsys.readouterr().err


def test_allowed_origins_are_taken_as_browsers_send_them() -> None:
    for given in ("https://A.example:443", "HTTPS://a.example"):
        assert serve._as_sent(given) == "https://a.example"
    assert serve._as_sent("http://a.example:8080") == "http://a.example:8080"
    assert serve._as_sent("http://[::1]:80") == "http://[::1]"


def test_a_port_in_use_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(place), "--port", str(port)]) == 1
    assert f"cannot listen at 127.0.0.1 port {port}" in capsys.readouterr().err


def test_what_holds_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert str(tmp_path) in capsys.readouterr().err
