"""The flags of `doge-lm eval`, apart from what it imports: help, and a wrong flag, take no time."""

import argparse
from pathlib import Path

from doge_lm.evaluation.suites import SUITES
from doge_lm.inference.flags import add_device_arguments

HARNESS, LIGHTEVAL = "harness", "lighteval"
"""The engines."""

RESULT_NAME = "results.json"
"""What is written to `--output_dir`."""

BATCH_TOKENS, BATCH_TOKENS_CPU = 65_536, 4096
SEED = 1234


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `doge-lm eval`."""
    parser.add_argument(
        "models",
        nargs="+",
        type=Path,
        metavar="MODEL",
        help=f"directory of a trained model, or of results ({RESULT_NAME}); the first is compared with each other",
    )
    parser.add_argument(
        "--engine",
        choices=[HARNESS, LIGHTEVAL],
        default=HARNESS,
        help="harness (default): lm-evaluation-harness; lighteval: its tasks and metrics, in an environment of its own",
    )
    parser.add_argument(
        "--tasks", action="append", default=[], metavar="NAME,…", help="tasks of the engine, or of your own"
    )
    parser.add_argument(
        "--suite",
        choices=sorted(SUITES),
        help="doge: the published list, from the hub; local: the ready tasks whose files are in --data_dir (the "
        "default with it)",
    )
    parser.add_argument("--data_dir", type=Path, help="where local copies of benchmarks lie, JSON lines each")
    parser.add_argument(
        "--include_path",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder with more task files; for lighteval, a Python file with a TASKS_TABLE",
    )
    parser.add_argument(
        "--texts",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="bits per byte of a file or folder of texts, by name: en=books.jsonl; may be repeated",
    )
    parser.add_argument("--window", type=int, help="tokens of a window of a long text (default: up to 2,048)")
    parser.add_argument("--num_fewshot", type=int, help="examples before a question (default: the task's own number)")
    parser.add_argument("--limit", type=int, help="so many samples of each task or group of texts, to try it out")
    parser.add_argument("--chat", action="store_true", help="put questions as a user's turn, for a chat model")
    parser.add_argument("--system", help="the system prompt with --chat")
    parser.add_argument("--seed", type=int, default=SEED, help="draws the examples (default: %(default)s)")
    parser.add_argument(
        "--run_code", action="store_true", help="run the programs that the model writes, on this machine, unprotected"
    )
    parser.add_argument("--output_dir", type=Path, help=f"write {RESULT_NAME} there, with each sample's score")
    parser.add_argument("--overwrite", action="store_true", help=f"replace an earlier {RESULT_NAME} in --output_dir")
    parser.add_argument(
        "--batch_tokens", type=int, help=f"tokens at a time (default: {BATCH_TOKENS:,}, on a CPU {BATCH_TOKENS_CPU:,})"
    )
    add_device_arguments(parser)
