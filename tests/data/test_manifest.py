"""Directories that appear whole or not at all, and the accounting's own check."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    is_made,
    resumable_directory,
    scratch_directory,
)
from doge_lm.errors import UserError
from tests.data.conftest import left_over

Make = Callable[[Path], AbstractContextManager[object]]


def resumable(target: Path) -> AbstractContextManager[Path]:
    return resumable_directory(target, {}, overwrite=False)


def made(target: Path) -> AbstractContextManager[bool]:
    return nullcontext(is_made(target, {}, lambda folder: {}, overwrite=False))


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


@pytest.mark.parametrize("make", [atomic_directory, scratch_directory, resumable, made], ids=lambda make: make.__name__)
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_nothing_is_made_in_a_file(tmp_path: Path, make: Make, kind: str) -> None:
    place = tmp_path / "notes.txt"
    if kind == "file":
        place.write_bytes(b"mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    for target in (place / "a", place / "raw" / "deep" / "a"):
        message = f"{target} cannot be made: {place} is not a directory; choose another --save_dir"
        with pytest.raises(UserError, match=re.escape(message)), make(target):
            pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == [place]


def test_two_runs_do_not_make_the_same_directory_at_once(tmp_path: Path) -> None:
    """The second one is another process, as it would be; the first is not harmed by it."""
    program = """
import sys
from pathlib import Path
from doge_lm.data.manifest import atomic_directory
from doge_lm.errors import UserError
try:
    with atomic_directory(Path(sys.argv[1])):
        print("got it")
except UserError as error:
    print(error)
"""
    target = tmp_path / "a"
    command = [sys.executable, "-c", program, str(target)]
    with atomic_directory(target) as folder:
        source().write(folder)
        second = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
        assert f"another process is writing {target} at this moment" in second.stdout
        assert all(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
    assert RawSource.read(target) == source()
    assert left_over(tmp_path) == []


def test_a_killed_run_lets_go_of_its_lock(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from doge_lm.data.manifest import atomic_directory
with atomic_directory(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline().split() == [b"locked"]
        with pytest.raises(UserError, match="another process is writing"), atomic_directory(tmp_path / "a"):
            pytest.fail("the block must not run")
        run.kill()
    assert left_over(tmp_path) != []
    with atomic_directory(tmp_path / "a") as folder:
        source().write(folder)
    assert left_over(tmp_path) == []


def test_runs_at_once_have_a_scratch_directory_each(tmp_path: Path) -> None:
    """One that was killed leaves its own to be removed; one that is alive is not harmed."""
    program = """
import sys
from pathlib import Path
from doge_lm.data.manifest import scratch_directory
with scratch_directory(Path(sys.argv[1])) as folder:
    (folder / "x").touch()
    print(folder.name, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "deep" / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline().split() == [b".tmp-s-0"]
        with scratch_directory(tmp_path / "deep" / "s") as alive:
            assert alive.name == ".tmp-s-1"
            (alive / "y").touch()
            run.kill()
            run.wait()
            assert (tmp_path / "deep" / ".tmp-s-0" / "x").exists()
            with scratch_directory(tmp_path / "deep" / "s") as third:
                assert third.name == ".tmp-s-0"
                assert list(third.iterdir()) == []
                assert (alive / "y").exists()
            assert sorted(path.name for path in alive.parent.iterdir()) == [".tmp-s-1", ".tmp-s-1.lock"]
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_user_error(tmp_path: Path, code: int) -> None:
    with pytest.raises(UserError, match="the disk is full") as raised, atomic_directory(tmp_path / "a"):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path / "a") in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.EACCES, "choose another --save_dir, or change the permissions"), (errno.EROFS, "another --save_dir")],
)
def test_the_advice_fits_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str) -> None:
    """Also of what is asked before anything is made; but where nothing is to be removed, nothing is wrong."""
    (tmp_path / "a").mkdir()

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert not is_made(tmp_path / "a", {}, lambda folder: {}, overwrite=False)
    (tmp_path / "a" / "source.json").touch()
    (tmp_path / "a" / "identity.json").touch()
    with pytest.raises(UserError, match=rf"a cannot be written \({os.strerror(code)}: .*{advice}$"):
        is_made(tmp_path / "a", {}, lambda folder: {}, overwrite=True)


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
    with pytest.raises(UserError, match=r"source\.json does not exist: no such directory as .*nothing; check the path"):
        RawSource.read(tmp_path / "nothing")
    (tmp_path / ".tmp-a").mkdir()
    with pytest.raises(UserError, match=r"\.tmp-a is of a run that has not finished"):
        RawSource.read(tmp_path / ".tmp-a")
    source().write(tmp_path)
    text = (tmp_path / "source.json").read_text(encoding="utf-8")
    for bad, message in (
        (text.replace('"format_version": 2', '"format_version": 99'), "format version 99"),
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
        documents_in=3, documents_kept=2, documents_dropped=1, bytes_in=20, bytes_trained=10, bytes_context=6,
        tokens_in=30, targets=20, first_tokens=2, context=5, overlap=1,
    )  # fmt: skip
    account.drop("empty text", times=1, bytes_=4, tokens=3)
    return account, SampleCounts(samples=1, tokens=28, pieces=3, targets=20, context=5, padding=4, text_bytes=10)


def test_the_accounting_adds_up() -> None:
    account, rows = balanced()
    account.check("a", rows)
    table = accounting_table({"a": account}, {"a": rows})
    assert "a: dropped, empty text: 1 times, 4 bytes, 3 tokens" in table


def test_a_lost_file_stands_in_the_table() -> None:
    account, rows = balanced()
    account.leave_out("rest of a file", 0, is_document=False, example="b.jsonl is truncated")
    account.leave_out("rest of a file", 0, is_document=False, example="c.jsonl is truncated")
    table = accounting_table({"a": account}, {"a": rows})
    assert re.search(r"^bad input .* 2$", table, re.MULTILINE)
    assert "a: dropped, rest of a file: 2 times, 0 bytes, – tokens\n  the first: b.jsonl is truncated" in table


@pytest.mark.parametrize(
    "field", ["documents_in", "tokens_in", "targets", "first_tokens", "context", "overlap", "bytes_trained"]
)
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
