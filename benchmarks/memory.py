"""Anonymous memory of a command and of every process that it starts, sampled while it runs (Linux).

    python benchmarks/memory.py [--interval 0.05] COMMAND [ARGUMENT …]

Anonymous memory is what is not a mapped file: private pages, shared memory and what was swapped out (`RssAnon`,
`RssShmem` and `VmSwap` of /proc/PID/status). Prints one line of JSON: the peak of each process with its role, the peak
of their sum at one moment, wall time, and the CPU time of the command with all processes it has waited for. The exit
status is the command's.

Other programs use `measure(command)`.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 0.05
_FIELDS = ("RssAnon:", "RssShmem:", "VmSwap:")
_KEPT_COMMAND = 200  # characters


@dataclass
class ProcessPeak:
    """The most that one process held; `samples` says in how many samples it was seen."""

    pid: int
    role: str
    command: str
    peak_bytes: int = 0
    samples: int = 0


@dataclass
class Measurement:
    """What a command took. Sizes are bytes of anonymous memory."""

    command: list[str]
    exit_status: int
    wall_seconds: float
    cpu_seconds: float
    peak_of_sum_bytes: int
    longest_gap_seconds: float
    processes: list[ProcessPeak] = field(default_factory=list)

    def peak(self, role: str) -> int:
        """The largest peak among the processes of a role; 0 where there was none."""
        return max((process.peak_bytes for process in self.processes if process.role == role), default=0)

    def as_json(self) -> dict[str, Any]:
        """The measurement as values of JSON."""
        return asdict(self)


def anonymous_bytes(pid: int) -> int | None:
    """The anonymous memory of a process at this moment, or None if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(_FIELDS))


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are still its children."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return found
    for thread in threads:
        try:
            listed = Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended since
        found += map(int, listed.split())
    return found


class MemoryWatch:
    """Samples a process and its descendants in a thread. A context manager.

    A process whose parent has ended is still followed, once it was seen.

    Args:
        pid: the topmost process.
        interval: seconds between samples.
    """

    def __init__(self, pid: int, interval: float = INTERVAL_SECONDS) -> None:
        self.peak_of_sum = 0
        self.longest_gap = 0.0
        self._root = pid
        self._interval = interval
        self._known: dict[tuple[int, str], ProcessPeak] = {}  # (pid, start time), since pids are used again
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory watch", daemon=True)
        self._failure: BaseException | None = None

    @property
    def processes(self) -> list[ProcessPeak]:
        """What was seen so far, in the order of appearance."""
        return list(self._known.values())

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def sample(self) -> None:
        """Takes one sample."""
        total = 0
        for pid in self._alive():
            size, start = anonymous_bytes(pid), _start_time(pid)
            if size is None or start is None:
                continue
            total += size
            entry = self._known.setdefault((pid, start), ProcessPeak(pid, "", ""))
            command = _command(pid)  # read each time: between fork and exec it is still the parent's
            if command:
                entry.command = command[:_KEPT_COMMAND]
                entry.role = "main" if pid == self._root else _role(command)
            entry.peak_bytes = max(entry.peak_bytes, size)
            entry.samples += 1
        self.peak_of_sum = max(self.peak_of_sum, total)

    def _alive(self) -> list[int]:
        waiting = [self._root, *(pid for pid, start in self._known if _start_time(pid) == start)]
        found: dict[int, None] = {}
        while waiting:
            pid = waiting.pop()
            if pid not in found:
                found[pid] = None
                waiting += children(pid)
        return list(found)

    def _run(self) -> None:
        before = time.monotonic()
        try:
            while not self._ended.wait(self._interval):
                self.sample()
                now = time.monotonic()
                self.longest_gap = max(self.longest_gap, now - before)
                before = now
        except BaseException as error:  # handed to who waits for the thread
            self._failure = error


def _start_time(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]  # the name in brackets may itself hold spaces and brackets


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _role(command: str) -> str:
    if "spawn_main" in command or "--multiprocessing-fork" in command:
        return "worker"
    return "resource tracker" if "resource_tracker" in command else "child"


def measure(command: Sequence[str], *, interval: float = INTERVAL_SECONDS, **options: Any) -> Measurement:
    """Runs a command to its end and measures it.

    Args:
        command: the program and its arguments.
        interval: seconds between samples.
        options: for `subprocess.Popen` (`env`, `cwd`, `stdout`, …).
    """
    begin = time.monotonic()
    process = subprocess.Popen(list(command), **options)
    with MemoryWatch(process.pid, interval) as watch:
        # wait4 tells the CPU time of the process and of all that it has waited for.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Measurement(
        command=list(command),
        exit_status=process.returncode,
        wall_seconds=time.monotonic() - begin,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_of_sum_bytes=watch.peak_of_sum,
        longest_gap_seconds=watch.longest_gap,
        processes=watch.processes,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interval", type=float, default=INTERVAL_SECONDS, help="seconds between samples")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command to run")
    args = parser.parse_args()
    if not args.command:
        parser.error("a command is needed")
    measurement = measure(args.command, interval=args.interval)
    print(json.dumps(measurement.as_json()))
    status = measurement.exit_status
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
