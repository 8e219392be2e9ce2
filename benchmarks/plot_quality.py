"""Draw what `quality.py` found: training loss against tokens, a line a run; or copying against the loss, a point a run.

    python benchmarks/plot_quality.py RESULTS.jsonl [RESULTS.jsonl …] OUT.png [--rows LABEL=ROW …] [--copying]

`--rows` picks runs by their number in docs/log.md and labels them; those of one label, its seeds, share a colour. Else
every run is drawn under its name. With `--copying` a second panel has all finished runs of the files: the loss of the
test set against `repeat_loss`, that on the second copy of random tokens.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from plot_causes import labelled_rows

from doge_lm.errors import UserError

SMOOTHING = 5  # logged losses (each a mean over 10 steps) that a point averages


def picked(rows: list[dict[str, Any]], choices: list[str] | None) -> list[tuple[str, dict[str, Any]]]:
    """The runs to draw, each with its label.

    Raises:
        UserError: for a choice of another form, or a row that is not in the files.
    """
    if choices is None:
        return [(f"{row['run']}  (test {row['eval_loss']:.3f})", row) for row in rows if "eval_loss" in row]
    known = {row["row"]: row for row in rows if "row" in row}
    return [(label, known[number]) for label, number in labelled_rows(choices, known)]


def draw_curves(axes: Any, runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Training loss against tokens."""
    colours: dict[str, str] = {}
    for label, row in runs:
        tokens = np.array([int(key) for key in row["curve"]]) / 1e6
        loss = np.convolve(list(row["curve"].values()), np.ones(SMOOTHING) / SMOOTHING, mode="valid")
        style = "--" if row["run"].startswith("llama") else "-"
        new = label not in colours
        colour = colours.setdefault(label, f"C{len(colours) % 10}")
        axes.plot(tokens[SMOOTHING - 1 :], loss, style, color=colour, linewidth=1.2, label=label if new else None)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5)


def draw_copying(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Loss of the test set against that of copied tokens."""
    for name, marker in (("llama", "s"), ("doge", "o")):
        points = [(row["repeat_loss"], row["eval_loss"]) for row in rows if row["run"].startswith(name)]
        axes.plot(*zip(*points, strict=True), marker, markersize=5, alpha=0.7, label=name.capitalize())
    copied, loss = zip(*[(row["repeat_loss"], row["eval_loss"]) for row in rows], strict=True)
    axes.set_title(f"{len(rows)} runs, correlation {np.corrcoef(copied, loss)[0, 1]:.2f}", fontsize=9)
    axes.set_xlabel("loss on the second copy of random tokens")
    axes.set_ylabel("test loss at the end")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", nargs="+", metavar="LABEL=ROW")
    parser.add_argument("--copying", action="store_true")
    parser.add_argument("--losses", nargs=2, type=float, default=(3.0, 7.0), metavar=("LOW", "HIGH"))
    args = parser.parse_args()
    mpl.use("Agg")
    try:
        rows = [json.loads(line) for path in args.results for line in path.read_text(encoding="utf-8").splitlines()]
        runs = picked(rows, args.rows)
    except (OSError, UserError) as error:
        parser.error(str(error))
    figure, axes = plt.subplots(1, 1 + args.copying, figsize=(13, 5) if args.copying else (9, 5.4), squeeze=False)
    draw_curves(axes[0, 0], runs)
    axes[0, 0].set_ylim(*args.losses)
    if args.copying:
        draw_copying(axes[0, 1], [row for row in rows if "eval_loss" in row])
    figure.tight_layout()
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
