"""Text generation for a batch of prompts: one pass over the prompts, then one step for each token.

The keys and values lie in transformers' `StaticCache`, and all that a step reads and writes in tensors that stay where
they are, so that on a GPU the whole step, with the choice of the token, can be one CUDA graph: the host starts it and
never waits for it, but to look for the end every few tokens. transformers' own `generate` with a static cache compiles
the forward pass as well, but makes positions and mask, chooses and appends with some fifty small kernels and the guards
of the compiled code for each token, which takes longer than the step of a small model.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    B  prompts                    S  columns: the slots of the cache
    T  tokens of the longest      V  vocabulary
    k  tokens to sample among     E  ids that end a row

A prompt shorter than T begins `padding` columns later, so that all end in the same column. Column c of a row is its
position c - padding, and it sees the columns from `padding` to c.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

SHORTEST_CACHE = 64
"""Caches have a power of two of slots, at least so many: few lengths to compile for."""

CHECK_EVERY = 16
"""Steps between two looks for the end of all rows, each of which waits for the GPU."""

# Their frequencies follow the length, which they read from the GPU in each step.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: stop after so many.
        temperature: of the softmax; 0 always takes the likeliest token.
        top_k: sample among the k likeliest; 0: all.
        top_p: sample among the likeliest that together have a probability of p.
        repetition_penalty: divides the positive logits of tokens that are in the row already, and multiplies the
            negative ones.
        seed: of the draws, the same on every device; None takes PyTorch's global generator on the CPU.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")


class Decoder:
    """Generates with a causal language model of full attention, Doge or another of transformers.

    The cache is kept: a later call with as many prompts that fits into it compiles and captures nothing.

    Args:
        model: in evaluation mode, on its device, with the attention `sdpa` or `eager`.
        compiled: run the decoding step through `torch.compile`. On a GPU that makes a step with fewer kernels, but
            takes half a minute for each batch size and cache length.
        graphs: on an NVIDIA GPU, run the step as a CUDA graph. Not yet tried on one, so `doge-lm generate` does not.

    Raises:
        ValueError: for an attention that takes no mask.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False, graphs: bool = False) -> None:
        attention = model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"the attention {attention!r} takes no mask; load the model with sdpa or eager")
        self._model = model
        rope = getattr(model.config, "rope_parameters", None) or {}
        self._fixed_frequencies = rope.get("rope_type", "default") not in _ROPE_BY_LENGTH
        self._logits = self._next_logits
        self._compiled = compiled and self._fixed_frequencies
        self._graphs = graphs and self._fixed_frequencies
        if self._compiled:
            self._logits = torch.compile(self._next_logits, fullgraph=True, dynamic=False)
        self._state: _State | None = None
        self._step: Callable[[], None] = _no_step

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt.

        Args:
            prompts: the ids of each, at least one.
            sampling: how tokens are chosen.
            eos_token_id: what ends a row; None: nothing does.
            on_tokens: is called with the B newest ids as soon as they are there, at the price of waiting for each.
                Rows that have ended get the id of padding.

        Returns:
            The new ids of each prompt, with the one that ended it.

        Raises:
            ValueError: for no prompt, an empty one, or more tokens than the model has positions.
        """
        state = self._prepared(prompts, sampling, _as_list(eos_token_id))
        begin = int(state.column) + 1
        self._prefill(state, begin)
        done = 1
        while True:
            if on_tokens is not None:
                on_tokens(state.tokens_BS[:, begin + done - 1].tolist())
            if done == sampling.max_new_tokens:
                break
            look = bool(state.ends) and (on_tokens is not None or done % CHECK_EVERY == 0)
            if look and bool(state.ended_B.all()):
                break
            self._step()
            done += 1
        rows = state.tokens_BS[:, begin : begin + done].tolist()
        return [_until_end(row, state.ends) for row in rows]

    def _prepared(self, prompts: Sequence[Sequence[int]], sampling: Sampling, ends: list[int]) -> "_State":
        """A state with the prompts in it, the last one's where it fits."""
        if not prompts or not all(prompts):
            raise ValueError("give at least one prompt, and at least one id in each")
        longest = max(map(len, prompts))
        needed, limit = longest + sampling.max_new_tokens, self._model.config.max_position_embeddings
        if needed > limit:
            raise ValueError(
                f"the longest prompt has {longest} tokens; with max_new_tokens {sampling.max_new_tokens} that is more "
                f"than the {limit} positions of the model (max_position_embeddings)"
            )
        old, batch = self._state, len(prompts)
        if old is None or old.tokens_BS.shape[0] != batch or old.tokens_BS.shape[1] < needed:
            slots = max(SHORTEST_CACHE, 1 << (needed - 1).bit_length())
            del old
            self._state, self._step = None, _no_step  # frees the old cache before there is a new one
            state = _State(self._model, batch, slots, sampling, ends)
            self._step = self._step_on(state)
        else:
            state = old
            if (state.rule, state.ends) != (_rule(sampling), ends):
                state.set_rule(sampling, ends)
                self._step = self._step_on(state)
        self._state = state
        state.begin(prompts, sampling)
        return state

    def _step_on(self, state: "_State") -> Callable[[], None]:
        """A decoding step on a state's own tensors, as a CUDA graph where wanted. What the tensors hold is lost."""

        def step() -> None:
            state.take(self._logits(*state.inputs(), state.cache))

        state.clear()
        if self._compiled:
            self._next_logits(*state.inputs(), state.cache)  # allocates the cache, which compiled code must not
            with torch._dynamo.config.patch(recompile_limit=64):  # one for each batch size and length is not too many
                step()
        if self._graphs and state.tokens_BS.is_cuda:
            return _captured(step, state.tokens_BS.device)
        return step

    def _next_logits(self, ids_B1: Tensor, mask_B11S: Tensor, positions_B1: Tensor, cache: StaticCache) -> Tensor:
        """The logits (B, V) after one more token, whose key and value go into the cache."""
        out = self._model(
            input_ids=ids_B1, attention_mask=mask_B11S, position_ids=positions_B1, past_key_values=cache, use_cache=True
        )
        return out.logits[:, -1].float()

    def _prefill(self, state: "_State", longest: int) -> None:
        """Run the prompts and take the first token of each.

        In a cache of its own, which grows: so the T queries see T keys, not all S slots, and without padding there is
        no mask, which lets SDPA take its flash kernel.
        """
        ids_BT = state.tokens_BS[:, :longest]
        padded = {}
        if bool(state.padding_B1.any()):
            columns_T = torch.arange(longest, device=ids_BT.device)
            positions_BT = columns_T - state.padding_B1
            padded = {"attention_mask": (positions_BT >= 0).long(), "position_ids": positions_BT.clamp(min=0)}
        out = self._model(input_ids=ids_BT, use_cache=True, logits_to_keep=1, **padded)
        for index, layer in enumerate(out.past_key_values.layers):
            state.cache.update(layer.keys, layer.values, index)
        state.take(out.logits[:, -1].float())


class _State:
    """The tensors that a step reads and writes; they stay where they are for as long as the state lives."""

    def __init__(self, model: PreTrainedModel, batch: int, slots: int, sampling: Sampling, ends: list[int]) -> None:
        device, vocabulary = model.device, model.get_output_embeddings().weight.shape[0]
        self.cache = StaticCache(config=model.config, max_cache_len=slots)
        self._mask_type = model.dtype
        self._pad = model.config.pad_token_id or 0
        self.tokens_BS = torch.zeros(batch, slots, dtype=torch.long, device=device)
        self.padding_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.ended_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self._columns_S = torch.arange(slots, device=device)
        self._draws_BS = torch.zeros(batch, slots, device=device)
        self._seen_BV = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        self.set_rule(sampling, ends)

    def set_rule(self, sampling: Sampling, ends: list[int]) -> None:
        """Choose by other settings; a captured step must be captured again."""
        self.rule, self.ends = _rule(sampling), ends
        self._ends_E = torch.tensor(ends, dtype=torch.long, device=self.tokens_BS.device)

    def clear(self) -> None:
        """Go back to the first column of an empty cache, in place."""
        self.cache.reset()
        self.column.zero_()
        self.ended_B.zero_()

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Put new prompts in, in place."""
        longest, device = max(map(len, prompts)), self.tokens_BS.device
        self.clear()
        self.column.fill_(longest - 1)
        padding = [longest - len(prompt) for prompt in prompts]
        self.padding_B1.copy_(torch.tensor(padding)[:, None])
        rows = [[self._pad] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        ids_BT = torch.tensor(rows, device=device)
        self.tokens_BS.fill_(self._pad)
        self.tokens_BS[:, :longest] = ids_BT
        if sampling.repetition_penalty != 1:
            # Padding would count as seen: in its place stands the last token, which is seen anyway.
            is_padding_BT = self._columns_S[:longest] < self.padding_B1
            self._seen_BV.zero_().scatter_(1, torch.where(is_padding_BT, ids_BT[:, -1:], ids_BT), True)
        if sampling.temperature > 0:
            generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
            draws = torch.rand(len(prompts), sampling.max_new_tokens, generator=generator)
            self._draws_BS[:, longest : longest + sampling.max_new_tokens] = draws.to(device)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The newest ids (B, 1), what they see as an additive mask (B, 1, 1, S), and their positions (B, 1)."""
        sees_BS = (self._columns_S >= self.padding_B1) & (self._columns_S <= self.column)
        mask_BS = torch.zeros(sees_BS.shape, dtype=self._mask_type, device=sees_BS.device)
        mask_BS.masked_fill_(~sees_BS, float("-inf"))
        return self.tokens_BS.index_select(1, self.column), mask_BS[:, None, None], self.column - self.padding_B1

    def take(self, logits_BV: Tensor) -> None:
        """Choose the next token of each row and move on by a column."""
        self.column.add_(1)
        seen_BV = self._seen_BV if self.rule.repetition_penalty != 1 else None
        chosen_B = choose(logits_BV, self._draws_BS.index_select(1, self.column), self.rule, seen_BV)
        if self.ends:
            chosen_B = chosen_B.masked_fill(self.ended_B, self._pad)
            self.ended_B.logical_or_((chosen_B[:, None] == self._ends_E).any(dim=-1))
        if seen_BV is not None:
            seen_BV.scatter_(1, chosen_B[:, None], True)
        self.tokens_BS.index_copy_(1, self.column, chosen_B[:, None])


def choose(logits_BV: Tensor, draws_B1: Tensor, rule: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """The next token of each row, (B,), int64.

    A token is drawn by the inverse of the distribution function, with one number a row: nothing that depends on the
    device or on how the step is run.

    Args:
        logits_BV: in float32 or better.
        draws_B1: uniform in [0, 1).
        rule: temperature, top_k, top_p and repetition_penalty, applied in the order of transformers: penalty,
            temperature, k, p.
        seen_BV: whether the token is in the row already; None: no penalty.
    """
    if seen_BV is not None:
        penalty = rule.repetition_penalty
        punished_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, punished_BV, logits_BV)
    if rule.temperature == 0:
        return logits_BV.argmax(dim=-1)
    vocabulary = logits_BV.shape[-1]
    best_Bk, ids_Bk = (logits_BV / rule.temperature).topk(min(rule.top_k or vocabulary, vocabulary))
    shares_Bk = best_Bk.softmax(dim=-1)
    if rule.top_p < 1:
        likelier_Bk = shares_Bk.cumsum(dim=-1) - shares_Bk
        likelier_Bk[:, 0] = 0  # the likeliest always stays
        shares_Bk = shares_Bk.masked_fill(likelier_Bk >= rule.top_p, 0)
    reached_Bk = shares_Bk.cumsum(dim=-1)
    place_B1 = (reached_Bk <= draws_B1 * reached_Bk[:, -1:]).sum(dim=-1, keepdim=True)
    # A draw next to 1 can round to the whole: the last that has a share takes it.
    place_B1 = torch.minimum(place_B1, (shares_Bk > 0).sum(dim=-1, keepdim=True) - 1)
    return ids_Bk.gather(1, place_B1)[:, 0]


def _no_step() -> None:
    raise AssertionError("there is no state to step on")


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step as a CUDA graph. Its tensors must stay where they are; what they hold is lost."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what libraries set up at the first call must not be captured
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def _rule(sampling: Sampling) -> Sampling:
    """What of the settings a captured step depends on; the number of tokens and the seed it does not."""
    return Sampling(
        1, sampling.temperature, sampling.top_k, sampling.top_p, repetition_penalty=sampling.repetition_penalty
    )


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    for index, token in enumerate(row):
        if token in ends:
            return row[: index + 1]
    return row
