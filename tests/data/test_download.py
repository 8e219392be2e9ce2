"""Taking sources in: the user's files, a hub and a bucket on loopback, and what can go wrong with each."""

import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from doge_lm.cli import main
from doge_lm.data import download as module
from doge_lm.data import hub as hub_module
from doge_lm.data import transfer
from doge_lm.data.contents import CONTENTS_VARIABLE, MISSING, NOT_TEXT
from doge_lm.data.download import DownloadSettings, announce, download, take_local, write_shards
from doge_lm.data.manifest import RawSource
from doge_lm.data.sources import CATALOGUE, TextRow, read_objects, read_rows
from doge_lm.data.transfer import DiskGuard
from doge_lm.errors import UserError
from tests.data.conftest import Mount, conversation, json_lines, left_over, remount
from tests.data.loopback import Fault, Log, Repository, bucket_handler, hub_files, hub_handler, parquet, serve

# ---------------------------------------------------------------------------------------------------------------
# The user's own files
# ---------------------------------------------------------------------------------------------------------------


def test_local_files_are_referred_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "b.jsonl").write_bytes(json_lines([{"text": "b"}]))
    (own / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "chat.jsonl").write_bytes(json_lines([conversation(("human", "q"), ("gpt", "a"))]))
    local = ["--local", f"mine={own}", "--local", f"infinity-instruct-7M={tmp_path / 'chat.jsonl'}"]
    assert main(["download_datasets", "--save_dir", str(tmp_path / "D"), *local]) == 0
    mine = RawSource.read(tmp_path / "D" / "raw" / "mine")
    assert mine.kind == "pretrain"
    assert [(file.path, file.bytes) for file in mine.files] == [
        (str((own / "a.txt").resolve()), 1),
        (str((own / "b.jsonl").resolve()), 14),
    ]
    assert RawSource.read(tmp_path / "D" / "raw" / "infinity-instruct-7M").kind == "finetune"
    # Only these: the catalogue was not asked for.
    assert sorted(path.name for path in (tmp_path / "D" / "raw").iterdir()) == ["infinity-instruct-7M", "mine"]
    out = capsys.readouterr().out
    assert "mine: pretrain, 2 files of 15 bytes" in out
    assert "infinity-instruct-7M: finetune, 1 file of" in out
    assert "preprocess_datasets" in out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mine", "not of the form NAME=PATH"),
        ("mine=", "not of the form NAME=PATH"),
        ("../x={ok}", "may hold letters"),
        (".x={ok}", "may hold letters"),
        ("mine={dir}/none.jsonl", "none.jsonl does not exist"),
        ("mine={dir}/table.csv", "unknown kind"),
        ("mine={dir}/empty.jsonl", "there is not one good row"),
        (
            "mine={dir}/bad.jsonl",
            "there is not one good row in {dir}/bad.jsonl; the first fault: {dir}/bad.jsonl, line 1: ",
        ),
        ("infinity-instruct-Gen={ok}", "are for pretrain, but infinity-instruct-Gen is a source for finetune"),
    ],
)
def test_local_files_that_cannot_be_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, message: str
) -> None:
    (tmp_path / "ok.txt").write_text("text", encoding="utf-8")
    for name, content in (("table.csv", b"a,b"), ("empty.jsonl", b"\n"), ("bad.jsonl", b"{")):
        (tmp_path / name).write_bytes(content)
    local = value.format(ok=tmp_path / "ok.txt", dir=tmp_path)
    assert main(["download_datasets", "--save_dir", str(tmp_path / "D"), "--local", local]) == 1
    assert message.format(dir=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "D").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": oops}\n' + json_lines([{"text": "good"}]), "a.jsonl, line 1: invalid JSON"),
        (b'{"text": "caf\xe9"}\n', "a.jsonl, line 1: invalid UTF-8"),
        (b"{}\n{}\n", "a.jsonl, line 1: the field `text` or `conversations` is missing (fields there: none) (and 1"),
    ],
)
def test_what_is_faulty_before_the_first_good_row_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: bytes, message: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.jsonl").write_bytes(bad)
    (own / "b.jsonl").write_bytes(json_lines([{"text": "good"}]))
    source = take_local("mine", own, tmp_path / "raw" / "mine")
    assert (source.kind, len(source.files)) == ("pretrain", 2)
    error = capsys.readouterr().err
    assert message in error
    assert "--on_error skip" in error


def test_a_document_may_be_too_large_for_the_default_of_preprocessing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "x" * (2**24 + 1)}]))
    assert take_local("mine", tmp_path / "a.jsonl", tmp_path / "raw" / "mine").kind == "pretrain"
    assert capsys.readouterr().err == ""


def test_what_is_left_aside_and_what_is_of_the_other_kind_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    (own / ".git").mkdir(parents=True)
    for name in ("x.csv", "y.CSV", "README", "z.txt.gz", ".git/config.ini"):
        (own / name).write_bytes(b"x")
    (own / "a.jsonl").write_bytes(json_lines([{"text": "a"}]))
    (own / "b.jsonl").write_bytes(json_lines([conversation(("human", "q"), ("gpt", "a"))]))
    assert take_local("mine", own, tmp_path / "raw" / "mine").kind == "pretrain"
    error = capsys.readouterr().err
    assert "left aside: 2 .csv, 1 .txt.gz, 1 without a suffix (readable are .jsonl, " in error
    assert f"{own / 'a.jsonl'} is for pretrain, but {own / 'b.jsonl'} for finetune" in error


def test_a_shard_of_which_a_bit_has_flipped_is_refused(tmp_path: Path) -> None:
    _, [file] = write_shards(tmp_path, "part", texts(0, 50), DiskGuard(0))
    path = tmp_path / file.path
    sound = path.read_bytes()
    assert hashlib.sha256(sound).hexdigest() == file.sha256
    rows = list(read_rows([path]))
    for bit in range(0, 8 * len(sound), 11):
        altered = bytearray(sound)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        try:
            assert list(read_rows([path])) == rows  # a bit that means nothing
        except UserError:
            continue


def test_a_name_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ok.txt").write_text("text", encoding="utf-8")
    flags = ["--save_dir", str(tmp_path / "D"), "--local", f"python-edu={tmp_path / 'ok.txt'}"]
    assert main(["download_datasets", *flags, *flags[2:]]) == 1
    assert main(["download_datasets", *flags, "--datasets", "python-edu"]) == 1
    assert main(["download_datasets", *flags, "--datasets", "pyton-edu"]) == 1
    errors = capsys.readouterr().err
    assert "--local python-edu is given twice" in errors
    assert "asked for twice, by --datasets and by --local" in errors
    assert "--datasets pyton-edu: no such source (there: cosmopedia-v2, " in errors


# ---------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_refused_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_free_bytes", lambda path: 5 * 10**9)
    assert main(["download_datasets", "--save_dir", str(tmp_path / "D")]) == 1
    error = capsys.readouterr().err
    assert "need about 2,000.0 GB" in error
    assert "only 5.0 GB are free" in error
    assert "--ignore_estimate" in error
    assert not (tmp_path / "D").exists()
    assert "5.0 GB are free" in announce(["cosmopedia-v2"], tmp_path, None, ignore_estimate=True)
    # The beginnings of the sources fit.
    assert "together about 0.5 GB; 5.0 GB are free" in announce(["cosmopedia-v2"], tmp_path, 20_000)


def test_a_source_that_was_begun_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_bytes", lambda path: 10**9)
    with pytest.raises(UserError, match="are free at"):
        announce(["cosmopedia-v2"], tmp_path, None)
    (tmp_path / "raw" / ".tmp-cosmopedia-v2").mkdir(parents=True)
    assert "cosmopedia-v2: about" in announce(["cosmopedia-v2"], tmp_path, None)


def test_free_disk_is_that_of_the_place_to_be(tmp_path: Path) -> None:
    assert module._free_bytes(tmp_path / "not" / "there" / "yet") > 0


# ---------------------------------------------------------------------------------------------------------------
# The catalogue
# ---------------------------------------------------------------------------------------------------------------

SMOLLM = "HuggingFaceTB/smollm-corpus"
COSMOPEDIA = "cosmopedia-v2/train-{:05d}-of-00003.parquet"


def texts(begin: int, end: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "text": f"text {n}\u2028 中文"} for n in range(begin, end)]


def table(rows: list[dict[str, Any]]) -> bytes:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return parquet(columns | {"left_out": ["x"] * len(rows)})


def cosmopedia() -> dict[str, bytes]:
    """Three files of 20 rows."""
    files = hub_files({"cosmopedia-v2": {"text": ["never read"]}})
    return {"README.md": files["README.md"]} | {
        COSMOPEDIA.format(n): table(texts(20 * n, 20 * n + 20)) for n in range(3)
    }


def python_edu(count: int) -> dict[str, bytes]:
    rows = [{"blob_id": f"b{n}", "repo_name": "r", "path": f"{n}.py"} for n in range(count)]
    return {"python-edu/train-00000-of-00001.parquet": table(rows)}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody's token, no proxy, short waits, and a hub that may be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(transfer, "FIRST_WAIT_SECONDS", 0.001)
    yield
    huggingface_hub.close_session()  # the one that follows heeds HF_HUB_OFFLINE again


Take = Callable[..., RawSource]


@pytest.fixture
def take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Take:
    """Downloads a source from a hub that holds some files, in this process."""

    def take_(
        files: dict[str, bytes],
        faults: dict[str, list[Fault]] | None = None,
        log: Log | None = None,
        name: str = "cosmopedia-v2",
        place: Path = tmp_path,
        ranges: bool = True,
        **settings: Any,
    ) -> RawSource:
        settings = {"cache_dir": tmp_path / "cache", "retries": 3} | settings
        with serve(hub_handler({CATALOGUE[name].hub_id: files}, faults, log, ranges=ranges)) as address:
            monkeypatch.setenv("HF_ENDPOINT", address)
            return download(name, place / "raw" / name, DownloadSettings(**settings))

    return take_


def read_back(tmp_path: Path, name: str = "cosmopedia-v2") -> list[Any]:
    source = RawSource.read(tmp_path / "raw" / name)
    return list(read_rows(source.paths(tmp_path / "raw" / name), source.kind))


def as_rows(rows: list[dict[str, Any]]) -> list[TextRow]:
    return [TextRow(row["text"], row.get("prompt", "")) for row in rows]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("max_rows", [None, 7, 20, 33])
def test_a_source_is_written_in_shards(
    tmp_path: Path, take: Take, max_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 200)
    log = Log()
    source = take(cosmopedia(), log=log, max_rows=max_rows)
    taken = 60 if max_rows is None else max_rows
    assert read_back(tmp_path) == as_rows(texts(0, 60))[:taken]
    assert source.counts == {"rows": taken}
    assert len(source.revision) == 40
    assert [file.path for file in source.files][:2] == ["part-00000-00000.jsonl.zst", "part-00000-00001.jsonl.zst"]
    # No more files than are needed, and nothing left.
    assert len([path for path in log.requests if path != "README.md"]) == -(-taken // 20)
    assert sorted(bytes_of(tmp_path / "raw" / "cosmopedia-v2")) == sorted(
        ["source.json", *(file.path for file in source.files)]
    )
    assert list((tmp_path / "cache").iterdir()) == []
    assert left_over(tmp_path) == []


def test_faults_of_the_hub_are_borne(tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    files, log = cosmopedia(), Log()
    first, second, third = (COSMOPEDIA.format(n) for n in range(3))
    faults = {
        "tree": [Fault(500), Fault(429), Fault()],
        "README.md": [Fault(503)],
        first: [Fault(after=400, how="reset"), Fault(after=300, how="cut"), Fault(429, retry_after="0.01")],
        second: [Fault(after=100, how="stall"), Fault(500), Fault(502)],
        third: [Fault(how="alter")],
    }
    take(files, faults, log)
    assert read_back(tmp_path) == as_rows(texts(0, 60))
    assert not any(faults.values())
    # What had arrived before an interruption was not sent again; a reset may lose what was on its way.
    assert len(files[first]) <= log.sent[first] <= len(files[first]) + 400
    assert log.sent[second] == len(files[second])
    assert log.sent[third] == 2 * len(files[third])
    assert "bytes=100-" in log.ranges


def test_the_interface_of_the_hub_is_given_the_time_that_it_asks_for(
    take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float | None] = []

    class Recorder(transfer.Patience):
        def endure(self, fault: transfer.FaultError) -> None:
            waits.append(fault.wait)
            super().endure(fault)

    monkeypatch.setattr(hub_module, "Patience", Recorder)
    # The last of them answers without a word.
    take(cosmopedia(), {"information": [Fault(429, retry_after="0.125"), Fault(503), Fault()]})
    assert waits == [0.125, None, None]


def test_a_hub_without_ranges(tmp_path: Path, take: Take) -> None:
    files, log = cosmopedia(), Log()
    first = COSMOPEDIA.format(0)
    take(files, {first: [Fault(after=400, how="cut"), Fault(after=100, how="cut")]}, log, ranges=False)
    assert read_back(tmp_path) == as_rows(texts(0, 60))
    assert log.sent[first] == 500 + len(files[first])


def test_a_hub_without_ranges_that_always_breaks_off_is_given_up(take: Take) -> None:
    # Each attempt begins from the start, so what it brings after a shorter one is nothing new.
    first = COSMOPEDIA.format(0)
    faults = {first: [Fault(after=size, how="cut") for size in (400, 300) * 20]}
    with pytest.raises(UserError, match=r"00000-of-00003.parquet could not be fetched in 4 tries: the body broke off"):
        take(cosmopedia(), faults, ranges=False)


def test_the_rest_of_another_content_is_not_kept(tmp_path: Path, take: Take) -> None:
    # The connection broke, and what a mirror sends for the rest is of another version of the file.
    files, log = cosmopedia(), Log()
    first = COSMOPEDIA.format(0)
    take(files, {first: [Fault(after=400, how="cut"), Fault(how="alter")]}, log)
    assert read_back(tmp_path) == as_rows(texts(0, 60))
    assert log.sent[first] == 2 * len(files[first])
    assert log.ranges == ["bytes=400-"]


@pytest.mark.parametrize("change", [-100, 100])
def test_a_file_of_another_length_since(tmp_path: Path, take: Take, change: int) -> None:
    files, log = cosmopedia(), Log()
    first = COSMOPEDIA.format(0)
    other = files[first][:change] if change < 0 else files[first] + b"x" * change
    # Almost all of it had arrived when the run ended.
    with pytest.raises(UserError, match="could not be fetched"):
        take(files, {first: [Fault(after=len(files[first]) - 50, how="cut"), *[Fault(500)] * 4]})
    with pytest.raises(UserError, match="broke off|416" if change < 0 else "fetched 2 times, and it has .* instead of"):
        take({**files, first: other}, log=log)
    assert len(log.requests) <= 8
    take(files)
    assert read_back(tmp_path) == as_rows(texts(0, 60))


def test_a_token_stays_with_the_hub(tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real hub redirects to another host, which signs its addresses and must not see the token."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    files, front, back = {SMOLLM: cosmopedia()}, Log(), Log()
    faults = {COSMOPEDIA.format(0): [Fault(after=400, how="cut")]}
    with serve(hub_handler(files, faults, back)) as store:
        elsewhere = store.replace("127.0.0.1", "localhost")
        with serve(hub_handler(files, log=front, files_at=elsewhere)) as address:
            monkeypatch.setenv("HF_ENDPOINT", address)
            download("cosmopedia-v2", tmp_path / "raw" / "cosmopedia-v2", DownloadSettings(tmp_path / "cache"))
    assert read_back(tmp_path) == as_rows(texts(0, 60))
    assert set(front.tokens) == {"Bearer hf_x"}
    assert set(back.tokens) == {None}
    assert "bytes=400-" in back.ranges


def test_several_files_are_fetched_at_once(tmp_path: Path, take: Take) -> None:
    files = cosmopedia()

    class Meeting(Log):
        """Nobody is served before all three have asked."""

        def __init__(self) -> None:
            super().__init__()
            self.requests = Requests()

    class Requests(list[str]):
        everybody = threading.Barrier(3, timeout=30)

        def append(self, path: str) -> None:
            super().append(path)
            if path in map(COSMOPEDIA.format, range(3)):
                self.everybody.wait()

    take(files, log=Meeting(), num_proc=3)
    assert read_back(tmp_path) == as_rows(texts(0, 60))


@pytest.mark.parametrize("num_proc", [1, 2, 16])
def test_the_rate_is_that_of_all_processes_together(num_proc: int) -> None:
    settings = DownloadSettings(Path("cache"), num_proc=num_proc, max_rate=1000.0)
    files, contents = CATALOGUE["cosmopedia-v2"], CATALOGUE["python-edu"]
    assert settings.rate_share(files) == 1000.0  # only this process fetches
    # Files of blob ids go on being fetched here while all others fetch contents.
    assert (num_proc + 1) * (settings.rate_share(contents) or 0) == pytest.approx(1000.0)
    assert DownloadSettings(Path("cache"), num_proc=num_proc).rate_share(contents) is None


def test_every_transfer_of_a_download_is_limited(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Rate(transfer.RateLimit):
        booked = 0

        def __init__(self, rate: float | None) -> None:
            super().__init__(rate)
            self.rate = rate or 0.0
            made.append(self)

        def debt(self, size: int) -> float:
            self.booked += size
            return super().debt(size)

    monkeypatch.setattr(module, "RateLimit", Rate)
    files, contents = python_edu(9), {f"b{n}": b"x" * 5000 for n in range(9)}
    with serve(bucket_handler(contents, {})) as bucket:
        take(files, name="python-edu", contents_endpoint=bucket, max_rate=10**6)
    assert sum(rate.rate for rate in made) == 10**6
    assert [rate.booked > 0 for rate in made] == [True, True]
    assert sum(rate.booked for rate in made) > sum(map(len, files.values()))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({COSMOPEDIA.format(1): [Fault(500)] * 4}, r"00001-of-00003.parquet could not be fetched in 4 tries: .*500"),
        ({COSMOPEDIA.format(1): [Fault(how="alter")] * 2}, r"fetched 2 times, and its SHA-256 is .* instead of"),
        ({COSMOPEDIA.format(1): [Fault(403)]}, r"access is refused .*403.*accept its conditions .*hf auth login"),
        ({COSMOPEDIA.format(1): [Fault(404)]}, r"00001-of-00003.parquet is not there .*404"),
        ({"tree": [Fault(401)]}, r"smollm-corpus could not be read from the hub: the repository: access is refused"),
        ({"README.md": [Fault(how="alter")]}, None),
    ],
)
def test_what_does_not_pass_ends_the_run_and_keeps_the_work(
    tmp_path: Path, take: Take, faults: dict[str, list[Fault]], message: str | None
) -> None:
    files, log = cosmopedia(), Log()
    if message is not None:
        with pytest.raises(UserError, match=message):
            take(files, faults, log)
        assert not (tmp_path / "raw" / "cosmopedia-v2").exists()
    take(files, None, log)
    assert read_back(tmp_path) == as_rows(texts(0, 60))
    assert log.requests.count(COSMOPEDIA.format(0)) == 1


def test_a_hub_that_lacks_the_source_or_a_field(tmp_path: Path, take: Take) -> None:
    with pytest.raises(UserError, match=r"smollm-corpus has no field `prompt` any more in cosmopedia-v2/train-00000"):
        take(hub_files({"cosmopedia-v2": {"text": ["a"] * 9}}))
    with pytest.raises(UserError, match="has no file of the configuration python-edu"):
        take(cosmopedia(), name="python-edu")
    with pytest.raises(UserError, match="not a sound parquet file"):
        take({"7M/a.parquet": b"PAR1 but no more"}, name="infinity-instruct-7M")
    with pytest.raises(UserError, match="not one row could be taken"):
        take({"Gen/a.jsonl": b"\n"}, name="infinity-instruct-Gen")
    # What an interrupted run leaves never looks finished; where there was nothing to take, nothing is left.
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == [
        ".tmp-cosmopedia-v2",
        ".tmp-infinity-instruct-7M",
    ]


def test_offline(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(UserError, match="while HF_HUB_OFFLINE is set"):
        take(cosmopedia())


def test_rows_are_left_for_preprocessing_to_judge(tmp_path: Path, take: Take) -> None:
    lines = b'{"text": null, "prompt": "p"}\n{"text": "\\ud800", "prompt": "q"}\n'
    source = take({"cosmopedia-v2/a.jsonl": lines})
    [path] = source.paths(tmp_path / "raw" / "cosmopedia-v2")
    assert [values["text"] for _, values in read_objects(path)] == [None, "\ud800"]


def test_other_settings_are_refused(tmp_path: Path, take: Take, capsys: pytest.CaptureFixture[str]) -> None:
    take(cosmopedia(), max_rows=5)
    assert "made already" not in capsys.readouterr().out
    before, log = bytes_of(tmp_path / "raw" / "cosmopedia-v2"), Log()
    left = tmp_path / "raw" / ".tmp-cosmopedia-v2"
    left.mkdir()
    take(cosmopedia(), log=log, max_rows=5, num_proc=2)
    assert log.requests == []
    said = capsys.readouterr().out
    assert f"{tmp_path / 'raw' / 'cosmopedia-v2'} is made already, with the same settings; --overwrite" in said
    assert f"{left} was left by an interrupted run" in said
    with pytest.raises(UserError, match=r"other settings \(--max_rows: was 5, is 6\).*--overwrite"):
        take(cosmopedia(), max_rows=6)
    assert bytes_of(tmp_path / "raw" / "cosmopedia-v2") == before
    take(cosmopedia(), max_rows=6, overwrite=True)
    assert len(read_back(tmp_path)) == 6
    # The same for a run that did not end.


def test_an_interrupted_run_with_other_settings(tmp_path: Path, take: Take) -> None:
    with pytest.raises(UserError, match="could not be fetched"):
        take(cosmopedia(), {COSMOPEDIA.format(0): [Fault(500)] * 4}, max_rows=7)
    with pytest.raises(UserError, match=r"interrupted run with other settings \(--max_rows: was 7, is 8\)"):
        take(cosmopedia(), max_rows=8)
    take(cosmopedia(), max_rows=8, overwrite=True)
    assert len(read_back(tmp_path)) == 8


def test_a_revision_is_kept_to(tmp_path: Path, take: Take) -> None:
    files = cosmopedia()
    with pytest.raises(UserError, match="could not be fetched"):
        take(files, {COSMOPEDIA.format(2): [Fault(500)] * 4})
    # A file that was added since is of another revision: the run that goes on does not ask for the list again.
    revision = take(
        {**files, "cosmopedia-v2/train-00009.parquet": table(texts(60, 70))}, {"tree": [Fault(404)]}
    ).revision
    assert revision == Repository(SMOLLM, {}).sha
    assert read_back(tmp_path) == as_rows(texts(0, 60))


def test_the_disk_is_left_with_what_was_asked_for(tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(UserError, match=r"1.00 GB are free.*--min_free_disk wants 1.00 GB left; what is done"):
        take(cosmopedia(), min_free_disk=10**9)
    take(cosmopedia(), min_free_disk=10**8)
    assert read_back(tmp_path) == as_rows(texts(0, 60))


def test_a_full_disk_while_downloading(tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(UserError, match=r"the disk is full .*cosmopedia-v2"):
            take(cosmopedia())
    take(cosmopedia())
    assert read_back(tmp_path) == as_rows(texts(0, 60))


@pytest.mark.parametrize("full", ["--cache_dir", "--save_dir"])
def test_a_disk_that_is_truly_full(
    tmp_path: Path,
    take: Take,
    mounted: Mount,
    monkeypatch: pytest.MonkeyPatch,
    full: str,
) -> None:
    place = mounted("size=200k")
    chance = random.Random(233)
    rows = [{"prompt": "", "text": chance.randbytes(2000).hex()} for _ in range(120)]
    files = {COSMOPEDIA.format(n): table(rows[40 * n : 40 * n + 40]) for n in range(3)}
    settings = {"place": place} if full == "--save_dir" else {"cache_dir": place / "cache", "keep_cache": True}
    log = Log()
    with monkeypatch.context() as patch:
        patch.setattr(DiskGuard, "check", lambda *_: None)  # as if others filled the disk after it had looked
        with pytest.raises(UserError, match=rf"the disk is full .*{place}.* run the same command again.*{full}"):
            take(files, log=log, **settings)
    assert not any(tmp_path.rglob("source.json"))
    remount(place, "size=8m")
    take(files, log=log, **settings)
    home = place if full == "--save_dir" else tmp_path
    assert read_back(home) == [TextRow(row["text"]) for row in rows]
    # The file that was whole before the disk was full was not sent again, and the one after it from where it was.
    assert log.sent[COSMOPEDIA.format(0)] == len(files[COSMOPEDIA.format(0)])
    assert bool(log.ranges) == (full == "--cache_dir")
    assert left_over(place) == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--retries=-1", "at least 0"), ("--max_rate=0", "more than 0"), ("--min_free_disk=nan", "at least 0")],
)
def test_limits_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, message: str) -> None:
    assert main(["download_datasets", "--save_dir", str(tmp_path), flag]) == 1
    assert message in capsys.readouterr().err


def test_shards_do_not_depend_on_chance(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert write_shards(tmp_path / name, "part", iter(texts(0, 50)), DiskGuard(0), 500)[0] == 50
    assert len(bytes_of(tmp_path / "a")) > 2
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert write_shards(tmp_path, "part", iter([]), DiskGuard(0)) == (0, [])


# ---------------------------------------------------------------------------------------------------------------
# Contents by blob id
# ---------------------------------------------------------------------------------------------------------------


def test_contents_of_a_source(tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDS_PER_UNIT", 20)
    contents = {f"b{n}": f"print({n})  # 中文\n".encode() for n in range(50)}
    contents["b7"] = b"\xff\xfe"
    del contents["b3"]
    faults = {"b1": [Fault(500), Fault(503)], "b45": [Fault(500)] * 4}
    log = Log()
    with serve(bucket_handler(contents, faults, log)) as bucket:
        settings = {"name": "python-edu", "contents_endpoint": bucket}
        with pytest.raises(UserError, match=r"content/b45 could not be fetched in 4 tries: .*500"):
            take(python_edu(50), **settings)
        source = take(python_edu(50), **settings)
        with pytest.raises(UserError, match="--contents_endpoint: was"):
            take(python_edu(50), name="python-edu", contents_endpoint="http://127.0.0.1:1")
    assert source.counts == {"rows": 48, MISSING: 1, NOT_TEXT: 1}
    assert read_back(tmp_path, "python-edu") == [
        TextRow(contents[f"b{n}"].decode()) for n in range(50) if n not in (3, 7)
    ]
    # The two units that were finished were not fetched again.
    assert log.requests.count("b0") == log.requests.count("b39") == 1
    assert log.requests.count("b40") == 2


def test_a_full_disk_while_contents_come(
    tmp_path: Path,
    take: Take,
    mounted: Mount,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = mounted("size=600k")
    monkeypatch.setattr(module, "_IDS_PER_UNIT", 20)
    chance = random.Random(233)
    contents = {f"b{n}": chance.randbytes(10_000).hex().encode() for n in range(60)}
    log = Log()
    with serve(bucket_handler(contents, {}, log)) as bucket:
        settings = {"name": "python-edu", "contents_endpoint": bucket}
        with pytest.raises(UserError, match=rf"the disk is full .*{place}.* run the same command again"):
            take(python_edu(60), place=place, **settings)
        assert not any(place.rglob("source.json"))
        remount(place, "size=8m")
        source = take(python_edu(60), place=place, **settings)
        # The unit that was finished before was not fetched again.
        assert [log.requests.count(f"b{n}") for n in range(20)] == [1] * 20
        take(python_edu(60), **settings)
    assert source.counts["rows"] == 60
    assert bytes_of(place / "raw" / "python-edu") == bytes_of(tmp_path / "raw" / "python-edu")
    assert left_over(place) == []


def test_a_bucket_that_has_nothing(tmp_path: Path, take: Take) -> None:
    with serve(bucket_handler({}, {})) as bucket:
        with pytest.raises(UserError, match="100 contents in a row are not at"):
            take(python_edu(300), name="python-edu", contents_endpoint=bucket)
        shutil.rmtree(tmp_path / "raw")
        with pytest.raises(UserError, match=r"not one row could be taken .*in the bucket, skipped: 3"):
            take(python_edu(3), name="python-edu", contents_endpoint=bucket)


def test_the_bucket_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_handler({SMOLLM: python_edu(9)})
    with serve(bucket_handler({"b0": b"x", "b1": b"y"}, {})) as bucket, serve(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv(CONTENTS_VARIABLE, bucket)
        flags = ["--save_dir", str(tmp_path), "--datasets", "python-edu", "--max_rows", "2", "--min_free_disk", "0"]
        assert main(["download_datasets", *flags]) == 0
    assert RawSource.read(tmp_path / "raw" / "python-edu").counts["rows"] == 2


# ---------------------------------------------------------------------------------------------------------------
# Killed at any moment
# ---------------------------------------------------------------------------------------------------------------


def test_killed_at_random_moments_the_result_is_the_same(tmp_path: Path) -> None:
    files = cosmopedia() | python_edu(40)
    contents = {f"b{n}": f"print({n})".encode() * 50 for n in range(40)}
    chance = random.Random(233)
    with serve(hub_handler({SMOLLM: files})) as hub, serve(bucket_handler(contents, {})) as bucket:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub, CONTENTS_VARIABLE: bucket, "HF_HOME": str(tmp_path / "home")}

        def start(place: Path) -> "subprocess.Popen[bytes]":
            script = Path(__file__).resolve().parents[2] / "scripts" / "download_datasets.py"
            flags = ["--save_dir", str(place), "--datasets", "cosmopedia-v2", "python-edu", "--min_free_disk", "0"]
            command = [sys.executable, str(script), *flags, "--max_rows", "60", "--max_rate", "0.05"]
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

        whole = start(tmp_path / "whole")
        _, errors = whole.communicate(timeout=60)
        assert whole.returncode == 0, errors.decode()
        interrupted = 0
        for _ in range(6):
            # Killed some time after it has begun to write, whatever the time that the imports take.
            killed = start(tmp_path / "killed")
            deadline = time.monotonic() + 30
            raw = tmp_path / "killed" / "raw"
            while (
                not any(path.is_dir() for path in raw.glob(".tmp-*"))
                and killed.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.3))
            killed.kill()
            killed.communicate()
            interrupted += any(path.is_dir() for path in raw.glob(".tmp-*"))
        last = start(tmp_path / "killed")
        _, errors = last.communicate(timeout=60)
        assert last.returncode == 0, errors.decode()
    assert interrupted
    for name in ("cosmopedia-v2", "python-edu"):
        assert bytes_of(tmp_path / "killed" / "raw" / name) == bytes_of(tmp_path / "whole" / "raw" / name)
    assert not [path for path in left_over(tmp_path) if not path.endswith(".lock")]


def test_the_catalogue_names_what_must_be_known() -> None:
    for entry in CATALOGUE.values():
        assert entry.kind == ("finetune" if "conversations" in entry.fields else "pretrain")
        assert entry.licence
        assert entry.rows > 0


def test_a_first_row_that_is_faulty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: the field `text` is a number"):
        take_local("a", tmp_path / "a.jsonl", tmp_path / "raw" / "a")
