"""Fixtures for every test: where the shared data is, and what a machine without a GPU skips."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Tests never use the network. Set before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One of several processes that run tests leaves the other cores to them. Set before anything imports torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
# With DOGE_TEST_ALL=1 everything is tested, in some minutes more.
ALL = bool(os.environ.get("DOGE_TEST_ALL"))
# Of the shared documents, tests that compare tokenizers take each so-manieth.
EVERY = 1 if ALL else 36
needs_all = pytest.mark.skipif(not ALL, reason="takes a minute; DOGE_TEST_ALL=1 runs it")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as there are cores, since tests of servers and of processes mostly wait; at most eight."""
    return min(8, 3 * (os.cpu_count() or 1) // 2)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of sample data beside the checkout; the test is skipped where there is none."""
    if not (SHARED_DATA / "README.md").is_file():
        pytest.skip(f"the sample data is not at {SHARED_DATA}")
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take long, and skip what is marked `gpu` where there is none."""
    # In several processes, a long module that began last would be waited for by all but one. The longest have tests
    # with limits of their own.
    long: dict[Path, float] = {}
    for item in items:
        if item.get_closest_marker("slow") is not None:
            limit = item.get_closest_marker("timeout")
            long[item.path] = max(long.get(item.path, 0.0), limit.args[0] if limit is not None else 0.0)
    items.sort(key=lambda item: -long.get(item.path, -1.0))
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(without_gpu)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported."""
    spare_what_is_there()


def spare_what_is_there() -> None:
    """Takes all objects from the garbage collector, which a trainer calls in each run: imports alone cost a second."""
    gc.collect()
    gc.freeze()
