"""`doge-lm generate MODEL "text" ["text" …]`: continue texts with a trained model."""

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..data.tokenizer import StreamDecoder, encode_text, load_tokenizer
from ..errors import UserError
from ..model import DogeForCausalLM
from .decoding import Decoder, Sampling, position_limit
from .loading import load_model, pick_device

# Logits over less than this overflow; 0 is greedy.
MIN_TEMPERATURE = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `doge-lm generate`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a trained model")
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="text",
        help="the beginning to continue, - (once) reads it from standard input; several are continued at once, each "
        "printed when all are whole",
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="stop after so many tokens (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default 0.8)"
    )
    parser.add_argument("--top_k", type=int, default=50, help="sample among the k likeliest; 0: all (default 50)")
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="sample among the likeliest that sum to p (default 0.95)"
    )
    parser.add_argument("--repetition_penalty", type=float, default=1.1, help="1.0 does nothing (default 1.1)")
    parser.add_argument("--seed", type=int, default=None, help="make sampling repeatable")
    parser.add_argument("--no_stream", action="store_true", help="print the text when it is whole, not as it grows")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding step of a Doge first: half a minute or more, made up for by many thousand tokens",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, …")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: as the checkpoint"
    )


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


def generation_settings(args: argparse.Namespace) -> Sampling:
    """The flags that say how tokens are chosen.

    Raises:
        UserError: for a value out of range.
    """
    ranges = {
        "temperature": (
            args.temperature == 0 or args.temperature >= MIN_TEMPERATURE,
            f"0, or {MIN_TEMPERATURE} or more",
        ),
        "seed": (args.seed is None or 0 <= args.seed < 2**63, "at least 0 and below 2**63"),
    }
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be {wanted}")
    try:
        return Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    except ValueError as error:  # it begins with the name of the setting, which is that of the flag
        raise UserError(f"--{error}") from error


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
    is_doge = isinstance(model, DogeForCausalLM)
    if compiled and not is_doge:
        raise UserError(
            f"--compile is for Doge models, and {tokenizer_path} holds a {type(model).__name__}; leave --compile out"
        )
    tokenizer = load_tokenizer(tokenizer_path)
    prompts = [[tokenizer.bos_token_id, *encode_text(tokenizer, text)] for text in texts]
    longest, limit = max(map(len, prompts)), position_limit(model)
    if longest + settings.max_new_tokens > limit:
        raise UserError(
            f"the text has {longest} tokens; with --max_new_tokens {settings.max_new_tokens} that is more than "
            f"the {limit} positions of the model"
        )
    end = tokenizer.eos_token_id
    printer = Printer(tokenizer) if stream and len(prompts) == 1 else None
    if is_doge:
        rows = _continue_by_decoder(Decoder(model, compiled=compiled), prompts, settings, end, printer)
    else:
        rows = _continue_by_transformers(model, prompts, settings, end, printer)
    if printer is not None:
        return [printer.text]
    whole = [_spell(tokenizer, prompt + row) for prompt, row in zip(prompts, rows, strict=True)]
    sys.stdout.write("".join(whole))
    return whole


class Printer(BaseStreamer):
    """Prints a text as its ids come, those of the prompt first, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._spelling = StreamDecoder(tokenizer)
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the next ids, (T,) or (1, T), as transformers gives them."""
        self.take(value.flatten().tolist())

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


def _continue_by_decoder(
    decoder: Decoder, prompts: list[list[int]], settings: Sampling, end: int, printer: Printer | None
) -> list[list[int]]:
    """The new ids of each prompt; with a printer, of the only one."""
    if printer is None:
        return decoder.generate(prompts, settings, eos_token_id=end)
    printer.take(prompts[0])
    rows = decoder.generate(prompts, settings, eos_token_id=end, on_tokens=printer.take)
    printer.end()
    return rows


def _continue_by_transformers(
    model: PreTrainedModel, prompts: list[list[int]], settings: Sampling, end: int, printer: Printer | None
) -> list[list[int]]:
    """As `_continue_by_decoder`, for a model of another kind, whose cache or attention `Decoder` may not fit."""
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        do_sample=settings.temperature > 0,
        eos_token_id=end,
        pad_token_id=end,
        **(sampling if settings.temperature > 0 else {}),
    )
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=printer)
        rows.append(out[0, len(prompt) :].tolist())
    return rows
