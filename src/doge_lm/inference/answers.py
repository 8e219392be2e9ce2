"""From the pieces of answers to the bodies of the API: whole, or as a stream of events."""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .engine import FinishReason, Piece, Submission
from .gate import RefusalError, stopping
from .spelling import Logprob, Spelling, WrittenToken

LEAST_LOGPROB = -9999.0
"""What stands for the logarithm of 0, which JSON lacks."""

Json = dict[str, Any]


@dataclass
class Answers:
    """The answers of one request, on their way.

    Args:
        id: of the request.
        created: seconds since 1970.
        model: its id.
        count: how many answers.
        prompt_tokens: tokens of the prompts, each once.
        with_logprobs: whether log-probabilities are wanted.
    """

    id: str
    created: int
    model: str
    count: int
    prompt_tokens: int
    with_logprobs: bool
    pieces: "asyncio.Queue[Piece]" = field(default_factory=asyncio.Queue)
    submission: Submission | None = None
    first_at: float | None = None  # by time.monotonic()

    def cancel(self) -> None:
        """Nobody waits for them any more. Of no effect on those that have ended."""
        if self.submission is not None:
            self.submission.cancel()

    async def batches(self) -> AsyncIterator[list["Part"]]:
        """What has been written since the last time, by answer, until all have ended: a slow reader gets more at once.

        Raises:
            RefusalError: if the engine stops.
        """
        left = self.count
        while left:
            pieces = [await self.pieces.get()]
            self.first_at = self.first_at or time.monotonic()
            while not self.pieces.empty():
                pieces.append(self.pieces.get_nowait())
            for piece in pieces:
                if piece.error is not None:
                    raise stopping() from piece.error
            left -= sum(piece.is_last for piece in pieces)
            yield joined(pieces)

    async def whole(self) -> list["Part"]:
        """All answers, by their index, when they have ended.

        Raises:
            RefusalError: if the engine stops.
        """
        parts: list[Part] = []
        async for batch in self.batches():
            parts += batch
        return joined(parts)

    def usage(self, written: Iterable[int]) -> Json:
        """Tokens of the prompts and of what was written, one number for each answer."""
        completion = sum(written)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }


@dataclass
class Part:
    """A stretch of an answer; the fields are those of `Piece`."""

    index: int
    text: str
    tokens: tuple[WrittenToken, ...]
    count: int
    finish_reason: FinishReason | None


def joined(pieces: Sequence[Piece | Part]) -> list[Part]:
    """One part for each answer among pieces that are in order."""
    by_index: dict[int, list[Piece | Part]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    return [
        Part(
            index,
            "".join(piece.text for piece in its),
            tuple(token for piece in its for token in piece.tokens),
            its[-1].count,
            its[-1].finish_reason,
        )
        for index, its in sorted(by_index.items())
    ]


class Format(ABC):
    """How an endpoint writes its answers."""

    whole_object: str
    chunk_object: str

    def __init__(self, answers: Answers, spelling: Spelling) -> None:
        self._answers, self._spelling = answers, spelling

    @abstractmethod
    def choice(self, part: Part) -> Json:
        """A whole answer."""

    @abstractmethod
    def chunk_choice(self, part: Part) -> Json:
        """A stretch of an answer."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[WrittenToken]) -> Json:
        """The log-probabilities of tokens."""

    def first_choices(self) -> list[Json]:
        """What a stream begins with, before any text."""
        return []

    def body(self, parts: Sequence[Part]) -> Json:
        """The body of the answer to a request without a stream."""
        choices = [self.choice(part) for part in parts]
        usage = self._answers.usage(part.count for part in parts)
        return {**self._head(self.whole_object), "choices": choices, "usage": usage}

    async def events(self, *, include_usage: bool) -> AsyncIterator[bytes]:
        """The server-sent events of a stream. An engine that stops is the last one."""
        head = self._head(self.chunk_object)
        no_usage: Json = {"usage": None} if include_usage else {}
        for choice in self.first_choices():
            yield _event({**head, "choices": [choice], **no_usage})
        written: dict[int, int] = {}
        try:
            async for batch in self._answers.batches():
                written |= {part.index: part.count for part in batch}
                yield b"".join(
                    _event({**head, "choices": [self.chunk_choice(part)], **no_usage})
                    for part in batch
                    if part.text or part.tokens or part.finish_reason
                )
        except RefusalError as refusal:
            yield b"data: " + refusal.body() + b"\n\n"
            return
        if include_usage:
            yield _event({**head, "choices": [], "usage": self._answers.usage(written.values())})
        yield b"data: [DONE]\n\n"

    def logprobs(self, tokens: Sequence[WrittenToken]) -> Json | None:
        """The log-probabilities of tokens, if they are wanted."""
        return self._logprobs(tokens) if self._answers.with_logprobs else None

    def _head(self, kind: str) -> Json:
        answers = self._answers
        return {"id": answers.id, "object": kind, "created": answers.created, "model": answers.model}


class CompletionFormat(Format):
    """As `/v1/completions` writes."""

    whole_object = chunk_object = "text_completion"

    def choice(self, part: Part) -> Json:
        """A whole answer, or a stretch of it."""
        return {
            "text": part.text,
            "index": part.index,
            "logprobs": self.logprobs(part.tokens),
            "finish_reason": part.finish_reason,
        }

    def chunk_choice(self, part: Part) -> Json:
        """A stretch of an answer."""
        return self.choice(part)

    def _logprobs(self, tokens: Sequence[WrittenToken]) -> Json:
        name = self._spelling.name
        return {
            "tokens": [name(token.chosen.token) for token in tokens],
            "token_logprobs": [_finite(token.chosen) for token in tokens],
            "top_logprobs": [{name(one.token): _finite(one) for one in token.likeliest} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class ChatFormat(Format):
    """As `/v1/chat/completions` writes."""

    whole_object: Literal["chat.completion"] = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first_choices(self) -> list[Json]:
        """The role of each answer."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self._answers.count)
        ]

    def choice(self, part: Part) -> Json:
        """A whole answer."""
        return {
            "index": part.index,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
            "logprobs": self.logprobs(part.tokens),
            "finish_reason": part.finish_reason,
        }

    def chunk_choice(self, part: Part) -> Json:
        """A stretch of an answer."""
        return {
            "index": part.index,
            "delta": {"content": part.text} if part.text else {},
            "logprobs": self.logprobs(part.tokens),
            "finish_reason": part.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[WrittenToken]) -> Json:
        content = [
            {**self._token(token.chosen), "top_logprobs": [self._token(one) for one in token.likeliest]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, one: Logprob) -> Json:
        spelled = list(self._spelling.bytes_of(one.token))
        return {"token": self._spelling.name(one.token), "logprob": _finite(one), "bytes": spelled}


def _finite(one: Logprob) -> float:
    return one.logprob if one.logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
