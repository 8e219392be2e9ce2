import gzip
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import load_dataset
from torch.utils.data import DataLoader

from doge_lm.data import manifest, sources, streaming
from doge_lm.data.encoders import load_encoder
from doge_lm.data.parquet import parquet_batches
from doge_lm.data.sources import TextRow
from doge_lm.data.streaming import (
    FileSource,
    HeldOut,
    HubSource,
    RowStream,
    StreamSettings,
    StreamSource,
    StreamState,
    hold_out,
    open_source,
    sample_texts,
)
from doge_lm.errors import UserError
from tests.data.loopback import Repository, hub_files, hub_handler, serve

from .conftest import json_lines

LENGTH = 64
NOTHING_HELD_OUT = HeldOut([], frozenset())


@pytest.fixture
def settings(tokenizer_path: Path) -> StreamSettings:
    return StreamSettings(tokenizer_path, LENGTH, seed=7)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tokenizer_path: Path) -> None:
    """Blocks, parts and files of some kilobytes, and a tokenizer that is opened once."""
    encoder = load_encoder(tokenizer_path, "tokenizers")
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 4000)
    monkeypatch.setattr(streaming, "_PART_BYTES", 1500)
    monkeypatch.setattr(streaming, "_SMALL_FILE_BYTES", 100)
    monkeypatch.setattr(streaming, "load_encoder", lambda path, backend: encoder)


def texts(name: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{name} {number}: " + "word " * (number % 40 + 5)} for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every kind of file; a document says where it stands."""
    place = tmp_path / "text"
    place.mkdir()
    (place / "a.jsonl").write_bytes(json_lines(texts("plain", 60)))
    (place / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(texts("gzip", 50)), mtime=0))
    (place / "c.jsonl.zst").write_bytes(zstandard.compress(json_lines(texts("zstd", 70))))
    pq.write_table(pa.Table.from_pylist(texts("parquet", 40)), place / "d.parquet", row_group_size=15)
    (place / "e.txt").write_text("text 0: a whole file", encoding="utf-8")
    return place


def documents(tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """The names (`zstd 12`) of the documents that begin in rows."""
    found = []
    for row in rows:
        ends = np.cumsum(row["document_lengths"])
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            if row["input_ids"][start] == tokenizer.bos_token_id:
                found.append(tokenizer.decode(row["input_ids"][start + 1 : end].tolist()).strip().split(":")[0])
    return found


def named_texts() -> dict[str, str]:
    sizes = {"plain": 60, "gzip": 50, "zstd": 70, "parquet": 40}
    rows = [row["text"] for name, count in sizes.items() for row in texts(name, count)]
    return {text.split(":")[0]: text for text in [*rows, "text 0: a whole file"]}


def everything() -> list[str]:
    return sorted(named_texts())


def take(stream: RowStream, start: int, stop: int) -> list[dict[str, Any]]:
    return [stream[index] for index in range(start, stop)]


def same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    return len(one) == len(two) and all(
        a["input_ids"].tolist() == b["input_ids"].tolist()
        and a["document_lengths"].tolist() == b["document_lengths"].tolist()
        and a["text_bytes"] == b["text_bytes"]
        for a, b in zip(one, two, strict=True)
    )


def epoch_rows(source: StreamSource, settings: StreamSettings, held_out: HeldOut, epoch: int) -> list[dict[str, Any]]:
    """The rows of one epoch: by the epochs of the states, every row's block being asked for."""
    stream = RowStream(source, settings, held_out, length=10**9)
    rows = []
    for index in itertools.count():
        row = stream[index]
        reached = stream.state(index).epoch
        if reached == epoch:
            rows.append(row)
        if reached > epoch:
            stream.close()
            return rows
    raise AssertionError


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_gives_every_document_once(folder: Path, settings: StreamSettings, tokenizer: Any, epoch: int) -> None:
    rows = epoch_rows(FileSource(folder), settings, NOTHING_HELD_OUT, epoch)
    assert sorted(documents(tokenizer, rows)) == everything()
    assert all(len(row["input_ids"]) <= LENGTH for row in rows)


def test_epochs_and_seeds_have_orders_of_their_own(folder: Path, settings: StreamSettings, tokenizer: Any) -> None:
    orders = [
        documents(tokenizer, epoch_rows(FileSource(folder), StreamSettings(Path(), LENGTH, seed), NOTHING_HELD_OUT, 0))
        for seed in (1, 2)
    ]
    orders.append(documents(tokenizer, epoch_rows(FileSource(folder), settings, NOTHING_HELD_OUT, 1)))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def hub(folder: Path, kind: str = "json") -> HubSource:
    names = {"json": ["a.jsonl", "c.jsonl.zst"], "parquet": ["d.parquet", "g.parquet"]}[kind]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(texts("more", 100)), folder / "g.parquet", row_group_size=25)

    def load() -> Any:
        return load_dataset(kind, data_files=[str(folder / name) for name in names], split="train", streaming=True)

    return HubSource("owner/name", "abc", load)


@pytest.mark.parametrize("kind", ["files", "json", "parquet"])
def test_a_stream_goes_on_from_every_row_as_if_it_had_not_stopped(
    folder: Path, settings: StreamSettings, kind: str
) -> None:
    source: StreamSource = FileSource(folder) if kind == "files" else hub(folder, kind)
    whole = RowStream(source, settings, NOTHING_HELD_OUT, length=10**9)
    rows: list[dict[str, Any]] = []
    states: list[StreamState] = []
    while not states or states[-1].epoch < 2:
        rows.append(whole[len(rows)])
        states.append(whole.state(len(rows)))
    for stop in range(0, len(rows) - 10, 7):
        state = StreamState(**json.loads(json.dumps(vars(states[stop]))))
        assert state.row <= stop + 1
        resumed = RowStream(source, settings, NOTHING_HELD_OUT, length=10**9, start=state)
        assert same(take(resumed, stop + 1, stop + 11), rows[stop + 1 : stop + 11])
    assert len({state.row for state in states}) > 8


def test_the_hub_gives_its_rows_in_its_own_order_of_blocks(
    folder: Path, settings: StreamSettings, tokenizer: Any
) -> None:
    found = documents(tokenizer, epoch_rows(hub(folder), settings, NOTHING_HELD_OUT, 0))
    assert sorted(found) == [name for name in everything() if name.startswith(("plain", "zstd"))]
    assert all(name.startswith("plain") for name in found[:10])


def test_a_run_that_had_ended_stands_where_it_stood(folder: Path, settings: StreamSettings) -> None:
    """As one that is resumed and has no row left to read."""
    source = FileSource(folder)
    stream = RowStream(source, settings, NOTHING_HELD_OUT, length=10**9)
    take(stream, 0, 40)
    end = stream.state(40).row + 2
    assert end > 20
    resumed = RowStream(source, settings, NOTHING_HELD_OUT, length=end, start=stream.state(40))
    assert resumed.state(end) == stream.state(40)
    with pytest.raises(ValueError, match="not among those"):
        resumed.state(end - 3)


def test_the_number_of_workers_changes_nothing(
    folder: Path, settings: StreamSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FileSource(folder)
    taken = []
    for workers in (1, 2):
        stream = RowStream(source, settings, NOTHING_HELD_OUT, length=10**9, workers=workers)
        taken.append(take(stream, 0, 150))
        stream.close()
    assert same(*taken)


def test_a_share_of_the_rows_can_be_asked_for(folder: Path, settings: StreamSettings) -> None:
    """As each of several processes does."""
    source = FileSource(folder)
    rows = take(RowStream(source, settings, NOTHING_HELD_OUT, length=100), 0, 60)
    share = RowStream(source, settings, NOTHING_HELD_OUT, length=100)
    assert same([share[index] for index in range(1, 60, 3)], rows[1::3])
    with pytest.raises(IndexError, match="has passed"):
        share[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_another_process_cannot_read_it(folder: Path, settings: StreamSettings) -> None:
    """Each worker of a DataLoader would read and tokenize all of it, and the state would be known in none."""
    stream = RowStream(FileSource(folder), settings, NOTHING_HELD_OUT, length=100)
    with pytest.raises(TypeError, match="num_workers=0"):
        pickle.dumps(stream)
    with pytest.raises(RuntimeError, match="num_workers=0"):
        next(iter(DataLoader(stream, num_workers=1, multiprocessing_context="fork")))  # type: ignore[arg-type]
    assert next(iter(DataLoader(stream, batch_size=None)))["input_ids"].tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
def test_the_backend_changes_nothing(
    folder: Path, settings: StreamSettings, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    """A run may so be resumed where the other one is not installed."""
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    source = FileSource(folder)
    expected = take(RowStream(source, settings, NOTHING_HELD_OUT, length=10**9), 0, 60)
    opened: list[str] = []

    def load(path: Path, name: Any) -> Any:
        opened.append(name)
        return load_encoder(path, name)

    monkeypatch.setattr(streaming, "load_encoder", load)
    chosen = StreamSettings(tokenizer_path, LENGTH, seed=7, backend=backend)
    rows = take(RowStream(source, chosen, NOTHING_HELD_OUT, length=10**9), 0, 60)
    assert opened == [backend]
    assert same(rows, expected)


def test_the_backends_are_compared_on_texts_of_several_files(
    folder: Path, settings: StreamSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "f.jsonl").write_bytes(BAD)
    source = FileSource(folder)
    sample = sample_texts(source, settings.seed)
    assert {"plain", "gzip", "zstd", "parquet", "text"} == {text.split()[0] for text in sample if text.strip()}
    assert set(sample) <= {"", "  ", *named_texts().values()}
    monkeypatch.setattr(streaming, "_SAMPLE_CHARACTERS", 1000)
    assert sum(map(len, sample_texts(source, settings.seed))) == 1000


def test_only_what_is_asked_for_is_read_ahead(
    folder: Path, settings: StreamSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FileSource(folder)
    given = []

    class Counting:
        identity, content = source.identity, source.content

        def chunks(self, seed: int, epoch: int, place: dict[str, Any]) -> Any:
            for chunk in source.chunks(seed, epoch, place):
                given.append(chunk)
                yield chunk

        lanes, way_back = source.lanes, source.way_back

    stream = RowStream(Counting(), settings, NOTHING_HELD_OUT, length=10**9)
    assert not given
    assert stream[0]
    assert sum(chunk.bytes for _, chunk in given) < 4000 + 1500 * 4


def test_documents_of_the_test_set_are_never_given_again(
    folder: Path, settings: StreamSettings, tokenizer: Any
) -> None:
    # A copy of each plain document stands in another file.
    (folder / "f.jsonl").write_bytes(json_lines(texts("plain", 60)))
    source = FileSource(folder)
    held_out = hold_out(source, settings, 12)
    tested = documents(tokenizer, [streaming.row_values(row) for row in held_out.rows])
    trained = documents(tokenizer, epoch_rows(source, settings, held_out, 0))
    assert len(held_out.rows) == 12
    assert len(tested) == len(set(tested)) > 12
    assert len({name.split()[0] for name in tested}) >= 4  # of several files
    held = {name for name, text in named_texts().items() if streaming._digest(TextRow(text)) in held_out.digests}
    assert set(tested) <= held  # what begins in the rows that are over is given nowhere
    assert set(trained) == set(everything()) - held
    again = hold_out(source, settings, 12)
    assert again.digests == held_out.digests
    data = streaming.held_out_dataset(held_out, len(tokenizer))
    assert data[3]["input_ids"].tolist() == held_out.rows[3].input_ids.tolist()
    assert set(data["source"]) == {"stream"}


@pytest.mark.parametrize("lane_bytes", [1, 400, 10**6])
def test_one_row_group_is_open_at_a_time_when_places_are_read_by_turns(
    tmp_path: Path, settings: StreamSettings, monkeypatch: pytest.MonkeyPatch, lane_bytes: int
) -> None:
    """An open one holds a page, which may have hundreds of MB. What is chosen is as if all were read by turns."""
    for name in ("a", "b"):
        table = pa.Table.from_pylist(texts(name, 300))
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=25, use_dictionary=False)
    monkeypatch.setattr(streaming, "_LANE_BYTES", lane_bytes)
    monkeypatch.setattr(streaming, "_ROW_BYTES", 1)
    monkeypatch.setattr(streaming, "_SAMPLE_CHARACTERS", 8000)
    source = FileSource(tmp_path)
    assert len(source.lanes(settings.seed)) == 16
    found, opened, most = [], 0, 0

    def batches(*arguments: Any) -> Iterator[pa.RecordBatch]:
        nonlocal opened, most
        opened += 1
        most = max(most, opened)
        try:
            yield from parquet_batches(*arguments)
        finally:
            opened -= 1

    monkeypatch.setattr(sources, "parquet_batches", batches)
    for by_turns in (True, False):
        with monkeypatch.context() as patched:
            if by_turns:
                patched.setattr(streaming, "_closed_chunks_of", streaming._chunks_of)
            held_out = hold_out(source, settings, 20)
            rows = [streaming.row_values(row) for row in held_out.rows]
            found.append((held_out.digests, rows, sample_texts(source, settings.seed)))
        assert opened == 0
        assert most == (16 if by_turns else 1)
        most = 0
    (digests, rows, sample), (digests_again, rows_again, sample_again) = found
    assert len(digests) > 32  # more than two rounds
    assert digests_again == digests
    assert same(rows_again, rows)
    assert sample_again == sample


def test_empty_rows_of_parquet_are_not_held_when_places_are_read_by_turns(tmp_path: Path, tokenizer: Any) -> None:
    """Millions of them are a few bytes of a file. The first of them is an error all the same."""
    rows = [*texts("a", 3), *[{"text": " "}] * 5000, *texts("b", 300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = FileSource(tmp_path)
    [[stretch]] = [list(lane) for lane in source.lanes(7)]
    assert isinstance(stretch, streaming.Stretch)
    assert len(stretch.rows) == 3 + 1 + 300
    assert len(hold_out(source, StreamSettings(Path(), LENGTH, skip_bad_rows=True), 20).rows) == 20
    with pytest.raises(UserError, match=r"a\.parquet, row 4: empty text; mend"):
        hold_out(source, StreamSettings(Path(), LENGTH), 20)


def test_too_little_text_for_the_test_set_is_an_error(folder: Path, settings: StreamSettings) -> None:
    with pytest.raises(UserError, match="too few to hold 5,000 out") as error:
        hold_out(FileSource(folder), settings, 5000)
    [[rows, advised]] = re.findall(r"about (\d+) rows .* --set stream_test_rows=(\d+),", str(error.value))
    assert int(advised) == int(rows) // 10 > 5


def test_a_stream_without_a_row_to_give_is_an_error(tmp_path: Path, settings: StreamSettings) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="gives no row to train on"):
        RowStream(FileSource(tmp_path), settings, NOTHING_HELD_OUT, length=10)[0]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts("plain", 5)))
    source = FileSource(tmp_path)
    held_out = HeldOut([], frozenset(streaming._digest(TextRow(row["text"])) for row in texts("plain", 5)))
    with pytest.raises(UserError, match="gives no row to train on"):
        RowStream(source, settings, held_out, length=10)[0]


BAD = b'{"text": 1}\n{"text": "  "}\nno json\n{"text": "\xff"}\n'


def test_bad_rows_stop_the_stream_with_their_place(tmp_path: Path, settings: StreamSettings) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts("plain", 3)) + BAD)
    with pytest.raises(UserError, match=r"a\.jsonl, line 4: .*`text` is a number.*stream_on_error=skip"):
        RowStream(FileSource(tmp_path), settings, NOTHING_HELD_OUT, length=10)[0]


@pytest.mark.parametrize("small_file", [100, 10**6])  # read by the parent, or by a worker
def test_a_file_that_is_cut_off_stops_the_stream(
    tmp_path: Path, settings: StreamSettings, monkeypatch: pytest.MonkeyPatch, small_file: int
) -> None:
    monkeypatch.setattr(streaming, "_SMALL_FILE_BYTES", small_file)
    packed = zstandard.compress(json_lines([{"text": f"{number} " * 50} for number in range(5000)]), level=1)
    (tmp_path / "b.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"b\.jsonl\.zst is truncated.*stream_on_error=skip"):
        take(RowStream(FileSource(tmp_path), settings, NOTHING_HELD_OUT, length=10**9), 0, 10**6)


def test_a_document_that_is_too_large_is_bad(
    tmp_path: Path, settings: StreamSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "MAX_DOCUMENT_BYTES", 1000)
    rows = [*texts("plain", 2), {"text": "x" * 1000}]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    with pytest.raises(UserError, match=r"a\.jsonl, line 3 has more than 1,000 bytes; cut the document up; mend"):
        RowStream(FileSource(tmp_path), settings, NOTHING_HELD_OUT, length=9)[0]

    class Large(list[dict[str, Any]]):
        def state_dict(self) -> dict[str, Any]:
            return {}

    source = HubSource("owner/name", "abc", lambda: Large([*rows, {"text": "x" * 1001}]))
    with pytest.raises(UserError, match="name, row 4 has more than 1,000 characters; cut the document up; mend"):
        RowStream(source, settings, NOTHING_HELD_OUT, length=9)[0]


def test_lines_are_not_counted_for_every_bad_row_that_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file with a bad row in each of its parts would be read from the beginning for each of them."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts("plain", 30)) + BAD)
    monkeypatch.setattr(sources, "LinesBefore", None)
    reports: list[str] = []
    settings = StreamSettings(Path(), LENGTH, skip_bad_rows=True)
    take(RowStream(FileSource(tmp_path), settings, NOTHING_HELD_OUT, length=10**9, report=reports.append), 0, 100)
    assert len(reports) == 4
    assert all("lines counted from byte " in report for report in reports)


def test_a_file_that_grows_while_it_is_streamed_is_refused(tmp_path: Path, settings: StreamSettings) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts("plain", 200)))
    stream = RowStream(FileSource(tmp_path), settings, NOTHING_HELD_OUT, length=10**9)
    assert stream[0]
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(json_lines(texts("late", 1)))
    with pytest.raises(UserError, match=r"a\.jsonl changes while it is read.*stream a copy"):
        take(stream, 1, 10**4)
    source = FileSource(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl does not exist any more.*stream a copy"):
        RowStream(source, settings, NOTHING_HELD_OUT, length=10**9)[0]


def test_a_large_row_group_comes_in_stretches(
    tmp_path: Path, settings: StreamSettings, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_SMALL_GROUP_BYTES", 5000)
    rows = [{"text": f"row {number}: {number * 7919**5 % 10**40:040d} " * 3} for number in range(300)]
    pq.write_table(pa.Table.from_pylist(rows[:290]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[290:]), tmp_path / "b.parquet")
    chunks = [chunk for _, chunk in FileSource(tmp_path).chunks(1, 0, {})]
    assert len(chunks) > 10
    assert all(chunk.bytes < 5000 for chunk in chunks)
    found = documents(tokenizer, epoch_rows(FileSource(tmp_path), settings, NOTHING_HELD_OUT, 0))
    assert sorted(found) == sorted(row["text"].split(":")[0] for row in rows)


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_does_not_go_on_with_other_text(
    folder: Path, settings: StreamSettings, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Up to some GB every byte counts; of more, names, sizes and the ends of the files."""
    if not whole:
        monkeypatch.setattr(streaming, "MAX_IDENTITY_BYTES", 100)
        monkeypatch.setattr(manifest, "HASHED_END_BYTES", 10)

    def resume() -> RowStream:
        return RowStream(FileSource(folder), settings, NOTHING_HELD_OUT, length=10**9, start=state)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message + ".*start anew with --overwrite"):
            resume()

    stream = RowStream(FileSource(folder), settings, NOTHING_HELD_OUT, length=10**9)
    take(stream, 0, 30)
    state = StreamState(**json.loads(json.dumps(vars(stream.state(30)))))
    assert same(take(resume(), 30, 35), take(stream, 30, 35))
    content = (folder / "e.txt").read_bytes()
    (folder / "e.txt").write_bytes(content[:-1] + b"x")
    refused(r"e\.txt is not what it was;")
    (folder / "e.txt").write_bytes(content)
    (folder / "f.txt").write_bytes(content)
    refused(r"f\.txt is new;")
    (folder / "d.parquet").unlink()
    refused(r"d\.parquet is not there any more \(so it is with 1 more\)")
    (folder / "a.jsonl").write_bytes(b"middle".join((folder / "a.jsonl").read_bytes().split(b"word w", 1)))
    refused(r"a\.jsonl is not what it was" if whole else r"d\.parquet is not there any more")


def test_a_data_set_of_the_hub_that_has_changed_is_refused(folder: Path, settings: StreamSettings) -> None:
    state = RowStream(hub(folder), settings, NOTHING_HELD_OUT, length=10).state(0)
    later = HubSource("owner/name", "def", lambda: None)
    with pytest.raises(UserError, match=r"owner/name is not what it was; .*--set stream=owner/name@abc"):
        RowStream(later, settings, NOTHING_HELD_OUT, length=10, start=state)
    with pytest.raises(UserError, match=r"a\.jsonl is new"):
        RowStream(FileSource(folder), settings, NOTHING_HELD_OUT, length=10, start=state)


def test_a_hub_that_fails_says_how_to_go_on(settings: StreamSettings) -> None:
    class Failing:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from texts("hub", 20)
            raise ConnectionResetError("the server hung up")

    stream = RowStream(HubSource("owner/name", "abc", Failing), settings, NOTHING_HELD_OUT, length=10**9)
    with pytest.raises(UserError, match=r"behind row 20 fails .*the server hung up.*--resume_from_checkpoint"):
        take(stream, 0, 1000)


def test_bad_rows_are_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    settings = StreamSettings(Path(), LENGTH, skip_bad_rows=True)
    packed = zstandard.compress(json_lines([{"text": f"{number} " * 50} for number in range(5000)]), level=1)
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts("plain", 30)) + BAD)
    (tmp_path / "b.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    reports: list[str] = []
    stream = RowStream(FileSource(tmp_path), settings, NOTHING_HELD_OUT, length=10**9, report=reports.append)
    for index in itertools.count():
        assert len(stream[index]["input_ids"])
        state = stream.state(index)
        if state.epoch == 2:
            break
    assert sum(state.skipped.values()) == 2 * (4 + 1)  # in each of two epochs the lines, and the rest of the file
    assert sum(stream.skipped.values()) >= sum(state.skipped.values())
    assert any("b.jsonl.zst is truncated" in report for report in reports)
    assert len(reports) == len(state.skipped) == 5  # each kind is reported once


def test_what_the_first_block_left_out_is_counted_at_once(tmp_path: Path) -> None:
    """The state stands before the block: of a small corpus, it would say 0 to the end of the first epoch."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts("plain", 5)) + BAD)
    settings = StreamSettings(Path(), LENGTH, skip_bad_rows=True)
    stream = RowStream(FileSource(tmp_path), settings, NOTHING_HELD_OUT, length=10)
    assert stream[0]
    assert sum(stream.skipped.values()) == 4
    assert stream.state(1).skipped == {}  # a resumed run meets them again


def test_a_source_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder, and it is no data set of the hub"):
        open_source("a/path/of/none")
    for path in (str(tmp_path / "none"), "./none", "../none"):
        with pytest.raises(UserError, match=r"none: there is no such file or folder$"):
            open_source(path)
    with pytest.raises(UserError, match="holds no readable file"):
        open_source(str(tmp_path))


def test_the_identity_follows_names_and_content(folder: Path) -> None:
    before = FileSource(folder).identity
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert FileSource(moved).identity == before
    (moved / "e.txt").write_text("text 1: a whole file", encoding="utf-8")
    assert FileSource(moved).identity != before


def test_a_data_set_of_the_hub_is_opened_at_its_commit(tmp_path: Path) -> None:
    """In a process of its own, as the address of the hub is read when `datasets` is imported."""
    commit = Repository("owner/name", {}).sha
    program = (
        "from doge_lm.data.streaming import open_source\n"
        f"assert open_source('owner/name@{commit}').content == {{'owner/name': '{commit}'}}\n"
        "source = open_source('owner/name')\n"
        "rows = [item[1].text for _, chunk in source.chunks(1, 0, {}) for item in chunk.items(count_lines=True)]\n"
        "print(source.identity, rows[:2], len(rows))\n"
    )
    columns = {"text": [f"row {number}" for number in range(300)]}
    with serve(hub_handler({"owner/name": hub_files({"default": columns})})) as address:
        online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        environment = {**online, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"owner/name@{commit} ['row 0', 'row 1'] 300"
