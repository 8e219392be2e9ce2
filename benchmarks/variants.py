"""Changes of a model for diagnosis: what a run of `quality.py` names behind `@`, as in `doge@query_norm+residual`.

They answer the question which part of the published form costs what. None is an option of the package; what proves
useful becomes a field of its configuration. Each changes a fresh model in place. `CHANGES` are those of a Doge,
`LLAMA_CHANGES` those of the Llama beside it. Shapes as in `modeling_doge.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import LlamaForCausalLM

from doge_lm.model.cdmoe import cdmoe, product_topk
from doge_lm.model.modeling_doge import DogeCDMoE, DogeForCausalLM, DogeInnerFuncAttn

Change = Callable[[DogeForCausalLM], None]

SLOW = 0.2  # learning rate of `slow_experts` over that of the rest


class HeadNorm(nn.Module):
    """RMSNorm of each head's features, with gains that the heads share."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(head_dim, eps=eps)

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.norm(x_BTd.unflatten(-1, (-1, *self.norm.normalized_shape))).flatten(-2)


class Shift(nn.Module):
    """x_t + s ⊙ (x_{t-1} - x_t), with learned shares s of the token before, (d,), that start between 0 and 1."""

    def __init__(self, shares_d: Tensor) -> None:
        super().__init__()
        self.shares = nn.Parameter(shares_d)

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        before_BTd = nn.functional.pad(x_BTd, (0, 0, 1, 0))[:, :-1]
        return torch.lerp(x_BTd, before_BTd, self.shares.to(x_BTd.dtype))


class FloatBatchNorm(nn.BatchNorm1d):
    """Batch normalization over tokens, without gains, in float32 whatever comes in."""

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, x_Mf: Tensor) -> Tensor:
        """(M, f) to (M, f)."""
        with torch.autocast(x_Mf.device.type, enabled=False):
            return super().forward(x_Mf.float())


class OpenCDMoE(DogeCDMoE):
    """The published form, in two steps that the changes below put together in other ways."""

    pool: list[nn.Embedding] | None = None  # the tables of another layer, in the place of its own
    weights_outside = False  # whether an expert is w · σ(c·D) instead of σ(w · (c·D))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.experts(self.shared(hidden_states))

    def shared(self, x_BTd: Tensor) -> Tensor:
        """c, what all domains share: (B, T, d) to (B, T, e)."""
        return self.shared_down_proj(self.act_fn(self.shared_up_proj(x_BTd)))

    def experts(self, c_BTe: Tensor) -> Tensor:
        """What the chosen experts make of c: (B, T, e) to (B, T, d)."""
        c_Me = c_BTe.flatten(0, 1)
        weights_MHk, experts_MHk = self.route(c_Me)
        tables = (
            (self.pool[0].weight, self.pool[1].weight) if self.pool else (self.down_embed.weight, self.up_embed.weight)
        )
        compute = cdmoe_weighted_outside if self.weights_outside else cdmoe
        output_Md = compute(c_Me, weights_MHk, experts_MHk, *tables, self.act_fn)
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


class ResidualCDMoE(OpenCDMoE):
    """The shared part reaches the output too: y = c + experts(c). Needs e = d."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        c_BTe = self.shared(hidden_states)
        return c_BTe + self.experts(c_BTe)


class ParallelCDMoE(OpenCDMoE):
    """The shared part is an MLP beside experts that read the layer's input: y = MLP(x) + experts(x). Needs e = d."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.shared(hidden_states) + self.experts(hidden_states)


class GatedParallelCDMoE(ParallelCDMoE):
    """The MLP beside the experts is a SwiGLU, two thirds as wide: y = SwiGLU(x) + experts(x). Needs e = d."""

    shared_mlp: "GatedMLP"

    def shared(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.shared_mlp(x_BTd)


class DirectCDMoE(GatedParallelCDMoE):
    """Keys meet the layer's input without queries between: the two tables' scores are one linear map of x."""

    scores: nn.Module

    def route(self, c_Me: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the chosen experts, each (M, H, k)."""
        scores_MHn = self.scores(c_Me).unflatten(-1, (self.num_heads, -1))
        return product_topk(scores_MHn[..., : self.n1], scores_MHn[..., self.n1 :], self.experts_per_head)


class Held:
    """What one module leaves for others within a forward pass."""

    tokens: Tensor  # (B, T, d)


class HoldingEmbedding(nn.Embedding):
    """A token embedding whose output is kept for the values of all layers."""

    held: Held

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) to (B, T, d)."""
        self.held.tokens = super().forward(ids_BT)
        return self.held.tokens


class TokenValueAttn(DogeInnerFuncAttn):
    """v = x ⊙ E[argmax s] + RMSNorm(token embedding) ⊙ F, with F of d gains that start at 0."""

    held: Held
    token_gains: nn.Parameter

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        token_BTd = nn.functional.rms_norm(self.held.tokens, x_BTd.shape[-1:], self.token_gains)
        return super().inner_values(x_BTd, scores_BTn) + token_BTd


class SharedOnlyCDMoE(DogeCDMoE):
    """No experts: y = c, an ordinary MLP. Their parameters stay, unused. Needs e = d."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.shared_down_proj(self.act_fn(self.shared_up_proj(hidden_states)))


class GatedMLP(nn.Module):
    """SwiGLU in place of the whole feed-forward: y = W_down (σ(W_gate x) ⊙ W_up x)."""

    def __init__(self, d: int, width: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.down_proj(self.act_fn(self.gate_proj(x_BTd)) * self.up_proj(x_BTd))


class Scaled(nn.Module):
    """A parametrization W = scale · θ: under Adam, whose steps do not follow the size of a gradient, W learns at
    `scale` times the learning rate.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, theta: Tensor) -> Tensor:
        """θ to W."""
        return self.scale * theta

    def right_inverse(self, weight: Tensor) -> Tensor:
        """W to θ."""
        return weight / self.scale


class LinearValueAttn(DogeInnerFuncAttn):
    """v = W_v x. The inner values stay, unused."""

    v_proj: nn.Linear

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.v_proj(x_BTd)


class LinearInnerValueAttn(LinearValueAttn):
    """v = (W_v x) ⊙ E[argmax s]: the published value, of mixed features."""

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.v_proj(x_BTd) * self.gains(x_BTd)

    def gains(self, x_BTd: Tensor) -> Tensor:
        """E[argmax s], (B, T, d), with the straight-through gradient."""
        scores_BTn = nn.functional.linear(self.v_queries(x_BTd), self.v_keys)
        hard_BTn = nn.functional.one_hot(scores_BTn.argmax(dim=-1), self.config.num_inner_values)
        soft_BTn = scores_BTn.softmax(dim=-1, dtype=torch.float32)
        with torch.autocast(x_BTd.device.type, enabled=False):
            return (hard_BTn + (soft_BTn - soft_BTn.detach())) @ self.v_embed.weight.float()


def _add_value_matrix(attention: DogeInnerFuncAttn, model: DogeForCausalLM) -> None:
    d = model.config.hidden_size
    attention.v_proj = nn.Linear(d, d, bias=False)
    nn.init.normal_(attention.v_proj.weight, std=model._std(d))


def _queries_normed(model: DogeForCausalLM) -> None:
    for feed_forward in _feed_forwards(model):
        queries = feed_forward.queries
        feed_forward.queries = nn.Sequential(queries, FloatBatchNorm(queries.out_features))


def _input_normed(model: DogeForCausalLM) -> None:
    for feed_forward in _feed_forwards(model):
        queries = feed_forward.queries
        feed_forward.queries = nn.Sequential(FloatBatchNorm(queries.in_features), queries)


def _queries_and_keys_normed(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    for attention in _attentions(model):
        for name in ("q_proj", "k_proj"):
            norm = HeadNorm(attention.head_dim, model.config.rms_norm_eps)
            setattr(attention, name, nn.Sequential(getattr(attention, name), norm))


def _keys_shifted(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    """Keys of attention see the token before: a layer alone can then find what followed the like of this token."""
    for attention in _attentions(model):
        pairs = attention.head_dim // 2  # the two features of a rotated pair share a start
        shares_d = torch.linspace(0, 1, pairs).repeat(model.config.hidden_size // pairs)
        projection = attention.k_proj
        if isinstance(projection, nn.Sequential):  # before the norm
            projection.insert(1, Shift(shares_d))
        else:
            attention.k_proj = nn.Sequential(projection, Shift(shares_d))


def _values_shifted(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    """Queries, keys and values see the token before, through the input of attention."""
    for layer in model.model.layers:
        doge = isinstance(model, DogeForCausalLM)
        name = "in_attn_layernorm" if doge else "input_layernorm"
        shares_d = torch.linspace(0, 0.5, model.config.hidden_size)
        setattr(layer, name, nn.Sequential(getattr(layer, name), Shift(shares_d)))


def _embedding_shifted(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    shift = Shift(torch.linspace(0, 0.5, model.config.hidden_size))
    model.set_input_embeddings(nn.Sequential(model.get_input_embeddings(), shift))


def _attentions(model: DogeForCausalLM | LlamaForCausalLM) -> list[nn.Module]:
    doge = isinstance(model, DogeForCausalLM)
    return [layer.attn if doge else layer.self_attn for layer in model.model.layers]


def _weights_outside(model: DogeForCausalLM) -> None:
    for feed_forward in _feed_forwards(model):
        if not isinstance(feed_forward, OpenCDMoE):
            feed_forward.__class__ = OpenCDMoE
        feed_forward.weights_outside = True


def _tables_at(scale: float) -> Change:
    """The tables of the experts at `scale` times the learning rate."""

    def change(model: DogeForCausalLM) -> None:
        for feed_forward in _feed_forwards(model):
            for embedding in (feed_forward.down_embed, feed_forward.up_embed):
                register_parametrization(embedding, "weight", Scaled(scale))

    return change


def _zero_outputs(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    """Every branch starts at zero: attention's output, the MLP's, and U of the experts."""
    ends = ("o_proj.weight", "down_proj.weight", "up_embed.weight")
    for name, parameter in model.named_parameters():
        if name.endswith(ends):
            nn.init.zeros_(parameter)


def _gated_mlp(model: DogeForCausalLM) -> None:
    """SwiGLU, as wide as keeps the total of parameters."""
    d = model.config.hidden_size
    for layer in model.model.layers:
        width = round(sum(p.numel() for p in layer.feed_forward.parameters()) / (3 * d))
        layer.feed_forward = GatedMLP(d, width, layer.feed_forward.act_fn)
        for matrix in (m for m in layer.feed_forward.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(matrix.weight, std=model._std(matrix.in_features))


def _gated_parallel(model: DogeForCausalLM) -> None:
    d = model.config.hidden_size
    _feed_forward_of(GatedParallelCDMoE)(model)
    for feed_forward in _feed_forwards(model):
        width = round(2 * model.config.cross_domain_intermediate_size / 3)
        feed_forward.shared_mlp = GatedMLP(d, width, feed_forward.act_fn)
        for matrix in (m for m in feed_forward.shared_mlp.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(matrix.weight, std=model._std(matrix.in_features))
        del feed_forward.shared_up_proj, feed_forward.shared_down_proj


def _direct(normed: bool) -> Change:
    """See `DirectCDMoE`; `normed`: each score by batch normalization over the tokens."""

    def change(model: DogeForCausalLM) -> None:
        _gated_parallel(model)
        for feed_forward in _feed_forwards(model):
            feed_forward.__class__ = DirectCDMoE
            heads, rows, half = feed_forward.keys.shape
            scores = nn.Linear(2 * half, heads * rows, bias=False)
            nn.init.normal_(scores.weight, std=model._std(2 * half))
            feed_forward.scores = nn.Sequential(scores, FloatBatchNorm(heads * rows)) if normed else scores
            del feed_forward.queries
            feed_forward.keys = nn.Parameter(torch.zeros(1), requires_grad=False)

    return change


def _one_pool(model: DogeForCausalLM) -> None:
    """All layers choose from the same experts, the first layer's."""
    first, *others = _feed_forwards(model)
    for feed_forward in others:
        feed_forward.pool = [first.down_embed, first.up_embed]
        del feed_forward.down_embed, feed_forward.up_embed


def _token_values(model: DogeForCausalLM) -> None:
    held = Held()
    model.model.word_embed.__class__ = HoldingEmbedding
    model.model.word_embed.held = held
    for attention in _attentions(model):
        attention.__class__ = TokenValueAttn
        attention.held = held
        attention.token_gains = nn.Parameter(torch.zeros(model.config.hidden_size))


def _feed_forward_shifted(model: DogeForCausalLM) -> None:
    """The feed-forward sees the token before."""
    for layer in model.model.layers:
        layer.in_ff_layernorm = nn.Sequential(
            layer.in_ff_layernorm, Shift(torch.linspace(0, 0.5, model.config.hidden_size))
        )


BUDGET = 24_422_656


def _fit(model: DogeForCausalLM) -> None:
    """Make the gated MLPs as wide as brings the total of parameters to that of doge_25M."""
    d, layers = model.config.hidden_size, len(model.model.layers)
    mlps = [module for module in model.modules() if isinstance(module, GatedMLP)]
    others = sum(p.numel() for p in model.parameters()) - sum(p.numel() for mlp in mlps for p in mlp.parameters())
    width = round((BUDGET - others) / (3 * d * layers))
    for mlp in mlps:
        mlp.__init__(d, width, mlp.act_fn)
        for matrix in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            nn.init.normal_(matrix.weight, std=model._std(matrix.in_features))


def _feed_forwards(model: DogeForCausalLM) -> list[DogeCDMoE]:
    return [layer.feed_forward for layer in model.model.layers]


def _feed_forward_of(kind: type[DogeCDMoE]) -> Change:
    def change(model: DogeForCausalLM) -> None:
        if model.config.private_expert_intermediate_size != model.config.hidden_size:
            raise ValueError(f"{kind.__name__} needs private_expert_intermediate_size = hidden_size")
        for feed_forward in _feed_forwards(model):
            feed_forward.__class__ = kind

    return change


def _value_of(kind: type[LinearValueAttn]) -> Change:
    def change(model: DogeForCausalLM) -> None:
        for layer in model.model.layers:
            layer.attn.__class__ = kind
            _add_value_matrix(layer.attn, model)

    return change


CHANGES: dict[str, Change] = {
    "qk_norm": _queries_and_keys_normed,
    "direct": _direct(normed=False),
    "direct_normed": _direct(normed=True),
    "one_pool": _one_pool,
    "token_values": _token_values,
    "ff_shift": _feed_forward_shifted,
    "fit": _fit,
    "key_shift": _keys_shifted,
    "input_shift": _values_shifted,
    "embed_shift": _embedding_shifted,
    "query_norm": _queries_normed,
    "input_norm": _input_normed,
    "residual": _feed_forward_of(ResidualCDMoE),
    "parallel": _feed_forward_of(ParallelCDMoE),
    "gated_parallel": _gated_parallel,
    "weights_outside": _weights_outside,
    "slow_experts": _tables_at(SLOW),
    "tables_third": _tables_at(1 / 3),
    "tables_triple": _tables_at(3.0),
    "zero_outputs": _zero_outputs,
    "gated_mlp": _gated_mlp,
    "shared_only": _feed_forward_of(SharedOnlyCDMoE),
    "linear_value": _value_of(LinearValueAttn),
    "linear_inner_value": _value_of(LinearInnerValueAttn),
}

LLAMA_CHANGES: dict[str, Callable[[LlamaForCausalLM], None]] = {
    "qk_norm": _queries_and_keys_normed,
    "key_shift": _keys_shifted,
    "input_shift": _values_shifted,
    "embed_shift": _embedding_shifted,
    "zero_outputs": _zero_outputs,
}
