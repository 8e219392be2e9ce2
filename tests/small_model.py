"""A model that knows nothing, for tests of what is done with a trained one."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from doge_lm import DogeConfig, DogeForCausalLM
from doge_lm.data.tokenizer import build_tokenizer


@cache
def published_tokenizer() -> PreTrainedTokenizerFast:
    """Built once in a process: that takes seconds."""
    with TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder) / "tokenizer")


def make_model(place: Path, positions: int = 512, seed: int = 0, **changes: Any) -> Path:
    """A Doge with random weights and the published tokenizer; `changes` are of its configuration."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": positions,
        "inner_values_retrieval_size": 16,
        "cross_domain_intermediate_size": 32,
        "private_expert_intermediate_size": 16,
        "num_cdmmoe_experts": 16,
    }
    DogeForCausalLM(DogeConfig(**{**sizes, **changes})).save_pretrained(place)
    published_tokenizer().save_pretrained(place)
    return place
