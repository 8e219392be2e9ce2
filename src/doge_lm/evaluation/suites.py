"""Lists of tasks that have a name."""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
PREFIX = "local_"
"""Of the names of tasks that read a local copy of a benchmark."""

# The published task list. Their data comes from the hub.
SUITES = {
    "doge": (
        "mmlu",
        "triviaqa",
        "arc_easy",
        "arc_challenge",
        "piqa",
        "hellaswag",
        "openbookqa",
        "winogrande",
        "cmmlu",
    ),
    "local": tuple(sorted(path.stem for path in TASKS.glob(f"{PREFIX}*.yaml"))),
}
