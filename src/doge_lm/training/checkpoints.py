"""Checkpoints that are whole or not there, and the record that says what a run must keep to be resumed.

`OUTPUT/checkpoint-N` appears by a rename, after everything in it was written and flushed under `OUTPUT/.tmp-…`;
it disappears the same way. So whenever a run is killed, what stands under a checkpoint's name can be resumed.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from doge_lm.errors import UserError
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.training.settings import ModelSettings

RECORD_NAME = "run.json"
STAGING_PREFIX = ".tmp-"
_NAME = re.compile(r"checkpoint-(\d+)")
_REQUIRED = ("config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", RECORD_NAME)

# Settings that may differ when a run is resumed: they change neither the data, nor its order, nor what is learned
# from it but for rounding.
_FREE = {
    "train": {
        "dataset_path",
        "sequences_per_step",  # compared as worked out, in the record's `sequences_per_step`
        "per_device_train_batch_size",
        "accumulate_steps",
        "per_epoch_max_steps",  # compared as worked out, in `steps_per_epoch`
        "bf16",  # compared as worked out
        "torch_compile",
        "attn_implementation",
        "gradient_checkpointing",
        "dataloader_num_workers",
        "logging_steps",
        "eval_steps",
        "per_device_eval_batch_size",
        "save_steps",
        "save_total_limit",
    },
    "model": {"use_cache", "cdmoe_path"},
}


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint remembers of its run. `step`, `tokens_seen` and `targets_seen` are its progress."""

    settings: dict[str, dict[str, Any]]
    sequences_per_step: int
    steps_per_epoch: int
    bf16: bool
    rows: int
    data_sha256: str
    tokenizer_sha256: str
    step: int = 0
    tokens_seen: int = 0
    targets_seen: int = 0

    def write(self, directory: Path) -> None:
        """Write `run.json` into a checkpoint."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n"
        (directory / RECORD_NAME).write_text(text, encoding="utf-8", newline="\n")

    @classmethod
    def read(cls, checkpoint: Path) -> "RunRecord":
        """Read `run.json` of a checkpoint.

        Raises:
            UserError: if it is not what this version of doge-lm writes.
        """
        path = checkpoint / RECORD_NAME
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not a record that this version of doge-lm writes ({error})") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(request: str, output_dir: Path) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        request: the path of a checkpoint, or "" for the last whole one in `output_dir`.
        output_dir: directory of the run.

    Raises:
        UserError: if there is none, or it lacks files.
    """
    if request:
        checkpoint = Path(request)
        if not checkpoint.is_dir():
            raise UserError(f"--resume_from_checkpoint {request}: there is no such directory")
        missing = missing_files(checkpoint)
        if missing:
            raise UserError(
                f"--resume_from_checkpoint {request}: not a whole checkpoint, it lacks {', '.join(missing)}"
            )
        return checkpoint
    for checkpoint in reversed(list_checkpoints(output_dir)):
        if not missing_files(checkpoint):
            return checkpoint
    raise UserError(
        f"{output_dir} holds no whole checkpoint to resume from; leave out --resume_from_checkpoint to start anew"
    )


def missing_files(checkpoint: Path) -> list[str]:
    """Names of the files that a checkpoint needs and lacks."""
    missing = [name for name in _REQUIRED if not (checkpoint / name).is_file()]
    if not list(checkpoint.glob("*.safetensors")):
        missing.append("model.safetensors")
    return missing


def check_architecture(checkpoint: Path, config: DogeConfig) -> None:
    """Check that a checkpoint is of this model, and that its weights are readable.

    Raises:
        UserError: for another architecture, other sizes (each is named), or a damaged file.
    """
    path = checkpoint / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if saved.get("model_type") != DogeConfig.model_type:
        raise UserError(
            f"{checkpoint} is a checkpoint of {saved.get('model_type')!r}, not of {DogeConfig.model_type!r}; it cannot "
            "be trained on as a Doge model"
        )
    current = config.to_dict()
    names = [name for name in asdict(ModelSettings()) if name not in _FREE["model"]]
    differing = [name for name in names if name in saved and saved[name] != current.get(name)]
    if differing:
        listed = "; ".join(f"{name} is {saved[name]!r} there and {current.get(name)!r} here" for name in differing)
        raise UserError(f"{checkpoint} is a checkpoint of another model: {listed}; use the settings it was made with")
    for weights in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights} is damaged ({error}); resume from an earlier checkpoint") from error


def check_record(checkpoint: Path, current: RunRecord) -> RunRecord:
    """Check that a run may go on from a checkpoint: same data in the same order, same schedule.

    Returns:
        The checkpoint's record.

    Raises:
        UserError: naming everything that differs, there and here.
    """
    saved = RunRecord.read(checkpoint)
    differing = []
    for part, free in _FREE.items():
        before, now = saved.settings.get(part, {}), current.settings[part]
        differing += [
            f"{part}.{key} is {before.get(key)!r} there and {value!r} here"
            for key, value in now.items()
            if key not in free and before.get(key) != value
        ]
    for name in ("sequences_per_step", "steps_per_epoch", "bf16", "rows", "data_sha256", "tokenizer_sha256"):
        if getattr(saved, name) != getattr(current, name):
            differing.append(f"{name} is {getattr(saved, name)!r} there and {getattr(current, name)!r} here")
    if differing:
        raise UserError(
            f"{checkpoint} cannot be resumed with other data or another schedule: {'; '.join(differing)}; use the "
            "settings it was made with, or start anew in another --output_dir"
        )
    return saved


def publish(staged: Path, target: Path) -> None:
    """Move a finished directory to its place in one rename; what stood there steps aside first."""
    flush_tree(staged)
    if target.exists():
        remove(target)
    staged.rename(target)


def remove(path: Path) -> None:
    """Remove a directory so that no half of it is ever left under its name."""
    aside = path.with_name(f"{STAGING_PREFIX}old-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def rotate(output_dir: Path, keep: int | None) -> None:
    """Remove all but the last `keep` checkpoints; None keeps all."""
    if keep is not None:
        for checkpoint in list_checkpoints(output_dir)[:-keep]:
            remove(checkpoint)


def clear_staging(output_dir: Path) -> None:
    """Remove what a killed run left half written."""
    if output_dir.is_dir():
        for path in output_dir.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush_tree(directory: Path) -> None:
    """Have the system write every file of a directory to disk, so that a rename never gets there before them."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def check_free_disk(directory: Path, needed: int, what: str) -> None:
    """Check that `needed` bytes are free where `directory` is, or will be.

    Raises:
        UserError: if they are not.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{directory}: {what} takes about {_size(needed)} and only {_size(free)} are free; free some space, lower "
            "save_total_limit, or choose another --output_dir"
        )


@contextmanager
def disk_errors_explained(target: Path, needed: int = 0) -> Iterator[None]:
    """Turn a failure to write for lack of space into a `UserError` that names the target.

    PyTorch and safetensors report a full disk as errors of their own kinds, so where the number of bytes that are
    needed is known, the free space is asked as well.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
        if not full and "No space left" not in str(error) and shutil.disk_usage(target.parent).free >= needed:
            raise
        size = f" (about {_size(needed)})" if needed else ""
        raise UserError(
            f"the disk is full: {target}{size} could not be written, and no half of a checkpoint or model is left in "
            "its place; free some space or lower save_total_limit, then go on with --resume_from_checkpoint"
        ) from error


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"
