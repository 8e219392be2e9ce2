"""`benchmarks/overlap.py`: tokens in runs that training has too are counted, by source."""

import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from doge_lm.errors import UserError
from tests.benchmarks.conftest import Command
from tests.training.support import World

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import overlap


def by_words(ids: list[int], span: int, train: list[list[int]]) -> list[bool]:
    """The definition: run by run, word by word."""
    runs = {tuple(row[i : i + span]) for row in train for i in range(len(row) - span + 1)}
    starts = [i for i in range(len(ids) - span + 1) if tuple(ids[i : i + span]) in runs]
    return [any(i <= place < i + span for i in starts) for place in range(len(ids))]


@pytest.mark.parametrize("span", [1, 3, 8])
def test_a_token_counts_where_a_run_around_it_is_known(span: int) -> None:
    generator = np.random.default_rng(0)
    train = [generator.integers(0, 3, 40).tolist() for _ in range(3)] + [[1]]
    known = np.unique(np.concatenate([overlap.span_hashes(np.array(row, np.uint16), span) for row in train]))
    found = 0
    for _ in range(20):
        row = generator.integers(0, 4, 30).tolist()
        inside = overlap.covered(np.array(row, np.uint16), span, known).tolist()
        assert inside == by_words(row, span, train)
        found += sum(inside)
    assert 0 < found < 20 * 30
    assert not overlap.covered(np.array([1, 2], np.uint16), 3, known).any()
    assert not overlap.covered(np.array([1, 2, 1], np.uint16), 2, known[:0]).any()


def test_shares_are_of_a_source_and_of_all() -> None:
    def rows(*texts: tuple[str, list[int]]) -> Dataset:
        return Dataset.from_list([{"source": source, "input_ids": ids} for source, ids in texts])

    train = rows(("a", [5, 6, 7, 8]), ("b", [9, 9, 9]))
    test = rows(("a", [1, 6, 7, 8, 2]), ("b", [5, 6]), ("b", [4, 4, 4]))
    assert overlap.overlap(train, test, 3) == {"a": 0.6, "all": 0.3, "b": 0.0}


def test_it_is_a_command(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "world")
    assert '"all": ' in command(overlap, "--dataset_path", str(world.data), "--span", "4")
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--dataset_path", str(world.data), "--span", "0"])
    with pytest.raises(UserError, match="--span 0"):
        overlap.main()
