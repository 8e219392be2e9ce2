"""The next token of each row, where every row has settings of its own.

The rule is that of `decoding.choose`: penalties, temperature, the k likeliest, the likeliest that together have a
probability of p, and one draw through the inverse of the distribution function. There, tokens stand in the order of
their probability; where neither k nor p asks for it, in the order of their ids, for to sort a vocabulary takes longer
than a step. What a row gets depends on nothing but the row.

Shapes: B rows, V vocabulary, k the tokens that are looked at.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-6
"""Below it, the likeliest token is taken: logits over less would overflow."""

SHORTLIST = 256
"""The likeliest tokens are sorted first; all are only where a draw falls behind these."""


@dataclass(frozen=True)
class Rule:
    """How a text's next token is chosen.

    Args:
        temperature: of the softmax; 0 always takes the likeliest token.
        top_k: sample among the k likeliest; 0: all.
        top_p: sample among the likeliest that together have a probability of p.
        repetition_penalty: divides the positive logits of tokens that are in the prompt or the answer already, and
            multiplies the negative ones.
        presence_penalty: is subtracted from the logits of tokens that are in the answer already.
        frequency_penalty: is subtracted as often as they are.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass
class Chooser:
    """The choice of the tokens of one text: its rule, its own draws, and what it has written.

    Args:
        rule: how tokens are chosen.
        prompt: its ids.
        seed: of the draws; None: another one each time.
    """

    rule: Rule
    prompt: Sequence[int]
    seed: int | None = None
    written: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._generator = torch.Generator()
        if self.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.seed)
        self._in_prompt = set(self.prompt) if self.rule.repetition_penalty != 1 else set()

    @property
    def is_greedy(self) -> bool:
        """Whether no draw is needed."""
        return self.rule.temperature < MIN_TEMPERATURE

    def draw(self) -> float:
        """The next number in [0, 1)."""
        return float(torch.rand(1, generator=self._generator))

    def punish(self, logits_V: Tensor) -> None:
        """Apply the penalties in place."""
        rule = self.rule
        if rule.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._in_prompt | self.written.keys()), device=logits_V.device)
            found = logits_V[seen]
            logits_V[seen] = torch.where(found > 0, found / rule.repetition_penalty, found * rule.repetition_penalty)
        if self.written and (rule.presence_penalty or rule.frequency_penalty):
            ids = torch.tensor(list(self.written), device=logits_V.device)
            counts = torch.tensor(list(self.written.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[ids] -= rule.presence_penalty + rule.frequency_penalty * counts


def choose_each(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each row, which is added to what its text has written.

    Args:
        logits_BV: in float32 or better; penalties are applied in place.
        choosers: of the rows.
    """
    for logits_V, chooser in zip(logits_BV, choosers, strict=True):
        chooser.punish(logits_V)
    drawn = [row for row, chooser in enumerate(choosers) if not chooser.is_greedy]
    chosen = [0] * len(choosers)
    if len(drawn) < len(choosers):
        chosen = logits_BV.argmax(dim=-1).tolist()
    if drawn:
        rows_BV = logits_BV if len(drawn) == len(choosers) else logits_BV[torch.tensor(drawn, device=logits_BV.device)]
        for row, token in zip(drawn, _draw_each(rows_BV, [choosers[row] for row in drawn]), strict=True):
            chosen[row] = token
    for chooser, token in zip(choosers, chosen, strict=True):
        chooser.written[token] += 1
    return chosen


def _draw_each(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    rules = [chooser.rule for chooser in choosers]
    draws_B = logits_BV.new_tensor([chooser.draw() for chooser in choosers])
    scaled_BV = logits_BV / logits_BV.new_tensor([rule.temperature for rule in rules])[:, None]
    totals_B = scaled_BV.logsumexp(dim=-1)
    sorts = [rule.top_p < 1 or 0 < rule.top_k < logits_BV.shape[-1] for rule in rules]
    chosen = [0] * len(rules)
    for is_sorted, draw in ((False, _draw_by_id), (True, _draw_by_share)):
        rows = [row for row, sort in enumerate(sorts) if sort == is_sorted]
        if rows:
            of_rows = (scaled_BV, totals_B, draws_B)
            if len(rows) < len(rules):
                index = torch.tensor(rows, device=logits_BV.device)
                of_rows = (scaled_BV[index], totals_B[index], draws_B[index])
            for row, token in zip(rows, draw(*of_rows, [rules[row] for row in rows]), strict=True):
                chosen[row] = token
    return chosen


def _draw_by_id(scaled_BV: Tensor, totals_B: Tensor, draws_B: Tensor, _: Sequence[Rule]) -> list[int]:
    """One of all tokens for each row."""
    reached_BV = (scaled_BV - totals_B[:, None]).exp().cumsum(dim=-1, dtype=torch.float64)
    sums_B1 = reached_BV[:, -1:].contiguous()
    places_B1 = torch.searchsorted(reached_BV, draws_B[:, None] * sums_B1, right=True)
    last_B1 = torch.searchsorted(reached_BV, sums_B1)  # that has a share: it takes a draw that rounds to the whole
    return torch.minimum(places_B1, last_B1).clamp(max=scaled_BV.shape[-1] - 1)[:, 0].tolist()


def _draw_by_share(scaled_BV: Tensor, totals_B: Tensor, draws_B: Tensor, rules: Sequence[Rule]) -> list[int]:
    """One of the likeliest tokens for each row."""
    ps = scaled_BV.new_tensor([rule.top_p for rule in rules])
    vocabulary = scaled_BV.shape[-1]
    ks = torch.tensor([rule.top_k or vocabulary for rule in rules], device=scaled_BV.device)
    chosen_B, found_B = _draw(scaled_BV, totals_B, ks, ps, draws_B, min(SHORTLIST, vocabulary))
    chosen = chosen_B.tolist()
    for row in (~found_B).nonzero().flatten().tolist():
        # One by one: rows that need it are few, and each sorts the whole vocabulary.
        one = slice(row, row + 1)
        chosen[row] = int(_draw(scaled_BV[one], totals_B[one], ks[one], ps[one], draws_B[one], vocabulary)[0])
    return chosen


def _draw(
    scaled_BV: Tensor, totals_B: Tensor, ks: Tensor, ps: Tensor, draws: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The token of each row (B,), drawn among the `width` likeliest, and whether these were enough (B,)."""
    best_Bk, ids_Bk = scaled_BV.topk(width)
    shares_Bk = (best_Bk - totals_B[:, None]).exp()
    vocabulary = scaled_BV.shape[-1]
    in_k_Bk = torch.arange(width, device=ks.device) < ks[:, None]
    shares_Bk = shares_Bk.masked_fill(~in_k_Bk, 0)
    has_all_k = (ks <= width) | (width == vocabulary)
    of_k_B = torch.where(has_all_k, shares_Bk.sum(dim=-1), 1)  # p and the draw are shares of the k likeliest
    shares_Bk = shares_Bk / of_k_B[:, None]
    reached_Bk = shares_Bk.cumsum(dim=-1)
    likelier_Bk = reached_Bk - shares_Bk
    likelier_Bk[:, 0] = 0  # the likeliest always stays
    all_p = ps >= 1
    kept_Bk = shares_Bk.masked_fill((likelier_Bk >= ps[:, None]) & ~all_p[:, None], 0)
    reached_Bk = kept_Bk.cumsum(dim=-1)
    has_all_p = ~all_p & (reached_Bk[:, -1] >= ps)
    complete = has_all_k | has_all_p
    sums_B = torch.where(complete, reached_Bk[:, -1], 1)
    place_B = (reached_Bk <= (draws * sums_B)[:, None]).sum(dim=-1)
    # A draw next to 1 can round to the whole: the last that has a share takes it. Of no numbers, the first.
    last_B = ((kept_Bk > 0).sum(dim=-1) - 1).clamp(min=0)
    found = complete | (all_p & (place_B < width))
    found &= has_all_k | (ks >= vocabulary)  # else even the shares are not known yet
    return ids_Bk.gather(1, torch.minimum(place_B, last_B)[:, None])[:, 0], found
