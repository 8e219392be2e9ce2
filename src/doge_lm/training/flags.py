"""The flags of the commands that train, apart from what these import: help, and a wrong flag, take no time."""

import argparse
from pathlib import Path

from doge_lm.training.presets import DPO, FINETUNE, preset_paths


def add_pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train`."""
    _add_config_argument(parser)
    parser.add_argument(
        "--tokenizer_path", type=Path, default=Path("tokenizer"), help="the tokenizer (default: %(default)s)"
    )
    _add_run_arguments(parser, output_dir="results", logging_dir="log")


def add_finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `finetune`."""
    _add_tuning_arguments(parser, FINETUNE)


def add_dpo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `dpo`."""
    _add_tuning_arguments(parser, DPO)


def _add_tuning_arguments(parser: argparse.ArgumentParser, stage: str) -> None:
    """Add the flags of a kind of training that starts from a model; output, log and presets are named after it."""
    _add_config_argument(parser, stage)
    parser.add_argument(
        "--model_path", type=Path, default=Path("results"), help="the model to start from (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer_path", type=Path, help="the tokenizer that the data was made with (default: that of the model)"
    )
    _add_run_arguments(parser, output_dir=f"results_{stage}", logging_dir=f"log_{stage}")


def _add_config_argument(parser: argparse.ArgumentParser, folder: str = "") -> None:
    presets = ", ".join(preset_paths(folder))
    parser.add_argument("--config_path", required=True, help=f"a settings file, or the name of a preset: {presets}")


def _add_run_arguments(parser: argparse.ArgumentParser, output_dir: str, logging_dir: str) -> None:
    """Add the flags that every kind of training has."""
    parser.add_argument(
        "--logging_dir", type=Path, default=Path(logging_dir), help="where logs go (default: %(default)s)"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(output_dir),
        help="where checkpoints and the model go (default: %(default)s)",
    )
    parser.add_argument("--dataset_path", help="the prepared set, in place of the settings' dataset_path")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from this checkpoint; without a value, from the last one in --output_dir",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, e.g. --set learning_rate=3e-4; may be repeated",
    )
    parser.add_argument("--strict", action="store_true", help="fail if the data is smaller than the settings ask for")
    parser.add_argument("--overwrite", action="store_true", help="start anew, removing the run in --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop")
