"""The flags that commands share which let a model write: how tokens are chosen, and where the model computes."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import UserError
from .decoding import Sampling

# Logits over less than this overflow; 0 is greedy.
MIN_TEMPERATURE = 0.01

SETTING_TYPES: Mapping[str, type[int] | type[float]] = {
    field.name: float if isinstance(field.default, float) else int for field in fields(Sampling)
}
"""The settings of `Sampling`, and what each is; `seed` can be None as well."""


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say how and where a model computes."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding step of a Doge first: half a minute or more, made up for by many thousand tokens",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, …")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: as the checkpoint"
    )


def check_settings(values: Mapping[str, Any]) -> Sampling:
    """Settings by their names, in the ranges that the flags have.

    Raises:
        ValueError: for a value out of range; the message begins with the name of the setting.
    """
    ranges = {
        "temperature": (
            values["temperature"] == 0 or values["temperature"] >= MIN_TEMPERATURE,
            f"0, or {MIN_TEMPERATURE} or more",
        ),
        "seed": (values["seed"] is None or 0 <= values["seed"] < 2**63, "at least 0 and below 2**63"),
    }
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise ValueError(f"{name} is {values[name]}; it must be {wanted}")
    return Sampling(**values)


def generation_settings(args: argparse.Namespace) -> Sampling:
    """The flags that say how tokens are chosen.

    Raises:
        UserError: for a value out of range.
    """
    try:
        return check_settings({name: getattr(args, name) for name in SETTING_TYPES})
    except ValueError as error:  # it begins with the name of the setting, which is that of the flag
        raise UserError(f"--{error}") from error
