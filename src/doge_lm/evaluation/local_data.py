"""Local copies of benchmarks, as the task files in `tasks/` read them.

A task file of lm-evaluation-harness may name a function that gives its data. These name `read`, with the name of a file
and the type of each field; where the files lie comes with the run (`--data_dir`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from doge_lm.data.sources import Location, read_objects
from doge_lm.errors import UserError

_SUFFIXES = (".jsonl.zst", ".jsonl.gz", ".jsonl")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(item) and item for item in value)


# How the task files name a field's type, the test of a value, and what is wanted, in words.
_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "text": (_is_text, "a string, without lone surrogates"),
    "texts": (_is_texts, "a list of strings, at least one, none of them empty"),
}
_INDEX = "index of "


def find_file(data_dir: Path, name: str) -> Path | None:
    """`NAME.jsonl`, or the same compressed, in `data_dir`; None if there is none."""
    return next((path for suffix in _SUFFIXES if (path := data_dir / f"{name}{suffix}").is_file()), None)


def read(
    data_dir: str | None = None, file: str = "", fields: dict[str, str] | None = None, **_: Any
) -> dict[str, Dataset]:
    """The rows of one benchmark, checked, as the only split `test`; fields that the task does not name are left out.

    Args:
        data_dir: where the files lie.
        file: the file's name without suffixes.
        fields: its fields, each with its type: `text`, `texts`, or `index of FIELD`.

    Raises:
        UserError: if there is no such file, or a row lacks a field or has another type; it names file and line.
    """
    if data_dir is None:
        raise UserError(f"the task on {file} reads a local file; say where it lies with --data_dir")
    path = find_file(Path(data_dir), file)
    if path is None:
        raise UserError(
            f"--data_dir {data_dir} holds no {file}.jsonl (nor .jsonl.gz, .jsonl.zst); put it there, or leave the "
            "task out"
        )
    rows = [_checked(values, fields or {}, location) for location, values in read_objects(path)]
    if not rows:
        raise UserError(f"{path} holds no row; put the benchmark's rows there")
    return {"test": Dataset.from_list(rows)}


def _checked(values: dict[str, Any], fields: dict[str, str], location: Location) -> dict[str, Any]:
    row = {}
    for name, kind in fields.items():
        if name not in values:
            raise UserError(f"{location}: the field {name!r} is missing; this benchmark has {', '.join(fields)}")
        value = values[name]
        if kind.startswith(_INDEX):
            count = len(values[kind.removeprefix(_INDEX)])
            holds, wanted = type(value) is int and 0 <= value < count, f"a whole number from 0 to {count - 1}"
        else:
            test, wanted = _TYPES[kind]
            holds = test(value)
        if not holds:
            raise UserError(f"{location}: the field {name!r} must be {wanted}, and is {ascii(value)[:60]}")
        row[name] = value
    return row
