"""What the data path must come to, written the slow and obvious way, one token at a time, sharing no code with it."""

from collections import Counter
from typing import Any

from doge_lm.data.tokenizer import encode_text

BOS, EOS, INST, END_INST = 1, 2, 3, 4

# One piece of a document: its tokens, and for each whether the loss covers it.
ReferencePiece = tuple[tuple[int, ...], tuple[bool, ...]]


def text_document(tokenizer: Any, row: dict[str, Any], train_on_prompts: bool = False) -> list[tuple[int, bool]]:
    """(token, is it to be learned) of a text with or without a prompt."""
    document = [(BOS, False)]
    if row.get("prompt"):
        for token in [INST, *encode_text(tokenizer, row["prompt"]), END_INST]:
            document.append((token, train_on_prompts))
    for token in [*encode_text(tokenizer, row["text"]), EOS]:
        document.append((token, True))
    return document


def chat_document(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[int, bool]]:
    """(token, is it to be learned) of question and answer pairs."""
    document = [(BOS, False)]
    for question, answer in pairs:
        for token in [INST, *encode_text(tokenizer, question), END_INST]:
            document.append((token, False))
        for token in [*encode_text(tokenizer, answer), EOS]:
            document.append((token, True))
    return document


def pieces_of(document: list[tuple[int, bool]], length: int) -> list[ReferencePiece]:
    """The document cut into pieces that overlap by a token; pieces that teach nothing are left out."""
    pieces = []
    begin = 0
    while True:
        part = document[begin : begin + length]
        learned = [False] + [learn for _, learn in part[1:]]
        if any(learned):
            pieces.append((tuple(token for token, _ in part), tuple(learned)))
        if begin + length >= len(document):
            return pieces
        begin += length - 1


def pieces_in(rows: Any) -> Counter[ReferencePiece]:
    """The pieces that lie in prepared rows."""
    found: Counter[ReferencePiece] = Counter()
    for row in rows:
        ids = [int(token) for token in row["input_ids"]]
        learned = [True] * len(ids)
        spans = [int(index) for index in row["context_spans"]]
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            assert 0 < start < end <= len(ids)
            for index in range(start, end):
                learned[index] = False
        begin = 0
        for count in row["document_lengths"]:
            assert count >= 2
            learned[begin] = False
            found[(tuple(ids[begin : begin + count]), tuple(learned[begin : begin + count]))] += 1
            begin += int(count)
        assert begin <= len(ids)
    return found
