"""Which tasks lighteval runs: its own, those of a user's file, and this project's ready tasks on local files."""

import difflib
import importlib
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import requests
from lighteval.metrics.metrics import Metrics
from lighteval.metrics.metrics_sample import ExactMatches, LoglikelihoodAcc, SampleLevelComputation
from lighteval.metrics.normalizations import LogProbCharNorm
from lighteval.metrics.utils.metric_utils import Metric, SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTask, LightevalTaskConfig
from lighteval.tasks.prompt_manager import FewShotSampler
from lighteval.tasks.registry import Registry
from lighteval.tasks.requests import Doc, SamplingMethod
from lm_eval.api.task import ConfigurableTask

from doge_lm.errors import UserError
from doge_lm.evaluation.harness import Choice, load_local, reason
from doge_lm.evaluation.programs import run_solution
from doge_lm.evaluation.suites import PREFIX

CONTEXTS = "contexts"
"""In a question's `specific`: a text before each choice, where they differ by that and not by what follows."""
BREAKDOWN = "breakdown"
"""In a question's `specific`: the field by whose values figures are given too."""

# While this module of lighteval is imported, it fetches the parameters of its tasks, if they do not lie beside it.
_TINY = "lighteval.tasks.tasks.tiny_benchmarks"
_FETCH_SECONDS = 10
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


class _Tasks(Registry):
    """lighteval's reading of names (groups, numbers of examples, settings of metrics) over given tasks."""

    def __init__(self, configs: dict[str, LightevalTaskConfig], names: Sequence[str]) -> None:
        self.tasks_list = list(names)
        self._task_registry = configs
        self.task_to_configs = self._update_task_configs()

    @staticmethod
    def groups(configs: Mapping[str, LightevalTaskConfig]) -> set[str]:
        """The names that stand for several tasks, `GROUP:PART`."""
        counts = Counter(name.partition(":")[0] for name in configs)
        return {name for name, count in counts.items() if count > 1}


class _OtherRows(FewShotSampler):
    """Examples drawn as lighteval draws them, but never the question itself.

    lighteval compares a question with the examples by all their attributes, one of which always differs, and so shows
    a question with its answer where examples come from the rows that are asked.
    """

    def sample_fewshot_examples(
        self, num_fewshot: int, variance_seed: int, sampler: Any = None, formatted_doc: Doc | None = None
    ) -> list[Doc]:
        """Of more than are needed, those with another number than the question has; a number is that of a row in its
        split, so as many may share it as there are splits.
        """
        if num_fewshot == 0:
            return []
        count = min(num_fewshot + len(self.task.evaluation_split), len(self.task.fewshot_docs()))
        self._init_fewshot_pool(count, variance_seed)
        adds_one = not self.few_shots_select.value.fewshotpool_unique
        drawn: list[Doc] = self._sample_from_pool(variance_seed, count - adds_one, sampler)
        if formatted_doc is None:
            return drawn[:num_fewshot]
        return [doc for doc in drawn if doc.id != formatted_doc.id][:num_fewshot]


class ProgramPasses(SampleLevelComputation):
    """Whether a completed function passes its tests."""

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs: Any) -> float:
        """1 or 0, of the first answer."""
        return run_solution(doc.specific, model_response.final_text)["pass_at_1"]


def load_tasks(choice: Choice, report: Callable[[str], None]) -> dict[str, LightevalTask]:
    """The chosen tasks by `NAME|EXAMPLES`, with their data.

    Raises:
        UserError: for a name that is not known, and for a file or data that cannot be had or used.
    """
    plain = [_plain(name) for name in choice.tasks]
    ready = load_local(choice.data_dir, [name for name in plain if name.startswith(PREFIX)]) if plain else {}
    configs = {name: local_config(task) for name, task in ready.items()}
    for path in choice.include_path:
        configs |= _of_file(path)
    if not all(name in configs or name in _Tasks.groups(configs) for name in plain):
        configs = _of_lighteval(plain, configs, report) | configs
    known = {*configs, *_Tasks.groups(configs)}
    for name in plain:
        if name not in known:
            raise UserError(f"--tasks {name}: {_unknown(name, known)}")
    fixed = {name for name, task in ready.items() if task.config.num_fewshot == 0}
    tasks = _with_examples(configs, choice, fixed)
    for task in tasks.values():
        _load_data(task, ready)
        if asks_and_shows(task):
            task.fewshot_sampler = _OtherRows(task)
    return tasks


def asks_and_shows(task: LightevalTask) -> bool:
    """Whether examples come from the rows that are asked."""
    return task.fewshot_split is None or task.fewshot_split in task.evaluation_split


def _plain(name: str) -> str:
    """A name without settings of its metrics and number of examples; an older `SUITE|` before it is passed over."""
    if "@" in name and name.startswith("local_"):
        raise UserError(f"--tasks {name}: the ready tasks have no settings (@…); leave them out")
    parts = name.split("|")
    return parts[1 if len(parts) == 3 else 0].partition("@")[0]


def _with_examples(
    configs: dict[str, LightevalTaskConfig], choice: Choice, fixed: set[str]
) -> dict[str, LightevalTask]:
    """The tasks, with `--num_fewshot` put into the names that lighteval reads."""
    names = []
    for name in dict.fromkeys(choice.tasks):
        if "|" in name and choice.num_fewshot is not None:
            raise UserError(f"--tasks {name} has a number of examples of its own; leave it out, or --num_fewshot")
        shots = choice.num_fewshot if choice.num_fewshot is not None and name not in fixed else None
        names.append(name if shots is None else f"{name}|{shots}")
    try:
        tasks: dict[str, LightevalTask] = _Tasks(configs, names).load_tasks()
    except (ValueError, SyntaxError, AttributeError) as error:
        raise UserError(f"--tasks: lighteval cannot read {', '.join(names)} ({reason(error)})") from error
    seen = set()
    for task in tasks.values():
        if task.name in seen:
            raise UserError(f"the task {task.name} is named twice in --tasks, by itself or in a group; name it once")
        seen.add(task.name)
    return tasks


def _unknown(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return (
        f"lighteval has no such task{hint} (a file of your own: --include_path FILE.py; the tasks in other languages "
        "need `pip install 'lighteval[multilingual]'`)"
    )


def _of_file(path: Path) -> dict[str, LightevalTaskConfig]:
    """The `TASKS_TABLE` of a user's file, which is run for it."""
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--include_path {path}: with --engine lighteval, give a Python file that holds TASKS_TABLE")
    try:
        module = Registry.create_custom_tasks_module(path)
    except Exception as error:  # whatever the file does
        raise UserError(f"--include_path {path} cannot be imported ({reason(error)}); mend the file") from error
    table = getattr(module, "TASKS_TABLE", None)
    if not table or not all(isinstance(config, LightevalTaskConfig) for config in table):
        raise UserError(f"--include_path {path} holds no TASKS_TABLE, a list of LightevalTaskConfig; name one")
    if taken := [config.name for config in table if config.name.startswith(PREFIX)]:
        raise UserError(f"--include_path {path}: the name {taken[0]} is one of a ready task; choose another")
    return {config.name: config for config in table}


def _of_lighteval(
    names: Sequence[str], others: Mapping[str, LightevalTaskConfig], report: Callable[[str], None]
) -> dict[str, LightevalTaskConfig]:
    """lighteval's own tasks; those in other languages, whose packages are extra, only where they are asked for."""
    _import_tiny(report)
    found: dict[str, LightevalTaskConfig] = Registry.load_all_task_configs()
    known = {*found, *others, *_Tasks.groups(found), *_Tasks.groups(others)}
    if any(name not in known for name in names):
        try:
            found = Registry.load_all_task_configs(load_multilingual=True)
        except ImportError:  # without their packages; what is not known is said then
            return found
    return found


def _import_tiny(report: Callable[[str], None]) -> None:
    """Import the module that fetches a file, or put one without tasks in its place."""

    def get(url: str, **options: Any) -> requests.Response:
        if any(os.environ.get(name, "0").upper() in {"1", "ON", "YES", "TRUE"} for name in _OFFLINE):
            raise requests.ConnectionError("offline")
        return fetch(url, timeout=_FETCH_SECONDS, **options)

    fetch = requests.get
    try:
        with mock.patch.object(requests, "get", get):
            importlib.import_module(_TINY)
    except OSError as error:  # no network, or no right to write beside the module
        report(f"left out: lighteval's tasks tiny:*, whose parameters cannot be fetched ({type(error).__name__})")
        stub = ModuleType(_TINY)
        stub.__dict__["TASKS_TABLE"] = []
        sys.modules[_TINY] = stub


def _load_data(task: LightevalTask, ready: Mapping[str, ConfigurableTask]) -> None:
    if task.name in ready:
        task.dataset = ready[task.name].dataset
        return
    try:
        task.dataset = LightevalTask.download_dataset_worker(task)
    except Exception as error:  # of the hub, of a file, of a filter that came with the task
        raise UserError(
            f"the data of the task {task.name} ({task.dataset_path}) cannot be had ({reason(error)}); if it comes from "
            "the hub, check the network, or evaluate on local copies with --data_dir"
        ) from error


def local_config(task: ConfigurableTask) -> LightevalTaskConfig:
    """A ready task as lighteval takes it: its texts and settings are those of the task's file."""
    config = task.config
    written = task.OUTPUT_TYPE == "generate_until"
    wishes = dict(config.generation_kwargs or {})
    field = (config.metadata or {}).get("breakdown", "")

    def prompt(row: dict[str, Any], name: str) -> Doc:
        doc = _question(task, row, name)
        doc.specific = {**row, **(doc.specific or {}), BREAKDOWN: field}
        return doc

    return LightevalTaskConfig(
        name=config.task,
        prompt_function=prompt,
        hf_repo=config.task,  # a name for messages; the rows are there already
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        metrics=_written_metrics(task) if written else _choice_metrics(config.metric_list),
        generation_size=wishes.get("max_gen_toks"),
        stop_sequence=wishes.get("until"),
        num_fewshots=config.num_fewshot or 0,
    )


def _question(task: ConfigurableTask, row: dict[str, Any], name: str) -> Doc:
    """A row as a question, or as an example before one; a choice begins with the blank that stands before it."""
    example = row["__few_shots"]
    if task.OUTPUT_TYPE == "generate_until":
        target = task.doc_to_target(row)
        shown = (task.config.fewshot_config or {}).get("doc_to_target") if example else None
        answers = [row[shown]] if shown else (target if isinstance(target, list) else [target])
        return Doc(query=task.doc_to_text(row), choices=answers, gold_index=list(range(len(answers))), task_name=name)
    choices = task.doc_to_choice(row)
    if not task.multiple_input:
        gold = task.doc_to_target(row)
        return Doc(task.doc_to_text(row), [f" {choice}" for choice in choices], gold, task_name=name)
    right, end = task.doc_to_text(row), f" {task.doc_to_target(row)}"
    if example:
        return Doc(choices[right], [end], 0, task_name=name)
    return Doc("", [end] * len(choices), right, specific={CONTEXTS: choices}, task_name=name)


def _choice_metrics(names: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """`acc` and, for its length in characters, `acc_norm`."""
    normed = SampleLevelMetric(
        metric_name="acc_norm",
        sample_level_fn=LoglikelihoodAcc(logprob_normalization=LogProbCharNorm(ignore_first_space=True)),
        category=SamplingMethod.LOGPROBS,
        corpus_level_fn=np.mean,
        higher_is_better=True,
    )
    metrics = {"acc": Metrics.loglikelihood_acc.value, "acc_norm": normed}
    return [metrics[of["metric"]] for of in names]


def _written_metrics(task: ConfigurableTask) -> list[Metric]:
    """lighteval's exact match, of what each filter of the task's file takes from an answer."""

    def metric(name: str, of_sample: SampleLevelComputation) -> Metric:
        return SampleLevelMetric(
            metric_name=name,
            sample_level_fn=of_sample,
            category=SamplingMethod.GENERATIVE,
            corpus_level_fn=np.mean,
            higher_is_better=True,
        )

    if getattr(task, "UNSAFE_CODE", False):
        return [metric("pass_at_1", ProgramPasses())]
    settings = task.config.metric_list[0]
    bare = _bare(settings)

    def taken(filters: Sequence[Callable[[], Any]]) -> Callable[[str], str]:
        def take(text: str) -> str:
            answers: Any = [[text]]
            for each in filters:
                answers = list(each().apply(answers, [{}]))
            return bare(answers[0])

        return take

    return [
        metric(
            f"{settings['metric']},{ensemble.name}",
            ExactMatches(normalize_gold=bare, normalize_pred=taken(ensemble.filters)),
        )
        for ensemble in task._filters
    ]


def _bare(settings: Mapping[str, Any]) -> Callable[[str], str]:
    """What of a text counts, by the settings of an `exact_match` in a task file."""
    passed_over = [re.compile(pattern) for pattern in settings.get("regexes_to_ignore", [])]
    no_punctuation = str.maketrans("", "", string.punctuation)

    def bare(text: str) -> str:
        for pattern in passed_over:
            text = pattern.sub("", text)
        if settings.get("ignore_case"):
            text = text.lower()
        return text.translate(no_punctuation) if settings.get("ignore_punctuation") else text

    return bare
