"""Multi-query associative recall: which value stood beside this key? Doge beside a Llama, rates swept for each.

    python benchmarks/recall.py MODEL [MODEL …] --output_dir OUT [--tasks 256x16 512x64 …] [--rates 1e-3 3e-3 …]

The task of Arora et al., *Zoology* (arXiv 2312.04927), as the field uses it: a row of T tokens begins with P pairs of a
key and a value, each drawn without repetition from its half of the vocabulary; later each key stands once more, with
random tokens between, sooner more often than later (gaps by a power law), and the model is to give its value there. A
task is written TxP. Data is drawn anew for each step, the same for every model.

A MODEL is `doge` or `llama` with changes and settings as a run of `quality.py`, e.g.
`doge:qk_norm=true,key_shift=true`. Its size is `--layers` layers of `--hidden_size`; the Llama has as many parameters
as the Doge of the same settings without changes. Each task, rate and seed is a row of OUT/recall.jsonl; the table has
the best mean accuracy over the rates.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flags import positive, positive_number, run_command
from quality import parse_row
from torch import Tensor, nn
from torch.nn import functional as F

from doge_lm.errors import UserError
from doge_lm.training.hardware import bf16_is_faster
from doge_lm.training.settings import Settings, load_settings

TASKS = ("256x16", "256x64", "512x64", "512x128", "1024x128", "1024x256", "2048x256")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
VOCABULARY = 8192
GAP_EXPONENT = -0.99  # of the power law that the slots of the queries are drawn by
WEIGHT_DECAY = 0.1
EVALUATION_BATCHES = 8


class Task(NamedTuple):
    """Tokens of a row and pairs at its beginning."""

    length: int
    pairs: int


class Batch(NamedTuple):
    """Rows (B, T), where in them the queries stand (B, P), and what their values are (B, P)."""

    ids: Tensor
    positions: Tensor
    values: Tensor


def parse_task(text: str, vocabulary: int = VOCABULARY) -> Task:
    """`512x64` to a task.

    Raises:
        UserError: if it is none, or the row is too short for its pairs and queries.
    """
    length, _, pairs = text.partition("x")
    if not (length.isdecimal() and pairs.isdecimal() and int(pairs) > 0):
        raise UserError(f"--tasks {text}: expected TxP, for example 512x64")
    task = Task(int(length), int(pairs))
    if task.length % 2 or task.length < 4 * task.pairs:
        raise UserError(f"--tasks {text}: the length must be even, and at least 4 tokens a pair: {4 * task.pairs}")
    if task.pairs > vocabulary // 2:
        raise UserError(f"--tasks {text}: there are {vocabulary // 2} keys, half of --vocabulary")
    return task


def draw_batch(task: Task, rows: int, generator: torch.Generator, vocabulary: int = VOCABULARY) -> Batch:
    """Rows of a task on the generator's device."""
    device, half = generator.device, vocabulary // 2
    length, pairs = task

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    keys_BP = drawn(rows, half).topk(pairs).indices
    values_BP = half + drawn(rows, half).topk(pairs).indices
    ids_BT = torch.randint(2 * half, (rows, length), generator=generator, device=device)
    ids_BT[:, : 2 * pairs] = torch.stack((keys_BP, values_BP), dim=2).flatten(1)
    slots = (length - 2 * pairs) // 2
    gaps = torch.arange(1, slots + 1, device=device, dtype=torch.float32)
    # Drawn without repetition, by the largest of log weight + Gumbel noise; then in an order that says nothing.
    noise = -(-drawn(rows, slots).clamp_min(1e-30).log()).log()
    slots_BP = (GAP_EXPONENT * gaps.log() + noise).topk(pairs).indices
    slots_BP = slots_BP.gather(1, drawn(rows, pairs).argsort(dim=1))
    positions_BP = 2 * pairs + 2 * slots_BP
    ids_BT.scatter_(1, positions_BP, keys_BP)
    return Batch(ids_BT, positions_BP, values_BP)


class Recall(nn.Module):
    """A language model that is asked at the queries alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, positions_BP: Tensor, values_BP: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of the values, and the share that the model gives the highest score."""
        hidden_BTd = self.model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        at_BPd = positions_BP[..., None].expand(-1, -1, hidden_BTd.shape[-1])
        logits_BPV = self.model.logits(hidden_BTd.gather(1, at_BPd)).float()
        right = (logits_BPV.argmax(-1) == values_BP).float().mean()
        return F.cross_entropy(logits_BPV.flatten(0, 1), values_BP.flatten()), right


class Bench:
    """One model, trained again and again from new weights on tasks of one length (so that it is compiled once)."""

    def __init__(self, run: str, length: int, args: argparse.Namespace):
        _, self._build, changed = parse_row(run)
        self._settings = model_settings(args, changed)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bf16 = bf16_is_faster(self._device)
        self._length, self._args = length, args
        self._recall = self._fresh(0)
        if self._device.type == "cuda":
            self._recall.compile(fullgraph=True, dynamic=False)

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for parameter in self._recall.parameters())

    def _fresh(self, seed: int) -> Recall:
        torch.manual_seed(seed)
        model = self._build(self._settings.model_config(), self._settings.train)
        return Recall(model).to(self._device)

    def train(self, task: Task, rate: float, seed: int) -> dict[str, Any]:
        """Train once and evaluate on rows that are new; returns the figures."""
        self._recall.load_state_dict(self._fresh(seed).state_dict())
        self._recall.train()
        generator = torch.Generator(self._device).manual_seed(seed)
        rows = max(1, self._args.tokens // self._length)
        fused = self._device.type == "cuda"
        optimizer = torch.optim.AdamW(self._recall.parameters(), rate, weight_decay=WEIGHT_DECAY, fused=fused)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=self._args.steps, pct_start=0.1, cycle_momentum=False, final_div_factor=1e4
        )
        begun = time.perf_counter()
        for _ in range(self._args.steps):
            optimizer.zero_grad()
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                loss, _ = self._recall(*draw_batch(task, rows, generator, self._args.vocabulary))
            loss.backward()
            nn.utils.clip_grad_norm_(self._recall.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        right, losses = self._evaluate(task, rows)
        seconds = round(time.perf_counter() - begun, 1)
        return {"accuracy": round(right, 4), "loss": round(losses, 4), "seconds": seconds}

    @torch.no_grad()
    def _evaluate(self, task: Task, rows: int) -> tuple[float, float]:
        generator = torch.Generator(self._device).manual_seed(2**31)  # no seed of training
        found = []
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            for _ in range(EVALUATION_BATCHES):
                loss, right = self._recall(*draw_batch(task, rows, generator, self._args.vocabulary))
                found.append((right.item(), loss.item()))
        rights, losses = zip(*found, strict=True)
        return statistics.fmean(rights), statistics.fmean(losses)


def model_settings(args: argparse.Namespace, changed: dict[str, str]) -> Settings:
    """The settings of the model: `--layers` of `--hidden_size`, and what a MODEL changes."""
    d = args.hidden_size
    sizes = {
        "vocab_size": args.vocabulary,
        "hidden_size": d,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "inner_values_retrieval_size": d,
        "cross_domain_intermediate_size": 4 * d,
        "private_expert_intermediate_size": d,
        "num_cdmmoe_experts": 64,
        "weight_init": "fan_in",
    }
    return load_settings("doge_25M", [f"{key}={value}" for key, value in {**sizes, **changed}.items()])


def best_by_task(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """For each task the best mean accuracy over seeds, its spread, and the rate that it is of."""
    by_rate: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_rate[row["task"]][row["rate"]].append(row["accuracy"])
    best = {}
    for task, rates in by_rate.items():
        rate = max(rates, key=lambda each: statistics.fmean(rates[each]))
        spread = statistics.stdev(rates[rate]) if len(rates[rate]) > 1 else 0.0
        best[task] = statistics.fmean(rates[rate]), spread, rate
    return best


def run_model(run: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All tasks, rates and seeds of one model; each row is written as soon as it is there."""
    tasks = [parse_task(text, args.vocabulary) for text in args.tasks]
    rows = []
    for length in sorted({task.length for task in tasks}):
        torch._dynamo.reset()
        bench = Bench(run, length, args)
        for task in (each for each in tasks if each.length == length):
            for rate in args.rates:
                for seed in range(args.seeds):
                    figures = bench.train(task, rate, seed)
                    name = f"{task.length}x{task.pairs}"
                    row = {"model": run, "task": name, "rate": rate, "seed": seed, "parameters": bench.parameters}
                    rows.append({**row, "steps": args.steps, "tokens_per_step": args.tokens, **figures})
                    with (args.output_dir / "recall.jsonl").open("a", encoding="utf-8", newline="\n") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="MODEL")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TxP")
    parser.add_argument("--rates", nargs="+", type=positive_number, default=list(RATES))
    parser.add_argument("--seeds", type=positive, default=1)
    parser.add_argument("--steps", type=positive, default=2000)
    parser.add_argument("--tokens", type=positive, default=32768, help="tokens of a step")
    parser.add_argument("--vocabulary", type=positive, default=VOCABULARY, help="half of it keys, half values")
    parser.add_argument("--hidden_size", type=positive, default=64)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--heads", type=positive, default=1)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for text in args.tasks:
        parse_task(text, args.vocabulary)
    found = {run: best_by_task(run_model(run, args)) for run in args.runs}
    print(f"\n{'model':44} {'task':>9} {'accuracy':>9} {'± seeds':>8} {'rate':>8}")
    for run, best in found.items():
        for task, (accuracy, spread, rate) in best.items():
            print(f"{run:44} {task:>9} {accuracy:9.4f} {spread:8.4f} {rate:8.0e}")
    return 0


if __name__ == "__main__":
    run_command(main)
