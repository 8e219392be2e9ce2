"""Benchmarks through lighteval: its tasks, prompts and metrics, on this project's scorer.

lighteval takes a model as an object of its class `LightevalModel`. The one here hands every question to the scorer that
lm-evaluation-harness uses too, so a Doge is read in the same batches, and both engines see the same likelihoods.
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

# lighteval wants `git` only to record a version, and shows bars whether somebody looks or not. Both are read at import.
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
if not sys.stderr.isatty():
    os.environ.setdefault("LIGHTEVAL_DISABLE_TQDM", "1")

from lighteval.logging.info_loggers import MetricsLogger
from lighteval.metrics import apply_metric
from lighteval.metrics.metrics_sample import ExactMatches, LoglikelihoodAcc
from lighteval.metrics.normalizations import LogProbPMINorm
from lighteval.metrics.utils.metric_utils import Metric, MetricGrouping
from lighteval.models.abstract_model import LightevalModel, ModelConfig
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTask
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.utils.utils import as_list, remove_reasoning_tags
from lm_eval.api.instance import Instance

from doge_lm.errors import UserError
from doge_lm.evaluation.harness import Choice, TaskResult, reason
from doge_lm.evaluation.lighteval_results import Found, Guess, Sample, read_results
from doge_lm.evaluation.lighteval_tasks import BREAKDOWN, CONTEXTS, ProgramPasses, asks_and_shows, load_tasks
from doge_lm.evaluation.scorer import PlainScorer
from doge_lm.evaluation.texts import windows

_BOOTSTRAPS = 1000
# The part of lighteval whose metric runs what a model writes.
_CODE_OF_LIGHTEVAL = "lighteval.tasks.tasks.lcb"
# What lighteval takes out of a written answer before it looks at it.
_REASONING = [("<think>", "</think>")]


def run_tasks(
    scorer: PlainScorer, choice: Choice, report: Callable[[str], None] = lambda line: None
) -> dict[str, TaskResult]:
    """Evaluate a model on tasks; `report` is told what is left out.

    Raises:
        UserError: for a task that is not known or not found, one whose data is bad, and one that cannot be run here.
    """
    _keep_quiet()
    tasks = load_tasks(choice, report)
    for name, task in list(tasks.items()):
        if problem := _too_long(task, scorer):
            if not choice.fitting:
                raise UserError(f"{problem}; leave the task out")
            report(f"left out: {problem}")
            del tasks[name]
        else:
            _check(task, choice)
    docs = {name: _docs(task, choice) for name, task in tasks.items()}
    mutual = {name for name, task in tasks.items() if _compares_by_information(task)}
    model = ScorerModel(scorer, choice.chat, choice.system, mutual)
    outputs = _measure(model, tasks, docs)
    return read_results([_found(task, docs[name], outputs[name], model) for name, task in tasks.items()])


class ScorerModel(LightevalModel):
    """A scorer as lighteval takes a model.

    It keeps no answers from run to run, as lighteval's own classes do: they would be found again by a model's place,
    whatever weights lie there by then.

    Args:
        scorer: answers the questions.
        chat: put questions as a user's turn of the chat template.
        system: the system prompt with it.
        mutual: the tasks, by `NAME|EXAMPLES`, for which choices are scored without their question too.
    """

    def __init__(self, scorer: PlainScorer, chat: bool, system: str | None, mutual: set[str]) -> None:
        self.config = ModelConfig(model_name="doge-lm", system_prompt=system)
        self.scorer = scorer
        self._chat = chat
        self._mutual = mutual
        self._prompts = PromptManager(use_chat_template=chat, system_prompt=system)

    @property
    def tokenizer(self) -> Any:
        """The scorer's."""
        return self.scorer.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        """Whether a text begins with `<s>`: the scorer sees to it."""
        return False

    @property
    def max_length(self) -> int:
        """The model's positions."""
        return int(self.scorer.max_length)

    def contexts(self, doc: Doc) -> list[str]:
        """What stands before each choice, with the examples; one text where there are no choices to score."""
        own = (doc.specific or {}).get(CONTEXTS)
        if own:
            return [self._prompt(replace(doc, query=context)) for context in own]
        return [self._prompt(doc)] * max(1, len(doc.choices))

    def _prompt(self, doc: Doc) -> str:
        if not self._chat:
            return str(self._prompts.prepare_prompt(doc))
        return self.scorer.apply_chat_template(self._prompts.prepare_prompt_api(doc))

    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        """The log-likelihood of each choice; for tasks of mutual information each is scored once more by itself."""
        pairs: list[tuple[str, str]] = []
        ends = []
        for doc in docs:
            pairs += zip(self.contexts(doc), doc.choices, strict=True)
            if doc.task_name in self._mutual and doc.unconditioned_query is not None:
                pairs += [(doc.unconditioned_query, choice) for choice in doc.choices]
            ends.append(len(pairs))
        requests = self.scorer.encode_pairs(pairs)
        answers = self.scorer.score(requests)
        responses = []
        for start, end in zip([0, *ends], ends, strict=False):
            responses.append(
                ModelResponse(
                    logprobs=[log_likelihood for log_likelihood, _ in answers[start:end]],
                    argmax_logits_eq_gold=[is_likeliest for _, is_likeliest in answers[start:end]],
                    output_tokens=[continuation for _, _, continuation in requests[start:end]],
                )
            )
        return responses

    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        """What the model writes, up to a stop of the task or as many tokens as it allows."""
        requests = []
        for index, doc in enumerate(docs):
            wish = {
                "until": list(as_list(doc.stop_sequences or [])),
                "max_gen_toks": _length(doc.generation_size, self.scorer),
                "do_sample": False,
            }
            requests.append(Instance("generate_until", {}, (self.contexts(doc)[0], wish), index))
        texts = self.scorer.generate_until(requests, disable_tqdm=not self.scorer.shows_progress)
        return [
            ModelResponse(text=[text], text_post_processed=[remove_reasoning_tags(text, _REASONING)]) for text in texts
        ]

    def loglikelihood_rolling(self, docs: list[Doc]) -> list[ModelResponse]:
        """The log-likelihood of each whole text, behind `<s>`, in windows where it is long."""
        requests = self.scorer.encode_pairs([("", doc.query) for doc in docs])
        parts = [list(windows([*first, *rest], self.max_length)) for _, first, rest in requests]
        found = iter(self.scorer.score_windows([window for some in parts for window in some]))
        return [ModelResponse(logprobs=[math.fsum(next(found) for _ in some)]) for some in parts]


def _keep_quiet() -> None:
    """Leave out what lighteval says of every task, and keep its warnings where something may be wrong."""
    logging.getLogger("lighteval").setLevel(logging.ERROR)


def _metrics(task: LightevalTask) -> dict[str, Metric]:
    """A task's metrics by the names under which they give figures."""
    return {name: metric for metric in task.metrics for name in as_list(metric.metric_name)}


def _compares_by_information(task: LightevalTask) -> bool:
    norms = [
        getattr(metric.sample_level_fn, name, None)
        for metric in task.metrics
        for name in ("logprob_normalization", "log_prob_normalization")
    ]
    return any(isinstance(norm, LogProbPMINorm) for norm in norms)


def _length(generation_size: int | None, scorer: PlainScorer) -> int:
    """Tokens that a model may write: the task's number, or the scorer's where it has none."""
    return generation_size if generation_size is not None and generation_size > 0 else int(scorer.max_gen_toks)


def _too_long(task: LightevalTask, scorer: PlainScorer) -> str:
    """What a task asks for beyond the model's positions, in words."""
    longest = _length(task.generation_size, scorer)
    if SamplingMethod.GENERATIVE not in task.sampling_methods or longest < scorer.max_length:
        return ""
    return (
        f"the task {task.name} lets a model write {longest} tokens, and this one has {scorer.max_length} positions in "
        "all"
    )


def _check(task: LightevalTask, choice: Choice) -> None:
    """Refuse what would fail after a long time, or do harm."""
    if _runs_code(task) and not choice.run_code:
        raise UserError(
            f"the task {task.name} runs programs that the model writes, on this machine; allow it with --run_code, in "
            "a place where they can do no harm"
        )
    if max(task.num_samples) > 1:
        raise UserError(
            f"the task {task.name} wants {max(task.num_samples)} answers to a question, drawn at random; here answers "
            "are the likeliest ones: leave the task out"
        )
    if choice.chat and (_compares_by_information(task) or SamplingMethod.PERPLEXITY in task.sampling_methods):
        raise UserError(
            f"the task {task.name} scores texts without a question, which --chat has no place for; leave out one"
        )


def _runs_code(task: LightevalTask) -> bool:
    """Whether answers are run as programs: HumanEval's, and LiveCodeBench's, whose metric says nothing of it."""
    return any(
        isinstance(metric.sample_level_fn, ProgramPasses)
        or type(metric.sample_level_fn).__module__.startswith(_CODE_OF_LIGHTEVAL)
        for metric in task.metrics
    )


def _docs(task: LightevalTask, choice: Choice) -> list[Doc]:
    """The questions, in lighteval's order, which is shuffled and always the same.

    Raises:
        UserError: if the task's own functions fail on its data, or there are too few rows for the examples.
    """
    try:
        _count_examples(task)
        docs: list[Doc] = task.get_docs(choice.limit)
    except UserError:
        raise
    except Exception as error:  # in the functions that come with the task
        raise UserError(
            f"the task {task.name} cannot be used ({reason(error)}); mend it, or its data, or leave it out"
        ) from error
    if any(doc.images for doc in docs):
        raise UserError(f"the task {task.name} shows images, which this model does not read; leave the task out")
    return docs


def _count_examples(task: LightevalTask) -> None:
    """Refuse more examples than there are: lighteval would show those it has, and say the number asked for."""
    shots = task.config.num_fewshots
    if not shots:
        return
    own = asks_and_shows(task)
    most = max(0, len(task.fewshot_docs()) - own)
    if shots > most:
        beside = " beside a question" if own else ""
        raise UserError(
            f"{shots} examples are more than the task {task.name} has{beside}: {most}; give fewer with --num_fewshot"
        )


def _measure(
    model: ScorerModel, tasks: Mapping[str, LightevalTask], docs: Mapping[str, list[Doc]]
) -> dict[str, list[dict[str, Any]]]:
    """The scores of each task's samples by metric; all tasks that ask in one way are one call to the model."""
    ways = {
        SamplingMethod.LOGPROBS: model.loglikelihood,
        SamplingMethod.GENERATIVE: model.greedy_until,
        SamplingMethod.PERPLEXITY: model.loglikelihood_rolling,
    }
    outputs: dict[str, list[dict[str, Any]]] = {name: [{} for _ in of] for name, of in docs.items()}
    for way, answer in ways.items():
        asked = [name for name, task in tasks.items() if way in task.sampling_methods]
        responses = iter(answer([doc for name in asked for doc in docs[name]]) if asked else [])
        for name in asked:
            mine = [next(responses) for _ in docs[name]]
            metrics = [metric for metric in tasks[name].metrics if metric.category == way]
            with _telling(name):
                scores = apply_metric(mine, docs[name], metrics)
            for sample, more in zip(outputs[name], scores, strict=True):
                sample.update(more)
    return outputs


@contextlib.contextmanager
def _telling(name: str) -> Iterator[None]:
    """Name the task whose metric fails: for want of a package, a file or a model of its own, say."""
    try:
        yield
    except Exception as error:
        raise UserError(f"a metric of the task {name} failed ({reason(error)}); leave the task out") from error


def _figures(task: LightevalTask, scores: Sequence[dict[str, Any]]) -> Mapping[str, float]:
    """Means and errors as lighteval makes them, which for some metrics are no means of the samples.

    Task by task: over all tasks at once it stops where those of a group have not the same metrics.
    """
    logger = MetricsLogger()
    for sample in scores:
        logger.log(task.full_name, sample)
    with _telling(task.full_name):
        logger.aggregate({task.full_name: task}, bootstrap_iters=_BOOTSTRAPS)
    figures: Mapping[str, float] = logger.metric_aggregated[task.full_name]
    return figures


def _found(task: LightevalTask, docs: Sequence[Doc], scores: Sequence[dict[str, Any]], model: ScorerModel) -> Found:
    metrics = _metrics(task)
    samples = [
        Sample(model.contexts(doc), doc.choices, as_list(doc.gold_index), score, doc.specific or {})
        for doc, score in zip(docs, scores, strict=True)
    ]
    higher = {}
    for name, metric in metrics.items():
        better = metric.higher_is_better
        higher[name] = better.get(name) if isinstance(metric, MetricGrouping) and isinstance(better, dict) else better
    breakdown = str(samples[0].fields.get(BREAKDOWN, ""))
    guesses = {name: _guess(metric) for name, metric in metrics.items()}
    return Found(task.name, task.config.num_fewshots, samples, guesses, higher, _figures(task, scores), breakdown)


def _guess(metric: Metric) -> Guess:
    """How chance does by a metric."""
    if isinstance(metric.sample_level_fn, LoglikelihoodAcc):
        return Guess.RIGHT_SHARE
    if isinstance(metric.sample_level_fn, ExactMatches | ProgramPasses):
        return Guess.NOTHING
    return Guess.UNKNOWN
