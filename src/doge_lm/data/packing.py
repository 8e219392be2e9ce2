"""Pieces of documents -> rows of at most one sample, and the groups that a split must not tear.

A document longer than a row is cut into pieces; a piece that continues a document starts with the last token of the
piece before, as context, so that every token but a document's first is predicted exactly once. Pieces that fill a
row stand alone. Shorter ones are packed best-fit, longest first, within a window of documents: each goes to the open
row that it fills up most. What the next window may still fill stays open, up to a fixed number of rows; the memory
is that of a window and the open rows, whatever the size of the corpus.

A group is a packed row and the full rows of its documents. A document has at most one piece that is shorter than a
row, so a group is known as soon as that piece has its place, and no document is in two groups.

The result depends on the documents and their order alone.
"""

import bisect
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

_Ids = npt.NDArray[Any]
_NO_SPANS = np.empty(0, np.int32)
# No piece is shorter than this, so a row with less room is finished.
_SHORTEST_PIECE = 2


class Piece(NamedTuple):
    """A document, or a part of one, that fits into a row.

    Attributes:
        ids: the tokens; the first one is never a target.
        spans: flat `start, end` pairs (half open, indices into `ids`) of tokens that are context only.
        text_bytes: UTF-8 bytes that the targets spell.
    """

    ids: _Ids
    spans: npt.NDArray[np.int32]
    text_bytes: int


class PackedRow(NamedTuple):
    """One training sample; the columns of a prepared set but for the source."""

    input_ids: _Ids
    document_lengths: npt.NDArray[np.int32]
    context_spans: npt.NDArray[np.int32]
    text_bytes: int
    group: int


class RowMaker(Protocol):
    """Documents in, rows out."""

    def add(self, document: list[Piece]) -> Iterator[PackedRow]:
        """Takes the pieces of one document, and gives the rows that are finished by it."""

    def finish(self) -> Iterator[PackedRow]:
        """Gives the rows that are left."""


def cut_document(
    ids: _Ids, spans: npt.NDArray[np.int32], spelled: npt.NDArray[np.int64], sequence_length: int
) -> Iterator[Piece]:
    """Cuts a document into pieces of at most `sequence_length` tokens that overlap by one.

    Args:
        ids: the document, (n,).
        spans: flat `start, end` pairs of context, ascending and apart.
        spelled: bytes that each token spells, (n,); zero for context.
        sequence_length: at least 2.
    """
    starts, ends = spans[::2], spans[1::2]
    for begin in range(0, max(1, len(ids) - 1), sequence_length - 1):
        end = min(begin + sequence_length, len(ids))
        first, last = np.searchsorted(ends, begin + 1, "right"), np.searchsorted(starts, end, "left")
        inside = np.empty(2 * (last - first), np.int32)
        # The first token of a piece is no target anyway, and is counted as overlap: spans begin behind it.
        inside[::2] = np.maximum(starts[first:last], begin + 1) - begin
        inside[1::2] = np.minimum(ends[first:last], end) - begin
        yield Piece(ids[begin:end], inside, int(spelled[begin + 1 : end].sum()))


class _OpenRow:
    """A row that may still take pieces."""

    __slots__ = ("group", "pieces", "room")

    def __init__(self, group: int, room: int) -> None:
        self.group = group
        self.room = room
        self.pieces: list[Piece] = []

    def close(self) -> PackedRow:
        pieces = self.pieces
        lengths = np.array([len(piece.ids) for piece in pieces], np.int32)
        offsets = np.cumsum(lengths) - lengths
        spans = [piece.spans + offset for piece, offset in zip(pieces, offsets, strict=True) if len(piece.spans)]
        return PackedRow(
            np.concatenate([piece.ids for piece in pieces]),
            lengths,
            np.concatenate(spans).astype(np.int32) if spans else _NO_SPANS,
            sum(piece.text_bytes for piece in pieces),
            self.group,
        )


class BestFitPacker:
    """Packs documents into rows, best-fit, as the module's description says.

    Args:
        sequence_length: tokens of a row.
        window_rows: rows' worth of tokens that are gathered before they are packed.
        max_open_rows: rows that may stay open for the next window; the fullest are given up first.
    """

    def __init__(self, sequence_length: int, *, window_rows: int = 1024, max_open_rows: int = 256) -> None:
        self.sequence_length = sequence_length
        self.window_tokens = window_rows * sequence_length
        self.max_open_rows = max_open_rows
        self._window: list[list[Piece]] = []
        self._tokens = 0
        self._groups = 0
        # Open rows by the room they have: first in, first out; and the rooms that occur, ascending.
        self._open: dict[int, deque[_OpenRow]] = {}
        self._rooms: list[int] = []
        self._open_count = 0

    def add(self, document: list[Piece]) -> Iterator[PackedRow]:
        """Takes a document; gives rows when a window is full."""
        self._window.append(document)
        self._tokens += sum(len(piece.ids) for piece in document)
        if self._tokens >= self.window_tokens:
            yield from self._pack_window()
            while self._open_count > self.max_open_rows:
                yield self._take(self._rooms[0]).close()

    def finish(self) -> Iterator[PackedRow]:
        """Packs what is left, and closes every row."""
        yield from self._pack_window()
        while self._rooms:
            yield self._take(self._rooms[0]).close()

    def _pack_window(self) -> Iterator[PackedRow]:
        window, self._window, self._tokens = self._window, [], 0
        # Longest first; documents of the same length in their order, for `sort` is stable.
        window.sort(key=lambda document: -len(document[-1].ids))
        for document in window:
            yield from self._place(document)

    def _place(self, document: list[Piece]) -> Iterator[PackedRow]:
        tail = document[-1]
        row = self._best_fit(len(tail.ids))
        for piece in document[:-1]:
            yield PackedRow(piece.ids, np.array([len(piece.ids)], np.int32), piece.spans, piece.text_bytes, row.group)
        row.pieces.append(tail)
        row.room -= len(tail.ids)
        if row.room < _SHORTEST_PIECE:
            yield row.close()
        else:
            self._put(row)

    def _best_fit(self, length: int) -> _OpenRow:
        index = bisect.bisect_left(self._rooms, length)
        if index < len(self._rooms):
            return self._take(self._rooms[index])
        self._groups += 1
        return _OpenRow(self._groups - 1, self.sequence_length)

    def _take(self, room: int) -> _OpenRow:
        rows = self._open[room]
        row = rows.popleft()
        if not rows:
            del self._open[room]
            self._rooms.remove(room)
        self._open_count -= 1
        return row

    def _put(self, row: _OpenRow) -> None:
        if row.room not in self._open:
            self._open[row.room] = deque()
            bisect.insort(self._rooms, row.room)
        self._open[row.room].append(row)
        self._open_count += 1


class Padder:
    """One piece a row, filled up with the pad token: the published way, wasteful for short documents.

    Args:
        sequence_length: tokens of a row.
        pad_token_id: what rows are filled up with.
    """

    def __init__(self, sequence_length: int, pad_token_id: int) -> None:
        self.sequence_length = sequence_length
        self.pad_token_id = pad_token_id
        self._groups = 0

    def add(self, document: list[Piece]) -> Iterator[PackedRow]:
        """Takes a document and gives its rows, one group."""
        group = self._groups
        self._groups += 1
        for piece in document:
            padded = np.full(self.sequence_length, self.pad_token_id, piece.ids.dtype)
            padded[: len(piece.ids)] = piece.ids
            yield PackedRow(padded, np.array([len(piece.ids)], np.int32), piece.spans, piece.text_bytes, group)

    def finish(self) -> Iterator[PackedRow]:
        """Nothing is held back."""
        return iter(())
