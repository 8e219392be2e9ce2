"""Shifts by one token: what a layer makes of a token, mixed with what it made of the token before.

    y_t = x_t + s ⊙ (x_{t-1} - x_t), with learned shares s (d,)

Where no token is before, at the beginning of a row or of a document and behind padding, x_{t-1} is 0. RWKV shifts the
inputs of all its layers so (arXiv 2305.13048, section 3). Shifted keys let one layer do what otherwise takes two: find
what followed the like of the newest token (Olsson et al., *In-context Learning and Induction Heads*, 2022).

Shapes as in `modeling_doge`.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


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

    Args:
        first_BT1: where no token is before, beside the first column of a call without a cache; None: nowhere.
        cache: of layers of the type "hybrid"; None: the call is all there is.
    """

    def __init__(self, first_BT1: Tensor | None, cache: Cache | None) -> None:
        self.first_BT1 = first_BT1
        self.cache = cache

    def of(self, x_BTd: Tensor, layer_idx: int, state_idx: int) -> Tensor:
        """x_{t-1} in the place of each x_t, (B, T, d).

        Args:
            x_BTd: of this call's tokens.
            layer_idx: which layer asks.
            state_idx: which of the layer's shifts.
        """
        if self.cache is None:
            before_BTd = nn.functional.pad(x_BTd, (0, 0, 1, 0))[:, :-1]
        else:
            # transformers' caches have states of convolutions, the newest inputs: here one, of a kernel of one.
            kept_BdS = self.cache.update_conv_state(x_BTd.mT, layer_idx, state_idx, conv_kernel_size=1)
            length = x_BTd.shape[1]
            if kept_BdS.shape[-1] == length:  # the first call
                kept_BdS = nn.functional.pad(kept_BdS, (1, 0))
            before_BTd = kept_BdS[..., -length - 1 : -1].mT
        return before_BTd if self.first_BT1 is None else before_BTd.masked_fill(self.first_BT1, 0)


def first_tokens(position_ids: Tensor | None, attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Where no token is before, (B, T, 1), as positions and padding tell: None for nowhere that they know of.

    Args:
        position_ids: (B, T), which start over at each document; 0 is a first token's. (`document_starts` takes the
            beginning of the row for one, but in a call with a cache it need not be.)
        attention_mask: of earlier tokens too, (B, S), 0 at padding; other masks do not tell.
        length: T.
    """
    first_BT = None
    if position_ids is not None:
        before_BT = torch.cat((position_ids[:, :1] - 1, position_ids), dim=1)[:, :-1]
        first_BT = (position_ids == 0) | (position_ids != before_BT + 1)
    if attention_mask is not None and attention_mask.ndim == 2:
        seen_BS = nn.functional.pad(attention_mask.bool(), (1, 0))
        behind_padding_BT = ~seen_BS[:, -length - 1 : -1]
        first_BT = behind_padding_BT if first_BT is None else first_BT | behind_padding_BT
    return None if first_BT is None else first_BT[..., None]


__all__ = ["TokenShift", "TokensBefore", "first_tokens"]
