"""Where the time and the memory of a training step go: its kernels, and what it keeps for the backward pass.

    python benchmarks/profile_step.py [--preset doge_25M] [--row doge] [--micro_batch 32] [--set KEY=VALUE …]
        [--json FILE]

The bare loop of `train_step.py` on random tokens, on one GPU. Prints milliseconds a step of the wall clock and of all
kernels, the kernels by their time (names cut; the JSON has them whole), and the tensors that autograd keeps of a step,
by dtype and shape. Saved tensors are found in a step of their own, without CUDA graphs.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flags import run_command
from kernel_times import kernel_times
from records import circumstances, markdown, write_whole
from train_step import BUILDERS, MICRO_BATCHES, bare_step

from doge_lm.errors import UserError
from doge_lm.training.hardware import measure_matmul
from doge_lm.training.settings import load_settings

STEPS, WARM_UP = 10, 5
SHOWN = 45


def step_function(args: argparse.Namespace, graphs: bool) -> tuple[Callable[[], object], torch.nn.Module]:
    """A call that takes one training step on random tokens, and its model."""
    settings = load_settings(args.preset, args.overrides)
    step, model = bare_step(BUILDERS[args.row], settings, graphs)
    shape = args.micro_batch, settings.train.sequence_length
    ids = torch.randint(3, model.config.vocab_size, shape, device=model.device)
    return lambda: step({"input_ids": ids, "labels": ids}), model


def saved_by(step: Callable[[], object], model: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """Of each dtype and shape: how many tensors autograd keeps for the backward pass, and their MiB."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    sizes: dict[str, float] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if tensor.is_cuda and place not in own | seen:
            seen.add(place)
            name = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            counts[name] += 1
            sizes[name] = tensor.untyped_storage().nbytes() / 2**20
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return dict(sorted(((n, (c, c * sizes[n])) for n, c in counts.items()), key=lambda item: -item[1][1]))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of a row."""
    step, _ = step_function(args, graphs=True)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(3 * STEPS):
        step()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - begun) / (3 * STEPS)
    peak = torch.cuda.max_memory_allocated() / 2**30
    kernels = kernel_times(step)
    plain, model = step_function(args, graphs=False)
    plain()
    return {
        **circumstances(),
        "device": torch.cuda.get_device_name(),
        "preset": args.preset,
        "row": args.row,
        "micro_batch": args.micro_batch,
        "ms_per_step": wall * 1000,
        "kernel_ms_per_step": sum(total for total, _ in kernels.values()),
        "peak_memory_gib": peak,
        "matmul_flops": measure_matmul(torch.device("cuda"), torch.bfloat16),
        "kernels": kernels,
        "saved": saved_by(plain, model),
    }


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="doge_25M")
    parser.add_argument("--row", choices=BUILDERS, default="doge")
    parser.add_argument("--micro_batch", type=int, help="sequences of a step (default: by preset)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="a setting")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.micro_batch = args.micro_batch or MICRO_BATCHES.get(Path(args.preset).stem, 4)
    if not torch.cuda.is_available():
        raise UserError("a profile of kernels needs an NVIDIA GPU")
    figures = measure(args)
    if args.json:
        write_whole(args.json, figures)
    lines = [["kernel", "ms a step", "launches"]]
    lines += [[name[:90], f"{ms:.3f}", f"{count:.0f}"] for name, (ms, count) in figures["kernels"].items()][:SHOWN]
    print(markdown(lines), "\n")
    print(markdown([["kept", "tensors", "MiB"], *([n, str(c), f"{m:.0f}"] for n, (c, m) in figures["saved"].items())]))
    heads = ("preset", "row", "micro_batch", "ms_per_step", "kernel_ms_per_step", "peak_memory_gib", "matmul_flops")
    print("\n" + json.dumps({name: figures[name] for name in heads}))
    return 0


if __name__ == "__main__":
    run_command(main)
