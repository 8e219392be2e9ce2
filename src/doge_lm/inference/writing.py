"""Lets a model of any architecture write: one call for new ids, and their text as they come."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from ..data.tokenizer import StreamDecoder
from ..errors import UserError
from ..model import DogeForCausalLM
from .decoding import Decoder, Sampling

OnToken = Callable[[int], None]


class Writer(ABC):
    """Continues prompts with a model."""

    @abstractmethod
    def write(
        self, prompts: Sequence[list[int]], settings: Sampling, ends: Sequence[int], on_token: OnToken | None = None
    ) -> list[list[int]]:
        """The new ids of each prompt.

        Args:
            prompts: the ids of each.
            settings: how tokens are chosen.
            ends: ids that end a row, at least one.
            on_token: is called with each new id of the only prompt as soon as it is there, with the one that ends it
                too. An exception that it raises ends the writing.

        Raises:
            ValueError: for a callback with several prompts.
        """


def make_writer(model: PreTrainedModel, compiled: bool, path: object) -> Writer:
    """By the project's own decoder for a Doge, by transformers' for other models.

    Args:
        model: on its device.
        compiled: compile the decoding step.
        path: where the model lies, for messages.

    Raises:
        UserError: for `compiled` with a model that is no Doge.
    """
    if isinstance(model, DogeForCausalLM):
        return _DecoderWriter(model, compiled)
    if compiled:
        raise UserError(f"--compile is for Doge models, and {path} holds a {type(model).__name__}; leave --compile out")
    return _TransformersWriter(model)


class _DecoderWriter(Writer):
    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        self._decoder = Decoder(model, compiled=compiled)

    def write(
        self, prompts: Sequence[list[int]], settings: Sampling, ends: Sequence[int], on_token: OnToken | None = None
    ) -> list[list[int]]:
        if on_token is None:
            return self._decoder.generate(prompts, settings, eos_token_id=ends)
        _refuse_several(prompts)
        return self._decoder.generate(
            prompts, settings, eos_token_id=ends, on_tokens=lambda newest: on_token(newest[0])
        )


class _TransformersWriter(Writer):
    """For a model whose cache or attention `Decoder` may not fit."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def write(
        self, prompts: Sequence[list[int]], settings: Sampling, ends: Sequence[int], on_token: OnToken | None = None
    ) -> list[list[int]]:
        if on_token is not None:
            _refuse_several(prompts)
        sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            repetition_penalty=settings.repetition_penalty,
            do_sample=settings.temperature > 0,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            **(sampling if settings.temperature > 0 else {}),
        )
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self._model.device)
            streamer = None if on_token is None else _Streamer(on_token)
            with torch.inference_mode():
                out = self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
                )
            rows.append(out[0, len(prompt) :].tolist())
        return rows


class _Streamer(BaseStreamer):
    """Hands on what transformers streams, without the prompt, which comes first."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the next ids, (T,) or (1, T)."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self._on_token(token)

    def end(self) -> None:
        """The last id has come."""


def _refuse_several(prompts: Sequence[list[int]]) -> None:
    if len(prompts) != 1:
        raise ValueError(f"tokens are shown as they come for one prompt, not for {len(prompts)}")


# ---------------------------------------------------------------------------------------------------------------
# Text of ids that come one by one
# ---------------------------------------------------------------------------------------------------------------


class Spelling(Protocol):
    """The text of ids that come one by one."""

    def put(self, index: int) -> str:
        """The text that has become whole with this id."""

    def end(self) -> str:
        """What is left of a character that was never completed."""


def make_spelling(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Spelling:
    """The exact spelling of this project's tokenizers for a Doge, one by any tokenizer's `decode` for other models."""
    if isinstance(model, DogeForCausalLM):
        return StreamDecoder(cast(PreTrainedTokenizerFast, tokenizer))
    return AnySpelling(tokenizer)


class AnySpelling:
    """By any tokenizer's `decode`, without its special tokens.

    `decode` looks at neighbours (it may drop the first space of what it is given), so that a few ids are decoded with
    those before them and without, and the difference is new.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0
        """The first id that is still decoded, as what stands before the new ones."""
        self._shown = 0
        """Ids whose text is given out."""

    def put(self, index: int) -> str:
        """The text that has become whole with this id; empty in the middle of a character."""
        self._ids.append(index)
        new = self._new_text()
        if not new or new.endswith("\ufffd"):  # a character may be half there
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return new

    def end(self) -> str:
        """What is left: U+FFFD for half a character, or nothing."""
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(len(self._ids))[len(self._decode(self._shown)) :]

    def _decode(self, stop: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[self._begin : stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
