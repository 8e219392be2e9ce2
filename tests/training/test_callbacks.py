import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments

from doge_lm.errors import UserError
from doge_lm.training.callbacks import JsonLog, TensorBoardLog, read_log, rewind_log
from doge_lm.training.report import draw_curve


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def report(callback, steps, start=0):
    """Drive a callback as the Trainer does: begin at step `start`, then log each of `steps`."""
    args, control = TrainingArguments(output_dir="unused", report_to="none"), TrainerControl()
    state = TrainerState(global_step=start, is_world_process_zero=True, max_steps=10)
    callback.on_train_begin(args, state, control)
    for step in steps:
        state.global_step = step
        callback.on_log(args, state, control, logs={"loss": float(step)})
    callback.on_train_end(args, state, control)


def test_a_resumed_log_is_one_history(tmp_path):
    log = tmp_path / "train.jsonl"
    report(JsonLog(tmp_path, {"total_steps": 6}), [1, 2, 3, 4])
    report(JsonLog(tmp_path, {"total_steps": 6}), [3, 4, 5, 6], start=2)
    steps = [record["step"] for record in read_log(log) if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_resumed_tensorboard_is_one_history(tmp_path):
    report(TensorBoardLog(tmp_path), [1, 2, 3, 4])
    report(TensorBoardLog(tmp_path), [3, 4, 5], start=2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_an_unfinished_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    log = tmp_path / "train.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    assert read_log(log) == [{"step": 1}]
    log.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: not valid JSON"):
        read_log(log)


def test_rewinding_nothing_makes_nothing(tmp_path):
    rewind_log(tmp_path / "train.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_number_is_null_in_the_log(tmp_path):
    log = JsonLog(tmp_path, {"peak": math.inf})
    report(log, [1])
    assert read_log(tmp_path / "train.jsonl")[0]["peak"] is None


def test_the_curve_is_drawn_from_the_log_alone(tmp_path):
    log, picture = tmp_path / "train.jsonl", tmp_path / "deep" / "curve.png"
    train = [{"step": s, "kind": "train", "loss": 9 - s, "learning_rate": 0.1} for s in range(1, 5)]
    test = [{"step": 4, "kind": "eval", "eval_loss": 5.5, "eval_bits_per_byte": 3.0, "eval_a_bits_per_byte": None}]
    lines(log, [{"step": 0, "kind": "plan"}, *train])
    short = draw_curve(log, picture).read_bytes()
    lines(log, [{"step": 0, "kind": "plan"}, *train, *test])
    whole = draw_curve(log, picture).read_bytes()
    assert whole.startswith(b"\x89PNG")
    assert whole != short


def test_a_curve_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"does not exist"):
        draw_curve(tmp_path / "train.jsonl", tmp_path / "curve.png")
    lines(tmp_path / "train.jsonl", [{"step": 0, "kind": "plan"}])
    with pytest.raises(UserError, match=r"holds no training step"):
        draw_curve(tmp_path / "train.jsonl", tmp_path / "curve.png")
