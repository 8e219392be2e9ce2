"""`train`: pre-train a model from a settings file, a tokenizer, and a prepared set or a stream of text."""

import argparse
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from doge_lm.errors import UserError
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.model.modeling_doge import DogeForCausalLM
from doge_lm.training.run import Job, run_job
from doge_lm.training.settings import TrainSettings, load_settings
from doge_lm.training.trainer import DogeTrainer

ModelBuilder = Callable[[DogeConfig, TrainSettings], PreTrainedModel]


def build_model(config: DogeConfig, train: TrainSettings) -> PreTrainedModel:
    """A Doge with fresh weights in float32."""
    return DogeForCausalLM._from_config(config, attn_implementation=train.attn_implementation, dtype=torch.float32)


def run(args: argparse.Namespace, build_model: ModelBuilder = build_model) -> int:
    """Train as the flags say; returns the exit status.

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
    config, train = settings.model_config(), settings.train
    job = Job(settings, train, config, args.tokenizer_path, lambda: build_model(config, train), DogeTrainer)
    run_job(job, args)
    return 0
