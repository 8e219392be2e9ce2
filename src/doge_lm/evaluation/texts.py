"""Bits per byte of a model on text files of any kind, by group: a language, say.

A text is read as in pre-training: `<s>`, its tokens, `</s>`. One that is longer than a window is read in windows that
overlap by half, so that every token is predicted once, from at least half a window where there is as much before it.
As on a prepared set (`bits_per_byte.py`), the end token is a target without bytes, so its cost counts too.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from doge_lm.data.sources import TextRow, file_suffix, find_files, read_rows, read_text
from doge_lm.errors import UserError
from doge_lm.evaluation.bits_per_byte import Scores
from doge_lm.evaluation.scorer import PlainScorer

# Texts whose windows are scored together, so that rows of one length meet.
_TEXTS_AT_A_TIME = 512
MOST_TOKENS = 2048


@dataclass(frozen=True)
class TextScores:
    """A group's sums, and what they are worth.

    Attributes:
        scores: sums over all its texts.
        texts: how many.
        stderr: of bits per byte, over texts; None for a single one.
        nats: the negative log-likelihood of each text, in order.
        bytes: the bytes of each.
        identity: a hash of the texts and of the window's length, by which two results are paired.
    """

    scores: Scores
    texts: int
    stderr: float | None
    nats: list[float]
    bytes: list[int]
    identity: str

    def as_dict(self) -> dict[str, Any]:
        """As `Scores.as_dict`, with the other fields."""
        rest = {name: getattr(self, name) for name in ("texts", "stderr", "nats", "identity")}
        return {**self.scores.as_dict(), **rest, "bytes_of_texts": self.bytes}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TextScores":
        """What `as_dict` made.

        Raises:
            KeyError, TypeError, ValueError: if it is something else.
        """
        if not len(data["nats"]) == len(data["bytes_of_texts"]) == data["texts"]:
            raise ValueError("the figures of the texts are not all there")
        if sum(data["bytes_of_texts"]) != data["bytes"]:
            raise ValueError("the bytes of the texts do not add up")
        scores = Scores(math.fsum(data["nats"]), data["tokens"], data["bytes"])
        return cls(scores, data["texts"], data["stderr"], data["nats"], data["bytes_of_texts"], data["identity"])


def parse_group(argument: str) -> tuple[str, Path]:
    """`NAME=PATH`, or PATH, whose group is the file's name without its suffixes.

    Raises:
        UserError: if the name is empty or the path does not exist.
    """
    name, equals, place = argument.partition("=")
    path = Path(place if equals and not Path(argument).exists() else argument)
    if path == Path(argument):
        name = path.name.partition(".")[0]
    if not name:
        raise UserError(f"--texts {argument}: the name before = is empty; give NAME=PATH")
    if not path.exists():
        raise UserError(f"--texts {argument}: {path} does not exist")
    return name, path


def score_texts(
    scorer: PlainScorer,
    groups: Mapping[str, Sequence[Path]],
    window: int | None = None,
    limit: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, TextScores]:
    """Bits per byte of each group of files or folders.

    Args:
        scorer: the model.
        groups: paths by name, each as `doge-lm download_datasets --local` takes them: JSON lines with `text`, parquet,
            or text files, one document each. A file of another suffix is one text too, if it is named by itself: of
            a folder, such files are left out.
        window: tokens of a window; the model's positions by default, at most `MOST_TOKENS`.
        limit: texts of a group; None takes all.
        report: told of groups that hold no text.

    Raises:
        UserError: for bad input, with its file and line, or byte; if a group is empty.
    """
    length = min(scorer.max_length, window or MOST_TOKENS)
    results = {}
    for name, paths in groups.items():
        digest = hashlib.sha256(f"windows of {length}:".encode())
        texts = islice((text for path in paths for text in _texts(path)), limit)
        parts = list(_score_all(scorer, _hashed(texts, digest), length))
        if not parts:
            raise UserError(f"--texts {name}: there is no text in {', '.join(map(str, paths))}")
        total = Scores(
            math.fsum(part.nll for part in parts), sum(part.tokens for part in parts), sum(part.bytes for part in parts)
        )
        nats, sizes = [part.nll for part in parts], [part.bytes for part in parts]
        results[name] = TextScores(total, len(parts), ratio_stderr(parts), nats, sizes, digest.hexdigest())
        report(f"{name}: {len(parts):,} texts done")
    return results


def ratio_stderr(parts: Sequence[Scores]) -> float | None:
    """The standard error of the bits per byte of a sample of texts: that of a ratio of two means.

    (Cochran, Sampling Techniques, 3rd ed., eq. 6.9, for a population without end.)
    """
    count = len(parts)
    if count < 2:
        return None
    ratio = math.fsum(part.nll for part in parts) / sum(part.bytes for part in parts)
    mean_bytes = sum(part.bytes for part in parts) / count
    variance = math.fsum((part.nll - ratio * part.bytes) ** 2 for part in parts) / (count - 1)
    return math.sqrt(variance / count) / mean_bytes / math.log(2)


def windows(ids: Sequence[int], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, targets) that cover all of `ids` but the first once; both together at most `length` + 1 ids.

    The first window's targets are all behind the first id; the later ones' have at least half a window before them.
    """
    done = 1
    while done < len(ids):
        end = min(len(ids), length + 1 if done == 1 else done + length // 2)
        end = max(end, done + 1)
        begin = max(0, end - length - 1)
        yield list(ids[begin:done]), list(ids[done:end])
        done = end


def _texts(path: Path) -> Iterator[str]:
    """Those of a file or folder; a file of a suffix that says nothing of its form is one text."""
    if path.is_file() and file_suffix(path) is None:
        text = read_text(path)
        if text:
            yield text
        return
    for row in read_rows(find_files(path), "pretrain"):
        if isinstance(row, TextRow) and row.text:
            yield row.text


def _hashed(texts: Iterator[str], digest: "hashlib._Hash") -> Iterator[str]:
    """The texts, each with its length taken up into the hash."""
    for text in texts:
        data = text.encode("utf-8")
        digest.update(f"{len(data)}:".encode() + data)
        yield text


def _score_all(scorer: PlainScorer, texts: Iterator[str], length: int) -> Iterator[Scores]:
    """The sums of each text."""
    while batch := list(islice(texts, _TEXTS_AT_A_TIME)):
        of_texts = [list(windows(_ids(scorer.tokenizer, text), length)) for text in batch]
        found = iter(scorer.score_windows([window for some in of_texts for window in some]))
        for text, some in zip(batch, of_texts, strict=True):
            nll = -math.fsum(next(found) for _ in some)
            yield Scores(nll, sum(len(targets) for _, targets in some), len(text.encode("utf-8")))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the beginning and the end that the tokenizer has; what it lacks is left out, but for a first token."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [first, *ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
