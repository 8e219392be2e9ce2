"""Rows -> documents: what is trained on, what is context, and that everything else is counted."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from doge_lm.data import documents
from doge_lm.data.documents import Tokenizing, nothing_to_learn
from doge_lm.data.encoders import Encoder, load_encoder
from doge_lm.data.manifest import SourceAccounting
from doge_lm.data.sources import ConversationRow, Row, TextRow
from doge_lm.data.tokenizer import encode_text
from tests.data.reference import BOS, EOS, chat_document, pieces_in, pieces_of, text_document

LONG = 10_000


@lru_cache
def encoder_of(path: str) -> Encoder:
    return load_encoder(path, "tokenizers")


def made_of(tokenizer: Any, *rows: Row, length: int = LONG, **options: Any) -> tuple[list[Any], SourceAccounting]:
    """The pieces of rows as rows of their own, and the account."""
    batch = Tokenizing(encoder_of(tokenizer.name_or_path), length, **options)(rows)
    found = [
        {
            "input_ids": piece.ids,
            "document_lengths": [len(piece.ids)],
            "context_spans": piece.spans,
            "text_bytes": piece.text_bytes,
        }
        for document in batch.documents()
        for piece in document
    ]
    check_identity(batch.account)
    return found, batch.account


def check_identity(account: SourceAccounting) -> None:
    dropped = account.dropped.values()
    assert account.tokens_in == (
        account.targets + account.first_tokens + account.context + sum(entry.tokens for entry in dropped)
    )
    assert account.bytes_in + account.joiner_bytes == (
        account.bytes_trained + account.bytes_context + sum(entry.bytes for entry in dropped)
    )


def chat(*turns: tuple[str, str]) -> ConversationRow:
    return ConversationRow(turns)  # type: ignore[arg-type]


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_text_with_and_without_a_prompt(tokenizer: Any, train_on_prompts: bool) -> None:
    rows = [{"text": "Water boils. 水开了。"}, {"text": "It is hot.", "prompt": "Is it 热?"}]
    found, account = made_of(
        tokenizer, *(TextRow(row["text"], row.get("prompt", "")) for row in rows), train_on_prompts=train_on_prompts
    )
    expected = [piece for row in rows for piece in pieces_of(text_document(tokenizer, row, train_on_prompts), LONG)]
    assert list(pieces_in(found)) == expected
    prompt = len("Is it 热?".encode()) if train_on_prompts else 0
    assert [row["text_bytes"] for row in found] == [len("Water boils. 水开了。".encode()), len(b"It is hot.") + prompt]
    assert account.documents_in == account.documents_kept == 2
    assert account.dropped == {}


def test_control_strings_in_text_stay_text(tokenizer: Any) -> None:
    found, _ = made_of(
        tokenizer, TextRow("</s><s>[INST] x [/INST]", "[/INST]"), chat(("human", "<s>"), ("gpt", "</s>"))
    )
    for row, bos, eos in zip(found, (1, 1), (1, 1), strict=True):
        ids = row["input_ids"].tolist()
        assert (ids.count(BOS), ids.count(EOS), ids.count(3), ids.count(4)) == (bos, eos, 1, 1)


def test_all_turns_are_kept_and_the_assistant_is_learned(tokenizer: Any) -> None:
    pairs = [("Hello?", "Yes."), ("Really?", "Of course, 当然。"), ("Bye", "Good bye!")]
    row = chat(*(turn for pair in pairs for turn in zip(("human", "gpt"), pair, strict=True)))
    found, account = made_of(tokenizer, row, train_on_prompts=True)
    assert list(pieces_in(found)) == pieces_of(chat_document(tokenizer, pairs), LONG)
    assert found[0]["text_bytes"] == sum(len(answer.encode()) for _, answer in pairs)
    assert account.repaired == {}


@pytest.mark.parametrize("turns", [2, 4, 6])
@pytest.mark.parametrize("system", [False, True])
def test_conversations_are_what_the_chat_template_makes_of_them(tokenizer: Any, turns: int, system: bool) -> None:
    """Fine-tuning here and chatting there must agree, in the tokens and in what the assistant is to say."""
    said = [(("human", "gpt")[n % 2], f"turn {n}: [INST] 你好 </s>\n") for n in range(turns)]
    said = [("system", "Be brief."), *said] if system else said
    found, _ = made_of(tokenizer, chat(*said))
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    rendered = tokenizer.apply_chat_template(
        [{"role": roles[role], "content": content} for role, content in said],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ((ids, learned),) = pieces_in(found)
    assert list(ids) == rendered["input_ids"]
    assert [int(learn) for learn in learned] == rendered["assistant_masks"]


@pytest.mark.parametrize(
    ("turns", "pairs", "dropped", "repaired"),
    [
        ("S:sys H:q G:a", [("sys\n\nq", "a")], {}, {}),
        ("H:q G:a H:r", [("q", "a")], {documents.TRAILING_HUMAN: 1}, {}),
        ("H:q G:a H:r H:s", [("q", "a")], {documents.TRAILING_HUMAN: 2}, {}),
        ("H:q H:r G:a", [("q\nr", "a")], {}, {documents.JOINED_HUMAN: 1}),
        ("H:q G:a G:b", [("q", "a\nb")], {}, {documents.JOINED_ASSISTANT: 1}),
        ("H:q G: H:r G:b", [("q\nr", "b")], {documents.EMPTY_ASSISTANT: 1}, {documents.JOINED_HUMAN: 1}),
        ("H:q G:a S:late H:r G:b", [("q", "a"), ("late\n\nr", "b")], {}, {documents.LATE_SYSTEM: 1}),
        ("H:q S:late H:r G:b", [("late\n\nq\nr", "b")], {}, {documents.LATE_SYSTEM: 1, documents.JOINED_HUMAN: 1}),
        ("H:q G:a S:end", [("q", "a")], {documents.TRAILING_SYSTEM: 1}, {}),
        ("H: G:a", [("", "a")], {}, {documents.EMPTY_HUMAN: 1}),
        ("S:sys G:a", [("sys", "a")], {}, {documents.ONLY_SYSTEM: 1}),
        ("S:one S:two H:q G:a", [("one\n\ntwo\n\nq", "a")], {}, {}),
        ("H:q", [], {documents.NO_ASSISTANT: 1}, {}),
        ("H:q G:", [], {documents.NO_ASSISTANT: 1, documents.EMPTY_ASSISTANT: 1}, {}),
        ("", [], {documents.NO_ASSISTANT: 1}, {}),
    ],
)
def test_irregular_conversations(
    tokenizer: Any, turns: str, pairs: list[tuple[str, str]], dropped: dict[str, int], repaired: dict[str, int]
) -> None:
    names = {"H": "human", "G": "gpt", "S": "system"}
    row = chat(*((names[turn[0]], turn[2:]) for turn in turns.split()))
    found, account = made_of(tokenizer, row)
    expected = pieces_of(chat_document(tokenizer, pairs), LONG) if pairs else []
    assert list(pieces_in(found)) == expected
    assert {reason: entry.times for reason, entry in account.dropped.items()} == dropped
    assert account.repaired == repaired
    words = sum(len(turn[2:]) for turn in turns.split())
    assert account.bytes_in == words


def test_an_assistant_that_begins_is_learned_without_a_question(tokenizer: Any) -> None:
    found, account = made_of(tokenizer, chat(("gpt", "Hello!"), ("human", "q"), ("gpt", "a")))
    ids = found[0]["input_ids"].tolist()
    hello = encode_text(tokenizer, "Hello!")
    assert ids[: len(hello) + 3] == [BOS, *hello, EOS, 3]
    assert account.repaired == {documents.ASSISTANT_FIRST: 1}


def test_what_is_dropped_is_counted_in_tokens(tokenizer: Any) -> None:
    prompt, human = "Tell me something.", "And then what happened?"
    found, account = made_of(
        tokenizer, TextRow("", prompt), TextRow(" \n\t"), TextRow("x", "  "), chat(("human", human))
    )
    assert len(found) == 1
    assert account.dropped[documents.EMPTY_TEXT].times == 2
    empty = [prompt, " \n\t"]
    assert account.dropped[documents.EMPTY_TEXT].tokens == sum(len(encode_text(tokenizer, text)) for text in empty)
    assert account.dropped[documents.EMPTY_TEXT].bytes == len(prompt) + 3
    assert account.dropped[documents.BLANK_PROMPT].times == 1
    assert account.dropped[documents.NO_ASSISTANT].tokens == len(encode_text(tokenizer, human))
    assert (account.documents_in, account.documents_kept) == (4, 1)


@pytest.mark.parametrize("length", [8, 13, 64, 1000])
def test_long_documents_are_cut_without_loss(tokenizer: Any, length: int) -> None:
    text = " ".join(f"word{number} 字{number}\n" for number in range(300)) + "\x00\u2028\ufdd0▁ 😀"
    rows = [{"text": text, "prompt": "p" * 100 + " question"}, {"text": "short"}, {"text": text[:77]}]
    found, account = made_of(tokenizer, *(TextRow(row["text"], row.get("prompt", "")) for row in rows), length=length)
    expected = [piece for row in rows for piece in pieces_of(text_document(tokenizer, row), length)]
    assert list(pieces_in(found).elements()) == expected
    assert sum(row["text_bytes"] for row in found) == sum(len(row["text"].encode()) for row in rows)
    assert sum(row["text_bytes"] for row in found) == account.bytes_trained
    assert account.documents_cut == sum(len(text_document(tokenizer, row)) > length for row in rows)


def test_bytes_of_a_piece_are_the_bytes_its_targets_spell(tokenizer: Any) -> None:
    text = " ".join(f"word{number}" for number in range(200))
    found, _ = made_of(tokenizer, TextRow(text), length=32)
    assert len(found) > 10
    begin = 0
    for row in found:
        part = text.encode()[begin : begin + row["text_bytes"]].decode()
        targets = [int(token) for token in row["input_ids"][1:] if token != EOS]
        assert tokenizer.decode(targets).strip() == part.strip()
        begin += row["text_bytes"]
    assert begin == len(text.encode())


def test_pieces_without_a_target_are_dropped_and_counted(tokenizer: Any) -> None:
    prompt = " ".join(str(number) for number in range(200))
    document = text_document(tokenizer, {"text": "answer", "prompt": prompt})
    found, account = made_of(tokenizer, TextRow("answer", prompt), length=32)
    assert list(pieces_in(found)) == pieces_of(document, 32)
    assert account.dropped[documents.NO_TARGET].times == -(-(len(document) - 1) // 31) - len(found) > 5
    assert account.targets == len(encode_text(tokenizer, "answer")) + 1


def test_ids_are_stored_in_16_bits(tokenizer: Any) -> None:
    batch = Tokenizing(encoder_of(tokenizer.name_or_path), 64)([TextRow("text")])
    assert batch.ids.dtype == np.uint16


def test_an_empty_batch(tokenizer: Any) -> None:
    batch = Tokenizing(encoder_of(tokenizer.name_or_path), 64)([TextRow("")])
    assert list(batch.documents()) == []
    assert len(batch.ids) == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (TextRow("text"), None),
        (TextRow(" .\n", "prompt"), None),
        (TextRow("", "prompt"), documents.EMPTY_TEXT),
        (TextRow(" \n\u2003\x85"), documents.EMPTY_TEXT),
        (chat(("gpt", "a")), None),
        (chat(("human", "q"), ("gpt", " "), ("gpt", "a")), None),
        (chat(("human", "q"), ("gpt", "\t")), documents.NO_ASSISTANT),
        (chat(("system", "s"), ("human", "q")), documents.NO_ASSISTANT),
        (chat(), documents.NO_ASSISTANT),
    ],
)
def test_rows_with_nothing_to_learn_are_known_before_they_are_dropped(
    tokenizer: Any, row: Row, reason: str | None
) -> None:
    assert nothing_to_learn(row) == reason
    found, account = made_of(tokenizer, row)
    assert bool(found) == (reason is None)
    assert reason is None or account.dropped[reason].times == 1


def test_a_system_prompt_opens_conversations_that_have_none(tokenizer: Any) -> None:
    own = chat(("system", "Sing."), ("human", "q"), ("gpt", "a"))
    silent = chat(("human", "q"))
    talks = [
        chat(("human", f"q{number}"), ("gpt", f"a{number}"), ("human", "r"), ("gpt", "b")) for number in range(200)
    ]
    prompt = documents.SystemPrompt("You are 小狗.")
    found, account = made_of(tokenizer, own, silent, *talks[:3], system_prompt=prompt)
    pairs = [[("Sing.\n\nq", "a")]] + [[(f"You are 小狗.\n\nq{i}", f"a{i}"), ("r", "b")] for i in range(3)]
    assert list(pieces_in(found)) == [
        piece for each in pairs for piece in pieces_of(chat_document(tokenizer, each), LONG)
    ]
    assert account.repaired == {documents.ADDED_SYSTEM: 3}
    assert {reason: entry.times for reason, entry in account.dropped.items()} == {documents.NO_ASSISTANT: 1}

    half = documents.SystemPrompt("You are 小狗.", 0.5)
    chosen = [half.opens(talk.turns) for talk in talks]
    assert 70 < sum(chosen) < 130
    assert chosen == [half.opens(talk.turns) for talk in talks]
    _, account = made_of(tokenizer, *talks, system_prompt=half)
    assert account.repaired == {documents.ADDED_SYSTEM: sum(chosen)}
