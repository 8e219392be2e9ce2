"""Shifts by one token: what a layer makes of a token, mixed with what it made of the token before.

    y_t = x_t + s ⊙ (x_{t-1} - x_t), with learned shares s (d,)

Where no token is before, at the beginning of a row or of a document, x_{t-1} is 0; padding is no token. RWKV shifts the
inputs of all its layers so (arXiv 2305.13048, section 3). Shifted keys let one layer do what otherwise takes two: find
what followed the like of the newest token (Olsson et al., *In-context Learning and Induction Heads*, 2022).

Shapes as in `modeling_doge`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)


class TokenShift(nn.Module):
    """The shares of one shift.

    Args:
        size: d.
        period: shares start from 0 to `most` over so many features, again and again.
        most: see `period`.
    """

    def __init__(self, size: int, period: int, most: float) -> None:
        super().__init__()
        self.period, self.most = period, most
        self.shares = nn.Parameter(torch.empty(size))

    def initial_shares(self) -> Tensor:
        """Where the shares start, (d,)."""
        rows = self.shares.numel() // self.period
        return torch.linspace(0, self.most, self.period, device=self.shares.device).repeat(rows)

    def forward(self, x_BTd: Tensor, before_BTd: Tensor) -> Tensor:
        """Mix what is there with what was there one token before, (B, T, d) each."""
        return torch.lerp(x_BTd, before_BTd, self.shares.to(x_BTd.dtype))


class TokensBefore:
    """Tells layers what they had one token before; over calls with a cache, which keeps it of the newest token.

    The token before is the last one that the mask of a padded batch does not hide. Only where gradients are wanted and
    there is no cache, a token behind padding counts as a first one: the rows of a training batch have no gaps.

    Args:
        position_ids: (B, T); where they do not go on by 1, and at 0, no token is before. None: they go on.
        seen_BT: which tokens are no padding; None: all.
        cache: that `keep_newest_inputs` has seen; None: the call is all there is.
    """

    def __init__(self, position_ids: Tensor | None, seen_BT: Tensor | None, cache: Cache | None) -> None:
        self.cache = cache
        self.source_BT1 = None
        first_BT = None
        source_BT = None if seen_BT is None else newest_seen(seen_BT)
        if seen_BT is not None and cache is None and torch.is_grad_enabled():
            # Without the gather below, whose gradient would be summed in no fixed order.
            first_BT = ~nn.functional.pad(seen_BT, (1, 0))[:, :-1]
        elif source_BT is not None:
            self.source_BT1 = source_BT[..., None]
        if position_ids is not None:
            breaks_BT = where_positions_break(position_ids, source_BT)
            first_BT = breaks_BT if first_BT is None else first_BT | breaks_BT
        self.first_BT1 = None if first_BT is None else first_BT[..., None]

    def of(self, x_BTd: Tensor, layer_idx: int, state_idx: int) -> Tensor:
        """x_{t-1} in the place of each x_t, (B, T, d).

        Args:
            x_BTd: of this call's tokens.
            layer_idx: which layer asks.
            state_idx: which of the layer's shifts.
        """
        if self.source_BT1 is not None:
            given_BSd = torch.cat((self._newest(x_BTd, layer_idx, state_idx), x_BTd), dim=1)
            given_BTd = given_BSd.gather(1, self.source_BT1.to(x_BTd.device).expand_as(x_BTd))
        else:
            given_BTd = x_BTd
        if self.cache is None:
            before_BTd = nn.functional.pad(given_BTd, (0, 0, 1, 0))[:, :-1]
        else:
            # transformers' caches have states of convolutions, the newest inputs: here one, of a kernel of one.
            kept_BdS = self.cache.update_conv_state(given_BTd.mT, layer_idx, state_idx, conv_kernel_size=1)
            length = x_BTd.shape[1]
            if kept_BdS.shape[-1] == length:  # the first call
                kept_BdS = nn.functional.pad(kept_BdS, (1, 0))
            before_BTd = kept_BdS[..., -length - 1 : -1].mT.to(x_BTd.dtype)  # autocast may have begun in between
        return before_BTd if self.first_BT1 is None else before_BTd.masked_fill(self.first_BT1.to(x_BTd.device), 0)

    def _newest(self, x_BTd: Tensor, layer_idx: int, state_idx: int) -> Tensor:
        """The input of the newest token of earlier calls, (B, 1, d); 0 if there is none."""
        state_Bd1 = None if self.cache is None else self.cache.get_conv_state(layer_idx, state_idx)
        if state_Bd1 is None or not state_Bd1.shape[-1]:
            return torch.zeros_like(x_BTd[:, :1])
        return state_Bd1[..., -1:].mT.to(x_BTd.dtype)


def newest_seen(seen_BT: Tensor) -> Tensor:
    """The number of the newest token that is no padding, up to each, (B, T), from 1; 0 for what was before the call."""
    columns_T = torch.arange(1, seen_BT.shape[1] + 1, device=seen_BT.device)
    return (seen_BT * columns_T).cummax(dim=1).values


def where_positions_break(position_ids: Tensor, source_BT: Tensor | None) -> Tensor:
    """Where no token is before, (B, T), as positions tell, (B, T), which start over at each document.

    They go on from the newest token that is no padding, `newest_seen` of each; None: there is no padding.
    (`document_starts` takes the beginning of a row for a document's, but in a call with a cache it need not be one.)
    """
    given_BS = torch.cat((position_ids[:, :1] - 1, position_ids), dim=1)
    before_BT = given_BS[:, :-1]
    if source_BT is not None:
        source_BT = nn.functional.pad(source_BT, (1, 0))[:, :-1]
        before_BT = given_BS.expand(len(source_BT), -1).gather(1, source_BT)
        before_BT = torch.where(source_BT == 0, position_ids - 1, before_BT)
    return (position_ids == 0) | (position_ids != before_BT + 1)


def seen_tokens(attention_mask: Tensor | None, length: int, cache: Cache | None) -> Tensor | None:
    """Which of a call's tokens are no padding, (B, T).

    Args:
        attention_mask: of the columns of earlier calls too, (B, S), 0 at padding. With None or another form nothing is
            known of padding: None comes back.
        length: T.
        cache: of earlier calls.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    begin = 0 if cache is None else cache.get_seq_length()  # a mask may be as wide as a static cache
    return attention_mask.bool()[:, begin + torch.arange(length, device=attention_mask.device)]


class NewestInputsLayer(LinearAttentionAndFullAttentionLayer):
    """transformers' growing layer for keys, values and states; it selects and repeats rows of keys and values alone."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: object
    ) -> Tensor:
        """Take the inputs of a call, (B, d, T), and return them behind the one before them, if there is one.

        Nothing is written in place: what was kept may be of inference mode, or part of a graph of gradients.
        """
        self.device, self.dtype = conv_states.device, conv_states.dtype
        if self.has_previous_state[state_idx]:
            conv_states = torch.cat((self.conv_states[state_idx].to(self.device), conv_states), dim=-1)
        self.conv_states[state_idx] = conv_states if self.record_past else conv_states[..., -1:]
        self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        self.conv_kernel_size[state_idx] = 1
        return conv_states

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for index in self.conv_states:
            self.conv_states[index] = None
            self.is_conv_states_initialized[index] = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, recorded since the last crop.

        Raises:
            RuntimeError: if they are not recorded (`activate_past_recording`), or more than that.
        """
        removed, held = abs(tokens_to_remove), self.get_seq_length()
        recorded = [state.shape[-1] for state in self.conv_states.values() if state is not None]
        if self.record_past and 0 < removed < held and recorded and removed >= min(recorded):
            raise RuntimeError(
                f"crop({-removed}) goes behind what is recorded, the newest {min(recorded)} tokens: with key_shift, "
                "attention_shift or feed_forward_shift a cache can be cropped once after each call"
            )
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._take(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in the order of the indices."""
        super().batch_select_indices(indices)
        self._take(lambda state: state[indices])

    def _take(self, change: Callable[[Tensor], Tensor]) -> None:
        for index, state in self.conv_states.items():
            if state is not None:
                self.conv_states[index] = change(state)


def keep_newest_inputs(cache: Cache, config: PreTrainedConfig) -> None:
    """Have a cache keep the newest inputs, if it is empty; or see that it does.

    Raises:
        ValueError: for a cache that has keys and values alone.
    """
    if type(cache) is DynamicCache and not cache.layers:  # made without the configuration
        cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionAndFullAttentionLayer and not layer.is_initialized:
            cache.layers[index] = NewestInputsLayer(layer.number_of_states)
            if layer.record_past:
                cache.layers[index].activate_past_recording()
    if not all(_keeps_inputs(layer) for layer in cache.layers):
        raise ValueError(
            "with key_shift, attention_shift or feed_forward_shift a cache must keep each layer's newest inputs too, "
            "and this one has keys and values alone: let the model make it, or begin with an empty DynamicCache or "
            "StaticCache"
        )


def _keeps_inputs(layer: object) -> bool:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return False
    # A static layer does not say whether it is empty without waiting for the device.
    filled = isinstance(layer, DynamicLayer) and layer.get_seq_length() > 0
    return not filled or all(layer.has_previous_state.values())


__all__ = ["TokenShift", "TokensBefore", "keep_newest_inputs", "seen_tokens"]
