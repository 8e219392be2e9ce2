"""The Doge model of *Wonderful Matrices* (arXiv 2407.16958): Inner Function Attention and a Cross Domain Mixture
of Experts in a pre-norm Transformer decoder.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    B  batch                   h  attention heads          e  expert size
    T  tokens                  f  features of a head, d/h  H  expert heads
    S  keys, with the cache    n  inner values             k  experts per head
    d  hidden size             r  retrieval size           M  tokens of the batch as one, B·T

The paper's letters for tables: E is `v_embed` (n, d), K_v is `v_keys`, D is `down_embed` (N, e), U is `up_embed`
(N, d). The field names `num_cdmmoe_*` keep the published spelling.

Weights are meant to be in float32 and the computation in bfloat16 by autocast; norms, softmax and the loss are
computed in float32 (in float64 for a float64 model).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cdmoe import (
    cdmoe,
    cdmoe_route,
    folded_keys,
    folding_pays,
    key_table_sizes,
    merged_cdmoe,
    merges,
    product_topk,
    type_of_products,
)
from .configuration_doge import DogeConfig
from .document_attention import DocumentBlocks, Layout, document_attention, document_layout
from .kernels import HAVE_TRITON, PLAIN, kernels_take
from .linear_cross_entropy import cap_logits, next_token_loss
from .token_shift import TokensBefore, TokenShift, keep_newest_inputs, seen_tokens

if HAVE_TRITON:
    from .inner_value_triton import MOST_VALUES
    from .inner_value_triton import inner_value as fused_inner_value
    from .residual_norm_triton import MOST_FEATURES
    from .residual_norm_triton import add_norm as fused_add_norm
    from .rotation_triton import normed_rotated_projections as fused_normed_rotation
    from .rotation_triton import rotated_projections as fused_rotation
    from .silu_product_triton import silu_product

INNER_VALUE_STD = 0.02
# With fewer tokens (decoding), putting matrices together would move more bytes than it saves.
MERGE_MIN_TOKENS = 256


class DogeRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding, in float32, for any scaling type of transformers."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: DogeConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_parameters: dict = config.rope_parameters or {}
        self.rope_type = self.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self.initial_frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def initial_frequencies(self) -> tuple[Tensor, float]:
        """The inverse frequencies (f/2,) and the factor on cosine and sine."""
        if self.rope_type != "default":
            return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
        size = self.config.hidden_size // self.config.num_attention_heads
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return self.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn: Callable, recurse: bool = True) -> "DogeRotaryEmbedding":
        """Follow a move to another device but not to another type: in bfloat16, late positions would be lost."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update  # the types whose frequencies depend on the length
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B or 1, T) to cosine and sine, each (B or 1, T, f); `x` gives the device."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x_BhTf: Tensor, cos_BTf: Tensor, sin_BTf: Tensor) -> Tensor:
    """Rotate queries or keys; feature i of a head pairs with feature i + f/2, as in Llama."""
    first, second = x_BhTf.chunk(2, dim=-1)
    turned_BhTf = torch.cat((-second, first), dim=-1)
    rotated_BhTf = x_BhTf * cos_BTf.unsqueeze(1) + turned_BhTf * sin_BTf.unsqueeze(1)
    return rotated_BhTf.to(x_BhTf.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch, the reference of the other backends: the one that returns its weights.

    Takes query (B, h, T, f), key and value (B, h, S, f) and an additive mask; returns the output (B, T, h, f)
    and the weights (B, h, T, S).
    """
    scores_BhTS = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BhTS = scores_BhTS + attention_mask
    weights_BhTS = scores_BhTS.softmax(dim=-1, dtype=_at_least_float32(query)).to(query.dtype)
    weights_BhTS = nn.functional.dropout(weights_BhTS, p=dropout, training=module.training)
    return (weights_BhTS @ value).transpose(1, 2).contiguous(), weights_BhTS


class DogeInnerFuncAttn(nn.Module):
    """Inner Function Attention: the value is a function of the input that is chosen for each token.

    q = RoPE(W_q x) and k = RoPE(W_k x); s = K_v (W_s x), j = argmax s and v = x ⊙ E[j], cut into heads;
    the output is W_o (softmax(q kᵀ/√f + mask) v).

    With `qk_norm` each head's queries and keys have an RMSNorm before they are rotated; the heads share its gains. With
    `key_shift` keys see the token before (`TokenShift`), ahead of that norm. With `value_residual` the value of
    all layers but the first is (x + g ⊙ x_0) ⊙ E[j], where x_0 is what attention reads in the first layer, and g are
    learned gains from 0. (In arXiv 2410.17897, section 3, it is the first layer's values that are added.)
    """

    folded: Tensor | None = None
    """What `fold` made, for as long as a decoder lends it: one product takes the place of four."""

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        d, bias = config.hidden_size, config.hidden_bias
        self.head_dim = d // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(d, d, bias=bias)
        self.k_proj = nn.Linear(d, d, bias=bias)
        self.v_queries = nn.Linear(d, config.inner_values_retrieval_size, bias=bias)
        self.v_keys = nn.Parameter(torch.empty(config.num_inner_values, config.inner_values_retrieval_size))
        self.v_embed = nn.Embedding(config.num_inner_values, d)
        self.o_proj = nn.Linear(d, d, bias=bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_shift = None
        if config.key_shift:
            self.k_shift = TokenShift(d, self.head_dim // 2, 1.0)  # the two features of a rotated pair start alike
        self.value_gains = None
        if config.value_residual and layer_idx:
            self.value_gains = nn.Parameter(torch.empty(d))

    def rotated_projections(
        self, x_BTd: Tensor, cos_BTf: Tensor, sin_BTf: Tensor, before: TokensBefore | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, (B, h, T, f) each, and the scores of the inner values, (B, T, n)."""
        heads, values = self.config.num_attention_heads, self.config.num_inner_values
        if kernels_take(x_BTd) and self.k_shift is None and self.merges(x_BTd) and self._norms_are_plain():
            angles = cos_BTf.contiguous(), sin_BTf.contiguous()
            product_BTC = self.merged_projection(x_BTd)
            if self.config.qk_norm:
                gains = self.q_norm.weight, self.k_norm.weight
                eps = self.config.rms_norm_eps
                parts = fused_normed_rotation(product_BTC, *gains, *angles, heads, values, eps)
            else:
                parts = fused_rotation(product_BTC, *angles, heads, values)
            query_BThf, key_BThf, scores_BTn = parts
            return query_BThf.transpose(1, 2), key_BThf.transpose(1, 2), scores_BTn
        query_BTd, key_BTd, scores_BTn = self.projections(x_BTd)
        if self.k_shift is not None:
            assert before is not None
            key_BTd = self.k_shift(key_BTd, before.of(key_BTd, self.layer_idx, 0))
        query_BThf, key_BThf = (x.unflatten(-1, (heads, -1)) for x in (query_BTd, key_BTd))
        if self.config.qk_norm:
            dtype, wide = query_BThf.dtype, self.q_norm.weight.dtype
            query_BThf = self.q_norm(query_BThf.to(wide)).to(dtype)
            key_BThf = self.k_norm(key_BThf.to(wide)).to(dtype)
        query_BhTf, key_BhTf = query_BThf.transpose(1, 2), key_BThf.transpose(1, 2)
        return rotate(query_BhTf, cos_BTf, sin_BTf), rotate(key_BhTf, cos_BTf, sin_BTf), scores_BTn

    def _norms_are_plain(self) -> bool:
        """Whether the norms of queries and keys, if there are any, are no more than gains in float32."""
        if not self.config.qk_norm:
            return True
        norms = self.q_norm, self.k_norm
        return all(is_plain(norm, nn.RMSNorm) and norm.weight.dtype == torch.float32 for norm in norms)

    def projections(self, x_BTd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys before their rotation, (B, T, d) each, and the scores of the inner values, (B, T, n)."""
        if not self.merges(x_BTd):
            scores_BTn = nn.functional.linear(self.v_queries(x_BTd), self.v_keys)
            return self.q_proj(x_BTd), self.k_proj(x_BTd), scores_BTn
        d, n = x_BTd.shape[-1], self.config.num_inner_values
        product_BTC = self.merged_projection(x_BTd)[..., : 2 * d + n]
        query_BTd, key_BTd, scores_BTn = product_BTC.split([d, d, n], dim=-1)
        return query_BTd, key_BTd, scores_BTn

    def merges(self, x_BTd: Tensor) -> bool:
        """Whether `merged_projection` may take the place of the modules, and pays."""
        if torch.compiler.is_exporting():  # a graph that is to hold for every length must not be decided by one
            return False
        return self.folded is not None or (x_BTd.shape[:-1].numel() >= MERGE_MIN_TOKENS and self.is_foldable())

    def is_foldable(self) -> bool:
        """Whether the three modules are no more than their matrices."""
        return not PLAIN and all(is_plain(linear) for linear in (self.q_proj, self.k_proj, self.v_queries))

    def merged_projection(self, x_BTd: Tensor) -> Tensor:
        """W_q x, W_k x and the scores s = K_v (W_s x) by one product, the last by K_v W_s, which has n rows.

        Returns:
            (B, T, 2·d + n), up to a multiple of 8 columns: rows begin at whole 16 bytes, for the matrix units.
        """
        return nn.functional.linear(x_BTd, self.fold() if self.folded is None else self.folded)

    def fold(self) -> Tensor:
        """W_q, W_k and K_v W_s below each other, (2·d + n, d), up to a multiple of 8 rows."""
        scores_nd = (self.v_keys @ self.v_queries.weight).to(self.q_proj.weight.dtype)
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, scores_nd))
        return nn.functional.pad(weight, (0, 0, 0, -len(weight) % 8))

    def inner_values(self, x_BTd: Tensor, scores_BTn: Tensor) -> Tensor:
        """v = x ⊙ E[argmax s], (B, T, d).

        The choice is hard in the forward pass; in the backward pass its gradient is that of softmax(s)
        (straight-through). E and the product stay in float32: rows that start at 1 + N(0, 0.02) would lose their
        noise in bfloat16, whose steps near 1 are 0.0078.
        """
        values_nd = whole_table(self.v_embed, self.config.num_inner_values, x_BTd.device)
        if kernels_take(x_BTd) and scores_BTn.shape[-1] <= MOST_VALUES:
            x_Md, scores_Mn = x_BTd.to(scores_BTn.dtype).flatten(0, 1), scores_BTn.flatten(0, 1)
            return fused_inner_value(x_Md, scores_Mn, values_nd).view(x_BTd.shape)
        if not torch.is_grad_enabled():
            return x_BTd * nn.functional.embedding(scores_BTn.argmax(dim=-1), values_nd)
        hard_BTn = nn.functional.one_hot(scores_BTn.argmax(dim=-1), self.config.num_inner_values)
        soft_BTn = scores_BTn.softmax(dim=-1, dtype=_at_least_float32(x_BTd))
        # The difference is exactly 0, so the sum is exactly one-hot.
        choice_BTn = hard_BTn.to(soft_BTn.dtype) + (soft_BTn - soft_BTn.detach())
        with torch.autocast(x_BTd.device.type, enabled=False):
            # A product with n columns: a look-up's backward pass would add all tokens to the same few rows.
            gains_BTd = choice_BTn @ values_nd.to(choice_BTn.dtype)
        return x_BTd * gains_BTd

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        documents: Layout | None = None,
        before: TokensBefore | None = None,
        first: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, d) to (B, T, d), and the weights (B, h, T, S) where the backend returns them.

        With `documents`, attention stays within them and there is no mask. `before` is what `key_shift` needs, and
        `first` what `value_residual` does: x_0, (B, T, d).
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_BhTf, key_BhSf, scores_BTn = self.rotated_projections(hidden_states, *position_embeddings, before)
        x_BTd = hidden_states
        if self.value_gains is not None:
            if first is None:
                raise ValueError(
                    "value_residual needs what attention reads in the first layer, which that layer returns beside its "
                    "hidden states: it was removed, or a hook left the hidden states alone"
                )
            x_BTd = add_with_gains(x_BTd, [first], [self.value_gains])
        value_BhSf = self.inner_values(x_BTd, scores_BTn).to(key_BhSf.dtype).view(shape).transpose(1, 2)
        if past_key_values is not None:
            key_BhSf, value_BhSf = past_key_values.update(key_BhSf, value_BhSf, self.layer_idx)
        if documents is not None:
            output_BThf = document_attention(query_BhTf, key_BhSf, value_BhSf, documents, self.scaling)
            return self.o_proj(output_BThf.reshape(hidden_states.shape)), None
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output_BThf, weights_BhTS = attention(
            self, query_BhTf, key_BhSf, value_BhSf, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output_BThf.reshape(hidden_states.shape)), weights_BhTS


class DogeSharedPart(nn.Module):
    """What all domains share of a feed-forward, c = W_down σ(W_up x); all there is of it without experts.

    With `shared_gate` it is a gated one, c = W_down (σ(W_gate x) ⊙ W_up x).
    """

    recomputes_activation = False
    """Whether training keeps σ(W_up x) for the backward pass or computes it again, where its kernel runs."""

    def __init__(self, config: DogeConfig):
        super().__init__()
        d, e, bias = config.hidden_size, config.private_expert_intermediate_size, config.hidden_bias
        self.act_fn = ACT2FN[config.hidden_act]
        self.shared_gate_proj = None
        if config.shared_gate:
            self.shared_gate_proj = nn.Linear(d, config.cross_domain_intermediate_size, bias=bias)
        self.shared_up_proj = nn.Linear(d, config.cross_domain_intermediate_size, bias=bias)
        self.shared_down_proj = nn.Linear(config.cross_domain_intermediate_size, e, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.shared(hidden_states)

    def shared(self, hidden_states: Tensor) -> Tensor:
        """c = W_down σ(W_up x), or its gated form: (B, T, d) to (B, T, e)."""
        wide_BTK = self.shared_up_proj(hidden_states)
        if self.shared_gate_proj is not None:
            return self.shared_down_proj(self.act_fn(self.shared_gate_proj(hidden_states)) * wide_BTK)
        down = self.shared_down_proj
        if (
            self.recomputes_activation
            and torch.is_grad_enabled()
            and kernels_take(wide_BTK)
            and self._is_silu()
            and is_plain(down)
        ):
            c_Me = silu_product(wide_BTK.flatten(0, 1), down.weight.to(wide_BTK.dtype))
            return c_Me.view(*hidden_states.shape[:-1], -1)
        return down(self.act_fn(wide_BTK))

    def _is_silu(self) -> bool:
        return type(self.act_fn) in (nn.SiLU, type(ACT2FN["silu"]))


class DogeCDMoE(DogeSharedPart):
    """Cross Domain Mixture of Experts: c = W_down σ(W_up x) is shared by all domains. It is the input of the
    queries, by which product keys retrieve k of N experts for each token and head, and the input of these experts,
    which have one hidden unit each. Only the experts reach the output.

    y = Σ over heads and chosen experts of σ(w · (c·D_expert)) U_expert.

    Options: with `parallel_experts` the experts are beside the shared part and not behind it: they, and their router,
    read x, and y = c + what they give. Without `router_queries` the keys meet the router's input as it is: both tables
    score all of it.
    """

    folded: Tensor | None = None
    """What `fold` made, for as long as a decoder lends it: no queries are needed."""

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        d, e, bias = config.hidden_size, config.private_expert_intermediate_size, config.hidden_bias
        self.num_heads = config.num_cdmmoe_heads
        self.experts_per_head = config.num_cdmmoe_experts_per_head
        self.path = config.cdmoe_path
        self.num_experts = config.num_cdmmoe_experts
        self.n1, n2 = key_table_sizes(self.num_experts)
        self.parallel = config.parallel_experts
        self.queries = nn.Linear(e, self.num_heads * e, bias=bias) if config.router_queries else None
        width = e // 2 if config.router_queries else e
        self.keys = nn.Parameter(torch.empty(self.num_heads, self.n1 + n2, width))
        self.down_embed = nn.Embedding(self.num_experts, e)
        self.up_embed = nn.Embedding(self.num_experts, d)

    def route(self, c_Me: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the chosen experts, each (M, H, k)."""
        heads, rows, _ = self.keys.shape
        keys_CE = self.folded
        if keys_CE is None and self._scores_directly(c_Me):
            keys_CE = self.fold()
        if keys_CE is None:
            assert self.queries is not None
            queries_MHe = self.queries(c_Me).unflatten(-1, (heads, -1))
            return cdmoe_route(queries_MHe, self.keys, self.n1, self.experts_per_head)
        scores_MHn = nn.functional.linear(c_Me, keys_CE).unflatten(-1, (heads, rows))
        return product_topk(scores_MHn[..., : self.n1], scores_MHn[..., self.n1 :], self.experts_per_head)

    def is_foldable(self) -> bool:
        """Whether there are queries, no more than their matrix, and so few keys that they are best done without."""
        if PLAIN or torch.compiler.is_exporting():  # see `DogeInnerFuncAttn.merges`
            return False
        return self.queries is not None and is_plain(self.queries) and self.keys.shape[1] < 4 * self.keys.shape[2]

    def fold(self) -> Tensor:
        """The keys as they meet c itself, all heads below each other: (H·(n1 + n2), e)."""
        keys = self.keys if self.queries is None else folded_keys(self.queries.weight, self.keys, self.n1)
        return keys.flatten(0, 1)

    def _scores_directly(self, c_Me: Tensor) -> bool:
        """Whether the scores are computed by `fold`, without queries."""
        if self.queries is None:
            return True
        _, rows, half = self.keys.shape
        return self.is_foldable() and folding_pays(c_Me.shape[0], 2 * half, rows)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        c_BTe = self.shared(hidden_states)
        if self.parallel:
            return c_BTe + self.experts(hidden_states)
        return self.experts(c_BTe)

    def experts(self, c_BTe: Tensor) -> Tensor:
        """What the chosen experts make of c: (B, T, e) to (B, T, d)."""
        c_Me = c_BTe.flatten(0, 1)
        down, up = (whole_table(table, self.num_experts, c_Me.device) for table in (self.down_embed, self.up_embed))
        if self._merges(c_Me):
            output_Md = merged_cdmoe(c_Me, self.fold(), down, up, self.n1, self.num_heads, self.experts_per_head)
        else:
            weights_MHk, experts_MHk = self.route(c_Me)
            output_Md = cdmoe(c_Me, weights_MHk, experts_MHk, down, up, self.act_fn, self.path)
        return output_Md.view(*c_BTe.shape[:-1], -1)

    def _merges(self, c_Me: Tensor) -> bool:
        """Whether `merged_cdmoe` takes the place of `route` and `cdmoe`; not where `route` is watched or replaced."""
        return (
            self.folded is None
            and "route" not in vars(self)
            and self._is_silu()
            and not torch.compiler.is_exporting()
            and self._scores_directly(c_Me)
            and merges(c_Me, self.num_experts, self.num_heads * self.experts_per_head, self.path)
        )


class DogeDecoderLayer(GradientCheckpointingLayer):
    """x += attn(RMSNorm(x)); x += feed_forward(RMSNorm(x)), with dropout on both branches.

    With `attention_shift` and `feed_forward_shift` the inputs of these see the token before (`TokenShift`).
    """

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.in_attn_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = DogeInnerFuncAttn(config, layer_idx)
        self.in_ff_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = DogeCDMoE(config) if config.num_cdmmoe_experts else DogeSharedPart(config)
        self.layer_idx = layer_idx
        d, shifts = config.hidden_size, config.shifts
        self.state_idx = {name: index for index, name in enumerate(shifts)}
        self.attn_shift = TokenShift(d, d, 0.5) if "attention" in shifts else None
        self.ff_shift = TokenShift(d, d, 0.5) if "feed_forward" in shifts else None
        self.gives_first = config.value_residual and layer_idx == 0 and config.num_hidden_layers > 1

    def forward(
        self,
        hidden_states: Tensor,
        first: Tensor | None = None,
        normed: Tensor | None = None,
        next_norm: nn.Module | None = None,
        before: TokensBefore | None = None,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, T, d) to (B, T, d); with it `next_norm` of it, or what attention read, if one of them is given at all.

        Args:
            first: what attention read in the first layer, (B, T, d), where values are made of it.
            normed: what `in_attn_layernorm` makes of `hidden_states`, where the layer before has it at hand.
            next_norm: the norm that follows this layer; given where its kernel runs.
            before: what the shifts need, where there are any.

        The other keyword arguments are those of `DogeInnerFuncAttn.forward`.
        """
        if normed is None:
            normed = self.in_attn_layernorm(hidden_states)
        normed = self._shifted(normed, self.attn_shift, before, "attention")
        given = normed.to(type_of_products(normed)) if self.gives_first else None
        branch, _ = self.attn(normed, before=before, first=first, **kwargs)
        hidden_states, normed = add_norm(hidden_states, self._dropout(branch), self.in_ff_layernorm)
        normed = self._shifted(normed, self.ff_shift, before, "feed_forward")
        branch = self._dropout(self.feed_forward(normed))
        if next_norm is not None and adds_and_norms(hidden_states, branch, next_norm):
            return *add_norm(hidden_states, branch, next_norm), given
        hidden_states = hidden_states + branch
        return hidden_states if given is None else (hidden_states, None, given)

    def _shifted(self, normed: Tensor, shift: TokenShift | None, before: TokensBefore | None, name: str) -> Tensor:
        if shift is None:
            return normed
        assert before is not None
        return shift(normed, before.of(normed, self.layer_idx, self.state_idx[name]))

    def _dropout(self, branch: Tensor) -> Tensor:
        return nn.functional.dropout(branch, p=self.hidden_dropout, training=self.training)


class DogePreTrainedModel(PreTrainedModel):
    """What `DogeModel` and `DogeForCausalLM` share: initialization, and what they tell transformers."""

    config_class = DogeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DogeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DogeDecoderLayer, "attentions": DogeInnerFuncAttn}

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Save as transformers does, with every Auto class pointed at the code that is saved beside the weights.

        transformers records only the class that is saved; `AutoModel` would then take its own `DogeConfig`, which
        has the same name, for this one.
        """
        classes = {"AutoModel": "modeling_doge.DogeModel", "AutoModelForCausalLM": "modeling_doge.DogeForCausalLM"}
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **classes}
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start the weights of one module; children come before their parents.

        `weight_init = "normal"`: matrices, embeddings and keys N(0, initializer_range). `"fan_in"`: matrices
        N(0, 1/√inputs), keys 1/√(their width), D 1/√e and U 1/√d. Keys never start at 0, so the first choice
        already spreads over all experts and all inner values, and the router has a gradient. E follows
        `inner_value_init`: its rows differ, since equal rows would cancel the straight-through gradient.
        """
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self._std(module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, DogeInnerFuncAttn):
            init.normal_(module.v_keys, std=self._std(module.v_keys.shape[1]))
            mean = 1.0 if self.config.inner_value_init == "identity" else 0.0
            init.normal_(module.v_embed.weight, mean=mean, std=INNER_VALUE_STD)
            if module.value_gains is not None:
                init.zeros_(module.value_gains)
        elif isinstance(module, DogeCDMoE):
            init.normal_(module.keys, std=self._std(module.keys.shape[2]))
            init.normal_(module.down_embed.weight, std=self._std(module.down_embed.embedding_dim))
            init.normal_(module.up_embed.weight, std=self._std(module.up_embed.embedding_dim))
        elif isinstance(module, TokenShift):
            init.copy_(module.shares, module.initial_shares())
        elif isinstance(module, DenseSkips):
            init.zeros_(module.gains)
        elif isinstance(module, DogeRotaryEmbedding):
            # Not in checkpoints, so they must be made again after loading onto the meta device.
            inv_freq, module.attention_scaling = module.initial_frequencies()
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)

    def _std(self, fan_in: int) -> float:
        return fan_in**-0.5 if self.config.weight_init == "fan_in" else self.config.initializer_range


class TokenEmbedding(nn.Embedding):
    """The rows of tokens, times a constant (`embedding_multiplier`).

    Args:
        num_embeddings, embedding_dim: as for `nn.Embedding`.
        embed_scale: the constant, by the name that PEFT looks for when it adds to the rows.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) to (B, T, d)."""
        x_BTd = super().forward(ids_BT)
        return x_BTd if self.embed_scale == 1 else x_BTd * self.embed_scale


class DenseSkips(nn.Module):
    """What a layer is given of the layers before it: x_l + Σ_{j<l} g_lj ⊙ x_j, with learned gains g_lj (d,) from 0.

    x_0 is the token's embedding and x_j the output of layer j - 1. DenseFormer (arXiv 2402.02622, section 3) has one
    number in the place of each g_lj. The gains are the model's and not its layers', as shards of a model are by layer.
    """

    def __init__(self, layers: int, size: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.empty(layers * (layers - 1) // 2, size))  # of layer 1, of layer 2, and so on

    def forward(self, outputs_BTd: Sequence[Tensor]) -> Tensor:
        """The input of the next layer, from x_0 to x_l, (B, T, d) each."""
        *earlier, x_BTd = outputs_BTd
        begin = len(earlier) * (len(earlier) - 1) // 2
        return add_with_gains(x_BTd, earlier, self.gains[begin : begin + len(earlier)])


class DogeModel(DogePreTrainedModel):
    """The decoder without a head: token ids to hidden states after the final norm."""

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        # No padding_idx: the pad token shares id 0 with <unk>, whose embedding must train.
        self.word_embed: nn.Embedding
        self.word_embed = TokenEmbedding(config.vocab_size, config.hidden_size, config.embedding_multiplier)
        self.rotary_emb = DogeRotaryEmbedding(config)
        self.layers = nn.ModuleList(DogeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.skips = None
        if config.dense_skips and config.num_hidden_layers > 1:
            self.skips = DenseSkips(config.num_hidden_layers, config.hidden_size)
        self.final_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding (transformers' name for it)."""
        return self.word_embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.word_embed = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, T) int64; or else `inputs_embeds`, (B, T, d).
            attention_mask: (B, S), 0 at padding; or a mask of the backend's own, (B, 1, T, S).
            position_ids: (B, T). Without `attention_mask` and cache, positions that start over mark the
                documents of a packed batch, and attention stays within them (with the backend `sdpa` without a
                T×T mask, but for compiled runs on a CPU).
            cu_seq_lens_q (in `kwargs`): where the documents of such a batch start in its B·T tokens, int32, then B·T
                up to a fixed size: what FlashAttention takes, on CUDA in half precision. Found here if not given.
            document_blocks (in `kwargs`): the fields of `DocumentBlocks` by name, for rows of a multiple of 128 tokens:
                by them compiled runs on CUDA in half precision attend fastest.
            past_key_values: keys (rotated) and values of earlier tokens; with shifts the newest inputs of layers too.
            use_cache: whether to return them for this call's tokens; `config.use_cache` if None.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BTd = self.word_embed(input_ids) if inputs_embeds is None else inputs_embeds
        # Made before the cache: transformers looks for packed documents only where there is none, and a cache
        # that is still empty must not let documents see each other.
        documents = None
        if attention_mask is None and position_ids is not None and past_key_values is None:
            given = kwargs.get("cu_seq_lens_q"), kwargs.get("document_blocks")
            documents = self._documents(x_BTd, position_ids, *given)
        mask = None
        if documents is None:
            mask = self._attention_mask(x_BTd, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        before = None
        if self.config.number_of_conv_states:
            before = self._tokens_before(x_BTd.shape[1], attention_mask, position_ids, past_key_values)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x_BTd.shape[1], device=x_BTd.device) + start).unsqueeze(0)
        position_embeddings = self.rotary_emb(x_BTd, position_ids)
        first_BTd, normed_BTd, outputs_BTd = None, None, []
        for layer, next_norm in zip(self.layers, self._next_norms(), strict=True):
            if self.skips is not None:
                outputs_BTd.append(x_BTd)
                x_BTd = self.skips(outputs_BTd)
            result = layer(
                x_BTd,
                first_BTd,  # by its place: what needs a gradient must be so where a checkpointed layer is reentrant
                normed=normed_BTd,
                next_norm=next_norm,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                documents=documents,
                before=before,
                **kwargs,
            )
            x_BTd, normed_BTd, given_BTd = result if isinstance(result, tuple) else (result, None, None)
            first_BTd = given_BTd if first_BTd is None else first_BTd
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(x_BTd), past_key_values=past_key_values)

    def _tokens_before(
        self, length: int, attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Cache | None
    ) -> TokensBefore:
        """What the shifts need.

        Raises:
            ValueError: for a cache that has keys and values alone.
        """
        if self._checkpoints():
            past_key_values = None  # as transformers has it: layers that run twice must not write twice
        if past_key_values is not None:
            keep_newest_inputs(past_key_values, self.config)
        seen_BT = seen_tokens(attention_mask, length, past_key_values)
        return TokensBefore(position_ids, seen_BT, past_key_values)

    def _next_norms(self) -> list[nn.Module | None]:
        """For each layer the first norm of the next one, if it may compute that; for the last layer None.

        Not with gradient checkpointing, which would keep the norm beside the sum, nor with skips, nor where a layer is
        watched or changed from outside: the norm must be of what the next layer is given.
        """
        norms: list[nn.Module | None] = [None] * len(self.layers)
        if PLAIN or self.skips is not None or self._checkpoints():
            return norms
        for index, (layer, following) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            if type(layer) is type(following) is DogeDecoderLayer and is_unwatched(layer) and is_unwatched(following):
                norms[index] = following.in_attn_layernorm
        return norms

    def _checkpoints(self) -> bool:
        """Whether layers run once more in the backward pass (gradient checkpointing)."""
        return any(layer.gradient_checkpointing and self.training for layer in self.layers)

    def _documents(self, x_BTd: Tensor, position_ids: Tensor, starts: object, blocks: object) -> Layout | None:
        """The documents of a packed batch for attention without a mask; None where the backend has its own way."""
        if self.config._attn_implementation != "sdpa":
            return None
        dtype = type_of_products(x_BTd)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        given_starts = starts if isinstance(starts, Tensor) else None
        given_blocks = DocumentBlocks(**blocks) if isinstance(blocks, dict) else None
        return document_layout(position_ids.expand(x_BTd.shape[:2]), dtype, head_dim, given_starts, given_blocks)

    def _attention_mask(
        self,
        x_BTd: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> object:
        """The mask of the backend in use; None where plain causal attention needs none.

        The plain case is decided here, not by transformers, which may write out a T×T mask under `torch.compile`
        (its `sdpa_mask` says so of PyTorch before 2.14): SDPA with a mask leaves the flash kernel.
        """
        plain = attention_mask is None and position_ids is None and past_key_values is None
        if plain and self.config._attn_implementation not in ("eager", "flex_attention"):
            return None
        return create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTd,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )


class DogeForCausalLM(DogePreTrainedModel, GenerationMixin):
    """Doge with a linear head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embed.weight"}

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.model = DogeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding (transformers' name for it)."""
        return self.model.word_embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.model.word_embed = value

    @staticmethod
    def create_masks_for_generate(
        config: DogeConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: object,
    ) -> object:
        """What `generate` makes for a static cache: the causal mask alone, though layers with shifts are "hybrid"."""
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of the last hidden states (…, d): (…, vocabulary), with `final_logit_softcapping`."""
        return cap_logits(self.lm_head(hidden), self.config.final_logit_softcapping or 0)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocabulary), and the loss where `labels` are given.

        Args:
            labels: (B, T), the tokens themselves, -100 where a token is no target; the model shifts them.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these positions.
            skip_logits: with `labels`, return the loss without logits, which then never exist for all tokens at once
                (`linear_cross_entropy`). What the trainer asks for: at 64K tokens they would take most of the memory.
            num_items_in_batch (in `kwargs`): divide the summed loss by it instead of by this batch's targets.

        The other arguments are those of `DogeModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = logits = None
        shifted = kwargs.get("shift_labels") is not None
        if skip_logits and labels is not None and not (shifted or PLAIN) and is_plain(self.lm_head):
            divisor = kwargs.get("num_items_in_batch")
            assert divisor is None or isinstance(divisor, Tensor | int | float)
            head, cap = self.lm_head.weight, self.config.final_logit_softcapping or 0
            loss = next_token_loss(outputs.last_hidden_state, head, labels, divisor, cap=cap)
        else:
            logits = self.logits(outputs.last_hidden_state[:, kept, :])
        if loss is None and labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def adds_and_norms(x_BTd: Tensor, branch_BTd: Tensor, norm: nn.Module) -> bool:
    """Whether `add_norm` takes its kernel."""
    return (
        kernels_take(x_BTd)
        and x_BTd.shape[:-1].numel() >= MERGE_MIN_TOKENS  # in decoding, its launch would take longer
        and is_plain(norm, nn.RMSNorm)
        and norm.eps is not None
        and x_BTd.shape[-1] <= MOST_FEATURES
        and torch.promote_types(x_BTd.dtype, branch_BTd.dtype) == x_BTd.dtype
    )


def add_norm(x_BTd: Tensor, branch_BTd: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + branch and its norm.

    From the kernel, the norm has the branch's type, in which what follows computes: under autocast, rounded here
    instead of there.
    """
    if adds_and_norms(x_BTd, branch_BTd, norm):
        assert isinstance(norm, nn.RMSNorm)
        assert norm.eps is not None
        x_Md, branch_Md = x_BTd.flatten(0, 1), branch_BTd.flatten(0, 1)
        sum_Md, normed_Md = fused_add_norm(x_Md, branch_Md, norm.weight, norm.eps)
        return sum_Md.view(x_BTd.shape), normed_Md.view(x_BTd.shape)
    x_BTd = x_BTd + branch_BTd
    return x_BTd, norm(x_BTd)


def add_with_gains(x_BTd: Tensor, others_BTd: Sequence[Tensor], gains: Iterable[Tensor]) -> Tensor:
    """x + Σ_j g_j ⊙ x_j, (B, T, d), with gains g_j (d,) of each of the others."""
    dtype = _at_least_float32(x_BTd)  # or each term would be one more rounding
    sum_BTd = x_BTd.to(dtype)
    for other_BTd, gains_d in zip(others_BTd, gains, strict=True):
        sum_BTd = torch.addcmul(sum_BTd, gains_d.to(dtype), other_BTd.to(dtype))
    return sum_BTd.to(x_BTd.dtype)


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody has hooked into a module or replaced its `forward`."""
    return "forward" not in vars(module) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a linear map, a norm or a table is no more than its weight, which may then be used in the module's place.

    With a bias, a hook, an adapter (LoRA) or a quantized weight, the module itself must be called.
    """
    return (
        type(module) is kind
        and getattr(module, "bias", None) is None
        and is_unwatched(module)
        and type(module.weight) is nn.Parameter
        and module.weight.is_floating_point()
    )


def whole_table(module: nn.Module, rows: int, device: torch.device) -> Tensor:
    """All rows of an embedding, (rows, width): its weight, or what it gives with an adapter (LoRA) or a hook."""
    if is_plain(module, nn.Embedding):
        assert isinstance(module.weight, Tensor)
        return module.weight
    return module(torch.arange(rows, device=device))


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


__all__ = ["DogeForCausalLM", "DogeModel", "DogePreTrainedModel"]
