"""Loss of Doge beside a Llama of equal total parameters, by the project's own trainer, data order and evaluation.

    python benchmarks/quality.py --dataset_path DIR --tokenizer_path DIR --output_dir OUT RUN [RUN …]

A RUN is a row of the protocol, e.g. `doge:inner_value_init=identity,seed=1` or `llama:learning_rate=2e-3`: what
stands behind the colon are settings of the preset doge_25M, changed. `doge@one_pool+residual:seed=1` is a Doge with
changes of `variants.py`, made for diagnosis, `llama@qk_norm` a Llama with one. The width of a Llama follows from the
total of parameters of the Doge with the same settings, or with `equal_work=true` from its work a token. `fit=true`
among the settings makes the shared part of a Doge as wide as brings the total to the preset's (with tied embeddings,
say, that of a Llama too), and `tokens=30e6` takes the place of --tokens. The protocol is the default under them: T =
1,024, 64K tokens a step, cosine over 60M tokens, peak learning rate 3e-3, 1/√fan_in init. With `as_is=true` it gives
way to the preset's own step, rates and starting values; which one is then to be said by --preset.
Prints a table and appends each row to OUT/quality.jsonl. `--also_test DIR` scores the test rows of a second prepared
set too, under `other_…`: text by which nothing was chosen.
"""

import argparse
import gc
import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from flags import above_zero, run_command
from safetensors.torch import load_model
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast
from variants import CHANGES, LLAMA_CHANGES

from doge_lm.data.dataset import PackedCollator, load_prepared
from doge_lm.errors import UserError
from doge_lm.evaluation.bits_per_byte import evaluate
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.model.linear_cross_entropy import cap_logits, next_token_loss
from doge_lm.model.modeling_doge import DogeCDMoE, DogeInnerFuncAttn, TokenEmbedding
from doge_lm.training import pretrain
from doge_lm.training.callbacks import LOG_NAME
from doge_lm.training.flags import add_pretrain_arguments
from doge_lm.training.plan import count_model
from doge_lm.training.pretrain import ModelBuilder
from doge_lm.training.settings import Settings, TrainSettings, load_settings
from doge_lm.training.trainer import evaluation_metrics

DEFAULT_PRESET = "doge_25M"
SEQUENCE_LENGTH = 1024
TOKENS_PER_STEP = 65536
REPEAT_PARTS = 16  # of the copied tokens, for the loss by position
LONGEST_NAME = 120  # of a folder; file systems refuse names over 255 bytes
WIDTH_STEP = 8  # of fitted widths: rows that do not begin at whole 16 bytes leave the fast kernels of products
CAUSAL = "causal_sdpa"
PROTOCOL = {"learning_rate": "3e-3", "weight_init": "fan_in", "document_mask": "false"}
REPORTS = {
    "eval_steps": "1000000",
    "save_steps": "1000000",
    "per_device_eval_batch_size": "16",
    "logging_steps": "10",
}
# What a row says that is no setting of the preset.
OF_THE_ROW = ("fit", "tokens", "sequences_per_step", "as_is")


# transformers makes no mask for an implementation that has none of its own, and SDPA is then told that it is causal.
# Under `torch.compile` its own `sdpa` writes out a T×T mask (before PyTorch 2.14), which a Doge does without. For
# padding to the left, and for several tokens behind a filled cache, there would have to be one: neither occurs here.
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def llama_like(config: DogeConfig, equal_work: bool = False) -> LlamaConfig:
    """A Llama of the same width and depth, its MLP wide enough for the same total parameters, or a step more.

    With `equal_work`: to the same work a token, counted as `ModelCounts.flops_per_token` counts it.

    Raises:
        UserError: if a Llama without an MLP has more.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    counts = count_model(config)
    head = config.vocab_size * d
    if equal_work:
        width = ((counts.matmul - head) / layers - 4 * d * d) / (3 * d)
    else:
        outside = (1 if config.tie_word_embeddings else 2) * head + d
        width = ((counts.total - outside) / layers - 4 * d * d - 2 * d) / (3 * d)
    if width <= 0:
        raise UserError("a Llama of the same width and depth is larger without an MLP than the Doge")
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=d,
        intermediate_size=math.ceil(width / WIDTH_STEP) * WIDTH_STEP,
        num_hidden_layers=layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


def llama_attention(train: TrainSettings) -> str:
    """The implementation by which a Llama attends as fast as a Doge: rows have no padding to the left."""
    return CAUSAL if train.attn_implementation == "sdpa" and not train.document_mask else train.attn_implementation


class Llama(LlamaForCausalLM):
    """transformers' Llama with a cap of logits as Doge's and its loss in training, without logits of all tokens."""

    logit_cap = 0.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As a Doge's."""
        return cap_logits(self.lm_head(hidden), self.logit_cap)

    def forward(self, labels: torch.Tensor | None = None, skip_logits: bool = False, **kwargs: Any) -> Any:
        """Logits as the base class; with `labels` the loss alone, whatever `skip_logits` says."""
        if labels is None:
            output = super().forward(**kwargs)
            output.logits = cap_logits(output.logits, self.logit_cap)
            return output
        divisor = kwargs.pop("num_items_in_batch", None)
        hidden_BTd = self.model(**kwargs).last_hidden_state
        loss = next_token_loss(hidden_BTd, self.lm_head.weight, labels, divisor, cap=self.logit_cap)
        return CausalLMOutputWithPast(loss=loss)


def build_llama(
    config: DogeConfig, train: TrainSettings, changes: Sequence[str] = (), equal_work: bool = False
) -> PreTrainedModel:
    """The Llama beside a Doge, initialized by the same rule (`weight_init`), with changes of `variants.py`."""
    like = llama_like(config, equal_work)
    model = Llama._from_config(like, attn_implementation=llama_attention(train), dtype=torch.float32)
    model.logit_cap = config.final_logit_softcapping or 0.0
    embedding = model.get_input_embeddings()
    # In place: a second one would draw its start, and all after it would start elsewhere than in recorded rows.
    embedding.__class__, embedding.embed_scale = TokenEmbedding, config.embedding_multiplier
    tied = model.lm_head if like.tie_word_embeddings else None  # one table, drawn as the embedding it is
    for module in model.modules():
        if module is tied:
            continue
        if isinstance(module, torch.nn.Linear):
            std = module.in_features**-0.5 if config.weight_init == "fan_in" else config.initializer_range
            torch.nn.init.normal_(module.weight, std=std)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=config.initializer_range)
    for name in changes:
        LLAMA_CHANGES[name](model)
    return model


def build_doge(config: DogeConfig, train: TrainSettings, changes: Sequence[str] = ()) -> PreTrainedModel:
    """A Doge with changes of `variants.py`."""
    model = pretrain.build_model(config, train)
    for name in changes:
        CHANGES[name](model)
    return model


def parse_row(row: str) -> tuple[str, ModelBuilder, dict[str, str]]:
    """The architecture of a row, what builds its model, and its settings.

    Raises:
        UserError: for an unknown architecture or change, or a number of the row's own that is none.
    """
    model, _, settings = row.partition(":")
    architecture, _, variant = model.partition("@")
    changes = variant.split("+") if variant else []
    if architecture not in ("doge", "llama"):
        raise UserError(f"run {row!r}: the architecture must be doge or llama")
    known, builder = (CHANGES, build_doge) if architecture == "doge" else (LLAMA_CHANGES, build_llama)
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise UserError(
            f"run {row!r}: {unknown[0]} is no change of a {architecture}; those of a {architecture} are "
            f"{', '.join(known)}"
        )
    build = partial(builder, changes=changes)
    changed = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"run {row!r}: {setting!r} is no KEY=VALUE (an entry of a mapping is KEY.ENTRY=VALUE)")
        changed[key] = value
    check_numbers(row, changed)
    if changed.pop("equal_work", "false") == "true":
        if architecture == "doge":
            raise UserError(f"run {row!r}: equal_work is a setting of a llama, whose width follows a doge's")
        build = partial(build, equal_work=True)
    return architecture, build, changed


def check_numbers(row: str, changed: dict[str, str]) -> None:
    """Look through what the row alone knows.

    Raises:
        UserError: if `tokens` or `sequences_per_step` is no positive number, a flag neither true nor false, or the
            length, by which the steps are counted, is not given by its flag.
    """
    for key in ("sequence_length", "train.sequence_length"):
        if key in changed:
            raise UserError(f"run {row!r}: give {key} as --sequence_length {changed[key]}")
    for key in ("tokens", "sequences_per_step"):
        number = above_zero(changed.get(key, "1"))
        if number is None or (key != "tokens" and number % 1):
            kind = "number" if key == "tokens" else "whole number"
            raise UserError(f"run {row!r}: {key} must be a positive {kind}, not {changed[key]!r}")
    for key in ("fit", "as_is", "equal_work"):
        if changed.get(key, "true") not in ("true", "false"):
            raise UserError(f"run {row!r}: {key} must be true or false, not {changed[key]!r}")


def fitted_width(build: ModelBuilder, settings: Settings, total: int) -> int:
    """The width of the shared part, in steps, at which a Doge comes nearest to `total` parameters.

    Raises:
        UserError: if the rest alone has more.
    """
    counts = []
    for width in (1, 2):
        settings.model.cross_domain_intermediate_size = width
        with torch.device("meta"):
            model = build(settings.model_config(), settings.train)
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    width = 1 + (total - counts[0]) / (counts[1] - counts[0])
    if width < 1:
        raise UserError(f"fit: without the shared part the model has {counts[0]} parameters, more than {total}")
    return max(1, round(width / WIDTH_STEP)) * WIDTH_STEP


def check_preset_is_named(row: str, changed: dict[str, str], preset: str | None) -> None:
    """Refuse a row that measures a preset as it is, and does not say which.

    Raises:
        UserError: so.
    """
    if preset is None and changed.get("as_is") == "true":
        raise UserError(f"run {row!r}: as_is=true measures a preset; say which by --preset NAME")


def run_row(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one row; returns its figures."""
    architecture, build, changed = parse_row(row)
    fit = changed.pop("fit", "false") == "true"
    as_is = changed.pop("as_is", "false") == "true"
    usual = load_settings(args.preset).train.sequences_per_step if as_is else TOKENS_PER_STEP // args.sequence_length
    sequences = int(float(changed.pop("sequences_per_step", usual)))
    tokens = float(changed.pop("tokens", args.tokens))
    steps = round(tokens / (sequences * args.sequence_length))
    epochs = math.ceil(tokens / args.epoch_tokens)
    if steps < epochs:
        raise UserError(
            f"run {row!r}: {tokens:,.0f} tokens are {steps} steps of {sequences} sequences of {args.sequence_length}, "
            f"which must be one at least in each of {epochs} epochs; give more tokens"
        )
    settings = {
        **({} if as_is else PROTOCOL),
        **REPORTS,
        "sequence_length": str(args.sequence_length),
        "sequences_per_step": str(sequences),
        "num_train_epochs": str(epochs),
        "per_epoch_max_steps": str(round(steps / epochs)),
        **({"per_device_train_batch_size": str(min(args.micro_batch, sequences))} if args.micro_batch else {}),
        **changed,
    }
    if fit:
        total = count_model(load_settings(args.preset).model_config()).total
        loaded = load_settings(args.preset, [f"{key}={value}" for key, value in settings.items()])
        # A Llama's own width follows from that of the Doge beside it.
        settings["cross_domain_intermediate_size"] = str(
            fitted_width(build if architecture == "doge" else build_doge, loaded, total)
        )
    place = args.output_dir / place_name(row)
    parser = argparse.ArgumentParser()
    add_pretrain_arguments(parser)
    flags = ["--config_path", args.preset, "--dataset_path", args.dataset_path, "--tokenizer_path", args.tokenizer_path]
    flags += ["--logging_dir", str(place / "log"), "--output_dir", str(place / "model"), "--overwrite"]
    for key, value in settings.items():
        flags += ["--set", f"{key}={value}"]
    begun = time.perf_counter()
    pretrain.run(parser.parse_args(flags), build_model=build)
    seconds = time.perf_counter() - begun
    lines = [json.loads(line) for line in (place / "log" / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    of_the_flags = {"preset": Path(args.preset).name, "sequence_length": args.sequence_length}
    figures = {"run": row, **of_the_flags, "seconds": round(seconds, 1), **summarize(lines)}
    loaded = load_settings(args.preset, [f"{key}={value}" for key, value in settings.items()])
    model = build(loaded.model_config(), loaded.train)
    load_model(model, place / "model" / "model.safetensors")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if args.micro_batch:
        figures["micro_batch"] = args.micro_batch
    if args.also_test is not None:
        figures.update(other_losses(model, args, loaded.train))
    test = load_prepared(Path(args.dataset_path)).test
    repeated = repeat_losses(model, test)
    figures["repeat_loss"] = round(repeated.mean().item(), 4)
    figures["repeat_curve"] = [round(part.mean().item(), 4) for part in repeated.tensor_split(REPEAT_PARTS)]
    if architecture == "doge":
        figures.update(usage(model, test))
    return figures


def other_losses(model: PreTrainedModel, args: argparse.Namespace, train: TrainSettings) -> dict[str, float]:
    """Loss and bits per byte of the test rows of `--also_test`, and of each of its sources."""
    other = load_prepared(args.also_test)
    collator = PackedCollator(other.manifest.tokenizer.pad_token_id, args.sequence_length, train.document_mask)
    batch_size, bf16 = int(REPORTS["per_device_eval_batch_size"]), torch.cuda.is_available() and bool(train.bf16)
    metrics = evaluation_metrics(evaluate(model, other.test, collator, batch_size, bf16=bf16), "other")
    return {name: round(value, 4) for name, value in metrics.items()}


def check_other_set(args: argparse.Namespace) -> None:
    """Look through `--also_test` before anything is trained.

    Raises:
        UserError: if it is no prepared set, or one of another tokenizer or length than that of `--dataset_path`.
    """
    first, other = (load_prepared(path).manifest for path in (args.dataset_path, args.also_test))
    for what, here, there in (
        ("tokenizer", first.tokenizer, other.tokenizer),
        ("--max_len", first.sequence_length, other.sequence_length),
    ):
        if here != there:
            raise UserError(f"--also_test {args.also_test} was made with another {what} than {args.dataset_path}")


def place_name(row: str) -> str:
    """The name of a row's folder: what of the row may stand in one, and where that is too long a digest of its end."""
    name = re.sub(r"[^\w.+-]+", "-", row)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(row.encode()).hexdigest()[:8]}"


@torch.no_grad()
def repeat_losses(model: PreTrainedModel, test: Dataset, length: int = 256, samples: int = 16) -> torch.Tensor:
    """Loss at each token but the first of the second copy of `length` tokens, which are drawn from the test set's.

    Without copying it cannot fall below the entropy of the tokens; a model that copies goes towards 0, from the second
    token on.

    Returns:
        (length - 1,), means over the samples.
    """
    pool = torch.cat([torch.as_tensor(test[index]["input_ids"].astype("int64")) for index in range(min(64, len(test)))])
    drawn = torch.randint(len(pool), (samples, length), generator=torch.Generator().manual_seed(0))
    ids = pool[drawn].repeat(1, 2).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, length:-1].float()
    return torch.nn.functional.cross_entropy(logits.mT, ids[:, length + 1 :], reduction="none").mean(dim=0).cpu()


@torch.no_grad()
def usage(model: PreTrainedModel, test: Dataset, rows: int = 64) -> dict[str, list[float]]:
    """How the choices of a trained Doge spread over the first rows of the test set, layer by layer.

    `experts_used` is the share of the N experts that at least one token takes, `experts_effective` is exp(entropy)
    of their use over N, and `value_share` the share of tokens that take the commonest inner value. A list is empty
    where a change took the choice away. `experts_rank` is in how many directions the sums of experts lie, and
    `shared_rank` in how many the outputs of the shared part: exp(entropy) of the eigenvalues of their second moment.
    """
    feed_forwards = [layer.feed_forward for layer in model.model.layers if hasattr(layer.feed_forward, "keys")]
    experts = [watch_experts(feed_forward, model.config.num_cdmmoe_experts) for feed_forward in feed_forwards]
    values = [watch_values(layer.attn, model.config.num_inner_values) for layer in model.model.layers]
    d, e = model.config.hidden_size, model.config.private_expert_intermediate_size
    sums = [watch_moment(feed_forward, "experts", d) for feed_forward in feed_forwards]
    shared = [watch_moment(feed_forward, "shared", e) for feed_forward in feed_forwards]
    for index in range(min(rows, len(test))):
        ids = torch.as_tensor(test[index]["input_ids"].astype("int64"), device=model.device)
        model(input_ids=ids[None], use_cache=False)
    shares = [counts.double() / counts.sum() for counts in experts if counts.any()]
    return {
        "experts_used": [round((share > 0).double().mean().item(), 3) for share in shares],
        "experts_effective": [round(torch.special.entr(share).sum().exp().item() / len(share), 3) for share in shares],
        "experts_rank": [round(effective_rank(moment), 1) for moment in sums],
        "shared_rank": [round(effective_rank(moment), 1) for moment in shared],
        "value_share": [round((counts.max() / counts.sum()).item(), 3) for counts in values if counts.any()],
    }


def watch_experts(feed_forward: DogeCDMoE, num_experts: int) -> torch.Tensor:
    """Counts of the experts that the layer takes from now on, (N,), filled as it runs."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=feed_forward.keys.device)
    route = feed_forward.route

    def counting(c_Me: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = route(c_Me)
        counts.add_(experts.flatten().bincount(minlength=num_experts))
        return weights, experts

    feed_forward.route = counting
    return counts


def watch_moment(feed_forward: DogeCDMoE, part: str, size: int) -> torch.Tensor:
    """Σ y yᵀ of the outputs y of a part of the layer from now on, (size, size) in float64, filled as it runs."""
    moment = torch.zeros(size, size, dtype=torch.float64, device=feed_forward.keys.device)
    compute = getattr(feed_forward, part)

    def adding(x_BTd: torch.Tensor) -> torch.Tensor:
        y_BTd = compute(x_BTd)
        y_Md = y_BTd.flatten(0, 1).double()
        moment.add_(y_Md.t() @ y_Md)
        return y_BTd

    setattr(feed_forward, part, adding)
    return moment


def effective_rank(moment: torch.Tensor) -> float:
    """exp(entropy) of the eigenvalues' shares: 1 if all lies in one direction, the size if all are alike."""
    shares = torch.linalg.eigvalsh(moment).clamp(min=0)
    return torch.special.entr(shares / shares.sum()).sum().exp().item()


def watch_values(attention: DogeInnerFuncAttn, num_values: int) -> torch.Tensor:
    """Counts of the inner values that the layer takes from now on, (n,), filled as it runs."""
    counts = torch.zeros(num_values, dtype=torch.int64, device=attention.v_keys.device)

    def count(_module: torch.nn.Module, _inputs: tuple, queries_BTr: torch.Tensor) -> None:
        chosen = torch.nn.functional.linear(queries_BTr, attention.v_keys).argmax(dim=-1)
        counts.add_(chosen.flatten().bincount(minlength=num_values))

    attention.v_queries.register_forward_hook(count)
    return counts


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run's log: the last evaluation, and the median speed of its second half."""
    evaluation = next(line for line in reversed(lines) if "eval_loss" in line)
    training = [line for line in lines if "tokens_per_second" in line]
    rates = [line["tokens_per_second"] for line in training[len(training) // 2 :]]
    return {
        "tokens": training[-1]["tokens_seen"],
        **{name: round(value, 4) for name, value in evaluation.items() if name.startswith("eval_")},
        "tokens_per_second": round(statistics.median(rates)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
        "curve": training_curve(training),
    }


def training_curve(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The training losses among the lines of a log, by the tokens seen."""
    return {line["tokens_seen"]: round(line["loss"], 4) for line in lines if "tokens_per_second" in line}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--preset", help=f"(default: {DEFAULT_PRESET})")
    parser.add_argument("--dataset_path", required=True)
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--also_test", type=Path, help="a second prepared set, whose test rows are scored too")
    parser.add_argument("--sequence_length", type=int, default=SEQUENCE_LENGTH)
    parser.add_argument("--tokens", type=float, default=60e6)
    parser.add_argument("--micro_batch", type=int, help="sequences of one forward pass (default: what memory allows)")
    parser.add_argument("--epoch_tokens", type=float, default=20e6, help="the plan is cut into epochs of at most this")
    args = parser.parse_args()
    if args.output_dir.is_file():
        raise UserError(f"--output_dir {args.output_dir} is a file; name a folder")
    for row in args.runs:
        check_preset_is_named(row, parse_row(row)[2], args.preset)
    args.preset = args.preset or DEFAULT_PRESET
    if args.also_test is not None:
        check_other_set(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in args.runs:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rows.append(run_row(row, args))
        with (args.output_dir / "quality.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps({key: value for key, value in rows[-1].items() if "curve" not in key}), flush=True)
    print(f"\n{'run':44} {'loss':>7} {'bits/byte':>9} {'Mtok/s':>7} {'GiB':>6}")
    for row in rows:
        print(
            f"{row['run']:44} {row['eval_loss']:7.4f} {row['eval_bits_per_byte']:9.4f} "
            f"{row['tokens_per_second'] / 1e6:7.3f} {row['peak_gib'] or 0:6.2f}"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
