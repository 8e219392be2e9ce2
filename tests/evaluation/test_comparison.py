"""Differences of two models on the same samples."""

import itertools
import math
import random

import pytest

from doge_lm.evaluation.bits_per_byte import Scores
from doge_lm.evaluation.comparison import compare, compare_texts, mcnemar, paired
from doge_lm.evaluation.harness import Metric, TaskResult
from doge_lm.evaluation.report import difference_table
from doge_lm.evaluation.texts import TextScores


def result(scores: list[float], identity: list[str] | None = None, task: str = "t") -> TaskResult:
    metric = Metric(sum(scores) / len(scores), None, None, scores)
    return TaskResult(task, len(scores), 0, {"acc": metric}, {}, identity or list(map(str, range(len(scores)))))


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (0, 12)])
def test_mcnemar_counts_coins(better: int, worse: int) -> None:
    """Against every way that the coins can fall."""
    count = better + worse
    falls = [sum(coins) for coins in itertools.product((0, 1), repeat=count)]
    as_uneven = sum(abs(2 * heads - count) >= abs(better - worse) for heads in falls)
    assert mcnemar(better, worse) == pytest.approx(as_uneven / len(falls))


def test_mcnemar_of_many_goes_over_into_the_normal_distribution() -> None:
    assert mcnemar(540, 459) == pytest.approx(mcnemar(541, 459), rel=0.1)
    assert mcnemar(100_000, 101_000) == pytest.approx(math.erfc(999 / math.sqrt(201_000) / math.sqrt(2)))


def test_right_and_wrong_by_sample() -> None:
    difference = paired("t", "acc", [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0])
    assert difference.difference == pytest.approx(2 / 6)
    assert (difference.better, difference.worse) == (3, 1)
    gains = [0, -1, 1, 1, 1, 0]
    mean = sum(gains) / 6
    assert difference.stderr == pytest.approx(math.sqrt(sum((g - mean) ** 2 for g in gains) / 5 / 6))
    assert difference.p == pytest.approx(10 / 16)


def test_other_figures_by_the_normal_distribution() -> None:
    difference = paired("t", "x", [0.5, 1.5, 2.5], [1.5, 2.0, 4.0])
    assert difference.difference == pytest.approx(1.0)
    assert difference.p == pytest.approx(math.erfc(1.0 / (0.5 / math.sqrt(3)) / math.sqrt(2)))
    assert paired("t", "x", [0.5], [0.5]).p == 1
    assert paired("t", "x", [0.5, 0.5], [0.75, 0.75]).p == 0


def texts(nats: list[float], sizes: list[int], identity: str = "same") -> TextScores:
    scores = Scores(sum(nats), len(nats), sum(sizes))
    return TextScores(scores, len(nats), None, nats, sizes, identity)


def test_texts_by_the_ratio_of_paired_differences() -> None:
    """Over many draws, p below 0.05 comes as often as it says, where there is no difference."""
    rng = random.Random(0)
    found = []
    for _ in range(1000):
        sizes = [rng.randint(10, 300) for _ in range(60)]
        base = [size * rng.gauss(0.7, 0.2) for size in sizes]  # what both share, which is most of it
        sides = [[nats + size * rng.gauss(0, 0.02) for nats, size in zip(base, sizes, strict=True)] for _ in range(2)]
        found += compare_texts({"en": texts(sides[0], sizes)}, {"en": texts(sides[1], sizes)})[0]
    assert 0.03 < sum(difference.p < 0.05 for difference in found) / 1000 < 0.08
    better = compare_texts({"en": texts([7.0, 9.0], [10, 10])}, {"en": texts([6.0, 8.0], [10, 10])})[0][0]
    assert better.difference == pytest.approx(-2 / 20 / math.log(2))
    assert (better.better, better.worse, better.p) == (2, 0, 0)


def test_only_the_same_texts_are_compared() -> None:
    one, other = texts([7.0], [10]), texts([7.0], [10], "other")
    differences, left_out = compare_texts({"a": one, "b": one, "c": one}, {"a": one, "b": other, "d": one})
    assert [difference.task for difference in differences] == ["a"]
    assert math.isnan(differences[0].p)  # of a single text
    assert [line.partition(":")[0] for line in left_out] == ["b", "c", "d"]


def test_only_the_same_samples_are_compared() -> None:
    first = {"a": result([1, 0]), "b": result([1, 0]), "c": result([1, 0])}
    second = {"a": result([0, 0]), "b": result([1, 0], ["0", "other"]), "d": result([1])}
    differences, left_out = compare(first, second)
    assert [(d.task, d.metric, d.difference) for d in differences] == [("a", "acc", -0.5)]
    assert [line.partition(":")[0] for line in left_out] == ["b", "c", "d"]


def test_a_metric_that_one_side_lacks_is_passed_over() -> None:
    one, other = result([1, 0]), result([0, 0])
    one.metrics["acc_norm"] = one.metrics["acc"]
    other.metrics["group"] = Metric(0.5, None, None)
    differences, left_out = compare({"a": one}, {"a": other})
    assert [d.metric for d in differences] == ["acc"]
    assert [line.partition(":")[0] for line in left_out] == ["a, acc_norm", "a, group"]


def one_task(**metrics: Metric) -> dict[str, TaskResult]:
    return {"t": TaskResult("t", 2, 0, metrics, {}, ["0", "1"])}


def test_what_is_no_mean_of_its_samples_is_left_out_by_name() -> None:
    """A perplexity, whose samples are log-likelihoods: the model of the lower one has the higher samples."""
    pairs = [([-2.0, -4.0], [-1.0, -2.0]), ([-1.0, -2.0], [-2.0, -4.0])]
    for nats in pairs:
        one, other = (
            one_task(
                perplexity=Metric(math.exp(-sum(of) / 2), None, None, of, False),
                nll=Metric(-sum(of) / 2, None, None, [-value for value in of], False),
                f1=Metric(0.5, None, None, [], True),
                overflown=Metric(math.nan, None, None, of, False),
                endless=Metric(math.inf, None, None, [math.inf, -math.inf], False),
            )
            for of in nats
        )
        differences, left_out = compare(one, other)
        assert [difference.metric for difference in differences] == ["nll"]
        assert differences[0].difference == pytest.approx((sum(nats[0]) - sum(nats[1])) / 2)
        named = [
            f"t, {metric}: it is not a mean over samples" for metric in ("perplexity", "f1", "overflown", "endless")
        ]
        assert left_out == named


@pytest.mark.parametrize(("direction", "expected"), [(True, (1, 0)), (False, (0, 1)), (None, (None, None))])
def test_better_is_what_the_metric_calls_so(direction: bool | None, expected: tuple[int | None, int | None]) -> None:
    one, other = (one_task(x=Metric(sum(of) / 2, None, None, of, direction)) for of in ([0.0, 2.0], [1.0, 2.0]))
    [difference] = compare(one, other)[0]
    assert difference.difference == 0.5
    assert (difference.better, difference.worse) == expected
    cells = difference_table([difference]).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[-3:-1]] == ["-" if count is None else str(count) for count in expected]


def test_what_one_text_cannot_say_is_a_dash() -> None:
    one, other = texts([7.0], [10]), texts([8.0], [10])
    row = difference_table(compare_texts({"a": one}, {"a": other})[0]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[3:-1]] == [f"{0.1 / math.log(2):+.4f}", "-", "-", "0", "1"]
