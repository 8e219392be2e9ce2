"""A raw row -> token ids, what of them is context only, and the bytes that the targets spell.

    text                <s> text </s>
    prompt and text     <s> [INST] prompt [/INST] text </s>
    conversation        <s> [INST] human [/INST] gpt </s> [INST] human [/INST] gpt </s> ...

The loss covers the text with its `</s>` (the prompt too with `train_on_prompts`), and of a conversation the
assistant's words with their `</s>`. Everything else is context. Documents are made in batches, so that the
tokenizer sees many strings at once, and are cut into pieces of at most one sample on the spot, so that a batch
crosses to another process as a few arrays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from doge_lm.data.manifest import SourceAccounting
from doge_lm.data.packing import Piece, cut_document
from doge_lm.data.sources import ConversationRow, Role, Row, TextRow
from doge_lm.data.storage import id_dtype
from doge_lm.data.tokenizer import encode_batch, token_byte_lengths
from doge_lm.errors import UserError

# Reasons, as they stand in the accounting.
EMPTY_TEXT = "empty text"
BLANK_PROMPT = "blank prompt"
NO_ASSISTANT = "conversation without an assistant's words"
TRAILING_HUMAN = "turn of the human without an answer"
TRAILING_SYSTEM = "system text without an answer"
NO_TARGET = "piece of a long document without a target"
JOINED_HUMAN = "turn of the human joined to the one before"
JOINED_ASSISTANT = "turn of the assistant joined to the one before"
EMPTY_ASSISTANT = "empty turn of the assistant"
EMPTY_HUMAN = "empty turn of the human"
ONLY_SYSTEM = "answer to a system text alone"
ASSISTANT_FIRST = "conversation that the assistant begins"
LATE_SYSTEM = "system text in mid-conversation"


class SpecialTokens(NamedTuple):
    """The ids of the control tokens."""

    pad: int
    bos: int
    eos: int
    instruction_open: int
    instruction_close: int


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Reads the control tokens off a tokenizer.

    Raises:
        UserError: if one is missing.
    """
    unknown = tokenizer.unk_token_id

    def by_name(text: str) -> int:
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == unknown:
            raise UserError(f"the tokenizer has no token {text!r}; make one with `doge-lm tokenizer build`")
        return int(token)

    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    missing = [name for name, token in ids.items() if token is None]
    if missing:
        raise UserError(f"the tokenizer has no {missing[0]} token; make one with `doge-lm tokenizer build`")
    return SpecialTokens(int(ids["pad"]), int(ids["bos"]), int(ids["eos"]), by_name("[INST]"), by_name("[/INST]"))


# ---------------------------------------------------------------------------------------------------------------
# Rows -> parts
# ---------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A control token (where `text` is None) or a string to be encoded."""

    text: str | None
    token: int
    trained: bool


class _Plan(NamedTuple):
    """How a row becomes a document. `parts` is empty if nothing is left; `dropped` holds (reason, string)."""

    parts: list[_Part]
    dropped: list[tuple[str, str]]


def nothing_to_learn(row: Row) -> str | None:
    """Why a row comes to no document at all, or None if it comes to one."""
    if isinstance(row, TextRow):
        return None if row.text.strip() else EMPTY_TEXT
    answered = any(role == "gpt" and content.strip() for role, content in row.turns)
    return None if answered else NO_ASSISTANT


class DocumentBuilder:
    """Turns rows into documents, and counts.

    Args:
        special: the control tokens.
        train_on_prompts: whether the loss covers the `prompt` of a text.
    """

    def __init__(self, special: SpecialTokens, *, train_on_prompts: bool = False) -> None:
        self.special = special
        self.train_on_prompts = train_on_prompts

    def plan(self, row: Row, account: SourceAccounting) -> _Plan:
        """Decides what a row becomes, and counts it in `account`."""
        account.documents_in += 1
        return self._plan_text(row, account) if isinstance(row, TextRow) else self._plan_conversation(row, account)

    def _plan_text(self, row: TextRow, account: SourceAccounting) -> _Plan:
        account.bytes_in += _size(row.text) + _size(row.prompt)
        if not row.text.strip():
            account.drop(EMPTY_TEXT, times=1)
            return _Plan([], [(EMPTY_TEXT, row.prompt), (EMPTY_TEXT, row.text)])
        parts = [self._control(self.special.bos, trained=False)]
        if row.prompt.strip():
            parts += self._question(row.prompt, trained=self.train_on_prompts)
        parts += self._answer(row.text)
        if not row.prompt or row.prompt.strip():
            return _Plan(parts, [])
        account.drop(BLANK_PROMPT, times=1)
        return _Plan(parts, [(BLANK_PROMPT, row.prompt)])

    def _plan_conversation(self, row: ConversationRow, account: SourceAccounting) -> _Plan:
        account.bytes_in += sum(_size(content) for _, content in row.turns)
        parts = [self._control(self.special.bos, trained=False)]
        waiting = _Waiting()
        answers = 0
        runs, blank = _speakers(row, account)
        for role, contents in runs:
            if role != "gpt":
                waiting.take(role, contents, begun=answers > 0)
                continue
            if waiting.anything:
                parts += self._question(waiting.join(account), trained=False)
            else:
                account.repair(ASSISTANT_FIRST)
            account.joiner_bytes += len(contents) - 1
            account.repair(JOINED_ASSISTANT, len(contents) - 1)
            parts += self._answer("\n".join(contents))
            answers += 1
        if answers == 0:
            account.drop(NO_ASSISTANT, times=1)
            return _Plan([], blank + [(NO_ASSISTANT, text) for text in waiting.system + waiting.human])
        dropped = blank
        for reason, texts in ((TRAILING_HUMAN, waiting.human), (TRAILING_SYSTEM, waiting.system)):
            if texts:
                account.drop(reason, times=len(texts))
                dropped += [(reason, text) for text in texts]
        return _Plan(parts, dropped)

    def _question(self, text: str, *, trained: bool) -> list[_Part]:
        return [
            self._control(self.special.instruction_open, trained=trained),
            _Part(text, -1, trained),
            self._control(self.special.instruction_close, trained=trained),
        ]

    def _answer(self, text: str) -> list[_Part]:
        return [_Part(text, -1, True), self._control(self.special.eos, trained=True)]

    @staticmethod
    def _control(token: int, *, trained: bool) -> _Part:
        return _Part(None, token, trained)


@dataclass
class _Waiting:
    """What has been said to the assistant since it spoke last."""

    system: list[str] = field(default_factory=list)
    human: list[str] = field(default_factory=list)
    late: int = 0  # of the system texts, those that do not stand at the beginning

    @property
    def anything(self) -> bool:
        return bool(self.system or self.human)

    def take(self, role: Role, contents: list[str], *, begun: bool) -> None:
        if role == "system":
            self.late += len(contents) if begun or self.human else 0
            self.system += contents
        else:
            self.human += contents

    def join(self, account: SourceAccounting) -> str:
        """The question: system texts, a blank line, the human's turns each on lines of their own. Then waits anew."""
        human = "\n".join(self.human)
        question = "\n\n".join([*self.system, human] if human else self.system)
        account.joiner_bytes += _size(question) - sum(_size(text) for text in self.system + self.human)
        if not self.human:
            account.repair(ONLY_SYSTEM)
        elif not human.strip():
            account.repair(EMPTY_HUMAN)
        account.repair(JOINED_HUMAN, max(0, len(self.human) - 1))
        account.repair(LATE_SYSTEM, self.late)
        self.system, self.human, self.late = [], [], 0
        return question


def _speakers(
    row: ConversationRow, account: SourceAccounting
) -> tuple[list[tuple[Role, list[str]]], list[tuple[str, str]]]:
    """Runs of turns by the same speaker, and the empty answers, which are left out: they would answer nothing."""
    runs: list[tuple[Role, list[str]]] = []
    blank: list[tuple[str, str]] = []
    for role, content in row.turns:
        if role == "gpt" and not content.strip():
            account.drop(EMPTY_ASSISTANT, times=1)
            blank.append((EMPTY_ASSISTANT, content))
        elif runs and runs[-1][0] == role:
            runs[-1][1].append(content)
        else:
            runs.append((role, [content]))
    return runs, blank


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


# ---------------------------------------------------------------------------------------------------------------
# Batches of rows -> pieces
# ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class PieceBatch:
    """The pieces of some documents, as a few arrays that are cheap to send to another process.

    Attributes:
        ids: the tokens of all pieces, one after another.
        lengths: tokens of each piece.
        spans: flat `start, end` pairs of context within each piece, one piece after another.
        span_counts: numbers in `spans` that belong to each piece.
        text_bytes: bytes that each piece's targets spell.
        pieces_per_document: pieces of each document, in order.
        account: what the rows of the batch came to.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int32]
    span_counts: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    pieces_per_document: npt.NDArray[np.int64]
    account: SourceAccounting

    @classmethod
    def collect(cls, documents: list[list[Piece]], account: SourceAccounting, dtype: np.dtype[Any]) -> "PieceBatch":
        """Joins the pieces of documents into arrays."""
        pieces = [piece for document in documents for piece in document]
        return cls(
            ids=np.concatenate([piece.ids for piece in pieces]) if pieces else np.empty(0, dtype),
            lengths=np.array([len(piece.ids) for piece in pieces], np.int64),
            spans=np.concatenate([piece.spans for piece in pieces]) if pieces else np.empty(0, np.int32),
            span_counts=np.array([len(piece.spans) for piece in pieces], np.int64),
            text_bytes=np.array([piece.text_bytes for piece in pieces], np.int64),
            pieces_per_document=np.array([len(document) for document in documents], np.int64),
            account=account,
        )

    def documents(self) -> Iterator[list[Piece]]:
        """The documents again, as lists of pieces that look into the arrays."""
        id_ends = np.cumsum(self.lengths)
        span_ends = np.cumsum(self.span_counts)
        first = 0
        for count in self.pieces_per_document.tolist():
            yield [
                Piece(
                    self.ids[id_ends[index] - self.lengths[index] : id_ends[index]],
                    self.spans[span_ends[index] - self.span_counts[index] : span_ends[index]],
                    int(self.text_bytes[index]),
                )
                for index in range(first, first + count)
            ]
            first += count


class Tokenizing:
    """Everything that turns batches of rows into pieces; made once in each process.

    Args:
        tokenizer: as `doge_lm.data.tokenizer.load_tokenizer` gives it.
        sequence_length: tokens of a sample, at least 2.
        train_on_prompts: see `DocumentBuilder`.
    """

    def __init__(self, tokenizer: Any, sequence_length: int, *, train_on_prompts: bool = False) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.builder = DocumentBuilder(special_tokens(tokenizer), train_on_prompts=train_on_prompts)
        self.byte_lengths = np.asarray(token_byte_lengths(tokenizer), np.int64)
        self.dtype = id_dtype(len(self.byte_lengths))

    def __call__(self, rows: Sequence[Row]) -> PieceBatch:
        """Tokenizes rows, cuts what is longer than a sample, and counts."""
        account = SourceAccounting()
        plans = [self.builder.plan(row, account) for row in rows]
        strings = [part.text for plan in plans for part in plan.parts if part.text is not None]
        left_out = [text for plan in plans for _, text in plan.dropped]
        encoded = encode_batch(self.tokenizer, strings + left_out)
        contents = iter(encoded[: len(strings)])
        for (reason, text), ids in zip(
            (entry for plan in plans for entry in plan.dropped), encoded[len(strings) :], strict=True
        ):
            account.drop(reason, bytes_=_size(text), tokens=len(ids))
            account.tokens_in += len(ids)
        documents = [self._document(plan.parts, contents, account) for plan in plans if plan.parts]
        return PieceBatch.collect([document for document in documents if document], account, self.dtype)

    def _document(self, parts: list[_Part], contents: Iterator[list[int]], account: SourceAccounting) -> list[Piece]:
        ids: list[int] = []
        spans: list[int] = []
        trained: list[tuple[int, int, int]] = []  # start, end, bytes of each trained string
        for part in parts:
            start = len(ids)
            if part.text is None:
                ids.append(part.token)
            else:
                ids.extend(next(contents))
                if part.trained:
                    trained.append((start, len(ids), _size(part.text)))
                else:
                    account.bytes_context += _size(part.text)
            if not part.trained and start > 0 and len(ids) > start:
                if spans and spans[-1] == start:
                    spans[-1] = len(ids)
                else:
                    spans += [start, len(ids)]
        total_bytes = sum(size for _, _, size in trained)
        account.documents_kept += 1
        account.tokens_in += len(ids)
        account.bytes_trained += total_bytes
        array = np.array(ids, self.dtype)
        span_array = np.array(spans, np.int32)
        if len(ids) <= self.sequence_length:
            account.first_tokens += 1
            context = int(np.sum(span_array[1::2] - span_array[::2]))
            account.context += context
            account.targets += len(ids) - 1 - context
            return [Piece(array, span_array, total_bytes)]
        account.documents_cut += 1
        return self._cut(array, span_array, self._spelled(array, trained), account)

    def _spelled(self, ids: npt.NDArray[Any], trained: list[tuple[int, int, int]]) -> npt.NDArray[np.int64]:
        """Bytes that each token spells, zero outside the trained strings; they sum to the strings' bytes exactly.

        A token's own length is not quite what it adds to the text: the first one of a string also carries the blank
        that SentencePiece puts in front. So the difference is taken from (or given to) the start of the string.
        """
        spelled = np.zeros(len(ids), np.int64)
        for start, end, size in trained:
            if end == start:
                spelled[end] += size  # text that encodes to nothing; the `</s>` behind it is always there
                continue
            up_to = np.cumsum(self.byte_lengths[ids[start:end]])
            marks = np.clip(up_to + (size - up_to[-1]), 0, size)
            spelled[start:end] += np.diff(marks, prepend=0)
        return spelled

    def _cut(
        self,
        ids: npt.NDArray[Any],
        spans: npt.NDArray[np.int32],
        spelled: npt.NDArray[np.int64],
        account: SourceAccounting,
    ) -> list[Piece]:
        pieces = []
        for index, piece in enumerate(cut_document(ids, spans, spelled, self.sequence_length)):
            context = int(np.sum(piece.spans[1::2] - piece.spans[::2]))
            targets = len(piece.ids) - 1 - context
            if targets == 0:
                # Nothing to learn from it, and an average over no targets is not a number.
                account.drop(NO_TARGET, times=1, tokens=len(piece.ids) - (index > 0))
                continue
            account.first_tokens += index == 0
            account.overlap += index > 0
            account.context += context
            account.targets += targets
            pieces.append(piece)
        return pieces
