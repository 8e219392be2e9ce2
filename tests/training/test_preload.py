"""Processes that find their modules imported."""

import multiprocessing
import subprocess
import sys

import pytest

from doge_lm.training import preload

PROBE = """
import multiprocessing, sys
from doge_lm.training import preload

def probe(pipe):
    pipe.send([name in sys.modules for name in preload._IMPORTED])

if __name__ == "__main__":
    preload.start(sys.argv[1:])
    from multiprocessing import forkserver
    print("running:", forkserver._forkserver._forkserver_pid is not None)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context(preload.CONTEXT).Process(target=probe, args=(there,))
    process.start()
    print("imported:", here.recv())
    process.join()
    print("heavy:", "torch" in sys.modules)
"""


@pytest.mark.skipif(preload.CONTEXT != "forkserver", reason="there is no fork server on this system")
@pytest.mark.parametrize(("arguments", "runs"), [([], True), (["--dry_run"], False), (["--help"], False)])
def test_processes_are_born_with_what_they_need(tmp_path, arguments, runs):
    script = tmp_path / "probe.py"
    script.write_text(PROBE, encoding="utf-8")
    output = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert output.splitlines() == [f"running: {runs}", f"imported: {[runs, runs]}", "heavy: False"]


def test_names_modules_that_exist():
    """A module that cannot be imported would be passed over without a word."""
    for name in preload._IMPORTED:
        __import__(name)
    assert preload.CONTEXT in multiprocessing.get_all_start_methods()
