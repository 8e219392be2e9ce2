"""Near duplicates by MinHash, end to end."""

from pathlib import Path
from typing import Any

import pytest

from doge_lm.cli import main
from doge_lm.data.download import take_local
from doge_lm.data.manifest import RawSource
from doge_lm.data.sources import TextRow, read_rows
from tests.data.conftest import json_lines

pytest.importorskip("datatrove")


@pytest.mark.slow
def test_one_of_two_that_are_nearly_the_same_stays(tmp_path: Path, library_rows: list[dict[str, Any]]) -> None:
    rows = [row for row in library_rows if 10_000 < len(row["text"]) < 40_000][:6]
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.jsonl").write_bytes(json_lines(rows))
    (own / "b.jsonl").write_bytes(json_lines([{"text": rows[0]["text"] + "\nand a last line that differs\n"}]))
    take_local("code", own, tmp_path / "raw" / "code")
    place = str(tmp_path)
    command = ["data", "near_duplicates", "--datasets_dir", place, "--save_dir", place, "--datasets", "code"]
    assert main([*command, "--num_proc", "2"]) == 0
    directory = tmp_path / "raw" / "code-dedup"
    source = RawSource.read(directory)
    assert source.counts == {"kept": len(rows), "dropped": 1}
    texts = [row.text for row in read_rows(source.paths(directory)) if isinstance(row, TextRow)]
    assert len(texts) == len(rows)
    assert {row["text"] for row in rows[1:]} <= set(texts)
    assert main(command) == 1  # it is there already
