"""A raw row -> token ids, what of them is context only, and the bytes that the targets spell.

    text                <s> text </s>
    prompt and text     <s> [INST] prompt [/INST] text </s>
    conversation        <s> [INST] human [/INST] gpt </s> [INST] human [/INST] gpt </s> ...

The loss covers the text with its `</s>` (the prompt too with `train_on_prompts`), and of a conversation the
assistant's words with their `</s>`. Everything else is context. Documents are made in batches, so that the
tokenizer sees many strings at once, and are cut into pieces of at most one sample on the spot, so that a batch
crosses to another process as a few arrays.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from doge_lm.data.encoders import Encoder, SpecialTokens
from doge_lm.data.manifest import SourceAccounting
from doge_lm.data.packing import NO_TARGET, Piece, cut_document, piece_starts
from doge_lm.data.sources import ConversationRow, Role, Row, TextRow, row_characters
from doge_lm.data.storage import id_dtype

# A batch is tokenized as soon as it holds this much text, or this many rows.
_BATCH_CHARACTERS = 2**19
_BATCH_ROWS = 1024

# Reasons, as they stand in the accounting.
EMPTY_TEXT = "empty text"
BLANK_PROMPT = "blank prompt"
NO_ASSISTANT = "conversation without an assistant's words"
TRAILING_HUMAN = "turn of the human without an answer"
TRAILING_SYSTEM = "system text without an answer"
JOINED_HUMAN = "turn of the human joined to the one before"
JOINED_ASSISTANT = "turn of the assistant joined to the one before"
EMPTY_ASSISTANT = "empty turn of the assistant"
EMPTY_HUMAN = "empty turn of the human"
ONLY_SYSTEM = "answer to a system text alone"
ASSISTANT_FIRST = "conversation that the assistant begins"
LATE_SYSTEM = "system text in mid-conversation"
ADDED_SYSTEM = "system prompt of the settings added"


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


@dataclass(frozen=True)
class SystemPrompt:
    """A text that opens conversations without a system text of their own.

    Attributes:
        text: what it says; "" for none.
        share: of these conversations that get it, chosen by their own words: the same ones every time.
    """

    text: str = ""
    share: float = 1.0

    def opens(self, turns: Sequence[tuple[Role, str]]) -> bool:
        """Whether it opens this conversation."""
        if not self.text or any(role == "system" for role, _ in turns):
            return False
        words = "\0".join(content for _, content in turns).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(words).digest()[:8], "big") < self.share * 2**64


class DocumentBuilder:
    """Turns rows into documents, and counts.

    Args:
        special: the control tokens.
        train_on_prompts: whether the loss covers the `prompt` of a text.
        system_prompt: opens conversations.
    """

    def __init__(
        self, special: SpecialTokens, *, train_on_prompts: bool = False, system_prompt: SystemPrompt | None = None
    ) -> None:
        self.special = special
        self.train_on_prompts = train_on_prompts
        self.system_prompt = system_prompt or SystemPrompt()

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
        added = self.system_prompt.text if self.system_prompt.opens(row.turns) else ""
        waiting = _Waiting([added] if added else [])
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
            own = waiting.system[1:] if added else waiting.system
            return _Plan([], blank + [(NO_ASSISTANT, text) for text in own + waiting.human])
        if added:
            account.joiner_bytes += _size(added)
            account.repair(ADDED_SYSTEM)
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
        sizes = self.text_bytes.tolist()
        id_ends = np.cumsum(self.lengths).tolist()
        span_ends = np.cumsum(self.span_counts).tolist()
        pieces = (
            Piece(self.ids[id_start:id_end], self.spans[span_start:span_end], size)
            for id_start, id_end, span_start, span_end, size in zip(
                [0, *id_ends[:-1]], id_ends, [0, *span_ends[:-1]], span_ends, sizes, strict=False
            )
        )
        for count in self.pieces_per_document.tolist():
            yield list(itertools.islice(pieces, count))


class _Parts(NamedTuple):
    """The parts of some documents, as columns; `first` holds each document's first part."""

    is_text: npt.NDArray[np.bool_]
    trained: npt.NDArray[np.bool_]
    sizes: npt.NDArray[np.int64]  # UTF-8 bytes
    lengths: npt.NDArray[np.int64]  # tokens
    starts: npt.NDArray[np.int64]  # where it begins among the tokens of all documents
    first: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]  # which one it belongs to


def batch_rows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in batches for `Tokenizing`, whose bounds depend on the rows alone."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += row_characters(row)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class Tokenizing:
    """Everything that turns batches of rows into pieces; made once in each process.

    Args:
        encoder: as `doge_lm.data.encoders.load_encoder` gives it.
        sequence_length: tokens of a sample, at least 2.
        train_on_prompts: see `DocumentBuilder`.
        system_prompt: likewise.
    """

    def __init__(
        self,
        encoder: Encoder,
        sequence_length: int,
        *,
        train_on_prompts: bool = False,
        system_prompt: SystemPrompt | None = None,
    ) -> None:
        self.encoder = encoder
        self.sequence_length = sequence_length
        self.builder = DocumentBuilder(encoder.special, train_on_prompts=train_on_prompts, system_prompt=system_prompt)
        self.dtype = id_dtype(encoder.vocab_size)
        # Gathered for every token of a long document, so they are kept small.
        self._byte_lengths = encoder.byte_lengths.astype(np.min_scalar_type(int(encoder.byte_lengths.max())))

    def __call__(self, rows: Sequence[Row]) -> PieceBatch:
        """Tokenizes rows, cuts what is longer than a sample, and counts."""
        account = SourceAccounting()
        plans = [self.builder.plan(row, account) for row in rows]
        parts = [part for plan in plans for part in plan.parts]
        strings = [part.text for part in parts if part.text is not None]
        left_out = [entry for plan in plans for entry in plan.dropped]
        ids, lengths = self.encoder.encode(strings + [text for _, text in left_out])
        for (reason, text), tokens in zip(left_out, lengths[len(strings) :].tolist(), strict=True):
            account.drop(reason, bytes_=_size(text), tokens=tokens)
            account.tokens_in += tokens
        if not parts:
            return PieceBatch.collect([], account, self.dtype)
        counts = np.array([len(plan.parts) for plan in plans if plan.parts], np.int64)
        columns = _columns(parts, counts, lengths[: len(strings)])
        return self._assemble(self._flat(parts, columns, ids), columns, account)

    def _flat(self, parts: list[_Part], columns: _Parts, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The tokens of all documents: control tokens put between the texts."""
        flat = np.empty(int(columns.lengths.sum()), self.dtype)
        of_text = np.ones(len(flat), bool)
        control = columns.starts[~columns.is_text]
        of_text[control] = False
        flat[control] = [part.token for part in parts if part.text is None]
        flat[of_text] = ids[: len(flat) - len(control)]
        return flat

    def _assemble(self, flat: npt.NDArray[Any], columns: _Parts, account: SourceAccounting) -> PieceBatch:
        lengths = np.add.reduceat(columns.lengths, columns.first)
        trained_sizes = np.where(columns.trained, columns.sizes, 0)
        text_bytes = np.add.reduceat(trained_sizes, columns.first)
        spans, span_document = _context_spans(columns)
        span_counts = 2 * np.bincount(span_document, minlength=len(lengths))
        account.documents_kept += len(lengths)
        account.tokens_in += len(flat)
        account.bytes_trained += int(text_bytes.sum())
        account.bytes_context += int(columns.sizes.sum() - trained_sizes.sum())
        whole = PieceBatch(flat, lengths, spans, span_counts, text_bytes, np.ones(len(lengths), np.int64), account)
        is_long = lengths > self.sequence_length
        self._count_short(whole, ~is_long, span_document)
        return self._cut_long(whole, is_long, columns) if is_long.any() else whole

    @staticmethod
    def _count_short(whole: PieceBatch, is_short: npt.NDArray[np.bool_], span_document: npt.NDArray[np.int64]) -> None:
        account = whole.account
        count = int(is_short.sum())
        context = int((whole.spans[1::2] - whole.spans[::2])[is_short[span_document]].sum())
        account.first_tokens += count
        account.context += context
        account.targets += int(whole.lengths[is_short].sum()) - count - context

    def _cut_long(self, whole: PieceBatch, is_long: npt.NDArray[np.bool_], columns: _Parts) -> PieceBatch:
        account = whole.account
        last = np.append(columns.first[1:], len(columns.lengths))
        documents = []
        for number, document in enumerate(whole.documents()):
            if not is_long[number]:
                documents.append(document)
                continue
            account.documents_cut += 1
            (piece,) = document
            strings = _trained_strings(columns, int(columns.first[number]), int(last[number]))
            documents.append(self._cut(piece, self._spelled(piece.ids, strings), account))
        return PieceBatch.collect([document for document in documents if document], account, self.dtype)

    def _spelled(self, ids: npt.NDArray[Any], strings: list[tuple[int, int, int]]) -> npt.NDArray[np.int64]:
        """Bytes that the targets of each piece spell; they sum to the bytes of the trained strings exactly.

        A token's own length is not quite what it adds to the text: the first one of a string also carries the blank
        that SentencePiece puts in front. So the difference is taken from (or given to) the start of the string.

        Args:
            ids: a document.
            strings: start, end and bytes of each trained string.
        """
        # The targets of a piece are the tokens from one of these on to the next; the document's first is no target.
        bounds = np.array([begin + 1 for begin in piece_starts(len(ids), self.sequence_length)[1:]] + [len(ids)])
        before = np.zeros(len(bounds), np.int64)  # bytes spelled before each bound
        for start, end, size in strings:
            first, behind = np.searchsorted(bounds, start, "right"), np.searchsorted(bounds, max(end, start + 1))
            before[behind:] += size
            if first < behind:
                cuts = np.concatenate(([0], bounds[first:behind] - start))
                up_to = np.cumsum(np.add.reduceat(self._byte_lengths[ids[start:end]], cuts, dtype=np.int64))
                before[first:behind] += np.clip(up_to[:-1] + (size - up_to[-1]), 0, size)
        return np.diff(before, prepend=0)

    def _cut(self, whole: Piece, text_bytes: npt.NDArray[np.int64], account: SourceAccounting) -> list[Piece]:
        pieces = []
        for index, piece in enumerate(cut_document(whole.ids, whole.spans, text_bytes, self.sequence_length)):
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


def _columns(parts: list[_Part], counts: npt.NDArray[np.int64], text_lengths: npt.NDArray[np.int64]) -> _Parts:
    """Makes columns of parts.

    Args:
        parts: of all documents, one after another.
        counts: parts of each document.
        text_lengths: tokens of each part that is a text.
    """
    is_text = np.array([part.text is not None for part in parts], bool)
    lengths = np.ones(len(parts), np.int64)
    lengths[is_text] = text_lengths
    return _Parts(
        is_text=is_text,
        trained=np.array([part.trained for part in parts], bool),
        sizes=np.array([0 if part.text is None else _size(part.text) for part in parts], np.int64),
        lengths=lengths,
        starts=np.cumsum(lengths) - lengths,
        first=np.cumsum(counts) - counts,
        document=np.repeat(np.arange(len(counts)), counts),
    )


def _context_spans(columns: _Parts) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Flat `start, end` pairs of context within each document, neighbours joined, and the document of each pair.

    A document's first token is no target anyway: spans begin behind it.
    """
    starts = columns.starts - columns.starts[columns.first][columns.document]
    chosen = np.flatnonzero(~columns.trained & (starts > 0) & (columns.lengths > 0))
    begins, ends, document = starts[chosen], (starts + columns.lengths)[chosen], columns.document[chosen]
    joined = np.zeros(len(chosen), bool)
    joined[1:] = (begins[1:] == ends[:-1]) & (document[1:] == document[:-1])
    spans = np.empty((int((~joined).sum()), 2), np.int32)
    spans[:, 0] = begins[~joined]
    spans[:, 1] = ends[~np.append(joined[1:], False)] if len(chosen) else 0
    return spans.ravel(), document[~joined]


def _trained_strings(columns: _Parts, first: int, last: int) -> list[tuple[int, int, int]]:
    """Start, end and bytes of each trained string of the document whose parts are `first` to `last`."""
    begins = columns.starts[first:last] - columns.starts[first]
    chosen = columns.is_text[first:last] & columns.trained[first:last]
    return list(
        zip(
            begins[chosen].tolist(),
            (begins + columns.lengths[first:last])[chosen].tolist(),
            columns.sizes[first:last][chosen].tolist(),
            strict=True,
        )
    )
