"""Loss of the same training run by the fast paths and by the plain mathematics.

    python benchmarks/loss_curves.py --dataset_path DIR --tokenizer_path DIR --output_dir OUT [--preset doge_25M]
        [--steps 500] [--gpus 1] [--set KEY=VALUE …] [--json FILE] [--png FILE]

Three runs of train.py with the same weights, data and order:

    fast    as shipped
    plain   `DOGE_LM_PLAIN=1`: no kernel of ours, no folded matrix, logits in full; compiled
    eager   the same, not compiled

`plain` and `eager` compute the same operations and differ in how PyTorch rounds between them, so their distance is the
noise that `fast` is held against. Prints the mean of |difference| of the logged losses over quarters of the run, and
the mean loss of the last quarter. With `--gpus 3` they run side by side, each on a GPU of its own.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train_step import gpu_names

from doge_lm.training.callbacks import LOG_NAME, read_log

RUNS: dict[str, tuple[dict[str, str], list[str]]] = {
    "fast": ({}, []),
    "plain": ({"DOGE_LM_PLAIN": "1"}, []),
    "eager": ({"DOGE_LM_PLAIN": "1"}, ["torch_compile=false"]),
}


def train(name: str, args: argparse.Namespace, gpu: str | None = None) -> dict[int, float]:
    """The logged losses of one run, by step; on the GPU of that name, as CUDA_VISIBLE_DEVICES has it."""
    environment, changes = RUNS[name]
    if gpu is not None:
        environment = {**environment, "CUDA_VISIBLE_DEVICES": gpu}
    place = args.output_dir / name
    settings = [f"per_epoch_max_steps={args.steps}", "num_train_epochs=1", "accumulate_steps=1", "logging_steps=5"]
    settings += ["eval_steps=1000000", "save_steps=1000000", "document_mask=false", *args.overrides, *changes]
    command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "--config_path", args.preset, "--overwrite"]
    command += ["--dataset_path", args.dataset_path, "--tokenizer_path", args.tokenizer_path]
    command += ["--output_dir", str(place / "model"), "--logging_dir", str(place / "log")]
    for setting in settings:
        command += ["--set", setting]
    print(f"{name} …", file=sys.stderr, flush=True)
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run {name} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return {line["step"]: line["loss"] for line in read_log(place / "log" / LOG_NAME) if "loss" in line}


def train_all(args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """The curves of all runs, by name."""
    names = list(RUNS)
    gpus = gpu_names(args.gpus)
    with ThreadPoolExecutor(len(gpus)) as pool:
        # Runs that share a GPU follow each other in one thread.
        shares = [names[index :: len(gpus)] for index in range(len(gpus))]
        done = pool.map(lambda share, gpu: [(name, train(name, args, gpu)) for name in share], shares, gpus)
        curves = dict(itertools.chain.from_iterable(done))
    return {name: curves[name] for name in names}


def quarters(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Mean distance of two curves in each quarter of their steps."""
    steps = sorted(one)
    assert steps == sorted(other)
    parts = [steps[len(steps) * i // 4 : len(steps) * (i + 1) // 4] for i in range(4)]
    return [sum(abs(one[step] - other[step]) for step in part) / max(1, len(part)) for part in parts]


def last_quarter(curve: dict[int, float]) -> float:
    """Mean loss of the last quarter."""
    losses = [curve[step] for step in sorted(curve)]
    losses = losses[len(losses) * 3 // 4 :]
    return sum(losses) / len(losses)


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """The curves, and their distance from `plain`."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    for name, curve in curves.items():
        steps = sorted(curve)
        top.plot(steps, [curve[step] for step in steps], label=name)
        if name != "plain":
            bottom.plot(steps, [curve[step] - curves["plain"][step] for step in steps], label=f"{name} - plain")
    top.set(ylabel="loss")
    bottom.set(xlabel="step", ylabel="difference")
    top.legend()
    bottom.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    """Runs and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", required=True)
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", default="doge_25M")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--gpus", type=int, default=1, choices=(1, 2, 3), help="runs at a time, each on its own GPU")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write the curves there")
    parser.add_argument("--png", type=Path, help="draw them there")
    args = parser.parse_args()
    curves = train_all(args)
    print("| | 1st quarter | 2nd | 3rd | 4th |\n|---|---|---|---|---|")
    for name in ("fast", "eager"):
        distances = quarters(curves[name], curves["plain"])
        print(f"| {name} from plain | " + " | ".join(f"{distance:.5f}" for distance in distances) + " |")
    print("\nmean loss of the last quarter: " + ", ".join(f"{n} {last_quarter(c):.4f}" for n, c in curves.items()))
    if args.json:
        args.json.write_text(json.dumps({"steps": args.steps, "preset": args.preset, "curves": curves}) + "\n")
    if args.png:
        draw(curves, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
