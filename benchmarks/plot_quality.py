"""Draw the curves of `quality.py`: training loss against tokens, a line a run.

python benchmarks/plot_quality.py benchmarks/results/quality-2026-11-24.jsonl OUT.png
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

SMOOTHING = 5  # logged losses (each a mean over 10 steps) that a point averages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(9, 5.4))
    for line in args.results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tokens = np.array([int(key) for key in row["curve"]]) / 1e6
        loss = np.convolve(list(row["curve"].values()), np.ones(SMOOTHING) / SMOOTHING, mode="valid")
        style = "--" if row["run"].startswith("llama") else "-"
        label = f"{row['run']}  (test {row['eval_loss']:.3f})"
        axes.plot(tokens[SMOOTHING - 1 :], loss, style, linewidth=1.2, label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss, nats a token")
    axes.set_ylim(3.0, 7.0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
