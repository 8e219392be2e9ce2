"""Shifts by one token: where no token is before, and what caches must keep for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from doge_lm import DogeForCausalLM
from doge_lm.model.token_shift import TokensBefore, TokenShift, first_tokens

from .support import SHIFTS, left_padded, random_ids, tiny_config, tiny_model


def test_the_mixture_of_a_token_and_the_one_before() -> None:
    shift = TokenShift(4, 2, 1.0)
    with torch.no_grad():
        shift.shares.copy_(torch.tensor([0.0, 1.0, 0.25, 2.0]))
    x = torch.tensor([[[1.0, 2, 3, 4], [10, 20, 30, 40]]])
    mixed = shift(x, TokensBefore(None, None).of(x, 0, 0))
    assert mixed.tolist() == [[[1, 0, 2.25, -4], [10, 2, 23.25, -32]]]


def test_shares_start_alike_in_all_heads_and_pairs() -> None:
    layer = DogeForCausalLM(tiny_config(**SHIFTS)).model.layers[1]
    shares = layer.attn.k_shift.shares.detach()
    assert torch.equal(shares.view(3, 2, 4), torch.linspace(0, 1, 4).expand(3, 2, 4))
    assert torch.equal(layer.ff_shift.shares.detach(), torch.linspace(0, 0.5, 24))


@pytest.mark.parametrize(
    ("positions", "mask", "first"),
    [
        (None, None, None),
        ([[0, 1, 2, 3]], None, [[1, 0, 0, 0]]),
        ([[5, 6, 7, 8]], None, [[0, 0, 0, 0]]),
        ([[4, 5, 0, 1]], None, [[0, 0, 1, 0]]),
        ([[0, 1, 0, 0]], None, [[1, 0, 1, 1]]),
        (None, [[0, 0, 1, 1]], [[1, 1, 1, 0]]),
        (None, [[1, 1, 1, 1, 1, 1]], [[0, 0, 0, 0]]),
        (None, [[1, 0, 1, 1, 1, 1]], [[1, 0, 0, 0]]),
        ([[0, 0, 0, 1]], [[0, 0, 1, 1]], [[1, 1, 1, 0]]),
        ([[0, 1, 2, 3]], [[[[0.0]]]], [[1, 0, 0, 0]]),
    ],
)
def test_where_no_token_is_before(positions: Any, mask: Any, first: Any) -> None:
    """In the first case the beginning of the row is left to the padding of the shift itself."""
    tensors = (None if each is None else torch.tensor(each) for each in (positions, mask))
    found = first_tokens(*tensors, 4)
    assert (None if found is None else found[..., 0].int().tolist()) == first


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


def test_the_newest_inputs_go_along_with_a_row() -> None:
    """Rows of a cache change places, as beams do."""
    model = tiny_model(dtype=torch.float64, **SHIFTS)
    ids, order = random_ids(3, 8), torch.tensor([2, 0, 2])
    with torch.no_grad():
        past = model(ids[:, :5], use_cache=True).past_key_values
        past.reorder_cache(order)
        found = model(ids[:, 5:], past_key_values=past).logits
        expected = model(torch.cat((ids[order, :5], ids[:, 5:]), dim=1), use_cache=False).logits[:, 5:]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_cache_of_keys_and_values_alone_is_refused() -> None:
    model = tiny_model(**SHIFTS)
    past = Cache(layers=[DynamicLayer(), DynamicLayer()])
    with pytest.raises(ValueError, match=r"make it by DynamicCache\(config=model.config\)"):
        model(random_ids(1, 3), past_key_values=past, use_cache=True)
    assert model(random_ids(1, 3), past_key_values=DynamicCache(), use_cache=True).past_key_values.get_seq_length() == 3


def test_without_shifts_a_layer_is_full_attention() -> None:
    assert not hasattr(tiny_config(), "layer_types")
    assert type(DynamicCache(config=tiny_config()).layers[0]) is DynamicLayer
    config = tiny_config(feed_forward_shift=True)
    assert config.layer_types == ["hybrid", "hybrid"]
    assert DynamicCache(config=config).layers[1].number_of_states == 1
    assert not {"layer_types", "number_of_conv_states"} & config.to_dict().keys()
