"""`doge-lm generate MODEL "text" ["text" …]`: continue texts with a trained model."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from ..data.tokenizer import StreamDecoder, encode_text, load_tokenizer
from ..errors import UserError
from .decoding import Sampling, position_limit
from .loading import load_model, pick_device
from .settings import generation_settings
from .writing import make_writer


def run(args: argparse.Namespace) -> int:
    """Run `doge-lm generate`."""
    settings = generation_settings(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A redirected Windows console has a code page that lacks Chinese.
        sys.stdout.reconfigure(encoding="utf-8")
    if args.texts.count("-") > 1:
        raise UserError("the text - is given more than once, but standard input can be read only once; give one -")
    texts = [read_text(text) for text in args.texts]
    device = pick_device(args.device)
    logging.disable_progress_bar()  # the output is the text
    model = load_model(args.model, device, args.dtype)
    generate(model, args.model, texts, settings, stream=not args.no_stream, compiled=args.compile)
    return 0


def read_text(argument: str) -> str:
    """The prompt: the argument itself, or standard input for "-", without the newline that ends its last line.

    Raises:
        UserError: if it is not UTF-8.
    """
    place = "standard input" if argument == "-" else "the text"
    try:
        if argument == "-":
            argument = sys.stdin.read().removesuffix("\n")
        argument.encode("utf-8")  # undecodable bytes of the command line arrive as lone surrogates
    except UnicodeError as error:
        raise UserError(f"{place} is not UTF-8 ({error}); convert it first") from error
    return argument


def generate(
    model: PreTrainedModel,
    tokenizer_path: Path,
    texts: Sequence[str],
    settings: Sampling,
    stream: bool = True,
    compiled: bool = False,
) -> list[str]:
    """Continue texts, print each with its continuation, one after the other, and return them.

    A single text is printed as it grows (`stream`).

    Raises:
        UserError: if a text is longer than the model's positions, and for `compiled` with a model that is no Doge.
    """
    writer = make_writer(model, compiled, tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
    prompts = [[tokenizer.bos_token_id, *encode_text(tokenizer, text)] for text in texts]
    longest, limit = max(map(len, prompts)), position_limit(model)
    if longest + settings.max_new_tokens > limit:
        raise UserError(
            f"the text has {longest} tokens; with --max_new_tokens {settings.max_new_tokens} that is more than "
            f"the {limit} positions of the model"
        )
    ends = [tokenizer.eos_token_id]
    if stream and len(prompts) == 1:
        printer = Printer(tokenizer)
        printer.take(prompts[0])
        writer.write(prompts, settings, ends, lambda token: printer.take([token]))
        printer.end()
        return [printer.text]
    rows = writer.write(prompts, settings, ends)
    whole = [_spell(tokenizer, prompt + row) for prompt, row in zip(prompts, rows, strict=True)]
    sys.stdout.write("".join(whole))
    return whole


class Printer:
    """Prints a text as its ids come, those of the prompt first, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._spelling = StreamDecoder(tokenizer)
        self.text = ""

    def take(self, ids: Sequence[int]) -> None:
        """Take the next ids."""
        self._show("".join(map(self._spelling.put, ids)))

    def end(self) -> None:
        """The last id has come."""
        self._show(self._spelling.end() + "\n")

    def _show(self, text: str) -> None:
        self.text += text
        sys.stdout.write(text)
        sys.stdout.flush()


def _spell(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    spelling = StreamDecoder(tokenizer)
    return "".join(map(spelling.put, ids)) + spelling.end() + "\n"
