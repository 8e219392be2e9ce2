"""The plan of a run, derived from its settings before the first step, checked, and printed as a table.

A step takes `sequences_per_step` rows of `sequence_length` tokens, however many devices and micro-batches share
them:

    sequences_per_step = per_device_train_batch_size × accumulate_steps × devices

so the number of tokens, the rows of every step and the learning rate at every step do not depend on the machine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from doge_lm.errors import UserError
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.model.linear_cross_entropy import CHUNK_LOGITS
from doge_lm.model.modeling_doge import DogeForCausalLM
from doge_lm.training.hardware import Hardware
from doge_lm.training.muon import hidden_matrices
from doge_lm.training.settings import TrainSettings

# Share of a GPU's memory that the estimate may fill: the rest is for fragmentation and for what it leaves out.
_USABLE_MEMORY = 0.75
# On a CPU larger micro-batches cost speed: their logits (128 KiB a token in float32, at 32,768 ids) are given back to
# the system and faulted in anew at every step. doge_tiny, T = 512, forward and backward, thousands of tokens/s at
# micro-batches of 512, 1,024, 2,048 and 4,096 tokens: in bf16 4.7, 4.7, 4.2, 4.1; in float32, which hardly minds, 3.7,
# 3.7, 3.6, 3.7; of the CPU time in bf16 the system took 19%, 35%, 47%, 52% (2026-11-24, 2 shared cores of a Xeon with
# AMX; the middle one of three runs, each the median of 5 to 9 rounds in alternation).
_CPU_MICRO_TOKENS = 1024

# What the names of the tables of experts end in.
EXPERT_TABLES = ("down_embed.weight", "up_embed.weight")


@dataclass(frozen=True)
class ModelCounts:
    """Parameters of a model and its work. `active` leaves out the experts that one token does not choose.

    `hidden` are those of linear maps but the head, which Muon can train.
    """

    total: int
    active: int
    matmul: int
    hidden: int
    layers: int
    hidden_size: int

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward operations for one token, in FLOP.

        6 for every parameter that takes part in a matrix product for this token (only the chosen experts, however
        they are computed; no look-ups, norms or inner values), and 6·L·T·d for causal attention: half of the
        2·2·T·d of its two products, three times (forward once, backward twice).
        """
        return 6 * self.matmul + 6 * self.layers * sequence_length * self.hidden_size


def count_model(config: DogeConfig) -> ModelCounts:
    """Count the parameters of the model itself, built without memory on the meta device."""
    with torch.device("meta"):
        model = DogeForCausalLM(config)
    chosen = min(config.num_cdmmoe_heads * config.num_cdmmoe_experts_per_head, config.num_cdmmoe_experts)
    # A tied embedding is the lm_head's matrix, and multiplied as such.
    looked_up = ("v_embed",) if config.tie_word_embeddings else ("v_embed", "word_embed")
    maps = hidden_matrices(model)
    total = idle = not_multiplied = hidden = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        total += size
        if name.endswith(EXPERT_TABLES):
            idle += size - chosen * parameter.shape[1]
        elif name.endswith(("norm.weight", ".bias", ".shares", "gains")) or any(each in name for each in looked_up):
            not_multiplied += size
        elif name in maps:
            hidden += size
    active = total - idle
    return ModelCounts(total, active, active - not_multiplied, hidden, config.num_hidden_layers, config.hidden_size)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step. An estimate: tens of percent off, on either side."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes of everything together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(
    config: DogeConfig, train: TrainSettings, counts: ModelCounts, micro_batch: int, bf16: bool, kernels: bool
) -> MemoryEstimate:
    """What one device holds during the backward pass of one micro-batch.

    Weights, gradients and the two moments of AdamW, or the one of Muon, are float32. For each token and layer the
    backward pass needs, in the type of the computation: the inputs and outputs of the linear maps, queries, keys,
    values and output of attention, the hidden layer of the shared part twice, and the N expert scores; the residual
    stream, the norms and the inner values are float32. With `kernels`, compiled for a GPU, norms and queries are kept
    once or not at all, the residual stream in the type of the computation, the inner values are not written out, and
    with `recompute_activation` that hidden layer is kept once. A gated shared part keeps its hidden layer three times,
    norms of queries and keys keep what they norm, shifts what they mix, skips what they add, in float32, and a value
    residual the first layer's input and each later one's sum with it. For one layer at a time there is its gradient
    too. Of the logits one chunk exists at a time (`linear_cross_entropy`), with the gradients of the head's input and
    of its matrix.
    """
    tokens = micro_batch * train.sequence_length * train.ROWS
    d, e, width = config.hidden_size, config.private_expert_intermediate_size, 2 if bf16 else 4
    experts, heads = config.num_cdmmoe_experts, config.num_cdmmoe_heads
    times = 3 if config.shared_gate else 1 if kernels and train.recompute_activation else 2
    hidden = times * config.cross_domain_intermediate_size + (2 * d if config.qk_norm else 0)
    hidden += 2 * config.key_shift * d
    shifts, skips = config.attention_shift + config.feed_forward_shift, 4 * config.dense_skips * d
    sums = config.value_residual and config.num_hidden_layers > 1
    if kernels:
        layer = width * ((8 + shifts + sums) * d + hidden + e + experts) + skips
    else:
        layer = width * (10 * d + hidden + (1 + heads) * e + 2 * experts) + 4 * (6 + 2 * shifts + sums) * d + skips
    layers = config.num_hidden_layers
    kept = layers * layer
    if train.gradient_checkpointing:
        kept = layers * (4 * d + skips) + sums * width * d + layer
    kept += 2 * width * config.cross_domain_intermediate_size
    chunk = min(tokens * config.vocab_size, CHUNK_LOGITS)
    logits = width * (chunk + tokens * d) + 4 * config.vocab_size * d
    moments = 2 * counts.total - (counts.hidden if train.optimizer == "muon" else 0)
    return MemoryEstimate(4 * counts.total, 4 * counts.total, 4 * moments, tokens * kept, logits)


@dataclass(frozen=True)
class Plan:
    """Everything that follows from the settings, the data and the machine. Memory in bytes, work in FLOP."""

    counts: ModelCounts
    sequence_length: int
    sequences_per_step: int
    micro_batch: int
    accumulate_steps: int
    world_size: int
    wanted_steps_per_epoch: int
    steps_per_epoch: int
    epochs: int
    warmup_steps: int
    rows: int | None
    memory: MemoryEstimate
    hardware: Hardware
    notes: tuple[str, ...]
    data: str = ""
    attention: str = ""
    optimizer: str = "AdamW"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step of the optimizer, over all devices; padding counts."""
        return self.sequences_per_step * self.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch."""
        return self.steps_per_epoch * self.sequences_per_step

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.total_steps * self.tokens_per_step

    @property
    def flops_per_token(self) -> int:
        """Forward and backward operations for one token."""
        return self.counts.flops_per_token(self.sequence_length)

    @property
    def total_flops(self) -> int:
        """Operations of the whole run."""
        return self.flops_per_token * self.total_tokens

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint on disk: weights and the optimizer's moments."""
        return self.memory.weights + self.memory.optimizer

    def table(self) -> str:
        """The plan as aligned lines of text, followed by its notes."""
        gib, memory = 2**30, self.memory
        steps = f"{self.steps_per_epoch:,}"
        if self.steps_per_epoch < self.wanted_steps_per_epoch:
            steps += f" (the settings ask for {self.wanted_steps_per_epoch:,})"
        lines = [
            ("parameters", f"{self.counts.total:,} total, {self.counts.active:,} active for a token"),
            ("tokens a step", f"{self.tokens_per_step:,} = {self.sequences_per_step:,} x {self.sequence_length:,}"),
            (
                "micro-batch",
                f"{_count(self.micro_batch, 'sequence')} x {self.accumulate_steps:,} accumulated x "
                f"{_count(self.world_size, 'device')}",
            ),
            ("steps an epoch", steps),
            (
                "steps in total",
                f"{self.total_steps:,} in {_count(self.epochs, 'epoch')}, {self.warmup_steps:,} of warm-up",
            ),
            ("tokens an epoch", f"{self.steps_per_epoch * self.tokens_per_step:,}"),
            ("tokens in total", f"{self.total_tokens:,}"),
            ("data", self.data),
            ("rows of data", "not looked at" if self.rows is None else f"{self.rows:,}"),
            ("attention", self.attention),
            ("work for a token", f"{self.flops_per_token / 1e6:,.1f} MFLOP, forward and backward"),
            ("work in total", f"{self.total_flops:.3e} FLOP"),
            (
                "memory, estimated",
                f"{memory.total / gib:.2f} GiB: weights {memory.weights / gib:.2f}, "
                f"gradients {memory.gradients / gib:.2f}, {self.optimizer} {memory.optimizer / gib:.2f}, "
                f"activations {memory.activations / gib:.2f}, logits {memory.logits / gib:.2f}",
            ),
            ("device", f"{self.hardware.device} ({self.hardware.name}), {self.hardware.memory / gib:.2f} GiB"),
            ("checkpoint", f"about {self.checkpoint_bytes / gib:.2f} GiB on disk"),
        ]
        width = max(len(label) for label, _ in lines)
        text = [f"  {label:<{width}}  {value}" for label, value in lines]
        return "\n".join(["Plan", *text, *(f"  note: {note}" for note in self.notes)])


def make_plan(
    config: DogeConfig,
    train: TrainSettings,
    hardware: Hardware,
    *,
    rows: int | None = None,
    world_size: int = 1,
    bf16: bool = True,
    compiled: bool = False,
    strict: bool = False,
) -> Plan:
    """Derive and check the plan of a run.

    Args:
        config: the model.
        train: the settings; "auto" values are worked out here.
        hardware: the device of one process.
        rows: rows of the training set; None if it is not there (a dry run).
        world_size: number of devices.
        bf16: whether it computes in bfloat16.
        compiled: whether the model will be compiled, which saves memory.
        strict: make data smaller than the settings ask for an error.

    Raises:
        UserError: if batch, accumulation and devices do not come out even, or the data holds too few rows.
    """
    counts = count_model(config)

    def memory_of(micro_batch: int) -> MemoryEstimate:
        kernels = compiled and hardware.device.type == "cuda"
        return estimate_memory(config, train, counts, micro_batch, bf16, kernels)

    sequences, micro, accumulate = _resolve_batch(train, world_size, hardware, memory_of)
    notes = []
    wanted = _wanted_steps(train, sequences, rows)
    steps_per_epoch = wanted
    if rows is not None:
        steps_per_epoch = _steps_the_data_holds(wanted, sequences, rows, strict)
        notes += _data_notes(train.num_train_epochs, wanted, sequences, rows, steps_per_epoch)
    memory = memory_of(micro)
    if memory.total > hardware.memory:
        notes.append(
            f"the estimate exceeds the memory of {hardware.device}; if it fails, lower per_device_train_batch_size "
            "or set gradient_checkpointing=true"
        )
    if train.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"sequence_length {train.sequence_length} is more than max_position_embeddings "
            f"{config.max_position_embeddings}; raise the latter or shorten the former"
        )
    total_steps = steps_per_epoch * train.num_train_epochs
    return Plan(
        counts=counts,
        sequence_length=train.sequence_length,
        sequences_per_step=sequences,
        micro_batch=micro,
        accumulate_steps=accumulate,
        world_size=world_size,
        wanted_steps_per_epoch=wanted,
        steps_per_epoch=steps_per_epoch,
        epochs=train.num_train_epochs,
        warmup_steps=round(train.warmup_ratio * total_steps),
        rows=rows,
        memory=memory,
        hardware=hardware,
        notes=tuple(notes),
        data=_data_described(train),
        attention=_attention_described(train),
        optimizer="AdamW" if train.optimizer == "adamw" else "Muon and AdamW",
    )


def _attention_described(train: TrainSettings) -> str:
    if train.ROWS > 1:
        return "each answer of a pair alone, with its prompt"
    return "within documents" if train.document_mask else "over all documents of a sequence"


def _data_described(train: TrainSettings) -> str:
    if train.stream is None:
        return f"the prepared set {train.dataset_path}"
    return (
        f"the text of {train.stream}, tokenized meanwhile (workers on each device: {train.stream_workers:,}; "
        f"held out: {_count(train.stream_test_rows, 'row')})"
    )


def _wanted_steps(train: TrainSettings, sequences: int, rows: int | None) -> int:
    """Steps of an epoch by the settings; null stands for all that the data holds, but one at least."""
    if train.per_epoch_max_steps is not None:
        return train.per_epoch_max_steps
    if rows is None:
        raise UserError(
            "per_epoch_max_steps is null, all rows of the data, and here nothing is known of these; set a number"
        )
    return max(1, rows // sequences)


def _steps_the_data_holds(wanted: int, sequences: int, rows: int, strict: bool) -> int:
    held = rows // sequences
    if held >= wanted:
        return wanted
    shortage = (
        f"the data has {rows:,} rows, an epoch of {wanted:,} steps of {sequences:,} sequences needs "
        f"{wanted * sequences:,}"
    )
    if strict:
        raise UserError(
            f"{shortage}; add data, set per_epoch_max_steps to at most {held:,}, or leave out --strict for shorter "
            "epochs"
        )
    if held == 0:
        raise UserError(f"{shortage}, and not even one step; add data, or set sequences_per_step to at most {rows:,}")
    return held


def _data_notes(epochs: int, wanted: int, sequences: int, rows: int, steps_per_epoch: int) -> list[str]:
    notes = []
    per_epoch = steps_per_epoch * sequences
    over = rows - per_epoch
    if steps_per_epoch < wanted:
        notes.append(
            f"the data holds {steps_per_epoch:,} steps an epoch, not the {wanted:,} of the settings: epochs are shorter"
        )
    if steps_per_epoch < wanted or 0 < over < sequences:
        if over > 0:
            notes.append(f"the {over:,} rows over after an epoch's last whole step open the next epoch")
    else:
        left_out = max(0, rows - per_epoch * epochs)
        if left_out:
            notes.append(
                f"the data is larger than the plan: {left_out:,} of its {rows:,} rows, drawn at random, stay out"
            )
    return notes


def _resolve_batch(
    train: TrainSettings, world_size: int, hardware: Hardware, memory_of: Callable[[int], MemoryEstimate]
) -> tuple[int, int, int]:
    """Sequences a step, sequences of a micro-batch, and micro-batches a step on one device."""
    sequences, micro, accumulate = (
        train.sequences_per_step,
        train.per_device_train_batch_size,
        train.accumulate_steps,
    )
    if sequences == "auto":
        if micro == "auto" or accumulate == "auto":
            raise UserError(
                "sequences_per_step is auto, which follows from per_device_train_batch_size and accumulate_steps; "
                "give both of them, or sequences_per_step"
            )
        return micro * accumulate * world_size, micro, accumulate
    if sequences % world_size:
        raise UserError(
            f"sequences_per_step {sequences} cannot be shared by {world_size} devices; "
            f"{_multiples(sequences, world_size)} would do"
        )
    share = sequences // world_size
    _refuse_uneven(train, sequences, share, world_size)
    if micro == "auto":
        micro = share // accumulate if accumulate != "auto" else _auto_micro_batch(share, train, hardware, memory_of)
    if accumulate == "auto":
        accumulate = share // micro
    return sequences, micro, accumulate


def _refuse_uneven(train: TrainSettings, sequences: int, share: int, world_size: int) -> None:
    """Raises UserError, naming the keys that were set, where a device's share is not the product they give."""
    keys = ("per_device_train_batch_size", "accumulate_steps")
    given = {key: getattr(train, key) for key in keys if getattr(train, key) != "auto"}
    product = math.prod(given.values())
    if share == product or (len(given) < len(keys) and share % product == 0):
        return
    factors = " x ".join(f"{key} {value}" for key, value in given.items())
    wanted = f"the {_count(share, 'sequence')} of each device (sequences_per_step {sequences}, devices {world_size})"
    choices = " or ".join(map(str, _divisors(share)))
    if len(given) < len(keys):
        raise UserError(f"{factors} does not divide {wanted}; set it to auto or {choices}")
    raise UserError(
        f"{factors} is {product}, not {wanted}; set sequences_per_step to {product * world_size}, or one of the "
        f"first two to auto and the other to {choices}"
    )


def _auto_micro_batch(
    share: int, train: TrainSettings, hardware: Hardware, memory_of: Callable[[int], MemoryEstimate]
) -> int:
    """The largest divisor of a device's share that fits into its memory by the estimate; at least 1."""
    fitting = [micro for micro in _divisors(share) if memory_of(micro).total <= _USABLE_MEMORY * hardware.memory]
    if hardware.device.type == "cpu":
        fitting = [micro for micro in fitting if micro * train.sequence_length <= _CPU_MICRO_TOKENS]
    return max(fitting, default=1)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _multiples(number: int, base: int) -> str:
    below = number // base * base
    return f"{below} or {below + base}" if below else str(base)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
