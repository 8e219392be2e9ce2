from functools import cache

import pytest
import torch

from doge_lm.training import hardware

from .support import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """So small a model is fastest so, and the losses are those of a process with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _measured_once():
    """How fast this machine multiplies, which every run asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "matmul_rate", cache(hardware.matmul_rate))
        yield
