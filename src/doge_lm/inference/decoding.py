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

import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from itertools import chain
from math import inf
from threading import Lock
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    StaticLayer,
)

from ..data.tokenizer import known_max_length
from ..model.modeling_doge import DogeCDMoE, DogeInnerFuncAttn, DogePreTrainedModel

_Foldable: TypeAlias = DogeInnerFuncAttn | DogeCDMoE
_FOLDABLE = (DogeInnerFuncAttn, DogeCDMoE)

SHORTEST_CACHE = 64
"""Caches have a power of two of slots, at least so many: few lengths to compile for."""

CHECK_EVERY = 16
"""Steps between two looks for the end of all rows, each of which waits for the GPU."""

# Their frequencies follow the length, which they read from the GPU in each step.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


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
        TypeError: for a value of another kind.
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            kind, wanted = (int | float, "a number") if isinstance(default, float) else (int, "a whole number")
            if value is not default and (isinstance(value, bool) or not isinstance(value, kind)):
                raise TypeError(f"{field.name} is {value!r}; it must be {wanted}")
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature == 0 or 1e-6 <= self.temperature < inf, "0, or a number of at least 1e-6"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (1e-6 <= self.repetition_penalty < inf, "a number of at least 1e-6"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")


class Decoder:
    """Generates with a causal language model of full attention, Doge or another of transformers.

    The cache is kept: a later call with as many prompts that fits into it compiles and captures nothing. Weights may
    change in place between two calls. Where they have moved (another device or type, a parameter replaced), the next
    call notices and begins anew.

    Args:
        model: on its device, with the attention `sdpa` or `eager`. It decodes in evaluation mode, and goes back into
            its own after each call. What its modules do must stay as it is: of hooks that come later, a captured step
            sees those alone that forbid a product of weights (on the projections of queries and keys, and on the
            experts' queries).
        compiled: run the decoding step through `torch.compile`. On a GPU that makes a step with fewer kernels, but
            takes half a minute for each batch size and cache length. Neither this nor `graphs` is done where the
            frequencies of the positions follow the length (`dynamic`, `longrope`).
        graphs: run the step as a CUDA graph where all of the model is on one NVIDIA GPU. A step that makes the host
            wait cannot be captured: it runs plainly, with a warning.

    Raises:
        TypeError: for what is no model.
        ValueError: for an attention that takes no mask, for a model with other layers than full attention or without a
            head for tokens, and for one that counts its positions itself.
    """

    _state: "_State | None"
    _step: Callable[[], object]
    _ground: tuple[Any, ...]

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False, graphs: bool = True) -> None:
        refuse_other_models(model)
        self._model = model
        self._free = Lock()
        fixed_frequencies = not rope_follows_length(model)
        self._logits = self._next_logits
        self._compiled = compiled and fixed_frequencies
        self._graphs = graphs and fixed_frequencies
        if self._compiled:
            self._logits = torch.compile(self._next_logits, fullgraph=True, dynamic=False)
        self._forget()

    @torch.no_grad()
    def generate(
        self,
        prompts: Iterable[Iterable[SupportsIndex]],
        sampling: Sampling,
        *,
        eos_token_id: SupportsIndex | Iterable[SupportsIndex] | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt.

        Args:
            prompts: the ids of each, at least one, in lists, arrays or tensors.
            sampling: how tokens are chosen.
            eos_token_id: what ends a row; None: nothing does.
            on_tokens: is called with the B newest ids as soon as they are there, at the price of waiting for each.
                Rows that have ended get the id of padding, or 0 where the model has none.

        Returns:
            The new ids of each prompt, with the one that ended it.

        Raises:
            TypeError: for prompts, settings or ends of another kind.
            ValueError: for no prompt, an empty one, an id that the model lacks, or more tokens than it has positions.
            RuntimeError: if it is called while it works, from `on_tokens` or another thread.
        """
        if not self._free.acquire(blocking=False):
            raise RuntimeError("this decoder is at work; it has one cache, so use one decoder a thread")
        try:
            with _evaluating(self._model):
                state = self._prepared(_as_rows(prompts), sampling, _as_list(eos_token_id))
                with _lent(state.folded):
                    return self._run(state, sampling, on_tokens)
        finally:
            self._free.release()

    def _run(
        self, state: "_State", sampling: Sampling, on_tokens: Callable[[list[int]], None] | None
    ) -> list[list[int]]:
        """Prefill and steps of `generate`."""
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

    def _prepared(self, prompts: list[list[int]], sampling: Sampling, ends: list[int]) -> "_State":
        """A state with the prompts in it, the last one's where it fits."""
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling is {sampling!r}; it must be a Sampling, e.g. Sampling(max_new_tokens=20)")
        if not prompts or not all(prompts):
            raise ValueError("give at least one prompt, and at least one id in each")
        vocabulary = _vocabulary(self._model)
        if min(map(min, prompts)) < 0 or max(map(max, prompts)) >= vocabulary:
            raise ValueError(
                f"the ids of the prompts must be at least 0 and below {vocabulary}, the model's vocabulary"
            )
        longest = max(map(len, prompts))
        needed, limit = longest + sampling.max_new_tokens, position_limit(self._model)
        if needed > limit:
            raise ValueError(
                f"the longest prompt has {longest} tokens; with max_new_tokens {sampling.max_new_tokens} that is more "
                f"than the {limit} positions of the model (max_position_embeddings)"
            )
        ground, batch = _ground(self._model), len(prompts)
        state = self._state
        fits = state is not None and ground == self._ground and state.holds(batch, needed)
        if state is None or not fits or (state.rule, state.ends) != (_rule(sampling), ends):
            self._forget()  # frees the old cache before there is a new one; and what fails below leaves nothing behind
            if state is not None and fits:
                state.set_rule(sampling, ends)
            else:
                del state
                slots = max(SHORTEST_CACHE, 1 << (needed - 1).bit_length())
                state = _State(self._model, batch, slots, sampling, ends)
            with _lent(state.folded):
                self._step = self._step_on(state)
            self._state, self._ground = state, ground
        state.begin(prompts, sampling)
        return state

    def _forget(self) -> None:
        """Free the state and the step on it."""
        self._state, self._step, self._ground = None, _no_step, ()

    def _step_on(self, state: "_State") -> Callable[[], object]:
        """A decoding step on a state's own tensors, as a CUDA graph where wanted. What the tensors hold is lost."""

        def step() -> None:
            state.take(self._logits(*state.inputs(), state.cache))

        state.clear()
        if self._compiled:
            self._next_logits(*state.inputs(), state.cache)  # allocates the cache, which compiled code must not
            with torch._dynamo.config.patch(recompile_limit=64):  # one for each batch size and length is not too many
                step()
        if self._graphs and _is_on_one_gpu(self._model):
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
        state.fill(out.past_key_values)
        state.take(out.logits[:, -1].float())


class _Columns(StaticLayer):
    """The keys and values of one layer, written where the step is: no layer has to count for itself."""

    column: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take those of one token, (B, heads, 1, features), and return those of all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.column.to(self.device), key_states)
        self.values.index_copy_(2, self.column.to(self.device), value_states)
        return self.keys, self.values

    def fill(self, prompts: CacheLayerMixin) -> None:
        """Take those of the first columns."""
        if not self.is_initialized:
            self.lazy_initialization(prompts.keys, prompts.values)
        length = prompts.keys.shape[2]
        self.keys[:, :, :length] = prompts.keys
        self.values[:, :, :length] = prompts.values


class _ShiftingColumns(_Columns, LinearAttentionAndStaticFullAttentionLayer):
    """The same for a Doge with shifts, with the newest inputs."""

    def fill(self, prompts: LinearAttentionAndFullAttentionLayer) -> None:
        """Take the newest inputs too."""
        super().fill(prompts)
        for index, newest_Bd1 in prompts.conv_states.items():
            if not self.is_conv_states_initialized[index]:
                self.lazy_initialization(conv_states=newest_Bd1, state_idx=index)
            self.conv_states[index].copy_(newest_Bd1)
            self.has_previous_state[index] = True


def _columns_of(layer: StaticLayer, slots: int, column: Tensor) -> _Columns:
    """Such a layer in the place of one of transformers'."""
    if isinstance(layer, LinearAttentionAndStaticFullAttentionLayer):
        columns: _Columns = _ShiftingColumns(slots, number_of_states=layer.number_of_states)
    else:
        columns = _Columns(slots)
    columns.column = column
    return columns


class _State:
    """The tensors that a step reads and writes; they stay where they are for as long as the state lives."""

    def __init__(self, model: PreTrainedModel, batch: int, slots: int, sampling: Sampling, ends: list[int]) -> None:
        device, vocabulary = model.device, _vocabulary(model)
        self.cache = StaticCache(config=model.config, max_cache_len=slots)
        self._mask_type = model.dtype
        pad = getattr(_text_config(model), "pad_token_id", None)
        self._pad = pad if pad is not None and 0 <= pad < vocabulary else 0  # some give -1, or an id they lack
        self.tokens_BS = torch.zeros(batch, slots, dtype=torch.long, device=device)
        self.padding_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.ended_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self.cache.layers = [_columns_of(layer, slots, self.column) for layer in self.cache.layers]
        self.folded: dict[_Foldable, Tensor] = {
            module: module.fold()
            for module in model.modules()
            if isinstance(module, _FOLDABLE) and module.is_foldable()
        }
        self._columns_S = torch.arange(slots, device=device)
        self._draws_BS = torch.zeros(batch, slots, device=device)
        self._seen_BV = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        self.set_rule(sampling, ends)

    def set_rule(self, sampling: Sampling, ends: list[int]) -> None:
        """Choose by other settings; a captured step must be captured again."""
        self.rule, self.ends = _rule(sampling), ends
        self._ends_E = torch.tensor(ends, dtype=torch.long, device=self.tokens_BS.device)

    def holds(self, batch: int, slots: int) -> bool:
        """Whether it is for so many rows, and long enough, but not so long that attention over it would be slow."""
        rows, length = self.tokens_BS.shape
        return rows == batch and slots <= length <= max(SHORTEST_CACHE, 8 * slots)

    def clear(self) -> None:
        """Go back to the first column of an empty cache, in place."""
        self.cache.reset()
        self.column.zero_()
        self.ended_B.zero_()

    def begin(self, prompts: list[list[int]], sampling: Sampling) -> None:
        """Put new prompts in, in place."""
        longest, device = max(map(len, prompts)), self.tokens_BS.device
        self.clear()
        self.column.fill_(longest - 1)
        padding = [longest - len(prompt) for prompt in prompts]
        self.padding_B1.copy_(torch.tensor(padding)[:, None])
        rows = [[self._pad] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
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

    def fill(self, prompts: Cache) -> None:
        """Take what the cache of the prompts holds."""
        for layer, filled in zip(self.cache.layers, prompts.layers, strict=True):
            layer.fill(filled)

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
    place_B1 = torch.minimum(place_B1, (shares_Bk > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # of no numbers: 0
    return ids_Bk.gather(1, place_B1)[:, 0]


@contextmanager
def _lent(folded: "dict[_Foldable, Tensor]") -> Iterator[None]:
    """Lend Doge's modules the products of their weights, so that a step need not make them or go without.

    They are made anew, in the same places: weights may have changed in place, but the addresses in a captured step
    must stay.
    """
    before = {module: module.folded for module in folded}
    try:
        for module, product in folded.items():
            module.folded = product.copy_(module.fold())
        yield
    finally:
        for module, product_before in before.items():
            module.folded = product_before


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Keep dropout out, and leave each module in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _no_step() -> None:
    raise AssertionError("there is no state to step on")


def position_limit(model: PreTrainedModel) -> float:
    """How many tokens a model can see at once: infinity where it does not say, or says -1."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    return inf if limit is None or limit < 0 else limit


def trained_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """How many tokens the sequences had that a model was trained on, as its tokenizer says (`model_max_length`).

    Beyond them a model has learned nothing, whatever positions it has. Where the tokenizer does not say, it is the
    positions; infinity without either.
    """
    known = known_max_length(tokenizer)
    return min(position_limit(model), inf if known is None else known)


def _text_config(model: PreTrainedModel) -> Any:
    """The configuration of the part that makes text, where a model has several."""
    return model.config.get_text_config(decoder=True)


def _vocabulary(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    rows = getattr(head, "out_features", None)  # a weight of few bits may be packed into another shape
    return head.weight.shape[0] if rows is None else rows


def refuse_other_models(model: PreTrainedModel) -> None:
    """Raises TypeError for no model, and ValueError for what the mask or the cache of a decoder does not fit."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"the model is {model!r:.80}; it must be a loaded model, or the one within a wrapper")
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"the attention {attention!r} takes no mask; load the model with sdpa or eager")
    kinds = {type(layer) for layer in StaticCache(config=model.config, max_cache_len=SHORTEST_CACHE).layers}
    # Elsewhere a layer that keeps more than keys and values may not know of padding, or of where it is.
    known = LinearAttentionAndStaticFullAttentionLayer if isinstance(model, DogePreTrainedModel) else StaticLayer
    if model.config.is_encoder_decoder or kinds not in ({StaticLayer}, {known}):
        raise ValueError(
            "the model has an encoder, or layers that are not full attention (a sliding window, a recurrence); "
            "use its own generate"
        )
    takes = inspect.signature(type(model).forward).parameters  # that of the instance may be wrapped
    if getattr(_text_config(model), "alibi", False) or not {"position_ids", "past_key_values"} <= set(takes):
        raise ValueError(
            "the model counts its positions itself (as with alibi), which padding and a static cache "
            "would shift; use its own generate"
        )
    if model.get_output_embeddings() is None:
        raise ValueError("the model has no head for tokens; load it as a causal language model")


def rope_follows_length(model: PreTrainedModel) -> bool:
    """Whether the frequencies of the positions follow the longest text of a batch (`dynamic`, `longrope`)."""
    return bool(_rope_types(_text_config(model)) & _ROPE_BY_LENGTH)


def _rope_types(config: Any) -> set[str]:
    """The scaling types of the positions; some models have one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in rope.values() if isinstance(value, dict)]
    return {parameters.get("rope_type", "default") for parameters in by_kind or [rope]}


def _tensors(model: PreTrainedModel) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _ground(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a state and a step on it stand on: where it differs, both must be made anew.

    A captured step reads weights from their addresses. A cache has the type that autocast gave it, and tensors made
    in inference mode cannot be written outside.
    """
    device = model.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    places = tuple((tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in _tensors(model))
    # Hooks, and modules that were replaced by others on the same weights.
    foldable = tuple(module.is_foldable() for module in model.modules() if isinstance(module, _FOLDABLE))
    return autocast, torch.is_inference_mode_enabled(), model.device, foldable, places


def _is_on_one_gpu(model: PreTrainedModel) -> bool:
    """Whether all of a model is on one NVIDIA GPU."""
    devices = {tensor.device for tensor in _tensors(model)}
    return torch.version.cuda is not None and len(devices) == 1 and devices.pop().type == "cuda"


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """A step as a CUDA graph, or the step itself where it makes the host wait.

    Its tensors must stay where they are; what they hold is lost.
    """
    aside = _side_stream(device)
    # The inner stream context puts the stream back, which a capture that fails does not.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)), _no_cached_casts():
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what libraries set up at the first call must not be captured
            for _ in range(3):
                step()
            waits = _makes_host_wait(step)
        torch.cuda.current_stream().wait_stream(aside)
        if waits:
            warnings.warn("the decoding step makes the host wait, so it is not run as a CUDA graph", stacklevel=2)
            return step
        graph = torch.cuda.CUDAGraph()
        # The workspaces of cuBLAS must be of the graph's own memory: others may be freed while the graph lives.
        torch._C._cuda_clearCublasWorkspaces()
        # thread_local: what other threads of a server do meanwhile is no error.
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            step()
        torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: each stream that computes keeps memory of its own."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Let autocast keep no converted weights, which would be freed while a captured step still reads them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _makes_host_wait(step: Callable[[], None]) -> bool:
    """Run a step and say whether it waits for the GPU.

    Found here, since a capture that fails leaves PyTorch's generator and allocator in the middle of it.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is new
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(before)
    return False


def _rule(sampling: Sampling) -> Sampling:
    """What of the settings a captured step depends on; the number of tokens and the seed it does not."""
    return Sampling(
        1, sampling.temperature, sampling.top_k, sampling.top_p, repetition_penalty=sampling.repetition_penalty
    )


def _as_rows(prompts: Iterable[Iterable[SupportsIndex]]) -> list[list[int]]:
    try:
        return [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise TypeError(
            f"prompts must be lists of ids, one for each text, with the texts tokenized: {error}"
        ) from error


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    is_one = isinstance(ids, int) or getattr(ids, "ndim", 1) == 0
    try:
        return [operator.index(token) for token in ([ids] if is_one else ids)]
    except TypeError as error:
        raise TypeError(f"eos_token_id is {ids!r}; it must be an id, a list of ids, or None") from error


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    for index, token in enumerate(row):
        if token in ends:
            return row[: index + 1]
    return row
