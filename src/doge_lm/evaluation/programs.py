"""Runs a program that a model wrote against its tests, for HumanEval.

The program runs as a process of its own with limits on time, memory and files. That keeps accidents small; it is no
protection against a program that means harm, so nothing runs unless the user asked for it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SECONDS = 10.0
_MEMORY = 2 * 2**30
_FILE_BYTES = 2**20

# What the new process runs. Limits are set in it, for not every system lets its parent do so; Windows has none. The
# last line is reached only if nothing before it ended the process: a program that exits early has passed no test.
_LAUNCHER = f"""
import sys
program, done = sys.argv[1:]
with open(program, encoding="utf-8") as file:
    code = compile(file.read(), program, "exec", dont_inherit=True)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
    resource.setrlimit(resource.RLIMIT_FSIZE, ({_FILE_BYTES}, {_FILE_BYTES}))
except (ImportError, ValueError, OSError):
    pass
exec(code, {{"__name__": "__main__"}})
open(done, "w").close()
"""


def run_solution(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether a completed function passes its tests, as lm-evaluation-harness asks for it.

    Args:
        doc: a row of HumanEval: `prompt`, `test`, `entry_point`.
        results: one completion, or a list of several of which the first counts.

    Returns:
        `{"pass_at_1": 1.0}` or 0.0.
    """
    completion = results[0] if isinstance(results[0], str) else results[0][0]
    program = f"{doc['prompt']}{completion}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"
    return {"pass_at_1": float(passes(program))}


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends by itself within `seconds`, without an error."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        script, done = Path(place) / "program.py", Path(place) / "done"
        script.write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _LAUNCHER, str(script), str(done)],
            cwd=place,
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            ended_well = process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            ended_well = False
        finally:
            _end(process)
        return ended_well and done.is_file()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and those it started, but for one that made a session of its own."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):  # all of them may have ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
