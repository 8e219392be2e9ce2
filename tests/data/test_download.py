"""Taking sources in: the user's files, a hub and a bucket on loopback, and what can go wrong with each."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from doge_lm.cli import main
from doge_lm.data import download as module
from doge_lm.data.download import ContentFetcher, announce, download, take_local, write_shards
from doge_lm.data.manifest import RawSource
from doge_lm.data.sources import CATALOGUE, CatalogueEntry, TextRow, read_rows
from doge_lm.errors import UserError
from tests.data.conftest import conversation, json_lines, left_over
from tests.data.loopback import bucket_handler, hub_files, hub_handler, serve

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
        ("mine={dir}/empty.jsonl", "there is not one row"),
        ("mine={dir}/bad.jsonl", "bad.jsonl, line 1: invalid JSON"),
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
    assert message in capsys.readouterr().err
    assert not (tmp_path / "D").exists()


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
    assert not (tmp_path / "D").exists()
    # The beginnings of the sources fit.
    assert "together about 0.5 GB; 5.0 GB are free" in announce(["cosmopedia-v2"], tmp_path, 20_000)


def test_free_disk_is_that_of_the_place_to_be(tmp_path: Path) -> None:
    assert module._free_bytes(tmp_path / "not" / "there" / "yet") > 0


# ---------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------


def texts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "text": f"text {n}\u2028 中文"} for n in range(count)]


def reader(rows: list[dict[str, Any]]) -> Any:
    def read(entry: CatalogueEntry, cache_dir: Path | None) -> Iterator[dict[str, Any]]:
        yield from rows

    return read


@pytest.mark.parametrize("max_rows", [None, 7])
def test_a_download_is_written_in_shards(tmp_path: Path, max_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.write_shards, "__defaults__", (100,))
    target = tmp_path / "raw" / "cosmopedia-v2"
    source = download("cosmopedia-v2", target, max_rows=max_rows, read=reader(texts(20)))
    assert RawSource.read(target) == source
    names = [file.path for file in source.files]
    assert names == [f"part-{n:05d}.jsonl.zst" for n in range(len(names))]
    assert len(names) > 2
    rows = [TextRow(row["text"], row["prompt"]) for row in texts(20)][:max_rows]
    assert list(read_rows(source.paths(target), source.kind)) == rows
    assert source.counts == {"rows": len(rows)}


def test_shards_do_not_depend_on_chance(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, iter(texts(50)), 500)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert write_shards(tmp_path, iter([])) == []


def test_a_row_of_the_hub_that_is_faulty_leaves_nothing(tmp_path: Path) -> None:
    rows = [*texts(3), {"text": None, "prompt": "p"}]
    with pytest.raises(UserError, match=r"smollm-corpus, row 4: the field `text` is null"):
        download("cosmopedia-v2", tmp_path / "raw" / "cosmopedia-v2", read=reader(rows))
    with pytest.raises(UserError, match="not one row could be taken"):
        download("cosmopedia-v2", tmp_path / "raw" / "cosmopedia-v2", read=reader([]))
    assert list((tmp_path / "raw").iterdir()) == []


def test_a_full_disk_while_downloading(tmp_path: Path) -> None:
    def read(entry: CatalogueEntry, cache_dir: Path | None) -> Iterator[dict[str, Any]]:
        yield from texts(3)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"the disk is full .*cosmopedia-v2"):
        download("cosmopedia-v2", tmp_path / "raw" / "cosmopedia-v2", read=read)
    assert left_over(tmp_path) == []


def run_download(address: str, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own: the hub's address is read once, when its client is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    script = Path(__file__).resolve().parents[2] / "scripts" / "download_datasets.py"
    command = [sys.executable, str(script), "--save_dir", str(tmp_path), *flags]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False
    )


def test_the_script_streams_from_a_hub(tmp_path: Path) -> None:
    """The real client of `datasets` against a hub on loopback, about five seconds."""
    rows = texts(40)
    columns = {name: [row[name] for row in rows] for name in ("prompt", "text")} | {"audience": ["x"] * 40}
    with serve(hub_handler({"HuggingFaceTB/smollm-corpus": hub_files({"cosmopedia-v2": columns})})) as address:
        flags = ["--cache_dir", str(tmp_path / "cache"), "--datasets", "cosmopedia-v2", "--max_rows", "25"]
        done = run_download(address, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "cosmopedia-v2: about 0.0 GB of disk" in done.stdout
    target = tmp_path / "raw" / "cosmopedia-v2"
    source = RawSource.read(target)
    assert list(read_rows(source.paths(target))) == [TextRow(row["text"], row["prompt"]) for row in rows[:25]]


def test_a_hub_that_lacks_the_source_or_a_field(tmp_path: Path) -> None:
    flags = ["--cache_dir", str(tmp_path / "cache"), "--datasets", "cosmopedia-v2", "--max_rows", "5"]
    without = hub_files({"cosmopedia-v2": {"text": ["a"] * 9}})
    with serve(hub_handler({"HuggingFaceTB/smollm-corpus": without})) as address:
        done = run_download(address, tmp_path, *flags)
    assert done.returncode == 1
    assert "error: HuggingFaceTB/smollm-corpus has no field `prompt` any more" in done.stderr
    with serve(hub_handler({"someone/else": {}})) as address:
        done = run_download(address, tmp_path / "other", *flags)
    assert done.returncode == 1
    assert "error: HuggingFaceTB/smollm-corpus could not be read from the hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "raw").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------
# Contents by blob id
# ---------------------------------------------------------------------------------------------------------------


def blobs(count: int) -> list[dict[str, Any]]:
    return [{"blob_id": f"b{n}", "repo_name": "r", "path": f"{n}.py"} for n in range(count)]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_waiting")
def test_contents_are_fetched_by_id_in_order(tmp_path: Path) -> None:
    contents = {f"b{n}": f"print({n})  # 中文\n".encode() for n in range(50)}
    contents["b7"] = b"\xff\xfe"
    del contents["b3"]
    failures: dict[str, list[int | str]] = {"b1": [500, 503], "b5": ["cut"], "b9": [403]}
    target = tmp_path / "raw" / "python-edu"
    with serve(bucket_handler(contents, failures)) as address:
        source = download("python-edu", target, fetcher=ContentFetcher(address, 4), read=reader(blobs(50)))
    assert source.counts == {"rows": 47, module._MISSING: 2, module._NOT_TEXT: 1}
    expected = [TextRow(contents[f"b{n}"].decode()) for n in range(50) if n not in (3, 7, 9)]
    assert list(read_rows(source.paths(target))) == expected


@pytest.mark.usefixtures("no_waiting")
def test_a_content_that_cannot_be_fetched_ends_the_run(tmp_path: Path) -> None:
    contents = {f"b{n}": b"x" for n in range(5)}
    with (
        serve(bucket_handler(contents, {"b2": [500] * 9})) as address,
        pytest.raises(UserError, match=r"content/b2 could not be fetched in 4 tries: .*500"),
    ):
        download("python-edu", tmp_path / "p", fetcher=ContentFetcher(address, 2), read=reader(blobs(5)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_waiting")
def test_a_bucket_that_has_nothing_is_doubted(tmp_path: Path) -> None:
    with (
        serve(bucket_handler({}, {})) as address,
        pytest.raises(UserError, match="none of the first 100 contents is at"),
    ):
        download("python-edu", tmp_path / "p", fetcher=ContentFetcher(address, 4), read=reader(blobs(1000)))
    with serve(bucket_handler({}, {})) as address, pytest.raises(UserError, match="not one row could be taken"):
        download("python-edu", tmp_path / "p", fetcher=ContentFetcher(address, 4), read=reader(blobs(3)))


def test_the_bucket_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.download, "__defaults__", (None, None, None, reader(blobs(2))))
    with serve(bucket_handler({"b0": b"x", "b1": b"y"}, {})) as address:
        monkeypatch.setenv(module.CONTENTS_VARIABLE, address)
        flags = ["--save_dir", str(tmp_path), "--datasets", "python-edu", "--max_rows", "2"]
        assert main(["download_datasets", *flags]) == 0
    assert RawSource.read(tmp_path / "raw" / "python-edu").counts["rows"] == 2


def test_the_catalogue_names_what_must_be_known() -> None:
    for entry in CATALOGUE.values():
        assert entry.kind == ("finetune" if "conversations" in entry.fields else "pretrain")
        assert entry.licence
        assert entry.rows > 0


def test_a_first_row_that_is_faulty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: the field `text` is a number"):
        take_local("a", tmp_path / "a.jsonl", tmp_path / "raw" / "a")
