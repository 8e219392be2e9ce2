"""The flags of the commands on a trained model, apart from what these import: help, and a wrong flag, take no time."""

import argparse
from pathlib import Path

from .chat_words import LANGUAGES

API_KEY_VARIABLE = "DOGE_LM_API_KEY"

DEFAULT_CONTEXT, DEFAULT_SLOTS = 2048, 64
"""Of `serve`."""

MAX_NEW_TOKENS = 512
"""Tokens of an answer of `chat` by default, or half of the positions if that is less."""

EXPORT_FORMATS = ("transformers", "onnx")
EXPORT_KINDS = ("int8", "int4")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
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
    _add_sampling_arguments(parser)
    parser.add_argument("--no_stream", action="store_true", help="print the text when it is whole, not as it grows")
    _add_model_arguments(parser)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `doge-lm chat`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a trained model")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt (default: none)")
    parser.add_argument(
        "--message",
        action="append",
        metavar="TEXT",
        help="answer this and leave; given several times: one after the other, in one conversation",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=None,
        help=f"stop an answer after so many tokens (default {MAX_NEW_TOKENS}, or half of --context_length)",
    )
    parser.add_argument(
        "--context_length",
        type=int,
        default=None,
        metavar="N",
        help="let the model see so many tokens at once, the answer's included (default: as many as it was trained on)",
    )
    _add_sampling_arguments(parser)
    _add_model_arguments(parser)
    parser.add_argument(
        "--language",
        choices=["auto", *LANGUAGES],
        default="auto",
        help="of the program's own words (auto: by the locale)",
    )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `doge-lm export`."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="directory of a trained model, a checkpoint of a run, or an adapter"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where the exported model belongs")
    parser.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        default="transformers",
        help="transformers (default): for AutoModelForCausalLM; onnx: one graph with a cache, for onnxruntime",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights that are not quantized; auto: as the checkpoint"
    )
    parser.add_argument(
        "--quantize", choices=EXPORT_KINDS, help="linear maps with 8-bit (torchao) or 4-bit weights (bitsandbytes, NF4)"
    )
    parser.add_argument(
        "--base_model", type=Path, help="the model that an adapter belongs to; default: as its adapter_config.json says"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --output_dir")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `doge-lm serve`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a trained model")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0: any that is free (default 8000)")
    parser.add_argument("--model_name", help="the model's name in the API (default: the name of its directory)")
    parser.add_argument(
        "--api_key", help=f"key that clients must send (default: the environment variable {API_KEY_VARIABLE}, or none)"
    )
    parser.add_argument(
        "--allow_origin",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="sites whose pages may use the server, e.g. https://chat.example.org",
    )
    parser.add_argument(
        "--allow_host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names by which the server may be asked, besides localhost, this machine's name, and addresses",
    )
    parser.add_argument(
        "--max_slots",
        type=int,
        help=f"answers that are written at once (default {DEFAULT_SLOTS}, or as many as half of the free memory holds)",
    )
    parser.add_argument("--max_queue", type=int, default=256, help="answers that may wait for a slot (default 256)")
    parser.add_argument(
        "--max_context",
        type=int,
        help="tokens of a prompt and its answer together (default: as many as the model was trained on, "
        f"{DEFAULT_CONTEXT} at most)",
    )
    parser.add_argument("--max_tokens_limit", type=int, help="tokens of an answer (default: --max_context)")
    parser.add_argument(
        "--max_body_bytes", type=int, default=1 << 20, help="largest request, in bytes (default 1048576)"
    )
    parser.add_argument(
        "--drain_seconds",
        type=float,
        default=30.0,
        help="on SIGTERM or Ctrl-C, let answers that are under way go on for so long (default 30)",
    )
    parser.add_argument(
        "--threads", type=int, help="threads that compute, on a CPU (default: all cores but one, which sends)"
    )
    add_device_arguments(parser, "float32 on a CPU, as the checkpoint elsewhere")


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say how a token is chosen, all but `--max_new_tokens`."""
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default 0.8)"
    )
    parser.add_argument("--top_k", type=int, default=50, help="sample among the k likeliest; 0: all (default 50)")
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="sample among the likeliest that sum to p (default 0.95)"
    )
    parser.add_argument("--repetition_penalty", type=float, default=1.1, help="1.0 does nothing (default 1.1)")
    parser.add_argument("--seed", type=int, default=None, help="make sampling repeatable")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say how and where a model computes."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding step of a Doge first: half a minute or more, made up for by many thousand tokens",
    )
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser, auto: str = "as the checkpoint") -> None:
    """Declare the flags that say where a model computes, and in what type; `auto` is what that means for the type."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, …")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=f"auto: {auto}")
