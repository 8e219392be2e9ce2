"""Continuous batching: a thread that writes many answers at once, each as if it were alone.

Requests wait in a queue and get a slot as soon as one is free. Between two steps, prompts are read (`READ_AT_ONCE`
tokens at most, so that long ones do not hold up the others), answers that have ended or were cancelled leave their
slots, and the rest move together. Nothing here knows of HTTP.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from .sampling import Chooser, Rule, choose_each
from .slots import CHUNK, ROWS, Slots
from .spelling import AnswerText, Logprob, Spelling, WrittenToken

READ_AT_ONCE = CHUNK
"""Tokens of prompts that are read between two steps, up to a piece more."""

FinishReason = Literal["stop", "length"]


class EngineFullError(Exception):
    """There are as many answers under way and waiting as there may be."""


class EngineStoppedError(Exception):
    """The engine takes no more work: it was stopped, or a step failed."""


@dataclass(frozen=True)
class Task:
    """An answer to write.

    Args:
        prompt: its ids, at least one.
        max_tokens: stop after so many.
        rule: how tokens are chosen.
        seed: of the draws; None: another one each time.
        stops: strings that end the answer, which are no part of it.
        logprobs: how many likeliest tokens to list for each token; None: no log-probabilities at all.
        continues: whether the answer continues the prompt's text, so that the space of its first token counts.
    """

    prompt: Sequence[int]
    max_tokens: int
    rule: Rule = field(default_factory=Rule)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    continues: bool = True


@dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    Args:
        index: which of the tasks that were submitted together.
        text: what is certain since the last piece.
        tokens: those with their log-probabilities, where these were asked for.
        count: tokens that the model has written so far, with the one that ended the answer.
        finish_reason: why the answer ends with this piece: its end or a stop string, or the limit of tokens.
        error: the answer ends because the engine stopped.
    """

    index: int
    text: str = ""
    tokens: tuple[WrittenToken, ...] = ()
    count: int = 0
    finish_reason: FinishReason | None = None
    error: EngineStoppedError | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class _Answer:
    """A task under way."""

    index: int
    task: Task
    take: Callable[[Piece], None]
    chooser: Chooser
    text: AnswerText
    number: int = 0  # in the order in which they got their slots
    slot: int = -1
    length: int = 0  # tokens whose keys and values are in the slot
    written: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def is_read(self) -> bool:
        return bool(self.written)


@dataclass(frozen=True)
class Submission:
    """Tasks that were submitted together."""

    _engine: "Engine"
    _answers: tuple[_Answer, ...]

    def cancel(self) -> None:
        """Write no more of them; their slots are free at the next step. Of no effect on what has ended."""
        self._engine._cancel(self._answers)


@dataclass(frozen=True)
class Load:
    """What an engine has to do, and has done: answers that wait and run, and tokens read and written so far."""

    waiting: int
    running: int
    tokens_read: int
    tokens_written: int


class Engine:
    """Writes answers in a thread of its own.

    Args:
        slots: the model.
        spelling: of its tokenizer.
        end: the id that ends an answer.
        max_waiting: answers that may wait for a slot.
        threads: of PyTorch, on a CPU; None leaves them as they are.
        post: runs a function somewhere, without waiting for it: the pieces of a step are handed over by one such call.
            By default, in the engine's thread.
    """

    def __init__(
        self,
        slots: Slots,
        spelling: Spelling,
        end: int,
        *,
        max_waiting: int = 256,
        threads: int | None = None,
        post: Callable[[Callable[[], None]], None] = lambda run: run(),
    ) -> None:
        self._slots, self._spelling, self._end = slots, spelling, end
        self._max_waiting, self._threads, self._post = max_waiting, threads, post
        self._lock = threading.Condition()
        self._waiting: deque[_Answer] = deque()
        self._in_slots: list[_Answer | None] = [None] * slots.count
        self._numbers = count()
        self._stopping = False
        self._pieces: list[tuple[_Answer, Piece]] = []
        self._tokens_read = self._tokens_written = 0
        self.failure: BaseException | None = None
        """What a step failed with, after which the engine does nothing more."""
        self._thread = threading.Thread(target=self._run, name="doge-lm engine", daemon=True)
        self._thread.start()

    @property
    def most_at_once(self) -> int:
        """How many answers may be under way and waiting together."""
        return self._max_waiting + self._slots.count

    def submit(self, tasks: Sequence[Task], take: Callable[[Piece], None]) -> Submission:
        """Queue tasks, all or none.

        Args:
            tasks: at least one.
            take: is given the pieces of their answers in order, where `post` runs it.

        Raises:
            ValueError: for a task that the slots cannot hold.
            EngineFullError: if there is no room for all of them now.
            EngineStoppedError: after `stop`, or a step that failed.
        """
        for task in tasks:
            self._check(task)
        answers = tuple(self._answer(index, task, take) for index, task in enumerate(tasks))
        with self._lock:
            if self._stopping or self.failure is not None:
                raise EngineStoppedError("the engine takes no more work")
            if self._running() + len(self._waiting) + len(answers) > self.most_at_once:
                raise EngineFullError(f"{len(self._waiting)} answers are waiting already")
            self._waiting.extend(answers)
            self._lock.notify()
        return Submission(self, answers)

    def load(self) -> Load:
        """What there is to do, and was done."""
        with self._lock:
            return Load(len(self._waiting), self._running(), self._tokens_read, self._tokens_written)

    def stop(self) -> None:
        """End all answers with an error, and the thread; waits for the step under way."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join()

    def _running(self) -> int:
        return sum(answer is not None for answer in self._in_slots)

    def _check(self, task: Task) -> None:
        if not task.prompt or task.max_tokens < 1:
            raise ValueError("a task needs at least one token in its prompt, and one to write")
        if min(task.prompt) < 0 or max(task.prompt) >= self._slots.vocabulary:
            raise ValueError(f"the ids of a prompt must be at least 0 and below {self._slots.vocabulary}")
        if len(task.prompt) + task.max_tokens > self._slots.columns:
            raise ValueError(
                f"{len(task.prompt)} tokens and {task.max_tokens} to write are more than {self._slots.columns}"
            )

    def _answer(self, index: int, task: Task, take: Callable[[Piece], None]) -> _Answer:
        text = AnswerText(self._spelling, continues=task.continues, stops=task.stops)
        return _Answer(index, task, take, Chooser(task.rule, task.prompt, task.seed), text)

    def _cancel(self, answers: Sequence[_Answer]) -> None:
        with self._lock:
            for answer in answers:
                answer.cancelled = True
                if answer in self._waiting:
                    self._waiting.remove(answer)
            self._lock.notify()

    # ------------------------------------------------------------------------------------------- the engine's thread

    @torch.inference_mode()
    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while self._admit():
                self._read_prompts()
                self._write()
                self._hand_over()
        except BaseException as error:  # told to those who wait, and kept for who runs the engine
            self._end_all(error)
        else:
            self._end_all(None)

    def _admit(self) -> bool:
        """Wait for work, and give slots to those that wait; False when it is to stop."""
        with self._lock:
            while True:
                if self._stopping:
                    return False
                for answer in list(self._busy()):
                    if answer.cancelled:
                        self._leave(answer)
                if self._waiting or any(self._busy()):
                    break
                self._lock.wait()
            while self._waiting and None in self._in_slots:
                answer = self._waiting.popleft()
                answer.number = next(self._numbers)
                answer.slot = self._in_slots.index(None)
                self._in_slots[answer.slot] = answer
            return True

    def _busy(self) -> list[_Answer]:
        return [answer for answer in self._in_slots if answer is not None]

    def _leave(self, answer: _Answer) -> None:
        self._slots.clear(answer.slot, answer.length)
        self._in_slots[answer.slot] = None

    def _read_prompts(self) -> None:
        read = 0
        for answer in sorted(self._busy(), key=lambda answer: answer.number):
            prompt = answer.task.prompt
            while not answer.is_read and read < READ_AT_ONCE:
                begin = answer.length
                ids = prompt[begin : begin + CHUNK]
                logits_V = self._slots.read(answer.slot, begin, ids, last=begin + len(ids) == len(prompt))
                answer.length += len(ids)
                read += len(ids)
                if logits_V is not None:
                    self._choose(logits_V[None], [answer])
        self._tokens_read += read

    def _write(self) -> None:
        """The next token of all answers whose prompts are read."""
        self._move_together()
        answers = [answer for answer in self._busy() if answer.is_read]
        if not answers:
            return
        ids = [0] * (answers[-1].slot + 1)
        for answer in answers:
            ids[answer.slot] = answer.written[-1]
        lengths = [0 if answer is None else answer.length for answer in self._in_slots]
        logits_BV = self._slots.step(ids, lengths)
        for answer in answers:
            answer.length += 1
        if len(answers) < len(ids):
            logits_BV = logits_BV[torch.tensor([answer.slot for answer in answers], device=logits_BV.device)]
        self._choose(logits_BV, answers)

    def _move_together(self) -> None:
        """Fill gaps from behind, where that saves rows of a step."""
        busy = self._busy()
        while busy and -(-len(busy) // ROWS) < -(-(busy[-1].slot + 1) // ROWS):
            answer = busy.pop()
            with self._lock:
                target = self._in_slots.index(None)
                self._in_slots[answer.slot], self._in_slots[target] = None, answer
            self._slots.move(answer.slot, target, answer.length)
            answer.slot = target
            busy = self._busy()

    def _choose(self, logits_BV: Tensor, answers: Sequence[_Answer]) -> None:
        """The next token of each answer, from logits (B, V)."""
        listed = self._logprobs(logits_BV, answers)
        chosen = choose_each(logits_BV, [answer.chooser for answer in answers])
        self._tokens_written += len(chosen)
        for answer, token, logprobs in zip(answers, chosen, listed, strict=True):
            self._take(answer, token, logprobs)

    def _take(self, answer: _Answer, token: int, logprobs: "_Logprobs | None") -> None:
        answer.written.append(token)
        reason: FinishReason | None = None
        text, written = "", len(answer.written)
        if token == self._end:
            reason = "stop"
        else:
            of_token = () if logprobs is None else (logprobs.of(token), logprobs.likeliest)
            text = answer.text.put(token, *of_token)
            if answer.text.stopped:
                reason = "stop"
            elif written == answer.task.max_tokens:
                reason = "length"
        if reason is not None and not answer.text.stopped:
            text += answer.text.end()
            # What was held back may hold a stop string after all: a part of a character has become U+FFFD.
            reason = "stop" if answer.text.stopped else reason
        tokens = answer.text.released_tokens()
        if reason is not None:
            tokens += answer.text.rest_of_tokens()
            with self._lock:
                self._leave(answer)
        if text or tokens or reason is not None:
            self._pieces.append((answer, Piece(answer.index, text, tuple(tokens), written, reason)))

    def _logprobs(self, logits_BV: Tensor, answers: Sequence[_Answer]) -> list["_Logprobs | None"]:
        wanted = [answer.task.logprobs for answer in answers]
        return [
            None if listed is None else _Logprobs(logits_V.log_softmax(dim=-1), listed)
            for logits_V, listed in zip(logits_BV, wanted, strict=True)
        ]

    def _hand_over(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces:
            self._post(lambda: _give(pieces))

    def _end_all(self, error: BaseException | None) -> None:
        with self._lock:
            self.failure = error
            self._stopping = True
            answers = [*self._busy(), *self._waiting]
            self._waiting.clear()
            self._in_slots = [None] * len(self._in_slots)
        reason = EngineStoppedError("the engine has stopped")
        reason.__cause__ = error
        self._pieces += [(answer, Piece(answer.index, error=reason)) for answer in answers]
        self._hand_over()


class _Logprobs:
    """The log-probabilities of a row, and the likeliest tokens, the best first."""

    def __init__(self, logprobs_V: Tensor, count: int) -> None:
        self._logprobs_V = logprobs_V
        best, ids = logprobs_V.topk(min(count, len(logprobs_V)))
        self.likeliest = tuple(map(Logprob, ids.tolist(), best.tolist()))

    def of(self, token: int) -> Logprob:
        return Logprob(token, float(self._logprobs_V[token]))


def _give(pieces: Sequence[tuple[_Answer, Piece]]) -> None:
    for answer, piece in pieces:
        if not answer.cancelled:
            answer.take(piece)
