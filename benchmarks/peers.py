"""Models that Doge is measured beside, built from a Doge's configuration so that they fit the project's trainer.

    dense             the same Doge, each CDMoE replaced by d → d_cross → d with the activation between
    llama             a Llama of the same depth and parameters, with the mask that transformers makes
    llama_fair        a Llama of the same depth and about the same parameters, at its best settings
    published         the published mathematics in plain PyTorch, written for reading and not for speed
    transformers_doge the `doge` of transformers with its experts, of about the same parameters

The last three have no `final_logit_softcapping` and say so where it is set.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    B  batch            h  attention heads          e  expert size      n, m  rows of the two key tables
    T  tokens, as keys  f  features of a head, d/h  H  expert heads     N     experts, n·m
       too: TT          M  tokens as one, B·T       k  experts per head
    d  hidden size
"""

import copy
from typing import Any

import torch
from quality import build_llama, llama_attention, llama_like
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.doge.configuration_doge import DogeConfig as TransformersDogeConfig
from transformers.models.doge.modeling_doge import DogeForCausalLM as TransformersDoge

from doge_lm.errors import UserError
from doge_lm.model.cdmoe import key_table_sizes
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.training.plan import EXPERT_TABLES, count_model
from doge_lm.training.pretrain import build_model as build_doge
from doge_lm.training.settings import TrainSettings

# Matrix products are fastest where their sizes are multiples of this.
_ALIGNMENT = 64


def refuse_a_cap(config: DogeConfig, peer: str) -> None:
    """Raises UserError if the logits are to be capped, which this peer cannot do."""
    if config.final_logit_softcapping is not None:
        raise UserError(
            f"{peer} has no final_logit_softcapping; measure without it: --set final_logit_softcapping=null"
        )


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> int:
    """Forward and backward operations for one token, counted for any of the models as `ModelCounts` does for Doge.

    6 for every weight that takes part in a matrix product for this token (of the experts only those it chooses; no
    look-ups, norms, gains or biases), and 6·L·T·d for causal attention.
    """
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up = embeddings - multiplied  # a tied embedding is multiplied as the head's matrix
    config = model.config
    weights = 0
    for name, parameter in model.named_parameters():
        if name.endswith(EXPERT_TABLES):
            weights += _chosen_experts(config) * parameter.shape[1]
        elif parameter.dim() > 1 and id(parameter) not in looked_up and not name.endswith("gains"):
            weights += parameter.numel()
    return 6 * weights + 6 * config.num_hidden_layers * sequence_length * config.hidden_size


def _chosen_experts(config: Any) -> int:
    if isinstance(config, DogeConfig):
        return min(config.num_cdmmoe_heads * config.num_cdmmoe_experts_per_head, config.num_cdmmoe_experts)
    return config.num_experts_per_tok


# The same Doge with a dense MLP


class DenseMLP(nn.Module):
    """W_down σ(W_up x), with the hidden width of the part of a CDMoE that all domains share."""

    def __init__(self, config: DogeConfig):
        super().__init__()
        d, width = config.hidden_size, config.cross_domain_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        self.up_proj = nn.Linear(d, width, bias=config.hidden_bias)
        self.down_proj = nn.Linear(width, d, bias=config.hidden_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


def build_dense(config: DogeConfig, train: TrainSettings) -> PreTrainedModel:
    """A Doge whose feed-forwards are `DenseMLP`, its matrices started by Doge's rule."""
    model = build_doge(config, train)
    for layer in model.model.layers:
        layer.feed_forward = DenseMLP(config)
        for linear in (layer.feed_forward.up_proj, layer.feed_forward.down_proj):
            model._init_weights(linear)
    return model


# Llama


def build_llama_as_given(config: DogeConfig, train: TrainSettings) -> PreTrainedModel:
    """The Llama of `quality.build_llama` with the mask that transformers makes: T×T under `torch.compile`."""
    model = build_llama(config, train)
    model.set_attn_implementation(train.attn_implementation)
    return model


def build_llama_fair(config: DogeConfig, train: TrainSettings) -> PreTrainedModel:
    """The Llama of `quality.llama_like` at its best: a well aligned MLP, and SDPA's causal attention without a mask."""
    refuse_a_cap(config, "llama_fair")
    sizes = llama_like(config)
    sizes.intermediate_size = max(1, round(sizes.intermediate_size / _ALIGNMENT)) * _ALIGNMENT
    return LlamaForCausalLM._from_config(sizes, attn_implementation=llama_attention(train), dtype=torch.float32)


# transformers' own Doge


def transformers_doge_like(config: DogeConfig) -> TransformersDogeConfig:
    """The configuration of transformers' `doge` with as many experts, its MLP as wide as gives equal parameters."""
    sizes = TransformersDogeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=_ALIGNMENT,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        tie_word_embeddings=config.tie_word_embeddings,
        is_moe=True,
        num_experts=config.num_cdmmoe_experts,
        num_experts_per_tok=config.num_cdmmoe_heads * config.num_cdmmoe_experts_per_head,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    with torch.device("meta"):
        narrow = sum(parameter.numel() for parameter in TransformersDoge(sizes).parameters())
    unit = 3 * config.hidden_size * config.num_hidden_layers * _ALIGNMENT
    sizes.intermediate_size = max(1, 1 + round((count_model(config).total - narrow) / unit)) * _ALIGNMENT
    return sizes


def build_transformers_doge(config: DogeConfig, train: TrainSettings) -> PreTrainedModel:
    """transformers' `doge` with experts, started by its own rule."""
    refuse_a_cap(config, "transformers_doge")
    return TransformersDoge._from_config(
        transformers_doge_like(config), attn_implementation=train.attn_implementation, dtype=torch.float32
    )


# The published mathematics


class PublishedNorm(nn.Module):
    """x / √(mean x² + ε), times a weight, computed in float32 or better."""

    def __init__(self, config: DogeConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) to (…, d)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)


class PublishedAttention(nn.Module):
    """W_o softmax(q kᵀ/√f + mask) v with the scores written out; v = x ⊙ E[argmax s], s = K_v (W_s x).

    The choice is the bare argmax, so W_s and K_v get no gradient.
    """

    def __init__(self, config: DogeConfig):
        super().__init__()
        d, bias = config.hidden_size, config.hidden_bias
        n, r = config.num_inner_values, config.inner_values_retrieval_size
        self.head_dim = d // config.num_attention_heads
        self.q_proj = nn.Linear(d, d, bias=bias)
        self.k_proj = nn.Linear(d, d, bias=bias)
        self.v_queries = nn.Linear(d, r, bias=bias)
        self.v_keys = nn.Parameter(torch.empty(n, r))
        self.v_embed = nn.Embedding(n, d)
        self.o_proj = nn.Linear(d, d, bias=bias)

    def forward(self, x_BTd: Tensor, cos_BTf: Tensor, sin_BTf: Tensor, mask_BTT: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d); cosine, sine and the additive mask may have a batch of 1."""
        query_BhTf = self._rotate(self._heads(self.q_proj(x_BTd)), cos_BTf, sin_BTf)
        key_BhTf = self._rotate(self._heads(self.k_proj(x_BTd)), cos_BTf, sin_BTf)
        choice_BT = (self.v_queries(x_BTd) @ self.v_keys.T).argmax(-1)
        value_BhTf = self._heads(x_BTd * self.v_embed(choice_BT)).to(query_BhTf.dtype)
        scores_BhTT = query_BhTf @ key_BhTf.transpose(2, 3) * self.head_dim**-0.5
        scores_BhTT = scores_BhTT + mask_BTT.unsqueeze(1).to(scores_BhTT.dtype)
        wide = torch.promote_types(scores_BhTT.dtype, torch.float32)
        weights_BhTT = scores_BhTT.softmax(-1, dtype=wide).to(query_BhTf.dtype)
        return self.o_proj((weights_BhTT @ value_BhTf).transpose(1, 2).flatten(2))

    def _heads(self, x_BTd: Tensor) -> Tensor:
        return x_BTd.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    @staticmethod
    def _rotate(x_BhTf: Tensor, cos_BTf: Tensor, sin_BTf: Tensor) -> Tensor:
        first, second = x_BhTf.chunk(2, -1)
        turned_BhTf = torch.cat((-second, first), -1)
        return (x_BhTf * cos_BTf.unsqueeze(1) + turned_BhTf * sin_BTf.unsqueeze(1)).to(x_BhTf.dtype)


class PublishedCDMoE(nn.Module):
    """c = W_down σ(W_up x); the k best of all N sums of key scores; y = Σ σ(w · (c·D_expert)) U_expert.

    The rows of D and U are gathered by plain indexing.
    """

    def __init__(self, config: DogeConfig):
        super().__init__()
        d, e, bias = config.hidden_size, config.private_expert_intermediate_size, config.hidden_bias
        self.heads, self.k = config.num_cdmmoe_heads, config.num_cdmmoe_experts_per_head
        self.n, m = key_table_sizes(config.num_cdmmoe_experts)
        self.act_fn = ACT2FN[config.hidden_act]
        self.shared_up_proj = nn.Linear(d, config.cross_domain_intermediate_size, bias=bias)
        self.shared_down_proj = nn.Linear(config.cross_domain_intermediate_size, e, bias=bias)
        self.queries = nn.Linear(e, self.heads * e, bias=bias)
        self.keys = nn.Parameter(torch.empty(self.heads, self.n + m, e // 2))
        self.down_embed = nn.Embedding(config.num_cdmmoe_experts, e)
        self.up_embed = nn.Embedding(config.num_cdmmoe_experts, d)

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        c_Me = self.shared_down_proj(self.act_fn(self.shared_up_proj(x_BTd))).flatten(0, 1)
        first_MHe, second_MHe = self.queries(c_Me).unflatten(-1, (self.heads, -1)).chunk(2, -1)
        first_MHn = torch.einsum("mhe,hne->mhn", first_MHe, self.keys[:, : self.n])
        second_MHm = torch.einsum("mhe,hne->mhn", second_MHe, self.keys[:, self.n :])
        wide = torch.promote_types(c_Me.dtype, torch.float32)
        scores_MHN = (first_MHn.to(wide).unsqueeze(-1) + second_MHm.to(wide).unsqueeze(-2)).flatten(-2)
        best_MHk, experts_MHk = scores_MHN.topk(self.k, -1)
        inner_MHk = torch.einsum("me,mhke->mhk", c_Me, self.down_embed.weight[experts_MHk])
        hidden_MHk = self.act_fn(best_MHk.softmax(-1) * inner_MHk)
        y_Md = torch.einsum("mhk,mhkd->md", hidden_MHk, self.up_embed.weight[experts_MHk])
        return y_Md.view_as(x_BTd)


class PublishedLayer(nn.Module):
    """x += attn(norm(x)); x += feed_forward(norm(x)), with dropout on both branches."""

    def __init__(self, config: DogeConfig):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.in_attn_layernorm = PublishedNorm(config)
        self.attn = PublishedAttention(config)
        self.in_ff_layernorm = PublishedNorm(config)
        self.feed_forward = PublishedCDMoE(config)

    def forward(self, x_BTd: Tensor, *attention: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d); the others are those of `PublishedAttention.forward`."""
        branch = self.attn(self.in_attn_layernorm(x_BTd), *attention)
        x_BTd = x_BTd + nn.functional.dropout(branch, self.dropout, self.training)
        branch = self.feed_forward(self.in_ff_layernorm(x_BTd))
        return x_BTd + nn.functional.dropout(branch, self.dropout, self.training)


class PublishedDecoder(nn.Module):
    """Token ids to hidden states after the final norm."""

    def __init__(self, config: DogeConfig):
        super().__init__()
        rope: dict[str, Any] = config.rope_parameters or {}
        if rope["rope_type"] != "default":
            raise ValueError(f"rope_parameters: rope_type is {rope['rope_type']!r}; the published model has `default`")
        self.theta, self.head_dim = rope["rope_theta"], config.hidden_size // config.num_attention_heads
        self.word_embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PublishedLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = PublishedNorm(config)

    def forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """(B, T) to (B, T, d). Where positions (B or 1, T) start over at 0, attention does not look back."""
        x_BTd = self.word_embed(ids_BT)
        steps = torch.arange(0, self.head_dim, 2, device=x_BTd.device, dtype=torch.float32)
        angles = positions_BT[..., None] * self.theta ** -(steps / self.head_dim)
        angles_BTf = torch.cat((angles, angles), -1)
        documents_BT = (positions_BT == 0).cumsum(-1)
        hidden_BTT = (documents_BT[:, :, None] != documents_BT[:, None, :]).logical_or(
            torch.ones(2 * ids_BT.shape[1:], dtype=torch.bool, device=x_BTd.device).triu(1)
        )
        mask_BTT = torch.zeros_like(hidden_BTT, dtype=x_BTd.dtype).masked_fill(hidden_BTT, torch.finfo(x_BTd.dtype).min)
        for layer in self.layers:
            x_BTd = layer(x_BTd, angles_BTf.cos(), angles_BTf.sin(), mask_BTT)
        return self.final_layernorm(x_BTd)


class PublishedForCausalLM(PreTrainedModel):
    """The published mathematics with the parameters, and the names, of `DogeForCausalLM`.

    What is mended of the published code, so that results are the same: keys are rotated as queries are, key tables
    are rectangular and reach every expert, and there is no constant `dynamic_mask`.
    """

    config_class = DogeConfig
    _tied_weights_keys = {"lm_head.weight": "model.word_embed.weight"}

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.model = PublishedDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding (transformers' name for it)."""
        return self.model.word_embed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every weight N(0, initializer_range), norms 1."""
        for parameter in module.parameters(recurse=False):
            if isinstance(module, PublishedNorm):
                init.ones_(parameter)
            else:
                init.normal_(parameter, std=self.config.initializer_range)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocabulary), and the loss where `labels` are given; the model shifts them."""
        for name in ("cu_seq_lens_q", "document_blocks"):  # say what the positions say
            kwargs.pop(name, None)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        logits = self.lm_head(self.model(input_ids, position_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def build_published(config: DogeConfig, train: TrainSettings) -> PreTrainedModel:
    """The published mathematics, started from the weights of a fresh Doge."""
    refuse_a_cap(config, "published")
    weights = build_doge(config, train).state_dict()
    # A copy: the name of the attention is kept in the configuration, and this model has its own.
    model = PublishedForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
    model.load_state_dict(weights)
    return model
