"""`benchmarks/recall.py`: the rows are the task they claim to be, and a model can learn it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from doge_lm.errors import UserError
from tests.benchmarks.conftest import Command

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import recall  # noqa: E402


@pytest.mark.parametrize("task", [recall.Task(64, 16), recall.Task(256, 16)])  # no room left, and much of it
def test_rows_are_pairs_and_then_each_key_once_more(task: recall.Task) -> None:
    length, pairs = task
    batch = recall.draw_batch(task, 50, torch.Generator().manual_seed(1))
    assert batch.ids.shape == (50, length)
    half = recall.VOCABULARY // 2
    for ids, positions, values in zip(*(x.tolist() for x in batch), strict=True):
        beside = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(beside) == len(set(beside.values())) == pairs
        assert max(beside) < half <= min(beside.values())
        assert len(set(positions)) == pairs
        assert min(positions) >= 2 * pairs
        assert max(positions) < length
        assert {ids[position] for position in positions} == beside.keys()
        assert [beside[ids[position]] for position in positions] == values


def test_queries_come_sooner_more_often_and_in_any_order() -> None:
    task = recall.Task(256, 16)
    batch = recall.draw_batch(task, 2000, torch.Generator().manual_seed(2))
    slots = (batch.positions - 32) // 2
    counts = slots.flatten().bincount(minlength=112)
    # Without repetition the first slots are nearly always taken; behind them by about 1/slot.
    assert counts[0] > 3 * counts[20] > 6 * counts[80] > 0
    # Whichever pair comes first in the row, its query may stand anywhere: means of 2,000 draws.
    means = slots.float().mean(0)
    assert float(means.std()) < 3 * float(slots.float().std()) / 2000**0.5


def test_batches_differ_and_repeat_by_their_seed() -> None:
    one, two = (recall.draw_batch(recall.Task(64, 8), 4, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    again = recall.draw_batch(recall.Task(64, 8), 4, torch.Generator().manual_seed(1))
    assert not torch.equal(one.ids, two.ids)
    assert torch.equal(one.ids, again.ids)


@pytest.mark.parametrize("text", ["512", "x64", "512x0", "ax4"])
def test_what_is_no_task(text: str) -> None:
    with pytest.raises(UserError, match="expected TxP"):
        recall.parse_task(text)


@pytest.mark.parametrize(("text", "what"), [("64x17", "at least 4 tokens a pair: 68"), ("99x2", "must be even")])
def test_tasks_that_do_not_fit(text: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        recall.parse_task(text)


def test_a_vocabulary_is_halved(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = recall.draw_batch(recall.Task(64, 8), 20, torch.Generator().manual_seed(1), vocabulary=32)
    assert 16 <= int(batch.values.min()) <= int(batch.values.max()) < 32
    assert int(batch.ids.max()) < 32
    with pytest.raises(UserError, match="there are 4 keys, half of --vocabulary"):
        recall.parse_task("64x8", vocabulary=8)
    for rate in ("-1", "0", "nan", "x"):
        monkeypatch.setattr(sys, "argv", ["recall.py", "doge", "--output_dir", "out", f"--rates={rate}"])
        with pytest.raises(SystemExit) as ended:
            recall.main()
        assert ended.value.code == 2
        assert f"{rate!r} is no number above 0" in capsys.readouterr().err


def test_the_best_rate_is_that_of_the_mean() -> None:
    figures = [(1e-3, 0.2), (1e-3, 0.9), (3e-3, 0.6), (3e-3, 0.7)]
    rows = [{"task": "64x8", "rate": rate, "accuracy": accuracy} for rate, accuracy in figures]
    mean, spread, rate = recall.best_by_task(rows)["64x8"]
    assert (round(mean, 6), rate) == (0.65, 3e-3)
    assert abs(spread - 0.1 / 2**0.5) < 1e-9


def test_a_model_that_knows_is_found_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that single out the values at the queries give accuracy 1 and a low loss; others do not."""
    task = recall.Task(32, 4)
    batch = recall.draw_batch(task, 3, torch.Generator().manual_seed(3))
    hidden = torch.zeros(3, 32, recall.VOCABULARY)
    hidden.scatter_(1, batch.positions[..., None].expand(-1, -1, recall.VOCABULARY), 0.0)
    for row in range(3):
        hidden[row, batch.positions[row], batch.values[row]] = 20.0

    class Knowing(torch.nn.Module):
        logits = torch.nn.Identity()

        def model(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return type("Output", (), {"last_hidden_state": hidden})()

    loss, right = recall.Recall(Knowing())(*batch)
    assert right == 1.0
    assert loss < 1e-3
    loss, right = recall.Recall(Knowing())(batch.ids, batch.positions, batch.values.roll(1, 1))
    assert right == 0.0
    assert loss > 10


def test_a_small_run_writes_its_rows_and_learns(command: Command, tmp_path: Path) -> None:
    models = ["doge:qk_norm=true,key_shift=true", "llama@qk_norm"]
    sizes = ["--rates", "3e-2", "--steps", "60", "--tokens", "512", "--hidden_size", "32"]
    command(recall, "--output_dir", str(tmp_path), "--tasks", "16x2", "16x4", *sizes, *models)
    rows = [json.loads(line) for line in (tmp_path / "recall.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["model"], row["task"]) for row in rows] == [(m, t) for m in models for t in ("16x2", "16x4")]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    # Below what 8,192 tokens alike would give, ln 8192: so few steps teach at least which of them are values.
    assert all(row["loss"] < 9.01 for row in rows), rows
    # The Llama is as large as the Doge without its changes.
    doge, llama = rows[0]["parameters"], rows[-1]["parameters"]
    assert abs(doge - 2 * 32 - 2 * 2 * 32 - llama) / llama < 0.01
