"""Results of evaluations as tables and as files."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from doge_lm.data.manifest import write_record
from doge_lm.errors import UserError
from doge_lm.evaluation.comparison import Difference
from doge_lm.evaluation.flags import RESULT_NAME
from doge_lm.evaluation.harness import Metric, TaskResult
from doge_lm.evaluation.texts import TextScores

_FORMAT = 1  # of `results.json`


@dataclass(frozen=True)
class Results:
    """All that was measured of one model.

    Attributes:
        model: its place.
        settings: what the results depend on.
        tasks: results by task.
        texts: bits per byte by group of texts.
    """

    model: str
    settings: dict[str, Any]
    tasks: dict[str, TaskResult]
    texts: dict[str, TextScores]

    def as_dict(self) -> dict[str, Any]:
        """As `write` writes it."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "settings": self.settings,
            "tasks": {name: _task_dict(result) for name, result in self.tasks.items()},
            "texts": {name: scores.as_dict() for name, scores in self.texts.items()},
        }

    def write(self, directory: Path) -> Path:
        """Write `results.json` into a directory, whole or not at all; returns its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / RESULT_NAME
        write_record(path, _finite(self.as_dict()))
        return path

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read what `write` wrote.

        Raises:
            UserError: if it is something else.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']}")
            tasks = {name: _read_task(name, values) for name, values in data["tasks"].items()}
            texts = {name: TextScores.from_dict(values) for name, values in data["texts"].items()}
            return cls(data["model"], data["settings"], tasks, texts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} holds no results of `doge-lm eval` ({type(error).__name__}: {error}); evaluate the model anew"
            ) from error


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON lacks: a perplexity that overflows."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _task_dict(result: TaskResult) -> dict[str, Any]:
    metrics = {name: {**asdict(metric), "over_chance": over_chance(metric)} for name, metric in result.metrics.items()}
    return {
        "samples": result.count,
        "num_fewshot": result.num_fewshot,
        "metrics": metrics,
        "breakdown": {
            metric: {part: {"value": value, "samples": count} for part, (value, count) in parts.items()}
            for metric, parts in result.breakdown.items()
        },
        "identity": result.identity,
    }


def _read_task(name: str, data: dict[str, Any]) -> TaskResult:
    metrics = {metric: _read_metric(values) for metric, values in data["metrics"].items()}
    breakdown = {
        metric: {part: (values["value"], values["samples"]) for part, values in parts.items()}
        for metric, parts in data["breakdown"].items()
    }
    lists = [data["identity"], *(metric.samples for metric in metrics.values())]
    if any(len(items) not in {0, data["samples"]} for items in lists):
        raise ValueError(f"the samples of {name} are not all there")
    return TaskResult(name, data["samples"], data["num_fewshot"], metrics, breakdown, data["identity"])


def _read_metric(data: dict[str, Any]) -> Metric:
    def number(value: float | None) -> float:  # as `_finite` left it
        return math.nan if value is None else math.fsum([value])  # of what is no number a TypeError

    rest = {key: value for key, value in data.items() if key not in {"value", "samples", "over_chance"}}
    return Metric(value=number(data["value"]), samples=[number(value) for value in data["samples"]], **rest)


def over_chance(metric: Metric) -> float | None:
    """The difference to chance, if there is such a thing."""
    return None if metric.chance is None else metric.value - metric.chance


def task_table(results: dict[str, TaskResult]) -> str:
    """A line for each metric of each task."""
    rows = [
        (
            name,
            metric,
            "-" if result.num_fewshot is None else str(result.num_fewshot),
            f"{result.count:,}",
            _number(figure.value),
            _error(figure.stderr),
            _number(figure.chance),
            _number(over_chance(figure), sign=True),
        )
        for name, result in results.items()
        for metric, figure in result.metrics.items()
    ]
    return table(("task", "metric", "shots", "samples", "value", "stderr", "chance", "over chance"), rows, left=2)


def text_table(results: dict[str, TextScores]) -> str:
    """A line for each group of texts."""
    rows = [
        (
            name,
            f"{of.texts:,}",
            f"{of.scores.bytes:,}",
            f"{of.scores.tokens:,}",
            f"{of.scores.bits_per_byte:.4f}",
            _error(of.stderr),
            f"{of.scores.loss:.4f}",
            f"{of.scores.perplexity:.2f}",
        )
        for name, of in results.items()
    ]
    heads = ("texts", "number", "bytes", "tokens", "bits per byte", "stderr", "loss", "perplexity")
    return table(heads, rows, left=1)


def difference_table(differences: Iterable[Difference]) -> str:
    """A line for each metric on which two models were compared."""
    rows = [
        (
            of.task,
            of.metric,
            f"{of.difference:+.4f}",
            _error(of.stderr),
            "-" if math.isnan(of.p) else f"{of.p:.2g}",
            *("-" if count is None else f"{count:,}" for count in (of.better, of.worse)),
        )
        for of in differences
    ]
    return table(("task", "metric", "difference", "stderr", "p", "better", "worse"), rows, left=2)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table with columns of even width; the first `left` of them begin at the left."""
    widths = [max(3, *map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if i < left else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([line(heads), line(rule), *map(line, rows)])


def _error(value: float | None) -> str:
    """A standard error; one of 0, of samples that are all alike, says nothing of other samples."""
    return _number(value or None)


def _number(value: float | None, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:+.4f}" if sign else f"{value:.4f}"
