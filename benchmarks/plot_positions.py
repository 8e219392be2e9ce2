"""Draw whether a model copies: its loss on the second copy of random tokens, by the position in the copy.

    python benchmarks/plot_positions.py OUT.png [--results DIR] LABEL=ROW [LABEL=ROW …]

Rows are numbered as in docs/log.md; `repeat_curve` of each holds sixteenths of the copy. A LABEL may stand at several
rows, one a seed: their mean is drawn.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from plot_causes import labelled_rows, read_records

from doge_lm.errors import UserError

COPIED = 256  # tokens of the copy: `repeat_losses` of quality.py


def labelled_curves(choices: list[str], records: dict[Any, dict[str, Any]]) -> dict[str, list[list[float]]]:
    """The curves of each label.

    Raises:
        UserError: for a choice of another form, or a row without a curve.
    """
    with_curves = {row: record["repeat_curve"] for row, record in records.items() if "repeat_curve" in record}
    curves: dict[str, list[list[float]]] = {}
    for label, row in labelled_rows(choices, with_curves):
        curves.setdefault(label, []).append(with_curves[row])
    return curves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("rows", nargs="+", metavar="LABEL=ROW")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    mpl.use("Agg")
    try:
        curves = labelled_curves(args.rows, read_records(args.results))
    except UserError as error:
        parser.error(str(error))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for label, each in curves.items():
        mean = [statistics.fmean(part) for part in zip(*each, strict=True)]
        middles = [(index + 0.5) * COPIED / len(mean) for index in range(len(mean))]
        axes.plot(middles, mean, "--o" if "Llama" in label else "-o", markersize=4, linewidth=1.2, label=label)
    axes.set_xlabel("position in the second copy of 256 random tokens")
    axes.set_ylabel("loss, nats a token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
