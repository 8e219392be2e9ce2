"""What lighteval found, as the results that `doge-lm eval` prints, writes and compares.

Nothing here needs lighteval: its engine hands over what it found in these types.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any

from doge_lm.evaluation.harness import Metric, TaskResult, by_field

# What lighteval puts behind the name of a group, and of a figure for its error.
_AVERAGE = ":_average"
_STDERR = "_stderr"


class Guess(Enum):
    """What a guess at random among a sample's choices reaches by a metric."""

    RIGHT_SHARE = "the share of right ones among the choices"
    NOTHING = "nothing, for the answer is written"
    UNKNOWN = "there is no such thing"


@dataclass(frozen=True)
class Sample:
    """One question of a task.

    Attributes:
        prompts: what the model read, one text or one for each choice.
        choices: the answers it chose among, or those that count as right where it writes.
        right: the indices of the right ones.
        scores: by metric; a number, or what lighteval makes a figure of over all samples.
        fields: what else the sample says of itself.
    """

    prompts: Sequence[str]
    choices: Sequence[str]
    right: Sequence[int]
    scores: Mapping[str, Any]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """One task as lighteval measured it.

    Attributes:
        name: without the number of examples.
        num_fewshot: examples shown.
        samples: in the order in which they were asked, the same for every model.
        guesses: for each metric, how chance does by it.
        higher_is_better: for each metric.
        figures: means by metric and, behind `_stderr`, their errors.
        breakdown: the field of the samples by whose values figures are given too; empty for none.
    """

    name: str
    num_fewshot: int
    samples: Sequence[Sample]
    guesses: Mapping[str, Guess]
    higher_is_better: Mapping[str, bool | None]
    figures: Mapping[str, float]
    breakdown: str = ""


def read_results(found: Sequence[Found]) -> dict[str, TaskResult]:
    """Results by task, then by group: tasks `GROUP:PART` with one number of examples, each of which counts the same.

    A group is left out where its parts share no metric; it is named `GROUP:_average`, as lighteval does, where a task
    has its name.
    """
    results = {of.name: _task_result(of) for of in found}
    groups: dict[str, list[TaskResult]] = defaultdict(list)
    for name, result in results.items():
        groups[name.partition(":")[0]].append(result)
    for group, parts in groups.items():
        metrics = _means(parts)
        if len(parts) > 1 and metrics and len({part.num_fewshot for part in parts}) == 1:
            name = f"{group}{_AVERAGE}" if group in results else group
            results[name] = TaskResult(name, sum(part.count for part in parts), None, metrics)
    return results


def _means(parts: Sequence[TaskResult]) -> dict[str, Metric]:
    """The plain means of the metrics that all parts have."""
    means = {}
    for name in parts[0].metrics:
        figures = [part.metrics[name] for part in parts if name in part.metrics]
        if len(figures) == len(parts):
            chances = [figure.chance for figure in figures if figure.chance is not None]
            chance = _mean(chances) if len(chances) == len(parts) else None
            means[name] = Metric(_mean([figure.value for figure in figures]), None, chance)
    return means


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _task_result(found: Found) -> TaskResult:
    metrics, breakdown = {}, {}
    for name, value, stderr in _figures(found.figures):
        scores = [sample.scores.get(name) for sample in found.samples]
        whole = [float(score) for score in scores if isinstance(score, Real)]
        if len(whole) < len(scores):  # lighteval makes the figure of something else
            whole = []
        chance = _chance(found.guesses.get(name, Guess.UNKNOWN), found.samples)
        metrics[name] = Metric(value, stderr, chance, whole, found.higher_is_better.get(name))
        if found.breakdown and whole:
            breakdown[name] = by_field([sample.fields for sample in found.samples], whole, found.breakdown)
    identity = [_identity(sample) for sample in found.samples]
    return TaskResult(found.name, len(found.samples), found.num_fewshot, metrics, breakdown, identity)


def _figures(figures: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """(name, value, standard error) of each metric; the error is None where there is none, one sample say."""
    read = []
    for name, value in figures.items():
        if name.endswith(_STDERR) and name.removesuffix(_STDERR) in figures:
            continue
        stderr = figures.get(f"{name}{_STDERR}")
        has_error = stderr is not None and math.isfinite(stderr)
        read.append((name, float(value), float(stderr) if stderr is not None and has_error else None))
    return read


def _chance(guess: Guess, samples: Sequence[Sample]) -> float | None:
    if guess is Guess.UNKNOWN:
        return None
    if guess is Guess.NOTHING:
        return 0.0
    return sum(len(set(sample.right)) / len(sample.choices) for sample in samples) / len(samples)


def _identity(sample: Sample) -> str:
    """A hash of all that was asked, by which the samples of two models are paired."""
    asked = json.dumps([list(sample.prompts), list(sample.choices), list(sample.right)])
    return hashlib.sha256(asked.encode("utf-8")).hexdigest()
