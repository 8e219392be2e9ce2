"""How much of each source a training set gets: `--mix` and `--tokens`, and the epochs they come to.

Weights are shares of the *tokens* of the training split. An epoch over a source is every one of its rows once: with
2.25 epochs every row stands in the set twice and a quarter of them a third time.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from doge_lm.errors import UserError

# Up to about four epochs repeated text is worth nearly as much as new text (arXiv 2305.16264).
MANY_EPOCHS = 4
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKENS = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,2})?)([KMBT]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Mix:
    """What share of the tokens each source gives.

    Attributes:
        weights: source name -> share, above 0; they sum to 1, exactly.
    """

    weights: Mapping[str, Fraction]

    @classmethod
    def parse(cls, text: str) -> "Mix":
        """Reads `NAME=WEIGHT,NAME=WEIGHT,...`; the weights are brought to a sum of 1.

        Raises:
            UserError: for an entry of another form, a name that is given twice, a weight that is not above 0.
        """
        weights: dict[str, Fraction] = {}
        for entry in text.split(","):
            name, equals, number = (part.strip() for part in entry.rpartition("="))
            if not name or not equals:
                raise UserError(f"--mix: {entry.strip()!r} is not of the form NAME=WEIGHT, as in --mix a=0.7,b=0.3")
            if name in weights:
                raise UserError(f"--mix names the source {name!r} twice; give it one weight")
            weights[name] = _weight(name, number)
        total = sum(weights.values())
        return cls({name: weight / total for name, weight in weights.items()})

    def check_names(self, there: Collection[str]) -> None:
        """Refuses a mix that names sources which are not there.

        Args:
            there: the names of the sources.

        Raises:
            UserError: with the names that are missing and those that are there.
        """
        missing = [name for name in self.weights if name not in there]
        if missing:
            raise UserError(
                f"--mix names {_names(missing)}, but there is no such source (there: {_names(sorted(there)) or 'none'})"
            )

    def as_text(self) -> dict[str, str]:
        """The weights as exact fractions: what a manifest keeps, the same for `a=1,b=1` and `a=0.5,b=0.5`."""
        return {name: str(weight) for name, weight in sorted(self.weights.items())}


def _weight(name: str, number: str) -> Fraction:
    try:
        weight = Decimal(number)
    except InvalidOperation:
        raise UserError(f"--mix {name}={number}: {number!r} is not a number") from None
    if not weight.is_finite() or weight <= 0 or not -30 < weight.adjusted() < 30:
        raise UserError(f"--mix {name}={number}: a weight must be above 0; leave a source out by not naming it")
    return Fraction(weight)


def _names(names: Collection[str]) -> str:
    return ", ".join(names)


def parse_tokens(text: str) -> int:
    """Reads a number of tokens: `4000000000`, `4_000_000_000`, `4e9`, `4B`, `500M`.

    Raises:
        UserError: for any other form, a number that is not whole, or one below 1.
    """
    match = _TOKENS.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--tokens {text}: not a number of tokens; write it as 4000000000, 4e9, 4B or 500M")
    tokens = Fraction(re.sub("[_,]", "", match[1])) * _UNITS[match[2].upper()]
    if tokens.denominator != 1 or tokens < 1:
        raise UserError(f"--tokens {text}: must be a whole number of tokens, at least 1")
    return int(tokens)


@dataclass(frozen=True)
class SourcePlan:
    """What a training split takes of one source.

    Attributes:
        name: of the source.
        there: its tokens, without those in the test set.
        wanted: tokens to take of it, repeats included.
    """

    name: str
    there: int
    wanted: int

    @property
    def epochs(self) -> Fraction:
        """How often the source is gone over."""
        return Fraction(self.wanted, self.there)

    def copies(self, rows: int) -> tuple[int, int]:
        """How often each row goes in, and how many of the rows go in once more, for that many epochs over `rows`."""
        return divmod(round(self.epochs * rows), rows)


def plan_epochs(there: Mapping[str, int], mix: Mix | None = None, tokens: int | None = None) -> list[SourcePlan]:
    """Works out how many tokens to take of each source.

    Without a mix each source gives in proportion to its size. Without a number of tokens the total is the largest
    one at which no source is repeated.

    Args:
        there: source name -> its tokens, above 0. With a mix, the mix's sources and no others.
        mix: the shares of the sources.
        tokens: wanted in all.

    Returns:
        What to take of each source, in the order of `there`.
    """
    if mix is None:
        mix = Mix({name: Fraction(count, sum(there.values())) for name, count in there.items()})
    total = Fraction(tokens) if tokens is not None else min(count / mix.weights[name] for name, count in there.items())
    return [SourcePlan(name, count, round(total * mix.weights[name])) for name, count in there.items()]


def epochs_table(plans: Collection[SourcePlan]) -> str:
    """The plan as a table of plain text: of each source its tokens, those taken, its share and the epochs."""
    total = sum(plan.wanted for plan in plans)
    lines = [f"{'source':<28} {'tokens':>18} {'taken':>18} {'share':>8} {'epochs':>8}"]
    for plan in plans:
        share = plan.wanted / total if total else math.nan
        lines.append(f"{plan.name:<28} {plan.there:>18,} {plan.wanted:>18,} {share:>8.1%} {float(plan.epochs):>8.2f}")
    lines.append(f"{'all':<28} {sum(plan.there for plan in plans):>18,} {total:>18,}")
    return "\n".join(lines)


def epoch_warnings(plans: Collection[SourcePlan]) -> list[str]:
    """A sentence for each source that is repeated too often to be worth it."""
    return [
        f"{plan.name} is gone over {float(plan.epochs):.1f} times; beyond {MANY_EPOCHS} epochs repeated text adds "
        "little: give it a smaller weight, choose fewer --tokens, or add data"
        for plan in plans
        if plan.epochs > MANY_EPOCHS
    ]
