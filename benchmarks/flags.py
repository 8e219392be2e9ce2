"""What the commands of the benchmarks share: how they end, and flags that are numbers."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from doge_lm.errors import UserError


def run_command(main: Callable[[], int]) -> NoReturn:
    """End the process with what `main` returns, or with the message of a UserError and 1."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")


def positive(text: str) -> int:
    """A flag's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def above_zero(text: str) -> float | None:
    """The finite number above 0 that a text is, if it is one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def positive_number(text: str) -> float:
    """A flag's number above 0."""
    number = above_zero(text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number
