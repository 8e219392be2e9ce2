"""Long texts cut into pieces that give the same ids one by one as the whole text does.

`tokenizers` takes some 85 bytes of memory for each byte of a text, and byte-pair encoding sees a text as one long word.
But no token spans two characters that are nowhere next to each other within a token of the vocabulary. Between them
nothing is ever merged, so what lies on either side is encoded as if it stood alone.

A text gets a `▁` in front, the sign for a space. So a text is cut at a space, which the next piece's own `▁` stands
for; or, where `▁` does not merge with what follows either, between any two characters, and the first id of the next
piece is taken off again.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from doge_lm.data.tokenizer import ESCAPE, MARK, SPACE

PIECE_CHARACTERS = 2**16
"""Pieces are at least this long, and hardly ever much longer; texts of up to twice this are not cut."""


class Piece(NamedTuple):
    """A piece of a text; with `drop_first`, its first id is that of a `▁` which the text does not have."""

    text: str
    drop_first: bool


class Cutter:
    """Cuts texts for the tokenizers of this package.

    Args:
        tokens: the vocabulary.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        pairs: set[str] = set()
        alone = False
        for token in tokens:
            alone |= token == SPACE
            pairs.update(token[place : place + 2] for place in range(len(token) - 1))
        self._pairs = pairs
        self._space_is_token = alone

    def cut(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[Piece]:
        """The pieces of a text, in order.

        Args:
            text: what is longer than twice `size` is cut, as far as it has places for it.
            size: characters of a piece at least; more than the longest token has.
        """
        begin, drop = 0, False
        while len(text) - begin > 2 * size:
            places = range(begin + size, len(text) - size)
            place = next((place for place in places if self._is_boundary(text[place - 1], text[place])), None)
            if place is None:
                break
            yield Piece(text[begin:place], drop)
            drop = text[place] != " "
            begin = place if drop else place + 1
        yield Piece(text[begin:], drop)

    def _is_boundary(self, before: str, after: str) -> bool:
        # Marks are escaped before a text is encoded, which changes what stands beside what.
        if before in (MARK, ESCAPE) or after in (MARK, ESCAPE):
            return False
        before, own = (SPACE if character == " " else character for character in (before, after))
        if before + own in self._pairs:
            return False
        return after == " " or (self._space_is_token and SPACE + own not in self._pairs)
