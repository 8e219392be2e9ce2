"""What a run reports: one consistent history in `train.jsonl`, TensorBoard, and a progress bar.

A line of `train.jsonl` is one JSON object with a `kind`:

- `plan`: the numbers of the plan, when a run starts or is resumed;
- `train`: loss (over the steps since the line before), learning_rate, grad_norm, tokens_per_second, mfu,
  tokens_seen, targets_seen; of a stream also stream_epoch (passes over its text that are done) and stream_skipped (bad
  rows that were left out, up to the block that the step has come to);
- `eval`: eval_loss, eval_perplexity, eval_bits_per_byte, and by source `eval_SOURCE_loss` and so on.

Every line has `step` and `epoch`. When a run is resumed at step s, lines of later steps are dropped first, so that
the file reads like that of a run without interruption.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from doge_lm.errors import UserError

LOG_NAME = "train.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `train.jsonl`. A last line that a killed run left unfinished is left out.

    Raises:
        UserError: for a missing file, or a line before the last that is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the --logging_dir of a run") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no newline after it: it was being written
                break
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
    return records


def holds_training(path: Path) -> bool:
    """Whether a `train.jsonl`, which may be damaged, has a line of training."""
    return path.exists() and '"kind": "train"' in path.read_text(encoding="utf-8", errors="replace")


def rewind_log(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, in one rename. A missing file stays missing."""
    if not path.exists():
        return
    kept = [record for record in read_log(path) if record["step"] <= step]
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN or infinity: they are written as null.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def kind_of(logs: dict[str, float]) -> str | None:
    """The kind of a report of transformers' Trainer: "train", "eval", or None for its summary at the end."""
    if "eval_loss" in logs:
        return "eval"
    return "train" if "loss" in logs else None


class StepSchedule(TrainerCallback):
    """Closes the logging interval at every evaluation and checkpoint, and counts epochs as the plan does.

    So a resumed run's first interval begins where the uninterrupted run's did, and the time of an evaluation or a
    checkpoint falls between two intervals, in neither.
    """

    def __init__(self, steps_per_epoch: int):
        self.steps_per_epoch = steps_per_epoch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the intervals from the settings: a checkpoint brings its own, which may be others."""
        state.logging_steps, state.eval_steps, state.save_steps = args.logging_steps, args.eval_steps, args.save_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log line wherever something else happens."""
        state.epoch = state.global_step / self.steps_per_epoch
        if control.should_evaluate or control.should_save or control.should_training_stop:
            control.should_log = True


class JsonLog(TrainerCallback):
    """Appends to `train.jsonl`, on the main process."""

    def __init__(self, logging_dir: Path, plan: dict[str, Any]):
        self.path = logging_dir / LOG_NAME
        self.plan = plan
        self._file: IO[str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the file, rewound to the step where training starts."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rewind_log(self.path, state.global_step)
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
            self._write(state, {"kind": "plan", **self.plan})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        kind = kind_of(logs or {})
        if self._file is not None and kind is not None:
            self._write(state, {"kind": kind, **(logs or {})})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, state: TrainerState, record: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(_line({"step": state.global_step, "time": round(time.time(), 3), **record}))
        self._file.flush()


class TensorBoardLog(TrainerCallback):
    """Writes the same numbers for TensorBoard, on the main process."""

    def __init__(self, logging_dir: Path):
        self.logging_dir = logging_dir
        self._writer: SummaryWriter | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a file of events; those of steps that are done again are hidden."""
        if state.is_world_process_zero:
            self._writer = SummaryWriter(str(self.logging_dir), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write each number under `train/` or `eval/`."""
        kind = kind_of(logs or {})
        if self._writer is None or kind is None:
            return
        for key, value in (logs or {}).items():
            self._writer.add_scalar(f"{kind}/{key.removeprefix('eval_')}", value, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ProgressBar(TrainerCallback):
    """A bar on standard error with the last numbers beside it, and a line for every evaluation and checkpoint.

    Where standard error is no terminal but a file or a pipe, there is a line for every log in place of the bar.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar where training starts."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the last numbers."""
        logs = logs or {}
        if self._bar is None:
            return
        if kind_of(logs) == "train":
            numbers = f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,.0f} tokens/s, MFU {logs['mfu']:.1%}"
            self._bar.set_postfix_str(numbers, refresh=False)
            if self._bar.disable:
                print(f"step {state.global_step:,} of {state.max_steps:,}: {numbers}", flush=True)
        elif kind_of(logs) == "eval":
            if "eval_bits_per_byte" in logs:
                more = f"{logs['eval_bits_per_byte']:.4f} bits per byte"
            else:  # of preference tuning
                more = f"margin {logs['eval_rewards/margins']:.4f}"
                if state.global_step:  # before the first step neither answer of any pair is ahead
                    more += f", the better answer is ahead in {logs['eval_rewards/accuracies']:.1%}"
            self._bar.write(f"step {state.global_step:,}: test loss {logs['eval_loss']:.4f}, {more}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say where the checkpoint is."""
        if self._bar is not None:
            self._bar.write(
                f"step {state.global_step:,}: saved {Path(args.output_dir) / f'checkpoint-{state.global_step}'}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
