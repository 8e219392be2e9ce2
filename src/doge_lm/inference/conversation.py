"""A conversation: what was said, how it becomes a prompt of limited length, and how it lies in a file."""

import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.manifest import write_record
from ..data.sources import ConversationRow, read_located_rows
from ..errors import UserError
from ..model import DogeForCausalLM
from .chat_words import RefusedError
from .decoding import Sampling, position_limit
from .writing import Writer, make_spelling, make_writer

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Exchange:
    """A question and its answer."""

    question: str
    answer: str


@dataclass
class Conversation:
    """What was said, from the beginning.

    Attributes:
        system: the system prompt; empty: none.
        exchanges: questions with their answers, in order.
    """

    system: str = ""
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self, question: str, left_out: int = 0) -> Messages:
        """What a chat template takes, up to a new question, without so many of the oldest exchanges."""
        said: Messages = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges[left_out:]:
            said.append({"role": "user", "content": exchange.question})
            said.append({"role": "assistant", "content": exchange.answer})
        return [*said, {"role": "user", "content": question}]

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the conversation as one JSON line, as the data commands read it; whole or not at all.

        Raises:
            RefusedError: if nothing was said, the name is not that of a `.jsonl` file, the file is there and is not to
                be overwritten, or it cannot be written.
        """
        if not self.exchanges:
            raise RefusedError("nothing_said")
        if path.suffix.lower() != ".jsonl":
            raise RefusedError("not_jsonl", path=path)
        turns = [("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            turns += [("human", exchange.question), ("gpt", exchange.answer)]
        try:
            if path.exists() and not overwrite:
                raise RefusedError("exists", path=path)
            write_record(path, {"conversations": [{"from": role, "value": text} for role, text in turns]})
        except (OSError, ValueError) as error:  # a name can hold a NUL
            reason = getattr(error, "strerror", None) or error
            raise RefusedError("cannot_save", path=path, reason=reason) from error

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """The first conversation of a file that the data commands read.

        Raises:
            RefusedError: if it cannot be read, or questions and answers do not take turns.
        """
        try:
            location, row = next(read_located_rows([path], "finetune"))
        except StopIteration:
            raise RefusedError("no_conversation", path=path) from None
        except (OSError, ValueError, UserError) as error:
            raise RefusedError("cannot_load", reason=error) from error
        if not isinstance(row, ConversationRow):
            raise TypeError(f"{location} was read as {type(row).__name__}, though conversations were asked for")
        turns = list(row.turns)
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
        if not turns or [role for role, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise RefusedError("not_in_turns", place=location)
        texts = [text for _, text in turns]
        return cls(system, [Exchange(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)])


class ChatTemplate:
    """A tokenizer's chat template, from messages to ids.

    What stands in a message never becomes a control token: the template of this project's tokenizers sees to that, and
    transformers for others, where its version can (`sanitize_control_tokens`).

    Args:
        tokenizer: the tokenizer.
        path: where it lies, for messages.

    Raises:
        UserError: if there is no template, or it fails on the simplest conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: object) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in {path} has no chat template, so it is not known how a conversation is written for "
                "this model; put its chat_template.jinja there (`doge-lm tokenizer build` makes that of a Doge), or "
                "continue plain text with `doge-lm generate`"
            )
        self._tokenizer = tokenizer
        takes = inspect.signature(tokenizer.apply_chat_template).parameters
        escapes_itself = bool(getattr(tokenizer, "split_special_tokens", False))
        self._options = {} if escapes_itself or "sanitize_control_tokens" not in takes else {_SANITIZE: True}
        try:
            self._ids([{"role": "user", "content": "x"}])
        except Exception as error:  # a template is a program: it may stumble over anything
            raise UserError(
                f"the chat template in {path} cannot be used ({type(error).__name__}: {error}); mend its "
                "chat_template.jinja"
            ) from error

    def ids(self, messages: Messages) -> list[int]:
        """The ids of a conversation, up to where the assistant's words begin.

        Raises:
            RefusedError: if the template does not take it.
        """
        try:
            return self._ids(messages)
        except TemplateError as error:
            raise RefusedError("template", reason=error) from error

    def check_system(self, text: str) -> None:
        """Make sure that a system prompt, if there is one, reaches the model.

        Raises:
            RefusedError: if the template refuses it, or leaves it out.
        """
        question = {"role": "user", "content": "x"}
        if not text:
            return
        try:
            found = self._ids([{"role": "system", "content": text}, question])
        except TemplateError as error:
            raise RefusedError("no_system_role") from error
        if found == self._ids([question]):
            raise RefusedError("no_system_role")

    def _ids(self, messages: Messages) -> list[int]:
        output = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **self._options
        )
        ids: list[int] = output["input_ids"]
        return ids


_SANITIZE = "sanitize_control_tokens"


@dataclass(frozen=True)
class Prompt:
    """The ids of a conversation that fit, and how many of its oldest exchanges are not among them."""

    ids: list[int]
    left_out: int


class Answerer:
    """Answers questions with a model.

    Args:
        model: on its device.
        tokenizer: its tokenizer, with a chat template.
        path: where both lie, for messages.
        compiled: compile the decoding step of a Doge.
        context_length: tokens that the model may see at once; None: as many as it has positions.

    Raises:
        UserError: if model and tokenizer do not make a chat model, or a flag does not fit them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        path: object,
        *,
        compiled: bool = False,
        context_length: int | None = None,
    ) -> None:
        self.template = ChatTemplate(tokenizer, path)
        self._ends = _end_ids(model, tokenizer, path)
        self._writer: Writer = make_writer(model, compiled, path)
        self._model = model
        self._tokenizer = tokenizer
        self.limit = position_limit(model)
        if context_length is not None:
            if not 2 <= context_length <= self.limit:
                raise UserError(
                    f"--context_length is {context_length}; it must be from 2 to {self.limit}, the positions of the "
                    "model"
                )
            self.limit = context_length

    def fit(self, conversation: Conversation, question: str, new: int) -> Prompt:
        """The prompt for a question, with as much of the conversation before it as leaves room for the answer.

        The system prompt always stays; the oldest exchanges go first.

        Args:
            conversation: what was said before.
            question: what is said now.
            new: tokens that the answer may take.

        Raises:
            RefusedError: if the question alone is too long.
        """

        def ids(left_out: int) -> list[int]:
            return self.template.ids(conversation.messages(question, left_out))

        whole = ids(0)
        if len(whole) + new <= self.limit:
            return Prompt(whole, 0)
        count = len(conversation.exchanges)
        alone = ids(count) if count else whole
        if len(alone) + new > self.limit:
            raise RefusedError("too_long", tokens=len(alone), new=new, limit=self.limit)
        left_out = bisect_left(range(count), True, lo=1, key=lambda number: len(ids(number)) + new <= self.limit)
        return Prompt(ids(left_out), left_out)

    def answer(self, prompt: Sequence[int], settings: Sampling, show: Callable[[str], None]) -> bool:
        """Write an answer, up to the end of the turn.

        Args:
            prompt: ids of a conversation.
            settings: how tokens are chosen.
            show: takes the text as it comes; an exception that it raises ends the writing. It is called for every
                token, with an empty text too.

        Returns:
            Whether the model has ended its turn, rather than used up its tokens.

        Raises:
            RefusedError: if the device has too little memory.
        """
        spelling = make_spelling(self._tokenizer, self._model)

        def take(token: int) -> None:
            show("" if token in self._ends else spelling.put(token))

        try:
            (new,) = self._writer.write([list(prompt)], settings, self._ends, take)
        except torch.OutOfMemoryError as error:
            raise RefusedError("no_memory") from error
        show(spelling.end())
        return new[-1] in self._ends


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: object) -> list[int]:
    """The ids that end a turn: `</s>` of a Doge, whatever model and tokenizer name of another."""
    of_tokenizer = tokenizer.eos_token_id
    if isinstance(model, DogeForCausalLM):
        vocabulary = model.config.vocab_size
        if len(tokenizer) > vocabulary:
            raise UserError(
                f"the tokenizer in {path} has {len(tokenizer):,} pieces, and the model knows {vocabulary:,}; put the "
                "tokenizer there that it was trained with"
            )
        return [of_tokenizer]
    of_model: Any = getattr(model.generation_config, "eos_token_id", None)
    named = [*(of_model if isinstance(of_model, list) else [of_model]), of_tokenizer]
    ends = list(dict.fromkeys(token for token in named if token is not None))
    if not ends:
        raise UserError(f"neither the model nor the tokenizer in {path} names a token that ends a turn (eos_token)")
    return ends
