"""Changes of a model for diagnosis: what a run of `quality.py` names behind `@`, as in `doge@one_pool`.

They answer the question which part of a form costs what. None is an option of the package; what proves useful becomes a
field of its configuration, and what does not pay is removed: docs/log.md names the commit of the changes that are gone.
Each changes a fresh model in place. `CHANGES` are those of a Doge, `LLAMA_CHANGES` those of the Llama beside it. Shapes
as in `modeling_doge.py`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from doge_lm.errors import UserError
from doge_lm.model.cdmoe import cdmoe
from doge_lm.model.modeling_doge import (
    DenseSkips,
    DogeCDMoE,
    DogeDecoderLayer,
    DogeForCausalLM,
    DogeInnerFuncAttn,
    add_with_gains,
)
from doge_lm.model.token_shift import TokensBefore, TokenShift

Change = Callable[[DogeForCausalLM], None]
LlamaChange = Callable[[LlamaForCausalLM], None]


class HeadNorm(nn.Module):
    """RMSNorm of each head's features, with gains that the heads share."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(head_dim, eps=eps)

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.norm(x_BTd.unflatten(-1, (-1, *self.norm.normalized_shape))).flatten(-2)


class Shift(TokenShift):
    """A shift of rows that are one document each, with its shares at their start."""

    def __init__(self, size: int, period: int, most: float) -> None:
        super().__init__(size, period, most)
        self.shares = nn.Parameter(self.initial_shares())

    def forward(self, x_BTd: Tensor) -> Tensor:  # type: ignore[override]
        """(B, T, d) to (B, T, d)."""
        return super().forward(x_BTd, TokensBefore(None, None, None).of(x_BTd, 0, 0))


class OpenCDMoE(DogeCDMoE):
    """The experts in plain steps, that the changes below take apart."""

    pool: tuple[nn.Embedding, nn.Embedding] | None = None  # the tables of another layer, in the place of its own
    weights_outside = False  # whether an expert is w · σ(c·D) instead of σ(w · (c·D))

    def experts(self, c_BTe: Tensor) -> Tensor:
        """(B, T, e) to (B, T, d)."""
        c_Me = c_BTe.flatten(0, 1)
        weights_MHk, experts_MHk = self.route(c_Me)
        down, up = self.pool or (self.down_embed, self.up_embed)
        compute = cdmoe_weighted_outside if self.weights_outside else cdmoe
        output_Md = compute(c_Me, weights_MHk, experts_MHk, down.weight, up.weight, self.act_fn)
        return output_Md.view(*c_BTe.shape[:-1], -1)


def cdmoe_weighted_outside(
    c_Me: Tensor,
    weights_MHk: Tensor,
    experts_MHk: Tensor,
    down_embed: Tensor,
    up_embed: Tensor,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sum the chosen experts: Σ over heads and experts of w · σ(c·D_expert) U_expert, by dense products."""
    inner_MN = nn.functional.linear(c_Me, down_embed)
    weights_MK, experts_MK = weights_MHk.flatten(1).to(inner_MN.dtype), experts_MHk.flatten(1)
    all_N = torch.arange(inner_MN.shape[1], device=inner_MN.device)
    chosen = zip(weights_MK.split(1, 1), experts_MK.split(1, 1), strict=True)
    weights_MN = sum(weight_M1 * (expert_M1 == all_N) for weight_M1, expert_M1 in chosen)
    return nn.functional.linear(weights_MN * act(inner_MN), up_embed.t())


class ResidualCDMoE(DogeCDMoE):
    """The shared part reaches the output too: y = c + experts(c). Needs e = d."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        c_BTe = self.shared(hidden_states)
        return c_BTe + self.experts(c_BTe)


class LinearValueAttn(DogeInnerFuncAttn):
    """v = W_v x. The inner values stay, unused."""

    v_proj: nn.Linear

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.v_proj(x_BTd)


class DynamicSkips(DenseSkips):
    """Skips whose gains depend on the token: x_l + Σ_{j<l} (g_lj + (W_l RMSNorm(x_l))_j) ⊙ x_j, W_l (l, d) from 0."""

    maps: nn.ParameterList

    def forward(self, outputs_BTd: Sequence[Tensor]) -> Tensor:
        """The input of the next layer, from x_0 to x_l, (B, T, d) each."""
        *earlier, x_BTd = outputs_BTd
        mixed_BTd = super().forward(outputs_BTd)
        if not earlier:  # no map either
            return mixed_BTd
        normed_BTd = nn.functional.rms_norm(x_BTd, x_BTd.shape[-1:])
        gains_BTl = nn.functional.linear(normed_BTd, self.maps[len(earlier) - 1].to(x_BTd.dtype))
        return add_with_gains(mixed_BTd, earlier, gains_BTl.split(1, dim=-1))


class GainedSkips(DenseSkips):
    """Skips with gains of the newest output too: (1 + g_ll) ⊙ x_l + Σ_{j<l} g_lj ⊙ x_j."""

    own_gains: nn.Parameter

    def forward(self, outputs_BTd: Sequence[Tensor]) -> Tensor:
        """The input of the next layer, from x_0 to x_l, (B, T, d) each."""
        x_BTd = outputs_BTd[-1]
        return super().forward(outputs_BTd) + self.own_gains[len(outputs_BTd) - 1].to(x_BTd.dtype) * x_BTd


class SublayerSkipLayer(DogeDecoderLayer):
    """Skips into each feed-forward too, and from each sum behind an attention. In the place of the model's own."""

    outputs: list[Tensor]  # (B, T, d) each, while a forward pass runs; one list for all layers
    is_last: bool

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *_: object, before: TokensBefore | None = None, **kwargs: object
    ) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        kwargs.pop("normed"), kwargs.pop("next_norm")
        x_BTd = self._mixed(hidden_states, self.gains_of_attention)
        inputs_BTd = self._shifted(self.in_attn_layernorm(x_BTd), self.attn_shift, before, "attention")
        x_BTd = x_BTd + self._dropout(self.attn(inputs_BTd, before=before, **kwargs)[0])
        x_BTd = self._mixed(x_BTd, self.gains_of_feed_forward)
        inputs_BTd = self._shifted(self.in_ff_layernorm(x_BTd), self.ff_shift, before, "feed_forward")
        if self.is_last:
            self.outputs.clear()
        return x_BTd + self._dropout(self.feed_forward(inputs_BTd))

    def _mixed(self, x_BTd: Tensor, gains: nn.ParameterList) -> Tensor:
        mixed_BTd = add_with_gains(x_BTd, self.outputs, gains)
        self.outputs.append(x_BTd)
        return mixed_BTd


class ValueSkipAttn(DogeInnerFuncAttn):
    """Values of the inputs of earlier layers' attention too: v = (x_l + Σ_{j<l} g_j ⊙ x_j) ⊙ E[argmax s]."""

    inputs: list[Tensor]  # (B, T, d) each, while a forward pass runs; one list for all layers
    is_last: bool

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        mixed_BTd = add_with_gains(x_BTd, self.inputs, self.value_gains)
        self.inputs.append(x_BTd)
        if self.is_last:
            self.inputs.clear()
        return super().inner_values(mixed_BTd, scores_BTn)


class FirstValueAttn(DogeInnerFuncAttn):
    """Values of the first layer's input to attention too: v = (x_l + g ⊙ x_0) ⊙ E[argmax s]."""

    first: list[Tensor]  # (B, T, d), of the forward pass that runs; one list for all layers

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        if self.layer_idx == 0:
            self.first[:] = [x_BTd]
            return super().inner_values(x_BTd, scores_BTn)
        return super().inner_values(add_with_gains(x_BTd, self.first, self.value_gains), scores_BTn)


class StreamValueAttn(DogeInnerFuncAttn):
    """Values of what skips take: v = (RMSNorm(x_l) + Σ_{j<l} g_j ⊙ x_j) ⊙ E[argmax s]."""

    outputs: list[Tensor]  # (B, T, d) each, that `StreamKept` leaves there

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return super().inner_values(add_with_gains(x_BTd, self.outputs, self.value_gains), scores_BTn)


class StreamKept(DenseSkips):
    """Skips that leave what they take to values."""

    outputs: list[Tensor]  # (B, T, d) each; one list for all layers

    def forward(self, outputs_BTd: Sequence[Tensor]) -> Tensor:
        """The input of the next layer, from x_0 to x_l, (B, T, d) each."""
        self.outputs[:] = outputs_BTd[:-1]
        return super().forward(outputs_BTd)


class GainedBranch(nn.Module):
    """What a map or a feed-forward gives, times learned gains from 1; a class to be put before theirs."""

    branch_gains: nn.Parameter

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        output_BTd = super().forward(hidden_states)
        return self.branch_gains.to(output_BTd.dtype) * output_BTd


def _queries_and_keys_normed(model: LlamaForCausalLM) -> None:
    """What `qk_norm` is in a Doge."""
    for attention in _attentions(model):
        for name in ("q_proj", "k_proj"):
            norm = HeadNorm(attention.head_dim, model.config.rms_norm_eps)
            setattr(attention, name, nn.Sequential(getattr(attention, name), norm))


def _keys_shifted(model: LlamaForCausalLM) -> None:
    """What `key_shift` is in a Doge."""
    for attention in _attentions(model):
        shift = Shift(model.config.hidden_size, attention.head_dim // 2, 1.0)
        projection = attention.k_proj
        if isinstance(projection, nn.Sequential):  # before the norm
            projection.insert(1, shift)
        else:
            attention.k_proj = nn.Sequential(projection, shift)


def _feed_forward_shifted(model: LlamaForCausalLM) -> None:
    """What `feed_forward_shift` is in a Doge."""
    for layer in model.model.layers:
        shift = Shift(model.config.hidden_size, model.config.hidden_size, 0.5)
        layer.post_attention_layernorm = nn.Sequential(layer.post_attention_layernorm, shift)


def _skips(model: DogeForCausalLM) -> DenseSkips:
    if model.model.skips is None:
        raise UserError("dense_skips is false: the change is one of skips")
    return model.model.skips


def _skips_dynamic(model: DogeForCausalLM) -> None:
    skips, d = _skips(model), model.config.hidden_size
    skips.__class__ = DynamicSkips
    skips.maps = nn.ParameterList(torch.zeros(index, d) for index in range(1, len(model.model.layers)))


def _skips_gained(model: DogeForCausalLM) -> None:
    skips = _skips(model)
    skips.__class__ = GainedSkips
    skips.own_gains = nn.Parameter(torch.zeros(len(model.model.layers), model.config.hidden_size))


def _skips_into_feed_forwards(model: DogeForCausalLM) -> None:
    outputs: list[Tensor] = []
    layers, d = model.model.layers, model.config.hidden_size
    model.model.skips = None
    for index, layer in enumerate(layers):
        layer.__class__ = SublayerSkipLayer
        layer.outputs, layer.is_last = outputs, layer is layers[-1]
        layer.gains_of_attention = nn.ParameterList(torch.zeros(d) for _ in range(2 * index))
        layer.gains_of_feed_forward = nn.ParameterList(torch.zeros(d) for _ in range(2 * index + 1))


def _values_of_earlier_layers(model: DogeForCausalLM) -> None:
    inputs: list[Tensor] = []
    attentions = _attentions(model)
    for index, attention in enumerate(attentions):
        attention.__class__ = ValueSkipAttn
        attention.inputs, attention.is_last = inputs, attention is attentions[-1]
        attention.value_gains = nn.ParameterList(torch.zeros(model.config.hidden_size) for _ in range(index))


def _values_of_first_layer(model: DogeForCausalLM) -> None:
    first: list[Tensor] = []
    for index, attention in enumerate(_attentions(model)):
        attention.__class__, attention.first = FirstValueAttn, first
        if index:
            attention.value_gains = nn.ParameterList([torch.zeros(model.config.hidden_size)])


def _values_of_stream(model: DogeForCausalLM) -> None:
    outputs: list[Tensor] = []
    skips = _skips(model)
    skips.__class__, skips.outputs = StreamKept, outputs
    for index, attention in enumerate(_attentions(model)):
        attention.__class__, attention.outputs = StreamValueAttn, outputs
        attention.value_gains = nn.ParameterList(torch.zeros(model.config.hidden_size) for _ in range(index))


def _branches_gained(model: DogeForCausalLM) -> None:
    """Learned gains on what attention and the feed-forward add."""
    for layer in model.model.layers:
        for module in (layer.attn.o_proj, layer.feed_forward):
            module.__class__ = type("Gained", (GainedBranch, type(module)), {})
            module.branch_gains = nn.Parameter(torch.ones(model.config.hidden_size))


def _attentions(model: DogeForCausalLM | LlamaForCausalLM) -> list[nn.Module]:
    doge = isinstance(model, DogeForCausalLM)
    return [layer.attn if doge else layer.self_attn for layer in model.model.layers]


def _feed_forwards(model: DogeForCausalLM) -> list[DogeCDMoE]:
    if not model.config.num_cdmmoe_experts:
        raise UserError("num_cdmmoe_experts is 0: the change is one of experts")
    return [layer.feed_forward for layer in model.model.layers]


def _weights_outside(model: DogeForCausalLM) -> None:
    for feed_forward in _feed_forwards(model):
        feed_forward.__class__ = OpenCDMoE
        feed_forward.weights_outside = True


def _one_pool(model: DogeForCausalLM) -> None:
    """All layers choose from the same experts, the first layer's."""
    first, *others = _feed_forwards(model)
    for feed_forward in others:
        feed_forward.__class__ = OpenCDMoE
        feed_forward.pool = first.down_embed, first.up_embed
        del feed_forward.down_embed, feed_forward.up_embed


def _residual(model: DogeForCausalLM) -> None:
    if model.config.private_expert_intermediate_size != model.config.hidden_size:
        raise UserError("residual needs private_expert_intermediate_size = hidden_size")
    for feed_forward in _feed_forwards(model):
        feed_forward.__class__ = ResidualCDMoE


def _linear_value(model: DogeForCausalLM) -> None:
    for attention in _attentions(model):
        attention.__class__ = LinearValueAttn
        attention.v_proj = _matrix(model, model.config.hidden_size, model.config.hidden_size)


def _matrix(model: DogeForCausalLM, inputs: int, outputs: int) -> nn.Linear:
    matrix = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(matrix.weight, std=model._std(inputs))
    return matrix


CHANGES: dict[str, Change] = {
    "branch_gains": _branches_gained,
    "dynamic_skips": _skips_dynamic,
    "gained_skips": _skips_gained,
    "sublayer_skips": _skips_into_feed_forwards,
    "value_skips": _values_of_earlier_layers,
    "first_value": _values_of_first_layer,
    "stream_values": _values_of_stream,
    "linear_value": _linear_value,
    "residual": _residual,
    "one_pool": _one_pool,
    "weights_outside": _weights_outside,
}

LLAMA_CHANGES: dict[str, LlamaChange] = {
    "key_shift": _keys_shifted,
    "ff_shift": _feed_forward_shifted,
    "qk_norm": _queries_and_keys_normed,
}
