"""Mixing: what a user writes, the epochs it comes to, and the rows that a merged set then holds."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from doge_lm.cli import main
from doge_lm.data import merge as module
from doge_lm.data.manifest import Manifest
from doge_lm.data.merge import BEYOND_BUDGET, merge
from doge_lm.data.mix import Mix, SourcePlan, epoch_warnings, epochs_table, parse_tokens, plan_epochs
from doge_lm.errors import UserError
from tests.data.conftest import conversation

Prepare = Callable[..., dict[str, Manifest]]


def test_weights_are_brought_to_one() -> None:
    assert Mix.parse("a=0.5,b=0.3, c=0.2").weights == {"a": Fraction(1, 2), "b": Fraction(3, 10), "c": Fraction(1, 5)}
    assert Mix.parse("a=2,b=6").as_text() == {"a": "1/4", "b": "3/4"} == Mix.parse("b=0.75,a=.25").as_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not of the form NAME=WEIGHT"),
        ("a", "'a' is not of the form"),
        ("a=1,,b=1", "'' is not of the form"),
        ("=1", "'=1' is not of the form"),
        ("a=1,a=2", "'a' twice"),
        ("a=-1", "must be above 0"),
        ("a=0", "must be above 0"),
        ("a=nan", "must be above 0"),
        ("a=inf", "must be above 0"),
        ("a=1e999999", "must be above 0"),
        ("a=half", "'half' is not a number"),
    ],
)
def test_a_mix_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mix.parse(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1e9", 10**9),
        ("4B", 4 * 10**9),
        ("500M", 5 * 10**8),
        ("1.5k", 1500),
        ("4_000", 4000),
        ("1,000", 1000),
        ("7", 7),
    ],
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "B", "0", "-4B", "1.5", "1e-3", "4 apples", "inf", "0x10"])
def test_tokens_that_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match="--tokens"):
        parse_tokens(text)


def test_without_a_budget_no_source_is_repeated() -> None:
    plans = plan_epochs({"a": 1000, "b": 300}, Mix.parse("a=1,b=1"))
    assert [(plan.name, plan.wanted, plan.epochs) for plan in plans] == [("a", 300, Fraction(3, 10)), ("b", 300, 1)]


def test_a_budget_is_shared_out() -> None:
    plans = plan_epochs({"a": 1000, "b": 100}, Mix.parse("a=1,b=1"), 1000)
    assert [plan.wanted for plan in plans] == [500, 500]
    assert [plan.wanted for plan in plan_epochs({"a": 1000, "b": 100}, tokens=550)] == [500, 50]
    assert SourcePlan("a", 1000, 2250).copies(8) == (2, 2)
    assert "5.00" in epochs_table(plans)
    warnings = epoch_warnings(plans)
    assert len(warnings) == 1
    assert warnings[0].startswith("b is gone over 5.0 times")


@pytest.fixture
def three_sources(tmp_path: Path, prepare: Prepare) -> Path:
    """Two of text, whose rows can be told apart, and one of conversations."""
    texts = {name: [{"text": f"{name} number {n} " * 9} for n in range(count)] for name, count in SIZES.items()}
    chats = [conversation(("human", f"{n} plus {n}"), ("gpt", f"{2 * n}")) for n in range(100)]
    prepare({**texts, "talk": chats}, sequence_length=64, padding="max_length")
    return tmp_path


SIZES = {"a": 120, "b": 40}


def rows_by_source(rows: Any) -> dict[str, Counter[bytes]]:
    found: dict[str, Counter[bytes]] = {}
    for row in rows:
        found.setdefault(row["source"], Counter())[row["input_ids"].tobytes()] += 1
    return found


@pytest.mark.parametrize("small_steps", [False, True])
def test_rows_are_repeated_and_left_out(
    three_sources: Path, monkeypatch: pytest.MonkeyPatch, small_steps: bool
) -> None:
    if small_steps:
        monkeypatch.setattr(module, "ROWS_PER_SHARD", 16)
    whole = {name: Manifest.read(three_sources / "tokenized" / name).samples["all"][name] for name in SIZES}
    budget = 2 * whole["a"].tokens
    manifests = merge(three_sources, three_sources, test_size=8, mix=Mix.parse("a=0.25,b=0.75"), tokens=budget)
    made = load_from_disk(str(three_sources / "pretrain")).with_format("numpy")
    train, test = rows_by_source(made["train"]), rows_by_source(made["test"])
    assert {name: sum(rows.values()) for name, rows in test.items()} == {"a": 2, "b": 6}
    manifest = manifests["pretrain"]
    for name, share in (("a", 0.25), ("b", 0.75)):
        assert not train[name].keys() & test[name].keys()
        taken = sum(train[name].values())
        there = whole[name].samples - sum(test[name].values())
        copies, extra = divmod(taken, there)
        assert sorted(Counter(train[name].values()).items()) == sorted(
            (times, rows) for times, rows in ((copies, there - extra), (copies + 1, extra)) if times and rows
        )
        mixture = manifest.settings["mixture"][name]
        tokens = manifest.samples["train"][name].tokens
        assert tokens == mixture["tokens_taken"]
        assert abs(tokens - share * budget) < 2 * 64
        dropped = mixture["dropped"].get(BEYOND_BUDGET, {"samples": 0})["samples"]
        assert dropped == max(0, there - taken)
    assert manifest.settings["mixture"]["b"]["repeated"]["samples"] > 0
    # The other kind is as it was: every sample once.
    assert manifests["finetune"].split_counts("train").samples + 8 == sum(
        file.rows for file in Manifest.read(three_sources / "tokenized" / "talk").files
    )


def test_what_is_not_named_is_left_out_and_said(three_sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--datasets_dir", str(three_sources), "--save_dir", str(three_sources), "--test_size", "4"]
    assert main(["merge_datasets", *place, "--mix", "b=1", "--tokens", "100k"]) == 0
    out = capsys.readouterr().out
    assert "pretrain: a is left out, since --mix does not name it" in out
    assert "warning: b is gone over" in out
    assert set(Manifest.read(three_sources / "pretrain").samples["train"]) == {"b"}
    assert main(["merge_datasets", *place, "--mix", "b=2", "--tokens", "100000"]) == 0
    assert "is made already" in capsys.readouterr().out
    assert main(["merge_datasets", *place, "--mix", "b=2", "--tokens", "99999"]) == 1
    assert "tokens: was 100000, is 99999" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mix", "tokens", "message"),
    [
        ("a=1,z=1,y=1", None, r"names z, y, but there is no such source \(there: a, b, talk\)"),
        ("a=1,talk=1", None, r"two kinds, a \(pretrain\) and talk \(finetune\)"),
        ("a=1", 1, "less than one sample"),
    ],
)
def test_a_mix_that_does_not_fit(three_sources: Path, mix: str, tokens: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge(three_sources, three_sources, test_size=4, mix=Mix.parse(mix), tokens=tokens)
    assert not list(three_sources.rglob(".tmp-*"))
