"""What the tests of benchmarks share: a benchmark's command, run in this process."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from transformers.utils import logging

Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a benchmark with some flags and returns what it printed: a process would import PyTorch first."""

    def run(benchmark: ModuleType, *flags: str) -> str:
        assert benchmark.__file__ is not None
        monkeypatch.setattr(sys, "argv", [benchmark.__file__, *flags])
        capsys.readouterr()
        assert benchmark.main() in (0, None)
        return capsys.readouterr().out

    threads, verbosity, bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield run
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
