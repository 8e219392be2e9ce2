"""`choose_each`: rows of different rules, against the decoder's rule row by row, and against the rules' definitions."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from doge_lm.inference import sampling
from doge_lm.inference.decoding import Sampling, choose
from doge_lm.inference.sampling import Chooser, Rule, choose_each

VOCABULARY = 700  # more than the shortlist

RULES = [
    Rule(temperature=0.0),
    Rule(),
    Rule(temperature=0.7),
    Rule(temperature=2.0),
    Rule(temperature=1.3, top_k=5),
    Rule(temperature=1.3, top_k=500),
    Rule(temperature=1.3, top_k=500, top_p=0.7),
    Rule(temperature=1.0, top_p=0.8),
    Rule(temperature=2.0, top_p=0.999),
    Rule(temperature=1.2, top_k=12, top_p=0.6, repetition_penalty=1.7),
    Rule(temperature=0.0, repetition_penalty=1.7),
    Rule(temperature=1.0, repetition_penalty=0.5),
    Rule(temperature=2.0, top_k=1),
    Rule(temperature=2.0, top_p=1e-9),
    Rule(temperature=1e-6),
]


def logits_of(rows: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_each_row_is_chosen_by_its_own_rule(scale: float) -> None:
    """As by `decoding.choose`, alone, with the same draw; flat logits make draws that fall behind the shortlist.

    Without k and p, tokens stand in the order of their ids.
    """
    prompt = list(range(40))
    # Equal logits would leave the order of the tokens open.
    logits = logits_of(len(RULES), scale) + 1e-9 * torch.arange(VOCABULARY)
    for round_ in range(60):
        choosers = [Chooser(rule, prompt, seed=100 * round_ + row) for row, rule in enumerate(RULES)]
        found = choose_each(logits.clone(), choosers)
        for row, rule in enumerate(RULES):
            draw = torch.rand(1, generator=torch.Generator().manual_seed(100 * round_ + row))
            settings = Sampling(1, rule.temperature, rule.top_k, rule.top_p, rule.repetition_penalty)
            seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
            seen[0, prompt] = True
            if rule.temperature >= sampling.MIN_TEMPERATURE and rule.top_p == 1 and not rule.top_k:
                expected = by_id(logits[row].tolist(), rule, set(prompt), float(draw))
            else:
                expected = int(choose(logits[row : row + 1], draw[None].double(), settings, seen))
            assert found[row] == expected, rule


def by_id(logits: list[float], rule: Rule, seen: set[int], draw: float) -> int:
    """The token at which the probabilities of those up to it go beyond the draw."""
    penalty = rule.repetition_penalty
    for token in seen:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    most = max(logits)
    shares = [math.exp((logit - most) / rule.temperature) for logit in logits]
    left = draw * sum(shares)
    for token, share in enumerate(shares):
        left -= share
        if left < 0:
            return token
    raise AssertionError("no token has the last share")


def test_rows_that_sort_all_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(len(RULES), 0.5)
    found = [choose_each(logits.clone(), [Chooser(rule, [1], seed=3) for rule in RULES])]
    for shortlist in (1, 7, VOCABULARY):
        monkeypatch.setattr(sampling, "SHORTLIST", shortlist)
        found.append(choose_each(logits.clone(), [Chooser(rule, [1], seed=3) for rule in RULES]))
    assert found.count(found[0]) == len(found)


def test_a_row_does_not_depend_on_its_company() -> None:
    logits = logits_of(len(RULES)).float()
    together = choose_each(logits.clone(), [Chooser(rule, [1, 2], seed=row) for row, rule in enumerate(RULES)])
    for row, rule in enumerate(RULES):
        assert choose_each(logits[row : row + 1].clone(), [Chooser(rule, [1, 2], seed=row)]) == [together[row]]


def test_penalties_are_subtracted_from_what_the_answer_has() -> None:
    """By their definition in OpenAI's API: once, and once for each time. The prompt does not count."""
    rule = Rule(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    chooser = Chooser(rule, prompt=[0, 0, 0, 3])
    scores = [4.0, 3.9, 3.0, 2.0]
    written: Counter[int] = Counter()
    for _ in range(20):
        punished = [score - 0.5 * (written[token] > 0) - 0.25 * written[token] for token, score in enumerate(scores)]
        expected = max(range(4), key=punished.__getitem__)
        assert choose_each(torch.tensor([scores], dtype=torch.float64), [chooser]) == [expected]
        written[expected] += 1
    assert len(written) == 4


def test_draws_go_on_and_repeat_with_the_seed() -> None:
    chooser = Chooser(Rule(), [1], seed=5)
    draws = [chooser.draw() for _ in range(40)]
    assert draws == torch.rand(1, 40, generator=torch.Generator().manual_seed(5))[0].tolist()
    assert Chooser(Rule(), [1]).draw() != Chooser(Rule(), [1]).draw()


def test_a_draw_next_to_the_whole_takes_a_token_that_has_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chooser, "draw", lambda self: 1.0)
    logits = torch.tensor([[5.0, -math.inf, 4.0, -math.inf, -math.inf]])
    for rule in (Rule(), Rule(top_p=0.999), Rule(top_k=4)):
        assert choose_each(logits.clone(), [Chooser(rule, [1])]) == [2]


def test_logits_that_are_no_numbers_choose_some_token() -> None:
    logits = torch.full((len(RULES), VOCABULARY), torch.nan)
    assert all(0 <= token < VOCABULARY for token in choose_each(logits, [Chooser(rule, [1]) for rule in RULES]))
