"""Texts -> token ids, as one flat array, by one of two backends that give the same ids.

`tokenizers` is the reference. `gigatoken` (extra `fast`) is about ten times as fast; whether its ids are the same is
checked on the user's own documents before it is used (`choose_backend`). Neither needs transformers, torch or
datasets, which keeps the processes that prepare data small.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from doge_lm.data.long_texts import PIECE_CHARACTERS, Cutter, Piece
from doge_lm.data.storage import id_dtype
from doge_lm.data.tokenizer import (
    CONTROL_TOKENS,
    ESCAPE,
    MARK,
    SPACE,
    TOKENIZER_NAME,
    backend_byte_lengths,
    check_form,
    encode_with_backend,
    read_files,
    refuse_surrogates,
    tokenizer_sha256,
)
from doge_lm.errors import UserError

__all__ = [
    "BACKENDS",
    "TRICKY_TEXTS",
    "Backend",
    "Encoder",
    "GigatokenEncoder",
    "SpecialTokens",
    "TokenizersEncoder",
    "WantedBackend",
    "choose_backend",
    "choose_encoder",
    "load_encoder",
    "take_texts",
    "tokenizer_sha256",
]

Backend = Literal["tokenizers", "gigatoken"]
WantedBackend = Literal["auto", "tokenizers", "gigatoken"]
BACKENDS: tuple[WantedBackend, ...] = ("auto", "tokenizers", "gigatoken")

# gigatoken keeps what it has seen in a cache that only grows: by 45 MB over 74M characters of English, Chinese and
# Python. Making it anew takes 30 ms, some 3% of the time that this many characters take.
_CACHED_CHARACTERS = 2**26
# The sample is tokenized by the slow backend as well: this is a few seconds.
_SAMPLED_CHARACTERS = 2**23
# What is encoded at a time, where texts are long or the backend is `tokenizers`. That takes some 85 bytes for each byte
# of text, and characters have up to four.
_ENCODED_CHARACTERS = 2**17

TRICKY_TEXTS: tuple[str, ...] = (
    "",
    " ",
    "  ",
    " leading",
    "trailing ",
    "   three   runs      of spaces  ",
    " " * 100,
    "\n",
    "\n\n\n a\r\n\tb\t\t",
    "a\x00b\x00\x00",
    "\x7f\x1b\u0085\u2028\u00a0\u3000\u200b",
    *CONTROL_TOKENS,
    " ".join(CONTROL_TOKENS),
    "x<s>y</s>[INST] z [/INST]<unk>",
    "<0x0A><0xFF>",
    f"{SPACE}{SPACE}a {SPACE}b",
    MARK,
    ESCAPE,
    MARK + ESCAPE,
    f"{MARK}<s>{MARK}",
    f"a {MARK}[INST]{MARK}{ESCAPE} b",
    "水开了。今天天气很好，我们去公园吧！",
    "日本語のテキスト 한국어 텍스트",
    "😀👩‍👩‍👧‍👦🇨🇳 e\u0301 \u202eabc",
    "\U00020000\U0010fffe\U000e0041 𓀀",  # spelled in bytes
    "def f(x):\n    return {'a': x ** 2}  # 100%\n",
    "1234567890.123e-45",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
"""Where tokenizers differ, if they do: what `choose_backend` compares beside the user's documents."""


class SpecialTokens(NamedTuple):
    """The ids of the control tokens."""

    pad: int
    bos: int
    eos: int
    instruction_open: int
    instruction_close: int


class Encoder(Protocol):
    """Turns texts into ids.

    Attributes:
        name: the backend.
        special: the control tokens.
        vocab_size: how many ids there are.
        byte_lengths: UTF-8 bytes of text that each id spells, as `doge_lm.data.tokenizer.token_byte_lengths` says.
    """

    name: Backend
    special: SpecialTokens
    vocab_size: int
    byte_lengths: npt.NDArray[np.int64]

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The ids of all texts one after another (uint16 or uint32), and how many belong to each text.

        No control token is ever among them, whatever the texts; an empty text has none.

        Raises:
            ValueError: if a text holds a lone surrogate, which has no UTF-8.
        """


@dataclass(frozen=True)
class _Files:
    """What is read from a tokenizer's directory."""

    path: Path
    json: str
    backend: Tokenizer
    special: SpecialTokens
    byte_lengths: npt.NDArray[np.int64]


def load_encoder(tokenizer_path: str | Path, backend: Backend) -> Encoder:
    """Opens a tokenizer's directory with a backend.

    Raises:
        UserError: if the directory is missing or broken, not of this package's form, or the backend is not installed
            or cannot open it.
    """
    files = _read(Path(tokenizer_path))
    return TokenizersEncoder(files) if backend == "tokenizers" else GigatokenEncoder(files)


def _read(path: Path) -> _Files:
    text, config = read_files(path)
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises no narrower class
        raise UserError(
            f"{path / TOKENIZER_NAME} cannot be loaded ({error}); remove {path} and make the tokenizer anew with: "
            f"doge-lm tokenizer build --save_dir {path}"
        ) from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    check_form(vocabulary, {name: _token_text(value) for name, value in config.items()}, path)
    unknown, bos, eos, opening, closing = (vocabulary[token] for token in CONTROL_TOKENS)
    special = SpecialTokens(unknown, bos, eos, opening, closing)  # `<unk>` is the padding too
    return _Files(path, text, backend, special, backend_byte_lengths(backend).astype(np.int64))


def _token_text(value: Any) -> Any:
    """A token of the configuration may be an object with its text."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


class TokenizersEncoder:
    """The reference: Hugging Face's `tokenizers`. Runs on all cores unless TOKENIZERS_PARALLELISM is false."""

    name: Backend = "tokenizers"

    def __init__(self, files: _Files) -> None:
        self.special = files.special
        self.byte_lengths = files.byte_lengths
        self.vocab_size = len(files.byte_lengths)
        self._dtype = id_dtype(self.vocab_size)
        self._backend = files.backend
        self._cutter: Cutter | None = None  # made when a long text comes

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """See `Encoder`. Memory is taken for some 130,000 characters at a time."""
        return encode_in_pieces(texts, self.cut, self._encode_strings, self._dtype)

    def cut(self, text: str) -> Iterable[Piece]:
        """The pieces of a text that give its ids one by one."""
        if len(text) <= 2 * PIECE_CHARACTERS:
            return (Piece(text, drop_first=False),)
        if self._cutter is None:
            self._cutter = Cutter(self._backend.get_vocab(with_added_tokens=False))
        return self._cutter.cut(text, PIECE_CHARACTERS)

    def _encode_strings(self, texts: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        encodings = encode_with_backend(self._backend, texts)
        ids = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(ids, self._dtype), np.array([len(encoding) for encoding in encodings], np.int64)


def encode_in_pieces(
    texts: Iterable[str],
    cut: Callable[[str], Iterable[Piece]],
    encode: Callable[[list[str]], tuple[npt.NDArray[Any], npt.NDArray[np.int64]]],
    dtype: np.dtype[Any],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Encodes texts of any length as `Encoder.encode` does, some 130,000 characters at a time.

    Args:
        texts: what is encoded.
        cut: gives the pieces of a text.
        encode: gives the ids of some strings, and how many each has.
        dtype: of the ids.
    """
    parts: list[npt.NDArray[Any]] = [np.empty(0, dtype)]
    lengths: list[int] = []
    numbers: list[int] = []
    pieces: list[Piece] = []
    characters = 0

    def flush() -> None:
        ids, counts = encode([piece.text for piece in pieces])
        dropped = np.array([piece.drop_first for piece in pieces], bool)
        if dropped.any():
            ids = np.delete(ids, (np.cumsum(counts) - counts)[dropped])
            counts = counts - dropped
        for number, count in zip(numbers, counts.tolist(), strict=True):
            lengths[number] += count
        parts.append(ids.astype(dtype))  # a copy: what `encode` gave may look into something larger

    for number, text in enumerate(texts):
        lengths.append(0)
        for piece in cut(text):
            if pieces and characters + len(piece.text) > _ENCODED_CHARACTERS:
                flush()
                numbers, pieces, characters = [], [], 0
            numbers.append(number)
            pieces.append(piece)
            characters += len(piece.text)
    flush()
    return np.concatenate(parts), np.array(lengths, np.int64)


class GigatokenEncoder:
    """`gigatoken`, on the calling thread alone. Texts that hold a mark go through `tokenizers`.

    Raises:
        UserError: if gigatoken is not installed or cannot open the tokenizer.
    """

    name: Backend = "gigatoken"

    def __init__(self, files: _Files) -> None:
        self.special = files.special
        self.byte_lengths = files.byte_lengths
        self.vocab_size = len(files.byte_lengths)
        self._exact = TokenizersEncoder(files)
        self._module = _import_gigatoken()
        self._json = _without_control_tokens(files.json)
        self._seen = 0
        try:
            self._backend = self._module.Tokenizer.from_json(self._json)
        except Exception as error:  # whatever it stumbles over, the other backend is the way on
            raise UserError(
                f"gigatoken cannot open {files.path / TOKENIZER_NAME} ({type(error).__name__}: {error})"
            ) from error

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """See `Encoder`."""
        marked = [number for number, text in enumerate(texts) if MARK in text]
        if not marked:
            return self._encode_unmarked(list(texts))
        plain = ["" if MARK in text else text for text in texts]
        plain_ids, lengths = self._encode_unmarked(plain)
        exact_ids, exact_lengths = self._exact.encode([texts[number] for number in marked])
        is_marked = np.zeros(len(texts), bool)
        is_marked[marked] = True
        lengths[marked] = exact_lengths
        from_exact = np.repeat(is_marked, lengths)
        ids = np.empty(len(from_exact), plain_ids.dtype)
        ids[from_exact] = exact_ids
        ids[~from_exact] = plain_ids
        return ids, lengths

    def _encode_unmarked(self, texts: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        if all(len(text) <= 2 * PIECE_CHARACTERS for text in texts):
            return self._encode_plain(texts)
        return encode_in_pieces(texts, self._exact.cut, self._encode_plain, id_dtype(self.vocab_size))

    def _encode_plain(self, texts: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        self._bound_cache(sum(map(len, texts)))
        try:
            layout = self._backend.encode_batch(texts, parallel=False).layout
        except (TypeError, ValueError):
            refuse_surrogates(texts)
            raise
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _bound_cache(self, characters: int) -> None:
        if self._seen > _CACHED_CHARACTERS:
            del self._backend  # before the next one is made, so that there are never two
            self._backend = self._module.Tokenizer.from_json(self._json)
            self._seen = 0
        self._seen += characters


def _import_gigatoken() -> Any:
    try:
        import awkward  # noqa: F401, PLC0415  gigatoken's results are its arrays
        import gigatoken  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UserError(
            f"the fast backend is not installed (there is no module {error.name}); install it with: "
            "pip install 'doge-lm[fast]'"
        ) from error
    return gigatoken


def _without_control_tokens(text: str) -> str:
    """`tokenizer.json` without what only control tokens need: text alone is cut the same way without it."""
    values = json.loads(text)
    values["added_tokens"] = []
    values["post_processor"] = None
    values["pre_tokenizer"] = None
    values["model"]["ignore_merges"] = False
    values["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    }
    return json.dumps(values)


# ---------------------------------------------------------------------------------------------------------------
# Which backend
# ---------------------------------------------------------------------------------------------------------------


def choose_backend(
    tokenizer_path: str | Path, wanted: WantedBackend, sample: Sequence[str]
) -> tuple[Backend, str | None]:
    """Decides on a backend as `choose_encoder` does; gives its name, and the note."""
    encoder, note = choose_encoder(tokenizer_path, wanted, sample)
    return encoder.name, note


def choose_encoder(
    tokenizer_path: str | Path, wanted: WantedBackend, sample: Sequence[str]
) -> tuple[Encoder, str | None]:
    """Opens a tokenizer: with `gigatoken` where it is installed and gives the same ids, otherwise with `tokenizers`.

    Args:
        tokenizer_path: a tokenizer's directory.
        wanted: "auto", or the backend that it must be.
        sample: some of the user's documents, compared together with `TRICKY_TEXTS`; what goes beyond eight million
            characters is left out.

    Returns:
        The encoder, and a note for the user where "auto" came to the slow one, and why.

    Raises:
        UserError: if the tokenizer is missing or broken, or gigatoken is wanted and is not installed or gives other
            ids; the message names the first text that differs.
    """
    files = _read(Path(tokenizer_path))
    exact = TokenizersEncoder(files)
    if wanted == "tokenizers":
        return exact, None
    try:
        fast = GigatokenEncoder(files)
        _refuse_differences(exact, fast, [*TRICKY_TEXTS, *take_texts(sample, _SAMPLED_CHARACTERS)])
    except UserError as error:
        if wanted == "gigatoken":
            raise UserError(f"{error}; or give --backend tokenizers") from error
        return exact, f"tokenizing with the slower backend `tokenizers`: {error}"
    return fast, None


def take_texts(texts: Iterable[str], characters: int, count: int | None = None) -> list[str]:
    """The first texts: so many characters of them (at least 1) in all, and at most `count`."""
    taken = []
    for text in itertools.islice(texts, count):
        taken.append(text[:characters])
        characters -= len(text)
        if characters <= 0:
            break
    return taken


def _refuse_differences(exact: Encoder, fast: Encoder, texts: Sequence[str]) -> None:
    ids, lengths = exact.encode(texts)
    other_ids, other_lengths = fast.encode(texts)
    if np.array_equal(lengths, other_lengths) and np.array_equal(ids, other_ids):
        return
    for text in texts:
        expected, found = exact.encode([text])[0], fast.encode([text])[0]
        if not np.array_equal(expected, found):
            raise UserError(_difference(text, expected, found))
    raise UserError("gigatoken gives other ids for texts together than one by one")


def _difference(text: str, expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> str:
    shared = min(len(expected), len(found))
    unequal = np.flatnonzero(expected[:shared] != found[:shared])
    first = int(unequal[0]) if len(unequal) else shared
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    return (
        f"gigatoken gives other ids than tokenizers for the text {shown!r}, from token {first} on: "
        f"{found[first : first + 5].tolist()} instead of {expected[first : first + 5].tolist()}"
    )
