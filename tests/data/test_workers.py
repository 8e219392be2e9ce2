"""Processes: results in order, bounded look-ahead, errors as they are."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from doge_lm.data import workers as module
from doge_lm.data.workers import MOST_MEMORY, Workers
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


_INTERRUPTED = r"""
import os, signal, sys, time
from doge_lm.data.workers import Workers
if __name__ == "__main__":
    # Tests in the background of a shell inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Workers(3, os.write, (1, b"begun\n")) as workers:
            for _ in workers.unordered(time.sleep, [60] * 9):
                pass
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize("begun", [0, 3])
def test_ctrl_c_ends_the_whole_group_quietly(begun: int) -> None:
    """While the processes are still importing, and when they are at work."""
    command = [sys.executable, "-u", "-c", _INTERRUPTED]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    ) as running:
        assert running.stdout is not None
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        for _ in range(begun):
            assert running.stdout.readline() == "begun\n"
        while not begun and children.exists() and len(children.read_text(encoding="ascii").split()) < 3:
            time.sleep(0.005)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=30)
    assert errors == ""
    assert running.returncode == 130


def hold(bytes_: int) -> tuple[float, float]:
    """Holds memory for a moment; says from when to when, by a clock that all processes share."""
    with module.memory(bytes_):
        begin = time.monotonic()
        time.sleep(0.05)
        return begin, time.monotonic()


def test_processes_hold_no_more_memory_together_than_there_is() -> None:
    amounts = [MOST_MEMORY // 2, MOST_MEMORY // 4, MOST_MEMORY, 0, 3 * MOST_MEMORY // 4] * 4
    with Workers(4, start, (1,)) as workers:
        held = list(workers.map(hold, amounts))
    events = sorted((at, amount) for ends, amount in zip(held, amounts, strict=True) for at, amount in
                    zip(ends, (amount, -amount), strict=True))  # fmt: skip
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    assert most == MOST_MEMORY


def hold_until(item: tuple[int, Path, int]) -> None:
    """Holds all memory until so many others have held a little."""
    bytes_, folder, others = item
    with module.memory(bytes_):
        if bytes_ < MOST_MEMORY:
            (folder / str(others)).touch()
            return
        deadline = time.monotonic() + 60
        while len(list(folder.iterdir())) < others:
            assert time.monotonic() < deadline, "the others wait"
            time.sleep(0.01)


def test_usual_amounts_of_memory_wait_for_nobody(tmp_path: Path) -> None:
    items = [(MOST_MEMORY, tmp_path, 6), *((2**20, tmp_path, number) for number in range(6))]
    with Workers(2, start, (1,)) as workers:
        done = [item[0] for item, _ in workers.unordered(hold_until, items)]  # it asks itself whether the others wait
    assert sorted(done) == sorted(item[0] for item in items)
    with module.memory(MOST_MEMORY), module.memory(MOST_MEMORY):  # in this process nothing is counted
        pass


def test_no_processes_are_refused() -> None:
    with pytest.raises(UserError, match="--num_proc 0 is not possible"):
        Workers(0, start, (1,))
