"""Small benchmarks of every kind that the ready task files read, made of nothing."""

import json
from pathlib import Path
from typing import Any

import torch

SENTENCE = "the old river runs past a mill where two children count grey stones and sing of rain 水 月 山 风"
WORDS = tuple(SENTENCE.split())


def sentence(rng: torch.Generator, most: int = 12) -> str:
    """Some words."""
    count = int(torch.randint(1, most, (), generator=rng))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=rng).tolist())


def rows_of(kind: str, rng: torch.Generator, i: int) -> dict[str, Any]:
    """Row i of a benchmark of this kind, with a field that no task reads."""
    choices = [sentence(rng) for _ in range(4 if kind == "four" else 2)]
    rows: dict[str, dict[str, Any]] = {
        "four": {"query": f"Question: {sentence(rng)}?", "choices": choices, "gold": i % 4},
        "letters": {"query": f"Question: {sentence(rng)}?\nAnswer:", "choices": list("ABCD"), "gold": i % 4},
        "two": {"query": f"{sentence(rng)}, therefore", "choices": choices, "gold": i % 2},
        "goal": {"query": f"Question: {sentence(rng)}\n", "choices": choices, "gold": i % 2},
        "names": {
            "context_options": [f"{sentence(rng)} Sarah", f"{sentence(rng)} Ann"],
            "continuation": f"{sentence(rng)}.",
            "gold": i % 2,
        },
        "pair": {
            "sentence_good": choices[0],
            "sentence_bad": choices[1],
            "linguistics_term": f"term{i % 2}",
            "UID": f"kind{i % 3}",
        },
        "trivia": {
            "context": f"Question: {sentence(rng)}?\nAnswer:",
            "answer": "mill",
            "aliases": ["Mill", "the mill"],
        },
        "sum": {"question": f"{sentence(rng)} {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"},
        "program": {
            "task_id": f"T/{i}",
            "prompt": f"def f{i}(x):\n",
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(f):\n    assert f(1) == {i + 1}\n",
            "entry_point": f"f{i}",
        },
    }
    return {**rows[kind], "unread": {"deep": [i]}}


KINDS = {
    "arc_easy_test": "four",
    "arc_challenge_test": "four",
    "openbookqa_test": "four",
    "commonsense_qa": "letters",
    "piqa_valid": "goal",
    "boolq_valid": "two",
    "copa": "two",
    "winogrande_xl_dev": "names",
    "blimp": "pair",
    "triviaqa_sub3000": "trivia",
    "gsm8k_test": "sum",
    "humaneval": "program",
}


def make_benchmarks(place: Path, count: int = 9) -> Path:
    """A file of `count` rows for every ready task."""
    place.mkdir(parents=True, exist_ok=True)
    for number, (name, kind) in enumerate(KINDS.items()):
        rng = torch.Generator().manual_seed(number)
        lines = [json.dumps(rows_of(kind, rng, i), ensure_ascii=False) for i in range(count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place
