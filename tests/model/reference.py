"""The whole Doge model once more, written to be obviously right rather than fast.

Everything here follows the description of the architecture alone and shares no code with `doge_lm`: one token, one
head, one expert at a time, in float64. It takes a state dict under the public names of the parameters, so it also
states what each of them means. The operations are torch's only so that gradients can be had from it.

Letters: B batch, T tokens, d hidden size, h attention heads, n inner values, e expert size, N experts, H expert
heads, k experts per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def silu(x: Tensor) -> Tensor:
    """x · 1/(1 + exp(-x))."""
    return x / (1 + torch.exp(-x))


def softmax(scores: list[Tensor]) -> list[Tensor]:
    """Softmax of a list of scalars."""
    highest = max(float(score.detach()) for score in scores)
    exponentials = [torch.exp(score - highest) for score in scores]
    total = sum(exponentials[1:], start=exponentials[0])
    return [exponential / total for exponential in exponentials]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps), scaled by `weight`; x is one vector."""
    return x / torch.sqrt((x * x).sum() / x.numel() + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of one head of one token: component i turns in the plane of (i, i + half)."""
    half = x.numel() // 2
    first = [x[i] * cos[i] - x[i + half] * sin[i] for i in range(half)]
    second = [x[i + half] * cos[i + half] + x[i] * sin[i + half] for i in range(half)]
    return torch.stack(first + second)


def rope_tables(position_ids: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cos and sin in float64, (B, T, d_h), of plain RoPE, with frequency theta^(-2i/d_h) for the pair (i, i + half)."""
    half = head_size // 2
    frequencies = [theta ** (-2 * i / head_size) for i in range(half)]
    angles = torch.tensor(
        [
            [[float(position) * f for f in frequencies + frequencies] for position in row]
            for row in position_ids.tolist()
        ],
        dtype=torch.float64,
    )
    return angles.cos(), angles.sin()


def brute_force_route(query: Tensor, keys: Tensor, n1: int, k: int) -> tuple[list[Tensor], list[int]]:
    """Route one token of one expert head over **all** N experts.

    `query` holds both halves, each as wide as `keys` (n1+n2, width). Returns the k weights and the k experts, best
    first.
    """
    half = query.numel() // 2
    n2 = keys.shape[0] - n1
    scores: list[Tensor] = []
    for i in range(n1):
        for j in range(n2):
            scores.append((query[:half] * keys[i]).sum() + (query[half:] * keys[n1 + j]).sum())
    best = sorted(range(n1 * n2), key=lambda expert: float(scores[expert].detach()), reverse=True)[:k]
    return softmax([scores[expert] for expert in best]), best


def experts_output(
    c: Tensor, weights: list[Tensor], experts: list[int], down_embed: Tensor, up_embed: Tensor, act: Activation
) -> Tensor:
    """Sum over the chosen experts of act(w · (c · D_expert)) U_expert, for one token; c is (e), the result (d)."""
    y = torch.zeros(up_embed.shape[1], dtype=c.dtype)
    for weight, expert in zip(weights, experts, strict=True):
        y = y + act(weight * (c * down_embed[expert]).sum()) * up_embed[expert]
    return y


def cdmoe(
    c: Tensor, queries: Tensor, keys: Tensor, n1: int, k: int, down_embed: Tensor, up_embed: Tensor, act: Activation
) -> Tensor:
    """Routing and experts for all tokens and heads: c (M, e), queries (M, H, e), keys (H, n1+n2, e/2) to (M, d)."""
    rows = []
    for m in range(c.shape[0]):
        y = torch.zeros(up_embed.shape[1], dtype=c.dtype)
        for head in range(keys.shape[0]):
            weights, experts = brute_force_route(queries[m, head], keys[head], n1, k)
            y = y + experts_output(c[m], weights, experts, down_embed, up_embed, act)
        rows.append(y)
    return torch.stack(rows)


@dataclass
class Sizes:
    """What the shapes of the parameters do not tell."""

    attention_heads: int
    first_key_table: int
    experts_per_head: int
    parallel_experts: bool = False
    embedding_multiplier: float = 1.0
    final_logit_softcapping: float | None = None


@dataclass
class Output:
    """What one run of the reference found."""

    logits: Tensor
    """(B, T, vocabulary); rows of padding are zero."""
    inner_values: list[list[list[int]]] = field(default_factory=list)
    """Chosen inner value by layer, row and token (-1 at padding)."""
    attentions: list[Tensor] = field(default_factory=list)
    """(B, h, T, T) by layer."""


class Reference:
    """The causal language model over a state dict with the public names."""

    def __init__(self, state: Mapping[str, Tensor], sizes: Sizes, act: Activation = silu) -> None:
        self.state = {
            name: tensor if tensor.dtype == torch.float64 else tensor.to(torch.float64)
            for name, tensor in state.items()
        }
        self.sizes = sizes
        self.act = act
        self.num_layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))

    def linear(self, name: str, x: Tensor) -> Tensor:
        """W x (+ b) of one vector."""
        weight = self.state[f"{name}.weight"]
        y = torch.stack([(row * x).sum() for row in weight])
        bias = self.state.get(f"{name}.bias")
        return y if bias is None else y + bias

    def inner_value(self, prefix: str, x: Tensor, first: Tensor) -> tuple[Tensor, int]:
        """x ⊙ E[argmax s] of one token, and the index chosen; (x + g ⊙ first) ⊙ E where the model has gains g.

        The forward value is the hard choice. The added zero `soft - soft.detach()` carries the straight-through
        gradient: that of Σ softmax(s)_i (x ⊙ E_i) with everything but s held constant.
        """
        query = self.linear(f"{prefix}.v_queries", x)
        scores = [(row * query).sum() for row in self.state[f"{prefix}.v_keys"]]
        table = self.state[f"{prefix}.v_embed.weight"]
        chosen = max(range(len(scores)), key=lambda i: float(scores[i].detach()))
        shares = softmax(scores)
        gains = self.state.get(f"{prefix}.value_gains")
        if gains is not None:
            x = x + gains * first
        soft = torch.zeros_like(x)
        for share, row in zip(shares, table, strict=True):
            soft = soft + share * (x * row).detach()
        return x * table[chosen] + (soft - soft.detach()), chosen

    def attention(
        self,
        prefix: str,
        tokens: list[Tensor],
        cos: Tensor,
        sin: Tensor,
        visible: list[list[int]],
        first: list[Tensor],
    ) -> tuple[list[Tensor], list[int], Tensor]:
        """Inner Function Attention over one row; `visible[t]` lists the positions that t sees (none for padding)."""
        heads = self.sizes.attention_heads
        size = tokens[0].numel() // heads
        queries = [self.linear(f"{prefix}.q_proj", x) for x in tokens]
        keys = [self.linear(f"{prefix}.k_proj", x) for x in tokens]
        values, choices = zip(*map(partial(self.inner_value, prefix), tokens, first), strict=True)
        keys = self.shifted(f"{prefix}.k_shift", keys, visible)
        queries = [self.normed_heads(f"{prefix}.q_norm", x, size) for x in queries]
        keys = [self.normed_heads(f"{prefix}.k_norm", x, size) for x in keys]
        shares = torch.zeros(heads, len(tokens), len(tokens), dtype=torch.float64)
        outputs = []
        for t in range(len(tokens)):
            if not visible[t]:
                outputs.append(torch.zeros_like(tokens[t]))
                continue
            mixed = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                query = rotate(queries[t][part], cos[t], sin[t])
                scores = [(query * rotate(keys[s][part], cos[s], sin[s])).sum() / math.sqrt(size) for s in visible[t]]
                head_output = torch.zeros(size, dtype=torch.float64)
                for share, s in zip(softmax(scores), visible[t], strict=True):
                    head_output = head_output + share * values[s][part]
                    shares[head, t, s] = share.detach()
                mixed.append(head_output)
            outputs.append(self.linear(f"{prefix}.o_proj", torch.cat(mixed)))
        return outputs, list(choices), shares

    def shifted(self, name: str, tokens: list[Tensor], visible: list[list[int]]) -> list[Tensor]:
        """x_t + s ⊙ (x_{t-1} - x_t), where the model has shares s; 0 where the token before is not seen."""
        shares = self.state.get(f"{name}.shares")
        if shares is None:
            return tokens
        mixed = []
        for t, x in enumerate(tokens):
            before = tokens[t - 1] if t - 1 in visible[t] else torch.zeros_like(x)
            mixed.append((1 - shares) * x + shares * before)
        return mixed

    def with_skips(self, layer: int, outputs: list[list[Tensor]]) -> list[Tensor]:
        """Σ_{j<=l} g_lj ⊙ x_lj for each token, with g_ll = 1, where the model has gains; `outputs[j]` are the x_j."""
        if "model.skips.gains" not in self.state:
            return outputs[layer]
        summed = outputs[layer]
        for j in range(layer):
            gains = self.state["model.skips.gains"][sum(range(layer)) + j]
            summed = [x + gains * y for x, y in zip(summed, outputs[j], strict=True)]
        return summed

    def normed_heads(self, name: str, x: Tensor, size: int) -> Tensor:
        """The RMSNorm of each head of one token, where the model has it."""
        if f"{name}.weight" not in self.state:
            return x
        heads = [x[start : start + size] for start in range(0, x.numel(), size)]
        return torch.cat([rms_norm(head, self.state[f"{name}.weight"]) for head in heads])

    def shared(self, prefix: str, x: Tensor) -> Tensor:
        """What all domains share, of one token."""
        up = self.linear(f"{prefix}.shared_up_proj", x)
        if f"{prefix}.shared_gate_proj.weight" in self.state:
            return self.linear(
                f"{prefix}.shared_down_proj", self.act(self.linear(f"{prefix}.shared_gate_proj", x)) * up
            )
        return self.linear(f"{prefix}.shared_down_proj", self.act(up))

    def feed_forward(self, prefix: str, x: Tensor) -> Tensor:
        """CDMoE of one token."""
        c = self.shared(prefix, x)
        if f"{prefix}.keys" not in self.state:
            return c
        return c + self.experts(prefix, x) if self.sizes.parallel_experts else self.experts(prefix, c)

    def experts(self, prefix: str, c: Tensor) -> Tensor:
        """What the experts make of their input, for one token. Without queries both key tables score all of it."""
        down_embed = self.state[f"{prefix}.down_embed.weight"]
        up_embed = self.state[f"{prefix}.up_embed.weight"]
        keys = self.state[f"{prefix}.keys"]
        expert_size = down_embed.shape[1]
        if f"{prefix}.queries.weight" in self.state:
            query = self.linear(f"{prefix}.queries", c)
            queries = [query[head * expert_size : (head + 1) * expert_size] for head in range(keys.shape[0])]
        else:
            queries = [torch.cat((c, c))] * keys.shape[0]
        return cdmoe(
            c[None],
            torch.stack(queries)[None],
            keys,
            self.sizes.first_key_table,
            self.sizes.experts_per_head,
            down_embed,
            up_embed,
            self.act,
        )[0]

    def row(self, ids: list[int], cos: Tensor, sin: Tensor, visible: list[list[int]]) -> tuple[list[Tensor], Output]:
        """One row of the batch: its logits, token by token, and what was chosen on the way."""
        tokens = [self.sizes.embedding_multiplier * self.state["model.word_embed.weight"][token] for token in ids]
        found = Output(torch.empty(0))
        outputs_before: list[list[Tensor]] = []
        first: list[Tensor] = []
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            outputs_before.append(tokens)
            tokens = self.with_skips(layer, outputs_before)
            norm = self.state[f"{prefix}.in_attn_layernorm.weight"]
            inputs = self.shifted(f"{prefix}.attn_shift", [rms_norm(x, norm) for x in tokens], visible)
            first = first or inputs
            attended, choices, shares = self.attention(f"{prefix}.attn", inputs, cos, sin, visible, first)
            tokens = [x + y for x, y in zip(tokens, attended, strict=True)]
            norm = self.state[f"{prefix}.in_ff_layernorm.weight"]
            inputs = self.shifted(f"{prefix}.ff_shift", [rms_norm(x, norm) for x in tokens], visible)
            outputs = [self.feed_forward(f"{prefix}.feed_forward", x) for x in inputs]
            tokens = [x + y for x, y in zip(tokens, outputs, strict=True)]
            found.inner_values.append([[choice if visible[t] else -1 for t, choice in enumerate(choices)]])
            found.attentions.append(shares)
        norm = self.state["model.final_layernorm.weight"]
        logits = [self.linear("lm_head", rms_norm(x, norm)) for x in tokens]
        if cap := self.sizes.final_logit_softcapping:
            logits = [cap * (1 - 2 / (torch.exp(2 * x / cap) + 1)) for x in logits]
        return logits, found

    def run(self, input_ids: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None) -> Output:
        """Logits of a batch (B, T), with cos and sin (B, T, d_h) or (1, T, d_h); mask 1 = a real token."""
        batch, length = input_ids.shape
        cos, sin = (table.to(torch.float64).expand(batch, -1, -1) for table in (cos, sin))
        rows, found = [], []
        for b in range(batch):
            real = [True] * length if attention_mask is None else [bool(flag) for flag in attention_mask[b].tolist()]
            visible = [[s for s in range(t + 1) if real[s]] if real[t] else [] for t in range(length)]
            logits, row_found = self.row(input_ids[b].tolist(), cos[b], sin[b], visible)
            rows.append(torch.stack([x if real[t] else torch.zeros_like(x) for t, x in enumerate(logits)]))
            found.append(row_found)
        return Output(
            logits=torch.stack(rows),
            inner_values=[[f.inner_values[layer][0] for f in found] for layer in range(self.num_layers)],
            attentions=[torch.stack([f.attentions[layer] for f in found]) for layer in range(self.num_layers)],
        )


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p(label of t+1 | logits of t) over the labels that are not -100; logits (B, T, V), labels (B, T)."""
    losses = []
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            target = int(labels[b, t + 1])
            if target != -100:
                row = logits[b, t]
                losses.append(torch.log(torch.exp(row - row.max()).sum()) + row.max() - row[target])
    return torch.stack(losses).mean()
