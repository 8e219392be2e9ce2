"""Parquet in bounded memory: what the headers of pages say, and that reading keeps to it."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
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
from doge_lm.data.sources import BadInputError, scan_rows

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
            return ["x"] * 5000 + texts(4, 60, 400 * KIB) + ["y"] * 100, {"use_dictionary": False}
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


NAMES = [
    "few large among many small",
    "one text again and again",
    "texts that begin alike",
    "no dictionary",
    "ordinary",
]

# In a process of its own, since pyarrow counts its peak from the start of the process.
_READ = """
import json, sys
from pathlib import Path
import pyarrow as pa
from doge_lm.data import parquet

def anonymous():
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

parquet._LARGEST_ROW = 2**19
path, rows = Path(sys.argv[1]), []
with parquet.open_parquet(path) as file:
    with path.open("rb") as pages:
        plan = parquet.plan_reading(pages, file.metadata, 0, ("text",))
    before, allocated = anonymous(), pa.total_allocated_bytes()
    for batch in parquet.parquet_batches(path, file, 0, ("text",)):
        rows += [len(batch), hash(tuple(batch.column("text").to_pylist()))]
    del batch
print(json.dumps([plan.bytes, pa.default_memory_pool().max_memory() - allocated, anonymous() - before]))
"""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("codec", ["zstd", "snappy"])
def test_reading_takes_no_more_than_is_planned(tmp_path: Path, name: str, codec: str) -> None:
    rows, how = made(name)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": rows}), path, compression=codec, row_group_size=10**6, **how)
    size = sum(map(len, rows))
    command = [sys.executable, "-c", _READ, str(path)]
    planned, peak, kept = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert 0.3 * planned < peak < planned + 2**21  # and what is no page: the buffer of the file, offsets
    assert kept < 2**23  # it is given back
    if name == "one text again and again":
        assert planned < size / 2  # not by holding everything
    with open_parquet(path) as file:
        batches = parquet_batches(path, file, 0, ("text",))
        assert [text for batch in batches for text in batch.column("text").to_pylist()] == rows


def test_conversations_are_read_one_by_one(tmp_path: Path) -> None:
    """A few long ones among very many short ones, all of the same words: pages do not show them."""
    path = tmp_path / "a.parquet"
    turn = {"from": "human", "value": "x" * 1000}
    turns = [[turn]] * 3000 + [[turn] * 1000] * 3
    pq.write_table(pa.table({"id": range(3003), "conversations": turns}), path, row_group_size=10**6)
    with open_parquet(path) as file:
        for batch in parquet_batches(path, file, 0, ("conversations",)):
            assert batch.num_rows == 1
            assert batch.nbytes < 2**21


def test_what_a_value_shares_with_the_one_before_is_known_in_both_kinds_of_page(tmp_path: Path) -> None:
    for version in ("1.0", "2.0"):
        path = tmp_path / f"{version}.parquet"
        pq.write_table(pa.table({"text": texts(0, 30, 100)}), path, use_dictionary=False, data_page_version=version,
                       column_encoding={"text": "DELTA_BYTE_ARRAY"})  # fmt: skip
        assert all(page.shares for page in pages_of(path))


def test_offsets_as_other_writers_give_them(tmp_path: Path) -> None:
    """No dictionary may be 0, and some give the dictionary as the first data page."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(0, 30, 100)}), path)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    names = ("data_page_offset", "dictionary_page_offset", "total_compressed_size", "num_values", "path_in_schema")
    values = {name: getattr(chunk, name) for name in names}
    first, second = chunk.dictionary_page_offset, chunk.data_page_offset
    for offsets in ((first, second), (first, None), (first, 0), (second, first)):
        given = SimpleNamespace(**{**values, "data_page_offset": offsets[0], "dictionary_page_offset": offsets[1]})
        with path.open("rb") as file:
            assert list(chunk_pages(file, given)) == pages_of(path)


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
        with pytest.raises(LargePagesError, match=r"a\.parquet, row group 1: .* column `text` take \d+ MiB") as error:
            next(parquet_batches(path, file, 1, ("id", "text")))
    group = pq.read_metadata(path).row_group(1)
    assert error.value.bytes == sum(group.column(index).total_compressed_size for index in range(2))


def test_groups_that_are_too_large_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), use_dictionary=False) as writer:
        for number, length in enumerate((10, 200 * KIB, 10, 200 * KIB, 10)):
            writer.write_table(pa.table({"text": texts(number, 20, length)}))
    monkeypatch.setattr(parquet, "MOST_MEMORY", KIB * KIB)
    items = list(scan_rows(path))
    faults = [item for item in items if isinstance(item, BadInputError)]
    assert [fault.reason for fault in faults] == ["row group of a parquet file with pages that are too large"] * 2
    assert all("row group" in str(fault) and not fault.is_row for fault in faults)
    assert sum(fault.bytes for fault in faults) < path.stat().st_size
    assert [item[0].number for item in items if not isinstance(item, BadInputError)] == [
        *range(1, 21), *range(41, 61), *range(81, 101)
    ]  # fmt: skip
