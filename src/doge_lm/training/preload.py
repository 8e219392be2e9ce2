"""What the processes that read batches import, imported in one process while the run itself starts.

A process that is spawned imports PyTorch and datasets anew, which takes seconds, and the first step waits for it. Here
one process imports them while this one does; those that read batches are forked from it when they are wanted.
"""

import multiprocessing
from collections.abc import Sequence
from multiprocessing import forkserver

# As `TrainingArguments.dataloader_multiprocessing_context` takes it. Windows has no fork.
CONTEXT = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
# Where the rows, what makes a batch of them, and transformers' seed of a process are defined.
_IMPORTED = ["doge_lm.data.dataset", "transformers.trainer_utils"]
_NO_RUN = {"-h", "--help", "--dry_run"}


def start(arguments: Sequence[str] = ()) -> None:
    """Start that process, if the command line asks for a run; it ends with this one. Imports nothing heavy.

    Without it, or if it dies, the first process that reads batches starts it: later, but with the same result.
    """
    if CONTEXT == "forkserver" and not _NO_RUN & set(arguments):
        multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
        forkserver.ensure_running()
