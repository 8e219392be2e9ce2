"""Draw one cause a panel: the test losses of the rows that differ in it alone.

    python benchmarks/plot_causes.py OUT.png [--results DIR]

Rows are numbered as in docs/log.md, and read from the files of results (`row` of each line); those of "Where the inner
values start" in RESULTS.md are a1 to a10. Losses compare within a panel, and there within a group of one colour.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt

from doge_lm.errors import UserError

COLUMNS = 3
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")

Row = int | str


class Panel(NamedTuple):
    """A cause: groups of settings that compare with each other, each setting with its rows, one a seed."""

    title: str
    groups: tuple[dict[str, tuple[Row, ...]], ...]


PANELS = (
    Panel(
        "Where the inner values start",
        ({"1 + N(0, 0.02)": ("a1", "a6"), "N(0, 0.02), as published": ("a2", "a7")},),
    ),
    Panel(
        "The router collapses",
        ({"as published": (1,), "queries normed": (2,), "and 4 heads of 4 experts": (3,)},),
    ),
    Panel(
        "Norms of queries and keys",
        (
            {"Llama": (6,), "Llama, normed": (9,)},
            {"Doge, 4 heads of 4": (3,), "the same, normed": (10,)},
        ),
    ),
    Panel(
        "Experts behind the shared part, or beside it",
        (
            {"behind, 4 heads of 4": (18,), "and added to it": (24,), "beside": (21, 22)},
            {"behind, 1 head of 2": (19,), "beside": (23,), "no experts": (13, 14)},
        ),
    ),
    Panel(
        "Weights inside the activation, or outside",
        ({"inside, 4 heads of 4": (10,), "outside": (18,)}, {"inside, 1 head of 2": (20,), "outside": (19,)}),
    ),
    Panel(
        "SiLU or SwiGLU in the shared part",
        ({"SiLU, no experts": (13, 14), "SwiGLU": (17, 27, 28)}, {"SiLU, experts beside": (40,), "SwiGLU": (35, 36)}),
    ),
    Panel(
        "A linear value or the inner one",
        (
            {"linear, SiLU": (15, 16), "inner": (13, 14)},
            {"Llama, shifted keys": (70, 71), "Doge, no experts": (75, 76), "and the rest on the MLP": (80,)},
        ),
    ),
    Panel(
        "Inner values to choose from",
        (
            {"1, shifted keys": (81,), "2": (80,)},
            {"2": (48,), "8": (50,), "32": (51,)},
        ),
    ),
    Panel(
        "What a head sees",
        (
            {"2 heads, AdamW": (80,), "4 heads": (83,)},
            {"no matrix, Muon": (87,), "and one of rank 64": (100,), "gated output": (91,)},
        ),
    ),
    Panel(
        "More experts, more choices",
        (
            {"2 of 256": (35, 36), "2 of 512": (41,), "4 times 4 of 512": (42,)},
            {"2 of 256, cosine to 0": (54,), "2 of 768": (58,)},
        ),
    ),
    Panel(
        "Rate of the experts' tables",
        (
            {"a third": (57,), "as the rest": (54,), "3 times": (56,)},
            {"AdamW, tied, 30M tokens": (145,), "Muon": (151,)},
        ),
    ),
    Panel(
        "AdamW's learning rate",
        (
            {"Llama 3e-3": (29,), "6e-3": (39, 25, 26), "1e-2": (30,), "1.5e-2": (31,)},
            {"Doge, no experts 3e-3": (32,), "6e-3": (17, 27, 28), "1e-2": (33, 37, 38), "1.5e-2": (34,)},
        ),
    ),
    Panel(
        "Keys that see the token before",
        (
            {"Llama, AdamW, σ 0.3": (90,), "shifted, σ 1": (70, 71)},
            {"Llama, Muon, σ 0.3": (99,), "shifted, σ 1": (101,)},
            {"Doge, Muon, σ 0.3": (88,), "shifted, σ 1": (87,)},
        ),
    ),
    Panel(
        "Rate of the vocabulary's tables, with Muon",
        (
            {"Llama 1e-2": (99,), "3e-2": (109,), "3e-2, input 9e-2": (114,), "3e-2, input 0.3": (115,)},
            {"Doge, decay 0.01 3e-3": (102,), "1e-2": (87,)},
            {"Doge, both shifts 1e-2": (95,), "3e-2": (106,), "1e-2, input 3e-2": (110,), "1e-2, input 0.1": (117,)},
        ),
    ),
    Panel(
        "Weight decay, with Muon",
        (
            {"Llama 0.01": (85,), "0.1": (99,), "0.3": (105,)},
            {"Doge, both shifts 0.01": (96,), "0.1": (95,), "0.3": (104,)},
        ),
    ),
    Panel(
        "Tied tables, 30M tokens: rate",
        (
            {"Llama 1e-2": (140,), "3e-2": (141,), "6e-2": (147,)},
            {"Doge 3e-3": (133,), "1e-2": (127,), "3e-2": (129,), "6e-2": (148,)},
        ),
    ),
    Panel(
        "Tied tables, 30M tokens: layers",
        (
            {"Llama 8": (141,), "16": (153,)},
            {"Doge 8": (127,), "12": (135,), "16": (131,)},
        ),
    ),
    Panel(
        "Tied, 30M: sequences of a step",
        (
            {"Llama 64": (141,), "32": (158,), "16": (174,)},
            {"Doge, no experts 64": (129,), "32": (159,)},
            {"Doge, skips 32": (178,), "16": (175,)},
        ),
    ),
    Panel(
        "Tied, 30M: where the cosine ends",
        ({"Llama 0.1": (158,), "0": (184,)}, {"Doge 0.1": (178,), "0": (185,)}),
    ),
    Panel(
        "Tied, 30M: width",
        (
            {"Llama 256": (184,), "384": (194,), "512, 4 layers": (191,)},
            {"Doge, no experts 256": (129,), "384": (162,)},
            {"Doge, skips 384": (192,), "384, 6 layers": (193,), "512, 6 layers": (190,)},
        ),
    ),
    Panel(
        "Tied, 30M: attention's input shifted",
        (
            {"no experts": (129,), "shifted": (144,), "in the keys' place": (168,)},
            {"experts": (145,), "shifted": (160,)},
        ),
    ),
    Panel(
        "Tied, 30M: skips",
        (
            {"none, no experts": (144,), "from the embedding": (169,)},
            {"from the embedding, experts": (178,), "from all layers": (179,)},
            {"from all layers, d = 384": (192, 207), "gains by the token": (208,), "into feed-forwards": (209,)},
        ),
    ),
    Panel(
        "Tied, d = 384: what values are made of",
        (
            {"a linear map, 30M": (213,), "the input": (192, 207), "the first too": (227,), "all before": (211,)},
            {"the input, 60M": (189, 200), "all before": (223,)},
            {"the input, no experts, 60M": (202,), "all before": (222,)},
        ),
    ),
    Panel(
        "Tied, d = 384, 60M: recipe",
        (
            {"Llama, decay 0.025": (224,), "0.05": (204, 225), "0.1": (205,), "64 sequences": (206,)},
            {"Doge, decay 0.05": (189, 200), "0.1": (201,), "64 sequences": (203,)},
        ),
    ),
    Panel(
        "Tied, d = 384, 30M: AdamW's rate of the rest",
        (
            {
                "as the table": (192, 207),
                "experts 0.1": (219,),
                "norms, gains, values 0.1": (218,),
            },
        ),
    ),
    Panel(
        "Tied, d = 384: the best of both, weight decay",
        (
            {
                "Llama, 60M 0.05": (230, 231, 232),
                "300M 0.05": (274,),
                "300M 0.1": (279, 299, 301),
                "300M 0.2": (287,),
            },
            {
                "Doge, no experts, 60M 0.05": (233, 234, 235),
                "300M 0.05": (275,),
                "300M 0.1": (280, 300, 302),
                "300M 0.2": (288,),
            },
        ),
    ),
    Panel(
        "Tied, 30M: Llama's rates, times",
        ({"1/4": (239,), "1/2": (240,), "0.7": (241,), "1": (286,), "1.4": (242,), "2": (243,), "4": (244,)},),
    ),
    Panel(
        "Tied, 30M: Doge's rates, times",
        ({"1/4": (245,), "1/2": (246,), "0.7": (247,), "1": (284,), "1.4": (248,), "2": (249,), "4": (250,)},),
    ),
    Panel(
        "Tied, d = 384, 30M: σ of the table at the start",
        (
            {"Llama 0.005": (296,), "0.01": (292,), "0.02": (286,), "0.05": (291,), "0.02, 6 heads": (290,)},
            {
                "Doge, no experts 0.02": (263,),
                "0.05": (284, 251),
                "matrices N(0, 0.05)": (262,),
                "all N(0, 0.02)": (306,),
            },
        ),
    ),
    Panel(
        "Tied, d = 384, 60M: the best of both",
        (
            {
                "Llama σ 0.02": (230, 231, 232),
                "σ 0.01": (293, 294, 295),
                "12 layers": (332,),
                "AdamW": (371,),
                "capped at 15": (348, 350, 352),
            },
            {
                "Doge, linear value": (289, 297, 298),
                "Doge, no experts": (233, 234, 235),
                "all N(0, 0.02)": (309, 310, 311),
                "12 layers": (333,),
                "AdamW": (376,),
                "capped at 15": (349, 351, 353),
                "capped, linear value": (383, 384, 385),
                "two of 256 experts": (236, 237, 238),
                "no experts, 49.5M": (276, 277, 278),
            },
        ),
    ),
    Panel(
        "Tied, d = 384, 30M: one option less",
        (
            {
                "all": (284, 251),
                "no qk_norm": (255,),
                "a linear value": (252,),
                "no value_residual": (259,),
                "no shared_gate": (261,),
                "no key_shift": (256,),
                "no attention_shift": (257,),
                "r = 128": (254,),
                "one inner value": (253,),
                "no feed_forward_shift": (258,),
                "no dense_skips": (260,),
                "values mixed": (340,),
            },
        ),
    ),
    Panel(
        "Tied, d = 384: experts at equal work",
        (
            {
                "no experts": (284, 251),
                "8 of 256, 30M": (264,),
                "8 of 1,024": (265,),
                "8 of 4,096": (266,),
                "8 of 16,384": (267,),
                "8 of 65,536": (313,),
            },
            {"Llama, 60M": (303,), "two of 256": (236, 237, 238)},
        ),
    ),
    Panel(
        "Tied, d = 384, 30M: the recipe",
        (
            {
                "as it is": (284, 251),
                "decay 0.01": (320,),
                "decay 0.1": (321,),
                "64 sequences": (322,),
                "cosine to 0.1": (323,),
                "β2 0.999": (324,),
                "AdamW": (325,),
            },
            {"as it is": (284, 251), "values, shares without decay": (330,)},
            {"two of 256": (307,), "without their decay": (331,)},
        ),
    ),
    Panel(
        "Tied, d = 384, 30M: a cap of logits",
        (
            {"Llama": (286,), "30": (338,), "15": (336,), "10": (356,)},
            {"Doge, no experts": (284, 251), "30": (339,), "15": (337,), "10": (357,)},
        ),
    ),
    Panel(
        "Tied, d = 384, 60M: AdamW alone, rates",
        (
            {"Llama 1e-3": (369,), "2e-3": (370,), "3e-3": (371,), "5e-3": (342,), "7e-3": (372,), "1e-2": (343,)},
            {"Doge, no experts 2e-3": (374,), "3e-3": (375,), "5e-3": (376,)},
            {"Llama 3e-3, decay 0.1": (373,)},
        ),
    ),
    Panel(
        "Capped at 15",
        (
            {"Llama, T = 2,048": (363, 366, 368), "doge2_25M, T = 2,048": (362, 365, 367)},
            {"Llama, 120M": (377, 379, 381), "Doge, no experts, 120M": (378, 380, 382)},
            {
                "Llama, 300M": (354, 388),
                "248M": (392,),
                "Doge, no experts, 300M": (355, 389),
                "248M, in Llama's time": (364, 393),
            },
            {"Llama of 80M, 60M": (386,), "Doge": (387,)},
        ),
    ),
    Panel(
        "30M: rates of keys, of inner values",
        (
            {"keys 0.3 times": (358,), "as the rest": (307,), "3 times": (359,)},
            {"inner values 0.3 times": (360,), "as the rest": (284, 251), "3 times": (361,)},
        ),
    ),
    Panel(
        "Tied, 30M: shape and start, best recipe",
        (
            {
                "Llama": (286,),
                "12 layers": (318,),
                "16 of d = 256": (319,),
                "matrices N(0, 0.02)": (317,),
            },
            {
                "Doge, no experts": (284, 251),
                "d = 256": (326,),
                "6 heads": (327,),
                "inner values N(0, 0.02)": (328,),
            },
            {"one table, d = 256": (159,), "two": (329,)},
        ),
    ),
    Panel(
        "30M: how the inner value is chosen",
        ({"hard": (284, 251), "soft": (315,), "soft, then hard": (316,)},),
    ),
    Panel(
        "Tied, 30M: balance, and rank of the experts' sums",
        (
            {"two of 256, rank 3 to 12": (307,), "balanced, 5 to 55": (308,)},
            {"8 of 4,096": (266,), "balanced, 48 to 113": (312,)},
        ),
    ),
    Panel(
        "Longer runs, longer rows, larger models",
        (
            {"Llama, 120M": (304,), "Doge, linear value": (314,), "inner value": (305,)},
            {"Llama, 300M": (279,), "Doge, linear value": (345,), "inner value": (280,)},
            {"Llama, 30M, T = 2,048": (268, 270), "Doge": (269, 271)},
            {"Llama of 80M, 30M": (272,), "Doge": (273,)},
        ),
    ),
    Panel(
        "What two of 256 experts cost",
        (
            {"no experts": (95,), "experts": (111,)},
            {"no experts, tied, 30M": (129,), "experts": (145,)},
            {
                "no experts, skips, 30M": (180,),
                "256 experts": (178,),
                "64 experts": (181,),
                "no experts, d = 384, 60M": (202,),
                "256 experts, 60M": (189, 200),
            },
        ),
    ),
)


def read_records(folder: Path) -> dict[Row, dict[str, Any]]:
    """The figures of each numbered row that was finished.

    Raises:
        UserError: if there is none.
        ValueError: if two rows have one number.
    """
    records: dict[Row, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record: dict[str, Any] = json.loads(line)
            if "row" not in record or "eval_loss" not in record:
                continue
            if record["row"] in records:
                raise ValueError(f"{path}: there are two rows {record['row']}")
            records[record["row"]] = record
    if not records:
        raise UserError(f"{folder} has no record of a row, in files *.jsonl")
    return records


def labelled_rows(choices: Sequence[str], known: Container[Row]) -> list[tuple[str, int]]:
    """Choices of the form LABEL=ROW, as labels and numbers.

    Raises:
        UserError: for a choice of another form, or a row that is not known.
    """
    found = []
    for choice in choices:
        label, _, number = choice.rpartition("=")
        if not (label and number.isdecimal()):
            raise UserError(f"{choice!r}: expected LABEL=ROW, with the number of a row in docs/log.md")
        if int(number) not in known:
            raise UserError(f"{choice!r}: there is no record of row {number}")
        found.append((label, int(number)))
    return found


def settings_of(panel: Panel) -> int:
    """How many settings a panel has, each a line of it."""
    return sum(map(len, panel.groups))


def draw_panel(axes: Any, panel: Panel, losses: dict[Row, float]) -> None:
    """A line for each setting from above, with a point for each seed."""
    labels: list[str] = []
    for colour, group in zip(itertools.cycle(COLOURS), panel.groups, strict=False):
        for label, rows in group.items():
            found = [losses[row] for row in rows]
            axes.plot(found, [len(labels)] * len(found), "o", color=colour, markersize=5, alpha=0.8)
            beside = max(found), len(labels)
            axes.annotate(f"{statistics.fmean(found):.3f}", beside, (6, -3), textcoords="offset points", fontsize=7)
            labels.append(f"{label}  [{', '.join(map(str, rows))}]")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.15)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(alpha=0.3)
    axes.set_title(panel.title, fontsize=9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    mpl.use("Agg")
    try:
        losses = {row: record["eval_loss"] for row, record in read_records(args.results).items()}
        for row in (row for panel in PANELS for group in panel.groups for rows in group.values() for row in rows):
            if row not in losses:
                raise UserError(f"{args.results} has no finished row {row}, which a panel names")
    except UserError as error:
        parser.error(str(error))
    heights = [1.0 + 0.17 * max(map(settings_of, PANELS[at : at + COLUMNS])) for at in range(0, len(PANELS), COLUMNS)]
    figure, axes = plt.subplots(
        len(heights), COLUMNS, figsize=(14, sum(heights)), height_ratios=heights, layout="constrained"
    )
    for each, panel in zip(axes.flat, PANELS, strict=False):
        draw_panel(each, panel, losses)
    for unused in axes.flat[len(PANELS) :]:
        unused.remove()
    figure.supxlabel("test loss, nats a token; rows of docs/log.md in brackets", fontsize=9)
    figure.savefig(args.picture, dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
