r"""The tokenizer: built from the published SentencePiece model, or trained on a corpus of one's own.

Both kinds are plain `PreTrainedTokenizerFast` directories that `AutoTokenizer.from_pretrained` opens without this
package. Text is cut exactly as SentencePiece cuts it: a `▁` in front (the dummy prefix), spaces as `▁`, byte-pair
merges in the order of the pieces' scores, and bytes for characters that are not in the vocabulary.

**Control tokens cannot be written in text.** `<s>`, `</s>`, `[INST]` and all the other control pieces are plain text
wherever a user writes them: in `tokenizer(text)`, in `tokenizer.encode(text)`, and in the messages given to
`apply_chat_template`. Three settings do this together:

1. `split_special_tokens: true` in `tokenizer_config.json`: transformers does not look for special tokens in text.
2. The chat template writes a control token between two marks, `MARK <s> MARK`, where `MARK` is the Unicode
   noncharacter U+FDD0. The normalizer turns the two marks into spaces, which no other text can contain at that point
   (its spaces are already `▁`); the pre-tokenizer cuts there and drops them; and `ignore_merges` makes the model
   look the piece between them up in its vocabulary before it merges anything. All other text begins with `▁`, and no
   control piece does, so that this look-up never finds one.
3. A mark in a message is escaped by the template as `MARK ESCAPE`, and comes back through the normalizer as text.
   `encode_batch` here escapes in the same way, so that it is exact for every text. Only `tokenizer(text)` on a text
   that itself holds `MARK <s> MARK` or `MARK ESCAPE`, noncharacters included, sees the marks as the template's: this
   is what lets a rendered conversation be tokenized later.

The setting of point 1 is not part of `tokenizer.json`. Who reads that file alone, with the `tokenizers` library, has
to set `encode_special_tokens = True`.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from doge_lm.data.manifest import FORMAT_VERSION, MANIFEST_NAME, atomic_directory
from doge_lm.data.sources import TextRow, find_files, read_rows
from doge_lm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SENTENCEPIECE_PACKAGE = "mistral_common"
SENTENCEPIECE_FILE = "mistral_instruct_tokenizer_240216.model.v2"
SENTENCEPIECE_SHA256 = "37f00374dea48658ee8f5d0f21895b9bc55cb0103939607c8185bfd1c6ca1f89"

UNK, BOS, EOS, INST, END_INST = "<unk>", "<s>", "</s>", "[INST]", "[/INST]"
CONTROL_TOKENS = (UNK, BOS, EOS, INST, END_INST)
"""The control tokens that every Doge tokenizer has, in the order of their ids, 0 to 4. `<unk>` is the padding too."""

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"

SPACE = "▁"
MARK = "\ufdd0"
ESCAPE = "\ufdd1"

MAX_PIECE_LENGTH = 16
"""Characters of the longest piece that `train_tokenizer` makes, as in the published model."""

CHAT_TEMPLATE = r"""
{#- A control token stands between two marks (U+FDD0). The tokenizer knows it by them; without them it is plain text,
    so that nothing in a message can become a control token. A mark in a message is escaped with U+FDD1. -#}
{%- set mark = '\ufdd0' -%}
{%- set escaped_mark = '\ufdd0\ufdd1' -%}
{%- if tools is defined and tools -%}
  {{- raise_exception('This chat template has no place for tools.') -}}
{%- endif -%}
{%- set state = namespace(system='', expected='user') -%}
{{- mark ~ '<s>' ~ mark -}}
{%- for message in messages -%}
  {%- set position = 'Message ' ~ loop.index ~ ' (role ' ~ message['role'] ~ ')' -%}
  {%- if message['content'] is not string -%}
    {{- raise_exception(position ~ ' has no content of type string.') -}}
  {%- endif -%}
  {%- set content = message['content'] | replace(mark, escaped_mark) -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {%- set state.system = content -%}
  {%- elif message['role'] != state.expected -%}
    {{- raise_exception(position ~ ' is out of order: expected the role ' ~ state.expected ~ '. After an optional '
        ~ 'system message at the start, user and assistant take turns, the user first.') -}}
  {%- elif message['role'] == 'user' -%}
    {%- if state.system -%}
      {%- set content = state.system ~ '\n\n' ~ content -%}
      {%- set state.system = '' -%}
    {%- endif -%}
    {{- mark ~ '[INST]' ~ mark -}}
    {%- if content -%}{{- ' ' ~ content -}}{%- endif -%}
    {{- mark ~ '[/INST]' ~ mark -}}
    {%- set state.expected = 'assistant' -%}
  {%- else -%}
    {#- The mask of the assistant's tokens is found from the first and the last character inside the generation block.
        A token between marks is found at its closing mark, so the block begins there if there are no words. -#}
    {%- if content -%}
      {%- generation -%}{{- ' ' ~ content ~ mark ~ '</s>' ~ mark -}}{%- endgeneration -%}
    {%- else -%}
      {{- mark ~ '</s>' -}}{%- generation -%}{{- mark -}}{%- endgeneration -%}
    {%- endif -%}
    {%- set state.expected = 'user' -%}
  {%- endif -%}
{%- endfor -%}
{%- if state.system -%}
  {{- raise_exception('A system message needs a user message after it.') -}}
{%- endif -%}
""".strip()

_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_TEMPLATE_TOKENS = (BOS, EOS, INST, END_INST)

# How training cuts text into the chunks that no piece may cross. At inference nothing is cut: a merge that training
# never saw does not exist. A line feed belongs to no chunk and stays a byte token, as in the published model.
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"
_TRAINING_CHUNK = "|".join(
    (
        f"{SPACE}+(?={SPACE})",  # a run of spaces, but for its last, which goes with the word
        f"{SPACE}?[{_CJK}]+",
        rf"{SPACE}?(?:(?![{_CJK}])[\p{{L}}\p{{M}}])+",
        r"\p{N}",  # every digit alone
        r"[\t\r]+",
        rf"{SPACE}?[^\p{{L}}\p{{M}}\p{{N}}{SPACE}\n\t\r]+",
        SPACE,
    )
)


# ---------------------------------------------------------------------------------------------------------------
# Use
# ---------------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Opens a directory that `doge-lm tokenizer` made, or one that such a tokenizer was saved in.

    `tokenizer(text)` puts `<s>` in front, as Llama's and Mistral's tokenizers do, and nothing behind; with
    `add_special_tokens=False` it gives the same ids as `encode_text`. `apply_chat_template` writes its own `<s>` and
    does not double it.

    Raises:
        UserError: if the directory or a file is missing or broken, or the tokenizer is not of this form.
    """
    # Here, for it takes seconds and hundreds of MB, and the processes that prepare data do without.
    from transformers import AutoTokenizer  # noqa: PLC0415

    directory = Path(path)
    read_files(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises Exception itself, transformers whatever it stumbles over
        broken = _broken_file(directory)
        raise UserError(
            f"{broken} cannot be loaded ({type(error).__name__}: {error}); remove {directory} and make the tokenizer "
            f"anew with: doge-lm tokenizer build --save_dir {directory}"
        ) from error
    names = ("pad_token", "bos_token", "eos_token", "split_special_tokens")
    check_form(tokenizer.get_vocab(), {name: getattr(tokenizer, name) for name in names}, directory)
    # Texts longer than what a model was trained on (`model_max_length`) are cut and packed; a warning would be noise.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def known_max_length(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens of the sequences that a model was trained on (`model_max_length`); None if its tokenizer does not say."""
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER  # noqa: PLC0415

    length = int(tokenizer.model_max_length)
    return length if 0 < length < VERY_LARGE_INTEGER else None


def read_files(directory: Path) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer's `tokenizer.json`, and its configuration.

    Raises:
        UserError: if the directory or a file is missing, or is not JSON.
    """
    if not directory.is_dir():
        raise UserError(
            f"there is no tokenizer at {directory} (not a directory); make one with: doge-lm tokenizer build "
            f"--save_dir {directory}"
        )
    text, config = (_read_json(directory / name) for name in (TOKENIZER_NAME, CONFIG_NAME))
    return text, json.loads(config)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of one text; see `encode_batch`."""
    return encode_batch(tokenizer, [text])[0]


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text alone, without `<s>` or `</s>`, as SentencePiece's `encode` gives them.

    No control token is ever among them, whatever the text. Runs on all cores unless TOKENIZERS_PARALLELISM is false;
    it leaves padding and truncation of the tokenizer's backend switched off, where an earlier call may have left
    them on (transformers sets them anew in each of its own calls).

    Raises:
        ValueError: if a text holds a lone surrogate, which has no UTF-8.
    """
    return [encoding.ids for encoding in encode_with_backend(tokenizer.backend_tokenizer, texts)]


def encode_with_backend(backend: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """What `encode_batch` does, with the tokenizer of the library `tokenizers`."""
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    try:
        encodings: list[Encoding] = backend.encode_batch_fast(
            [_escape(text) for text in texts], add_special_tokens=False
        )
    except (TypeError, UnicodeEncodeError):
        refuse_surrogates(texts)
        raise
    return encodings


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int32]:
    """How many UTF-8 bytes of text each id spells: shape (vocabulary,), int32.

    `▁` is one byte, a byte token too, a control token none. The lengths of `encode_text(tokenizer, text)` sum to the
    bytes of the text and one more, for the `▁` that is put in front (an empty text has no tokens).
    """
    return backend_byte_lengths(tokenizer.backend_tokenizer)


def backend_byte_lengths(backend: Tokenizer) -> NDArray[np.int32]:
    """What `token_byte_lengths` gives, for the tokenizer of the library `tokenizers`."""
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = np.zeros(len(vocabulary), dtype=np.int32)
    for piece, index in vocabulary.items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(piece.encode())
        else:
            lengths[index] = 1 if _BYTE_TOKEN.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
    return lengths


def tokenizer_sha256(path: str | Path) -> str:
    """The sha256 of a tokenizer directory's `tokenizer.json`, which tells whether two data sets share their ids.

    Raises:
        UserError: if the file is missing.
    """
    file = Path(path) / TOKENIZER_NAME
    if not file.is_file():
        raise UserError(f"{file} is missing; make it with: doge-lm tokenizer build --save_dir {path}")
    return hashlib.sha256(file.read_bytes()).hexdigest()


class StreamDecoder:
    """The text of ids that come one by one, each part as soon as its characters are whole.

    transformers' `TextStreamer` starts its decoding anew after each line, and every start drops one space as the
    dummy prefix: indented code loses a space a line. Here a space is dropped once, at the start of the text.
    Control tokens spell nothing; invalid UTF-8 gives U+FFFD.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        continues: True if the ids continue a text, so that the space of the first one is part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = not continues

    def put(self, index: int) -> str:
        """The text that has become whole with this id; often one word, empty in the middle of a character."""
        spelled = self._bytes(index)
        if self._at_start and spelled:
            self._at_start = False
            spelled = spelled.removeprefix(b" ")
        return self._decoder.decode(spelled)

    def end(self) -> str:
        """What is left of a character that was never completed: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, index: int) -> bytes:
        if index in self._added:
            return b"" if self._added[index].special else self._added[index].content.encode()
        piece: str = self._tokenizer.convert_ids_to_tokens(index)
        return bytes([int(piece[3:5], 16)]) if _BYTE_TOKEN.fullmatch(piece) else piece.replace(SPACE, " ").encode()


def spelled_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """What each id spells in UTF-8, as `StreamDecoder` puts it together; control tokens spell nothing."""
    decoder = StreamDecoder(tokenizer)
    return [decoder._bytes(index) for index in range(len(tokenizer))]


def _escape(text: str) -> str:
    return text.replace(MARK, MARK + ESCAPE) if MARK in text else text


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raises ValueError, naming the first lone surrogate, if there is one."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {number} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
                "which has no UTF-8"
            ) from error


def _read_json(file: Path) -> str:
    if not file.is_file():
        raise UserError(
            f"{file} is missing; if {file.parent} is meant to be a tokenizer, make it anew with: doge-lm tokenizer "
            f"build --save_dir {file.parent}"
        )
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{file} is not valid JSON ({error}); remove {file.parent} and make the tokenizer anew with: doge-lm "
            f"tokenizer build --save_dir {file.parent}"
        ) from error
    return text


def _broken_file(directory: Path) -> Path:
    """Which file it is that keeps a tokenizer from loading: the configuration, if `tokenizers` opens the other."""
    file = directory / TOKENIZER_NAME
    try:
        Tokenizer.from_file(str(file))
    except Exception:  # `tokenizers` raises no narrower class
        return file
    return directory / CONFIG_NAME


def check_form(vocabulary: Mapping[str, int], config: Mapping[str, Any], directory: Path) -> None:
    """Checks that a tokenizer is of the form that this module makes.

    Args:
        vocabulary: the id of each token, control tokens included.
        config: `pad_token`, `bos_token`, `eos_token` and `split_special_tokens`.
        directory: where it lies, for the message.

    Raises:
        UserError: if it is not.
    """
    advice = "the tokenizers that `doge-lm tokenizer build` and `doge-lm tokenizer train` make are of the right form"
    for index, token in enumerate(CONTROL_TOKENS):
        if vocabulary.get(token) != index:
            found = f"has id {vocabulary[token]}" if token in vocabulary else "is not in its vocabulary"
            raise UserError(f"{directory} is not a Doge tokenizer: {token} {found}, it must be {index}; {advice}")
    for name, expected in (("pad_token", UNK), ("bos_token", BOS), ("eos_token", EOS)):
        if config.get(name) != expected:
            raise UserError(f"{directory}: {name} is {config.get(name)!r}, it must be {expected!r}; {advice}")
    if not config.get("split_special_tokens"):
        raise UserError(
            f"{directory}: split_special_tokens is not true in {CONFIG_NAME}, so control tokens could be written in "
            f"text; {advice}"
        )


# ---------------------------------------------------------------------------------------------------------------
# Building from the published SentencePiece model
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One entry of a SentencePiece model. The kinds are those of its format."""

    text: str
    score: float
    kind: int

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3


def build_tokenizer(save_dir: str | Path) -> PreTrainedTokenizerFast:
    """Makes the published tokenizer (32,768 pieces) from the model file inside the package mistral-common.

    Args:
        save_dir: directory to make; an earlier tokenizer there is replaced, anything else is refused.

    Raises:
        UserError: if the package or its file is missing, the file is not the published one, or `save_dir` is taken.
    """
    content = read_sentencepiece_file()
    pieces = parse_sentencepiece_model(content)
    backend = _assemble(
        vocab={piece.text: index for index, piece in enumerate(pieces)},
        merges=merges_by_score({piece.text: piece.score for piece in pieces if piece.kind == Piece.NORMAL}),
        control=[piece.text for piece in pieces if piece.kind in (Piece.UNKNOWN, Piece.CONTROL)],
    )
    origin = {"sentencepiece_file": SENTENCEPIECE_FILE, "sentencepiece_sha256": SENTENCEPIECE_SHA256}
    return _save(backend, Path(save_dir), origin)


def read_sentencepiece_file() -> bytes:
    """The published `.model` file, from the installed package.

    Raises:
        UserError: if the package or the file is missing, or the file's sha256 is another.
    """
    try:
        file = resources.files(SENTENCEPIECE_PACKAGE) / "data" / SENTENCEPIECE_FILE
    except ModuleNotFoundError as error:
        if error.name != SENTENCEPIECE_PACKAGE:
            raise
        raise UserError(
            "the package mistral-common, which holds the published tokenizer, is not installed; install it with: "
            "pip install 'doge-lm[data]'"
        ) from error
    install = "install the version that doge-lm was tested with: pip install 'mistral-common==1.13.1'"
    if not file.is_file():
        raise UserError(f"the installed mistral-common does not hold {file}; {install}")
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SENTENCEPIECE_SHA256:
        raise UserError(
            f"{file} is not the published tokenizer: its sha256 is {found}, expected {SENTENCEPIECE_SHA256}; {install}"
        )
    return content


def parse_sentencepiece_model(content: bytes) -> list[Piece]:
    """The pieces of a SentencePiece model, in the order of their ids.

    The file is a protocol buffer whose field 1, repeated, is a piece: text (field 1), score (2, float32) and kind
    (3, 1 where it is left out). Reading this little here spares a dependency on protobuf or sentencepiece.
    """
    pieces: list[Piece] = []
    for number, value in _protobuf_fields(content):
        if number == 1 and isinstance(value, bytes):
            fields: dict[int, bytes | int] = dict(_protobuf_fields(value))
            text, score, kind = fields[1], fields.get(2, bytes(4)), fields.get(3, Piece.NORMAL)
            if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
                raise ValueError(f"piece {len(pieces)} of the SentencePiece model is malformed")
            pieces.append(Piece(text.decode(), struct.unpack("<f", score)[0], kind))
    return pieces


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Field numbers and values of one message: an int for a varint, raw bytes for anything else."""
    position = 0
    while position < len(data):
        key, position = _protobuf_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _protobuf_varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _protobuf_varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire_type} at byte {position} of a protocol buffer")
        if position + length > len(data):
            raise ValueError(f"a protocol buffer ends in the middle of field {number}")
        yield number, data[position : position + length]
        position += length


def _protobuf_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges with which byte-pair encoding does what SentencePiece does with scored pieces.

    SentencePiece joins the two neighbours whose joint piece has the highest score, however they are cut, and the
    leftmost of equals. So every way to cut a piece in two pieces is a merge, ordered by the piece's score. The only
    pieces of equal score are the runs of spaces; the longer first is there the same as leftmost first, because a run
    then grows from its left end.
    """
    ranked = []
    for order, (piece, score) in enumerate(scores.items()):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                ranked.append((-score, -len(piece), order, cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


# ---------------------------------------------------------------------------------------------------------------
# Training on a corpus
# ---------------------------------------------------------------------------------------------------------------


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, save_dir: str | Path, *, character_coverage: float = 0.9995
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of the same form as the published one; the same texts always give the same file.

    Ids: 0 to 4 the control tokens, 5 to 260 the bytes, then the characters, then the merged pieces.

    Args:
        texts: documents. They are gone through twice: an iterator is first read into memory; a container, or an
            object such as `TextFiles`, is not.
        vocab_size: pieces in all, control and byte tokens included.
        save_dir: directory to make; an earlier tokenizer there is replaced, anything else is refused.
        character_coverage: the part of the text's characters that are pieces of their own, the most frequent ones;
            the rest is spelled in bytes.

    Raises:
        UserError: if `vocab_size` cannot hold the characters, or the text is too little to fill it.
    """
    if not 0 < character_coverage <= 1:
        raise UserError(f"--character_coverage {character_coverage} must lie above 0 and be at most 1")
    corpus: Iterable[str] = list(texts) if isinstance(texts, Iterator) else texts
    reserved = [*CONTROL_TOKENS, *_BYTE_TOKENS]
    alphabet = _alphabet(corpus, character_coverage)
    least = len(reserved) + len(alphabet)
    if vocab_size < least:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: {len(CONTROL_TOKENS)} control tokens, {len(_BYTE_TOKENS)} bytes "
            f"and the {len(alphabet)} most frequent characters ({character_coverage:.2%} of the text) need at least "
            f"{least}; raise it, or lower --character_coverage"
        )
    learned, merges = _learn_merges(corpus, alphabet, vocab_size - len(reserved))
    if len(reserved) + len(learned) < vocab_size:
        raise UserError(
            f"the text is too little for --vocab_size {vocab_size}: it gives only {len(reserved) + len(learned)} "
            "pieces; give more text or a smaller size"
        )
    backend = _assemble(
        vocab={piece: index for index, piece in enumerate([*reserved, *learned])},
        merges=_spaces_last(merges, learned),
        control=CONTROL_TOKENS,
    )
    return _save(backend, Path(save_dir), {"trained": True, "character_coverage": character_coverage})


class TextFiles:
    """The texts of files, as often as they are asked for: documents, and the turns of conversations.

    Args:
        paths: files of the kinds that `doge_lm.data.sources` reads, or folders of them.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files = [file for path in paths for file in find_files(path)]

    def __iter__(self) -> Iterator[str]:
        for row in read_rows(self.files):
            if isinstance(row, TextRow):
                yield row.text
            else:
                yield from (content for _, content in row.turns)


def _alphabet(texts: Iterable[str], coverage: float) -> list[str]:
    """The most frequent characters that make up `coverage` of the text, and `▁`. A line feed is always a byte."""
    counts: Counter[str] = Counter()
    for text in texts:
        refuse_surrogates([text])
        counts.update(text)
    counts.pop("\n", None)
    counts[SPACE] += counts.pop(" ", 0)
    wanted = coverage * counts.total()
    alphabet = {SPACE}
    covered = counts[SPACE]
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted:
            break
        if character != SPACE:
            alphabet.add(character)
            covered += count
    return sorted(alphabet)


def _learn_merges(texts: Iterable[str], alphabet: Sequence[str], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte-pair training: the learned pieces in the order of their ids, and the merges in the order they were made."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_TRAINING_CHUNK), behavior="removed", invert=True)
    # `limit_alphabet` drops every character outside the initial alphabet, which is just as long.
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=list(alphabet),
        limit_alphabet=len(alphabet),
        max_token_length=MAX_PIECE_LENGTH,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in model["merges"]]


def _spaces_last(merges: Sequence[tuple[str, str]], pieces: Iterable[str]) -> list[tuple[str, str]]:
    """Joins runs of spaces after all else, as the published model does, so that `▁word` wins over `▁▁`."""
    words = [merge for merge in merges if not set("".join(merge)) <= {SPACE}]
    return words + merges_by_score({piece: 0.0 for piece in pieces if set(piece) == {SPACE}})


# ---------------------------------------------------------------------------------------------------------------
# The form that both share
# ---------------------------------------------------------------------------------------------------------------


def _assemble(vocab: dict[str, int], merges: list[tuple[str, str]], control: Iterable[str]) -> Tokenizer:
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=UNK, fuse_unk=False, byte_fallback=True, ignore_merges=True)
    )
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, vocab[BOS])]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Special, so that decoding can leave them out; that they are not found in text is the configuration's doing.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.encode_special_tokens = True
    return backend


def _normalizer() -> normalizers.Normalizer:
    """See the module's docstring. After the second step the only spaces are those around control tokens."""
    tokens = "|".join(re.escape(token) for token in _TEMPLATE_TOKENS)
    return normalizers.Sequence(
        [
            normalizers.Prepend(SPACE),
            normalizers.Replace(" ", SPACE),
            # A rendered conversation begins with a control token, not with text, so the prefix goes again.
            normalizers.Replace(Regex(rf"\A{SPACE}(?={MARK}(?:{tokens}){MARK})"), ""),
            *(normalizers.Replace(f"{MARK}{token}{MARK}", f" {token} ") for token in _TEMPLATE_TOKENS),
            normalizers.Replace(MARK + ESCAPE, MARK),
        ]
    )


def _config(origin: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": UNK,
        "extra_special_tokens": [INST, END_INST],
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,
        "padding_side": "left",  # batches of prompts are continued at their right end
        "clean_up_tokenization_spaces": False,
        "doge_origin": dict(origin),
    }


def _save(backend: Tokenizer, save_dir: Path, origin: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Writes the directory whole or not at all, and opens it as a user would."""
    target = save_dir.resolve()  # so that `--save_dir .` has a name to write beside
    size = backend.get_vocab_size()
    manifest = {"format_version": FORMAT_VERSION, "kind": "tokenizer", "vocab_size": size, **origin}
    with atomic_directory(target) as directory:
        _write(directory / TOKENIZER_NAME, backend.to_str())
        _write(directory / CONFIG_NAME, json.dumps(_config(origin), indent=2) + "\n")
        _write(directory / TEMPLATE_NAME, CHAT_TEMPLATE)
        _write(directory / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
    return load_tokenizer(save_dir)


def _write(file: Path, content: str) -> None:
    file.write_text(content, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `doge-lm tokenizer`."""
    commands = parser.add_subparsers(dest="tokenizer_command", required=True, metavar="build|train")
    build = commands.add_parser("build", help="make the published tokenizer of 32,768 pieces")
    build.add_argument("--save_dir", type=Path, default=Path("tokenizer"), help="default: ./tokenizer")
    train = commands.add_parser("train", help="train a tokenizer on your own text")
    train.add_argument("--vocab_size", type=int, required=True, help="pieces in all, control and byte tokens included")
    train.add_argument("--save_dir", type=Path, required=True)
    train.add_argument(
        "--character_coverage",
        type=float,
        default=0.9995,
        help="part of the text's characters that become pieces; the rest is spelled in bytes (default: 0.9995)",
    )
    train.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help=".jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, or folders"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `doge-lm tokenizer build` or `doge-lm tokenizer train`."""
    if args.tokenizer_command == "build":
        tokenizer = build_tokenizer(args.save_dir)
    else:
        tokenizer = train_tokenizer(
            TextFiles(args.files), args.vocab_size, args.save_dir, character_coverage=args.character_coverage
        )
    print(f"tokenizer of {len(tokenizer):,} pieces: {args.save_dir}")
    return 0
