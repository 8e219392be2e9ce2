"""The whole model by its Triton kernels, in Triton's interpreter or on a GPU, beside the same model without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this machine")

from doge_lm.model import cdmoe, linear_cross_entropy, modeling_doge
from doge_lm.model.modeling_doge import DogeForCausalLM

from .support import random_ids, relative_error, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, LENGTH = 3, 12


@pytest.fixture(autouse=True)
def few_tokens_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products are merged and all kernels taken for as few tokens as the interpreter is quick with."""
    monkeypatch.setattr(modeling_doge, "MERGE_MIN_TOKENS", BATCH * LENGTH)
    monkeypatch.setattr(cdmoe, "DENSE_MIN_TOKENS", BATCH * LENGTH)


def loss_and_gradients(model: DogeForCausalLM, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{"num_cdmmoe_heads": 1}, {"cdmoe_path": "sparse"}], ids=str)
def test_loss_and_gradients_are_those_without_kernels(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    model = tiny_model(**changes).to(DEVICE).train()
    ids = random_ids(BATCH, LENGTH).to(DEVICE)
    used = []

    def take(answer: bool) -> None:
        for module in (cdmoe, linear_cross_entropy, modeling_doge):
            monkeypatch.setattr(module, "kernels_take", lambda x: answer and x.dtype != torch.float64)

    def note(module: object, name: str) -> None:
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: (used.append(name), plain(*args, **options))[1])

    note(modeling_doge, "fused_inner_value")
    note(modeling_doge, "fused_rotation")
    note(modeling_doge, "fused_add_norm")
    note(cdmoe, "chosen_hidden")
    note(cdmoe, "fused_product_topk")
    note(cdmoe, "experts_output")
    take(False)
    for layer in model.model.layers:
        layer.feed_forward.path = "gather"
    loss, gradients = loss_and_gradients(model, ids)
    assert not used
    take(True)
    for layer in model.model.layers:
        layer.feed_forward.path = model.config.cdmoe_path
    found, found_gradients = loss_and_gradients(model, ids)
    experts = {"fused_product_topk", "experts_output"} if "cdmoe_path" in changes else {"chosen_hidden"}
    assert set(used) == {"fused_inner_value", "fused_rotation", "fused_add_norm", *experts}
    # In each layer after the attention, and between two layers.
    assert used.count("fused_add_norm") == 2 * len(model.model.layers) - 1
    assert abs(found - loss) < 1e-5
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(found_gradients[name], gradient) < 2e-4, name


@pytest.mark.parametrize("place", [0, 1], ids=["the layer before", "the layer after"])
def test_a_hook_between_layers_is_heeded(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """The norm between two layers is of what the second one is given, whoever changes that."""
    model = tiny_model().to(DEVICE).eval()
    layer, ids = model.model.layers[place], random_ids(BATCH, LENGTH).to(DEVICE)
    unchanged = model(input_ids=ids, use_cache=False).logits
    if place == 0:
        layer.register_forward_hook(lambda module, args, output: output * 2)
    else:
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    expected = model(input_ids=ids, use_cache=False).logits
    assert relative_error(unchanged, expected) > 1e-2
    for module in (cdmoe, modeling_doge):
        monkeypatch.setattr(module, "kernels_take", lambda x: x.dtype != torch.float64)
    used: list[torch.nn.Module] = []
    plain = modeling_doge.add_norm
    monkeypatch.setattr(modeling_doge, "add_norm", lambda *args: (used.append(args[2]), plain(*args))[1])
    assert relative_error(model(input_ids=ids, use_cache=False).logits, expected) < 1e-4
    assert model.model.layers[1].in_attn_layernorm not in used  # a module is equal to itself alone


def test_hidden_states_and_checkpointing_are_those_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().to(DEVICE).train()
    ids = random_ids(BATCH, LENGTH).to(DEVICE)
    expected = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    _, gradients = loss_and_gradients(model, ids)
    for module in (cdmoe, linear_cross_entropy, modeling_doge):
        monkeypatch.setattr(module, "kernels_take", lambda x: x.dtype != torch.float64)
    found = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == len(model.model.layers) + 1
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < 1e-4
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in loss_and_gradients(model, ids)[1].items():
        assert relative_error(gradient, gradients[name]) < 2e-4, name
