"""Preprocessing end to end: every token accounted for, the same rows for any number of processes, and bad input."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import load_from_disk

from doge_lm.cli import main
from doge_lm.data import documents, sources, storage
from doge_lm.data import manifest as manifest_module
from doge_lm.data import preprocess as preprocess_module
from doge_lm.data.cleaning import CleaningSettings
from doge_lm.data.download import take_local
from doge_lm.data.manifest import Manifest, SourceAccounting, resumable_directory
from doge_lm.data.preprocess import PreprocessSettings, preprocess
from doge_lm.data.sources import ConversationRow, read_rows
from doge_lm.data.tokenizer import encode_text, load_tokenizer
from doge_lm.errors import UserError
from tests.data.conftest import conversation, json_lines, left_over
from tests.data.reference import chat_document, pieces_in, pieces_of, text_document

Prepare = Callable[..., dict[str, Manifest]]


def rows_of(folder: Path) -> Any:
    return load_from_disk(str(folder)).with_format("numpy")


def expected_pieces(tokenizer: Any, rows: list[dict[str, Any]], length: int, **options: bool) -> Any:
    pieces = [piece for row in rows for piece in pieces_of(text_document(tokenizer, row, **options), length)]
    return sorted(pieces)


@pytest.mark.parametrize("padding", ["packed", "max_length"])
@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_every_token_of_real_text_is_accounted_for(
    tmp_path: Path, prepare: Prepare, published_tokenizer_path: Path, library_rows: list[dict[str, Any]], padding: str,
    train_on_prompts: bool,
) -> None:  # fmt: skip
    rows = library_rows[:12]
    manifest = prepare(
        {"library": rows},
        tokenizer=published_tokenizer_path,
        sequence_length=512,
        padding=padding,
        train_on_prompts=train_on_prompts,
    )["library"]
    tokenizer = load_tokenizer(published_tokenizer_path)
    made = rows_of(tmp_path / "tokenized" / "library")
    expected = expected_pieces(tokenizer, rows, 512, train_on_prompts=train_on_prompts)
    assert sorted(pieces_in(made).elements()) == expected
    account, counts = manifest.accounting["library"], manifest.samples["all"]["library"]
    lengths = [len(text_document(tokenizer, row)) for row in rows]
    assert account.tokens_in == sum(lengths)
    assert account.documents_in == account.first_tokens == len(rows)
    assert account.targets == sum(sum(learned) for _, learned in expected)
    prompts = sum(len(row.get("prompt", "").encode()) for row in rows)
    texts = sum(len(row["text"].encode()) for row in rows)
    assert account.bytes_in == texts + prompts
    assert sum(made["text_bytes"]) == texts + (prompts if train_on_prompts else 0)
    assert counts.samples == len(made)
    assert counts.padding == sum(len(row["input_ids"]) - row["document_lengths"].sum() for row in made)
    assert (counts.padding > 0) == (padding == "max_length")


def test_the_directory_is_a_data_set_of_the_agreed_columns(
    tmp_path: Path, prepare: Prepare, published_tokenizer_path: Path
) -> None:
    rows = [{"text": "one two three"}] * 5
    manifest = prepare({"a": rows}, tokenizer=published_tokenizer_path, sequence_length=64)["a"]
    made = load_from_disk(str(tmp_path / "tokenized" / "a"))
    assert {name: str(feature) for name, feature in made.features.items()} == {
        "input_ids": "List(Value('uint16'))",
        "document_lengths": "List(Value('int32'))",
        "context_spans": "List(Value('int32'))",
        "text_bytes": "Value('int32')",
        "source": "Value('string')",
        "group": "Value('int64')",
    }
    assert set(made["source"]) == {"a"}
    assert Manifest.read(tmp_path / "tokenized" / "a") == manifest
    assert manifest.tokenizer.vocab_size == 32768
    assert (manifest.tokenizer.pad_token_id, manifest.tokenizer.bos_token_id, manifest.tokenizer.eos_token_id) == (
        0,
        1,
        2,
    )
    assert manifest.inputs[0].bytes == (tmp_path / "own" / "a.jsonl").stat().st_size
    assert manifest.kind == "pretrain"


def test_the_published_set_up_of_one_document_a_row(tmp_path: Path, prepare: Prepare) -> None:
    prepare({"a": [{"text": "one two three"}, {"text": "word " * 100}]}, sequence_length=64, padding="max_length")
    made = rows_of(tmp_path / "tokenized" / "a")
    assert {len(row["input_ids"]) for row in made} == {64}
    assert [int(row["group"]) for row in made] == [0, 1, 1]


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_sources_are_done_by_name(tmp_path: Path, prepare: Prepare, order: tuple[str, str]) -> None:
    manifests = prepare({name: [{"text": f"from {name}"}] for name in order}, sequence_length=64)
    assert list(manifests) == ["a", "b"]


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_bytes(
    tmp_path: Path, prepare: Prepare, library_rows: list[dict[str, Any]]
) -> None:
    """With units so small that each source has many."""
    chats = [conversation(("human", f"How much is {n} and {n}?"), ("gpt", str(2 * n))) for n in range(400)]
    sources = {"chat": chats, "library": library_rows[:30]}
    for number in (1, 2):
        prepare(sources, place=tmp_path / str(number), num_proc=number, unit_bytes=30_000, sequence_length=256)
    for name in sources:
        one, two = (tmp_path / number / "tokenized" / name for number in ("1", "2"))
        assert [path.name for path in sorted(one.iterdir())] == [path.name for path in sorted(two.iterdir())]
        for path in one.glob("*.arrow"):
            assert path.read_bytes() == (two / path.name).read_bytes()
        assert Manifest.read(one).accounting == Manifest.read(two).accounting
        assert Manifest.read(one).files == Manifest.read(two).files


def test_batches_do_not_change_the_rows(
    tmp_path: Path, prepare: Prepare, library_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for size in (1000, 2**22):
        monkeypatch.setattr(documents, "_BATCH_CHARACTERS", size)
        manifest = prepare({"a": library_rows[:10]}, place=tmp_path / str(size), sequence_length=256)["a"]
        files.append(manifest.files)
    assert files[0] == files[1]


def test_every_unit_is_a_shard_and_groups_do_not_cross_it(tmp_path: Path, prepare: Prepare) -> None:
    texts = [{"text": " ".join(f"w{n}x{m}" for m in range(10))} for n in range(30)]
    manifest = prepare({"a": texts}, sequence_length=64, padding="max_length", unit_bytes=len(json_lines(texts[:10])))[
        "a"
    ]
    assert len(manifest.files) > 2
    assert [file.path for file in manifest.files] == [f"data-{n:05d}.arrow" for n in range(len(manifest.files))]
    made = rows_of(tmp_path / "tokenized" / "a")
    assert len(made) == 30
    assert len(set(made["group"])) == 30


def test_examples_in_a_part_of_a_file_say_where_lines_are_counted_from(tmp_path: Path, prepare: Prepare) -> None:
    rows = [{"text": f"number {n} of many"} for n in range(200)] + [{"title": "bad"}]
    account = prepare({"a": rows}, sequence_length=64, unit_bytes=1_000, on_error="skip")["a"].accounting["a"]
    assert " (lines counted from byte " in account.dropped[sources.BAD_FIELD].example


def test_a_source_of_whole_batches(tmp_path: Path, prepare: Prepare) -> None:
    full = [{"text": f"text {n}"} for n in range(storage.ROWS_PER_BATCH)]
    manifest = prepare({"full": full}, sequence_length=64, padding="max_length")["full"]
    assert [file.rows for file in manifest.files] == [storage.ROWS_PER_BATCH]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_all_formats_come_to_the_same_rows(tmp_path: Path, tokenizer_path: Path, suffix: str) -> None:
    text = "one\u2028two\u0085 three\x0c 中文\x00 </s>"
    path = tmp_path / f"a{suffix}"
    line = json_lines([{"text": text}])
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        content = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}.get(suffix, bytes)
        path.write_bytes(content(text.encode() if suffix == ".txt" else line))
    take_local("a", path, tmp_path / "raw" / "a")
    preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(64))
    row = rows_of(tmp_path / "tokenized" / "a")[0]
    tokenizer = load_tokenizer(tokenizer_path)
    assert row["input_ids"].tolist() == [1, *encode_text(tokenizer, text), 2]
    assert row["text_bytes"] == len(text.encode())


def test_the_shared_data_adds_up(
    tmp_path: Path, shared_data: Path, published_tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of it documents longer than a sample, and conversations that do not alternate; through the commands."""
    tokenizer = load_tokenizer(published_tokenizer_path)
    place = ["--save_dir", str(tmp_path)]
    files = {name: shared_data / "mini" / f"{name}.jsonl.zst" for name in ("english", "instruct_zh")}
    local = [word for name, path in files.items() for word in ("--local", f"{name}={path}")]
    assert main(["download_datasets", *place, *local]) == 0
    flags = ["--datasets_dir", str(tmp_path), "--tokenizer_path", str(published_tokenizer_path), "--max_len", "512"]
    assert main(["preprocess_datasets", *place, *flags]) == 0
    assert "+ first tokens of documents" in capsys.readouterr().out
    rows = list(read_rows([files["english"]]))
    english = [{"text": row.text, "prompt": row.prompt} for row in rows if not isinstance(row, ConversationRow)]
    made = rows_of(tmp_path / "tokenized" / "english")
    assert sorted(pieces_in(made).elements()) == expected_pieces(tokenizer, english, 512)
    assert sum(made["text_bytes"]) == sum(len(row["text"].encode()) for row in english)
    account = Manifest.read(tmp_path / "tokenized" / "english").accounting["english"]
    assert account.tokens_in == sum(len(text_document(tokenizer, row)) for row in english)
    assert account.dropped == {}
    chats = [row.turns for row in read_rows([files["instruct_zh"]]) if isinstance(row, ConversationRow)]
    pairs = [
        [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]
        for turns in chats
        if [role for role, _ in turns] == ["human", "gpt"] * (len(turns) // 2)
    ]
    assert len(pairs) > 300
    found = pieces_in(rows_of(tmp_path / "tokenized" / "instruct_zh"))
    for entry in pairs:
        for piece in pieces_of(chat_document(tokenizer, entry), 512):
            assert found[piece] > 0


# ---------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, tokenizer_path: Path) -> Callable[..., int]:
    """Takes a file in as the source `a` and preprocesses it, through the commands."""

    def command_(file: Path, *flags: str) -> int:
        place = ["--save_dir", str(tmp_path)]
        if main(["download_datasets", *place, "--local", f"a={file}"]):
            return 1
        there = ["--datasets_dir", str(tmp_path), "--tokenizer_path", str(tokenizer_path)]
        return main(["preprocess_datasets", *place, *there, *flags])

    return command_


GOOD = {"text": "a good line"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json_lines([GOOD] * 3) + b'{"text": "brok\n', "line 4: invalid JSON"),
        (json_lines([GOOD, {"title": "a"}]), "line 2: the field `text` is missing"),
        (json_lines([GOOD]) + b'{"text": "\\udc00"}\n', "line 2: the field `text` holds a lone surrogate"),
        (json_lines([GOOD]) + b'{"text": "\xe4"}\n', "line 2: invalid UTF-8"),
        (json_lines([GOOD, conversation(("human", "q"))]), "line 2: the field `text` is missing"),
    ],
)
def test_a_bad_line_ends_the_run_and_leaves_nothing(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "own.jsonl").write_bytes(content)
    assert command(tmp_path / "own.jsonl") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'own.jsonl'}, {message}")
    assert list((tmp_path / "tokenized").iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([GOOD, {"text": " \n\u3000"}, GOOD], documents.EMPTY_TEXT),
        (
            [
                conversation(("human", "q"), ("gpt", "a")),
                conversation(("human", "q"), ("gpt", " ")),
                conversation(("human", "q"), ("gpt", "a")),
            ],
            documents.NO_ASSISTANT,
        ),
    ],
)
def test_a_row_with_nothing_to_learn_stops_or_is_skipped(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str], rows: list[Any], reason: str
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json_lines(rows))
    assert command(path) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}, line 2: {reason}")
    assert "--on_error skip" in error
    assert list((tmp_path / "tokenized").iterdir()) == []
    assert command(path, "--on_error", "skip") == 0
    account = Manifest.read(tmp_path / "tokenized" / "a").accounting["a"]
    assert account.dropped[reason].times == 1
    assert f"\n  the first: {path}, line 2: {reason}\n" in capsys.readouterr().out
    assert (account.documents_in, account.documents_kept) == (3, 2)


@pytest.mark.parametrize(("content", "read"), [(json_lines([{"text": ""}, {"text": " "}]), 2), (b"\n", 0)])
def test_a_source_of_which_nothing_is_left(tmp_path: Path, tokenizer_path: Path, content: bytes, read: int) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json_lines([GOOD]))
    source = take_local("a", path, tmp_path / "raw" / "a")
    path.write_bytes(content)
    source.files[0].bytes = len(content)
    source.write(tmp_path / "raw" / "a")
    for on_error in ("skip",) if read else ("skip", "stop"):
        with pytest.raises(UserError, match=rf"nothing is left of the source 'a', .*\(documents read: {read}"):
            preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(64, on_error=on_error))
    assert list((tmp_path / "tokenized").iterdir()) == []


def test_a_truncated_archive_ends_the_run(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.jsonl.zst"
    content = zstandard.compress(json_lines([{"text": f"{n**9} and {n**8}"} for n in range(20_000)]))
    path.write_bytes(content[: len(content) * 9 // 10])
    assert command(path) == 1
    assert f"error: {path} is truncated" in capsys.readouterr().err
    assert list((tmp_path / "tokenized").iterdir()) == []


def test_an_earlier_result_survives_a_failure(tmp_path: Path, command: Callable[..., int]) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json_lines([GOOD]))
    assert command(path) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "tokenized" / "a").iterdir()}
    path.write_bytes(json_lines([GOOD]) + b"{\n")
    assert command(path) == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "tokenized" / "a").iterdir()} == before
    assert left_over(tmp_path) == []


def test_input_that_changed_since_it_was_taken_in(
    tmp_path: Path, tokenizer_path: Path, command: Callable[..., int]
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json_lines([GOOD]))
    assert command(path) == 0
    path.write_bytes(json_lines([GOOD] * 2))
    with pytest.raises(UserError, match=r"own\.jsonl of the source 'a' has .* bytes, but had"):
        preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings())
    path.unlink()
    with pytest.raises(UserError, match=r"own\.jsonl of the source 'a' is missing"):
        preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings())


def test_what_was_not_downloaded(tmp_path: Path, tokenizer_path: Path) -> None:
    def attempt(**options: Any) -> None:
        preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(), **options)

    with pytest.raises(UserError, match=r"raw does not exist; run `doge-lm download_datasets"):
        attempt()
    (tmp_path / "raw").mkdir()
    with pytest.raises(UserError, match="holds no source"):
        attempt()
    (tmp_path / "raw" / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine has no source\.json; .* --local NAME=PATH"):
        attempt()
    shutil.rmtree(tmp_path / "raw" / "mine")
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    take_local("a", tmp_path / "a.txt", tmp_path / "raw" / "a")
    with pytest.raises(UserError, match=r"--datasets b: no such source in .* \(there: a\)"):
        attempt(names=["b"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--max_len", "4"], "--max_len 4 is too short"), (["--num_proc", "0"], "--num_proc 0 is not possible")],
)
def test_flags_that_cannot_be(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "own.txt").write_text("text", encoding="utf-8")
    assert command(tmp_path / "own.txt", *flags) == 1
    assert message in capsys.readouterr().err


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    take_local("a", tmp_path / "a.txt", tmp_path / "raw" / "a")
    with pytest.raises(UserError, match="doge-lm tokenizer build"):
        preprocess(tmp_path, tmp_path, tmp_path / "none", PreprocessSettings())
    assert not (tmp_path / "tokenized").exists()


def test_the_program_checks_its_own_accounting(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    from doge_lm.data.manifest import AccountingError  # noqa: PLC0415

    def forget(self: Any, row: Any) -> None:
        if len(self._rows) < 3:
            honest(self, row)

    honest = storage.RowWriter.write
    monkeypatch.setattr(storage.RowWriter, "write", forget)
    with pytest.raises(AccountingError, match="the token accounting of a does not add up"):
        prepare({"a": [GOOD] * 50}, sequence_length=8)
    assert list((tmp_path / "tokenized").iterdir()) == []
    assert SourceAccounting().check("a", storage.SampleCounts()) is None


def test_files_without_rows_are_named(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is done with errors; and they change nothing else."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "b.jsonl").write_bytes(json_lines([GOOD] * 3))
    assert command(own, "--max_len", "64") == 0
    said = capsys.readouterr()
    assert "no row" not in said.out + said.err
    assert Manifest.read(tmp_path / "tokenized" / "a").files_without_rows == []
    rows = content(tmp_path / "tokenized" / "a")["data-00000.arrow"]
    (own / "a.jsonl").write_bytes(b"")
    (own / "c.jsonl").write_bytes(b"\n \n")
    (own / "d.jsonl.zst").write_bytes(zstandard.compress(b""))
    (own / "e.jsonl.gz").write_bytes(gzip.compress(b""))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), own / "f.parquet")
    assert command(own, "--max_len", "64", "--overwrite") == 0
    said = capsys.readouterr()
    first = ", ".join(str(own / name) for name in ("a.jsonl", "c.jsonl", "d.jsonl.zst"))
    names = f"5 of its files hold no row: {first}"
    assert f"warning: --local a: {names}, …\n" in said.err
    assert f"\nwarning: a: {names}, …\n" in said.out
    made = Manifest.read(tmp_path / "tokenized" / "a")
    assert [Path(path).name[0] for path in made.files_without_rows] == ["a", "c", "d", "e", "f"]
    assert content(tmp_path / "tokenized" / "a")["data-00000.arrow"] == rows
    for name in ("c.jsonl", "d.jsonl.zst", "e.jsonl.gz", "f.parquet"):
        (own / name).unlink()
    (own / "g.jsonl").write_bytes(b"[]\n")  # bad, but not empty
    assert command(own, "--max_len", "64", "--on_error", "skip", "--overwrite") == 0
    said = capsys.readouterr()
    assert f"\nwarning: a: 1 of its files holds no row: {own / 'a.jsonl'}\n" in said.out


# ---------------------------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------------------------


def test_a_full_disk_while_writing(tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def write(self: Any, data: Any) -> int:
        nonlocal written
        written += memoryview(data).nbytes
        if written > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return honest(self, data)

    honest = storage._Hashing.write
    monkeypatch.setattr(storage._Hashing, "write", write)
    with pytest.raises(UserError, match="the disk is full") as raised:
        prepare({"a": [{"text": f"number {n}"} for n in range(3000)]}, sequence_length=64)
    assert str(tmp_path / "tokenized" / "a") in str(raised.value)
    assert written > 3000
    assert list((tmp_path / "tokenized").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or mount is None:
        pytest.skip("no tmpfs here")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(
    tmp_path: Path, small_disk: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(map(str, rng.integers(0, 10**9, 500)))} for _ in range(400)]
    (tmp_path / "own.jsonl").write_bytes(json_lines(rows))
    take_local("a", tmp_path / "own.jsonl", tmp_path / "raw" / "a")
    flags = ["--datasets_dir", str(tmp_path), "--tokenizer_path", str(tokenizer_path)]
    assert main(["preprocess_datasets", *flags, "--save_dir", str(small_disk)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the disk is full")
    assert f"{small_disk / 'tokenized' / 'a'} could not be finished" in error
    assert list((small_disk / "tokenized").iterdir()) == []


def test_a_directory_that_was_renamed(tmp_path: Path, prepare: Prepare, tokenizer_path: Path) -> None:
    prepare({"a": [GOOD]}, sequence_length=64)
    (tmp_path / "raw" / "a").rename(tmp_path / "raw" / "b")
    with pytest.raises(UserError, match="b holds the source 'a'"):
        preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings())


def test_settings_are_in_the_manifest(tmp_path: Path, prepare: Prepare) -> None:
    prepare({"a": [GOOD]}, sequence_length=64, train_on_prompts=True)
    written = json.loads((tmp_path / "tokenized" / "a" / "manifest.json").read_text(encoding="utf-8"))
    assert written["settings"] == {
        "padding": "packed",
        "packing": "best_fit",
        "train_on_prompts": True,
        "max_document_bytes": 2**23,
        "unit_bytes": 2**24,
    }
    assert written["sequence_length"] == 64
    assert set(written["versions"]) >= {"python", "datasets", "tokenizers"}


# ---------------------------------------------------------------------------------------------------------------
# Interruption, other settings, bad input that is skipped
# ---------------------------------------------------------------------------------------------------------------

_KILLED = """
import sys
from pathlib import Path
from doge_lm.data.preprocess import PreprocessSettings, preprocess
place, tokenizer, num_proc = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
preprocess(place, place, tokenizer, PreprocessSettings(256), num_proc=num_proc, unit_bytes=20_000)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, tokenizer_path: Path, library_rows: list[dict[str, Any]], num_proc: int
) -> None:
    """Killed as soon as there is one record, then two more, ...: what is finished is not touched again."""
    packed = tmp_path / "own.jsonl.zst"
    packed.write_bytes(zstandard.compress(json_lines(library_rows[:30])))
    take_local("a", packed, tmp_path / "raw" / "a")
    command = [sys.executable, "-c", _KILLED, str(tmp_path), str(tokenizer_path), str(num_proc)]
    subprocess.run(command, check=True)
    target = tmp_path / "tokenized" / "a"
    expected = content(target)
    shutil.rmtree(target)
    partial = target.with_name(".tmp-a")
    for wanted in (1, 4, 7):
        with subprocess.Popen(command) as running:
            while running.poll() is None and len(list(partial.glob("work/data-*.json"))) < wanted:
                time.sleep(0.005)
            assert running.poll() is None, "the run must not end before it is killed"
            running.kill()
        finished = {path: path.stat().st_mtime_ns for path in partial.glob("work/data-*.json")}
        assert len(finished) >= wanted
    arrows = {path.stem.removeprefix("data-"): path.stat().st_ino for path in partial.glob("*.arrow")}
    subprocess.run(command, check=True)
    assert content(target) == expected
    for record in finished:
        name = record.stem.removeprefix("data-")
        assert (target / f"data-{name}.arrow").stat().st_ino == arrows[name]
    assert left_over(tmp_path / "tokenized") == []


def shown_bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where all bars will be that are shown from now on, as on a terminal."""
    bars: list[Any] = []

    class Bar(preprocess_module.tqdm):
        def __init__(self, **options: Any) -> None:
            bars.append(self)
            super().__init__(**{**options, "disable": False})

    monkeypatch.setattr(preprocess_module, "tqdm", Bar)
    return bars


def interrupt_third_unit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Ctrl-C when two units are done; gives the function that makes a unit otherwise."""
    honest, done = preprocess_module._make_unit, 0

    def make(task: Any) -> Any:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt
        return honest(task)

    monkeypatch.setattr(preprocess_module, "_make_unit", make)
    return honest


def test_progress_is_counted_in_units_and_goes_on(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it where there is no terminal."""
    rows = [{"text": f"number {n} of many"} for n in range(400)]
    interrupt_third_unit(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prepare({"a": rows}, sequence_length=64, unit_bytes=5_000)
    first = capsys.readouterr()
    assert "going on" not in first.out
    assert first.err == ""
    bars = shown_bars(monkeypatch)
    made = prepare({"a": rows}, sequence_length=64, unit_bytes=5_000)["a"]
    said = capsys.readouterr()
    assert said.out == "a: going on, 2 units are done\n"
    units = len(made.files)
    assert f" {units}/{units} [" in said.err
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(2, units, units)]


def test_progress_where_the_number_of_units_is_not_known(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(json_lines([{"text": f"{n**9} of many"} for n in range(2_000)])))
    take_local("a", path, tmp_path / "raw" / "a")
    bars = shown_bars(monkeypatch)
    settings = PreprocessSettings(64, cleaning=CleaningSettings(deduplicate=True))
    made = preprocess(tmp_path, tmp_path, tokenizer_path, settings, unit_bytes=5_000)["a"]
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [
        ("looking for duplicates", len(made.files), None),
        ("preprocess", len(made.files), None),
    ]


_DECONTAMINATED = """
import os, signal, sys
from pathlib import Path
from doge_lm.data import preprocess as module
from doge_lm.data.cleaning import CleaningSettings
place, tokenizer, name, killed_at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
honest, done = module._make_unit, 0
def make(task):
    global done
    done += 1
    if done == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(task)
module._make_unit = make
settings = module.PreprocessSettings(256, cleaning=CleaningSettings(decontaminate=(place / "benchmark.jsonl",)))
module.preprocess(place, place, tokenizer, settings, names=[name], unit_bytes=20_000)
"""


@pytest.mark.slow
def test_runs_at_once_do_not_touch_each_others_ngrams(
    tmp_path: Path, tokenizer_path: Path, library_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another source is done by another run when this one has begun; then this one is killed and run again."""
    (tmp_path / "benchmark.jsonl").write_bytes(json_lines([{"query": library_rows[3]["text"][:2000]}]))
    for name in ("a", "ngrams"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(library_rows[:20]))
        take_local(name, tmp_path / f"{name}.jsonl", tmp_path / "raw" / name)

    def other_run(name: str, killed_at: int = 0) -> int:
        command = [sys.executable, "-c", _DECONTAMINATED, str(tmp_path), str(tokenizer_path), name, str(killed_at)]
        return subprocess.run(command, check=False).returncode

    honest, begun = preprocess_module._make_unit, False

    def make(task: Any) -> Any:
        nonlocal begun
        if not begun:
            begun = True
            assert other_run("ngrams") == 0
        return honest(task)

    monkeypatch.setattr(preprocess_module, "_make_unit", make)
    settings = PreprocessSettings(256, cleaning=CleaningSettings(decontaminate=(tmp_path / "benchmark.jsonl",)))
    made = preprocess(tmp_path, tmp_path, tokenizer_path, settings, names=["a"], unit_bytes=20_000)["a"]
    assert made.accounting["a"].dropped["overlap with a benchmark"].times == 1
    assert left_over(tmp_path) == []
    target = tmp_path / "tokenized" / "a"
    expected = content(target)
    shutil.rmtree(target)
    assert other_run("a", killed_at=3) == -signal.SIGKILL
    assert left_over(tmp_path) != []
    assert other_run("a") == 0
    assert content(target) == expected
    assert left_over(tmp_path) == []


def test_other_settings_are_named(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str], tokenizer_path: Path
) -> None:
    prepare({"a": [GOOD]}, sequence_length=64)
    prepare({"a": [GOOD]}, sequence_length=64)
    assert f"{tmp_path / 'tokenized' / 'a'} is made already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other settings \(max_len: was 64, is 128\); .*--overwrite"):
        prepare({"a": [GOOD]}, sequence_length=128)
    with pytest.raises(UserError, match=r"inputs .*a\.jsonl: was"):
        prepare({"a": [{"text": "a good lime"}]}, sequence_length=64)
    made = preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(128), overwrite=True)
    assert made["a"].sequence_length == 128


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_large_file_without_rows_is_named_though_it_is_cut(
    tmp_path: Path, tokenizer_path: Path, num_proc: int
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.jsonl").write_bytes(b"\n" * 50_000)
    (own / "b.jsonl").write_bytes(b"\n" * 50_000 + json_lines([GOOD]))  # most of its parts hold nothing
    (own / "c.jsonl.gz").write_bytes(gzip.compress(b"\n" * 200_000, compresslevel=0))  # the parent unpacks it
    take_local("a", own, tmp_path / "raw" / "a")
    made = preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(64), unit_bytes=10_000, num_proc=num_proc)[
        "a"
    ]
    assert made.files_without_rows == [str(own / name) for name in ("a.jsonl", "c.jsonl.gz")]


def test_a_source_beside_what_near_duplicates_made_of_it_is_warned_of(
    prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare({"a-dedup": [GOOD]}, sequence_length=64)
    assert "warning" not in capsys.readouterr().out
    prepare({"a": [GOOD]}, sequence_length=64)
    said = capsys.readouterr().out
    assert "warning: a and a-dedup are prepared together, though the second is made of the first" in said
    assert "--datasets" in said


def test_packing_without_shared_samples_is_refused(prepare: Prepare) -> None:
    with pytest.raises(UserError, match=r"--packing concat .* --padding max_length .* leave one of the two out"):
        prepare({"a": [GOOD]}, padding="max_length", packing="concat")


def test_what_was_skipped_is_not_passed_over_by_stop(tmp_path: Path, prepare: Prepare) -> None:
    rows = [GOOD, {"title": "b"}]
    manifest = prepare({"a": rows}, sequence_length=64, on_error="skip")["a"]
    assert manifest.settings["on_error"] == "skip"
    assert prepare({"a": rows}, sequence_length=64, on_error="skip")["a"] == manifest
    with pytest.raises(UserError, match='on_error: was "skip", is absent'):
        prepare({"a": rows}, sequence_length=64)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "brok', sources.INVALID_JSON),
        (b"[1]", sources.INVALID_JSON),
        (b'{"title": "a"}', sources.BAD_FIELD),
        (b'{"text": 5}', sources.BAD_FIELD),
        (b'{"text": "\\udc00"}', sources.LONE_SURROGATE),
        (b'{"text": "\xe4"}', sources.INVALID_UTF8),
        (b'{"text": "' + b"x" * 3_000_000 + b'"}', sources.TOO_LARGE),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_bad_line_is_skipped_and_counted(
    tmp_path: Path, tokenizer_path: Path, line: bytes, reason: str, suffix: str
) -> None:
    path = tmp_path / f"own{suffix}"
    text = json_lines([GOOD] * 2) + line + b"\n" + json_lines([GOOD])
    path.write_bytes({".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}.get(suffix, bytes)(text))
    take_local("a", path, tmp_path / "raw" / "a")
    settings = PreprocessSettings(64, on_error="skip", max_document_bytes=2**20)
    account = preprocess(tmp_path, tmp_path, tokenizer_path, settings)["a"].accounting["a"]
    assert account.dropped[reason].times == 1
    assert account.dropped[reason].bytes == len(line)
    assert account.dropped[reason].example.startswith(f"{path}, line 3")
    assert (account.documents_in, account.documents_kept, account.documents_dropped) == (4, 3, 1)


@pytest.mark.parametrize("unit_bytes", [None, 20_000])
def test_a_truncated_archive_is_kept_up_to_the_cut(
    tmp_path: Path, tokenizer_path: Path, unit_bytes: int | None
) -> None:
    path = tmp_path / "own.jsonl.zst"
    packed = zstandard.compress(json_lines([{"text": f"{n**9} and {n**8}"} for n in range(20_000)]))
    path.write_bytes(packed[: len(packed) * 9 // 10])
    take_local("a", path, tmp_path / "raw" / "a")
    settings = PreprocessSettings(64, on_error="skip")
    account = preprocess(tmp_path, tmp_path, tokenizer_path, settings, unit_bytes=unit_bytes)["a"].accounting["a"]
    assert account.dropped[sources.BROKEN_FILE].times == 1
    assert account.dropped[sources.BROKEN_FILE].example.startswith(f"{path} is truncated")
    assert 10_000 < account.documents_kept < 20_000


@pytest.mark.parametrize("packed", [False, True])
def test_a_share_ends_with_the_document_that_reaches_it(
    tmp_path: Path, prepare: Prepare, tokenizer_path: Path, packed: bool
) -> None:
    """For any number of processes, and whether the last unit is cut as it is made or made anew for it."""
    rows = [{"text": f"number {n} of many"} for n in range(400)]
    whole = prepare({"a": rows}, sequence_length=64, unit_bytes=5_000, place=tmp_path / "all")["a"]
    wanted = whole.accounting["a"].targets // 2
    results = []
    for num_proc in (1, 2):
        place = tmp_path / str(num_proc)
        (place / "own").mkdir(parents=True)
        file = place / "own" / ("a.jsonl.zst" if packed else "a.jsonl")
        file.write_bytes(zstandard.compress(json_lines(rows)) if packed else json_lines(rows))
        take_local("a", file, place / "raw" / "a")
        settings = PreprocessSettings(64, tokens=wanted)
        results.append(preprocess(place, place, tokenizer_path, settings, num_proc=num_proc, unit_bytes=5_000)["a"])
    made = results[0]
    assert 1 < len(made.files) < len(whole.files)
    assert made.files[:-1] == whole.files[: len(made.files) - 1] or packed
    assert wanted <= made.accounting["a"].targets < wanted + 20
    assert results[1].files == made.files
    assert results[1].accounting == made.accounting


def test_a_share_within_one_unit_and_what_is_said_of_it(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json_lines([{"text": f"number {n} of many"} for n in range(4000)]))
    assert command(path, "--tokens", "1000") == 0
    taken = Manifest.read(tmp_path / "tokenized" / "a").accounting["a"].targets
    assert 1000 <= taken < 1020
    assert f"\na: stopped at its share of --tokens: {taken:,} of 1,000 tokens" in capsys.readouterr().out
    assert command(path, "--tokens", "1M", "--overwrite") == 0
    assert "warning: a: has " in capsys.readouterr().out


def test_a_large_file_that_was_rewritten_is_refused(
    tmp_path: Path, prepare: Prepare, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same size; in mid-run, on going on, and when all is done."""
    for module in (preprocess_module, manifest_module):
        monkeypatch.setattr(module, "MAX_IDENTITY_BYTES", 0)
    path = tmp_path / "own" / "a.jsonl"
    rows = [{"text": f"number {n} of many"} for n in range(400)]
    honest = interrupt_third_unit(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prepare({"a": rows}, sequence_length=64, unit_bytes=5_000)
    assert prepare({"b": rows}, sequence_length=64, place=tmp_path / "b")["b"].inputs[0].state
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"interrupted run with other settings \(inputs .*a\.jsonl: was"):
        preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(64), unit_bytes=5_000)

    def change(task: Any) -> Any:
        os.utime(path, ns=(2, 2))
        return honest(task)

    monkeypatch.setattr(preprocess_module, "_make_unit", change)
    with pytest.raises(UserError, match=r"a\.jsonl of the source 'a' was changed while it was read"):
        preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(64), overwrite=True)
    made = preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(64), overwrite=True)["a"]
    assert made.inputs[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    os.utime(path, ns=(3, 3))
    with pytest.raises(UserError, match=r"inputs .*a\.jsonl: was"):
        preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(64))


def test_languages_of_a_source_that_is_not_there(tmp_path: Path, prepare: Prepare) -> None:
    with pytest.raises(UserError, match=r"--languages foo=en names foo, .* \(there: a\)"):
        prepare({"a": [GOOD]}, cleaning=CleaningSettings(languages=("foo=en",)))


def test_what_another_run_left_beside_a_finished_source_is_named(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare({"a": [GOOD]}, sequence_length=64)
    left = tmp_path / "tokenized" / ".tmp-a"
    left.mkdir()
    prepare({"a": [GOOD]}, sequence_length=64)
    assert f"{left} was left by an interrupted run" in capsys.readouterr().out
    # ... but nobody is told to remove what another run is at.
    with resumable_directory(tmp_path / "tokenized" / "a", {}, overwrite=True):
        prepare({"a": [GOOD]}, sequence_length=64)
        said = capsys.readouterr().out
    assert "another process is doing that at this moment" in said
    assert "remove the directory" not in said


def test_concatenation_is_accounted_for_and_trains_on_the_same_tokens(
    tmp_path: Path, prepare: Prepare, library_rows: list[dict[str, Any]]
) -> None:
    rows = library_rows[:12]
    best_fit = prepare({"library": rows}, place=tmp_path / "a", sequence_length=128)["library"]
    concat = prepare({"library": rows}, place=tmp_path / "b", sequence_length=128, packing="concat")["library"]
    one, two = best_fit.split_counts("all"), concat.split_counts("all")
    assert (one.targets, one.context, one.text_bytes) == (two.targets, two.context, two.text_bytes)
    assert concat.accounting["library"].documents_cut > best_fit.accounting["library"].documents_cut
    short = sum(len(row["input_ids"]) < 128 for row in rows_of(tmp_path / "b" / "tokenized" / "library"))
    assert short <= two.samples // 64 + 1  # a group ends after 64 rows
