"""Two models on the same samples: is one better, or is it chance?

Of two results on the same samples the difference counts sample by sample, whose error is far below that of two means:
what both get right or wrong says nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from doge_lm.evaluation.bits_per_byte import Scores
from doge_lm.evaluation.harness import Metric, TaskResult
from doge_lm.evaluation.texts import TextScores, ratio_stderr

# From so many samples on which two models differ, the normal distribution is as good, and quicker.
_MOST_COINS = 1000


@dataclass(frozen=True)
class Difference:
    """Of a second model to a first, on one metric of one task.

    Attributes:
        task: the task's name.
        metric: the metric's.
        difference: the mean over samples of second minus first, whichever way is the better.
        stderr: its standard error, of paired samples.
        p: how often chance alone makes as large a difference: McNemar's exact test where samples are right or wrong,
            else by the normal distribution. 1 where no sample differs.
        better: samples on which the second is better than the first; None where the task does not say which way that
            is.
        worse: and on which it is worse.
    """

    task: str
    metric: str
    difference: float
    stderr: float
    p: float
    better: int | None
    worse: int | None


def compare(first: dict[str, TaskResult], second: dict[str, TaskResult]) -> tuple[list[Difference], list[str]]:
    """The differences on what both were measured by, and a line on each task and metric that cannot be compared."""
    differences, left_out = [], []
    for name, one in first.items():
        other = second.get(name)
        if other is None:
            left_out.append(f"{name}: the second model was not measured by it")
        elif not one.identity and not other.identity:
            continue  # a group, whose samples are those of its tasks
        elif one.identity != other.identity:
            left_out.append(f"{name}: the samples or their prompts are not the same")
        else:
            for metric in {**one.metrics, **other.metrics}:
                mine, its = one.metrics.get(metric), other.metrics.get(metric)
                if mine is None or its is None:
                    left_out.append(f"{name}, {metric}: one of the models was not measured by it")
                elif not (_is_mean(mine) and _is_mean(its)):
                    left_out.append(f"{name}, {metric}: it is not a mean over samples")
                else:
                    differences.append(paired(name, metric, mine.samples, its.samples, mine.higher_is_better))
    left_out += [f"{name}: the first model was not measured by it" for name in second if name not in first]
    return differences, left_out


def _is_mean(metric: Metric) -> bool:
    """Whether the figures of the samples are those whose mean is the metric's value.

    Of a perplexity, say, they are log-likelihoods: their difference is another figure, in which more is better.
    """
    if not metric.samples or not all(map(math.isfinite, metric.samples)):
        return False
    return math.isclose(math.fsum(metric.samples) / len(metric.samples), metric.value, rel_tol=1e-6, abs_tol=1e-9)


def compare_texts(
    first: Mapping[str, TextScores], second: Mapping[str, TextScores]
) -> tuple[list[Difference], list[str]]:
    """The same for bits per byte: less is better. `better` and `worse` count texts."""
    differences, left_out = [], []
    for name, one in first.items():
        other = second.get(name)
        if other is None:
            left_out.append(f"{name}: the second model did not read these texts")
        elif one.identity != other.identity:
            left_out.append(f"{name}: the texts, or the windows they were read in, are not the same")
        else:
            gains = [mine - its for its, mine in zip(one.nats, other.nats, strict=True)]
            parts = [Scores(gain, 1, size) for gain, size in zip(gains, one.bytes, strict=True)]
            mean = math.fsum(gains) / one.scores.bytes / math.log(2)
            stderr = ratio_stderr(parts)
            p = math.nan if stderr is None else _two_sided(mean, stderr)
            better, worse = sum(gain < 0 for gain in gains), sum(gain > 0 for gain in gains)
            differences.append(
                Difference(name, "bits per byte", mean, math.nan if stderr is None else stderr, p, better, worse)
            )
    left_out += [f"{name}: the first model did not read these texts" for name in second if name not in first]
    return differences, left_out


def paired(
    task: str, metric: str, first: list[float], second: list[float], higher_is_better: bool | None = True
) -> Difference:
    """Second minus first over the same samples."""
    gains = [mine - its for its, mine in zip(first, second, strict=True)]
    count = len(gains)
    mean = math.fsum(gains) / count
    variance = math.fsum((gain - mean) ** 2 for gain in gains) / max(1, count - 1)
    stderr = math.sqrt(variance / count)
    more, less = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    p = mcnemar(more, less) if {*first, *second} <= {0.0, 1.0} else _two_sided(mean, stderr)
    if higher_is_better is None:
        return Difference(task, metric, mean, stderr, p, None, None)
    return Difference(task, metric, mean, stderr, p, *((more, less) if higher_is_better else (less, more)))


def _two_sided(mean: float, stderr: float) -> float:
    """How often a normal distribution about 0 lies as far off as this mean."""
    return math.erfc(abs(mean) / (stderr * math.sqrt(2))) if stderr else float(mean == 0)


def mcnemar(better: int, worse: int) -> float:
    """The two-sided p of McNemar's exact test: how often a fair coin falls as unevenly, or more.

    (McNemar 1947, in the exact binomial form.)
    """
    count = better + worse
    if count >= _MOST_COINS:
        return _normal_tail(better, worse)
    tail = sum(math.comb(count, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def _normal_tail(better: int, worse: int) -> float:
    """The same by the normal distribution, corrected for continuity: for many samples, where it is as good."""
    z = max(0, abs(better - worse) - 1) / math.sqrt(better + worse)
    return math.erfc(z / math.sqrt(2))
