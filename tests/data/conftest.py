"""What the tests of the data path share: a tokenizer, writers of little files, and the two stages as functions."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from doge_lm.data.download import take_local
from doge_lm.data.manifest import Manifest
from doge_lm.data.preprocess import PreprocessSettings, preprocess
from doge_lm.data.tokenizer import build_tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def published_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    build_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def small_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 4,000 pieces, opened in a tenth of the time that the published one takes."""
    path = tmp_path_factory.mktemp("small_tokenizer") / "tokenizer"
    train_tokenizer(list(topics.values()), 4000, path)
    return path


@pytest.fixture(scope="module")
def tokenizer_path(small_tokenizer_path: Path) -> Path:
    """What `prepare` tokenizes with; a module that is about the published one makes it `published_tokenizer_path`."""
    return small_tokenizer_path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Any:
    return load_tokenizer(tokenizer_path)


def json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


@pytest.fixture(scope="session")
def library_rows() -> list[dict[str, Any]]:
    """Real text that Python itself ships: sources of its standard library, with a prompt on every second one."""
    folder = Path(sysconfig.get_path("stdlib"))
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.py"))[:60]:
        row = {"text": path.read_text(encoding="utf-8")}
        if len(rows) % 2:
            row["prompt"] = path.name
        rows.append(row)
    return rows


@pytest.fixture
def prepare(tmp_path: Path, tokenizer_path: Path) -> Callable[..., dict[str, Manifest]]:
    """Takes rows by source in, and preprocesses them into `tmp_path`."""

    def prepare_(
        sources: dict[str, Iterable[dict[str, Any]]],
        *,
        place: Path = tmp_path,
        num_proc: int = 1,
        unit_bytes: int | None = None,
        tokenizer: Path = tokenizer_path,
        **settings: Any,
    ) -> dict[str, Manifest]:
        for name, rows in sources.items():
            file = place / "own" / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(json_lines(rows))
            take_local(name, file, place / "raw" / name)
        return preprocess(
            place, place, tokenizer, PreprocessSettings(**settings), num_proc=num_proc, unit_bytes=unit_bytes
        )

    return prepare_


def left_over(folder: Path) -> list[str]:
    """Names of temporary files and folders anywhere below a folder."""
    return [str(path) for path in folder.rglob(".tmp-*")]


Mount = Callable[[str], Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a tmpfs with some options; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount_(options: str) -> Path:
        program = shutil.which("mount")
        if sys.platform != "linux" or program is None:
            pytest.skip("no tmpfs here")
        command = [program, "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.decode().strip()}")
        return place

    yield mount_
    while os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    """Changes the options of what `mounted` mounted."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
