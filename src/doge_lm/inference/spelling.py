"""The text of tokens as they come: characters that are whole, up to a stop string."""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from ..data.tokenizer import spelled_bytes


@dataclass(frozen=True)
class Logprob:
    """The logarithm of the probability that the model gave a token, before temperature and penalties."""

    token: int
    logprob: float


@dataclass(frozen=True)
class WrittenToken:
    """A token of an answer.

    Args:
        chosen: what it is, and how likely it was; None where that was not asked for.
        likeliest: the likeliest tokens in its place, the best first.
        offset: characters of the answer before its first one.
    """

    chosen: Logprob
    likeliest: tuple[Logprob, ...]
    offset: int


class Spelling:
    """What each id spells, as UTF-8 bytes; control tokens spell nothing.

    Made once, so that threads may read it while another one uses the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._spelled = spelled_bytes(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._control = {index: token.content for index, token in added.items() if token.special}

    def __len__(self) -> int:
        return len(self._spelled)

    def bytes_of(self, index: int) -> bytes:
        """The bytes of an id; none for those that the tokenizer lacks."""
        return self._spelled[index] if index < len(self._spelled) else b""

    def name(self, index: int) -> str:
        r"""A token as the API shows it: its text, `bytes:\xe4` for a part of a character, a control token's name."""
        if index in self._control:
            return self._control[index]
        spelled = self.bytes_of(index)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class AnswerText:
    """An answer's text, released as far as it is certain.

    A character is held back until it is whole, and what could become a stop string until it does not. Tokens that were
    kept for their log-probabilities are released with their first character.

    Args:
        spelling: of the tokenizer.
        continues: whether the answer continues a text, so that the space of its first token is part of it.
        stops: strings that end it, which are no part of it.
    """

    def __init__(self, spelling: Spelling, *, continues: bool, stops: Sequence[str] = ()) -> None:
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = not continues
        self._stops = tuple(stops)
        self._held = ""
        self._length = 0
        self._kept: deque[WrittenToken] = deque()
        self.stopped = False
        """Whether a stop string has come; nothing is to be added then."""

    def put(self, index: int, chosen: Logprob | None = None, likeliest: tuple[Logprob, ...] = ()) -> str:
        """The text that is certain with one more token."""
        spelled = self._spelling.bytes_of(index)
        if chosen is not None:
            self._kept.append(WrittenToken(chosen, likeliest, self._length + len(self._held)))
        if self._at_start and spelled:
            self._at_start = False
            spelled = spelled.removeprefix(b" ")
        return self._add(self._decoder.decode(spelled))

    def end(self) -> str:
        """The rest, where no stop string came: what was held back, and U+FFFD for a part of a character."""
        text = self._add(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text += self._release(len(self._held))
        return text

    def released_tokens(self) -> list[WrittenToken]:
        """The tokens whose first characters have been released since the last call; at the end, the others too."""
        tokens = []
        while self._kept and self._kept[0].offset < self._length:
            tokens.append(self._kept.popleft())
        return tokens

    def rest_of_tokens(self) -> list[WrittenToken]:
        """The tokens that have no character, where the text has ended without a stop string."""
        tokens = [] if self.stopped else list(self._kept)
        self._kept.clear()
        return tokens

    def _add(self, text: str) -> str:
        self._held += text
        found = min((self._held.find(stop) for stop in self._stops if stop in self._held), default=-1)
        if found >= 0:
            self.stopped = True
            text = self._release(found)
            self._held = ""
            return text
        return self._release(len(self._held) - self._uncertain())

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._length += length
        return text

    def _uncertain(self) -> int:
        """How many of the last characters could be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
