"""Changes of a model for diagnosis: what a run of `quality.py` names behind `@`, as in `doge@key_shift+residual`.

They answer the question which part of a form costs what. None is an option of the package; what proves useful becomes a
field of its configuration, and what does not pay is removed: docs/log.md names the commit of the changes that are gone.
Each changes a fresh model in place. `CHANGES` are those of a Doge, `LLAMA_CHANGES` those of the Llama beside it. Shapes
as in `modeling_doge.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from doge_lm.model.cdmoe import cdmoe
from doge_lm.model.modeling_doge import DogeCDMoE, DogeForCausalLM, DogeInnerFuncAttn

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


class Shift(nn.Module):
    """x_t + s ⊙ (x_{t-1} - x_t), with learned shares s of the token before, (d,), that start between 0 and 1."""

    def __init__(self, shares_d: Tensor) -> None:
        super().__init__()
        self.shares = nn.Parameter(shares_d)

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        before_BTd = nn.functional.pad(x_BTd, (0, 0, 1, 0))[:, :-1]
        return torch.lerp(x_BTd, before_BTd, self.shares.to(x_BTd.dtype))


class PairEmbedding(nn.Embedding):
    """e_t + W_p e_{t-1}: a token's row of the table beside a map of the row of the token before, with W_p of d × d."""

    before_proj: nn.Linear

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) to (B, T, d)."""
        rows_BTd = super().forward(ids_BT)
        return rows_BTd + nn.functional.pad(self.before_proj(rows_BTd), (0, 0, 1, 0))[:, :-1]


class ScaledEmbedding(nn.Embedding):
    """√d times the rows: a table that is the head's too can start as small as a head must."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) to (B, T, d)."""
        return super().forward(ids_BT) * self.embedding_dim**0.5


class MatrixTable(nn.Linear):
    """A table of experts as a matrix, for an optimizer that treats the weights of linear maps in its own way."""

    def forward(self, _rows: Tensor) -> Tensor:
        """All rows, (N, width)."""
        return self.weight


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


class SharedOnlyCDMoE(DogeCDMoE):
    """No experts: y = c, an ordinary MLP. Needs e = d."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.shared(hidden_states)


class LinearValueAttn(DogeInnerFuncAttn):
    """v = W_v x. The inner values stay, unused."""

    v_proj: nn.Linear

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.v_proj(x_BTd)


class LowRankValueAttn(DogeInnerFuncAttn):
    """v = x ⊙ E[argmax s] + W_b W_a x, with W_a of ρ × d, and W_b of d × ρ that starts at 0."""

    v_down: nn.Linear
    v_up: nn.Linear

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return super().inner_values(x_BTd, scores_BTn) + self.v_up(self.v_down(x_BTd))


class GatedOutputAttn(DogeInnerFuncAttn):
    """The output is W_o (2 sigmoid(W_g x) ⊙ (softmax(q kᵀ/√f + mask) v)), with W_g of d × d that starts at 0."""

    gate_proj: nn.Linear

    def output(self, mixed_BTd: Tensor, x_BTd: Tensor) -> Tensor:
        """(B, T, d) each to (B, T, d)."""
        return super().output(mixed_BTd * (2 * self.gate_proj(x_BTd).sigmoid()), x_BTd)


def _queries_and_keys_normed(model: LlamaForCausalLM) -> None:
    """What `qk_norm` is in a Doge."""
    for attention in _attentions(model):
        for name in ("q_proj", "k_proj"):
            norm = HeadNorm(attention.head_dim, model.config.rms_norm_eps)
            setattr(attention, name, nn.Sequential(getattr(attention, name), norm))


def _keys_shifted(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    """Keys of attention see the token before: a layer alone can then find what followed the like of this token."""
    for attention in _attentions(model):
        shares_d = _key_shares(model, attention)
        projection = attention.k_proj
        if isinstance(projection, nn.Sequential):  # before the norm
            projection.insert(1, Shift(shares_d))
        else:
            attention.k_proj = nn.Sequential(projection, Shift(shares_d))


def _feed_forward_shifted(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    """The feed-forward sees the token before."""
    name = _feed_forward_norm(model)
    for layer in model.model.layers:
        shift = Shift(torch.linspace(0, 0.5, model.config.hidden_size))
        setattr(layer, name, nn.Sequential(getattr(layer, name), shift))


def _pairs_embedded(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    """The residual stream starts with the token before beside the token."""
    embedding = model.get_input_embeddings()
    embedding.__class__ = PairEmbedding
    embedding.before_proj = nn.Linear(embedding.embedding_dim, embedding.embedding_dim, bias=False)
    nn.init.normal_(embedding.before_proj.weight, std=0.5 * embedding.embedding_dim**-0.5)


class KeptEmbedding(nn.Embedding):
    """The token embedding, which keeps what it gave: p_t = W_p RMSNorm(e_{t-1}) for the keys of all layers."""

    before_proj: nn.Linear
    before: Tensor | None = None

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) to (B, T, d)."""
        rows_BTd = super().forward(ids_BT)
        normed_BTd = nn.functional.rms_norm(rows_BTd, rows_BTd.shape[-1:])
        self.before = nn.functional.pad(self.before_proj(normed_BTd), (0, 0, 1, 0))[:, :-1]
        return rows_BTd


class WithTokenBefore(nn.Module):
    """x_t + s ⊙ (p_t - x_t), with p_t of the token before and learned shares s, (d,)."""

    def __init__(self, shares_d: Tensor, embedding: KeptEmbedding) -> None:
        super().__init__()
        self.shares = nn.Parameter(shares_d)
        self.embedding = [embedding]  # in a list: it is no module of this one

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        before_BTd = self.embedding[0].before
        assert before_BTd is not None
        return torch.lerp(x_BTd, before_BTd.to(x_BTd.dtype), self.shares.to(x_BTd.dtype))


def _keys_see_token_before(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    """As `key_shift`, but keys see which token came before, not the key that it had in this layer."""
    embedding = model.get_input_embeddings()
    embedding.__class__ = KeptEmbedding
    embedding.before_proj = nn.Linear(embedding.embedding_dim, embedding.embedding_dim, bias=False)
    nn.init.normal_(embedding.before_proj.weight, std=embedding.embedding_dim**-0.5)
    for attention in _attentions(model):
        projection = attention.k_proj
        seen = WithTokenBefore(_key_shares(model, attention), embedding)
        if isinstance(projection, nn.Sequential):  # before the norm
            projection.insert(1, seen)
        else:
            attention.k_proj = nn.Sequential(projection, seen)


def _feed_forward_sees_token_before(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    """The feed-forward sees which token came before: with `before_keys` ahead of it in the list of changes."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, KeptEmbedding):
        raise ValueError("before_ff comes behind before_keys")
    name = _feed_forward_norm(model)
    for layer in model.model.layers:
        seen = WithTokenBefore(torch.linspace(0, 0.5, model.config.hidden_size), embedding)
        setattr(layer, name, nn.Sequential(getattr(layer, name), seen))


def _feed_forward_norm(model: DogeForCausalLM | LlamaForCausalLM) -> str:
    return "in_ff_layernorm" if isinstance(model, DogeForCausalLM) else "post_attention_layernorm"


def _key_shares(model: DogeForCausalLM | LlamaForCausalLM, attention: nn.Module) -> Tensor:
    pairs = attention.head_dim // 2  # the two features of a rotated pair share a start
    return torch.linspace(0, 1, pairs).repeat(model.config.hidden_size // pairs)


def _embedding_scaled(model: DogeForCausalLM | LlamaForCausalLM) -> None:
    model.get_input_embeddings().__class__ = ScaledEmbedding


def _tables_as_matrices(model: DogeForCausalLM) -> None:
    """Muon updates the tables of experts."""
    for feed_forward in _feed_forwards(model):
        for name in ("down_embed", "up_embed"):
            table = getattr(feed_forward, name)
            matrix = MatrixTable(table.embedding_dim, table.num_embeddings, bias=False)
            matrix.weight = table.weight
            setattr(feed_forward, name, matrix)


def _attentions(model: DogeForCausalLM | LlamaForCausalLM) -> list[nn.Module]:
    doge = isinstance(model, DogeForCausalLM)
    return [layer.attn if doge else layer.self_attn for layer in model.model.layers]


def _feed_forwards(model: DogeForCausalLM) -> list[DogeCDMoE]:
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
    _check_width(model, "residual")
    for feed_forward in _feed_forwards(model):
        feed_forward.__class__ = ResidualCDMoE


def _no_experts(model: DogeForCausalLM) -> None:
    _check_width(model, "no_experts")
    for feed_forward in _feed_forwards(model):
        feed_forward.__class__ = SharedOnlyCDMoE
        del feed_forward.queries, feed_forward.keys, feed_forward.down_embed, feed_forward.up_embed


def _check_width(model: DogeForCausalLM, change: str) -> None:
    if model.config.private_expert_intermediate_size != model.config.hidden_size:
        raise ValueError(f"{change} needs private_expert_intermediate_size = hidden_size")


def _linear_value(model: DogeForCausalLM) -> None:
    for attention in _attentions(model):
        attention.__class__ = LinearValueAttn
        attention.v_proj = _matrix(model, model.config.hidden_size, model.config.hidden_size)


def _output_gate(model: DogeForCausalLM) -> None:
    for attention in _attentions(model):
        attention.__class__ = GatedOutputAttn
        attention.gate_proj = _matrix(model, model.config.hidden_size, model.config.hidden_size)
        nn.init.zeros_(attention.gate_proj.weight)


def _low_rank_value(rank: int) -> Change:
    def change(model: DogeForCausalLM) -> None:
        for attention in _attentions(model):
            attention.__class__ = LowRankValueAttn
            attention.v_down = _matrix(model, model.config.hidden_size, rank)
            attention.v_up = _matrix(model, rank, model.config.hidden_size)
            nn.init.zeros_(attention.v_up.weight)

    return change


def _matrix(model: DogeForCausalLM, inputs: int, outputs: int) -> nn.Linear:
    matrix = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(matrix.weight, std=model._std(inputs))
    return matrix


CHANGES: dict[str, Change] = {
    "key_shift": _keys_shifted,
    "before_keys": _keys_see_token_before,
    "before_ff": _feed_forward_sees_token_before,
    "ff_shift": _feed_forward_shifted,
    "pair_embed": _pairs_embedded,
    "scaled_embed": _embedding_scaled,
    "muon_tables": _tables_as_matrices,
    "linear_value": _linear_value,
    "value_rank_32": _low_rank_value(32),
    "value_rank_64": _low_rank_value(64),
    "output_gate": _output_gate,
    "residual": _residual,
    "no_experts": _no_experts,
    "one_pool": _one_pool,
    "weights_outside": _weights_outside,
}

LLAMA_CHANGES: dict[str, LlamaChange] = {
    "qk_norm": _queries_and_keys_normed,
    "key_shift": _keys_shifted,
    "before_keys": _keys_see_token_before,
    "before_ff": _feed_forward_sees_token_before,
    "ff_shift": _feed_forward_shifted,
    "pair_embed": _pairs_embedded,
    "scaled_embed": _embedding_scaled,
}
