"""`doge-lm generate MODEL "text"`: continue a text with a trained model."""

import argparse
import io
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .. import model as _registered  # noqa: F401  (registers doge_ifa with the Auto classes)
from ..data.tokenizer import StreamDecoder, encode_text, load_tokenizer
from ..errors import UserError

# Logits over less than this overflow; 0 is greedy.
MIN_TEMPERATURE = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `doge-lm generate`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a trained model")
    parser.add_argument("text", help="the beginning to continue; - reads it from standard input")
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
    text = read_text(args.text)
    device = pick_device(args.device)
    logging.disable_progress_bar()  # the output is the text
    model = load_model(args.model, device, args.dtype)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    generate(model, args.model, text, settings, stream=not args.no_stream)
    return 0


def generation_settings(args: argparse.Namespace) -> GenerationConfig:
    """The flags as transformers' GenerationConfig.

    Raises:
        UserError: for a value out of range.
    """
    ranges = {
        "max_new_tokens": (args.max_new_tokens >= 1, "at least 1"),
        "temperature": (
            args.temperature == 0 or args.temperature >= MIN_TEMPERATURE,
            f"0, or {MIN_TEMPERATURE} or more",
        ),
        "top_k": (args.top_k >= 0, "at least 0"),
        "top_p": (0 < args.top_p <= 1, "above 0 and at most 1"),
        "repetition_penalty": (args.repetition_penalty > 0, "above 0"),
        "seed": (args.seed is None or 0 <= args.seed < 2**63, "at least 0 and below 2**63"),
    }
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be {wanted}")
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        repetition_penalty=args.repetition_penalty,
        do_sample=args.temperature > 0,
        **(sampling if args.temperature > 0 else {}),
    )


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


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" takes an accelerator where there is one.

    Raises:
        UserError: for a device that this machine lacks.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that cannot compute fails here
    except (RuntimeError, AssertionError) as error:
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        reason = str(error).partition("\n")[0].partition(":")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); this machine has: {available}") from error
    return device


def load_model(path: Path, device: torch.device, dtype: str = "auto") -> PreTrainedModel:
    """Load a checkpoint for inference.

    Raises:
        UserError: if `path` holds no model, or one that neither this package nor transformers knows.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no model (no config.json there); give the --output_dir of `doge-lm train`")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (ValueError, KeyError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        # transformers reports sizes that do not fit as RuntimeError, and a foreign config in any of these ways.
        raise UserError(f"the model in {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if loading["missing_keys"]:  # transformers would go on with random weights in their place
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"the model in {path} lacks {len(loading['missing_keys'])} weights ({missing}, …)")
    return model.to(device).eval()


class Printer(BaseStreamer):
    """Prints the text as its ids come, the prompt first, and keeps it."""

    def __init__(self, decoder: StreamDecoder, show: bool):
        self._decoder, self._show = decoder, show
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the next ids, (T,) or (1, T); `transformers` puts the prompt first."""
        self._take("".join(self._decoder.put(index) for index in value.flatten().tolist()))

    def end(self) -> None:
        """The last id has come."""
        self._take(self._decoder.end() + "\n")

    def _take(self, text: str) -> None:
        self.text += text
        if self._show:
            sys.stdout.write(text)
            sys.stdout.flush()


def generate(
    model: PreTrainedModel, tokenizer_path: Path, text: str, settings: GenerationConfig, stream: bool = True
) -> str:
    """Continue `text`, print it as it grows (`stream`) or whole, and return prompt and continuation.

    Raises:
        UserError: if the text is longer than the model's positions.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    prompt = [tokenizer.bos_token_id, *encode_text(tokenizer, text)]
    limit = model.config.max_position_embeddings
    if len(prompt) + settings.max_new_tokens > limit:
        raise UserError(
            f"the text has {len(prompt)} tokens; with --max_new_tokens {settings.max_new_tokens} that is more than "
            f"the {limit} positions of the model"
        )
    settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    settings.eos_token_id = tokenizer.eos_token_id
    input_ids = torch.tensor([prompt], device=model.device)
    printer = Printer(StreamDecoder(tokenizer), show=stream)
    with torch.inference_mode():
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=settings,
            streamer=printer,
        )
    if not stream:
        sys.stdout.write(printer.text)
    return printer.text
