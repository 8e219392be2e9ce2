"""`dpo`: direct preference optimization on pairs of answers (arXiv 2305.18290), through TRL's `DPOTrainer`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from doge_lm.data.tokenizer import tokenizer_sha256
from doge_lm.errors import UserError
from doge_lm.training.answers import write_report
from doge_lm.training.callbacks import LOG_NAME
from doge_lm.training.data import Opened, TrainingData
from doge_lm.training.pairs import load_pairs
from doge_lm.training.presets import DPO
from doge_lm.training.run import Job, run_job
from doge_lm.training.settings import DpoSettings, LoraSettings, PreferenceSettings, load_settings_of
from doge_lm.training.trainer import DogeTrainer, training_arguments
from doge_lm.training.tuning import (
    TuningTrainer,
    base_config,
    base_sha256,
    load_base,
    refuse_for_adapters,
)

# Batches have few different lengths, since kernels are compiled for each anew.
_LENGTH_MULTIPLE = 64


class PreferenceTrainer(TuningTrainer, DPOTrainer):
    """TRL's trainer with this project's order of data, precision and checkpoints. Loss and figures are TRL's.

    Args:
        dpo: of the run.
        keyword: those of `TuningTrainer`, and `ref_model`.
    """

    arguments_class = DPOConfig

    def __init__(self, *, dpo: DpoSettings, **keyword: Any):
        self.dpo = dpo
        super().__init__(**keyword)

    def make_arguments(self, output_dir: Path) -> TrainingArguments:
        """What TRL is told; the first figures are of the model as it came."""
        return training_arguments(
            self.train_settings,
            self.plan,
            output_dir,
            DPOConfig,
            beta=self.dpo.beta,
            loss_type=[self.dpo.loss_type],
            label_smoothing=self.dpo.label_smoothing,
            max_length=None,
            eval_on_start=self.record.step == 0,
            # Its own defaults; this project sees to both (`prepare_model`, `compute_loss_context_manager`).
            gradient_checkpointing=False,
            bf16=False,
        )

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Nothing: the ids are there (`pairs`)."""
        return dataset

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's."""
        return DPOTrainer.compute_loss(self, model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's figures on the held-out pairs: loss, rewards of both answers, margin, accuracy."""
        return super(DogeTrainer, self).evaluate(*args, **kwargs)


def run(args: argparse.Namespace) -> int:
    """Tune as the flags say; returns the exit status."""
    settings = load_settings_of(PreferenceSettings, args.config_path, args.overrides, DPO)
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
        trainer=PreferenceTrainer,
        open_data=lambda tokenizer: _open(settings, tokenizer, tokenizer_path),
        collator=lambda tokenizer: DataCollatorForPreference(
            tokenizer.pad_token_id, pad_to_multiple_of=_LENGTH_MULTIPLE
        ),
        more=lambda: {
            "base_path": base,
            "lora": settings.lora,
            "dpo": settings.dpo,
            "ref_model": load_base(base, train, LoraSettings()),
        },
        base_path=base,
        base_sha256=base_sha256(base),
    )
    trainer = run_job(job, args)
    if trainer is not None and trainer.is_world_process_zero():
        device = torch.device(trainer.args.device)
        del trainer
        print(f"report: {write_report(base, args.output_dir, args.logging_dir / LOG_NAME, args.logging_dir, device)}")
    return 0


def _open(settings: PreferenceSettings, tokenizer: PreTrainedTokenizerBase, tokenizer_path: Path) -> Opened:
    path = Path(settings.train.dataset_path)
    if not path.exists():
        raise UserError(
            f"dataset_path {path} does not exist; give --dataset_path a file of pairs (prompt, chosen, rejected)"
        )
    pairs = load_pairs(path, tokenizer, settings.train.sequence_length, settings.dpo.test_share)
    data = TrainingData(pairs.train, pairs.test, pairs.sha256, tokenizer_sha256(tokenizer_path), (len(pairs.train),))
    if pairs.too_long:
        print(f"{pairs.too_long:,} pairs of more than {settings.train.sequence_length:,} tokens are left out")
    print(f"{len(pairs.train):,} pairs to train on, {len(pairs.test):,} held out")
    return Opened(data.rows, lambda *_: data)
