"""Work spread over processes; what comes out does not depend on how many there are."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnContext
from types import TracebackType
from typing import Any, TypeVar

from doge_lm.errors import UserError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Items in flight for each process: enough that none waits while the results are written.
_LOOK_AHEAD = 3
# Where results are taken as they get ready, this many items wait for a process.
_WAITING = 2
# What little of the input asks for beyond the usual, large pages of a file say, all processes take from one store.
_USUAL_MEMORY = 64 * 2**20
MOST_MEMORY = 768 * 2**20
_MEMORY_UNIT = 32 * 2**20
_MANAGER_SECONDS = 5  # at most; it takes milliseconds
_PROCESS_GONE = "a worker process ended abruptly, most likely for want of memory; run it again with a smaller"


def check_num_proc(num_proc: int) -> None:
    """Refuses a number of processes below one."""
    if num_proc < 1:
        raise UserError(f"--num_proc {num_proc} is not possible; it must be at least 1")


class Workers:
    """Some processes, each prepared once; with one, everything happens in this process.

    Processes are spawned, on every platform alike, and only when there is work for them. A context manager. Ctrl-C
    reaches this process alone, which then ends the others.

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
            context = multiprocessing.get_context("spawn")
            # Nothing is ever sent: that this end is closed tells the processes to end at once.
            ending, self._ending = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                num_proc,
                mp_context=context,
                initializer=_start,
                initargs=(start, arguments, ending, _MemoryStore(context)),
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
                pending.append(self._submit(self._pool, function, item))
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
                    pending[self._submit(self._pool, function, item)] = item
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(f"{_PROCESS_GONE} {self._flag}") from error
        finally:
            for future in pending:
                future.cancel()

    @staticmethod
    def _submit(pool: ProcessPoolExecutor, function: Callable[[_Item], _Result], item: _Item) -> "Future[_Result]":
        """Hands an item out; processes that are spawned by it are deaf to Ctrl-C from their first moment."""
        with _interrupts_held_back():
            return pool.submit(function, item)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            # After Ctrl-C nobody waits for what is begun. The pool gives up what is not begun first: a pool that finds
            # its processes gone would complain of every item that was cancelled.
            interrupted = kind is not None and not issubclass(kind, Exception)
            manager = getattr(self._pool, "_executor_manager_thread", None)  # forgotten by `shutdown`
            self._pool.shutdown(wait=not interrupted, cancel_futures=True)
            self._ending.close()
            if interrupted:
                # Those that are just starting would find no semaphores, which end with this process, and say so.
                for process in multiprocessing.active_children():
                    process.kill()
                # At its exit Python 3.11 wakes the pool's thread through a pipe, and prints a traceback if the thread
                # is closing that just then. Without processes it ends at once.
                if isinstance(manager, threading.Thread):
                    manager.join(_MANAGER_SECONDS)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Blocks SIGINT, which spawned processes inherit; one that comes meanwhile is met at the end of the block.

    Without this, processes that are still importing when Ctrl-C reaches the group print a traceback each. Windows has
    no such thing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # spawning starts it, and would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _MemoryStore:
    """Units of memory that processes take and give back."""

    def __init__(self, context: SpawnContext) -> None:
        self._units = context.Semaphore(MOST_MEMORY // _MEMORY_UNIT)
        self._turn = context.Lock()  # two that take their units by turns could wait for each other for ever

    @contextmanager
    def take(self, bytes_: int) -> Iterator[None]:
        count = min(-(-bytes_ // _MEMORY_UNIT), MOST_MEMORY // _MEMORY_UNIT)
        with self._turn:
            for _ in range(count):
                self._units.acquire()
        try:
            yield
        finally:
            for _ in range(count):
                self._units.release()


_store: dict[str, _MemoryStore] = {}  # of a process of `Workers`


def memory(bytes_: int) -> AbstractContextManager[None]:
    """Says that the process is to take so much memory at once, for as long as the context is open.

    Above what is usual, it waits until the processes of its `Workers` together take no more than `MOST_MEMORY` of it.
    Elsewhere it does nothing.
    """
    if bytes_ <= _USUAL_MEMORY or "store" not in _store:
        return nullcontext()
    return _store["store"].take(bytes_)


def _start(
    start: Callable[..., None], arguments: tuple[Any, ...], ending: connection.Connection, store: _MemoryStore
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _store["store"] = store
    threading.Thread(target=_end_with_parent, args=(ending,), daemon=True).start()
    start(*arguments)


def _end_with_parent(ending: connection.Connection) -> None:
    """Ends this process when its parent says so, or is gone: one that was killed cannot tell it to stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel, ending])
        os._exit(1)
