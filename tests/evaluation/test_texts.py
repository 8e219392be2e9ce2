"""Bits per byte of text files: every token once, against the whole logits in float64."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from doge_lm.data.tokenizer import encode_text, load_tokenizer
from doge_lm.errors import UserError
from doge_lm.evaluation.bits_per_byte import Scores
from doge_lm.evaluation.scorer import PlainScorer, make_scorer
from doge_lm.evaluation.texts import parse_group, ratio_stderr, score_texts, windows
from doge_lm.inference.loading import load_model
from tests.small_model import make_model

from .benchmarks import SENTENCE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("texts") / "model", positions=64)


@pytest.fixture(scope="module")
def scorer(place: Path) -> PlainScorer:
    return make_scorer(load_model(place, torch.device("cpu")), load_tokenizer(place), 256)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 10, 11, 57])
def test_windows_predict_every_id_once(count: int, length: int) -> None:
    ids = list(range(count))
    found = list(windows(ids, length))
    assert [i for _, targets in found for i in targets] == ids[1:]
    for context, targets in found:
        assert context
        assert len(context) + len(targets) <= length + 1
        assert [*context, *targets] == list(range(context[0], targets[-1] + 1))
    for context, _ in found[1:]:
        assert len(context) >= length - max(1, length // 2) + 1


def test_scores_are_those_of_whole_logits(scorer: PlainScorer, tmp_path: Path) -> None:
    texts = ["", "短", SENTENCE, "  two\nlines \u2028 and more"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "b.txt").write_text("a file of its own", encoding="utf-8")
    result = score_texts(scorer, {"all": [tmp_path], "one": [tmp_path / "b.txt"]})
    nll = tokens = 0.0
    for text in [*texts[1:], "a file of its own"]:
        ids = [1, *encode_text(scorer.tokenizer, text), 2]
        with torch.no_grad():
            logprobs = scorer.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll -= sum(logprobs[t - 1, ids[t]].item() for t in range(1, len(ids)))
        tokens += len(ids) - 1
    size = sum(len(text.encode()) for text in texts) + len("a file of its own")
    scores = result["all"].scores
    assert (scores.tokens, scores.bytes, result["all"].texts) == (tokens, size, 4)
    assert scores.bits_per_byte == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert result["one"].texts == 1
    assert result["one"].stderr is None


def test_a_long_text_in_windows(scorer: PlainScorer, tmp_path: Path) -> None:
    text = " ".join([SENTENCE] * 12)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    found = score_texts(scorer, {"long": [tmp_path / "long.txt"]}, window=16)["long"].scores
    ids = [1, *encode_text(scorer.tokenizer, text), 2]
    nll = 0.0
    for t in range(1, len(ids)):
        # the first 16 from the beginning; then windows of 16 that move on by 8
        end = 17 if t < 17 else 17 + 8 * ((t - 17) // 8 + 1)
        begin = max(0, min(end, len(ids)) - 17)
        with torch.no_grad():
            logprobs = scorer.model(torch.tensor([ids[begin:t]])).logits[0, -1].double().log_softmax(-1)
        nll -= logprobs[ids[t]].item()
    assert found.tokens == len(ids) - 1
    assert found.nll == pytest.approx(nll, rel=1e-5)


def test_limit_and_groups_of_many_files(scorer: PlainScorer, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}", encoding="utf-8")
    assert score_texts(scorer, {"x": [tmp_path]}, limit=2)["x"].texts == 2
    assert score_texts(scorer, {"x": [tmp_path / "0.txt", tmp_path / "1.txt"]})["x"].texts == 2


def test_a_file_of_any_suffix_is_one_text(scorer: PlainScorer, tmp_path: Path) -> None:
    text = "# A page\n\nIt has *two* lines: 山.\n"
    for name in ("page.md", "README", "page.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    groups = {name: [tmp_path / name] for name in ("page.md", "README", "page.txt")}
    found = score_texts(scorer, {**groups, "folder": [tmp_path]})
    assert all(scores == found["page.txt"] for scores in found.values())
    assert found["page.md"].bytes == [len(text.encode())]
    (tmp_path / "page.md").write_bytes(b"four\xff")
    with pytest.raises(UserError, match=r"page\.md.*UTF-8 at byte 5"):
        score_texts(scorer, {"x": [tmp_path / "page.md"]})
    (tmp_path / "page.md").write_bytes(b"")
    with pytest.raises(UserError, match="no text"):
        score_texts(scorer, {"x": [tmp_path / "page.md"]})
    (tmp_path / "page.md").write_bytes(bytes(8 * 2**20 + 1))
    with pytest.raises(UserError, match=r"page\.md has more than 8,388,608 bytes"):
        score_texts(scorer, {"x": [tmp_path / "page.md"]})


def test_standard_error_is_the_spread_of_samples() -> None:
    """Of 2,000 samples of 50 texts, whose bits per byte are known."""
    rng = random.Random(0)

    def draw() -> list[Scores]:
        sizes = [rng.randint(10, 300) for _ in range(50)]
        return [Scores(size * rng.gauss(0.7, 0.2), 1, size) for size in sizes]

    samples = [draw() for _ in range(2000)]
    ratios = [sum(p.nll for p in some) / sum(p.bytes for p in some) / math.log(2) for some in samples]
    mean = sum(ratios) / len(ratios)
    spread = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / (len(ratios) - 1))
    told = sum(ratio_stderr(some) or 0 for some in samples) / len(samples)
    assert told == pytest.approx(spread, rel=0.08)


def test_groups_are_named(tmp_path: Path) -> None:
    path = tmp_path / "books.en.jsonl.zst"
    path.touch()
    odd = tmp_path / "a=b.txt"
    odd.touch()
    assert parse_group(str(path)) == ("books", path)
    assert parse_group(f"en={path}") == ("en", path)
    assert parse_group(str(odd)) == ("a=b", odd)
    for argument, message in (
        (f"={path}", "is empty"),
        (f"en={tmp_path}/none", "does not exist"),
        ("none", "not exist"),
    ):
        with pytest.raises(UserError, match=message):
            parse_group(argument)


def test_bad_input_is_named(scorer: PlainScorer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl.*line 2"):
        score_texts(scorer, {"x": [path]})
    path.write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(UserError, match="no text"):
        score_texts(scorer, {"x": [path]})
