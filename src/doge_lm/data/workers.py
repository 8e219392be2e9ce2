"""Work spread over processes; what comes out does not depend on how many there are."""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from doge_lm.errors import UserError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Items in flight for each process: enough that none waits while the results are written.
_LOOK_AHEAD = 3
# Where results are taken as they get ready, this many items wait for a process.
_WAITING = 2
_PROCESS_GONE = "a worker process ended abruptly, most likely for want of memory; run it again with a smaller"


def check_num_proc(num_proc: int) -> None:
    """Refuses a number of processes below one."""
    if num_proc < 1:
        raise UserError(f"--num_proc {num_proc} is not possible; it must be at least 1")


class Workers:
    """Some processes, each prepared once; with one, everything happens in this process.

    Processes are spawned, on every platform alike, and only when there is work for them. A context manager.

    Args:
        num_proc: how many, at least 1.
        start: a function of a module, called once in each process before any work.
        arguments: what it is called with; must be picklable.
        flag: what sets their number, for messages.
    """

    def __init__(
        self, num_proc: int, start: Callable[..., None], arguments: tuple[Any, ...], flag: str = "--num_proc"
    ) -> None:
        check_num_proc(num_proc)
        self._flag = flag
        self._num_proc = num_proc
        self._pool: ProcessPoolExecutor | None = None
        if num_proc == 1:
            start(*arguments)
        else:
            self._pool = ProcessPoolExecutor(
                num_proc,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(start, arguments),
            )

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Generator[_Result, None, None]:
        """Applies a function of a module to items; gives the results in order.

        Only a few items are taken ahead of the results; closing the generator gives up the rest. An exception of
        the function, `UserError` among them, reaches the caller as it is.

        Raises:
            UserError: if a process is gone (killed for want of memory, say).
        """
        if self._pool is None:
            yield from map(function, items)
            return
        pending: deque[Future[_Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(function, item))
                if len(pending) >= _LOOK_AHEAD * self._num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(f"{_PROCESS_GONE} {self._flag}") from error
        finally:
            for future in pending:
                future.cancel()

    def unordered(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item]
    ) -> Generator[tuple[_Item, _Result], None, None]:
        """Applies a function of a module to items; gives each with its result, as they get ready.

        At most two items more than there are processes have been taken and not given back. Otherwise as `map`.

        Raises:
            UserError: if a process is gone.
        """
        if self._pool is None:
            for item in items:
                yield item, function(item)
            return
        pending: dict[Future[_Result], _Item] = {}
        left = iter(items)
        try:
            while True:
                for item in itertools.islice(left, self._num_proc + _WAITING - len(pending)):
                    pending[self._pool.submit(function, item)] = item
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(f"{_PROCESS_GONE} {self._flag}") from error
        finally:
            for future in pending:
                future.cancel()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: one that was killed cannot tell it to stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
