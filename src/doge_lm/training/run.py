"""A run from its settings to the saved model, whatever is trained: data, plan, machine, checkpoints, reports."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from doge_lm.data.dataset import PackedCollator
from doge_lm.data.streaming import StreamState
from doge_lm.data.tokenizer import load_tokenizer
from doge_lm.errors import UserError
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.training import checkpoints
from doge_lm.training.callbacks import LOG_NAME, JsonLog, ProgressBar, TensorBoardLog, holds_training
from doge_lm.training.checkpoints import RunRecord
from doge_lm.training.data import Opened, TrainingData, open_data
from doge_lm.training.hardware import Hardware, Peak, bf16_is_faster, detect_hardware, peak_flops
from doge_lm.training.optimizer import check_optimizer
from doge_lm.training.order import ORDER
from doge_lm.training.plan import Plan, make_plan
from doge_lm.training.report import CURVE_NAME, draw_curve
from doge_lm.training.settings import RunSettings, TrainSettings
from doge_lm.training.trainer import DogeTrainer, prepare_model

SETTINGS_NAME = "train_settings.yaml"

# Sockets have paths of up to 107 bytes, of which Python's names within the folder take 33.
_LONGEST_TMPDIR = 74

# Without any of these, nothing loads from a directory.
_MODEL_FILES = ("config.json", "model.safetensors")

ADAPTER = "adapter"
"""The folder of an adapter, beside the model that it was merged into."""

Collator = Callable[[list[dict]], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What one kind of training brings to a run.

    Attributes:
        settings: all settings.
        train: their `train:` part.
        config: of the model.
        tokenizer_path: the tokenizer.
        build_model: makes the model, in float32.
        trainer: the class of the trainer.
        open_data: finds the data, by the tokenizer; what the settings name by default.
        collator: rows to a batch, by the tokenizer; `PackedCollator` by default.
        more: further arguments of the trainer.
        base_path: the model that is trained on, where there is one.
        base_sha256: stands for its weights.
    """

    settings: RunSettings
    train: TrainSettings
    config: DogeConfig
    tokenizer_path: Path
    build_model: Callable[[], PreTrainedModel]
    trainer: type[DogeTrainer]
    open_data: Callable[[PreTrainedTokenizerBase], Opened] | None = None
    collator: Callable[[PreTrainedTokenizerBase], Collator] | None = None
    more: Callable[[], dict[str, Any]] = dict
    base_path: Path | None = None
    base_sha256: str = ""


def run_job(job: Job, args: argparse.Namespace) -> DogeTrainer | None:
    """Train; what is left is the model, its checkpoints and its logs.

    Args:
        job: what is trained, and how.
        args: the flags of the command.

    Returns:
        The trainer; None after a dry run.

    Raises:
        UserError: for anything in settings, data, checkpoint or places that does not fit.
    """
    train = job.train
    _refuse_own_base(job.base_path, args.output_dir)
    hardware = detect_hardware()
    machine = Machine.settle(train, job.config, hardware)
    if args.dry_run and train.per_epoch_max_steps is not None:
        _show_plan(job, machine, rows=None)
        return None
    tokenizer = _load_tokenizer(job.tokenizer_path, job.config)
    opened = _open_data(job, tokenizer)
    if args.dry_run:
        _show_plan(job, machine, rows=opened.rows)
        return None
    checkpoint = _checkpoint(args, job)
    if checkpoint is None and not args.overwrite:
        _refuse_other_run(args.output_dir, args.logging_dir)
    if checkpoint is not None and train.bf16 == "auto":
        machine = replace(machine, bf16=RunRecord.read(checkpoint).bf16)
    plan = _plan(job, machine, rows=opened.rows, strict=args.strict)
    data = opened.start(plan.total_steps * plan.sequences_per_step, _stream_state(checkpoint), _report)
    record = _record(job, plan, machine, data)
    if checkpoint is not None:
        saved = checkpoints.check_record(checkpoint, record, type(job.settings)().to_dict())
        record = replace(record, step=saved.step, tokens_seen=saved.tokens_seen, targets_seen=saved.targets_seen)
    checkpoints.check_free_disk(args.output_dir, plan.checkpoint_bytes, "one checkpoint")
    # Before the place is cleared: what cannot be built must not cost an earlier run.
    model = _fresh_model(job, machine)
    check_optimizer(model, train)
    more = job.more()
    # From here on several processes may be at work; the first of them alone changes files. All of them have looked at
    # the place by now: the barrier keeps the first from clearing it under another's eyes.
    process = PartialState(cpu=hardware.device.type == "cpu")
    process.wait_for_everyone()
    disable_progress_bar()  # transformers' own, which would break up ours at every checkpoint
    if process.is_main_process:
        print(plan.table(), flush=True)
        if checkpoint is not None:
            print(f"resuming from {checkpoint}: {record.step:,} of {plan.total_steps:,} steps are done", flush=True)
        _clear_place(args, fresh=checkpoint is None)
    process.wait_for_everyone()

    trainer = _build(model, job, plan, machine, data, tokenizer, record, args, more)
    if process.is_main_process:
        print(_least_time(plan, trainer.peak), flush=True)
    with data.opened(), checkpoints.disk_errors_explained(args.logging_dir), _interruption_explained(args.output_dir):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if process.is_main_process:
        save_final(trainer, job.settings, args.output_dir)
        curve = draw_curve(args.logging_dir / LOG_NAME, args.logging_dir / CURVE_NAME)
        print(f"\nmodel: {args.output_dir}\nlog:   {args.logging_dir / LOG_NAME}\ncurve: {curve}")
    process.wait_for_everyone()
    return trainer


def _show_plan(job: Job, machine: "Machine", rows: int | None) -> None:
    plan = _plan(job, machine, rows=rows, strict=False)
    print(plan.table())
    print(_least_time(plan, peak_flops(machine.hardware, machine.bf16)))


def _open_data(job: Job, tokenizer: PreTrainedTokenizerBase) -> Opened:
    if job.open_data is None:
        return open_data(job.train, job.tokenizer_path, len(tokenizer))
    return job.open_data(tokenizer)


@dataclass(frozen=True)
class Machine:
    """The device, and how it will compute: what "auto" means here."""

    hardware: Hardware
    world_size: int
    bf16: bool
    compiled: bool
    graphs: bool

    @classmethod
    def settle(cls, train: TrainSettings, config: DogeConfig, hardware: Hardware) -> "Machine":
        """Work out the settings that depend on the device.

        Raises:
            UserError: for CUDA graphs or kernels where there can be none, and for settings that give wrong results
                together.
        """
        if config.cdmoe_path == "sparse" and hardware.device.type != "cuda":
            raise UserError("cdmoe_path: sparse runs on an NVIDIA GPU only; set cdmoe_path: auto, with the same result")
        bf16 = bf16_is_faster(hardware.device) if train.bf16 == "auto" else train.bf16
        compiled = hardware.device.type == "cuda" if train.torch_compile == "auto" else train.torch_compile
        if compiled and train.document_mask and train.attn_implementation == "flex_attention":
            raise UserError(
                "attn_implementation: flex_attention with document_mask: true gives wrong attention when compiled; set "
                "attn_implementation: sdpa, which keeps documents apart as well, or torch_compile: false"
            )
        if train.attn_implementation == "flex_attention" and hardware.device.type == "cpu":
            raise UserError(
                "attn_implementation: flex_attention has no gradients on a CPU; set attn_implementation: sdpa"
            )
        workers = train.stream is None and train.dataloader_num_workers > 0
        place = tempfile.gettempdir()
        if workers and os.name == "posix" and len(os.fsencode(place)) > _LONGEST_TMPDIR:
            raise UserError(
                f"the folder for temporary files, {place}, has a path of more than {_LONGEST_TMPDIR} bytes, too long "
                "for the sockets of processes that read data; set TMPDIR to a shorter one, or dataloader_num_workers: 0"
            )
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        # `flash` breaks the compiled model apart.
        obstacles = {
            f"the device is {hardware.device}, and not an NVIDIA GPU": hardware.device.type != "cuda",
            "the model is not compiled (torch_compile)": not compiled,
            f"attn_implementation is {train.attn_implementation}": train.attn_implementation.startswith("flash"),
        }
        found = [obstacle for obstacle, is_there in obstacles.items() if is_there]
        if train.cuda_graphs is True and found:
            raise UserError(f"cuda_graphs: true is not possible: {'; '.join(found)}; set cuda_graphs: auto, or false")
        return cls(hardware, world_size, bool(bf16), bool(compiled), not found and train.cuda_graphs is not False)


def _least_time(plan: Plan, peak: Peak) -> str:
    """The time that the whole work takes at the peak of the devices: no run is faster, and most are slower by far."""
    hours = plan.total_flops / (peak.flops * plan.world_size) / 3600
    time = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
    # A CPU without units for bfloat16 does a few GFLOP/s.
    speed = f"{peak.flops / 1e12:,.2f} TFLOP/s" if peak.flops >= 1e10 else f"{peak.flops / 1e9:,.2f} GFLOP/s"
    return f"  at the peak of the device ({speed}, {peak.source}) the work takes {time}"


@contextmanager
def _interruption_explained(output_dir: Path) -> Iterator[None]:
    """On Ctrl-C, say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        found = checkpoints.list_checkpoints(output_dir)
        how = "go on from it with --resume_from_checkpoint" if found else "start anew with --overwrite"
        print(f"\nlast checkpoint: {found[-1] if found else 'none yet'}; {how}", flush=True)
        raise


def _plan(job: Job, machine: Machine, rows: int | None, strict: bool) -> Plan:
    return make_plan(
        job.config,
        job.train,
        machine.hardware,
        rows=rows,
        world_size=machine.world_size,
        bf16=machine.bf16,
        compiled=machine.compiled,
        strict=strict,
    )


def _load_tokenizer(path: Path, config: DogeConfig) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(path)
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {len(tokenizer):,} tokens and vocab_size is {config.vocab_size:,}; give the "
            f"matching --tokenizer_path, or --set vocab_size={len(tokenizer)}"
        )
    return tokenizer


def _record(job: Job, plan: Plan, machine: Machine, data: TrainingData) -> RunRecord:
    return RunRecord(
        settings=job.settings.to_dict(),
        sequences_per_step=plan.sequences_per_step,
        steps_per_epoch=plan.steps_per_epoch,
        bf16=machine.bf16,
        rows=data.rows,
        data_sha256=data.sha256,
        tokenizer_sha256=data.tokenizer_sha256,
        order=ORDER,
        base_sha256=job.base_sha256,
    )


def _stream_state(checkpoint: Path | None) -> StreamState | None:
    """Where the stream of a checkpoint goes on, if it has one."""
    saved = None if checkpoint is None else RunRecord.read(checkpoint).stream
    return None if saved is None else StreamState(**saved)


def _report(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


def _checkpoint(args: argparse.Namespace, job: Job) -> Path | None:
    if args.resume_from_checkpoint is None:
        return None
    if args.overwrite:
        raise UserError("--overwrite starts anew and --resume_from_checkpoint goes on; give one of the two")
    checkpoint = checkpoints.checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    checkpoints.check_architecture(checkpoint, job.config)
    return checkpoint


def _refuse_own_base(base: Path | None, output_dir: Path) -> None:
    """A run that is started anew removes the model in its place, and what it writes there takes that one's names."""
    if base is not None and output_dir.resolve() in (base.resolve(), *base.resolve().parents):
        raise UserError(
            f"--model_path {base} lies in --output_dir {output_dir}, where the tuned model takes its place; choose "
            "another --output_dir"
        )


def _refuse_other_run(output_dir: Path, logging_dir: Path) -> None:
    found = checkpoints.list_checkpoints(output_dir)
    if found:
        raise UserError(
            f"{output_dir} holds the checkpoints of another run (up to {found[-1].name}); go on with it by "
            "--resume_from_checkpoint, choose another --output_dir, or remove it by --overwrite"
        )
    if any((output_dir / name).exists() for name in _MODEL_FILES):
        raise UserError(f"{output_dir} holds a model; choose another --output_dir, or remove it by --overwrite")
    # Though this place of output is empty, the log may be all that is known of a run with another, as --logging_dir has
    # the same default for all. One without a line of training is worth nothing, and makes way.
    if holds_training(logging_dir / LOG_NAME):
        raise UserError(
            f"{logging_dir / LOG_NAME} is the log of another run, which left nothing in {output_dir}; start anew with "
            "--overwrite, which removes the log, or choose another --logging_dir"
        )


def _clear_place(args: argparse.Namespace, fresh: bool) -> None:
    """Make the directories; remove what a killed run left half written and, for a fresh start, the run before."""
    for flag, directory in (("--output_dir", args.output_dir), ("--logging_dir", args.logging_dir)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag} {directory} cannot be made ({error.strerror}); choose another place") from error
    checkpoints.clear_staging(args.output_dir)
    if fresh:
        for checkpoint in checkpoints.list_checkpoints(args.output_dir):
            checkpoints.remove(checkpoint)
        for name in _MODEL_FILES:
            (args.output_dir / name).unlink(missing_ok=True)
        if (args.output_dir / ADAPTER / "adapter_config.json").is_file():
            checkpoints.remove(args.output_dir / ADAPTER)
        (args.logging_dir / LOG_NAME).unlink(missing_ok=True)
        for events in args.logging_dir.glob("events.out.tfevents.*"):
            events.unlink()


def _fresh_model(job: Job, machine: Machine) -> PreTrainedModel:
    torch.set_float32_matmul_precision("high" if machine.hardware.device.type == "cuda" else "highest")
    set_seed(job.train.seed)
    try:
        model = job.build_model()
    except ImportError as error:  # of the kernels that a backend is made of
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"attn_implementation: {job.train.attn_implementation} cannot be used here ({reason}); set it to sdpa"
        ) from error
    prepare_model(model, job.train, machine.compiled, machine.graphs)
    return model


def _build(
    model: PreTrainedModel,
    job: Job,
    plan: Plan,
    machine: Machine,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    record: RunRecord,
    args: argparse.Namespace,
    more: dict[str, Any],
) -> DogeTrainer:
    train = job.train
    trainer = job.trainer(
        model=model,
        plan=plan,
        train=train,
        data=data,
        collator=_packed(job, tokenizer) if job.collator is None else job.collator(tokenizer),
        tokenizer=tokenizer,
        record=record,
        peak=peak_flops(machine.hardware, machine.bf16),
        output_dir=args.output_dir,
        graphs=machine.graphs,
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in (JsonLog(args.logging_dir, _plan_numbers(plan, trainer)), TensorBoardLog(args.logging_dir)):
        trainer.add_callback(callback)
    trainer.add_callback(ProgressBar())
    # Equal weights on every device, but not equal dropout.
    torch.manual_seed(train.seed + trainer.args.process_index)
    return trainer


def _packed(job: Job, tokenizer: PreTrainedTokenizerBase) -> PackedCollator:
    return PackedCollator(
        tokenizer.pad_token_id,
        job.train.sequence_length,
        job.train.document_mask,
        job.config.vocab_size,
        document_blocks=True,
    )


def _plan_numbers(plan: Plan, trainer: DogeTrainer) -> dict[str, Any]:
    """The plan as the log keeps it."""
    return {
        "parameters": plan.counts.total,
        "active_parameters": plan.counts.active,
        "total_steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "tokens_per_step": plan.tokens_per_step,
        "total_tokens": plan.total_tokens,
        "micro_batch": plan.micro_batch,
        "accumulate_steps": plan.accumulate_steps,
        "world_size": plan.world_size,
        "flops_per_token": plan.flops_per_token,
        "peak_flops": trainer.peak.flops,
        "peak_source": trainer.peak.source,
        "device": plan.hardware.name,
        "bf16": trainer.record.bf16,
    }


def save_final(trainer: DogeTrainer, settings: RunSettings, output_dir: Path) -> None:
    """Save model, tokenizer and settings (`train_settings.yaml`) into `output_dir`.

    The files are written aside and moved when all are whole, `config.json` last: without it nothing loads, so a
    mixture of two runs' files is never taken for a model.
    """
    with checkpoints.disk_errors_explained(output_dir / "model.safetensors", 4 * trainer.plan.counts.total):
        staging = output_dir / f"{checkpoints.STAGING_PREFIX}model"
        staging.mkdir(parents=True)
        try:
            trainer.save_model_files(staging)
            (staging / SETTINGS_NAME).write_text(settings.to_yaml(), encoding="utf-8", newline="\n")
            checkpoints.flush_tree(staging)
            (output_dir / "config.json").unlink(missing_ok=True)
            for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                if path.is_dir() and (output_dir / path.name).exists():
                    checkpoints.remove(output_dir / path.name)
                os.replace(path, output_dir / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
