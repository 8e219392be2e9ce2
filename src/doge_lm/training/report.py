"""The curve of a run, drawn from its `train.jsonl`."""

from pathlib import Path
from typing import Any

from doge_lm.errors import UserError
from doge_lm.training.callbacks import read_log

CURVE_NAME = "curve.png"


def draw_curve(log: Path, picture: Path) -> Path:
    """Draw loss, learning rate, and bits per byte by source over the steps, as a PNG.

    Args:
        log: the `train.jsonl` of a run.
        picture: where the PNG goes.

    Returns:
        `picture`.

    Raises:
        UserError: if the log is missing or holds no step yet.
    """
    # Here and without pyplot: no window system is touched, and nothing else pays for the import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    records = read_log(log)
    train = [record for record in records if record["kind"] == "train"]
    tests = [record for record in records if record["kind"] == "eval"]
    if not train:
        raise UserError(f"{log} holds no training step yet, so there is no curve to draw")
    figure = Figure(figsize=(8, 9))
    FigureCanvasAgg(figure)
    # Margins by hand: to find them, matplotlib would draw everything several times.
    margins = {"left": 0.12, "right": 0.98, "bottom": 0.06, "top": 0.98, "hspace": 0.08}
    loss, rate, bits = figure.subplots(3, 1, sharex=True, gridspec_kw=margins)
    _line(loss, train, "loss", "training")
    _line(loss, tests, "eval_loss", "test", marker="o")
    loss.set_ylabel("loss, nats a token")
    _line(rate, train, "learning_rate", None)
    rate.set_ylabel("learning rate")
    for key in _bits_keys(tests):
        name = key.removeprefix("eval_").removesuffix("bits_per_byte").rstrip("_") or "all sources"
        _line(bits, tests, key, name, marker="o")
    bits.set_ylabel("test, bits per byte")
    bits.set_xlabel("step")
    for axes in (loss, bits):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    for axes in (loss, rate, bits):
        axes.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120, format="png")
    return picture


def _bits_keys(tests: list[dict[str, Any]]) -> list[str]:
    """The keys with bits per byte, the total first."""
    keys = {key for record in tests for key in record if key.endswith("bits_per_byte")}
    return sorted(keys, key=lambda key: (key != "eval_bits_per_byte", key))


def _line(axes: Any, records: list[dict[str, Any]], key: str, label: str | None, marker: str | None = None) -> None:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
