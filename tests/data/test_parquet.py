"""Parquet in bounded memory: what the headers of pages say, and that reading keeps to it."""

import itertools
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from doge_lm.data import parquet
from doge_lm.data.parquet import (
    BrokenPageError,
    LargePagesError,
    Page,
    chunk_pages,
    open_parquet,
    parquet_batches,
    plan_reading,
)

KIB = 2**10
CODECS = ["none", "snappy", "zstd", "gzip"]


def pages_of(path: Path, group: int = 0, column: int = 0) -> list[Page]:
    with path.open("rb") as file:
        return list(chunk_pages(file, pq.read_metadata(path).row_group(group).column(column)))


def texts(seed: int, count: int, length: int) -> list[str]:
    """Distinct texts that do not compress to nothing."""
    draw = random.Random(seed)
    return [draw.randbytes(length // 2).hex() for _ in range(count)]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", CODECS)
def test_pages_are_those_that_were_written(tmp_path: Path, codec: str, version: str) -> None:
    path = tmp_path / "a.parquet"
    rows = texts(0, 300, 1000)
    pq.write_table(pa.table({"text": rows}), path, compression=codec, data_page_version=version, use_dictionary=False,
                   data_page_size=50_000, write_batch_size=10, write_statistics=False)  # fmt: skip
    pages = pages_of(path)
    assert [page.values for page in pages] == [50] * 6  # 50 texts of 1,004 bytes are the first ten beyond the size
    assert not any(page.is_dictionary or page.shares for page in pages)
    for page in pages:
        assert 50 * 1004 <= page.unpacked <= 50 * 1004 + 64  # levels
        assert (page.packed < 0.7 * page.unpacked) == (codec in ("zstd", "gzip"))
    chunk = pq.read_metadata(path).row_group(0).column(0)
    assert 0 < chunk.total_compressed_size - sum(page.packed for page in pages) < 6 * 200  # the headers
    assert 0 < chunk.total_uncompressed_size - sum(page.unpacked for page in pages) < 6 * 200


def test_a_dictionary_page_comes_first_and_counts_no_values(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(0, 5, 1000) * 20}), path)
    first, second = pages_of(path)
    assert first == Page(is_dictionary=True, packed=first.packed, unpacked=5 * 1004, values=5)
    assert (second.is_dictionary, second.values, second.unpacked < 200) == (False, 100, True)


def test_pages_of_every_chunk_have_its_values(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    turns = [[{"from": "human", "value": "x" * n}] * (n % 4) for n in range(200)]
    pq.write_table(pa.table({"text": texts(1, 200, 90), "conversations": turns}), path, row_group_size=70)
    metadata = pq.read_metadata(path)
    for group, column in itertools.product(range(3), range(metadata.num_columns)):
        values = sum(page.values for page in pages_of(path, group, column) if not page.is_dictionary)
        assert values == metadata.row_group(group).column(column).num_values


def test_long_headers_are_read_whole(tmp_path: Path) -> None:
    """Statistics of a page may hold its least and its greatest value."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * 4000, "b" * 4000]}), path, use_dictionary=False, compression="none",
                   write_page_index=False)  # fmt: skip
    (page,) = pages_of(path)
    assert page.values == 2
    chunk = pq.read_metadata(path).row_group(0).column(0)
    assert chunk.total_compressed_size - page.packed > parquet._HEADER_BYTES


def test_damaged_headers_are_said_to_be_so(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(2, 50, 100)}), path, use_dictionary=False)
    whole = path.read_bytes()
    metadata = pq.read_metadata(path)
    draw = random.Random(3)
    found = 0
    for _ in range(500):
        place = 4 + draw.randrange(30)
        damaged = tmp_path / "b.parquet"
        damaged.write_bytes(whole[:place] + draw.randbytes(draw.randint(1, 8)) + whole[place + 8 :])
        with damaged.open("rb") as file:
            try:
                list(chunk_pages(file, metadata.row_group(0).column(0)))
            except BrokenPageError:  # and no other
                found += 1
    assert found > 100


def test_a_chunk_that_lacks_values(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100}), path, use_dictionary=False)
    metadata = pq.read_metadata(path)
    pq.write_table(pa.table({"text": ["a"] * 10}), path, use_dictionary=False)
    with path.open("rb") as file, pytest.raises(BrokenPageError, match=r"lacks 90 values|breaks off|damaged"):
        list(chunk_pages(file, metadata.row_group(0).column(0)))


def made(name: str) -> tuple[list[str], dict[str, Any]]:
    """Rows that take more than their average, and how they are written."""
    match name:
        case "few large among many small":
            return ["x"] * 5000 + texts(4, 40, 400 * KIB) + ["y"] * 100, {}
        case "one text again and again":
            return texts(5, 1, 300 * KIB) * 500, {}
        case "texts that begin alike":
            return [text * 300 for text in texts(6, 100, 1000)], {
                "use_dictionary": False,
                "column_encoding": {"text": "DELTA_BYTE_ARRAY"},
            }
        case "no dictionary":
            return texts(7, 60, 500 * KIB), {"use_dictionary": False}
        case _:
            return texts(8, 3000, 10 * KIB), {}


@pytest.mark.parametrize(
    "name", ["few large among many small", "one text again and again", "texts that begin alike", "no dictionary", ""]
)
@pytest.mark.parametrize("codec", ["zstd", "snappy"])
def test_reading_takes_no_more_than_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str
) -> None:
    for constant in ("_BATCH_BYTES", "_REPEATED_BYTES", "_LARGE_PAGE"):
        monkeypatch.setattr(parquet, constant, getattr(parquet, constant) // 8)
    rows, how = made(name)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": rows}), path, compression=codec, row_group_size=10**6, **how)
    size = sum(map(len, rows))
    with path.open("rb") as pages:
        plan = plan_reading(pages, pq.read_metadata(path), 0, ("text",))
    before = pa.total_allocated_bytes()
    most = 0
    read: list[str] = []
    with open_parquet(path) as file:
        for batch in parquet_batches(path, file, 0, ("text",)):
            most = max(most, pa.total_allocated_bytes() - before)
            read += batch.column("text").to_pylist()
    assert read == rows
    assert 0 < most <= plan.bytes + 2 * KIB * KIB  # with the buffer of the file
    if name == "one text again and again":
        assert plan.bytes < size / 2  # not by holding everything


def test_ordinary_rows_are_read_many_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(9, 20_000, 100)}), path)
    with path.open("rb") as pages:
        assert plan_reading(pages, pq.read_metadata(path), 0, ("text",)).batch_rows == 7  # 8 MiB by the dictionary
    pq.write_table(pa.table({"text": texts(9, 20_000, 100)}), path, use_dictionary=False)
    with path.open("rb") as pages:
        assert plan_reading(pages, pq.read_metadata(path), 0, ("text",)).batch_rows == 1024


def test_pages_beyond_all_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(40), "text": texts(10, 40, 100 * KIB)}), path, row_group_size=20)
    monkeypatch.setattr(parquet, "MOST_MEMORY", KIB * KIB)
    with open_parquet(path) as file:
        assert next(parquet_batches(path, file, 1, ("id",))).num_rows == 20
        with pytest.raises(LargePagesError, match=r"a\.parquet, row group 1: .* column `text` take \d+ MiB"):
            next(parquet_batches(path, file, 1, ("id", "text")))
