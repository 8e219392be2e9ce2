"""Adapters of peft around every kind of module act, and may be merged into the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.model import cdmoe as cdmoe_module
from doge_lm.model import modeling_doge

from .support import left_padded, random_ids, relative_error, tiny_model

peft = pytest.importorskip("peft")

TABLES = ("down_embed", "up_embed", "v_embed")
TARGETS = (
    *("q_proj", "k_proj", "o_proj", "v_queries", "shared_up_proj", "shared_down_proj", "queries", "lm_head"),
    *TABLES,
)
ROUNDING = 1e-5
"""Relative error between two orders of the same sums in float32, which is some 1e-7 each."""


def adapted(model: Any, targets: tuple[str, ...] = TARGETS) -> Any:
    """The model with LoRA on the targets, whose matrices are drawn so that every one of them moves the output."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=3, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def merged(wrapped: Any) -> Any:
    """An ordinary model with the adapters in its weights."""
    model = copy.deepcopy(wrapped).merge_and_unload()
    assert not any("lora_" in name for name, _ in model.named_parameters())
    return model


@pytest.fixture(params=["few tokens", "many tokens"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of computing: gathered rows and separate products, or all experts and products put together."""
    many = request.param == "many tokens"
    monkeypatch.setattr(modeling_doge, "MERGE_MIN_TOKENS", 1 if many else 10**9)
    monkeypatch.setattr(modeling_doge, "folding_pays", lambda *sizes: many)
    monkeypatch.setattr(cdmoe_module, "DENSE_MIN_TOKENS", 1 if many else 10**9)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("target", [*TARGETS, None])
def test_an_adapter_does_what_its_merged_weights_do(target: str | None) -> None:
    plain, ids = tiny_model(), random_ids(2, 9)
    with torch.no_grad():
        before = plain(ids).logits
        wrapped = adapted(plain, TARGETS if target is None else (target,))
        found, expected = wrapped(ids).logits, merged(wrapped)(ids).logits
    assert relative_error(found, before) > 1e-3, "the adapter must show"
    assert relative_error(found, expected) < ROUNDING


def test_what_an_adapter_adds_to_the_embedding_is_multiplied_too() -> None:
    plain, ids = tiny_model(embedding_multiplier=4.0), random_ids(2, 9)
    with torch.no_grad():
        before = plain(ids).logits
        wrapped = adapted(plain, ("word_embed",))
        found, expected = wrapped(ids).logits, merged(wrapped)(ids).logits
    assert relative_error(found, before) > 1e-3, "the adapter must show"
    assert relative_error(found, expected) < ROUNDING


@pytest.mark.usefixtures("ways")
def test_adapters_train() -> None:
    """In training mode: the merged model's loss, and for every matrix the gradient that differences confirm."""
    wrapped, ids = adapted(tiny_model(dtype=torch.float64)), random_ids(2, 9)
    wrapped.train()
    expected = merged(wrapped).train()(ids, labels=ids).loss
    loss = wrapped(ids, labels=ids, skip_logits=True).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * (2 * (len(TARGETS) - 1) + 1), "two matrices a module: 2 layers and the head"
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0, name
        # v_embed's gradient is exact, unlike that of the choice (straight-through)
        if any(table in name for table in TABLES) and ".1." in name:
            assert_gradient_is_the_slope(wrapped, ids, parameter)


def assert_gradient_is_the_slope(wrapped: Any, ids: Tensor, parameter: Tensor) -> None:
    """Along the gradient itself, by central differences."""
    assert parameter.grad is not None
    direction, size = parameter.grad / parameter.grad.norm(), 1e-4
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(direction, alpha=sign * size)
            losses.append(float(torch.nn.functional.cross_entropy(*shifted(wrapped(ids).logits, ids))))
            parameter.sub_(direction, alpha=sign * size)
    assert (losses[0] - losses[1]) / (2 * size) == pytest.approx(float(parameter.grad.norm()), rel=1e-3)


def shifted(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


@pytest.mark.usefixtures("ways")
def test_adapters_act_with_a_cache_and_padding() -> None:
    wrapped = adapted(tiny_model())
    ids, mask = left_padded([9, 5])
    with torch.no_grad():
        expected = merged(wrapped)(ids, attention_mask=mask).logits
        past, rows = None, []
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            out = wrapped(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits)
    seen = mask.bool()
    assert relative_error(torch.cat(rows, dim=1)[seen], expected[seen]) < ROUNDING


def test_the_decoder_takes_an_adapted_model() -> None:
    wrapped, sampling = adapted(tiny_model()), Sampling(max_new_tokens=12)
    prompts = [[4, 5, 6], [7], [8, 9]]
    expected = Decoder(merged(wrapped)).generate(prompts, sampling)
    assert Decoder(wrapped.get_base_model()).generate(prompts, sampling) == expected


def test_adapters_act_in_compiled_code() -> None:
    wrapped, ids = adapted(tiny_model()), random_ids(2, 40)
    expected = merged(wrapped)(ids, labels=ids)
    compiled = torch.compile(wrapped, backend="aot_eager")
    found = compiled(ids, labels=ids)
    assert relative_error(found.logits, expected.logits) < ROUNDING
    found.loss.backward()
    assert all(float(each.grad.norm()) > 0 for each in wrapped.parameters() if each.requires_grad)


def test_a_disabled_adapter_is_without_effect() -> None:
    plain, ids = tiny_model(), random_ids(2, 9)
    with torch.no_grad():
        before = plain(ids).logits
        wrapped = adapted(plain)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(ids).logits, before)


def test_a_plain_table_is_read_where_it_lies() -> None:
    """No copy, no look-up: what kernels and the row-lazy optimizer see is the parameter itself."""
    feed_forward = tiny_model().model.layers[0].feed_forward
    table = modeling_doge.whole_table(feed_forward.down_embed, feed_forward.num_experts, torch.device("cpu"))
    assert table is feed_forward.down_embed.weight
