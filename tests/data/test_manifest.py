"""Directories that appear whole or not at all, and the accounting's own check."""

import errno
import os
from pathlib import Path

import pytest

from doge_lm.data.manifest import (
    AccountingError,
    InputFile,
    RawSource,
    SampleCounts,
    SourceAccounting,
    accounting_table,
    atomic_directory,
)
from doge_lm.errors import UserError
from tests.data.conftest import left_over


def source(name: str = "a") -> RawSource:
    return RawSource(name, "pretrain", "here", "mine", [InputFile("x.jsonl", 3)])


def test_a_directory_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a"
    with atomic_directory(target) as folder:
        source("one").write(folder)
        assert not target.exists()
    assert RawSource.read(target) == source("one")
    with atomic_directory(target) as folder:
        source("two").write(folder)
        assert RawSource.read(target) == source("one")
    assert RawSource.read(target) == source("two")
    assert left_over(tmp_path) == []


def fail_in(folder: Path, error: type[BaseException]) -> None:
    (folder / "half").write_bytes(b"x")
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a"
    with atomic_directory(target) as folder:
        source("one").write(folder)
    with pytest.raises(error), atomic_directory(target) as folder:
        fail_in(folder, error)
    assert RawSource.read(target) == source("one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_remains_of_a_killed_run_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a").mkdir()
    (tmp_path / ".tmp-a" / "half").write_bytes(b"x")
    with atomic_directory(tmp_path / "a") as folder:
        source().write(folder)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["source.json"]


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_bytes(b"years of work")
    (tmp_path / "b").write_bytes(b"a file")
    for name, message in (("a", "was not made by doge-lm"), ("b", "is a file")):
        with pytest.raises(UserError, match=message), atomic_directory(tmp_path / name):
            pytest.fail("the block must not run")
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as folder:
        source().write(folder)
    assert (tmp_path / "a" / "thesis.txt").read_bytes() == b"years of work"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_user_error(tmp_path: Path, code: int) -> None:
    with pytest.raises(UserError, match="the disk is full") as raised, atomic_directory(tmp_path / "a"):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path / "a") in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_locked_place_is_a_user_error(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with pytest.raises(UserError, match="cannot be written"), atomic_directory(target) as folder:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "x"))
    # ... but not every locked file is the output's.
    with pytest.raises(PermissionError), atomic_directory(target):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/x")


def test_descriptions_of_another_version_or_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        RawSource.read(tmp_path)
    source().write(tmp_path)
    text = (tmp_path / "source.json").read_text(encoding="utf-8")
    for bad, message in (
        (text.replace('"format_version": 1', '"format_version": 99'), "format version 99"),
        (text[:-20], "not valid JSON"),
        ("[]", "not written by doge-lm"),
        (text.replace('"kind": "pretrain"', '"kind": "other"'), "kind 'other'"),
        (text.replace('"licence"', '"license"'), "not a description that doge-lm wrote"),
    ):
        (tmp_path / "source.json").write_text(bad, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            RawSource.read(tmp_path)


def test_files_that_changed_since_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl of the source 'a' is missing"):
        source().paths(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"12345")
    with pytest.raises(UserError, match="has 5 bytes, but had 3"):
        source().paths(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"123")
    assert source().paths(tmp_path) == [tmp_path / "x.jsonl"]


def balanced() -> tuple[SourceAccounting, SampleCounts]:
    account = SourceAccounting(
        documents_in=3, documents_kept=2, bytes_in=20, bytes_trained=10, bytes_context=6, tokens_in=30, targets=20,
        first_tokens=2, context=5, overlap=1,
    )  # fmt: skip
    account.drop("empty text", times=1, bytes_=4, tokens=3)
    return account, SampleCounts(samples=1, tokens=28, pieces=3, targets=20, context=5, padding=4, text_bytes=10)


def test_the_accounting_adds_up() -> None:
    account, rows = balanced()
    account.check("a", rows)
    table = accounting_table({"a": account}, {"a": rows})
    assert "a: dropped, empty text: 1 times, 3 tokens" in table


@pytest.mark.parametrize("field", ["tokens_in", "targets", "first_tokens", "context", "overlap", "bytes_trained"])
def test_an_account_that_does_not_add_up_is_found(field: str) -> None:
    account, rows = balanced()
    setattr(account, field, getattr(account, field) + 1)
    with pytest.raises(AccountingError, match="does not add up"):
        account.check("a", rows)


@pytest.mark.parametrize("field", ["tokens", "pieces", "targets", "context", "text_bytes"])
def test_rows_that_do_not_add_up_are_found(field: str) -> None:
    account, rows = balanced()
    setattr(rows, field, getattr(rows, field) - 1)
    with pytest.raises(AccountingError, match="does not add up"):
        account.check("a", rows)


def test_accounts_add() -> None:
    account, _ = balanced()
    total = SourceAccounting()
    total.add(account)
    total.add(account)
    total.repair("joined")
    assert total.tokens_in == 60
    assert total.dropped["empty text"].tokens == 6
    assert account.dropped["empty text"].tokens == 3
    assert total.repaired == {"joined": 1}
