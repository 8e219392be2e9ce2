"""Changes of a model for diagnosis: what a run of `quality.py` names behind `@`, as in `doge@one_pool`.

They answer the question which part of a form costs what. None is an option of the package; what proves useful becomes a
field of its configuration, and what does not pay is removed: docs/log.md names the commit of the changes that are gone.
Each changes a fresh model in place. `CHANGES` are those of a Doge, `LLAMA_CHANGES` those of the Llama beside it. Shapes
as in `modeling_doge.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from doge_lm.errors import UserError
from doge_lm.model.cdmoe import cdmoe, product_topk
from doge_lm.model.modeling_doge import (
    DogeCDMoE,
    DogeForCausalLM,
    DogeInnerFuncAttn,
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


BALANCE = 0.01  # the share of the auxiliary loss in what is trained on, Switch Transformers' α


class Attached(torch.autograd.Function):
    """Hands a tensor on, and has a loss trained on beside the one that the tensor leads to."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        """The tensor as it is."""
        ctx.save_for_backward(loss)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the loss is 1."""
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)


class BalancedCDMoE(OpenCDMoE):
    """Trained to use all keys alike; one micro-batch a step, as the loss is not divided by their number.

    The auxiliary loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6), for each table of keys:
    α · n · Σ_i f_i P_i, where key i is in a share f_i of the choices, and P_i is the mean of its softmax.
    """

    def route(self, c_Me: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the chosen experts, each (M, H, k)."""
        scores_MHC = nn.functional.linear(c_Me, self.fold()).unflatten(-1, (self.num_heads, -1))
        scores_MHC = scores_MHC.to(torch.promote_types(scores_MHC.dtype, torch.float32))
        tables = scores_MHC.split([self.n1, self.num_experts // self.n1], -1)
        weights_MHk, experts_MHk = product_topk(*tables, self.experts_per_head)
        if not self.training:
            return weights_MHk, experts_MHk
        halves = experts_MHk // tables[1].shape[-1], experts_MHk % tables[1].shape[-1]
        loss = sum(self._imbalance(*each) for each in zip(tables, halves, strict=True))
        return Attached.apply(weights_MHk, BALANCE * loss), experts_MHk

    @staticmethod
    def _imbalance(scores_MHn: Tensor, chosen_MHk: Tensor) -> Tensor:
        """n · Σ_i f_i P_i of a table, the mean of the heads: 1 if all keys are used alike, n if one is alone."""
        n = scores_MHn.shape[-1]
        all_n = torch.arange(n, device=scores_MHn.device)
        share_Hn = (chosen_MHk.unsqueeze(-1) == all_n).to(scores_MHn.dtype).mean((0, 2))
        return n * (share_Hn * scores_MHn.softmax(-1).mean(0)).sum(-1).mean()


class LinearValueAttn(DogeInnerFuncAttn):
    """v = W_v x. The inner values stay, unused."""

    v_proj: nn.Linear

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.v_proj(x_BTd)


class SoftValueAttn(DogeInnerFuncAttn):
    """v = x ⊙ Σ_j softmax(s)_j E_j: a mixture of the inner values in the place of the choice, in evaluation too."""

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.mixed_values(x_BTd, scores_BTn)

    def mixed_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """x times the mixture of inner values, (B, T, d)."""
        with torch.autocast(x_BTd.device.type, enabled=False):
            soft_BTn = scores_BTn.to(torch.promote_types(scores_BTn.dtype, torch.float32)).softmax(-1)
            return x_BTd * (soft_BTn @ self.v_embed.weight.to(soft_BTn.dtype))


ANNEALED_PASSES = 800  # in training, until the mixture is as hard as it gets: seven eighths of 30M tokens
LEAST_TEMPERATURE = 0.05


class AnnealedValueAttn(SoftValueAttn):
    """A mixture of the inner values that becomes the choice; one micro-batch a step, as forward passes are counted.

    Σ_j softmax(s / τ)_j E_j, where τ falls from 1 in a line. Evaluation chooses, as without the change.
    """

    passes: Tensor

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        if not self.training:
            return DogeInnerFuncAttn.inner_values(self, x_BTd, scores_BTn)
        temperature = (1 - self.passes / ANNEALED_PASSES).clamp(min=LEAST_TEMPERATURE)
        self.passes += 1
        return self.mixed_values(x_BTd, scores_BTn / temperature)


class MixedValueAttn(DogeInnerFuncAttn):
    """v = Q x ⊙ E[j], where Q is orthogonal and never trained: a head carries a share of all features, not a slice."""

    mixing_dd: Tensor

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return super().inner_values(nn.functional.linear(x_BTd, self.mixing_dd), scores_BTn)


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


def _balanced(model: DogeForCausalLM) -> None:
    for feed_forward in _feed_forwards(model):
        feed_forward.__class__ = BalancedCDMoE


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


def _soft_value(model: DogeForCausalLM) -> None:
    for attention in _attentions(model):
        attention.__class__ = SoftValueAttn


def _annealed_value(model: DogeForCausalLM) -> None:
    for attention in _attentions(model):
        attention.__class__ = AnnealedValueAttn
        attention.register_buffer("passes", torch.zeros((), device=attention.v_embed.weight.device), persistent=False)


def _mixed_value(model: DogeForCausalLM) -> None:
    d = model.config.hidden_size
    for layer, attention in enumerate(_attentions(model)):
        generator = torch.Generator().manual_seed(layer)
        drawn_dd = torch.randn(d, d, dtype=torch.float64, device="cpu", generator=generator)
        mixing_dd = torch.linalg.qr(drawn_dd).Q.to(attention.v_embed.weight)
        attention.__class__ = MixedValueAttn
        attention.register_buffer("mixing_dd", mixing_dd, persistent=False)


def _matrix(model: DogeForCausalLM, inputs: int, outputs: int) -> nn.Linear:
    matrix = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(matrix.weight, std=model._std(inputs))
    return matrix


CHANGES: dict[str, Change] = {
    "linear_value": _linear_value,
    "soft_value": _soft_value,
    "annealed_value": _annealed_value,
    "mixed_value": _mixed_value,
    "residual": _residual,
    "one_pool": _one_pool,
    "weights_outside": _weights_outside,
    "balanced": _balanced,
}

LLAMA_CHANGES: dict[str, LlamaChange] = {
    "key_shift": _keys_shifted,
    "ff_shift": _feed_forward_shifted,
    "qk_norm": _queries_and_keys_normed,
}
