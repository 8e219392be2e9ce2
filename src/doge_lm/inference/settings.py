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
