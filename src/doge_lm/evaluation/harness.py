"""Benchmarks through lm-evaluation-harness: which tasks, and what it found, sample by sample."""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import tqdm
import yaml
from datasets.exceptions import DatasetNotFoundError
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from doge_lm.errors import UserError
from doge_lm.evaluation.local_data import find_file
from doge_lm.evaluation.scorer import keep_quiet
from doge_lm.evaluation.suites import PREFIX, SUITES, TASKS

# Metrics by which a guess at random among the choices is right one time in their number.
_OF_CHOICES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
# And those of answers that are written, which no guess gets right.
_WRITTEN = ("exact_match", "pass_at_1")
# Of a metric's result, where it stands for no filter.
_NO_FILTER = "none"


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        value: the mean over its samples, or what the task makes of them.
        stderr: its standard error; None where there is none.
        chance: what guesses at random among the choices reach on average; None where there is no such thing.
        samples: the figure of each sample, in order; empty for a group and where a sample has none.
        higher_is_better: None where the task does not say.
    """

    value: float
    stderr: float | None
    chance: float | None
    samples: list[float] = field(default_factory=list)
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class TaskResult:
    """What came of one task, or of a group of them.

    Attributes:
        task: its name.
        count: samples.
        num_fewshot: examples shown; None for a group.
        metrics: figures by name, with a filter behind a comma.
        breakdown: for each metric by the value of a field of the samples, (mean, samples), if the task names a field.
        identity: a hash of each sample, in order, by which two results are paired.
    """

    task: str
    count: int
    num_fewshot: int | None
    metrics: dict[str, Metric]
    breakdown: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    identity: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """Which tasks, and how.

    Attributes:
        tasks: names as lm-evaluation-harness knows them; groups and tags too.
        data_dir: where local copies of benchmarks lie.
        include_path: folders with more task files.
        num_fewshot: examples shown before each question; None takes the task's own number.
        limit: samples of each task; None takes all.
        seed: draws the examples.
        run_code: run programs that the model writes, where a task asks for it.
        chat: put questions as a user's turn of the chat template.
        system: the system prompt with it.
        fitting: leave out tasks that ask for more positions than the model has, where else that is an error.
    """

    tasks: Sequence[str]
    data_dir: Path | None = None
    include_path: Sequence[Path] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 1234
    run_code: bool = False
    chat: bool = False
    system: str | None = None
    fitting: bool = False


def local_suite(data_dir: Path, run_code: bool) -> tuple[list[str], list[str]]:
    """The ready tasks whose file is in `data_dir`, and a line on each that is left out.

    Raises:
        UserError: if none is there.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir} is no folder; give the one that holds the benchmarks' files")
    manager = _manager(Choice((), data_dir))
    tasks, left_out, absent = [], [], []
    for name in SUITES["local"]:
        config = manager.task_index[name].cfg
        assert config is not None
        file = config["dataset_kwargs"]["file"]
        if find_file(data_dir, file) is None:
            absent.append(file)
            left_out.append(f"{name}: there is no {file}.jsonl in {data_dir}")
        elif config.get("unsafe_code") and not run_code:
            left_out.append(f"{name}: it runs programs that the model writes; allow it with --run_code")
        else:
            tasks.append(name)
    if not tasks:
        there = len(left_out) - len(absent)
        raise UserError(
            f"--data_dir {data_dir} holds {there} of the {len(left_out)} files of the ready tasks, and none that can "
            f"be used; the first that is missing is {absent[0]}.jsonl. Give the folder of the files that "
            f"docs/evaluation.md lists{', or allow programs with --run_code' if there else ''}"
        )
    return tasks, left_out


def load_local(data_dir: Path | None, names: Sequence[str]) -> dict[str, ConfigurableTask]:
    """The ready tasks of these names, with their rows, for another engine to run.

    Raises:
        UserError: for a name that is none of theirs, and one whose file is missing or bad.
    """
    manager = _manager(Choice(names, data_dir))
    return {name: task for name in _known(manager, names) for task in _load(manager, [name])}


def run_tasks(scorer: HFLM, choice: Choice, report: Callable[[str], None] = lambda line: None) -> dict[str, TaskResult]:
    """Evaluate a model on tasks; the same seed gives the same results. `report` is told what is left out.

    Raises:
        UserError: for a task that is not known or not found, one whose data is bad, and one that would run code.
    """
    manager = _manager(choice)
    loaded = _load(manager, _known(manager, choice.tasks))
    if choice.fitting:
        loaded = [task for task in loaded if _fits(task, scorer, report)]
    _check(loaded, scorer, choice)
    with _quiet_harness():
        found = simple_evaluate(
            scorer,
            tasks=loaded,
            task_manager=manager,
            num_fewshot=choice.num_fewshot,
            limit=choice.limit,
            log_samples=True,
            bootstrap_iters=1000,
            random_seed=choice.seed,
            numpy_random_seed=choice.seed,
            torch_random_seed=choice.seed,
            fewshot_random_seed=choice.seed,
            confirm_run_unsafe_code=choice.run_code,
            apply_chat_template=choice.chat,
            system_instruction=choice.system,
        )
    assert found is not None  # it is with one process
    return read_results(found)


class _TerminalBar(tqdm.tqdm):
    """A bar of progress that is shown on a terminal only."""

    def __init__(self, *args: Any, disable: bool = False, **rest: Any) -> None:
        super().__init__(*args, disable=disable or None, **rest)  # None: where there is no terminal


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep the harness from bars of progress in files, and from asking git and the system for what nobody reads.

    It has no setting for either. Outside a repository git complains, and the look at the system takes seconds.
    """
    replaced: list[tuple[ModuleType, str, Any]] = [
        (evaluator, "get_git_commit_hash", lambda: None),
        (evaluator, "add_env_info", lambda results: None),
        *((module, "tqdm", _TerminalBar) for module in (tqdm, lm_eval.api.model, lm_eval.api.task, huggingface)),
    ]
    kept = [getattr(module, name) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(replaced, kept, strict=True):
            setattr(module, name, value)


def read_results(found: Mapping[str, Any]) -> dict[str, TaskResult]:
    """The results of lm-evaluation-harness, tasks first and then groups, each with its difference to chance at hand."""
    results = {name: _task_result(name, found) for name in found["configs"]}
    for name, figures in found.get("groups", {}).items():
        leaves = _leaves(name, found["group_subtasks"])
        metrics = {
            metric: Metric(value, stderr, _group_chance(metric, [results[leaf] for leaf in leaves]))
            for metric, value, stderr in _figures(figures)
        }
        results[name] = TaskResult(name, sum(results[leaf].count for leaf in leaves), None, metrics)
    return results


def _task_result(name: str, found: Mapping[str, Any]) -> TaskResult:
    samples = found["samples"][name]
    metrics, breakdown = {}, {}
    config = found["configs"][name]
    field_name = (config.get("metadata") or {}).get("breakdown")
    choices = config["output_type"] == "multiple_choice"
    for metric, value, stderr in _figures(found["results"][name]):
        plain, _, filter_name = metric.partition(",")
        mine = [sample for sample in samples if sample["filter"] == (filter_name or _NO_FILTER)]
        scores = [float(sample[plain]) for sample in mine if isinstance(sample.get(plain), int | float)]
        whole = scores if len(scores) == len(mine) else []
        chance = _chance(mine) if choices and plain in _OF_CHOICES else None
        better = found.get("higher_is_better", {}).get(name, {}).get(plain)
        metrics[metric] = Metric(value, stderr, 0.0 if plain in _WRITTEN and not choices else chance, whole, better)
        if field_name is not None and whole:
            breakdown[metric] = by_field([sample["doc"] for sample in mine], whole, field_name)
    filters = {sample["filter"] for sample in samples}
    first = [sample for sample in samples if sample["filter"] == min(filters)]
    identity = [f"{sample['doc_hash']}:{sample['prompt_hash']}" for sample in first]
    return TaskResult(name, len(first), found["n-shot"].get(name), metrics, breakdown, identity)


def _figures(figures: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """(name, value, standard error) of each metric; the name has its filter behind a comma, but for "none"."""
    read = []
    for key, value in figures.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = figures.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == _NO_FILTER else key
        read.append((name, float(value), float(stderr) if isinstance(stderr, int | float) else None))
    return read


def _chance(samples: Sequence[Mapping[str, Any]]) -> float:
    """The share of right answers of guesses at random among each sample's choices."""
    shares = []
    for sample in samples:
        # By mutual information every choice is scored once more, by itself.
        count = len(sample["filtered_resps"]) // (2 if "acc_mutual_info" in sample["metrics"] else 1)
        target = sample["target"]
        shares.append((len(set(target)) if isinstance(target, list) else 1) / count)
    return sum(shares) / len(shares)


def by_field(docs: Sequence[Mapping[str, Any]], scores: Sequence[float], name: str) -> dict[str, tuple[float, int]]:
    """(mean, samples) of the samples' scores for each value of a field of theirs."""
    parts: dict[str, list[float]] = {}
    for doc, score in zip(docs, scores, strict=True):
        parts.setdefault(str(doc[name]), []).append(score)
    return {part: (sum(values) / len(values), len(values)) for part, values in sorted(parts.items())}


def _leaves(group: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    below = children.get(group, ())
    return [leaf for child in below for leaf in (_leaves(child, children) if children.get(child) else [child])]


def _group_chance(metric: str, leaves: Sequence[TaskResult]) -> float | None:
    chances = [(leaf.metrics[metric].chance, leaf.count) for leaf in leaves if metric in leaf.metrics]
    if not chances or any(chance is None for chance, _ in chances):
        return None
    return sum((chance or 0.0) * count for chance, count in chances) / sum(count for _, count in chances)


def _manager(choice: Choice) -> TaskManager:
    """An index of the tasks; the harness's own, which take many seconds to read, only if they are named."""
    metadata: Any = {} if choice.data_dir is None else {"data_dir": str(choice.data_dir)}
    for path in choice.include_path:
        if not path.is_dir():
            raise UserError(f"--include_path {path} is no folder; give one that holds task files (*.yaml)")
        _check_files(path)
    folders: list[str | Path] = [TASKS, *choice.include_path]
    keep_quiet()
    small = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if all(name in small.all_tasks or name.startswith(PREFIX) for name in choice.tasks):
        return small
    return TaskManager(include_path=folders, metadata=metadata)


def _known(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """The names, each once, checked.

    Raises:
        UserError: with the nearest names for one that is not known.
    """
    known = manager.all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--tasks {name}: there is no such task{hint} (a file of your own: --include_path FOLDER)")
    return list(dict.fromkeys(names))


def _load(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """Tasks and groups as the harness takes them, with their data.

    Raises:
        UserError: if data cannot be had.
    """
    loaded: list[Any] = []
    for name in names:
        try:
            found = manager.load([name])
        except (DatasetNotFoundError, ConnectionError) as error:
            raise UserError(
                f"the data of the task {name} cannot be had ({reason(error)}); it comes from the hub: check the "
                "network, or evaluate on local copies with --data_dir"
            ) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            # Whatever the harness stumbles over in a task file or its data.
            where = manager.task_index[name].yaml_path
            raise UserError(f"the task {name} of {where} cannot be used ({reason(error)}); mend the file") from error
        groups = found.get("groups", {})
        loaded += [groups[name]] if name in groups else list(found["tasks"].values())
    return loaded


def reason(error: Exception) -> str:
    """An error of another library on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check_files(folder: Path) -> None:
    """The harness passes over files that are no YAML; here that is an error, with its line.

    Raises:
        UserError: for the first such file.
    """
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}; mend it") from error


def _check(loaded: Sequence[Any], scorer: HFLM, choice: Choice) -> None:
    """Refuse what would fail after a long time, or do harm."""
    tasks = [task for item in loaded for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])]
    seen = set()
    for task in tasks:
        name = task.config.task
        if name in seen:
            raise UserError(f"the task {name} is named twice in --tasks, by itself or within a group; name it once")
        seen.add(name)
        if getattr(task, "UNSAFE_CODE", False) and not choice.run_code:
            raise UserError(
                f"the task {name} runs programs that the model writes, on this machine; allow it with --run_code, in a "
                "place where they can do no harm"
            )
        if too_long := _too_long(task, scorer):
            raise UserError(f"{too_long}; leave the task out")
        shots = task.config.num_fewshot if choice.num_fewshot is None else choice.num_fewshot
        own = task.config.fewshot_split in {task.config.test_split, task.config.validation_split}
        if shots and own and shots >= len(task.eval_docs):
            raise UserError(
                f"--num_fewshot {shots} asks for more examples than the task {name} has beside the question: its file "
                f"has {len(task.eval_docs)} rows; give fewer"
            )


def _fits(task: Any, scorer: HFLM, report: Callable[[str], None]) -> bool:
    if problem := _too_long(task, scorer):
        report(f"left out: {problem}")
    return not problem


def _too_long(task: Any, scorer: HFLM) -> str:
    """What a task asks for beyond the model's positions, in words."""
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "generate_until":
        return ""
    longest = normalize_gen_kwargs(dict(task.config.generation_kwargs or {}), scorer.max_gen_toks)["max_gen_toks"]
    if longest < scorer.max_length:
        return ""
    return (
        f"the task {task.config.task} lets a model write {longest} tokens, and this one has {scorer.max_length} "
        "positions in all"
    )
