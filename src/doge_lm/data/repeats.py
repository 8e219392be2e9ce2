"""Documents that occur more than once: found by a hash, so that a split can keep all their samples on one side.

A document is known by the first of its pieces, which begins with `<s>`: two documents that share their whole first
piece count as the same. Where that piece was left out of the rows, because it holds no target, the document is known
by the pieces that are left. Some 20 bytes are held for each piece, however long it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from doge_lm.data.storage import flat_values
from doge_lm.errors import UserError

_Ints = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]
_Flags = npt.NDArray[np.bool_]


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
    ids, id_offsets = flat_values(batch.column("input_ids"))
    lengths, offsets = flat_values(batch.column("document_lengths"))
    lengths = lengths.astype(np.int64)
    row_of = np.repeat(np.arange(batch.num_rows), np.diff(offsets))
    ends = np.cumsum(lengths)
    before_row = np.concatenate([[0], ends])[offsets[:-1]]
    begins = ends - lengths + (id_offsets[:-1] - before_row)[row_of]
    if np.any(lengths < 1) or np.any(begins + lengths > id_offsets[1:][row_of]):
        raise UserError("the document_lengths of a row do not fit its input_ids; run preprocess_datasets again")
    view = ids.view(np.uint8).data
    width = ids.itemsize
    bounds = zip((begins * width).tolist(), ((begins + lengths) * width).tolist(), strict=True)
    digests = b"".join([blake2b(view[begin:end], digest_size=8).digest() for begin, end in bounds])
    return Pieces(
        np.frombuffer(digests, np.uint64), groups[row_of], ids[begins] == bos_token_id, lengths == sequence_length
    )


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
    for one, other in _union(zip(groups[same].tolist(), groups[same + 1].tolist(), strict=True)).items():
        roots[one] = other
    return np.unique(roots, return_inverse=True)[1].astype(np.int64), repeated


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
