"""Draw docs/figures/architecture.svg: a Doge layer, its attention and its mixture of experts.

python docs/figures/draw_architecture.py
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, PAPER = "#1f2933", "#ffffff"
BLUE, ORANGE, GREEN, GREY = "#d8e6f5", "#fbe3c8", "#d9efdb", "#eceff1"

Point = tuple[float, float]


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 2.6, height: float = 0.62) -> None:
    """A rounded box around (x, y)."""
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.12",
        facecolor=color,
        edgecolor=INK,
        linewidth=1.1,
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, start: Point, end: Point, bend: float = 0.0) -> None:
    """An arrow from start to end, bent by `bend`."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.1, connectionstyle=style
        )
    )


def skip(axes: Axes, x: float, low: float, high: float, side: float) -> None:
    """A residual connection around what lies between `low` and `high`."""
    axes.plot([x, x + side, x + side], [low, low, high], color=INK, linewidth=1.1)
    arrow(axes, (x + side, high), (x + 0.16 if side > 0 else x - 0.16, high))


def plus(axes: Axes, x: float, y: float) -> None:
    """The sum of a branch and the residual stream."""
    axes.text(
        x,
        y,
        "+",
        ha="center",
        va="center",
        fontsize=12,
        color=INK,
        bbox={"boxstyle": "circle,pad=0.12", "fc": PAPER, "ec": INK},
    )


def title(axes: Axes, x: float, text: str) -> None:
    """The heading of a column."""
    axes.text(x, 9.1, text, ha="center", va="center", fontsize=11.5, weight="bold", color=INK)


def draw_layer(axes: Axes, x: float) -> None:
    """One decoder layer and what stands around the stack."""
    title(axes, x, "Doge")
    box(axes, x, 0.5, "word_embed", GREY)
    box(axes, x, 2.0, "RMSNorm", BLUE)
    box(axes, x, 2.95, "Inner Function Attention", ORANGE, width=2.9, height=0.7)
    plus(axes, x, 3.85)
    box(axes, x, 4.8, "RMSNorm", BLUE)
    box(axes, x, 5.75, "Cross Domain MoE", GREEN, height=0.7)
    plus(axes, x, 6.65)
    box(axes, x, 7.55, "RMSNorm", BLUE)
    box(axes, x, 8.4, "lm_head", GREY)
    for low, high in (
        (0.81, 1.69),
        (2.31, 2.6),
        (3.3, 3.68),
        (4.02, 4.49),
        (5.11, 5.4),
        (6.1, 6.48),
        (6.82, 7.24),
        (7.86, 8.09),
    ):
        arrow(axes, (x, low), (x, high))
    skip(axes, x, 1.3, 3.85, 1.65)
    skip(axes, x, 4.2, 6.65, 1.65)
    axes.plot([x - 1.75, x - 1.85, x - 1.85, x - 1.75], [1.45, 1.45, 6.95, 6.95], color=INK, linewidth=1.1)
    axes.text(x - 2.1, 4.2, "× layers", rotation=90, ha="center", va="center", fontsize=9.5, color=INK)


def draw_attention(axes: Axes, x: float) -> None:
    """Inner Function Attention: keys and queries as usual, the value chosen."""
    title(axes, x, "Inner Function Attention")
    box(axes, x, 0.5, "x", GREY, width=1.2)
    for column, names in ((-2.0, ("W_q", "RoPE")), (-0.4, ("W_k", "RoPE"))):
        box(axes, x + column, 2.0, names[0], BLUE, width=1.2)
        box(axes, x + column, 3.2, names[1], BLUE, width=1.2)
        arrow(axes, (x, 0.81), (x + column, 1.69))
        arrow(axes, (x + column, 2.31), (x + column, 2.89))
    box(axes, x + 1.7, 2.0, "s = K_v (W_s x)", ORANGE, width=2.2)
    box(axes, x + 1.7, 3.2, "j = argmax s", ORANGE, width=2.2)
    box(axes, x + 1.7, 4.4, "v = x ⊙ E[j]", ORANGE, width=2.2)
    arrow(axes, (x, 0.81), (x + 1.7, 1.69))
    arrow(axes, (x + 1.7, 2.31), (x + 1.7, 2.89))
    arrow(axes, (x + 1.7, 3.51), (x + 1.7, 4.09))
    axes.plot([x + 0.6, x + 3.0, x + 3.0], [0.5, 0.5, 4.4], color=INK, linewidth=1.1)
    arrow(axes, (x + 3.0, 4.4), (x + 2.82, 4.4))
    box(axes, x - 0.2, 5.8, "softmax(q kᵀ / √d_h + mask) v", BLUE, width=4.4)
    arrow(axes, (x - 2.0, 3.51), (x - 1.6, 5.47))
    arrow(axes, (x - 0.4, 3.51), (x - 0.3, 5.47))
    arrow(axes, (x + 1.7, 4.71), (x + 1.2, 5.47))
    box(axes, x - 0.2, 7.2, "W_o", BLUE, width=1.6)
    arrow(axes, (x - 0.2, 6.11), (x - 0.2, 6.89))
    arrow(axes, (x - 0.2, 7.51), (x - 0.2, 8.3))
    note = "no value matrix: one of n vectors scales the input;\nthe choice trains through softmax(s)"
    axes.text(x - 0.2, 8.55, note, ha="center", va="center", fontsize=8.2, color=INK)


def draw_experts(axes: Axes, x: float) -> None:
    """The mixture of experts: a shared part, product keys, single-neuron experts."""
    title(axes, x, "Cross Domain Mixture of Experts")
    box(axes, x, 0.5, "x", GREY, width=1.2)
    box(axes, x, 1.7, "c = W_down σ(W_up x)     (shared)", BLUE, width=4.4)
    arrow(axes, (x, 0.81), (x, 1.39))
    box(axes, x - 1.3, 3.0, "query, two halves", GREEN, width=2.4)
    arrow(axes, (x - 1.0, 2.01), (x - 1.2, 2.69))
    for column, label in ((-2.25, "keys, n1 rows"), (-0.2, "keys, n2 rows")):
        box(axes, x + column, 4.2, label, GREEN, width=1.85)
        arrow(axes, (x - 1.3, 3.31), (x + column, 3.89))
        arrow(axes, (x + column, 4.51), (x - 1.2, 5.07))
    box(axes, x - 1.1, 5.4, "k best of n1·n2, exactly;  w = softmax", GREEN, width=4.5)
    arrow(axes, (x - 1.2, 5.71), (x - 0.5, 6.54))
    box(axes, x, 6.9, "Σ σ(w · (c · D[expert])) U[expert]", ORANGE, width=4.4, height=0.7)
    axes.plot([x + 1.75, x + 1.75], [2.01, 6.2], color=INK, linewidth=1.1)
    arrow(axes, (x + 1.75, 6.2), (x + 1.2, 6.54))
    axes.text(x + 1.9, 4.2, "c", fontsize=10, style="italic", color=INK)
    arrow(axes, (x, 7.25), (x, 8.3))
    note = "an expert is one row of D (e numbers) and one of U (d numbers)"
    axes.text(x, 8.55, note, ha="center", va="center", fontsize=8.2, color=INK)


def main() -> None:
    """Write the figure beside this file."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "doge"  # the same file for the same drawing
    figure, axes = plt.subplots(figsize=(13.8, 7.2))
    figure.patch.set_facecolor(PAPER)
    draw_layer(axes, 1.9)
    draw_attention(axes, 7.0)
    draw_experts(axes, 13.9)
    axes.set_xlim(-0.6, 16.6)
    axes.set_ylim(0, 9.4)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(
        Path(__file__).with_name("architecture.svg"), bbox_inches="tight", metadata={"Date": None}, facecolor=PAPER
    )


if __name__ == "__main__":
    main()
