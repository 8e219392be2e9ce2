"""`doge-lm eval MODEL …`: benchmarks and bits per byte of a trained model, and a comparison of several."""

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
import torch
from transformers.utils import logging

from doge_lm.errors import UserError
from doge_lm.evaluation import harness, report
from doge_lm.evaluation.comparison import compare, compare_texts
from doge_lm.evaluation.flags import BATCH_TOKENS, BATCH_TOKENS_CPU, HARNESS, LIGHTEVAL, RESULT_NAME, SEED
from doge_lm.evaluation.report import Results
from doge_lm.evaluation.scorer import make_scorer
from doge_lm.evaluation.suites import SUITES
from doge_lm.evaluation.texts import parse_group, score_texts
from doge_lm.inference.loading import load_model, load_model_tokenizer, pick_device


def run(args: argparse.Namespace) -> int:
    """Run `doge-lm eval`."""
    _check(args)
    groups = _groups(args.texts)
    run_tasks = _engine(args)
    tasks = _tasks(args)
    if not tasks and not groups and any(not _is_results(place) for place in args.models):
        raise UserError("nothing to evaluate on: give --tasks, --suite, --data_dir or --texts")
    results: list[Results] = []
    for place in args.models:
        if _is_results(place):
            found = Results.read(place / RESULT_NAME)
            print(f"\n{found.model}")
            _show(found)
        else:
            found = _evaluate(place, args, run_tasks, tasks, groups)
        results.append(found)
    for other in results[1:]:
        of_tasks, without_tasks = compare(results[0].tasks, other.tasks)
        of_texts, without_texts = compare_texts(results[0].texts, other.texts)
        differences, left_out = of_tasks + of_texts, without_tasks + without_texts
        print(f"\n{other.model} over {results[0].model}, sample by sample")
        print(report.difference_table(differences) if differences else "nothing of the two can be compared:")
        for line in left_out:
            print(f"left out: {line}")
    return 0


def _show(results: Results) -> None:
    if results.tasks:
        print(report.task_table(results.tasks), flush=True)
    if results.texts:
        print(report.text_table(results.texts), flush=True)


def _is_results(place: Path) -> bool:
    return (place / RESULT_NAME).is_file() and not (place / "config.json").is_file()


def _check(args: argparse.Namespace) -> None:
    least = {"limit": 1, "num_fewshot": 0, "batch_tokens": 1, "window": 2, "seed": 0}
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name} is {value}; it must be at least {lowest}")
    if args.system is not None and not args.chat:
        raise UserError("--system is for --chat; give both, or leave it out")
    measured = [place for place in args.models if not _is_results(place)]
    if args.output_dir is not None and len(measured) > 1:
        raise UserError(
            "--output_dir takes the results of one model; evaluate each by itself, then compare: "
            "doge-lm eval RESULTS_1 RESULTS_2"
        )
    asked = [name for name in ("tasks", "suite", "data_dir", "texts", "output_dir") if getattr(args, name)]
    if asked and not measured:
        raise UserError(
            f"--{asked[0]} is for a model, and all that is given are results; leave it out, or give a model"
        )
    for place in measured:
        if not (place / "config.json").is_file():
            raise UserError(f"{place} holds neither a model (config.json) nor results ({RESULT_NAME})")
    if args.engine == LIGHTEVAL:
        _check_lighteval(args)
    if args.output_dir is not None:
        if (args.output_dir / RESULT_NAME).exists() and not args.overwrite:
            raise UserError(
                f"--output_dir {args.output_dir} holds results already ({RESULT_NAME}); choose another place, or "
                "replace them with --overwrite"
            )
        _try_to_write(args.output_dir)


def _check_lighteval(args: argparse.Namespace) -> None:
    """Refuse flags that mean nothing to lighteval."""
    if args.suite not in {None, "local"}:
        raise UserError(
            f"--suite {args.suite} is a list of lm-evaluation-harness's tasks; with --engine lighteval, name tasks "
            "with --tasks, or give --suite local"
        )
    if args.seed != SEED:
        raise UserError("--seed is for --engine harness; lighteval draws examples by a seed of its own: leave it out")


def _engine(args: argparse.Namespace) -> Callable[..., dict[str, harness.TaskResult]]:
    """What runs the tasks. lighteval is imported only if it is asked for: that takes longer than a small benchmark.

    Raises:
        UserError: if lighteval is not installed, or cannot be imported.
    """
    if args.engine == HARNESS or all(_is_results(place) for place in args.models):
        return harness.run_tasks
    environment = (
        "it needs older packages than the rest of doge-lm, so give it an environment of its own: python3 -m venv "
        ".venv-lighteval, then .venv-lighteval/bin/pip install --constraint constraints-lighteval.txt --editable "
        "'.[lighteval]', and run .venv-lighteval/bin/doge-lm"
    )
    if importlib.util.find_spec("lighteval") is None:
        raise UserError(f"--engine lighteval: lighteval is not installed here; {environment}")
    try:
        module = importlib.import_module("doge_lm.evaluation.lighteval_engine")
    except ImportError as error:
        if (error.name or "").startswith("doge_lm"):
            raise
        raise UserError(f"--engine lighteval cannot be imported ({error}); {environment}") from error
    run_tasks: Callable[..., dict[str, harness.TaskResult]] = module.run_tasks
    return run_tasks


def _try_to_write(directory: Path) -> None:
    """Before hours of work, not after them."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir {directory} cannot be written to ({error.strerror}); choose another place"
        ) from error


def _tasks(args: argparse.Namespace) -> list[str]:
    names = [name.strip() for argument in args.tasks for name in argument.split(",") if name.strip()]
    suite = args.suite or ("local" if args.data_dir is not None and not names else None)
    if suite == "local":
        if args.data_dir is None:
            raise UserError("--suite local reads local files; say where they lie with --data_dir")
        found, left_out = harness.local_suite(args.data_dir, args.run_code)
        for line in left_out:
            print(f"left out: {line}", flush=True)
        names += [name for name in found if name not in names]
    elif suite is not None:
        names += [name for name in SUITES[suite] if name not in names]
    return names


def _groups(arguments: list[str]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for argument in arguments:
        name, path = parse_group(argument)
        groups.setdefault(name, []).append(path)
    return groups


def _evaluate(
    place: Path,
    args: argparse.Namespace,
    run_tasks: Callable[..., dict[str, harness.TaskResult]],
    tasks: list[str],
    groups: dict[str, list[Path]],
) -> Results:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    device = pick_device(args.device)
    model = load_model(place, device, args.dtype)
    batch_tokens = args.batch_tokens or (BATCH_TOKENS_CPU if device.type == "cpu" else BATCH_TOKENS)
    scorer = make_scorer(model, load_model_tokenizer(place, model), batch_tokens, progress=sys.stderr.isatty())
    choice = harness.Choice(
        tasks=tasks,
        data_dir=args.data_dir,
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        seed=args.seed,
        run_code=args.run_code,
        chat=args.chat,
        system=args.system,
        fitting=not args.tasks,
    )
    print(f"\n{place}", flush=True)
    results = Results(str(place), _settings(args, model.dtype, device, batch_tokens), {}, {})
    # Each part is shown and written when it is done: what goes wrong in the next does not cost it.
    if tasks:
        found = run_tasks(scorer, choice, print)
        results.settings["cut_requests"] = scorer.cut_requests
        results = replace(results, tasks=found)
        _keep(results, args.output_dir)
        print(report.task_table(results.tasks), flush=True)
        if scorer.cut_requests:
            print(
                f"{scorer.cut_requests:,} requests are longer than the model's {scorer.max_length:,} positions: their "
                "beginning was left out"
            )
    if groups:
        texts = score_texts(scorer, groups, args.window, args.limit, print)
        results = replace(results, texts=texts)
        _keep(results, args.output_dir)
        print(report.text_table(results.texts), flush=True)
    if args.output_dir is not None:
        print(f"results: {args.output_dir / RESULT_NAME}")
    return results


def _keep(results: Results, directory: Path | None) -> None:
    if directory is not None:
        results.write(directory)


def _settings(args: argparse.Namespace, dtype: torch.dtype, device: torch.device, batch_tokens: int) -> dict[str, Any]:
    """What results depend on, for the record."""
    kept = ("engine", "num_fewshot", "limit", "chat", "system", "seed", "window")
    return {
        **{name: getattr(args, name) for name in kept},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "batch_tokens": batch_tokens,
    }
