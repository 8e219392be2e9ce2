"""The text of an answer as its tokens come, against the text as a whole."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from doge_lm.data.tokenizer import StreamDecoder, encode_text
from doge_lm.inference.spelling import AnswerText, Logprob, Spelling
from tests.small_model import published_tokenizer

TEXTS = [
    "Hello, world!  Two spaces.\n\tA tab.",
    "你好，世界。🐕🦮 café naïve ﷽ \u200d",
    "def f(x):\n    return x  # 四十二\n\n\nEND",
    "STOP STO STOP",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return published_tokenizer()


@pytest.fixture(scope="module")
def spelling(tokenizer: PreTrainedTokenizerFast) -> Spelling:
    return Spelling(tokenizer)


def released(spelling: Spelling, ids: list[int], stops: list[str], *, continues: bool = False) -> tuple[str, bool]:
    """The text up to a stop string or the end, with a look at each step at what was let out."""
    answer = AnswerText(spelling, continues=continues, stops=stops)
    text = ""
    for index in ids:
        text += answer.put(index)
        assert not any(stop in text for stop in stops)
        if answer.stopped:
            return text, True
    return text + answer.end(), answer.stopped


@pytest.mark.parametrize("continues", [False, True])
def test_it_is_the_text_of_the_stream_decoder(
    tokenizer: PreTrainedTokenizerFast, spelling: Spelling, continues: bool
) -> None:
    draw = random.Random(0)
    rows = [encode_text(tokenizer, text) for text in TEXTS]
    rows += [[draw.randrange(len(tokenizer)) for _ in range(200)] for _ in range(5)]
    rows += [[draw.randrange(3, 1100) for _ in range(100)] for _ in range(5)]  # control tokens and bytes
    for ids in rows:
        decoder = StreamDecoder(tokenizer, continues=continues)
        expected = "".join(map(decoder.put, ids)) + decoder.end()
        assert released(spelling, ids, [], continues=continues) == (expected, False)


def test_stop_strings_cut_where_they_first_begin_and_never_leak(
    tokenizer: PreTrainedTokenizerFast, spelling: Spelling
) -> None:
    """Every substring of a few texts, alone and in pairs, against a search in the whole text."""
    draw = random.Random(1)
    for text in TEXTS:
        ids = encode_text(tokenizer, text)
        for _ in range(150):
            stops = []
            for _ in range(draw.choice([1, 1, 2, 3])):
                begin = draw.randrange(len(text))
                stops.append(text[begin : begin + draw.randrange(1, 9)] + draw.choice(["", "", "x"]))
            found, stopped = released(spelling, ids, stops)
            places = [text.find(stop) for stop in stops if stop in text]
            # The token that completes a stop string may hold another that begins before: then that one counts.
            if places:
                assert stopped
                assert text.startswith(found)
                assert len(found) in places
                earliest_end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
                assert len(found) <= earliest_end
            else:
                assert (found, stopped) == (text, False)


def test_a_character_comes_whole(tokenizer: PreTrainedTokenizerFast, spelling: Spelling) -> None:
    ids = encode_text(tokenizer, "🦮")
    assert len(ids) > 4
    answer = AnswerText(spelling, continues=False)
    parts = [answer.put(index) for index in ids]
    assert [part for part in parts if part] == ["🦮"]
    cut = AnswerText(spelling, continues=False)
    assert "".join(map(cut.put, ids[:-1])) + cut.end() == "\ufffd"


def test_a_held_back_end_is_let_out_at_the_end(tokenizer: PreTrainedTokenizerFast, spelling: Spelling) -> None:
    ids = encode_text(tokenizer, "one STO")
    answer = AnswerText(spelling, continues=False, stops=["STOP"])
    assert "".join(map(answer.put, ids)) == "one "
    assert answer.end() == "STO"


def test_a_stop_string_of_a_broken_character_is_found_at_the_end(
    tokenizer: PreTrainedTokenizerFast, spelling: Spelling
) -> None:
    ids = encode_text(tokenizer, "a🦮")
    answer = AnswerText(spelling, continues=False, stops=["\ufffd"])
    assert "".join(map(answer.put, ids[:-1])) + answer.end() == "a"
    assert answer.stopped


def test_tokens_are_released_with_their_first_characters(
    tokenizer: PreTrainedTokenizerFast, spelling: Spelling
) -> None:
    text = "Well 🦮 then STOP and more"
    ids = encode_text(tokenizer, text)
    answer = AnswerText(spelling, continues=False, stops=["STOP"])
    found, out = [], ""
    for index in ids:
        out += answer.put(index, Logprob(index, -1.0))
        found += answer.released_tokens()
        if answer.stopped:
            break
    found += answer.rest_of_tokens()
    assert out == "Well 🦮 then "
    assert [token.chosen.token for token in found] == ids[: len(found)]
    assert tokenizer.decode(ids[: len(found)]).startswith("Well 🦮 then")
    whole = AnswerText(spelling, continues=False)
    for index in ids:
        whole.put(index, Logprob(index, -1.0))
    whole.end()
    tokens = whole.released_tokens() + whole.rest_of_tokens()
    assert [token.chosen.token for token in tokens] == ids
    for token in tokens:
        name = spelling.name(token.chosen.token)
        if not name.startswith("bytes:") and token.offset:
            assert text[token.offset :].startswith(name)


def test_names_of_tokens(tokenizer: PreTrainedTokenizerFast, spelling: Spelling) -> None:
    byte = tokenizer.convert_tokens_to_ids("<0xE4>")
    assert spelling.name(byte) == r"bytes:\xe4"
    assert spelling.name(tokenizer.eos_token_id) == "</s>"
    assert spelling.name(encode_text(tokenizer, "Hello")[0]) == " Hello"
    assert spelling.bytes_of(len(spelling) + 5) == b""
