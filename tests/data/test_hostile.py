"""Hostile input through the whole command line: a clear message or a counted skip, never silence.

Every test calls `main([...])` as a user does. With `--on_error stop` a fault must end the stage with a message that
names the file (and the line or row where there is one); with `--on_error skip` the fault must be in the accounting, be
printed, and leave every sound document in place.
"""

import gzip
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import load_from_disk

from doge_lm.cli import main
from doge_lm.data import parquet
from doge_lm.data.manifest import Manifest, SourceAccounting
from tests.conftest import needs_all
from tests.data.conftest import Mount, json_lines, left_over, remount

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402

GIB, MIB = 2**30, 2**20


def sound_rows(count: int, begin: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"Document number {number} has some words."} for number in range(begin, begin + count)]


SOUND = json_lines(sound_rows(3))
MORE = json_lines(sound_rows(3, begin=3))


@dataclass
class Outcome:
    """What a command came to."""

    status: int
    out: str
    err: str

    def complains_of(self, *parts: str) -> None:
        """Checks that the command ended with a message that names all of these, and no traceback."""
        assert self.status == 1, (self.out, self.err)
        message = next(line for line in self.err.splitlines() if line.startswith("error: "))
        for part in parts:
            assert re.search(part, message, re.IGNORECASE), f"{part!r} is not in {message!r}"
        assert "Traceback" not in self.err


class Pipeline:
    """The stages as commands, all in one folder, for a source `a`."""

    def __init__(self, folder: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._tokenizer_path = tokenizer_path
        self._capsys = capsys
        self.max_len = "16"  # a document a row, so that a few documents can be split

    def _run(self, *arguments: str | Path) -> Outcome:
        self._capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    def take(self, path: Path, *, save_dir: Path | None = None) -> Outcome:
        return self._run("download_datasets", "--save_dir", save_dir or self.folder, "--local", f"a={path}")

    def preprocess(self, *flags: str, save_dir: Path | None = None) -> Outcome:
        folders = ("--datasets_dir", self.folder, "--save_dir", save_dir or self.folder)
        rest = ("--tokenizer_path", self._tokenizer_path, "--max_len", self.max_len, *flags)
        return self._run("preprocess_datasets", *folders, *rest)

    def merge(self, *, save_dir: Path | None = None) -> Outcome:
        folders = ("--datasets_dir", self.folder, "--save_dir", save_dir or self.folder)
        return self._run("merge_datasets", *folders, "--test_size", "1")

    def account(self) -> SourceAccounting:
        return Manifest.read(self.folder / "tokenized" / "a").accounting["a"]

    def texts(self, tokenizer: Any) -> list[str]:
        """The documents that are in the rows, decoded; only for documents shorter than a row."""
        found = []
        for row in load_from_disk(str(self.folder / "tokenized" / "a")):
            begin = 0
            for length in row["document_lengths"]:
                found.append(tokenizer.decode(row["input_ids"][begin : begin + length], skip_special_tokens=True))
                begin += length
        return sorted(found)

    def check_skipped(self, outcome: Outcome, *, kept: int, faults: int) -> None:
        """Checks that a stage went through with so many documents, and counted and printed so many faults."""
        assert outcome.status == 0, outcome.err
        account = self.account()
        assert account.documents_kept == kept
        assert sum(entry.times for entry in account.dropped.values()) == faults, account.dropped
        for reason, entry in account.dropped.items():
            assert re.search(rf"dropped, {re.escape(reason)}: {entry.times:,} times", outcome.out), outcome.out

    def check_both_ways(self, path: Path, *names: str, kept: int, faults: int = 1) -> None:
        """Takes a file or folder in; `stop` must name the fault, `skip` must count it and the rest be merged."""
        assert self.take(path).status == 0
        self.preprocess("--on_error", "stop").complains_of(*names)
        assert not (self.folder / "tokenized" / "a").exists()
        # The mode is a setting too: what the first run has left behind may be thrown away.
        self.check_skipped(self.preprocess("--on_error", "skip", "--overwrite"), kept=kept, faults=faults)
        if kept > 2:  # fewer are too few to split
            assert self.merge().status == 0


@pytest.fixture
def pipeline(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> Pipeline:
    return Pipeline(tmp_path / "work", tokenizer_path, capsys)


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of the user's own."""

    def write(content: bytes, name: str = "own.jsonl") -> Path:
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


# ---------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "raw NUL bytes in a string": b'{"text": "one\0two"}',
    "a hole of NUL bytes": b"\0" * 4096,
    "Latin-1": b'{"text": "caf\xe9"}',
    "an overlong form": b'{"text": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"text": "\xed\xa0\x80"}',
    "a lone high surrogate": b'{"text": "\\ud83d alone"}',
    "a lone low surrogate": b'{"text": "\\ude00 alone"}',
    "a lone surrogate in the prompt": b'{"text": "good", "prompt": "\\ud83d"}',
    "cut JSON": b'{"text": "one',
    "no object": b'["text", "one"]',
    "text that is a number": b'{"text": 3}',
    "text that is null": b'{"text": null}',
    "no text": b'{"content": "one"}',
    "nesting without end": b'{"text": ' + b"[" * 200_000,
    "a number of 10,000 digits": b'{"text": "one", "n": ' + b"7" * 10_000 + b"}",
    "an empty text": b'{"text": ""}',
    "a blank text": b'{"text": " \\n\\t "}',
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_bad_line_is_named_or_counted(pipeline: Pipeline, own: Callable[..., Path], line: bytes, suffix: str) -> None:
    content = SOUND + line + b"\n" + MORE
    if suffix == ".jsonl.zst":
        content = zstandard.compress(content)
    path = own(content, f"own{suffix}")
    pipeline.check_both_ways(path, re.escape(str(path)), r"line 4\b", "skip", kept=6)


def test_several_bad_lines_are_counted_each(pipeline: Pipeline, own: Callable[..., Path]) -> None:
    bad = [b'{"text": "caf\xe9"}', b'{"text": "\xff"}', b"{", b'{"text": ""}']
    path = own(SOUND + b"\n".join(bad) + b"\n" + MORE)
    pipeline.check_both_ways(path, r"line 4\b", kept=6, faults=4)
    assert len(pipeline.account().dropped) >= 3  # each reason has a line of its own


def test_nothing_but_faults_is_an_error_in_either_mode(pipeline: Pipeline, own: Callable[..., Path]) -> None:
    path = own(SOUND)
    assert pipeline.take(path).status == 0
    size = path.stat().st_size
    path.write_bytes(b'{"text": "\xff"}\n' + b" " * (size - 15) + b"\n")
    assert path.stat().st_size != size or pipeline.preprocess("--on_error", "skip").status == 1
    assert not (pipeline.folder / "tokenized" / "a").exists()


SEPARATORS = {"U+2028": "\u2028", "U+2029": "\u2029", "U+0085": "\u0085", "form feed": "\f", "VT": "\v", "FS": "\x1c"}


@pytest.mark.parametrize("separator", SEPARATORS.values(), ids=list(SEPARATORS))
def test_only_line_feeds_end_a_line(
    pipeline: Pipeline, own: Callable[..., Path], tokenizer: Any, separator: str
) -> None:
    texts = [f"one{separator}two {number}" for number in range(5)]
    raw = "".join(json.dumps({"text": text}, ensure_ascii=ord(separator) < 32) + "\n" for text in texts)
    assert pipeline.take(own(raw.encode())).status == 0
    pipeline.check_skipped(pipeline.preprocess(), kept=5, faults=0)
    assert pipeline.texts(tokenizer) == texts


def test_an_escaped_nul_is_text(pipeline: Pipeline, own: Callable[..., Path], tokenizer: Any) -> None:
    texts = ["one\0two", "three"]
    assert pipeline.take(own(json_lines({"text": text} for text in texts))).status == 0
    pipeline.check_skipped(pipeline.preprocess(), kept=2, faults=0)
    assert pipeline.texts(tokenizer) == texts
    assert pipeline.account().bytes_trained == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_byte_order_mark_and_crlf_change_nothing(
    pipeline: Pipeline, own: Callable[..., Path], tokenizer: Any, suffix: str
) -> None:
    content = b"\xef\xbb\xbf" + (SOUND + MORE).replace(b"\n", b"\r\n")
    packed = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix](content)
    assert pipeline.take(own(packed, f"own{suffix}")).status == 0
    pipeline.check_skipped(pipeline.preprocess(), kept=6, faults=0)
    assert pipeline.texts(tokenizer) == [row["text"] for row in sound_rows(6)]


def test_a_byte_order_mark_and_crlf_of_a_text_file(
    pipeline: Pipeline, own: Callable[..., Path], tokenizer: Any
) -> None:
    assert pipeline.take(own(b"\xef\xbb\xbfone\r\ntwo\r\n", "own.txt")).status == 0
    pipeline.check_skipped(pipeline.preprocess(), kept=1, faults=0)
    assert pipeline.texts(tokenizer) == ["one\ntwo\n"]


@pytest.fixture(scope="module")
def long_line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents with a line of 200 MB between them, well compressed."""
    path = tmp_path_factory.mktemp("long") / "own.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as stream:
        stream.write(SOUND + b'{"text": "')
        for _ in range(200):
            stream.write(b"some words " * (MIB // 11))
        stream.write(b'"}\n' + MORE)
    return path


@pytest.mark.slow
def test_a_line_of_200_mb_is_named_or_counted(pipeline: Pipeline, long_line: Path) -> None:
    assert pipeline.take(long_line).status == 0
    limit = ("--max_document_bytes", "100000000")
    pipeline.preprocess(*limit).complains_of(re.escape(str(long_line)), r"line 4\b", "--max_document_bytes")
    outcome = pipeline.preprocess(*limit, "--on_error", "skip", "--overwrite")
    pipeline.check_skipped(outcome, kept=6, faults=1)
    (dropped,) = pipeline.account().dropped.values()
    assert dropped.bytes >= 100 * MIB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_line_of_200_mb_takes_bounded_memory(pipeline: Pipeline, long_line: Path, tokenizer_path: Path) -> None:
    assert pipeline.take(long_line).status == 0
    folders = ("--datasets_dir", str(pipeline.folder), "--save_dir", str(pipeline.folder))
    flags = ("--max_document_bytes", "16000000", "--on_error", "skip", "--num_proc", "2")
    command = [sys.executable, "-m", "doge_lm.cli", "preprocess_datasets", *folders, *flags]
    measured = memory.measure([*command, "--tokenizer_path", str(tokenizer_path), "--max_len", "64"])
    assert measured.exit_status == 0
    assert 0 < measured.peak_of_sum_bytes <= GIB + 2 * 300 * MIB
    assert pipeline.account().documents_kept == 6


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def test_empty_files_of_lines_hold_nothing(pipeline: Pipeline, own: Callable[..., Path]) -> None:
    folder = own(SOUND, "b.jsonl").parent
    for name, content in {
        "a.jsonl": b"", "c.jsonl": b"\n\r\n \n", "d.jsonl": b"\xef\xbb\xbf",
        "e.jsonl.zst": zstandard.compress(b""), "f.jsonl.gz": gzip.compress(b""),
    }.items():  # fmt: skip
        own(content, name)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "g.parquet")
    assert pipeline.take(folder).status == 0
    pipeline.check_skipped(pipeline.preprocess(), kept=3, faults=0)


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_packed_file_without_a_byte_is_named_or_counted(
    pipeline: Pipeline, own: Callable[..., Path], suffix: str
) -> None:
    folder = own(SOUND, "a.jsonl").parent
    empty = own(b"", f"b.jsonl{suffix}")
    pipeline.check_both_ways(folder, re.escape(str(empty)), "empty", kept=3)


def test_an_empty_text_file_is_named_or_counted(pipeline: Pipeline, own: Callable[..., Path]) -> None:
    folder = own(b"some words", "a.txt").parent
    own(b"other words", "c.txt")
    empty = own(b"", "b.txt")
    pipeline.check_both_ways(folder, re.escape(str(empty)), "empty", kept=2)


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.zst", "own.parquet"])
def test_a_source_of_empty_files_is_refused(pipeline: Pipeline, own: Callable[..., Path], name: str) -> None:
    path = own(b"", name)
    pipeline.take(path).complains_of(re.escape(str(path)))
    assert not (pipeline.folder / "raw" / "a").exists()


def incompressible_rows(count: int) -> bytes:
    rng = random.Random(0)
    return json_lines({"text": " ".join(str(rng.getrandbits(40)) for _ in range(8))} for _ in range(count))


@pytest.mark.parametrize("share", [0.5, 0.999])
@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_compressed_file_that_is_cut_is_named_or_counted(
    pipeline: Pipeline, own: Callable[..., Path], suffix: str, share: float
) -> None:
    raw = incompressible_rows(5000)
    packed = zstandard.compress(raw) if suffix == ".zst" else gzip.compress(raw)
    folder = own(SOUND, "a.jsonl").parent
    cut = own(packed[: int(len(packed) * share)], f"b.jsonl{suffix}")
    own(MORE, "c.jsonl")
    assert pipeline.take(folder).status == 0
    pipeline.preprocess().complains_of(re.escape(str(cut)), "truncated")
    outcome = pipeline.preprocess("--on_error", "skip", "--overwrite")
    assert outcome.status == 0, outcome.err
    account = pipeline.account()
    assert any("cut off" in reason and entry.times == 1 for reason, entry in account.dropped.items()), account
    assert "cut off" in outcome.out
    assert 6 <= account.documents_kept < 5006  # the other files, and at most the rows before the cut


def test_a_compressed_file_of_rubbish_is_named_or_counted(pipeline: Pipeline, own: Callable[..., Path]) -> None:
    folder = own(SOUND, "a.jsonl").parent
    rubbish = own(random.Random(0).randbytes(5000), "b.jsonl.zst")
    pipeline.check_both_ways(folder, re.escape(str(rubbish)), "zstd", kept=3)


@pytest.mark.parametrize(
    "column",
    [pa.array([1, 2]), pa.array([["one"], ["two"]]), pa.array([b"one", b"\xff"], pa.binary())],
    ids=["numbers", "lists", "bytes"],
)
def test_a_parquet_column_of_another_type_is_named_or_counted(
    pipeline: Pipeline, own: Callable[..., Path], column: pa.Array
) -> None:
    folder = own(SOUND, "a.jsonl").parent
    path = folder / "b.parquet"
    pq.write_table(pa.table({"text": column}), path)
    pipeline.check_both_ways(folder, re.escape(str(path)), "text", kept=3)


def test_null_rows_of_a_parquet_file_are_named_or_counted(pipeline: Pipeline, own: Callable[..., Path]) -> None:
    folder = own(SOUND, "a.jsonl").parent
    path = folder / "b.parquet"
    pq.write_table(pa.table({"text": ["one", None, "three", None]}), path)
    pipeline.check_both_ways(folder, re.escape(str(path)), r"row 2\b", kept=5, faults=2)


def test_a_parquet_file_that_is_cut_is_named_or_counted(pipeline: Pipeline, own: Callable[..., Path]) -> None:
    folder = own(SOUND, "a.jsonl").parent
    path = folder / "b.parquet"
    pq.write_table(pa.table({"text": ["one two three"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-50])
    pipeline.check_both_ways(folder, re.escape(str(path)), "parquet", kept=3)


@pytest.fixture(scope="module")
def large_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files with a page of 144 MB among tiny rows, one text in very many rows, and a dictionary of 120 MB."""
    folder = tmp_path_factory.mktemp("pages")
    words = random.Random(0).randbytes(6 * 10**6).hex()
    skewed = ["a few words"] * 20_000 + [f"{number} {words}" for number in range(12)] + ["more words"] * 100
    pq.write_table(pa.table({"text": skewed}), folder / "a.parquet", row_group_size=10**6, compression="zstd")
    pq.write_table(pa.table({"text": [words[:900_000]] * 900}), folder / "b.parquet")
    pq.write_table(pa.table({"text": [f"{number} {words[:120_000]}" for number in range(1000)]}), folder / "c.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_large_pages_of_parquet_take_bounded_memory(
    pipeline: Pipeline, large_pages: Path, tokenizer_path: Path
) -> None:
    assert pipeline.take(large_pages).status == 0
    folders = ("--datasets_dir", str(pipeline.folder), "--save_dir", str(pipeline.folder))
    flags = ("--on_error", "skip", "--max_chars", "1000", "--num_proc", "2")
    command = [sys.executable, "-m", "doge_lm.cli", "preprocess_datasets", *folders, *flags]
    measured = memory.measure([*command, "--tokenizer_path", str(tokenizer_path), "--max_len", "64"])
    assert measured.exit_status == 0
    assert 0 < measured.peak_of_sum_bytes <= GIB + 2 * 300 * MIB
    account = pipeline.account()
    assert account.documents_kept == 20_100
    assert account.dropped["document above --max_document_bytes"].times == 12
    assert account.dropped["more than 1000 characters"].times == 1900


def test_pages_that_no_memory_is_enough_for_are_named_or_counted(
    pipeline: Pipeline, own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own(SOUND, "a.jsonl").parent
    path = folder / "b.parquet"
    pq.write_table(pa.table({"text": ["one two three"] * 1000}), path)
    monkeypatch.setattr(parquet, "MOST_MEMORY", 100)
    pipeline.check_both_ways(folder, re.escape(str(path)), "row group 0", "smaller pages", kept=3)


class _Opened:
    """Calls a function when a file is first opened, by Python's audit events (which know no removal)."""

    def __init__(self, path: Path, action: Callable[[], None]) -> None:
        self._path = str(path)
        self._action: Callable[[], None] | None = action
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._action is not None and arguments and str(arguments[0]) == self._path:
            action, self._action = self._action, None
            action()

    @property
    def happened(self) -> bool:
        return self._action is None


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".txt"])
def test_a_file_that_grows_while_it_is_read_is_refused(
    pipeline: Pipeline, own: Callable[..., Path], suffix: str, mode: str
) -> None:
    pack = zstandard.compress if suffix == ".jsonl.zst" else bytes
    path = own(pack(SOUND), f"own{suffix}")
    assert pipeline.take(path).status == 0

    def grow() -> None:
        with path.open("ab") as file:
            file.write(pack(MORE))

    opened = _Opened(path, grow)
    outcome = pipeline.preprocess("--on_error", mode)
    assert opened.happened
    outcome.complains_of(re.escape(str(path)), "bytes|changed|grew|grown")
    assert not (pipeline.folder / "tokenized" / "a").exists()


def test_a_file_that_has_grown_since_it_was_taken_in_is_refused(pipeline: Pipeline, own: Callable[..., Path]) -> None:
    path = own(SOUND)
    assert pipeline.take(path).status == 0
    own(SOUND + MORE)
    pipeline.preprocess().complains_of(re.escape(str(path)), "bytes", "download_datasets")


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=[pytest.mark.slow, needs_all])])
@pytest.mark.timeout(300)
def test_tiny_files(pipeline: Pipeline, tmp_path: Path, count: int) -> None:
    for number in range(count):
        if number % 1000 == 0:
            folder = tmp_path / "own" / f"{number // 1000:03d}"
            folder.mkdir(parents=True)
        (folder / f"{number % 1000:03d}.txt").write_bytes(b"Document %d." % number)
    assert pipeline.take(tmp_path / "own").status == 0
    pipeline.check_skipped(pipeline.preprocess(), kept=count, faults=0)
    assert pipeline.merge().status == 0
    merged = Manifest.read(pipeline.folder / "pretrain")
    assert merged.split_counts("train").pieces + merged.split_counts("test").pieces == count


# ---------------------------------------------------------------------------------------------------------------
# Where it is written
# ---------------------------------------------------------------------------------------------------------------


def in_stage(pipeline: Pipeline, stage: str, source: Path, save_dir: Path) -> Outcome:
    """Runs the stages before, and then the one that is meant, with another place to write to."""
    if stage == "download":
        return pipeline.take(source, save_dir=save_dir)
    assert pipeline.take(source).status == 0
    if stage == "preprocess":
        return pipeline.preprocess(save_dir=save_dir)
    assert pipeline.preprocess().status == 0
    return pipeline.merge(save_dir=save_dir)


@pytest.mark.parametrize("stage", ["download", "preprocess", "merge"])
def test_an_output_that_is_read_only(pipeline: Pipeline, own: Callable[..., Path], mounted: Mount, stage: str) -> None:
    place = mounted("size=1m,ro")
    in_stage(pipeline, stage, own(SOUND), place).complains_of("cannot be written|cannot write", str(place))
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("stage", ["preprocess", "merge"])
def test_a_full_disk_and_the_same_command_with_more_room(
    pipeline: Pipeline, own: Callable[..., Path], mounted: Mount, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    place = mounted("size=512k")
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=GIB))  # so that merging begins at all
    pipeline.max_len = "256"  # no document is cut: cut ones would all share rows
    source = own(incompressible_rows(8000))
    in_stage(pipeline, stage, source, place).complains_of("disk is full", str(place), "--save_dir")
    assert not any(place.rglob("manifest.json"))
    remount(place, "size=64m")
    again = pipeline.preprocess(save_dir=place) if stage == "preprocess" else pipeline.merge(save_dir=place)
    assert again.status == 0, again.err
    made = place / ("tokenized/a" if stage == "preprocess" else "pretrain")
    plain = pipeline.preprocess() if stage == "preprocess" else pipeline.merge()
    assert plain.status == 0
    expected = pipeline.folder / made.relative_to(place)
    names = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    for name in names:
        assert (made / name).read_bytes() == (expected / name).read_bytes(), name
    assert left_over(place) == []


def test_a_disk_too_full_for_the_smallest_file(pipeline: Pipeline, own: Callable[..., Path], mounted: Mount) -> None:
    place = mounted("size=64k")
    (place / "filler").write_bytes(b"x" * (60 * 1024))
    with (place / "filler").open("ab", buffering=0) as file:
        try:
            while file.write(b"x" * 1024):
                pass
        except OSError:
            pass  # full, as intended
    pipeline.take(own(SOUND), save_dir=place).complains_of("disk is full", str(place))
    assert not (place / "raw" / "a").exists()
