"""Time of an optimizer step on one table of experts: rows without a gradient left alone, against AdamW.

    python benchmarks/lazy_rows.py [--rows 65536] [--size 256] [--shares 0.01 0.1 0.5 1] [--threads 1] [--device cpu]

Each share of rows has a gradient, other rows in each step. AdamW, fused as the trainer uses it and as PyTorch chooses
by itself, and `RowLazyAdamW` run in turns in this process; medians over `--repetitions`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from doge_lm.training.hardware import synchronize
from doge_lm.training.row_lazy_adamw import RowLazyAdamW

WARM_UP = 3
OPTIMIZERS: dict[str, Callable[[Tensor], torch.optim.Optimizer]] = {
    "fused": lambda table: torch.optim.AdamW([table], fused=True),
    "default": lambda table: torch.optim.AdamW([table]),
    "lazy": lambda table: RowLazyAdamW([{"params": [table], "lazy_rows": True}]),
}


def step_ms(name: str, args: argparse.Namespace, share: float) -> float:
    """Median milliseconds of a step."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(args.rows, args.size, generator=generator).to(device).requires_grad_()
    optimizer = OPTIMIZERS[name](table)
    times = []
    for _ in range(WARM_UP + args.repetitions):
        chosen = torch.randperm(args.rows, generator=generator)[: round(args.rows * share)].to(device)
        table.grad = torch.zeros_like(table)
        table.grad[chosen] = torch.randn(len(chosen), args.size, generator=generator).to(device)
        synchronize(device)
        begun = time.perf_counter()
        optimizer.step()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[WARM_UP:])


def main() -> int:
    """Measures, a JSON record a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536, help="of the table, N")
    parser.add_argument("--size", type=int, default=256, help="of a row, F")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 0.5, 1.0])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for share in args.shares:
        found = {name: round(step_ms(name, args, share), 3) for name in OPTIMIZERS}
        print(json.dumps({"rows": args.rows, "size": args.size, "share": share, **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
