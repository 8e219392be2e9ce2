"""Dealing: units that are parted, and what is held of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from doge_lm.data import shuffle as module
from doge_lm.data.shuffle import Buckets, DealTask, Share, UnitFile, deal, unit_batches
from doge_lm.data.storage import ShardWriter, row_schema
from doge_lm.errors import UserError
from tests.data.test_repeats import batch_of

ROWS = 100


@pytest.fixture
def unit(tmp_path: Path) -> UnitFile:
    """A unit in batches of seven rows, whose rows are told apart by their ids."""
    path = tmp_path / "data-00000.arrow"
    with ShardWriter(path, row_schema(np.dtype(np.uint16))) as shard:
        for begin in range(0, ROWS, 7):
            shard.write(batch_of([([[1, row + 10]], 0) for row in range(begin, min(begin + 7, ROWS))]))
    return UnitFile(path, "a", 0, 0, ROWS, path.stat().st_size)


def row_numbers(batches: list[pa.RecordBatch]) -> list[int]:
    return [ids[1] - 10 for batch in batches for ids in batch.column("input_ids").to_pylist()]


@pytest.mark.parametrize("most_rows", [1, 3, 7, 33, 99, 100, 1000])
def test_parts_hold_all_rows_in_their_order(unit: UnitFile, most_rows: int) -> None:
    parts = unit.parts(most_rows)
    assert max(part.rows for part in parts) <= most_rows
    assert (parts == [unit]) == (most_rows >= ROWS)
    assert [number for part in parts for number in row_numbers(list(unit_batches(part)))] == list(range(ROWS))


def test_a_file_of_other_rows_than_its_manifest_says_is_named(unit: UnitFile) -> None:
    for rows in (ROWS - 1, ROWS + 1):
        wrong = UnitFile(unit.path, "a", 0, 0, rows, unit.bytes)
        with pytest.raises(UserError, match=rf"holds {ROWS} rows, not {rows}"):
            list(unit_batches(wrong))


def dealt_rows(folder: Path, shares: list[Share]) -> list[list[int]]:
    """The rows of each bucket, where each share is dealt by itself."""
    buckets: list[list[int]] = [[] for _ in range(5)]
    for number, share in enumerate(shares):
        path = folder / f"dealt-{number}.arrow"
        record = deal(DealTask(path, [share], Buckets(3, 3, 2), np.dtype(np.uint16)))
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for bucket in range(5):
                batches = range(record["bounds"][bucket], record["bounds"][bucket + 1])
                buckets[bucket] += row_numbers([reader.get_batch(batch) for batch in batches])
    return buckets


@pytest.mark.parametrize("copies", [1, 3])
def test_it_does_not_matter_where_a_unit_is_parted(
    tmp_path: Path, unit: UnitFile, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    monkeypatch.setattr(module, "_PASSED_DRAWS", 5)
    test = (0, 4, 40, 41, 98)
    shares = []
    before = (0, 0)
    for part in unit.parts(30):
        begin = part.begin or 0
        own = tuple(row - begin for row in test if begin <= row < begin + part.rows)
        shares.append(Share(part, own, copies, 0, before))
        before = (before[0] + shares[-1].dealt[0], before[1] + shares[-1].dealt[1])
    assert len(shares) == 4
    assert before == ((ROWS - 5) * copies, 5)
    whole = dealt_rows(tmp_path, [Share(unit, test, copies, 0)])
    (tmp_path / "parts").mkdir()
    assert dealt_rows(tmp_path / "parts", shares) == whole
    assert sorted(whole[3] + whole[4]) == list(test)


def test_parts_draw_the_rows_that_are_dealt_once_more(tmp_path: Path, unit: UnitFile) -> None:
    buckets = dealt_rows(
        tmp_path, [Share(part, (), 1, 10, (60 * number, 0)) for number, part in enumerate(unit.parts(50))]
    )
    numbers, counts = np.unique(np.concatenate(buckets), return_counts=True)
    assert numbers.tolist() == list(range(ROWS))
    assert sorted(counts.tolist()) == [1] * 80 + [2] * 20
    twice = numbers[counts == 2]
    assert np.count_nonzero(twice < 50) == 10
    assert not np.array_equal(twice[:10], twice[10:] - 50)
