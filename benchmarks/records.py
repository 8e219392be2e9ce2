"""How the benchmarks write their figures down: tables, JSON, and what the figures depend on."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first of them the heads, as a table in Markdown."""
    heads, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([heads, "|---" * len(lines[0]) + "|", *rest])


def write_whole(path: Path, content: Any) -> None:
    """Write JSON in one rename, so that the file is never half written."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def without_folders(argument: str) -> str:
    """An argument whose absolute path, if it is or gives one, is its last part: records are read on other machines."""
    return re.sub(r"(^|=)(?:[A-Za-z]:)?[/\\](?:.*[/\\])?", r"\1", argument)


def circumstances() -> dict[str, Any]:
    """What the figures depend on beside the device."""
    root = Path(__file__).parents[1]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=root, check=False)
    return {
        "command": shlex.join(["python", *map(without_folders, sys.argv)]),
        "commit": head.stdout.strip() or None,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": sys.version.split()[0],
    }
