"""What an evaluation takes beside the model's own forward passes, on choices between given answers.

    python benchmarks/evaluation.py --data_dir DIR --tokenizer_path DIR [--preset doge_25M] [--limit 300]

The weights are random. Each row scores the same requests of the ready tasks on local files (`local_*`), through
`doge_lm.evaluation.scorer` and through lm-evaluation-harness's own class with a batch of 8, 32 or 128 rows:

    forward    seconds within the model: of its layers and, where it is applied, its head; in a pass of its own, for it
               waits for the device at every call
    scoring    seconds from the requests' texts to their likelihoods: tokenizing, batches, softmax
    all        seconds of the whole evaluation: reading data, making prompts, scoring, metrics

`scoring / forward` is to be 1.2 at most. Prints a JSON record a row.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from doge_lm import DogeForCausalLM
from doge_lm.data.tokenizer import load_tokenizer
from doge_lm.evaluation.harness import Choice, run_tasks
from doge_lm.evaluation.scorer import DogeScorer, PlainScorer
from doge_lm.training.settings import load_settings

TASKS = ("local_arc_easy", "local_arc_challenge", "local_openbookqa", "local_piqa", "local_boolq", "local_winogrande")
_ROW = 512  # tokens that the harness's own class reckons for a row


class Clock:
    """Seconds within a function, the device's work included; calls within calls count once."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self._device, self._depth = 0.0, device, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth = 1
            begun = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self._now() - begun
                self._depth = 0

        return timed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure(scorer: PlainScorer, args: argparse.Namespace) -> dict[str, Any]:
    device = scorer.model.device
    forward, scoring = Clock(device), Clock(device)
    model = scorer.model
    originals = model.forward, model.model.forward, model.lm_head.forward
    for module in (model, model.model, model.lm_head):
        module.forward = forward.around(module.forward)
    choice = Choice(list(args.tasks), args.data_dir, limit=args.limit)
    run_tasks(scorer, choice)
    model.forward, model.model.forward, model.lm_head.forward = originals
    scorer.loglikelihood = scoring.around(scorer.loglikelihood)  # type: ignore[method-assign]
    begun = time.perf_counter()
    results = run_tasks(scorer, choice)
    whole = time.perf_counter() - begun
    return {
        "forward": round(forward.seconds, 3),
        "scoring": round(scoring.seconds, 3),
        "all": round(whole, 3),
        "scoring / forward": round(scoring.seconds / forward.seconds, 3),
        "acc": {name: result.metrics["acc"].value for name, result in results.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--preset", default="doge_25M")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--batch_tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--harness_rows", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = DogeForCausalLM(load_settings(args.preset, []).model_config()).eval()
    model = model.to(args.device, getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.tokenizer_path)
    ways = [(f"by {tokens} tokens", DogeScorer, tokens) for tokens in args.batch_tokens]
    ways += [(f"harness, {rows} rows", PlainScorer, rows * _ROW) for rows in args.harness_rows]
    measure(DogeScorer(model, tokenizer, 4096, False), argparse.Namespace(**{**vars(args), "limit": 4}))  # warm up
    for name, kind, tokens in ways:
        figures = measure(kind(model, tokenizer, tokens, False), args)
        print(json.dumps({"way": name, "preset": args.preset, "device": args.device, **figures}), flush=True)


if __name__ == "__main__":
    main()
