"""The candidates for the test set: found in little memory, as the straightforward way finds them."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from doge_lm.data import split as module
from doge_lm.data.shuffle import Indices, UnitFile, random_stream
from doge_lm.data.split import Candidates, ScanTask, scan
from doge_lm.data.storage import ShardWriter, row_schema

SEED = 5
DTYPE = np.dtype(np.uint16)


def write_unit(path: Path, groups: Indices, number: int = 0, batch_rows: int = 256) -> UnitFile:
    """A unit of rows without a token, in these groups."""
    none = pa.ListArray.from_arrays(pa.array(np.zeros(batch_rows + 1, np.int32)), pa.array(np.empty(0, np.int32)))
    ids = none.cast(pa.list_(pa.uint16()))
    with ShardWriter(path, row_schema(DTYPE)) as shard:
        for begin in range(0, len(groups), batch_rows):
            own = groups[begin : begin + batch_rows]
            columns = [ids, none, none, pa.array(np.zeros(batch_rows, np.int32)), pa.array(["a"] * batch_rows)]
            parts = [column[: len(own)] for column in columns]
            shard.write(pa.RecordBatch.from_arrays([*parts, pa.array(own)], schema=row_schema(DTYPE)))
    return UnitFile(path, "a", 0, number, len(groups), path.stat().st_size)


def slow_scan(units: list[tuple[Indices, UnitFile]], limit: int | None) -> Candidates:
    """All groups of all units with their draws, and only then those of the smallest draws."""
    parts = []
    for position, (groups, unit) in enumerate(units):
        first = groups.min()
        draws = random_stream(SEED, "candidates", unit.source, unit.number).random_sample(groups.max() + 1 - first)
        numbers, sizes = np.unique(groups, return_counts=True)
        parts.append(Candidates(np.full(len(numbers), position), numbers, sizes, draws[numbers - first]))
    joined = Candidates.join(parts)
    return joined if limit is None else joined.first(limit)


@pytest.mark.parametrize("limit", [None, 1, 5, 60, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_candidates_are_those_of_the_straightforward_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, seed: int
) -> None:
    """Groups in any order, of many rows or none, in windows of a few groups."""
    monkeypatch.setattr(module, "_DRAWN_GROUPS", 7)
    random = np.random.default_rng(seed)
    units = []
    for number in range(3):
        groups = (number << 32) + np.concatenate([random.integers(0, 100, 80), np.full(40 * seed, 17)])
        random.shuffle(groups)
        units.append((groups, write_unit(tmp_path / f"data-{number}.arrow", groups, number, batch_rows=16)))
    task = ScanTask([(number, unit) for number, (_, unit) in enumerate(units)], [limit] * 3, SEED)
    ((source, found),) = scan(task)
    expected = slow_scan(units, limit)
    assert source == 0
    for name in Candidates.__dataclass_fields__:
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_memory_does_not_grow_with_the_rows_of_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DRAWN_GROUPS", 2**12)
    rows = 2**18
    unit = write_unit(tmp_path / "data.arrow", np.arange(rows), batch_rows=2**12)
    tracemalloc.start()
    try:
        ((_, found),) = scan(ScanTask([(0, unit)], [100], SEED))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.groups) == 100
    assert peak < 2**20  # the numbers of the groups alone are 2 MiB


def test_the_search_leaves_out_the_candidates_themselves() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(0, 50, 300)
    for candidates in (np.unique(random.integers(0, 50, 20)), np.empty(0, np.int64)):
        expected = np.isin(groups, candidates)
        assert np.array_equal(module._are_among(groups, candidates), expected)
