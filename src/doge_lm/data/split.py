"""The choice of the test set: whole groups at random, with no document that stands in the training set too.

Groups that hold the same document, of whatever source, are joined first. To know which do, the pieces of documents
are hashed (see `doge_lm.data.repeats`). That would need memory for every document of the corpus; so in a large set the
test set is chosen among some groups only, the *candidates*: of every source those with the smallest random draws, in
proportion to its share. One pass over all other rows then finds which documents of the candidates stand elsewhere
too, and groups with such a document stay in the training set. In a small set all groups are candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from doge_lm.data.manifest import read_record, write_record
from doge_lm.data.repeats import Pieces, hash_unit, join_groups, telling_pieces
from doge_lm.data.shuffle import Indices, UnitFile, random_stream, unit_batches

_Flags = npt.NDArray[np.bool_]
_Hashes = npt.NDArray[np.uint64]
# Groups whose draws are looked at together. A unit of very short rows may have tens of millions.
_DRAWN_GROUPS = 2**20


@dataclass(frozen=True)
class Candidates:
    """Groups of one source that may go into the test set.

    Attributes:
        units: the unit each lies in, as a number among all units, (C,).
        groups: its number in its source, (C,).
        sizes: its rows, (C,).
        draws: its random draw, (C,).
    """

    units: Indices
    groups: Indices
    sizes: Indices
    draws: npt.NDArray[np.float64]

    @classmethod
    def join(cls, parts: Sequence["Candidates"]) -> "Candidates":
        """Candidates one after another; there must be some."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def first(self, rows: int) -> "Candidates":
        """Those of the smallest draws that come to at most so many rows, but for groups that alone are larger.

        Taking the first of parts and then the first of those joined gives the same as taking the first of all.
        """
        fits = np.flatnonzero(self.sizes <= rows)
        order = fits[np.lexsort((self.groups[fits], self.draws[fits]))]
        order = np.sort(order[np.cumsum(self.sizes[order]) <= rows])
        return Candidates(*(getattr(self, name)[order] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ScanTask:
    """A run to be searched for candidates: its units, each with its number among all and what rows to take."""

    units: list[tuple[int, UnitFile]]
    limits: list[int | None]
    seed: int


def scan(task: ScanTask) -> list[tuple[int, Candidates]]:
    """Finds the candidates of a run, from the column `group` of its units alone: (source, candidates)."""
    found: list[tuple[int, Candidates]] = []
    for (position, unit), limit in zip(task.units, task.limits, strict=True):
        candidates = _scan_unit(position, unit, unit.rows if limit is None else limit, task.seed)
        if found and found[-1][0] == unit.source:
            candidates = Candidates.join([found.pop()[1], candidates])
        found.append((unit.source, candidates if limit is None else candidates.first(limit)))
    return found


def _scan_unit(position: int, unit: UnitFile, limit: int, seed: int) -> Candidates:
    """The groups of a unit that come first by their draws, and have as many rows as asked for, or all its groups."""
    bounds = [(int(groups.min()), int(groups.max())) for groups in _groups(unit) if len(groups)]
    first, last = min(low for low, _ in bounds), max(high for _, high in bounds)
    wanted = limit
    while True:
        numbers, draws = _smallest_draws(
            last + 1 - first, wanted, random_stream(seed, "candidates", unit.source, unit.number)
        )
        sizes = _sizes(unit, first + numbers)
        # Fewer only if there are numbers without a row, or groups of more rows than are asked for.
        if len(numbers) == last + 1 - first or int(sizes[sizes <= limit].sum()) >= limit:
            break
        wanted *= 2
    there = sizes > 0
    return Candidates(np.full(np.count_nonzero(there), position), first + numbers[there], sizes[there], draws[there])


def _smallest_draws(count: int, wanted: int, stream: np.random.RandomState) -> tuple[Indices, npt.NDArray[np.float64]]:
    """The smallest of `count` random draws, as many as wanted: which they are, ascending, and what they are."""
    numbers, draws = np.empty(0, np.int64), np.empty(0, np.float64)
    for begin in range(0, count, _DRAWN_GROUPS):
        more = stream.random_sample(min(_DRAWN_GROUPS, count - begin))
        numbers = np.concatenate([numbers, np.arange(begin, begin + len(more))])
        draws = np.concatenate([draws, more])
        if len(draws) > wanted:
            kept = np.sort(np.lexsort((numbers, draws))[:wanted])
            numbers, draws = numbers[kept], draws[kept]
    return numbers, draws


def _sizes(unit: UnitFile, groups: Indices) -> Indices:
    """How many rows of a unit are in each of some groups, given ascending."""
    sizes = np.zeros(len(groups), np.int64)
    for group in _groups(unit):
        place = np.minimum(np.searchsorted(groups, group), len(groups) - 1)
        np.add.at(sizes, place[groups[place] == group], 1)
    return sizes


def _groups(unit: UnitFile) -> Iterator[Indices]:
    """The groups of the rows of a unit, batch by batch."""
    return (batch.column("group").to_numpy().astype(np.int64) for batch in unit_batches(unit))


@dataclass(frozen=True)
class CandidateRows:
    """The rows of all candidates, in the order of the sources.

    Attributes:
        units: the unit of each row, as a number among all units, (R,).
        rows: its number in that unit, (R,).
        sources: its source, (R,).
        groups: its group, joined with those that share a document, (R,).
        hashes: those of the candidates' documents, ascending, (H,).
        hash_groups: the joined group of each, (H,).
        repeated: those of documents that occur more than once among the candidates.
    """

    units: Indices
    rows: Indices
    sources: Indices
    groups: Indices
    hashes: _Hashes
    hash_groups: Indices
    repeated: _Hashes


def read_candidates(
    units: Sequence[UnitFile], candidates: Candidates, bos_token_id: int, sequence_length: int, *, concatenated: bool
) -> CandidateRows:
    """Reads the rows of the candidates, and joins groups that hold the same document.

    Args:
        units: all units.
        candidates: of all sources, in their order.
        bos_token_id: opens a document.
        sequence_length: tokens of a full row.
        concatenated: the rows were made by concatenation.
    """
    pieces: list[Pieces] = []
    at_unit, at_row, row_groups = [], [], []
    for position in np.unique(candidates.units).tolist():
        own = np.flatnonzero(candidates.units == position)
        own = own[np.argsort(candidates.groups[own])]

        def taken_rows(position: int = position, own: Indices = own) -> Iterator[tuple[pa.RecordBatch, Indices]]:
            begin = 0
            for batch in unit_batches(units[position]):
                group = batch.column("group").to_numpy()
                place = np.minimum(np.searchsorted(candidates.groups[own], group), len(own) - 1)
                taken = candidates.groups[own[place]] == group
                if taken.any():
                    numbers = own[place[taken]]
                    at_unit.append(np.full(len(numbers), position))
                    at_row.append(begin + np.flatnonzero(taken))
                    row_groups.append(numbers)
                    yield batch if taken.all() else batch.filter(taken), numbers
                begin += batch.num_rows

        pieces += hash_unit(taken_rows(), bos_token_id, sequence_length, concatenated=concatenated)
    found = Pieces.join(pieces)
    pieces.clear()
    joined, _ = join_groups(found, len(candidates.groups))
    telling = telling_pieces(found, len(candidates.groups))
    hashes, first, counts = np.unique(found.hashes[telling], return_index=True, return_counts=True)
    at = np.concatenate(at_unit)
    return CandidateRows(
        units=at,
        rows=np.concatenate(at_row),
        sources=np.array([unit.source for unit in units])[at],
        groups=joined[np.concatenate(row_groups)],
        hashes=hashes,
        hash_groups=joined[found.groups[telling][first]],
        repeated=hashes[counts > 1],
    )


@dataclass(frozen=True)
class SearchTask:
    """A run to be searched for documents of the candidates outside of them; `hashes` is an .npy file of theirs."""

    record: Path
    units: list[tuple[UnitFile, Indices]]
    hashes: Path
    bos_token_id: int
    sequence_length: int
    concatenated: bool


def search(task: SearchTask) -> _Hashes:
    """Finds which hashes of candidates occur in other groups, unless the record says that this is done."""
    done = read_record(task.record)
    if done is not None:
        return np.array(done["hashes"], np.uint64)
    wanted = np.load(task.hashes, mmap_mode="r")
    hit = np.zeros(len(wanted), np.bool_)
    for unit, groups in task.units:
        candidates = np.sort(groups)
        rows = ((batch, batch.column("group").to_numpy().astype(np.int64)) for batch in unit_batches(unit))
        for pieces in hash_unit(rows, task.bos_token_id, task.sequence_length, concatenated=task.concatenated):
            hashes = _other_hashes(pieces, candidates)
            place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            hit[place[wanted[place] == hashes]] = True
    found = wanted[hit]
    write_record(task.record, {"hashes": found.tolist()})
    return found


def _other_hashes(pieces: Pieces, candidates: Indices) -> _Hashes:
    # Every piece, not only those that tell: a candidate that lies in the middle of another document is no loss.
    return pieces.hashes[~_are_among(pieces.groups, candidates)]


def _are_among(groups: Indices, candidates: Indices) -> _Flags:
    """As `np.isin`, which would sort the candidates, ascending here, with every record batch."""
    if not len(candidates):
        return np.zeros(len(groups), np.bool_)
    return candidates[np.minimum(np.searchsorted(candidates, groups), len(candidates) - 1)] == groups


def choose_test_rows(
    rows: CandidateRows, elsewhere: _Hashes, shares: Indices, test_size: int, seed: int
) -> dict[int, list[int]]:
    """Chooses the test set.

    Args:
        rows: of the candidates.
        elsewhere: hashes of documents that stand in other groups too.
        shares: in what proportion the sources give to the test set, (S,).
        test_size: samples wanted.
        seed: fixes the choice.

    Returns:
        Unit, as a number among all units -> its rows in the test set, ascending. Empty if there is no choice.
    """
    allowed = _allowed(rows, elsewhere)
    if not len(allowed):
        return {}
    groups = np.unique(rows.groups[allowed], return_inverse=True)[1].astype(np.int64)
    chosen = allowed[share_test_groups(groups, rows.sources[allowed], test_size, seed, shares)[groups]]
    units = rows.units[chosen]
    return {unit: np.sort(rows.rows[chosen[units == unit]]).tolist() for unit in np.unique(units).tolist()}


def smallest_group(rows: CandidateRows, elsewhere: _Hashes) -> int:
    """Rows of the smallest group that may be in the test set; 0 if none may. Arguments as of `choose_test_rows`."""
    sizes = np.unique(rows.groups[_allowed(rows, elsewhere)], return_counts=True)[1]
    return int(sizes.min()) if len(sizes) else 0


def _allowed(rows: CandidateRows, elsewhere: _Hashes) -> Indices:
    """The rows of groups with no document that stands in other groups too."""
    barred = np.unique(rows.hash_groups[np.isin(rows.hashes, elsewhere)])
    return np.flatnonzero(~np.isin(rows.groups, barred))


def share_test_groups(
    groups: Indices, row_source: Indices, test_size: int, seed: int, shares: Indices | None = None
) -> _Flags:
    """Chooses groups for the test set, from each source in proportion to its share as far as its groups allow.

    What a source's groups are too large for is made up from the others, for the size comes first.

    Args:
        groups: the group of every row, (R,).
        row_source: the source of every row, (R,), ascending.
        test_size: samples wanted.
        seed: fixes the choice.
        shares: the share of every source, (S,); its rows by default.

    Returns:
        Which groups are chosen, (G,).
    """
    sizes = np.bincount(groups)
    owner = np.zeros(len(sizes), np.int64)
    owner[groups[::-1]] = row_source[::-1]  # a group over several sources counts as the first one's
    chosen = np.zeros(len(sizes), np.bool_)
    for source, share in enumerate(share_out(np.bincount(row_source) if shares is None else shares, test_size)):
        own = np.flatnonzero((owner == source) & (sizes > 0))
        chosen[own] = choose_test_groups(sizes[own], share, seed)
    rest = np.flatnonzero(~chosen)
    chosen[rest] = choose_test_groups(sizes[rest], test_size - int(sizes[chosen].sum()), seed)
    if sizes[chosen].sum() < test_size:
        over_all = choose_test_groups(sizes, test_size, seed)
        if sizes[over_all].sum() > sizes[chosen].sum():
            return over_all
    return chosen


def share_out(counts: Indices, total: int) -> list[int]:
    """`total` shared out in proportion to `counts` in whole numbers, by the largest remainders."""
    exact = [int(count) * total for count in counts]
    whole = sum(map(int, counts))
    shares = [part // whole for part in exact]
    order = sorted(range(len(exact)), key=lambda number: (-(exact[number] % whole), number))
    for number in order[: total - sum(shares)]:
        shares[number] += 1
    return shares


def choose_test_groups(sizes: Indices, test_size: int, seed: int) -> _Flags:
    """Chooses groups at random whose sizes sum to `test_size`, or to as near below it as there is a choice.

    Groups are taken in random order while they fit. Where that falls short, the sum that comes nearest is worked out
    exactly, and groups of the sizes it needs are taken in the same random order.

    Args:
        sizes: samples of each group, (G,).
        test_size: samples wanted.
        seed: fixes the choice.

    Returns:
        Which groups are chosen, (G,).
    """
    order = random_stream(seed, "test").permutation(len(sizes))
    chosen = np.zeros(len(sizes), np.bool_)
    room = test_size
    for group in map(int, order):
        if sizes[group] <= room:
            chosen[group] = True
            room -= int(sizes[group])
            if room == 0:
                return chosen
    needed = _nearest_sum(sizes[order], test_size)
    if sum(size * count for size, count in needed.items()) == test_size - room:
        return chosen
    chosen[:] = False
    for size, count in needed.items():
        chosen[order[sizes[order] == size][:count]] = True
    return chosen


def _nearest_sum(sizes: Indices, limit: int) -> dict[int, int]:
    """How many groups of each size to take for the largest sum up to `limit`: a bounded knapsack over sums."""
    values, counts = np.unique(sizes[sizes <= limit], return_counts=True)
    reached = {0: (0, 0)}  # sum -> (size that was added to get there, how many of it)
    for value, available in zip(values.tolist(), counts.tolist(), strict=True):
        for begin in sorted(reached):
            for number in range(1, available + 1):
                total = begin + number * value
                if total > limit or total in reached:
                    break
                reached[total] = (value, number)
    needed: dict[int, int] = {}
    total = max(reached)
    while total:
        value, number = reached[total]
        needed[value] = number
        total -= value * number
    return needed
