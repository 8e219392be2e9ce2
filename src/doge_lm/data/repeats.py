"""Documents that occur more than once: found by a hash, so that a split can keep all their samples on one side.

A document is known by the first of its pieces, which begins with `<s>`: two documents that share their whole first
piece count as the same. Where that piece was left out of the rows, because it holds no target, the document is known
by the pieces that are left. Some 20 bytes are held for each piece, however long it is.

Concatenation cuts a document wherever a row ends, so that the pieces of two copies differ. There the pieces of
consecutive rows are put together again, and a document is known by its first tokens, as many as a row has: the same
rule. Where a row of context alone was left out, they are not there, or would not be in a copy that is cut elsewhere.
So a document that can lose a row is known by the sequence of its targets as well, of which none is ever left out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from doge_lm.data.storage import flat_values
from doge_lm.errors import UserError

_Ints = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]
_Flags = npt.NDArray[np.bool_]
# Pieces that are looked at together: the rows of a batch may be long, and the documents in them short.
_PIECES_AT_ONCE = 2**16


@dataclass(frozen=True)
class Pieces:
    """What is known of pieces of documents, one entry a piece.

    Attributes:
        hashes: of the token ids.
        groups: of the rows they lie in.
        opens: whether the piece opens a document.
        full: whether it fills a row.
    """

    hashes: _Hashes
    groups: _Ints
    opens: _Flags
    full: _Flags

    @classmethod
    def join(cls, parts: list["Pieces"]) -> "Pieces":
        """Pieces one after another; there must be some."""
        columns = (np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__)
        return cls(*columns)


def pieces_of_batch(batch: pa.RecordBatch, groups: _Ints, bos_token_id: int, sequence_length: int) -> Pieces:
    """Hashes the pieces in a record batch of rows, as slices of its flat buffer of ids.

    Args:
        batch: rows with `input_ids` and `document_lengths`.
        groups: the group of each row.
        bos_token_id: opens a document, and stands nowhere else.
        sequence_length: tokens of a full row.

    Raises:
        UserError: if the lengths do not fit the rows.
    """
    ids, begins, lengths, row_of = _layout(batch)
    view = ids.view(np.uint8).data
    width = ids.itemsize
    bounds = zip((begins * width).tolist(), ((begins + lengths) * width).tolist(), strict=True)
    digests = b"".join([_digest(view[begin:end]) for begin, end in bounds])
    return Pieces(
        np.frombuffer(digests, np.uint64), groups[row_of], ids[begins] == bos_token_id, lengths == sequence_length
    )


def _digest(data: Any) -> bytes:
    return blake2b(data, digest_size=8).digest()


def _layout(batch: pa.RecordBatch) -> tuple[npt.NDArray[Any], _Ints, _Ints, _Ints]:
    """The flat ids of a record batch; and where each piece begins in them, its length and its row."""
    ids, id_offsets = flat_values(batch.column("input_ids"))
    lengths, offsets = flat_values(batch.column("document_lengths"))
    lengths = lengths.astype(np.int64)
    row_of = np.repeat(np.arange(batch.num_rows), np.diff(offsets))
    ends = np.cumsum(lengths)
    before_row = np.concatenate([[0], ends])[offsets[:-1]]
    begins = ends - lengths + (id_offsets[:-1] - before_row)[row_of]
    if np.any(lengths < 1) or np.any(begins + lengths > id_offsets[1:][row_of]):
        raise UserError("the document_lengths of a row do not fit its input_ids; run preprocess_datasets again")
    return ids, begins, lengths, row_of


def hash_unit(
    rows: Iterable[tuple[pa.RecordBatch, _Ints]], bos_token_id: int, sequence_length: int, *, concatenated: bool
) -> Iterator[Pieces]:
    """Hashes the pieces in the rows of a unit, or of whole groups of it, batch by batch.

    Args:
        rows: record batches, each with the groups of its rows, in the order in which they were written.
        bos_token_id: opens a document.
        sequence_length: tokens of a full row.
        concatenated: the rows were made by concatenation. Then whole documents are given instead of pieces, an entry
            for each hash that one is known by, all as pieces that open it.
    """
    rows = _thinner(rows)
    if not concatenated:
        for batch, groups in rows:
            yield pieces_of_batch(batch, groups, bos_token_id, sequence_length)
        return
    pending: _Document | None = None
    for batch, groups in rows:
        known: list[tuple[bytes, int]] = []
        for group, ids, learned in _cut_pieces(batch, groups):
            opens = int(ids[0]) == bos_token_id
            if pending is not None and (opens or group != pending.group):
                known += pending.known_by()
                pending = None
            if pending is None:
                pending = _Document(group, sequence_length, has_opening=opens)
            pending.add(ids, learned)
        yield _documents(known)
    if pending is not None:
        yield _documents(pending.known_by())


def _thinner(rows: Iterable[tuple[pa.RecordBatch, _Ints]]) -> Iterator[tuple[pa.RecordBatch, _Ints]]:
    """The same rows in batches of a limited number of pieces, or of one row."""
    for batch, groups in rows:
        ends = flat_values(batch.column("document_lengths"))[1][1:]
        begin = done = 0
        while begin < batch.num_rows:
            end = max(begin + 1, int(np.searchsorted(ends, done + _PIECES_AT_ONCE, "right")))
            yield batch.slice(begin, end - begin), groups[begin:end]
            begin, done = end, int(ends[end - 1])


def _cut_pieces(batch: pa.RecordBatch, groups: _Ints) -> Iterator[tuple[int, npt.NDArray[Any], _Flags]]:
    """The pieces of a record batch: the group, the ids, and which of them are targets."""
    ids, begins, lengths, row_of = _layout(batch)
    spans, span_offsets = flat_values(batch.column("context_spans"))
    row_begins = flat_values(batch.column("input_ids"))[1][:-1]
    bounds = spans + np.repeat(row_begins, np.diff(span_offsets))
    steps = np.zeros(len(ids) + 1, np.int64)
    np.add.at(steps, bounds[::2], 1)
    np.add.at(steps, bounds[1::2], -1)
    learned = np.cumsum(steps[:-1]) == 0
    learned[begins] = False
    places = zip(groups[row_of].tolist(), begins.tolist(), (begins + lengths).tolist(), strict=True)
    for group, begin, end in places:
        yield group, ids[begin:end], learned[begin:end]


def _documents(known: list[tuple[bytes, int]]) -> Pieces:
    hashes = np.frombuffer(b"".join([digest for digest, _ in known]), np.uint64)
    opens = np.ones(len(known), np.bool_)
    return Pieces(hashes, np.array([group for _, group in known], np.int64), opens, ~opens)


class _Document:
    """A document that is put together from its pieces.

    Args:
        group: of its rows.
        sequence_length: tokens of a full row.
        has_opening: whether its first piece is there.
    """

    def __init__(self, group: int, sequence_length: int, *, has_opening: bool) -> None:
        self.group = group
        self._length = sequence_length
        self._gap = not has_opening  # a row was left out, as far as can be seen
        self._head = blake2b(digest_size=8)
        self._head_tokens = 0
        self._targets = blake2b(digest_size=8, person=b"targets")
        self._last: int | None = None
        self._context = 0  # tokens since the last target
        self._longest = 0  # most tokens without a target between

    def add(self, ids: npt.NDArray[Any], learned: _Flags) -> None:
        """Takes the next piece; one that continues the document begins with the last token of the piece before."""
        last, self._last = self._last, int(ids[-1])
        if last is not None or self._gap:
            self._gap = self._gap or last != int(ids[0])
            ids, learned = ids[1:], learned[1:]
        if not self._gap and self._head_tokens < self._length:
            head = ids[: self._length - self._head_tokens]
            self._head.update(np.ascontiguousarray(head).data)
            self._head_tokens += len(head)
        targets = np.flatnonzero(learned)
        if not len(targets):
            self._context += len(ids)
        else:
            self._targets.update(ids[targets].data)
            between = int(np.diff(targets).max(initial=1)) - 1
            self._longest = max(self._longest, self._context + int(targets[0]), between)
            self._context = len(ids) - 1 - int(targets[-1])
        self._longest = max(self._longest, self._context)

    def known_by(self) -> list[tuple[bytes, int]]:
        """The hashes that it is known by, each with its group."""
        known = []
        if not self._gap or self._head_tokens == self._length:
            known.append((self._head.digest(), self.group))
        if self._gap or self._longest >= self._length - 1:
            known.append((self._targets.digest(), self.group))
        return known


def join_groups(pieces: Pieces, count: int) -> tuple[_Ints, int]:
    """Joins groups that hold the same document.

    Args:
        pieces: of all rows.
        count: groups there are, numbered from 0.

    Returns:
        The joined group of each group, (count,), numbered from 0 in the order of their first members; and how many
        documents occur more than once (one without its first piece is counted for each piece that is left).
    """
    telling = telling_pieces(pieces, count)
    order = np.argsort(pieces.hashes[telling], kind="stable")
    hashes, groups = pieces.hashes[telling][order], pieces.groups[telling][order]
    same = np.flatnonzero(hashes[1:] == hashes[:-1])
    repeated = len(np.unique(hashes[same]))
    roots = np.arange(count, dtype=np.int64)
    pairs = (
        pair
        for begin in range(0, len(same), _PIECES_AT_ONCE)
        for pair in _pairs(groups, same[begin : begin + _PIECES_AT_ONCE])
    )
    for one, other in _union(pairs).items():
        roots[one] = other
    return np.unique(roots, return_inverse=True)[1].astype(np.int64), repeated


def _pairs(groups: _Ints, places: _Ints) -> Iterator[tuple[int, int]]:
    """The groups at some places, each with the next one, where that is another."""
    one, other = groups[places], groups[places + 1]
    apart = one != other
    return zip(one[apart].tolist(), other[apart].tolist(), strict=True)


def telling_pieces(pieces: Pieces, count: int) -> _Flags:
    """The pieces that a document is known by: those that open one, and all of a group that lacks such a piece.

    Args:
        pieces: of whole groups.
        count: groups there are, numbered from 0.
    """
    return pieces.opens | _headless(pieces, count)[pieces.groups]


def _headless(pieces: Pieces, count: int) -> _Flags:
    """The groups with a document whose first piece is missing.

    A document of several pieces has one that opens it, which is full, and at most one that is not full, its end. So
    a group is whole if it has as many full openings as ends, or no end and an opening.
    """
    openings = np.bincount(pieces.groups[pieces.opens & pieces.full], minlength=count)
    continued = np.bincount(pieces.groups[~pieces.opens], minlength=count)
    ends = np.bincount(pieces.groups[~pieces.opens & ~pieces.full], minlength=count)
    return (openings < ends) | ((openings == 0) & (continued > 0))


def _union(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """For every number that occurs in a pair, the smallest of those it is connected to."""
    parents: dict[int, int] = {}

    def root(number: int) -> int:
        path = []
        while (parent := parents.setdefault(number, number)) != number:
            path.append(number)
            number = parent
        for passed in path:
            parents[passed] = number
        return number

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parents[high] = low
    return {number: root(number) for number in list(parents)}
