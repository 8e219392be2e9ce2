"""Small models, large weights and real text for the model's tests."""

from __future__ import annotations

import math
import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from doge_lm import DogeConfig, DogeForCausalLM
from tests.conftest import ALL

from .reference import Reference, Sizes

# Triton's interpreter takes a second or two for each of what a GPU does in an instant.
EVERY_VARIANT = ALL or torch.cuda.is_available()

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "hidden_bias": False,
    "hidden_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_attention_heads": 3,
    "num_inner_values": 4,
    "inner_values_retrieval_size": 10,
    "cross_domain_intermediate_size": 28,
    "private_expert_intermediate_size": 14,
    "num_cdmmoe_experts": 12,
    "num_cdmmoe_heads": 2,
    "num_cdmmoe_experts_per_head": 3,
}
"""No two sizes alike, so that a transposed or mistaken one cannot pass. 12 experts are tables of 3 and 4 rows."""

TINY_FIRST_KEY_TABLE = 3

SHIFTS = {"key_shift": True, "attention_shift": True, "feed_forward_shift": True}
"""With them a cache holds more than keys and values."""

WITHOUT_EXPERTS = {
    "num_cdmmoe_experts": 0,
    "private_expert_intermediate_size": 24,
    "embedding_multiplier": 2.0,
    "final_logit_softcapping": 3.0,
}
OVER_LAYERS = {"value_residual": True, "dense_skips": True}

FORMS: dict[str, dict[str, Any]] = {
    "published": {},
    "shifts": SHIFTS,
    "shifts, over layers, no experts": SHIFTS | WITHOUT_EXPERTS | OVER_LAYERS,
}
with_and_without_shifts = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def tiny_config(**changes: Any) -> DogeConfig:
    """The small config with some fields changed."""
    return DogeConfig(**{**TINY, **changes})


def tiny_model(*, seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small model in evaluation mode whose weights are large enough that every part shows in the logits."""
    config = tiny_config(**changes)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = DogeForCausalLM(config).to(dtype).eval()
    draw_large_weights(model, seed)
    return model


def draw_large_weights(model: torch.nn.Module, seed: int) -> None:
    """Redraw every parameter so that each layer, head, value and expert moves the output by something of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                drawn = 1 + 0.3 * noise
            elif name.endswith("v_embed.weight"):
                drawn = 1 + 0.7 * noise
            elif name.endswith((".keys", ".v_keys", "word_embed.weight", ".bias")):
                drawn = noise
            else:
                drawn = 1.5 * noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(drawn)


def reference_of(model: Any) -> Reference:
    """The independent reference over a copy of the weights of a model with the small config."""
    config = model.config
    sizes = Sizes(
        attention_heads=config.num_attention_heads,
        first_key_table=TINY_FIRST_KEY_TABLE,
        experts_per_head=config.num_cdmmoe_experts_per_head,
        parallel_experts=config.parallel_experts,
        embedding_multiplier=config.embedding_multiplier,
        final_logit_softcapping=config.final_logit_softcapping,
    )
    return Reference({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, sizes)


def random_ids(batch: int, length: int, *, vocab_size: int = TINY["vocab_size"], seed: int = 0) -> Tensor:
    """Token ids (batch, length) that are not one of the three special ones."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids (rows, longest) with their texts at the right, and the attention mask."""
    longest = max(lengths)
    ids = random_ids(len(lengths), longest, seed=seed)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    return torch.where(mask.bool(), ids, torch.zeros_like(ids)), mask


def recorded_inputs(module: torch.nn.Module) -> list[Tensor]:
    """A list that fills with the hidden states of each call of a module."""
    inputs: list[Tensor] = []

    def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    module.register_forward_pre_hook(record, with_kwargs=True)
    return inputs


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@cache
def python_sources(characters: int = 400_000) -> str:
    """Real text that every Python ships: sources of the standard library, the same at every call."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts, total = [], 0
    for path in sorted(library.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        total += len(text)
        if total >= characters:
            break
    return "".join(texts)[:characters]


@cache
def text_ids(vocab_size: int) -> Tensor:
    """The standard library's sources as words and signs, numbered by frequency, the rarest alike."""
    words = re.findall(r" ?\w+| ?[^\w\s]+|\s+", python_sources())
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common(vocab_size - 1))}
    return torch.tensor([ranks.get(word, vocab_size - 1) for word in words])


def text_batch(batch: int, length: int, *, seed: int, vocab_size: int) -> Tensor:
    """Random passages (batch, length) of the text."""
    ids = text_ids(vocab_size)
    starts = torch.randint(0, len(ids) - length, (batch,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + length] for start in starts.tolist()])
