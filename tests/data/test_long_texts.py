"""Texts cut into pieces: the ids are those of the whole text."""

import random
from pathlib import Path
from typing import Any

import pytest

from doge_lm.data import encoders
from doge_lm.data.encoders import Encoder, TokenizersEncoder, load_encoder
from doge_lm.data.long_texts import Cutter
from doge_lm.data.tokenizer import MARK, encode_text

ALPHABET = [
    "the ",
    "and\n",
    " ",
    "  ",
    "\n\n",
    "word",
    "e",
    "a",
    ".",
    "。",
    "我们",
    "的",
    "▁",
    "\t",
    "0",
    "12",
    "é",
    "🐕",
    MARK,
]


@pytest.fixture(scope="module")
def tokenizer_path(published_tokenizer_path: Path) -> Path:
    """The published one: here its very pieces are looked at."""
    return published_tokenizer_path


@pytest.fixture(scope="module")
def encoder(tokenizer_path: Path) -> Encoder:
    return load_encoder(tokenizer_path, "tokenizers")


@pytest.fixture(scope="module")
def cutter(tokenizer: Any) -> Cutter:
    return Cutter(tokenizer.get_vocab())


def mixed(seed: int, count: int) -> str:
    """Text of all kinds of characters, with runs of spaces and characters that are in no vocabulary."""
    generator = random.Random(seed)
    return "".join(generator.choices(ALPHABET, k=count))


@pytest.mark.parametrize("size", [40, 41, 64, 500])
@pytest.mark.parametrize("seed", range(8))
def test_the_pieces_give_the_ids_of_the_whole(
    encoder: Encoder, cutter: Cutter, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, seed: int, size: int
) -> None:
    monkeypatch.setattr(encoders, "PIECE_CHARACTERS", size)
    monkeypatch.setattr(encoders, "_ENCODED_CHARACTERS", 3 * size)
    texts = [mixed(seed, 2000), "short", "", mixed(seed + 100, 900), " lead", mixed(seed + 200, 50)]
    ids, lengths = encoder.encode(texts)
    whole = [encode_text(tokenizer, text) for text in texts]
    assert lengths.tolist() == [len(one) for one in whole]
    assert ids.tolist() == [index for one in whole for index in one]
    assert len(list(cutter.cut(texts[0], size))) > 1


def test_both_ways_to_cut_are_taken(cutter: Cutter) -> None:
    at_spaces = list(cutter.cut("some words " * 100, 50))
    at_lines = list(cutter.cut("x\n" * 500, 50))
    assert len(at_spaces) > 5
    assert not any(piece.drop_first for piece in at_spaces)
    assert all(piece.drop_first for piece in at_lines[1:])
    assert len(at_lines) > 5
    assert "".join(piece.text for piece in at_lines) == "x\n" * 500


def test_a_text_without_a_place_stays_whole(cutter: Cutter) -> None:
    """Two spaces in a row are within a token, whatever the vocabulary."""
    assert [piece.text for piece in cutter.cut(" " * 1000, 50)] == [" " * 1000]


def test_a_long_text_is_never_encoded_at_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(encoder, TokenizersEncoder)
    seen: list[int] = []
    honest = encoders.encode_with_backend

    def watched(backend: Any, texts: Any) -> Any:
        seen.append(sum(map(len, texts)))
        return honest(backend, texts)

    monkeypatch.setattr(encoders, "encode_with_backend", watched)
    encoder.encode(["some words and\n" * 200_000])
    assert max(seen) <= 2**20
    assert sum(seen) > 2_900_000
