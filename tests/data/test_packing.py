"""Packing: nothing lost, nothing torn, memory bounded."""

import random
from collections import Counter

import numpy as np
import pytest

from doge_lm.data.packing import BestFitPacker, Concatenator, PackedRow, Padder, Piece, cut_document, piece_starts

EMPTY = np.empty(0, np.int32)


def document(number: int, tokens: int, length: int, spans: tuple[int, ...] = ()) -> list[Piece]:
    """A document whose tokens are its number, cut."""
    ids = np.full(tokens, number, np.uint16)
    return list(cut_document(ids, np.array(spans, np.int32), sums(np.ones(tokens, np.int64), length), length))


def sums(spelled: np.ndarray, length: int) -> np.ndarray:
    """Of the bytes that each token spells, what the targets of each piece spell."""
    return np.array([spelled[begin + 1 : begin + length].sum() for begin in piece_starts(len(spelled), length)])


def pack(documents: list[list[Piece]], length: int, **options: int) -> list[PackedRow]:
    packer = BestFitPacker(length, **options)
    rows = [row for entry in documents for row in packer.add(entry)]
    return rows + list(packer.finish())


def random_documents(seed: int, count: int, length: int) -> list[list[Piece]]:
    generator = random.Random(seed)
    return [
        document(number, max(2, int(generator.lognormvariate(3, 1))), length, (1, 2)) for number in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"window_rows": 1, "max_open_rows": 1}, {"window_rows": 5, "max_open_rows": 3}]
)
def test_every_piece_lies_in_one_row(options: dict[str, int]) -> None:
    length = 32
    documents = random_documents(0, 2000, length)
    rows = pack(documents, length, **options)
    expected = Counter((int(p.ids[0]), len(p.ids), tuple(p.spans), p.text_bytes) for d in documents for p in d)
    found: Counter[tuple[int, int, tuple[int, ...], int]] = Counter()
    for row in rows:
        assert len(row.input_ids) == row.document_lengths.sum() <= length
        begin, bytes_ = 0, 0
        for count in row.document_lengths:
            part = row.input_ids[begin : begin + count]
            assert len(set(part.tolist())) == 1  # one document
            inside = [i - begin for i in row.context_spans if begin < i <= begin + count]
            # A whole document of one piece spells a byte for each token but its first.
            found[(int(part[0]), int(count), tuple(inside), int(count) - 1)] += 1
            begin += count
            bytes_ += count - 1
        assert row.text_bytes == bytes_
    assert found == expected


def test_groups_keep_documents_together() -> None:
    length = 32
    documents = random_documents(1, 3000, length)
    rows = pack(documents, length, window_rows=20, max_open_rows=4)
    group_of: dict[int, int] = {}
    by_group: dict[int, list[PackedRow]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
        for number in set(row.input_ids.tolist()):
            assert group_of.setdefault(number, row.group) == row.group
    # No larger than it must be: one packed row, and full rows of its documents.
    assert all(sum(len(row.document_lengths) > 1 for row in group) <= 1 for group in by_group.values())
    assert sorted(by_group) == list(range(len(by_group)))


def test_packing_wastes_little() -> None:
    length = 128
    documents = random_documents(2, 5000, length)
    rows = pack(documents, length)
    tokens = sum(len(piece.ids) for entry in documents for piece in entry)
    assert len(rows) <= 1.01 * tokens / length + 1


def test_best_fit_chooses_the_fullest_row_that_has_room() -> None:
    # 20, 16 and 14 open rows of their own; 12 fills 20's row, 14 goes beside 16's rather than its own.
    rows = pack([document(number, number, 32) for number in (12, 20, 16, 14)], 32)
    assert [sorted(set(row.input_ids.tolist())) for row in rows] == [[12, 20], [14, 16]]


def test_open_rows_are_bounded() -> None:
    packer = BestFitPacker(32, window_rows=4, max_open_rows=3)
    taken = given = 0
    for number in range(2000):
        taken += 1
        given += sum(len(row.document_lengths) for row in packer.add(document(number, 17, 32)))
        assert taken - given <= 3 + 4 * 32 // 17 + 1
    assert given + sum(len(row.document_lengths) for row in packer.finish()) == taken


@pytest.mark.parametrize("tokens", [2, 7, 8, 9, 15, 16, 22, 23, 100])
def test_cutting(tokens: int) -> None:
    length = 8
    ids = np.arange(tokens)
    spans = np.array([1, 3, 6, 10, 14, 16], np.int32)
    spans = np.minimum(spans, tokens)
    spans = spans.reshape(-1, 2)[spans[::2] < spans[1::2]].ravel()
    pieces = list(cut_document(ids, spans, sums(np.arange(tokens), length), length))
    context = {index for start, end in spans.reshape(-1, 2) for index in range(start, end)}
    targets, seen = [], []
    for number, piece in enumerate(pieces):
        assert 2 <= len(piece.ids) <= length
        if number:
            assert piece.ids[0] == pieces[number - 1].ids[-1]
        marked = {int(i) for start, end in piece.spans.reshape(-1, 2) for i in range(start, end)}
        assert 0 not in marked
        targets += [int(piece.ids[i]) for i in range(1, len(piece.ids)) if i not in marked]
        seen += [int(i) for i in piece.ids[1:]]
        assert piece.text_bytes == piece.ids[1:].sum()
    assert seen == list(range(1, tokens))
    assert targets == [index for index in range(1, tokens) if index not in context]


def test_padding_gives_a_row_to_each_piece() -> None:
    padder = Padder(8, pad_token_id=9)
    rows = [row for number in (1, 2) for row in padder.add(document(number, 11, 8))] + list(padder.finish())
    assert [row.input_ids.tolist() for row in rows] == [
        [1] * 8,
        [1] * 4 + [9] * 4,
        [2] * 8,
        [2] * 4 + [9] * 4,
    ]
    assert [row.group for row in rows] == [0, 0, 1, 1]
    assert [row.document_lengths.tolist() for row in rows] == [[8], [4], [8], [4]]


# Ids from 10 on spell a byte, in this test; those below are control tokens.
BYTE_LENGTHS = np.array([0] * 10 + [1] * 200_000)


def whole_documents(seed: int, count: int) -> list[list[Piece]]:
    """Documents of one piece: a control token, a first token with its blank alone, and tokens that are all different.

    Every third one has context in the middle.
    """
    generator = random.Random(seed)
    documents, following = [], 10
    for number in range(count):
        tokens = max(4, int(generator.lognormvariate(3, 1.2)))
        ids = np.array([1, *range(following, following + tokens - 1)], np.uint32)
        following += tokens - 1
        spans = np.array([2, max(3, tokens - 2)] if number % 3 == 0 else [], np.int32)
        targets = tokens - 1 - int((spans[1::2] - spans[::2]).sum())
        documents.append([Piece(ids, spans, targets - 1)])
    return documents


@pytest.mark.parametrize(("seed", "max_group_rows"), [(0, 64), (1, 3), (2, 1), (3, 10)])
def test_concatenation_loses_nothing_but_rows_without_a_target(seed: int, max_group_rows: int) -> None:
    length = 16
    documents = whole_documents(seed, 800)
    packer = Concatenator(length, BYTE_LENGTHS, max_group_rows=max_group_rows)
    rows = [row for entry in documents for row in packer.add(entry)] + list(packer.finish())
    expected: set[int] = set()
    context_in = 0
    for ((ids, spans, _),) in documents:
        context = {i for start, end in spans.reshape(-1, 2) for i in range(start, end)}
        context_in += len(context)
        expected |= {int(ids[i]) for i in range(1, len(ids)) if i not in context}
    found: list[int] = []
    context_out = 0
    for row in rows:
        assert len(row.input_ids) == row.document_lengths.sum() <= length
        context = {i for start, end in row.context_spans.reshape(-1, 2) for i in range(start, end)}
        firsts = set((np.cumsum(row.document_lengths) - row.document_lengths).tolist())
        assert not context & firsts
        assert row.document_lengths.min() >= 2
        context_out += len(context)
        learned = [i for i in range(len(row.input_ids)) if i not in context | firsts]
        found += [int(row.input_ids[i]) for i in learned]
        # The first token of a document's text spells nothing but the blank.
        assert row.text_bytes == sum(i == 0 or row.input_ids[i - 1] != 1 for i in learned)
    assert sorted(found) == sorted(expected)
    assert sum(row.text_bytes for row in rows) == sum(piece.text_bytes for (piece,) in documents)
    pieces = sum(len(row.document_lengths) for row in rows)
    changes = packer.changes
    assert pieces == len(documents) + changes.first_tokens + changes.overlap
    assert context_out == context_in + changes.context
    assert changes.documents_cut > 100
    dropped = sum(entry.tokens for entry in changes.dropped.values())
    assert dropped == -changes.context - changes.first_tokens


def test_concatenation_keeps_documents_in_one_group() -> None:
    length = 16
    documents = whole_documents(5, 2000)
    packer = Concatenator(length, BYTE_LENGTHS, max_group_rows=5)
    rows = [row for entry in documents for row in packer.add(entry)] + list(packer.finish())
    owner = {int(token): number for number, (piece,) in enumerate(documents) for token in piece.ids[1:]}
    group_of: dict[int, int] = {}
    for row in rows:
        for token in row.input_ids[row.input_ids >= 10].tolist():
            assert group_of.setdefault(owner[token], row.group) == row.group
    groups = Counter(row.group for row in rows)
    assert sorted(groups) == list(range(len(groups)))
    longest = max(len(piece.ids) for (piece,) in documents) // (length - 1) + 2
    assert max(groups.values()) <= 5 + longest
    assert [row.group for row in rows] == sorted(row.group for row in rows)


def test_concatenation_fills_rows() -> None:
    documents = [entry for entry in whole_documents(6, 1500) if not len(entry[0].spans)]
    packer = Concatenator(32, BYTE_LENGTHS)
    rows = [row for entry in documents for row in packer.add(entry)] + list(packer.finish())
    short = sum(len(row.input_ids) < 31 for row in rows)
    assert short <= len(rows) // 64 + 1


def test_a_window_is_bounded_by_documents_too() -> None:
    packer = BestFitPacker(8, window_documents=4, max_open_rows=0)
    ids = np.arange(2, dtype=np.uint16)
    document = [Piece(ids, np.empty(0, np.int32), 1)]
    rows = [len(list(packer.add(document))) for _ in range(9)]
    assert rows == [0, 0, 0, 1, 0, 0, 0, 1, 0]  # four documents of two tokens are a row
    assert len(list(packer.finish())) == 1
