"""Processes: results in order, bounded look-ahead, errors as they are."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from doge_lm.data.workers import Workers
from doge_lm.errors import UserError

_state: dict[str, Any] = {}


def start(factor: int) -> None:
    _state["factor"] = factor


def multiply(number: int) -> tuple[int, int]:
    """Later items are ready sooner."""
    time.sleep(0.02 * (5 - number % 5))
    if number == 13:
        raise UserError("item 13 is unlucky")
    if number == 17:
        os._exit(1)
    return number * _state["factor"], os.getpid()


def counting(numbers: range, taken: list[int]) -> Iterator[int]:
    for number in numbers:
        taken.append(number)
        yield number


@pytest.mark.parametrize("num_proc", [1, 2])
def test_results_come_in_order_and_errors_as_they_are(num_proc: int) -> None:
    with Workers(num_proc, start, (3,)) as workers:
        results = list(workers.map(multiply, range(10)))
        assert [value for value, _ in results] == [3 * number for number in range(10)]
        assert (os.getpid() in {process for _, process in results}) == (num_proc == 1)

        taken: list[int] = []
        ahead = workers.map(multiply, counting(range(10), taken))
        next(ahead)
        assert len(taken) <= 3 * num_proc
        ahead.close()

        with pytest.raises(UserError, match="item 13 is unlucky"):
            list(workers.map(multiply, range(10, 16)))
        assert [value for value, _ in workers.map(multiply, [1, 2])] == [3, 6]


def test_a_process_that_dies_is_a_user_error() -> None:
    with Workers(2, start, (1,)) as workers, pytest.raises(UserError, match="a worker process ended abruptly"):
        list(workers.map(multiply, [16, 17]))


def test_no_processes_are_refused() -> None:
    with pytest.raises(UserError, match="--num_proc 0 is not possible"):
        Workers(0, start, (1,))
