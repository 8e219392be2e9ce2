"""`train`: pre-train a model from a settings file, a tokenizer, and a prepared set or a stream of text."""

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
from doge_lm.model.modeling_doge import DogeForCausalLM
from doge_lm.training import checkpoints
from doge_lm.training.callbacks import LOG_NAME, JsonLog, ProgressBar, TensorBoardLog, holds_training
from doge_lm.training.checkpoints import RunRecord
from doge_lm.training.data import TrainingData, open_data
from doge_lm.training.hardware import Hardware, Peak, bf16_is_faster, detect_hardware, peak_flops
from doge_lm.training.order import ORDER
from doge_lm.training.plan import Plan, make_plan
from doge_lm.training.report import CURVE_NAME, draw_curve
from doge_lm.training.settings import Settings, TrainSettings, load_settings, preset_paths
from doge_lm.training.trainer import DogeTrainer, prepare_model

SETTINGS_NAME = "train_settings.yaml"

# Sockets have paths of up to 107 bytes, of which Python's names within the folder take 33.
_LONGEST_TMPDIR = 74

ModelBuilder = Callable[[DogeConfig, TrainSettings], PreTrainedModel]
# Without either of these, nothing loads from a directory.
_MODEL_FILES = ("config.json", "model.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train`."""
    parser.add_argument(
        "--config_path",
        required=True,
        help=f"a settings file, or the name of a preset: {', '.join(preset_paths())}",
    )
    parser.add_argument("--logging_dir", type=Path, default=Path("log"), help="where logs go (default: %(default)s)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("results"),
        help="where checkpoints and the model go (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer_path", type=Path, default=Path("tokenizer"), help="the tokenizer (default: %(default)s)"
    )
    parser.add_argument("--dataset_path", help="the prepared set, in place of the settings' dataset_path")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from this checkpoint; without a value, from the last one in --output_dir",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, e.g. --set learning_rate=3e-4; may be repeated",
    )
    parser.add_argument("--strict", action="store_true", help="fail if the data is smaller than the settings ask for")
    parser.add_argument("--overwrite", action="store_true", help="start anew, removing the run in --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop; needs no data")


def build_model(config: DogeConfig, train: TrainSettings) -> PreTrainedModel:
    """A Doge with fresh weights in float32."""
    return DogeForCausalLM._from_config(config, attn_implementation=train.attn_implementation, dtype=torch.float32)


def run(args: argparse.Namespace, build_model: ModelBuilder = build_model) -> int:
    """Train as the flags of `add_arguments` say; returns the exit status.

    Args:
        args: the flags.
        build_model: makes the model from its configuration and the settings. Benchmarks put another architecture
            in Doge's place here; the plan and the model-FLOPs utilization remain those of the Doge.
    """
    settings = load_settings(args.config_path, args.overrides)
    if args.dataset_path is not None:
        if settings.train.stream is not None:
            raise UserError(
                f"--dataset_path {args.dataset_path} and the setting stream ({settings.train.stream}) both name the "
                "data; give one of the two (--set stream=null for the former)"
            )
        settings.train.dataset_path = args.dataset_path
    config = settings.model_config()
    hardware = detect_hardware()
    machine = Machine.settle(settings, hardware)
    if args.dry_run:
        plan = _plan(settings, config, machine, rows=None, strict=False)
        print(plan.table())
        print(_least_time(plan, peak_flops(hardware, machine.bf16)))
        return 0
    tokenizer = _load_tokenizer(args.tokenizer_path, config)
    opened = open_data(settings.train, args.tokenizer_path, len(tokenizer))
    checkpoint = _checkpoint(args, config)
    if checkpoint is None and not args.overwrite:
        _refuse_other_run(args.output_dir, args.logging_dir)
    if checkpoint is not None and settings.train.bf16 == "auto":
        machine = replace(machine, bf16=RunRecord.read(checkpoint).bf16)
    plan = _plan(settings, config, machine, rows=opened.rows, strict=args.strict)
    data = opened.start(plan.total_steps * plan.sequences_per_step, _stream_state(checkpoint), _report)
    record = _record(settings, plan, machine, data)
    if checkpoint is not None:
        saved = checkpoints.check_record(checkpoint, record)
        record = replace(record, step=saved.step, tokens_seen=saved.tokens_seen, targets_seen=saved.targets_seen)
    checkpoints.check_free_disk(args.output_dir, plan.checkpoint_bytes, "one checkpoint")
    # Before the place is cleared: what cannot be built must not cost an earlier run.
    model = _fresh_model(build_model, settings, config, machine)
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

    trainer = _build(model, settings, plan, machine, data, tokenizer, record, args)
    if process.is_main_process:
        print(_least_time(plan, trainer.peak), flush=True)
    with data.opened(), checkpoints.disk_errors_explained(args.logging_dir), _interruption_explained(args.output_dir):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if process.is_main_process:
        save_final(trainer, settings, args.output_dir)
        curve = draw_curve(args.logging_dir / LOG_NAME, args.logging_dir / CURVE_NAME)
        print(f"\nmodel: {args.output_dir}\nlog:   {args.logging_dir / LOG_NAME}\ncurve: {curve}")
    process.wait_for_everyone()
    return 0


@dataclass(frozen=True)
class Machine:
    """The device, and how it will compute: what "auto" means here."""

    hardware: Hardware
    world_size: int
    bf16: bool
    compiled: bool
    graphs: bool

    @classmethod
    def settle(cls, settings: Settings, hardware: Hardware) -> "Machine":
        """Work out the settings that depend on the device.

        Raises:
            UserError: for CUDA graphs or kernels where there can be none, and for settings that give wrong results
                together.
        """
        train = settings.train
        if settings.model.cdmoe_path == "sparse" and hardware.device.type != "cuda":
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
        # `flash` breaks the compiled model apart; with other processes, gradients travel while a backward pass runs.
        obstacles = {
            f"the device is {hardware.device}, and not an NVIDIA GPU": hardware.device.type != "cuda",
            f"the run has {world_size} processes": world_size != 1,
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
    return f"  at the peak of the device ({peak.flops / 1e12:,.2f} TFLOP/s, {peak.source}) the work takes {time}"


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


def _plan(settings: Settings, config: DogeConfig, machine: Machine, rows: int | None, strict: bool) -> Plan:
    return make_plan(
        config,
        settings.train,
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


def _record(settings: Settings, plan: Plan, machine: Machine, data: TrainingData) -> RunRecord:
    return RunRecord(
        settings=settings.to_dict(),
        sequences_per_step=plan.sequences_per_step,
        steps_per_epoch=plan.steps_per_epoch,
        bf16=machine.bf16,
        rows=data.rows,
        data_sha256=data.sha256,
        tokenizer_sha256=data.tokenizer_sha256,
        order=ORDER,
    )


def _stream_state(checkpoint: Path | None) -> StreamState | None:
    """Where the stream of a checkpoint goes on, if it has one."""
    saved = None if checkpoint is None else RunRecord.read(checkpoint).stream
    return None if saved is None else StreamState(**saved)


def _report(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


def _checkpoint(args: argparse.Namespace, config: DogeConfig) -> Path | None:
    if args.resume_from_checkpoint is None:
        return None
    if args.overwrite:
        raise UserError("--overwrite starts anew and --resume_from_checkpoint goes on; give one of the two")
    checkpoint = checkpoints.checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    checkpoints.check_architecture(checkpoint, config)
    return checkpoint


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
        (args.logging_dir / LOG_NAME).unlink(missing_ok=True)
        for events in args.logging_dir.glob("events.out.tfevents.*"):
            events.unlink()


def _fresh_model(
    build_model: ModelBuilder, settings: Settings, config: DogeConfig, machine: Machine
) -> PreTrainedModel:
    train = settings.train
    torch.set_float32_matmul_precision("high" if machine.hardware.device.type == "cuda" else "highest")
    set_seed(train.seed)
    try:
        model = build_model(config, train)
    except ImportError as error:  # of the kernels that a backend is made of
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"attn_implementation: {train.attn_implementation} cannot be used here ({reason}); set it to sdpa"
        ) from error
    prepare_model(model, train, machine.compiled, machine.graphs)
    return model


def _build(
    model: PreTrainedModel,
    settings: Settings,
    plan: Plan,
    machine: Machine,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    record: RunRecord,
    args: argparse.Namespace,
) -> DogeTrainer:
    train = settings.train
    trainer = DogeTrainer(
        model=model,
        plan=plan,
        train=train,
        data=data,
        collator=PackedCollator(
            tokenizer.pad_token_id,
            train.sequence_length,
            train.document_mask,
            settings.model.vocab_size,
            document_blocks=True,
        ),
        tokenizer=tokenizer,
        record=record,
        peak=peak_flops(machine.hardware, machine.bf16),
        output_dir=args.output_dir,
        graphs=machine.graphs,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in (JsonLog(args.logging_dir, _plan_numbers(plan, trainer)), TensorBoardLog(args.logging_dir)):
        trainer.add_callback(callback)
    trainer.add_callback(ProgressBar())
    # Equal weights on every device, but not equal dropout.
    torch.manual_seed(train.seed + trainer.args.process_index)
    return trainer


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


def save_final(trainer: DogeTrainer, settings: Settings, output_dir: Path) -> None:
    """Save model, tokenizer and settings (`train_settings.yaml`) into `output_dir`.

    The files are written aside and moved when all are whole, `config.json` last: without it nothing loads, so a
    mixture of two runs' files is never taken for a model.
    """
    with checkpoints.disk_errors_explained(output_dir / "model.safetensors", 4 * trainer.plan.counts.total):
        staging = output_dir / f"{checkpoints.STAGING_PREFIX}model"
        staging.mkdir(parents=True)
        try:
            trainer.save_weights(staging)
            (staging / SETTINGS_NAME).write_text(settings.to_yaml(), encoding="utf-8", newline="\n")
            checkpoints.flush_tree(staging)
            (output_dir / "config.json").unlink(missing_ok=True)
            for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, output_dir / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
