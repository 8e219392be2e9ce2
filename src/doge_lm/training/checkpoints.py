"""Checkpoints that are whole or not there, and the record that says what a run must keep to be resumed.

`OUTPUT/checkpoint-N` appears by a rename, after everything in it was written and flushed under `OUTPUT/.tmp-…`;
it disappears the same way. So whenever a run is killed, what stands under a checkpoint's name can be resumed. What
happens to its files later is found by their sizes and hashes, which the record holds.
"""

import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from doge_lm.errors import UserError
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.training.settings import ModelSettings

RECORD_NAME = "run.json"
STAGING_PREFIX = ".tmp-"
_NAME = re.compile(r"checkpoint-(\d+)")
# Patterns of names: several processes write a state of random numbers each, and of LoRA there is an adapter alone.
_REQUIRED = (
    "*config.json",
    "*model*.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state*.pth",
)
_SEAL = "record_sha256"
_HOW_TO_START_ANEW = (
    "to start anew, give --overwrite in place of --resume_from_checkpoint (it removes what an earlier run left in "
    "--output_dir and --logging_dir)"
)

# Settings that may differ when a run is resumed: they change neither the data, nor its order, nor what is learned
# from it but for rounding.
_FREE = {
    "train": {
        "dataset_path",
        "stream",  # the content is compared, in `data_sha256`
        "stream_workers",
        "stream_on_error",  # a run that a bad row has stopped may go on without it
        "sequences_per_step",  # compared as worked out, in the record's `sequences_per_step`
        "per_device_train_batch_size",
        "accumulate_steps",
        "per_epoch_max_steps",  # compared as worked out, in `steps_per_epoch`
        "bf16",  # compared as worked out
        "torch_compile",
        "cuda_graphs",
        "attn_implementation",
        "gradient_checkpointing",
        "recompute_activation",
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
class FileRecord:
    """Size and hash of a file of a checkpoint."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read a file."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint remembers of its run, and of its own files by their names.

    `step`, `tokens_seen` and `targets_seen` are the run's progress. `order` is the version of the order in which the
    data is read (`doge_lm.training.order`); records from before there was one have the first. `stream` is where a
    stream of text stands, as `doge_lm.data.streaming.StreamState`; `rows` is 0 then.
    """

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
    order: int = 1
    stream: dict[str, Any] | None = None
    base_sha256: str = ""
    files: dict[str, FileRecord] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write `run.json` into a checkpoint whose other files are all there; their sizes and hashes go into it."""
        paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / RECORD_NAME)
        files = {path.relative_to(directory).as_posix(): FileRecord.of(path) for path in paths}
        content = asdict(replace(self, files=files))
        text = json.dumps({**content, _SEAL: _sha256_of(content)}, ensure_ascii=False, indent=2) + "\n"
        (directory / RECORD_NAME).write_text(text, encoding="utf-8", newline="\n")

    @classmethod
    def read(cls, checkpoint: Path) -> "RunRecord":
        """Read `run.json` of a checkpoint.

        Raises:
            UserError: if it is damaged, or not what this version of doge-lm writes.
        """
        path = checkpoint / RECORD_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error})") from error
        if not isinstance(content, dict) or _SEAL not in content:
            raise UserError(f"{path} is not a record that this version of doge-lm writes (it has no {_SEAL})")
        if content.pop(_SEAL) != _sha256_of(content):
            raise UserError(f"{path} is damaged (its content does not fit its {_SEAL})")
        try:
            files = {name: FileRecord(**each) for name, each in content.pop("files").items()}
            return cls(**content, files=files)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not a record that this version of doge-lm writes ({error})") from error


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(request: str, output_dir: Path) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means, every file of it checked.

    Args:
        request: the path of a checkpoint, or "" for the last one in `output_dir`.
        output_dir: directory of the run.

    Raises:
        UserError: if there is none, or a file of it is missing or damaged; the message names the file, and a whole
            checkpoint beside it, if there is one.
    """
    if request:
        checkpoint = Path(request)
        if not checkpoint.is_dir():
            raise UserError(f"--resume_from_checkpoint {request}: there is no such directory")
    else:
        found = list_checkpoints(output_dir)
        if not found:
            raise UserError(f"{output_dir} holds no checkpoint to resume from; {_HOW_TO_START_ANEW}")
        checkpoint = found[-1]
    try:
        check_whole(checkpoint)
    except UserError as error:
        other = _whole_beside(checkpoint)
        instead = f"give --resume_from_checkpoint {other} instead" if other else _HOW_TO_START_ANEW
        raise UserError(f"{error}, so {checkpoint} cannot be resumed; {instead}") from error
    return checkpoint


def check_whole(checkpoint: Path) -> None:
    """Check every file of a checkpoint against the sizes and hashes in its record.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    record_path = checkpoint / RECORD_NAME
    if not record_path.is_file():
        raise UserError(f"{record_path} is missing")
    files = RunRecord.read(checkpoint).files
    for pattern in _REQUIRED:
        if not fnmatch.filter(files, pattern):
            raise UserError(f"{record_path} lists no {pattern}")
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected.bytes:
            raise UserError(f"{path} is damaged (it has {size:,} bytes and was written with {expected.bytes:,})")
        if FileRecord.of(path) != expected:
            raise UserError(f"{path} is damaged (its sha256 is another than when it was written)")


def _whole_beside(checkpoint: Path) -> Path | None:
    """The nearest whole checkpoint before this one, or else the nearest behind it."""
    place = checkpoint.absolute()
    siblings = list_checkpoints(place.parent)
    # One that the user has renamed counts as the last.
    index = siblings.index(place) if place in siblings else len(siblings)
    for each in (*reversed(siblings[:index]), *siblings[index + 1 :]):
        try:
            check_whole(each)
        except UserError:
            continue
        return each
    return None


def check_architecture(checkpoint: Path, config: DogeConfig) -> None:
    """Check that a whole checkpoint is of this model.

    Raises:
        UserError: for another architecture, or other sizes (each is named).
    """
    if not (checkpoint / "config.json").exists():
        return  # an adapter: its record tells what it was made for
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
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


def check_record(checkpoint: Path, current: RunRecord, defaults: dict[str, dict[str, Any]]) -> RunRecord:
    """Check that a run may go on from a checkpoint: same data in the same order, same schedule.

    Args:
        checkpoint: where its record lies.
        current: this run's.
        defaults: values of settings, of which a checkpoint that is older than one knows nothing.

    Returns:
        The checkpoint's record.

    Raises:
        UserError: naming everything that differs, there and here.
    """
    saved = RunRecord.read(checkpoint)
    if saved.order != current.order:
        raise UserError(
            f"{checkpoint} cannot be resumed: its run reads the data in the order of version {saved.order}, and this "
            f"doge-lm in that of version {current.order}, so some rows would come twice and others not at all; resume "
            "it with the doge-lm that made it, or start anew with --overwrite"
        )
    differing = []
    if set(saved.settings) != set(current.settings):
        raise UserError(
            f"{checkpoint} is of another kind of training, whose settings have the parts {', '.join(saved.settings)}; "
            "give a checkpoint of this kind, or start anew with --overwrite"
        )
    for part in current.settings:
        free = _FREE.get(part, set())
        # A key that is newer than the checkpoint starts with a default that is what was done before.
        before, now = {**defaults[part], **saved.settings.get(part, {})}, current.settings[part]
        differing += [
            f"{part}.{key} is {before[key]!r} there and {value!r} here"
            for key, value in now.items()
            if key not in free and before[key] != value
        ]
    for name in (
        "sequences_per_step",
        "steps_per_epoch",
        "bf16",
        "rows",
        "data_sha256",
        "tokenizer_sha256",
        "base_sha256",
    ):
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
