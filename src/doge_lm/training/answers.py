"""The report of tuning: figures on held-out data and answers to fixed prompts, before and after."""

from pathlib import Path
from typing import Any

import torch

from doge_lm.data.manifest import write_text
from doge_lm.data.tokenizer import load_tokenizer
from doge_lm.inference.decoding import Decoder, Sampling, position_limit
from doge_lm.inference.loading import load_model
from doge_lm.training.callbacks import read_log

REPORT_NAME = "report.md"

PROMPTS = (
    "Who are you?",
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a Python function that returns the sum of a list of numbers.",
    "Give me three tips for learning a new language.",
    "你是谁？",
    "中国的首都是哪里？",
    "用一句话解释为什么天空是蓝色的。",
    "写一个计算列表之和的 Python 函数。",
    "请给我三条保持健康的建议。",
)
_LONGEST_ANSWER = 128
_PREFERENCE = ("eval_loss", "eval_rewards/", "eval_logps/")


def answer(path: Path, device: torch.device, prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    """The likeliest answer of a model to each prompt, as a first turn, up to 128 tokens or the model's last position.

    Args:
        path: a model with its tokenizer.
        device: where it computes.
        prompts: what it is asked.

    Raises:
        UserError: if the model cannot be loaded.
    """
    tokenizer = load_tokenizer(path)
    model = load_model(path, device)
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [list(tokenizer.apply_chat_template(turn, return_dict=False)) for turn in turns]
    room = position_limit(model) - max(map(len, ids))
    if room < 1:
        return ["(the model has too few positions for these prompts)"] * len(prompts)
    rule = Sampling(max_new_tokens=int(min(room, _LONGEST_ANSWER)))
    rows = Decoder(model).generate(ids, rule, eos_token_id=tokenizer.eos_token_id)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def write_report(before: Path, after: Path, log: Path, logging_dir: Path, device: torch.device) -> Path:
    """Write `report.md`.

    Args:
        before: the model that fine-tuning started from.
        after: what came of it.
        log: the run's `train.jsonl`.
        logging_dir: where the report goes.
        device: where the two models answer.

    Returns:
        The report's path.
    """
    print(f"answering {len(PROMPTS)} prompts with the model before and after, for the report", flush=True)
    evaluations = [record for record in read_log(log) if record["kind"] == "eval"]
    parts = [
        "# Tuning\n",
        f"From `{before}` to `{after}`, {evaluations[-1]['step']:,} steps.\n",
        "## Held-out data\n",
        _table(evaluations[0], evaluations[-1]),
        "## Answers\n",
        f"The likeliest ones (no sampling), up to {_LONGEST_ANSWER} tokens.\n",
    ]
    answers = zip(PROMPTS, answer(before, device), answer(after, device), strict=True)
    for prompt, first, last in answers:
        parts.append(f"**{prompt}**\n")
        parts += [f"{name}:\n\n{_quoted(text)}\n" for name, text in (("before", first), ("after", last))]
    path = logging_dir / REPORT_NAME
    write_text(path, "\n".join(parts))
    return path


def _table(first: dict[str, Any], last: dict[str, Any]) -> str:
    """Loss and bits per byte by source, or TRL's figures; the first evaluation is of the model as it came."""
    if "eval_bits_per_byte" not in last:
        names = [key for key in last if key.startswith(_PREFERENCE) and key in first]
        # Before the first step both answers of every pair have the same reward: neither is ahead.
        told = {name: f"{first[name]:.4f}" for name in names} | {"eval_rewards/accuracies": "-"}
        rows = [f"| {name.removeprefix('eval_')} | {told[name]} | {last[name]:.4f} |" for name in names]
        return "\n".join([f"| | step {first['step']} | step {last['step']} |", "|---|---|---|", *rows]) + "\n"
    lines = [
        f"| | loss, step {first['step']} | loss, step {last['step']} | bits per byte, before | after |",
        "|---|---|---|---|---|",
    ]
    for key in [key for key in last if key.startswith("eval_") and key.endswith("loss") and key in first]:
        name = key.removeprefix("eval_").removesuffix("loss").rstrip("_") or "all"
        bits = key.removesuffix("loss") + "bits_per_byte"
        lines.append(f"| {name} | {first[key]:.4f} | {last[key]:.4f} | {first[bits]:.4f} | {last[bits]:.4f} |")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As an indented block: what a model writes is not to be read as Markdown."""
    lines = text.splitlines() or ["(nothing)"]
    return "\n".join(f"    {line}" for line in lines)
