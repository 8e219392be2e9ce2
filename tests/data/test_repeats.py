"""Repeated documents: pieces of record batches, and groups joined as a slow, obvious way joins them."""

from typing import Any

import numpy as np
import pytest

from doge_lm.data import repeats as module
from doge_lm.data.packing import PackedRow
from doge_lm.data.repeats import Pieces, hash_unit, join_groups, pieces_of_batch
from doge_lm.data.storage import row_features, rows_to_batch
from doge_lm.errors import UserError

LENGTH = 8


def batch_of(rows: list[tuple[list[list[int]], int]], dtype: Any = np.uint16) -> Any:
    """A record batch of rows, each given as its pieces and what it is filled up with."""
    packed = [
        PackedRow(
            np.array([token for piece in pieces for token in piece] + [0] * padding, dtype),
            np.array([len(piece) for piece in pieces], np.int32),
            np.empty(0, np.int32),
            0,
            index,
        )
        for index, (pieces, padding) in enumerate(rows)
    ]
    return rows_to_batch(packed, "a", np.dtype(dtype), row_features(np.dtype(dtype)).arrow_schema)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_pieces_are_found_where_they_lie(dtype: Any) -> None:
    rows = [([[1, 5, 6], [1, 7]], 3), ([[1, 2, 3, 4, 5, 6, 7, 8]], 0), ([[1, 7], [1, 5, 6], [6, 5]], 1)]
    batch = batch_of(rows, dtype)
    pieces = pieces_of_batch(batch, np.array([4, 9, 2]), 1, LENGTH)
    assert pieces.groups.tolist() == [4, 4, 9, 2, 2, 2]
    assert pieces.opens.tolist() == [True, True, True, True, True, False]
    assert pieces.full.tolist() == [False, False, True, False, False, False]
    first = pieces.hashes.tolist()
    assert first[0] == first[4]
    assert first[1] == first[3]
    assert len(set(first)) == 4
    # A part of a batch gives the same.
    part = pieces_of_batch(batch.slice(1), np.array([9, 2]), 1, LENGTH)
    assert part.hashes.tolist() == first[2:]


@pytest.mark.parametrize("concatenated", [False, True])
def test_rows_of_many_short_documents_are_hashed_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, concatenated: bool
) -> None:
    rows = [([[1, 5]] * 4, 0), ([[1, 5, 6]], 5), ([[1, 7], [1, 8], [1, 9]], 2), ([[1, 2]], 6), ([[1, 3, 4, 5]], 4)]
    groups = np.array([3, 1, 4, 1, 5])

    def hashed() -> list[Pieces]:
        found = hash_unit([(batch_of(rows), groups)] * 2, 1, LENGTH, concatenated=concatenated)
        return [pieces for pieces in found if len(pieces.hashes)]

    whole = Pieces.join(hashed())
    monkeypatch.setattr(module, "_PIECES_AT_ONCE", 4)
    few = hashed()
    assert max(len(pieces.hashes) for pieces in few) == 4
    for name in Pieces.__dataclass_fields__:
        assert np.array_equal(getattr(Pieces.join(few), name), getattr(whole, name)), name


def test_lengths_that_do_not_fit_are_refused() -> None:
    batch = batch_of([([[1, 5, 6]], 0)])
    wrong = batch.set_column(1, "document_lengths", batch_of([([[1, 5, 6, 7]], 0)]).column("document_lengths"))
    with pytest.raises(UserError, match="document_lengths of a row do not fit"):
        pieces_of_batch(wrong, np.array([0]), 1, LENGTH)


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_joined_as_the_slow_way_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECES_AT_ONCE", 1 + seed)
    generator = np.random.default_rng(seed)
    groups, count = generator.integers(0, 60, 100), 60
    hashes = generator.integers(0, 2**63, 100).astype(np.uint64)
    some = generator.choice(100, (2, 25))
    hashes[some[0]] = hashes[some[1]]
    everywhere = np.ones(100, np.bool_)
    joined, repeated = join_groups(Pieces(hashes, groups, everywhere, ~everywhere), count)
    slow = list(range(count))
    for one in range(100):
        for other in range(100):
            if hashes[one] == hashes[other]:
                low, high = sorted((slow[groups[one]], slow[groups[other]]))
                slow = [low if group == high else group for group in slow]
    names = sorted(set(slow))
    assert joined.tolist() == [names.index(group) for group in slow]
    assert repeated == sum(int(np.sum(hashes == one) > 1) for one in set(hashes.tolist()))


@pytest.mark.parametrize(
    ("opens", "expected"), [((True, True), [0, 1]), ((False, True), [0, 1]), ((False, False), [0, 0])]
)
def test_continued_pieces_tell_only_where_a_first_one_is_missing(opens: tuple[bool, bool], expected: list[int]) -> None:
    """Two groups, each of a full piece and an end; the ends are the same."""
    pieces = Pieces(
        hashes=np.array([1, 7, 2, 7], np.uint64),
        groups=np.array([0, 0, 1, 1]),
        opens=np.array([opens[0], False, opens[1], False]),
        full=np.array([True, False, True, False]),
    )
    assert join_groups(pieces, 2)[0].tolist() == expected
