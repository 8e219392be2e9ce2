"""Pieces of documents -> rows of at most one sample, and the groups that a split must not tear.

A document longer than a row is cut into pieces; a piece that continues a document starts with the last token of the
piece before, as context, so that every token but a document's first is predicted exactly once. Pieces that fill a
row stand alone. Shorter ones are packed best-fit, longest first, within a window of documents: each goes to the open
row that it fills up most. What the next window may still fill stays open, up to a fixed number of rows; the memory
is that of a window and the open rows, whatever the size of the corpus.

A group is a packed row and the full rows of its documents. A document has at most one piece that is shorter than a
row, so a group is known as soon as that piece has its place, and no document is in two groups.

Concatenation is the plain way beside it: documents joined in their order and cut wherever a row ends. Next to nothing
is left empty, but most rows begin in the middle of a document, and a document shorter than a row may be cut too.

The result depends on the documents and their order alone.
"""

import bisect
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from doge_lm.data.manifest import SourceAccounting

Packing = Literal["best_fit", "concat", "max_length"]

# The length to cut documents at for `Concatenator`, which cuts them itself: no document is as long.
WHOLE_DOCUMENTS = 2**31 - 1
# A reason, as it stands in the accounting.
NO_TARGET = "piece of a long document without a target"

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
    """Documents in, rows out.

    Attributes:
        changes: what the account of the documents must be changed by (`SourceAccounting.add`), complete after
            `finish`: a row maker that cuts documents itself adds overlap, and may drop pieces.
    """

    changes: SourceAccounting

    def add(self, document: list[Piece]) -> Iterator[PackedRow]:
        """Takes the pieces of one document, and gives the rows that are finished by it."""

    def finish(self) -> Iterator[PackedRow]:
        """Gives the rows that are left."""


def cut_document(
    ids: _Ids, spans: npt.NDArray[np.int32], text_bytes: npt.NDArray[np.int64], sequence_length: int
) -> Iterator[Piece]:
    """Cuts a document into pieces of at most `sequence_length` tokens that overlap by one.

    Args:
        ids: the document, (n,).
        spans: flat `start, end` pairs of context, ascending and apart.
        text_bytes: bytes that the targets of each piece spell; see `piece_starts`.
        sequence_length: at least 2.
    """
    for begin, size in zip(piece_starts(len(ids), sequence_length), text_bytes.tolist(), strict=True):
        end = min(begin + sequence_length, len(ids))
        yield Piece(ids[begin:end], _spans_within(spans, begin, end), size)


def piece_starts(tokens: int, sequence_length: int) -> range:
    """Where the pieces of a document begin, and with the token that is the last one of the piece before."""
    return range(0, max(1, tokens - 1), sequence_length - 1)


def _spans_within(spans: npt.NDArray[np.int32], begin: int, end: int) -> npt.NDArray[np.int32]:
    """The spans of context in the piece from `begin` to `end`, counted from its start."""
    if not len(spans):
        return _NO_SPANS
    starts, ends = spans[::2], spans[1::2]
    first, last = np.searchsorted(ends, begin + 1, "right"), np.searchsorted(starts, end, "left")
    inside = np.empty(2 * (last - first), np.int32)
    # The first token of a piece is no target anyway, and is counted as overlap: spans begin behind it.
    inside[::2] = np.maximum(starts[first:last], begin + 1) - begin
    inside[1::2] = np.minimum(ends[first:last], end) - begin
    return inside


class _OpenRow:
    """A row that may still take pieces."""

    __slots__ = ("group", "pieces", "room")

    def __init__(self, group: int, room: int) -> None:
        self.group = group
        self.room = room
        self.pieces: list[Piece] = []

    def close(self) -> PackedRow:
        return _join(self.pieces, self.group)


def _join(pieces: list[Piece], group: int) -> PackedRow:
    """The row of some pieces, one after another."""
    lengths = np.array([len(piece.ids) for piece in pieces], np.int32)
    offsets = np.cumsum(lengths) - lengths
    spans = [piece.spans + offset for piece, offset in zip(pieces, offsets, strict=True) if len(piece.spans)]
    return PackedRow(
        np.concatenate([piece.ids for piece in pieces]),
        lengths,
        np.concatenate(spans).astype(np.int32) if spans else _NO_SPANS,
        sum(piece.text_bytes for piece in pieces),
        group,
    )


class BestFitPacker:
    """Packs documents into rows, best-fit, as the module's description says.

    Args:
        sequence_length: tokens of a row.
        window_rows: rows' worth of tokens that are gathered before they are packed.
        window_documents: documents that are gathered at most: very short ones cost far more memory than their tokens.
        max_open_rows: rows that may stay open for the next window; the fullest are given up first.
    """

    def __init__(
        self,
        sequence_length: int,
        *,
        window_rows: int = 1024,
        window_documents: int = 2**15,
        max_open_rows: int = 256,
    ) -> None:
        self.changes = SourceAccounting()
        self.sequence_length = sequence_length
        self.window_tokens = window_rows * sequence_length
        self.window_documents = window_documents
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
        if self._tokens >= self.window_tokens or len(self._window) >= self.window_documents:
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
        self.changes = SourceAccounting()
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


class Concatenator:
    """Joins documents in their order and cuts them where a row ends; see the module's description.

    It takes documents of one piece each, whatever their length: cut them at `WHOLE_DOCUMENTS`. Rows that share a
    document are one group. Since every row would be linked to the next one so, a group that has `max_group_rows`
    rows ends with the document it is in, and the next document begins a row of its own. A row that holds nothing but
    context is left out, and counted.

    Args:
        sequence_length: tokens of a row.
        byte_lengths: UTF-8 bytes of text that each id spells (`Encoder.byte_lengths`); none for control tokens.
        max_group_rows: rows from which on a group ends with a document.
    """

    def __init__(self, sequence_length: int, byte_lengths: npt.NDArray[np.int64], *, max_group_rows: int = 64) -> None:
        self.changes = SourceAccounting()
        self.sequence_length = sequence_length
        self.max_group_rows = max_group_rows
        self._byte_lengths = byte_lengths.astype(np.int32)
        self._pieces: list[Piece] = []
        self._room = sequence_length
        self._group = 0
        self._group_rows = 0  # finished ones of the current group

    def add(self, document: list[Piece]) -> Iterator[PackedRow]:
        """Takes a document of one piece; gives the rows that it fills."""
        (whole,) = document
        if self._group_rows + 1 >= self.max_group_rows and self._pieces:
            yield self._close()
        if not self._pieces:  # no document links this row to the one before
            self._next_group()
        if len(whole.ids) <= self._room:
            self._put(whole)
        else:
            self.changes.documents_cut += 1
            yield from self._cut(whole)
        # Less room than this holds no piece. A row that ends with a document may still be its group's last.
        if self._pieces and self._room < _SHORTEST_PIECE:
            yield self._close()

    def finish(self) -> Iterator[PackedRow]:
        """Gives the row that is not full."""
        if self._pieces:
            yield self._close()

    def _cut(self, whole: Piece) -> Iterator[PackedRow]:
        bounds = self._bounds(len(whole.ids))
        for (begin, end), size in zip(bounds, self._text_bytes(whole, bounds), strict=True):
            piece = Piece(whole.ids[begin:end], _spans_within(whole.spans, begin, end), size)
            context = int(np.sum(piece.spans[1::2] - piece.spans[::2]))
            self.changes.overlap += begin > 0
            if context + 1 == len(piece.ids) and len(piece.ids) == self.sequence_length:
                self._leave_out(piece, context, begin)
            else:
                self._put(piece)
            if end < len(whole.ids) and self._pieces:
                yield self._close()

    def _bounds(self, tokens: int) -> list[tuple[int, int]]:
        """Where the pieces of a document begin and end: the first one fills the row, the last one has the rest."""
        bounds = [(0, self._room)]
        while bounds[-1][1] < tokens:
            begin = bounds[-1][1] - 1
            bounds.append((begin, min(begin + self.sequence_length, tokens)))
        return bounds

    def _text_bytes(self, whole: Piece, bounds: list[tuple[int, int]]) -> list[int]:
        """Bytes that the targets of each piece spell. The first token of each text also holds the blank before it."""
        spelled = self._byte_lengths[whole.ids]
        # Every text stands behind a control token, which spells nothing.
        spelled[1:] -= (spelled[1:] > 0) & (spelled[:-1] == 0)
        for start, end in whole.spans.reshape(-1, 2).tolist():
            spelled[start:end] = 0
        sizes: list[int] = np.add.reduceat(spelled, [min(begin + 1, len(spelled) - 1) for begin, _ in bounds]).tolist()
        sizes[-1] += whole.text_bytes - sum(sizes)  # nothing, for text that this package has tokenized
        return sizes

    def _leave_out(self, piece: Piece, context: int, begin: int) -> None:
        self.changes.drop(NO_TARGET, times=1, tokens=len(piece.ids) - (begin > 0))
        self.changes.context -= context
        self.changes.first_tokens -= begin == 0
        self.changes.overlap -= begin > 0

    def _put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._room -= len(piece.ids)

    def _close(self) -> PackedRow:
        row = _join(self._pieces, self._group)
        self._pieces, self._room = [], self.sequence_length
        self._group_rows += 1
        return row

    def _next_group(self) -> None:
        if self._group_rows:
            self._group += 1
            self._group_rows = 0


def make_row_maker(
    packing: Packing, sequence_length: int, *, pad_token_id: int, byte_lengths: npt.NDArray[np.int64]
) -> RowMaker:
    """The row maker of a name: `BestFitPacker`, `Concatenator` or `Padder`.

    Args:
        packing: "best_fit", "concat" or "max_length" (a row for each piece, padded).
        sequence_length: tokens of a row.
        pad_token_id: what padded rows are filled up with.
        byte_lengths: UTF-8 bytes of text that each id spells.
    """
    if packing == "best_fit":
        return BestFitPacker(sequence_length)
    if packing == "concat":
        return Concatenator(sequence_length, byte_lengths)
    return Padder(sequence_length, pad_token_id)


def cutting_length(packing: Packing, sequence_length: int) -> int:
    """The length that documents are to be cut at for a row maker (`Tokenizing`'s `sequence_length`)."""
    return WHOLE_DOCUMENTS if packing == "concat" else sequence_length
