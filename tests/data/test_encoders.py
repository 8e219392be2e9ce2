"""Encoders: both backends give the same ids, whatever the text, and the fast one is taken only where it does."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from doge_lm.data import encoders
from doge_lm.data.documents import Tokenizing
from doge_lm.data.encoders import (
    TRICKY_TEXTS,
    Encoder,
    choose_backend,
    choose_encoder,
    load_encoder,
    take_texts,
)
from doge_lm.data.sources import find_files, read_rows
from doge_lm.data.tokenizer import MARK, encode_batch, load_tokenizer, train_tokenizer
from doge_lm.errors import UserError
from tests.conftest import EVERY

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")


@pytest.fixture(scope="module")
def tokenizer_path(published_tokenizer_path: Path) -> Path:
    """The published one: here its very pieces are looked at."""
    return published_tokenizer_path


@pytest.fixture(scope="module")
def exact(tokenizer_path: Path) -> Encoder:
    return load_encoder(tokenizer_path, "tokenizers")


@pytest.fixture(scope="module")
def fast(tokenizer_path: Path) -> Encoder:
    pytest.importorskip("gigatoken")
    return load_encoder(tokenizer_path, "gigatoken")


def same(exact: Encoder, fast: Encoder, texts: list[str]) -> None:
    (ids, lengths), (other_ids, other_lengths) = exact.encode(texts), fast.encode(texts)
    np.testing.assert_array_equal(other_lengths, lengths)
    np.testing.assert_array_equal(other_ids, ids)


def shared_texts(pattern: str) -> Iterator[str]:
    for path in sorted(SHARED.glob(pattern)):
        with path.open("rb") as file:
            stream = zstandard.ZstdDecompressor().stream_reader(file)
            for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
                row = json.loads(line)
                yield from [row["text"]] if "text" in row else (turn["value"] for turn in row["conversations"])


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_ids_are_those_of_the_tokenizer(name: str, tokenizer: Any, request: pytest.FixtureRequest) -> None:
    encoder: Encoder = request.getfixturevalue(name)
    texts = [*TRICKY_TEXTS, *reversed(TRICKY_TEXTS), *(text * 3 for text in TRICKY_TEXTS)]
    expected = encode_batch(tokenizer, texts)
    ids, lengths = encoder.encode(texts)
    assert lengths.dtype == np.int64
    assert ids.dtype in (np.uint16, np.uint32)
    assert lengths.tolist() == [len(entry) for entry in expected]
    assert ids.tolist() == [index for entry in expected for index in entry]
    assert not set(ids.tolist()) & set(encoder.special)


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_nothing_to_encode(name: str, request: pytest.FixtureRequest) -> None:
    encoder: Encoder = request.getfixturevalue(name)
    for texts in ([], [""], ["", ""]):
        ids, lengths = encoder.encode(texts)
        assert (len(ids), lengths.tolist()) == (0, [0] * len(texts))


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_lone_surrogates_are_refused(name: str, request: pytest.FixtureRequest) -> None:
    encoder: Encoder = request.getfixturevalue(name)
    with pytest.raises(ValueError, match=r"text 1 holds the lone surrogate U\+D800"):
        encoder.encode(["fine", "ab\ud800"])


def test_what_an_encoder_knows(exact: Encoder, tokenizer: Any) -> None:
    assert tuple(exact.special) == (0, 1, 2, 3, 4)
    assert exact.vocab_size == len(tokenizer) == len(exact.byte_lengths)
    text = "Water boils. 水开了。 😀\n"
    ids, _ = exact.encode([text])
    assert exact.byte_lengths[ids].sum() == len(text.encode()) + 1


@needs_shared
def test_real_text_gives_the_same_ids(exact: Encoder, fast: Encoder) -> None:
    texts = list(shared_texts("mini/*.jsonl.zst"))
    assert len(texts) > 1000
    same(exact, fast, texts)
    # Put a mark into some: they go another way, and come back in their places.
    same(exact, fast, [text if n % 7 else text[:50] + MARK + text[50:] for n, text in enumerate(texts)])


@needs_shared
@pytest.mark.slow
def test_all_shared_documents_give_the_same_ids(exact: Encoder, fast: Encoder) -> None:
    texts = list(shared_texts("[cep]*.jsonl.zst"))
    assert len(texts) > 11_000
    texts = texts[::EVERY]
    for begin in range(0, len(texts), 256):
        same(exact, fast, texts[begin : begin + 256])


def test_a_cache_made_anew_changes_nothing(exact: Encoder, fast: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_CACHED_CHARACTERS", 100)
    backends = []
    for text in TRICKY_TEXTS:
        same(exact, fast, [text, text + " again"])
        backends.append(fast._backend)  # type: ignore[attr-defined]  # kept, so that no two have one id
    assert 2 < len({id(backend) for backend in backends}) < len(backends)


@needs_shared
def test_documents_are_the_same(exact: Encoder, fast: Encoder) -> None:
    rows = list(read_rows(find_files(SHARED / "mini")))
    first, second = Tokenizing(exact, 512)(rows), Tokenizing(fast, 512)(rows)
    assert first.account == second.account
    for name in ("ids", "lengths", "spans", "span_counts", "text_bytes", "pieces_per_document"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_a_trained_tokenizer_works_or_falls_back(tmp_path: Path, library_rows: list[dict[str, Any]]) -> None:
    texts = [row["text"] for row in library_rows]
    train_tokenizer(texts, 1000, tmp_path / "trained")
    backend, note = choose_backend(tmp_path / "trained", "auto", texts)
    assert (note is None) == (backend == "gigatoken")
    ids, _ = load_encoder(tmp_path / "trained", backend).encode(texts)
    expected = encode_batch(load_tokenizer(tmp_path / "trained"), texts)
    assert ids.tolist() == [index for entry in expected for index in entry]


def test_a_saved_tokenizer_can_be_opened(tmp_path: Path, tokenizer: Any, exact: Encoder) -> None:
    tokenizer.save_pretrained(tmp_path)
    ids, _ = load_encoder(tmp_path, "tokenizers").encode(list(TRICKY_TEXTS))
    np.testing.assert_array_equal(ids, exact.encode(list(TRICKY_TEXTS))[0])


def test_the_fast_backend_is_chosen(tokenizer_path: Path) -> None:
    pytest.importorskip("gigatoken")
    assert choose_backend(tokenizer_path, "auto", ["text"]) == ("gigatoken", None)
    assert choose_backend(tokenizer_path, "gigatoken", ["text"]) == ("gigatoken", None)
    assert choose_backend(tokenizer_path, "tokenizers", ["text"]) == ("tokenizers", None)


@pytest.mark.parametrize("wanted", ["auto", "tokenizers"])
def test_the_encoder_that_was_compared_is_given(
    tokenizer_path: Path, wanted: Any, exact: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    read = encoders._read
    monkeypatch.setattr(encoders, "_read", lambda path: opened.append(path) or read(path))  # type: ignore[func-returns-value]
    encoder, note = choose_encoder(tokenizer_path, wanted, ["text"])
    assert opened == [tokenizer_path]
    assert encoder.name == choose_backend(tokenizer_path, wanted, ["text"])[0]
    assert (note is None) == (encoder.name == "gigatoken" or wanted == "tokenizers")
    same(exact, encoder, list(TRICKY_TEXTS))


def test_texts_are_taken_up_to_a_size_or_a_number() -> None:
    texts = iter(["abc", "", "defg", "h", "i"])
    assert take_texts(texts, 5) == ["abc", "", "de"]
    assert list(texts) == ["h", "i"]  # no more was read than is needed
    assert take_texts(iter("abc"), 100, 2) == ["a", "b"]
    assert take_texts([], 100) == []


def test_without_the_fast_backend(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "awkward", None)
    backend, note = choose_backend(tokenizer_path, "auto", ["text"])
    assert backend == "tokenizers"
    assert note is not None
    assert "pip install 'doge-lm[fast]'" in note
    with pytest.raises(UserError, match="not installed"):
        choose_backend(tokenizer_path, "gigatoken", ["text"])


class Wrong(encoders.GigatokenEncoder):
    """Differs in texts with a certain word."""

    def encode(self, texts: Any) -> Any:
        ids, lengths = super().encode(texts)
        ids = np.array(ids)
        ends = np.cumsum(lengths)
        for text, end in zip(texts, ends, strict=True):
            if "wrong" in text:
                ids[end - 1] += 1
        return ids, lengths


def test_a_backend_that_differs_is_not_taken(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(encoders, "GigatokenEncoder", Wrong)
    assert choose_backend(tokenizer_path, "auto", ["all is well"]) == ("gigatoken", None)
    sample = ["all is well", "this is wrong", "wrong too"]
    backend, note = choose_backend(tokenizer_path, "auto", sample)
    assert backend == "tokenizers"
    assert note is not None
    assert "'this is wrong', from token" in note
    with pytest.raises(UserError, match=r"'this is wrong', from token .*or give --backend tokenizers"):
        choose_backend(tokenizer_path, "gigatoken", sample)


def test_a_tokenizer_that_gigatoken_cannot_open(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(encoders, "_without_control_tokens", lambda text: "{}")
    backend, note = choose_backend(tokenizer_path, "auto", [])
    assert backend == "tokenizers"
    assert note is not None
    assert "gigatoken cannot open" in note


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("tokenizer_config.json", None, "is missing"),
        ("tokenizer_config.json", "{}", "pad_token is None"),
    ],
)
def test_a_broken_tokenizer(tokenizer_path: Path, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    for file in tokenizer_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path, "tokenizers")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no tokenizer at"):
        choose_backend(tmp_path / "absent", "auto", [])


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
def test_encoding_needs_no_heavy_library(tokenizer_path: Path, backend: str) -> None:
    pytest.importorskip("gigatoken")
    code = (
        "import sys\n"
        "from doge_lm.data.documents import Tokenizing\n"
        "from doge_lm.data.encoders import load_encoder\n"
        "from doge_lm.data.sources import TextRow\n"
        f"batch = Tokenizing(load_encoder({str(tokenizer_path)!r}, {backend!r}), 64)([TextRow('text')])\n"
        "assert len(batch.ids) > 2\n"
        "heavy = {'transformers', 'torch', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
