"""Shifts by one token: where no token is before, and what caches must keep for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from doge_lm import DogeConfig, DogeForCausalLM
from doge_lm.model.token_shift import TokensBefore, TokenShift, newest_seen, where_positions_break

from .support import SHIFTS, left_padded, random_ids, relative_error, tiny_config, tiny_model


def test_the_mixture_of_a_token_and_the_one_before() -> None:
    shift = TokenShift(4, 2, 1.0)
    with torch.no_grad():
        shift.shares.copy_(torch.tensor([0.0, 1.0, 0.25, 2.0]))
    x = torch.tensor([[[1.0, 2, 3, 4], [10, 20, 30, 40]]])
    mixed = shift(x, TokensBefore(None, None, None).of(x, 0, 0))
    assert mixed.tolist() == [[[1, 0, 2.25, -4], [10, 2, 23.25, -32]]]


def test_shares_start_alike_in_all_heads_and_pairs() -> None:
    layer = DogeForCausalLM(tiny_config(**SHIFTS)).model.layers[1]
    shares = layer.attn.k_shift.shares.detach()
    assert torch.equal(shares.view(3, 2, 4), torch.linspace(0, 1, 4).expand(3, 2, 4))
    for shift in (layer.attn_shift, layer.ff_shift):
        assert torch.equal(shift.shares.detach(), torch.linspace(0, 0.5, 24))


@pytest.mark.parametrize(
    ("positions", "seen", "breaks"),
    [
        ([[0, 1, 2, 3]], None, [[1, 0, 0, 0]]),
        ([[5, 6, 7, 8]], None, [[0, 0, 0, 0]]),
        ([[4, 5, 0, 1]], None, [[0, 0, 1, 0]]),
        ([[4, 5, 9, 10]], None, [[0, 0, 1, 0]]),
        ([[0, 1, 0, 0]], None, [[1, 0, 1, 1]]),
        ([[1, 1, 0, 1]], [[0, 0, 1, 1]], [[0, 0, 1, 0]]),
        ([[4, 1, 1, 5]], [[1, 0, 0, 1]], [[0, 1, 1, 0]]),
        ([[4, 4, 4, 5]], [[1, 0, 0, 1]], [[0, 1, 1, 0]]),
        ([[1, 1, 6, 7]], [[0, 0, 1, 1]], [[0, 0, 0, 0]]),
        ([[0, 1, 2, 3]], [[1, 1, 1, 1], [0, 0, 1, 1]], [[1, 0, 0, 0], [1, 0, 0, 0]]),
    ],
)
def test_where_positions_break(positions: Any, seen: Any, breaks: Any) -> None:
    source = None if seen is None else newest_seen(torch.tensor(seen).bool())
    found = where_positions_break(torch.tensor(positions), source)
    assert found.int().tolist() == breaks


def test_the_newest_token_that_is_no_padding() -> None:
    seen = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0]]).bool()
    assert newest_seen(seen).tolist() == [[0, 0, 3, 4, 4, 6], [1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_token(side: str, positions: bool) -> None:
    """Told by the mask alone, or by positions too."""
    model = tiny_model(dtype=torch.float64, **SHIFTS)
    ids, mask = left_padded([7, 4, 1])
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
    with torch.no_grad():
        found = model(ids, attention_mask=mask, use_cache=False, **given).logits
        other = model(torch.where(mask.bool(), ids, 5), attention_mask=mask, use_cache=False, **given).logits
        for row in range(3):
            seen = mask[row].bool()
            alone = model(ids[row : row + 1, seen], use_cache=False).logits[0]
            # Angles are computed in float32.
            torch.testing.assert_close(found[row, seen], alone, rtol=1e-5, atol=1e-5)
            assert torch.equal(found[row, seen], other[row, seen])


@pytest.fixture
def model() -> Any:
    return tiny_model(dtype=torch.float64, **SHIFTS)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fill", ["as transformers does", "running on"])
def test_a_row_that_ended_early_goes_on_behind_its_padding(model: Any, fill: str) -> None:
    """A conversation's next turn over a cache with padding behind a text; in one call as well."""
    ids = random_ids(1, 8)
    gap = torch.cat((ids[:, :5], torch.zeros(1, 3, dtype=torch.long), ids[:, 5:]), dim=1)
    mask = (gap != 0).long()
    positions = mask.cumsum(1) - 1
    if fill == "as transformers does":
        positions = positions.masked_fill(mask == 0, 1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        whole = model(gap, attention_mask=mask, position_ids=positions, use_cache=False).logits
        first = model(gap[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8], use_cache=True)
        second = model(
            gap[:, 8:], attention_mask=mask, position_ids=positions[:, 8:], past_key_values=first.past_key_values
        )
    assert_same(whole[:, mask[0] == 1], expected)
    assert_same(torch.cat((first.logits[:, :5], second.logits), dim=1), expected)


def test_a_mask_as_wide_as_a_static_cache(model: Any) -> None:
    ids = random_ids(2, 9)
    past = StaticCache(config=model.config, max_cache_len=20)
    mask = torch.zeros(2, 20, dtype=torch.long)
    found = []
    with torch.no_grad():
        for begin, end in ((0, 8), (8, 9)):
            mask[:, :end] = 1
            positions = torch.arange(begin, end)[None]
            out = model(ids[:, begin:end], attention_mask=mask, position_ids=positions, past_key_values=past)
            found.append(out.logits)
        assert_same(torch.cat(found, dim=1), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("change", ["reorder", "select", "repeat"])
def test_the_newest_inputs_go_along_with_a_row(model: Any, change: str) -> None:
    ids, order = random_ids(3, 8), torch.tensor([2, 0, 2])
    if change == "repeat":
        ids, order = ids[:1], torch.tensor([0, 0, 0])
    with torch.no_grad():
        past = model(ids[:, :5], use_cache=True).past_key_values
        if change == "reorder":
            past.reorder_cache(order)
        elif change == "select":
            past.batch_select_indices(order)
        else:
            past.batch_repeat_interleave(3)
        later = random_ids(3, 3, seed=1)
        found = model(later, past_key_values=past).logits
        expected = model(torch.cat((ids[order, :5], later), dim=1), use_cache=False).logits[:, 5:]
    assert_same(found, expected)


def test_crops_once_after_each_call(model: Any) -> None:
    ids = random_ids(2, 8)
    past = DynamicCache(config=model.config)
    past.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=past)
        past.crop(-3)
        expected = model(ids, use_cache=False).logits[:, 5:]
        assert_same(model(ids[:, 5:], past_key_values=past).logits, expected)
        past.crop(-2)
        with pytest.raises(RuntimeError, match="can be cropped once after each call"):
            past.crop(-2)
        past.crop(-6)
        assert_same(model(ids[:, 5:], past_key_values=past).logits, model(ids[:, 5:], use_cache=False).logits)


def test_a_reset_cache_begins_anew(model: Any) -> None:
    ids = random_ids(2, 8)
    past = model(random_ids(3, 5, seed=1), use_cache=True).past_key_values
    past.reset()
    with torch.no_grad():
        assert_same(model(ids, past_key_values=past).logits, model(ids, use_cache=False).logits)


def test_what_inference_mode_kept_goes_on_outside(model: Any) -> None:
    ids = random_ids(2, 8)
    with torch.inference_mode():
        past = model(ids[:, :5], use_cache=True).past_key_values
    with torch.no_grad():
        assert_same(model(ids[:, 5:], past_key_values=past).logits, model(ids, use_cache=False).logits[:, 5:])


def test_autocast_may_begin_between_two_calls() -> None:
    model = tiny_model(**SHIFTS)
    ids = random_ids(2, 8)
    with torch.no_grad():
        past = model(ids[:, :5], use_cache=True).past_key_values
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids[:, 5:], past_key_values=past).logits
        assert relative_error(found, model(ids, use_cache=False).logits[:, 5:]) < 0.05


def test_checkpointed_layers_write_into_no_cache(model: Any) -> None:
    """They run twice."""
    ids = random_ids(2, 8)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids, past_key_values=DynamicCache(config=model.config)).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert_same(parameter.grad, gradient)


def test_gradients_of_padded_rows_are_those_of_rows_alone(model: Any) -> None:
    ids, mask = left_padded([7, 4])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()].sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (model(ids[:1], use_cache=False).logits.sum() + model(ids[1:, 3:], use_cache=False).logits.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_a_cache_of_keys_and_values_alone_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="this one has keys and values alone"):
        model(random_ids(1, 3), past_key_values=Cache(layers=[DynamicLayer(), DynamicLayer()]), use_cache=True)
    past = model(random_ids(1, 3), past_key_values=DynamicCache(), use_cache=True).past_key_values
    assert past.get_seq_length() == 3
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in past.layers], config=model.config)
    with pytest.raises(ValueError, match="this one has keys and values alone"):
        model(random_ids(1, 3), past_key_values=rebuilt)


def test_without_shifts_a_layer_is_full_attention() -> None:
    assert not hasattr(tiny_config(), "layer_types")
    assert type(DynamicCache(config=tiny_config()).layers[0]) is DynamicLayer
    config = tiny_config(feed_forward_shift=True)
    assert config.layer_types == ["hybrid", "hybrid"]
    assert DynamicCache(config=config).layers[1].number_of_states == 1
    assert not {"layer_types", "number_of_conv_states"} & config.to_dict().keys()


def test_what_follows_from_the_switches_is_not_read() -> None:
    config = DogeConfig.from_dict({**tiny_config(key_shift=True).to_dict(), "layer_types": ["full_attention"] * 2})
    assert config.layer_types == ["hybrid", "hybrid"]
    with pytest.raises(ValueError, match="key_shift is None; it must be true or false"):
        tiny_config(key_shift=None)
