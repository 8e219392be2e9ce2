"""The readers: four formats, and every way in which a file can be bad."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from doge_lm.data import sources
from doge_lm.data.sources import (
    CATALOGUE,
    ConversationRow,
    TextRow,
    estimated_disk_bytes,
    find_files,
    read_rows,
    split_lines,
    unpacked_chunks,
)
from doge_lm.errors import UserError
from tests.data.conftest import conversation, json_lines

# What `str.splitlines` would cut at, and what else has broken readers before.
ODD_TEXT = "one\u2028two\u0085three\x0cfour\x00five\u2029six\x1eseven\r\neight\tnine 中文 😀 <s>[INST]"
ROWS: list[dict[str, Any]] = [{"text": ODD_TEXT, "prompt": "a\u2028b"}, {"text": "", "extra": 1}, {"text": "last"}]


def write(path: Path, content: bytes) -> Path:
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    elif path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_are_cut_at_line_feeds_only(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", json_lines(ROWS))
    assert list(read_rows([path])) == [TextRow(ODD_TEXT, "a\u2028b"), TextRow(""), TextRow("last")]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_lines_do_not_depend_on_how_the_file_is_read(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PLAIN_CHUNK", chunk)
    monkeypatch.setattr(sources, "_COMPRESSED_CHUNK", chunk)
    for suffix in (".jsonl", ".jsonl.zst"):
        path = write(tmp_path / f"a{suffix}", json_lines(ROWS).rstrip(b"\n"))
        assert [row.text for row in read_rows([path]) if isinstance(row, TextRow)] == [ODD_TEXT, "", "last"]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, type_: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": pa.array([ODD_TEXT] * 150, type_), "prompt": pa.array(["p", None, ""] * 50, type_)})
    pq.write_table(table, path)
    rows = list(read_rows([path]))
    assert len(rows) == 150
    assert rows[:3] == [TextRow(ODD_TEXT, "p"), TextRow(ODD_TEXT), TextRow(ODD_TEXT)]


def test_parquet_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([conversation(("human", "q"), ("gpt", "a"))]), path)
    assert list(read_rows([path])) == [ConversationRow((("human", "q"), ("gpt", "a")))]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\xe2\x80\xa8three\n")
    assert list(read_rows([path])) == [TextRow("one\ntwo\u2028three\n")]


def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\r\n')
    assert list(read_rows([path])) == [TextRow("a"), TextRow("b")]


def test_messages_are_conversations(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    path = write(tmp_path / "a.jsonl", json_lines([row]))
    assert list(read_rows([path])) == [ConversationRow((("system", "s"), ("human", "u")))]


def test_frames_one_after_another(tmp_path: Path) -> None:
    lines = json_lines(ROWS)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines[:20]) + zstandard.compress(lines[20:]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:20]) + gzip.compress(lines[20:]))
    for path in find_files(tmp_path):
        assert len(list(read_rows([path]))) == 3


def test_empty_files_hold_no_rows(tmp_path: Path) -> None:
    packed = {"a.jsonl": b"", "a.jsonl.zst": zstandard.compress(b""), "a.jsonl.gz": gzip.compress(b"")}
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
        assert list(read_rows([tmp_path / name])) == []


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_a_packed_file_without_a_byte_is_broken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    (error,) = sources.scan_rows(tmp_path / name)
    assert isinstance(error, sources.BadInputError)
    assert (error.reason, error.is_row) == (sources.BROKEN_FILE, False)
    assert str(tmp_path / name) in str(error)


def test_a_zst_file_with_a_large_window_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    settings = zstandard.ZstdCompressionParameters(window_log=29, write_content_size=False)
    with path.open("wb") as file, zstandard.ZstdCompressor(compression_params=settings).stream_writer(file) as stream:
        stream.write(json_lines(ROWS))
    (error,) = sources.scan_rows(path)
    assert isinstance(error, sources.BadInputError)
    assert error.reason == sources.UNREADABLE_FILE
    assert "zstd -d --long=31" in str(error)


def test_folders_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "a/2.txt", "a/10.jsonl", ".hidden/3.jsonl", "a/notes.md", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'{"text": "x"}\n')
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert found == ["a/10.jsonl", "a/2.txt", "b/1.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "invalid JSON"),
        (b'{"text": "a\x00"}', "invalid JSON"),
        (b"[1]", "must be an object, this is a list"),
        (b'"text"', "must be an object, this is a string"),
        (b'{"title": "a"}', "`text` or `conversations` is missing (fields there: `title`)"),
        (b'{"text": null}', "`text` is null, not a string"),
        (b'{"text": 5}', "`text` is a number, not a string"),
        (b'{"text": "a", "prompt": ["b"]}', "`prompt` is a list, not a string"),
        (b'{"text": "a\xff"}', "invalid UTF-8 at byte 12"),
        (rb'{"text": "a\ud800b"}', r"`text` holds a lone surrogate ('\ud800')"),
        (b'{"conversations": "a"}', "`conversations` is a string, not a list"),
        (b'{"conversations": ["a"]}', "turn 1 of `conversations` is a string"),
        (b'{"conversations": [{"from": "human"}]}', "turn 1 of `conversations`: the field `value` is missing"),
        (b'{"conversations": [{"from": "tool", "value": "a"}]}', "unknown speaker 'tool'"),
        (b'{"messages": [{"role": "user", "content": null}]}', "`content` is null"),
        (b"[" * 100_000, "JSON that cannot be read"),
        (b'{"n": ' + b"9" * 5000 + b"}", "JSON that cannot be read"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(UserError) as raised:
        list(read_rows([path]))
    assert str(raised.value).startswith(f"{path}, line 3")
    assert message in str(raised.value)


def test_a_row_of_the_wrong_kind_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "a"}, conversation(("human", "q"))]))
    with pytest.raises(UserError, match=r"line 2: the field `text` is missing"):
        list(read_rows([path], "pretrain"))
    with pytest.raises(UserError, match=r"line 1: the field `conversations` or `messages` is missing"):
        list(read_rows([path], "finetune"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0.3, 0.9, -1])
def test_a_truncated_archive_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    rows = [{"text": f"{number**9} {number**7}"} for number in range(20_000)]
    path = write(tmp_path / f"a{suffix}", json_lines(rows))
    content = path.read_bytes()
    path.write_bytes(content[:-1] if kept < 0 else content[: int(len(content) * kept)])
    with pytest.raises(UserError) as raised:
        list(read_rows([path]))
    assert str(raised.value).startswith(f"{path} is truncated: ")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_what_is_not_what_its_name_says(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(UserError, match=name):
        list(read_rows([tmp_path / name]))


def test_damage_inside_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    content = bytearray(gzip.compress(json_lines([{"text": str(number**9)} for number in range(5000)])))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):
        list(read_rows([path]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": [1, 2]}, "the column `text` holds int64, not strings"),
        ({"conversations": ["a"]}, "the column `conversations` holds string, not lists"),
        ({"title": ["a"]}, r"missing \(columns there: `title`\)"),
    ],
)
def test_parquet_columns_of_another_type(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        list(read_rows([tmp_path / "a.parquet"]))


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: several columns are called `text`"):
        list(read_rows([tmp_path / "a.parquet"]))


def test_parquet_names_the_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", None])}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: the field `text` is null"):
        list(read_rows([tmp_path / "a.parquet"]))


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="not a sound parquet file"):
        list(read_rows([path]))


def test_a_document_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(sources, "_PLAIN_CHUNK", 64)
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "a"}, {"text": "b" * 2000}]))
    with pytest.raises(UserError, match="line 2 has more than 1,000 bytes"):
        list(read_rows([path]))
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        list(read_rows([write(tmp_path / "a.txt", b"b" * 2000)]))


def test_files_that_are_missing_or_unknown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_files(tmp_path / "none")
    with pytest.raises(UserError, match="does not exist"):
        list(read_rows([tmp_path / "none.jsonl"]))
    (tmp_path / "a.csv").write_bytes(b"text")
    with pytest.raises(UserError, match="unknown kind"):
        find_files(tmp_path / "a.csv")
    with pytest.raises(UserError, match="holds no readable file"):
        find_files(tmp_path)


def test_the_catalogue_together_needs_two_terabytes() -> None:
    assert sum(estimated_disk_bytes(entry) for entry in CATALOGUE.values()) == pytest.approx(2e12)
    entry = CATALOGUE["cosmopedia-v2"]
    assert estimated_disk_bytes(entry, 1000) < estimated_disk_bytes(entry) / 30_000
    assert estimated_disk_bytes(entry, 10**12) == estimated_disk_bytes(entry)


def test_rows_of_the_shared_data_are_read(shared_data: Path) -> None:
    counts = {path.name: len(list(read_rows([path]))) for path in find_files(shared_data / "mini")}
    expected = {"english": 314, "chinese": 504, "python": 269, "instruct_en": 769, "instruct_zh": 404}
    assert counts == {f"{name}.jsonl.zst": count for name, count in expected.items()}


def test_json_escapes_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": ODD_TEXT}).encode() + b"\n")
    assert list(read_rows([path])) == [TextRow(ODD_TEXT)]


def test_a_bomb_is_unpacked_and_cut_into_lines_in_little_memory(tmp_path: Path) -> None:
    """A file of a few kilobytes that unpacks to 128 MiB of empty lines, each of which takes 8 bytes of a list."""
    path = tmp_path / "bomb.jsonl.zst"
    packer = zstandard.ZstdCompressor()
    with path.open("wb") as file, packer.stream_writer(file) as writer:
        for _ in range(128):
            writer.write(b"\n" * 2**20)
    assert path.stat().st_size < 2**15
    tracemalloc.start()
    try:
        assert next(split_lines(unpacked_chunks(path, ".jsonl.zst"), 2**20)) == b""
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**26
