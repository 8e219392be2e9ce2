"""From a request of the API to tasks of the engine."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from ..data.tokenizer import encode_batch
from .answers import Answers
from .api import ChatRequest, CompletionRequest, Generation
from .engine import Engine, EngineFullError, EngineStoppedError, Task
from .gate import RefusalError, stopping
from .sampling import MIN_TEMPERATURE, Rule
from .spelling import Spelling

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

DEFAULT_MAX_TOKENS = 16
"""Of `/v1/completions`, as OpenAI's; a chat answer may fill what is left of the context."""

_SEEDS_APART = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: the answers of one request have seeds far apart


@dataclass(frozen=True)
class Limits:
    """How long texts may be.

    Args:
        context: tokens of a prompt and its answer together.
        max_tokens: tokens of an answer.
    """

    context: int
    max_tokens: int


class Service:
    """Answers requests of both kinds with one engine.

    Args:
        engine: started with a `post` that runs in the event loop.
        tokenizer: used in one thread of this service's own, for it is not made for several.
        spelling: of the tokenizer.
        model_id: the name of the model.
        limits: of length.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerFast, spelling: Spelling, model_id: str, limits: Limits
    ) -> None:
        self.engine, self.model_id, self.limits = engine, model_id, limits
        self._tokenizer, self.spelling = tokenizer, spelling
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="doge-lm tokenizer")
        self._preparing = 0
        self._most_bytes = limits.context * max(len(spelling.bytes_of(index)) for index in range(len(spelling)))

    def close(self) -> None:
        """End the thread of the tokenizer."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------------ requests

    async def complete(self, body: CompletionRequest) -> Answers:
        """Begin the answers to `POST /v1/completions`.

        Raises:
            RefusalError: for what cannot be served, or not now.
        """
        self._check(body)
        if body.best_of not in (None, 1, body.n or 1):
            raise _invalid("best_of", f"best_of is {body.best_of}; no answers are left out here, so give n alone")
        prompts = await self._ids_of_prompts(body)
        limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return self._submit(body, prompts, limit, body.logprobs)

    async def chat(self, body: ChatRequest) -> Answers:
        """Begin the answers to `POST /v1/chat/completions`.

        Raises:
            RefusalError: for what cannot be served, or not now.
        """
        self._check(body)
        if body.max_completion_tokens is not None and body.max_tokens not in (None, body.max_completion_tokens):
            raise _invalid("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        if body.top_logprobs is not None and not body.logprobs:
            raise _invalid("top_logprobs", "top_logprobs needs logprobs: true")
        ids = await self._ids_of_conversation(body)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._submit(body, [ids], limit, logprobs)

    def _check(self, body: Generation) -> None:
        if body.model != self.model_id:
            raise RefusalError(
                404,
                f"there is no model {body.model[:100]!r} here; this server has {self.model_id!r}",
                param="model",
                code="model_not_found",
            )
        if body.stream_options is not None and not body.stream:
            raise _invalid("stream_options", "stream_options needs stream: true")
        if body.max_tokens is not None:
            self._check_max_tokens("max_tokens", body.max_tokens)
        if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
            self._check_max_tokens("max_completion_tokens", body.max_completion_tokens)

    def _check_max_tokens(self, name: str, value: int) -> None:
        if value > self.limits.max_tokens:
            raise _invalid(name, f"{name} is {value}; this server writes {self.limits.max_tokens} at most")

    async def _ids_of_prompts(self, body: CompletionRequest) -> list[list[int]]:
        given = body.prompt
        several: Sequence[str | Sequence[int]]
        several = [given] if isinstance(given, str) or isinstance(given[0], int) else given  # a text, or its ids
        self._check_count(body, len(several))
        texts = [prompt for prompt in several if isinstance(prompt, str)]
        if not texts:
            return [list(prompt) for prompt in several]  # type: ignore[arg-type]
        for text in texts:
            self._check_bytes(text, "prompt")
        begin = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        return [begin + ids for ids in await self._in_thread(encode_batch, self._tokenizer, texts)]

    async def _ids_of_conversation(self, body: ChatRequest) -> list[int]:
        self._check_count(body, 1)
        if self._tokenizer.chat_template is None:
            raise RefusalError(
                400,
                "the model has no chat template; use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        if body.messages[-1].role != "user":
            raise _invalid("messages", f"the last message is of the role {body.messages[-1].role}; it must be of user")
        if len(body.messages) > self.limits.context:  # each takes a token at least, and a template takes its time
            raise _too_long(
                "messages",
                f"{len(body.messages)} messages are more than the context of {self.limits.context} tokens holds",
            )
        messages = [message.for_template() for message in body.messages]
        self._check_bytes("".join(message["content"] for message in messages), "messages")
        try:
            return await self._in_thread(self._apply_template, messages)
        except TemplateError as error:
            raise _invalid("messages", str(error)) from error

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def _check_count(self, body: Generation, prompts: int) -> None:
        count = prompts * (body.n or 1)
        if count > self.engine.most_at_once:
            name = "n" if prompts == 1 else "prompt"
            raise _invalid(name, f"{count} answers are more than this server takes ({self.engine.most_at_once})")

    def _check_bytes(self, text: str, name: str) -> None:
        """Refuse what is too long however it is tokenized, before that takes time."""
        size = len(text.encode())
        if size > self._most_bytes:
            raise _too_long(name, f"{size} bytes are more than {self.limits.context} tokens can be")

    async def _in_thread(
        self, function: Callable[_Arguments, _Result], *arguments: _Arguments.args, **_: _Arguments.kwargs
    ) -> _Result:
        """Run what uses the tokenizer, one call after the other; a queue of these that is too long is refused."""
        if self._preparing >= self.engine.most_at_once:
            raise _busy()
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        finally:
            self._preparing -= 1

    def _submit(
        self,
        body: Generation,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
    ) -> Answers:
        tasks = []
        is_chat = isinstance(body, ChatRequest)
        name = "messages" if is_chat else "prompt"
        for ids in prompts:
            # Where the prompt is a text and no more than <s>, the answer goes on in it, with the space in front.
            continues = not is_chat and any(map(self.spelling.bytes_of, ids))
            room = self.limits.context - len(ids)
            limit = min(room, self.limits.max_tokens) if max_tokens is None else max_tokens
            if room < 1 or limit > room:
                asked = "" if max_tokens is None else f" and {max_tokens} to write"
                raise _too_long(name, f"{len(ids)} tokens{asked} are more than the context of {self.limits.context}")
            for number in range(body.n or 1):
                seed = None if body.seed is None else (body.seed + number * _SEEDS_APART) % 2**64
                stops = body.stop_strings()
                tasks.append(Task(ids, limit, _rule(body), seed, stops, logprobs, continues))
        answers = Answers(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.model_id,
            count=len(tasks),
            prompt_tokens=sum(map(len, prompts)),
            with_logprobs=logprobs is not None,
        )
        try:
            answers.submission = self.engine.submit(tasks, answers.pieces.put_nowait)
        except EngineFullError as error:
            raise _busy() from error
        except EngineStoppedError as error:
            raise stopping() from error
        except ValueError as error:  # an id that the model lacks
            raise _invalid(name, str(error)) from error
        return answers


def _rule(body: Generation) -> Rule:
    temperature = 1.0 if body.temperature is None else body.temperature
    return Rule(
        temperature=0.0 if temperature < MIN_TEMPERATURE else temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
    )


def _invalid(name: str, message: str) -> RefusalError:
    return RefusalError(400, message, param=name)


def _too_long(name: str, message: str) -> RefusalError:
    return RefusalError(400, message, param=name, code="context_length_exceeded")


def _busy() -> RefusalError:
    return RefusalError(
        429,
        "the queue is full; try again later",
        kind="rate_limit_error",
        code="queue_full",
        headers={"retry-after": "1"},
    )
