"""`finetune`: supervised training on conversations, through TRL's `SFTTrainer`.

The set is the one that `preprocess_datasets` and `merge_datasets` make of conversations: all turns, packed, with the
loss on the assistant's tokens alone. So TRL prepares nothing here, and attention within conversations is this model's.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from doge_lm.training.answers import write_report
from doge_lm.training.callbacks import LOG_NAME
from doge_lm.training.data import Opened, load_prepared_data
from doge_lm.training.presets import FINETUNE
from doge_lm.training.run import Job, run_job
from doge_lm.training.settings import FinetuneSettings, load_settings_of
from doge_lm.training.trainer import training_arguments
from doge_lm.training.tuning import (
    TuningTrainer,
    base_config,
    base_sha256,
    load_base,
    refuse_for_adapters,
)


class FinetuneTrainer(TuningTrainer, SFTTrainer):
    """TRL's trainer with this project's order of data, loss, precision, checkpoints and figures."""

    arguments_class = SFTConfig

    def __init__(self, **keyword: Any):
        super().__init__(**keyword)
        # TRL puts a forward pass in place of the model's, which `compute_loss` does without.
        self.model.__dict__.pop("forward", None)

    def make_arguments(self, output_dir: Path) -> TrainingArguments:
        """What TRL is told: nothing is left for it to prepare; the first figure is of the model as it came."""
        return training_arguments(
            self.train_settings,
            self.plan,
            output_dir,
            SFTConfig,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            eval_on_start=self.record.step == 0,
            # Its own defaults; this project sees to both (`prepare_model`, `compute_loss_context_manager`).
            gradient_checkpointing=False,
            bf16=False,
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The mean over the assistant's tokens, as TRL's.

        TRL's own computes the logits in pieces too, and waits for the device at every micro-batch, for figures of
        accuracy and entropy.
        """
        return Trainer.compute_loss(self, model, {**inputs, "skip_logits": True}, *args, **kwargs)


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the flags say; returns the exit status."""
    settings = load_settings_of(FinetuneSettings, args.config_path, args.overrides, FINETUNE)
    train, base = settings.train, args.model_path
    if args.dataset_path is not None:
        train.dataset_path = args.dataset_path
    refuse_for_adapters(train, settings.lora)
    tokenizer_path = args.tokenizer_path or base
    job = Job(
        settings=settings,
        train=train,
        config=base_config(base),
        tokenizer_path=tokenizer_path,
        build_model=lambda: load_base(base, train, settings.lora),
        trainer=FinetuneTrainer,
        open_data=lambda _: _open(settings, tokenizer_path),
        more=lambda: {"base_path": base, "lora": settings.lora},
        base_path=base,
        base_sha256=base_sha256(base),
    )
    trainer = run_job(job, args)
    if trainer is not None and trainer.is_world_process_zero():
        device = trainer.args.device
        del trainer
        report = write_report(
            base, args.output_dir, args.logging_dir / LOG_NAME, args.logging_dir, torch.device(device)
        )
        print(f"report: {report}")
    return 0


def _open(settings: FinetuneSettings, tokenizer_path: Path) -> Opened:
    data = load_prepared_data(settings.train, tokenizer_path, kind="finetune")
    return Opened(data.rows, lambda *_: data)
