"""transformers' Trainer with the project's order of data, precision, checkpoints, evaluation and figures."""

import inspect
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerControl, TrainingArguments

from doge_lm.data.streaming import StreamState
from doge_lm.data.tokenizer import TOKENIZER_NAME, known_max_length
from doge_lm.errors import UserError
from doge_lm.evaluation.bits_per_byte import Evaluation, evaluate
from doge_lm.model.modeling_doge import DogeSharedPart
from doge_lm.training import checkpoints
from doge_lm.training.callbacks import StepSchedule
from doge_lm.training.checkpoints import RunRecord
from doge_lm.training.data import TrainingData
from doge_lm.training.hardware import Peak
from doge_lm.training.optimizer import decayed_names, is_plain_adamw, make_optimizer
from doge_lm.training.order import StreamSampler
from doge_lm.training.plan import Plan
from doge_lm.training.settings import TrainSettings


class Stopwatch:
    """Time since the last lap; what happens between `restart` and the call before it is not counted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a lap now."""
        self._begun = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of the lap so far."""
        return time.perf_counter() - self._begun


def training_arguments(
    train: TrainSettings, plan: Plan, output_dir: Path, kind: type[TrainingArguments] = TrainingArguments, **more: Any
) -> TrainingArguments:
    """The settings and the plan in transformers' words, or with a `kind` and `more` of its arguments, in TRL's.

    Precision, compilation and gradient checkpointing are not among them: `DogeTrainer` and `prepare_model` see to
    these, in the same way for every version of transformers. (By its own bf16 option the logits would be copied to
    float32 on leaving the model.) Neither is the limit on checkpoints, which are removed as carefully as they appear.
    """
    cosine = train.lr_scheduler_type == "cosine"
    # A stream has processes of its own, and is read in this one.
    workers = 0 if train.stream is not None else train.dataloader_num_workers
    cuda = plan.hardware.device.type == "cuda"
    arguments = kind(
        output_dir=str(output_dir),
        max_steps=plan.total_steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulate_steps,
        average_tokens_across_devices=True,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": train.min_lr_rate} if cosine else {},
        warmup_steps=plan.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        # The filter waits for the device after every micro-batch; `DogeTrainer.log` looks at every logged loss.
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=train.eval_steps,
        per_device_eval_batch_size=train.per_device_eval_batch_size,
        save_strategy="steps",
        save_steps=train.save_steps,
        save_total_limit=None,
        dataloader_num_workers=workers,
        dataloader_multiprocessing_context="spawn" if workers else None,
        dataloader_pin_memory=cuda,
        # Else the copy of each batch waits until the device has done all that was asked of it, and then idles.
        accelerator_config={"non_blocking": cuda},
        remove_unused_columns=False,  # the collator reads columns that the model does not take
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # frequencies of positions, which each process has of its own
        use_cpu=plan.hardware.device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    # Several GPUs are used through torchrun, one process each; never through nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def prepare_model(model: PreTrainedModel, train: TrainSettings, compiled: bool, graphs: bool = False) -> None:
    """Switch on recomputation and compilation as the settings ask for them, in place.

    With `graphs` each pass of the compiled model is recorded as a CUDA graph: the host starts it in one call, where
    it takes longer to start some 800 kernels than a small model takes to run them. Activations and gradients then lie
    in memory that the next pass writes over; `DogeTrainer` sees to that.
    """
    for module in model.modules():
        if isinstance(module, DogeSharedPart):
            module.recomputes_activation = train.recompute_activation
    if train.gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if compiled:
        # In place, so that the model keeps its class and its names, and is saved as if it were not compiled.
        # A model in one graph, or an error: a break in it would cost most of the speed without a word.
        options = {"triton.cudagraphs": True} if graphs else None
        model.compile(fullgraph=not train.attn_implementation.startswith("flash"), dynamic=False, options=options)


class DogeTrainer(Trainer):
    """See the module. The whole run is one "epoch" of the Trainer: the stream of `order.StreamSampler`.

    Args:
        model: the model in float32.
        plan: the run.
        train: its settings.
        data: training and test set.
        collator: rows to a batch.
        tokenizer: saved beside the model.
        record: saved in every checkpoint; its progress is where this run starts.
        peak: what model-FLOPs utilization is a share of.
        output_dir: where checkpoints go.
        graphs: whether the model's passes are CUDA graphs (`prepare_model`).
        more: arguments of a further base class.
    """

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    arguments_class: type[TrainingArguments] = TrainingArguments
    """What the settings are told to the base class by."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        train: TrainSettings,
        data: TrainingData,
        collator: Callable[[list[dict]], dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        record: RunRecord,
        peak: Peak,
        output_dir: Path,
        graphs: bool = False,
        **more: Any,
    ):
        # What the model is saved with: `Trainer` switches the cache off for training.
        self._use_cache = model.config.use_cache
        self.plan, self.train_settings, self.record, self.peak = plan, train, record, peak
        self.data = data
        self._graphs = graphs
        self._stopwatch = Stopwatch()
        self._staging: Path | None = None
        super().__init__(
            model=model,
            args=self.make_arguments(output_dir),
            train_dataset=self.base_dataset(),
            eval_dataset=data.test,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[StepSchedule(plan.steps_per_epoch)],
            **more,
        )
        self.train_dataset = data.train
        self._bf16 = record.bf16
        self._skips_logits = "skip_logits" in inspect.signature(model.forward).parameters
        self._tokens_seen = self._tokens_logged = record.tokens_seen
        self._targets_seen: torch.Tensor | int = record.targets_seen

    def make_arguments(self, output_dir: Path) -> TrainingArguments:
        """What the base class is told."""
        return training_arguments(self.train_settings, self.plan, output_dir, self.arguments_class)

    # Data

    def base_dataset(self) -> Any:
        """The training set as the base class wants to see it; what is read is `data.train`."""
        return self.data.train

    def get_train_dataloader(self) -> DataLoader:
        """As the base class, whose way of seeding worker processes has each of them import transformers.

        That takes seconds and 300 MB a worker; and what reads and collates prepared rows draws no random numbers.
        """
        loader = super().get_train_dataloader()
        # accelerate's loader has another inside, which is the one that is read.
        getattr(loader, "base_dataloader", loader).worker_init_fn = None
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """The rows of the whole run; those that are done already are counted by the Trainer, and never looked at."""
        if self.data.stream is not None:
            return SequentialSampler(self.data.stream)
        length = self.plan.total_steps * self.plan.sequences_per_step
        return StreamSampler(
            self.data.shards, length, self.train_settings.seed, self.record.step * self.plan.sequences_per_step
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of one step and their number of targets over all devices; both are counted."""
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Every device has as many sequences of the same length.
        self._tokens_seen += sum(batch["input_ids"].numel() for batch in batches) * self.args.world_size
        if targets is not None:
            # The Trainer gives float32, exact for one step but not for the sum of many. It stays on the device until
            # it is logged.
            self._targets_seen = self._targets_seen + torch.as_tensor(targets).long()
        return batches, targets

    # Optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's AdamW, or what else the settings ask for (`make_optimizer`)."""
        if self.optimizer is not None or is_plain_adamw(self.train_settings):
            return super().create_optimizer(*args, **kwargs)
        self.optimizer = optimizer = make_optimizer(self.model, self.train_settings, decayed_names(self.model))
        return optimizer

    # Precision

    def compute_loss_context_manager(self) -> ExitStack:
        """Autocast around forward pass and loss; weights, gradients and optimizer are float32."""
        stack = super().compute_loss_context_manager()
        if self._bf16:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return stack

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss; a model that can leave out the logits does."""
        if self._skips_logits:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Loss and gradients of a micro-batch."""
        if not self._graphs:
            return super().training_step(model, *args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        several = self.plan.accumulate_steps > 1
        first = several and all(parameter.grad is None for parameter in model.parameters())
        loss = super().training_step(model, *args, **kwargs)
        if first:
            # The next micro-batch writes its gradients where these lie, and adds them to what it finds here.
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()
        return loss

    # Reports

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the time of a lap begins here."""
        # transformers gives it by this name, and PyTorch 2.13 has another as well.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        self._stopwatch.restart()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report numbers of the Trainer, with ours beside a training loss.

        Raises:
            UserError: if the loss or the gradient is no number any more.
        """
        if "loss" in logs:
            self._check_finite(logs)
            tokens, self._tokens_logged = self._tokens_seen - self._tokens_logged, self._tokens_seen
            rate = tokens / self._stopwatch.seconds()
            logs["tokens_per_second"] = rate
            logs["mfu"] = rate * self.plan.flops_per_token / (self.peak.flops * self.args.world_size)
            logs["tokens_seen"] = self._tokens_seen
            logs["targets_seen"] = int(self._targets_seen)
            logs.update(self._stream_numbers())
            if self.args.device.type == "cuda":
                logs["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.args.device) / 2**30
            self._stopwatch.restart()
        super().log(logs, start_time)

    def _stream_numbers(self) -> dict[str, int]:
        """Passes over the stream that are done, and bad rows that were left out, the current block's included."""
        state, stream = self._stream_state(), self.data.stream
        if state is None or stream is None:
            return {}
        return {"stream_epoch": state.epoch, "stream_skipped": sum(stream.skipped.values())}

    def _stream_state(self) -> StreamState | None:
        if self.data.stream is None:
            return None
        return self.data.stream.state(self.state.global_step * self.plan.sequences_per_step)

    def _check_finite(self, logs: dict[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise UserError(
                    f"{name} is {logs[name]} at step {self.state.global_step}: training has diverged; resume from the "
                    "last checkpoint if it was still well, or start anew with a lower learning_rate"
                )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        busy = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if busy:  # these steps were logged first (`StepSchedule`), so the lap that is lost holds no training
            self._stopwatch.restart()

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the test set; returns and logs `eval_loss`, `eval_perplexity`, `eval_bits_per_byte` and by source."""
        result = evaluate(
            self.accelerator.unwrap_model(self.model),
            self.eval_dataset if eval_dataset is None else eval_dataset,
            self.data_collator,
            self.args.per_device_eval_batch_size,
            bf16=self._bf16,
            reducer=self.accelerator,
        )
        metrics = evaluation_metrics(result, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        target, staging = output_dir / name, output_dir / f"{checkpoints.STAGING_PREFIX}{name}"
        with checkpoints.disk_errors_explained(target, self.plan.checkpoint_bytes):
            if self.args.should_save:
                checkpoints.check_free_disk(output_dir, self.plan.checkpoint_bytes, f"the checkpoint {name}")
                checkpoints.clear_staging(output_dir)
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            try:
                self._staging = staging
                super()._save_checkpoint(model, trial)
                # Every process writes its state of random numbers; the record is made when all are there.
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._progress().write(staging / name)
                    checkpoints.publish(staging / name, target)
                    checkpoints.rotate(output_dir, self.train_settings.save_total_limit)
            finally:
                self._staging = None
                if self.args.should_save:
                    checkpoints.clear_staging(output_dir)
        self.accelerator.wait_for_everyone()

    def _progress(self) -> RunRecord:
        return replace(
            self.record,
            step=self.state.global_step,
            tokens_seen=self._tokens_seen,
            targets_seen=int(self._targets_seen),
            stream=None if (state := self._stream_state()) is None else asdict(state),
        )

    def save_model_files(self, directory: Path) -> None:
        """Save what the run was for, as `from_pretrained` loads it."""
        self.save_weights(directory)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            self.save_weights(Path(self.args.output_dir if output_dir is None else output_dir))

    def save_weights(self, directory: Path) -> None:
        """Save model and tokenizer as `from_pretrained` loads them, with the cache on as the settings say."""
        self.model.config.use_cache = self._use_cache
        try:
            self.model.save_pretrained(directory)
        finally:
            self.model.config.use_cache = False
        self.save_tokenizer(directory)

    def save_tokenizer(self, directory: Path) -> None:
        """Save the tokenizer; its main file as it is, since data that was made with it is known by those bytes.

        Its `model_max_length` says how long the texts were that the model has learned from, in tokens: those of this
        run, or of the one before if its were longer.
        """
        earlier = known_max_length(self.processing_class) or 0
        self.processing_class.model_max_length = max(self.train_settings.sequence_length, earlier)
        self.processing_class.save_pretrained(directory)
        original = Path(self.processing_class.name_or_path) / TOKENIZER_NAME
        if original.is_file():
            shutil.copyfile(original, directory / TOKENIZER_NAME)


def evaluation_metrics(result: Evaluation, prefix: str = "eval") -> dict[str, float]:
    """An evaluation as flat numbers: `eval_loss`, …, and `eval_SOURCE_loss`, …."""
    metrics = {}
    for name, scores in [("", result.total), *result.by_source.items()]:
        start = f"{prefix}_{name}_" if name else f"{prefix}_"
        metrics[f"{start}loss"] = scores.loss
        metrics[f"{start}perplexity"] = scores.perplexity
        metrics[f"{start}bits_per_byte"] = scores.bits_per_byte
    return metrics
