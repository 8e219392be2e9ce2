"""What the task files here call by `!function`, which looks beside the file alone."""

from doge_lm.evaluation.local_data import read
from doge_lm.evaluation.programs import run_solution

__all__ = ["read", "run_solution"]
