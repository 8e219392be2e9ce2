"""A model with a cache of fixed slots: texts come and go, each in a slot of its own, and a step serves all.

Unlike the padded batch of `Decoder`, rows are at different places: the token at position p of a text has its key and
value in column p of its slot, so there is no padding, and a row sees the columns up to its own position.

**A text does not depend on its company.** Its prompt is run alone, in pieces that begin at multiples of `CHUNK`. In a
step, the number of rows and of columns is a multiple of `ROWS` and `COLUMNS`: PyTorch's matrix products on a CPU round
one row differently from several, but all multiples of 8 the same. That is tried with each model when it is loaded;
where it does not hold, each step takes all rows. What else could round by the size of the batch is fixed: attention is
`eager` (the threads of PyTorch's fused kernel round differently from each other), and experts are computed in one way
for any number of rows.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    B  slots, or the first so many of them    S  columns of the cache, or the first so many
    T  tokens of a piece of a prompt          V  vocabulary
    h  attention heads                        f  features of a head
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import LinearAttentionAndStaticFullAttentionLayer, StaticLayer

from ..model.modeling_doge import DogeCDMoE, DogeInnerFuncAttn
from .decoding import refuse_other_models, rope_follows_length

CHUNK = 256
"""Tokens of a prompt that are run at once. Between two pieces, texts that are under way get their next token."""

ROWS = 8
"""The rows of a step are a multiple of it."""

COLUMNS = 64
"""The columns that a step looks at are a multiple of it."""


class Slots:
    """A model and the keys and values of up to `count` texts of up to `columns` tokens.

    The model is the slots' own from here on: its attention may be set to another backend, and products of its weights
    are made once, so weights must not change.

    Args:
        model: on its device, in evaluation mode.
        count: texts at once.
        columns: the longest text, prompt and answer together.

    Raises:
        ValueError: for a model that a static cache does not fit, or whose positions scale by the length of the
            longest text of a batch.
        torch.OutOfMemoryError: if the cache does not fit on the GPU.
    """

    def __init__(self, model: PreTrainedModel, count: int, columns: int) -> None:
        refuse_other_models(model)
        if rope_follows_length(model):
            raise ValueError(
                "the model scales its positions by the longest text of a batch (dynamic or longrope), so that texts "
                "would depend on each other"
            )
        self.model = model
        self.count, self.columns = count, columns
        self.device = model.device
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self._rows = -(-count // ROWS) * ROWS
        self._width = -(-columns // COLUMNS) * COLUMNS
        self._place = _Place()
        self._cache = StaticCache(config=model.config, max_cache_len=self._width)
        sizes = self._rows, self._width, self._place
        self._cache.layers = [_slot_layer(layer, *sizes) for layer in self._cache.layers]
        self._experts = [module for module in model.modules() if isinstance(module, DogeCDMoE)]
        self._paths = [module.path for module in self._experts]
        if self.device.type == "cpu":
            model.set_attn_implementation("eager")
        self._fold()
        self._warm_up()
        self._fewer_rows = self._bits_agree(columns=False)
        self.texts_are_independent = (self._fewer_rows or self._bits_agree(columns=False)) and self._bits_agree(
            columns=True
        )
        """Whether, as tried, a text gets the same bits in any company."""

    @torch.inference_mode()
    def read(self, slot: int, begin: int, ids: Sequence[int], *, last: bool) -> Tensor | None:
        """Run a piece of a prompt, whose first token has position `begin`.

        Returns:
            With `last`, the logits (V,) after it, in float32 or better.
        """
        end = begin + len(ids)
        self._place.of_piece(slot, begin, end)
        positions_T = torch.arange(begin, end, device=self.device)
        sees_TS = torch.arange(end, device=self.device) <= positions_T[:, None]
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            attention_mask=self._additive(sees_TS)[None, None],
            position_ids=positions_T[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _at_least_float32(out.logits[0, -1]) if last else None

    @torch.inference_mode()
    def step(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Run one token in each of the first slots.

        Args:
            ids: the token of each of the first slots; any where a slot has none to run.
            positions: for each slot, how long what is in it is, which is the position of its token. Slots without a
                token too: something is written there, behind what they hold.

        Returns:
            Logits (B, V) of the tokens in float32 or better.
        """
        wanted = len(ids)
        rows = -(-wanted // ROWS) * ROWS if self._fewer_rows else self._rows
        padded = [*positions[:rows], *[0] * (rows - len(positions))]
        columns = -(-(max(padded) + 1) // COLUMNS) * COLUMNS
        positions_B = torch.tensor(padded, device=self.device)
        self._place.of_step(positions_B, columns)
        sees_BS = torch.arange(columns, device=self.device) <= positions_B[:, None]
        ids_B1 = torch.tensor([*ids, *[0] * (rows - wanted)], device=self.device)[:, None]
        try:
            self._set_paths(stepping=True)
            out = self.model(
                input_ids=ids_B1,
                attention_mask=self._additive(sees_BS)[:, None, None],
                position_ids=positions_B[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        finally:
            self._set_paths(stepping=False)
        return _at_least_float32(out.logits[:wanted, -1])

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of a slot to another, and empty the first."""
        for layer in self._layers():
            layer.move(source, target, length)
        self.clear(source, length)

    @torch.inference_mode()
    def clear(self, slot: int, length: int) -> None:
        """Empty the first `length` columns of a slot: what is no number would reach later texts through the mask."""
        for layer in self._layers():
            layer.clear(slot, length)

    def _layers(self) -> list["_SlotLayer"]:
        return self._cache.layers

    def _additive(self, sees: Tensor) -> Tensor:
        mask = torch.zeros(sees.shape, dtype=self.model.dtype, device=self.device)
        return mask.masked_fill_(~sees, float("-inf"))

    def _set_paths(self, *, stepping: bool) -> None:
        """On a CPU, "auto" chooses by the number of rows: not in steps."""
        if self.device.type != "cpu":
            return
        for module, path in zip(self._experts, self._paths, strict=True):
            module.path = "gather" if stepping and path == "auto" else path

    @torch.inference_mode()
    def _fold(self) -> None:
        for module in self.model.modules():
            if isinstance(module, DogeInnerFuncAttn | DogeCDMoE) and module.is_foldable():
                module.folded = module.fold()

    def _warm_up(self) -> None:
        """Make the cache, of the model's type and size; memory for it is taken here."""
        self._fewer_rows = True
        self.read(0, 0, [0], last=True)
        self.clear(0, 1)

    def _bits_agree(self, *, columns: bool) -> bool:
        """Whether rows keep their bits in steps of fewer rows and in other places, or in steps of more columns."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (self._rows,), generator=generator).tolist()
        places = [place % min(COLUMNS, self.columns) for place in range(self._rows)]
        whole = self._step_on_empty(ids, places)
        if columns:
            far = [*places[:-1], self.columns - 1]
            return bool((self._step_on_empty(ids, far)[:-1] == whole[:-1]).all())
        fewer = range(ROWS, self._rows, ROWS)
        same = all(bool((self._step_on_empty(ids[:rows], places[:rows]) == whole[:rows]).all()) for rows in fewer)
        return same and bool((self._step_on_empty(ids[::-1], places[::-1]).flip(0) == whole).all())

    @torch.inference_mode()
    def _step_on_empty(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """A step on an empty cache, which is empty again after it."""
        logits = self.step(ids, places)
        for layer in self._layers():
            for slot in range(self._rows):  # those without a token too
                layer.clear(slot, places[slot] + 1 if slot < len(places) else 1)
        return logits


class _Place:
    """Where the layers write what the model computes next, and what they show it."""

    def of_piece(self, slot: int, begin: int, end: int) -> None:
        self.rows: slice | Tensor = slice(slot, slot + 1)
        self.columns: slice | Tensor = slice(begin, end)
        self.shown = slice(slot, slot + 1), end

    def of_step(self, positions_B: Tensor, columns: int) -> None:
        self.rows = torch.arange(len(positions_B), device=positions_B.device)
        self.columns = positions_B
        self.shown = slice(0, len(positions_B)), columns


class _SlotLayer(StaticLayer):
    """The keys and values of one layer, (B, h, S, f) each."""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, rows: int, width: int, place: _Place) -> None:
        StaticLayer.__init__(self, width)
        self._shape = rows, width
        self._place = place

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take those of a piece, (1, h, T, f), or of a step, (B, h, 1, f); return those that it may see."""
        if not self.is_initialized:
            self.keys, self.values = (self._empty(states) for states in (key_states, value_states))
            self.is_initialized = True
        place = self._place
        rows, columns = place.shown
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(place.columns, slice):
                kept[place.rows, :, place.columns] = states
            else:
                kept[place.rows, :, place.columns] = states[:, :, 0]
        return self.keys[rows, :, :columns], self.values[rows, :, :columns]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of a slot to another."""
        for kept in (self.keys, self.values):
            kept[target, :, :length] = kept[source, :, :length]

    def clear(self, slot: int, length: int) -> None:
        """Empty the first `length` columns of a slot."""
        for kept in (self.keys, self.values):
            kept[slot, :, :length].zero_()

    def _empty(self, states: Tensor) -> Tensor:
        rows, width = self._shape
        return states.new_zeros(rows, states.shape[1], width, states.shape[3])


class _ShiftingSlotLayer(_SlotLayer, LinearAttentionAndStaticFullAttentionLayer):
    """The same for a Doge with shifts, with the two newest inputs of each slot: of even and of odd positions.

    A step writes something behind what is in a slot also where it has no token to run, and that must not take the place
    of the newest input.
    """

    def __init__(self, rows: int, width: int, place: _Place, number_of_states: int) -> None:
        LinearAttentionAndStaticFullAttentionLayer.__init__(self, width, number_of_states)
        _SlotLayer.__init__(self, rows, width, place)
        self._inputs: dict[int, Tensor] = {}

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: object
    ) -> Tensor:
        """Take the inputs of a piece, (1, d, T), or of a step, (B, d, 1); return them behind the one before them."""
        if state_idx not in self._inputs:
            self._inputs[state_idx] = conv_states.new_zeros(self._shape[0], 2, conv_states.shape[1])
        inputs_B2d, place = self._inputs[state_idx], self._place
        if isinstance(place.columns, slice):
            begin, end = place.columns.start, place.columns.stop
            before_Bd = inputs_B2d[place.rows, (begin - 1) % 2].clone()
            inputs_B2d[place.rows, (end - 1) % 2] = conv_states[..., -1]
        else:
            before_Bd = inputs_B2d[place.rows, (place.columns - 1) % 2]
            inputs_B2d[place.rows, place.columns % 2] = conv_states[..., 0]
        return torch.cat((before_Bd[..., None], conv_states), dim=-1)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the newest inputs too."""
        super().move(source, target, length)
        for inputs_B2d in self._inputs.values():
            inputs_B2d[target] = inputs_B2d[source]

    def clear(self, slot: int, length: int) -> None:
        """Forget the newest inputs too."""
        super().clear(slot, length)
        for inputs_B2d in self._inputs.values():
            inputs_B2d[slot].zero_()


def _slot_layer(layer: StaticLayer, rows: int, width: int, place: _Place) -> _SlotLayer:
    """Such a layer in the place of one of transformers'."""
    if isinstance(layer, LinearAttentionAndStaticFullAttentionLayer):
        return _ShiftingSlotLayer(rows, width, place, layer.number_of_states)
    return _SlotLayer(rows, width, place)


@torch.no_grad()
def bytes_of_token(model: PreTrainedModel) -> int:
    """The memory that the keys and values of one token take."""
    out = model(input_ids=torch.tensor([[0]], device=model.device), use_cache=True)
    return sum(kept.nbytes for layer in out.past_key_values.layers for kept in (layer.keys, layer.values))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
