"""Units: whatever the files and the size of a unit, all rows are read, each once, in their order."""

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from doge_lm.data import units
from doge_lm.data.preprocess import PreprocessSettings, preprocess
from doge_lm.data.sources import BadInputError, Row, TextRow, file_suffix, find_files, scan_rows
from doge_lm.data.units import Stream, Unit, parquet_parts, plan_units, read_unit, remove_spools, unpack_stream
from doge_lm.errors import UserError

from .conftest import json_lines

LIMIT = 10**6
UNIT_SIZES = [1, 64, 777, 5000, 10**6]
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.compress,
    ".txt": bytes,
}


def listed(files: Iterable[Path]) -> list[tuple[Path, int]]:
    return [(path, path.stat().st_size) for path in files]


def all_units(
    files: list[tuple[Path, int]], unit_bytes: int, folder: Path, done: Callable[[str], bool] = lambda name: False
) -> Iterator[Unit]:
    """The units of files as the parent has them; each spool is removed when the next unit is asked for."""
    folder.mkdir(exist_ok=True)
    for planned in plan_units(files, unit_bytes):
        if isinstance(planned, Unit):
            yield planned
            continue
        for unit in unpack_stream(planned, folder, unit_bytes, done, stop_at_faults=False):
            yield unit
            if unit.spool is not None:
                unit.spool.unlink()


def read(unit: Unit) -> list[Row | str]:
    """The rows of a unit, and what is wrong between them by its reason."""
    items = read_unit(unit, "pretrain", LIMIT, count_lines=True)
    return [item.reason if isinstance(item, BadInputError) else item[1] for item in items]


def plainly(files: Iterable[Path]) -> list[Row | str]:
    """The same of whole files."""
    items = [item for path in files for item in scan_rows(path, "pretrain", max_document_bytes=LIMIT)]
    return [item.reason if isinstance(item, BadInputError) else item[1] for item in items]


def by_units(files: list[Path], unit_bytes: int, folder: Path) -> list[Row | str]:
    return [row for unit in all_units(listed(files), unit_bytes, folder) for row in read(unit)]


def random_lines(draw: random.Random) -> bytes:
    """Rows of very different lengths, between blank lines and bad ones; with any kind of line end, and with none."""
    lines = []
    for number in range(draw.choice([0, 1, 2, 30, 80])):
        text = f"{number} " + draw.choice(["水", "x", " \u2028", "é"]) * int(draw.expovariate(1 / 40))
        line = json.dumps({"text": text}, ensure_ascii=draw.random() < 0.5).encode()
        lines.append(draw.choice([line] * 30 + [b"", b"   ", b"no json", b'{"text": "\xff"}', b"[1]"]))
    content = draw.choice([b"\n", b"\r\n"]).join(lines)
    return draw.choice([b"", b"\xef\xbb\xbf"]) + content + draw.choice([b"", b"\n", b"\n\n\r\n"])


def write_random(path: Path, draw: random.Random) -> None:
    content = random_lines(draw)
    match file_suffix(path):
        case ".txt":
            path.write_bytes(content.replace(b"\xff", b""))
        case ".parquet":
            rows = [{"text": f"{path.name} {number}"} for number in range(draw.choice([1, 50, 300]))]
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=draw.choice([1, 20, 1000]))
        case ".jsonl":
            path.write_bytes(content)
        case ".jsonl.gz":
            path.write_bytes(b"".join(map(gzip.compress, pieces(content, draw))))
        case ".jsonl.zst":
            path.write_bytes(b"".join(map(zstandard.compress, pieces(content, draw))))


def pieces(content: bytes, draw: random.Random) -> list[bytes]:
    """Content cut anywhere, for archives of one or several frames."""
    cuts = sorted(draw.randint(0, len(content)) for _ in range(draw.choice([0, 0, 1, 5])))
    return [content[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_the_units_hold_every_row_once_and_in_order(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(units, "_FILE_COST", draw.choice([1, 4096]))
    monkeypatch.setattr(units, "_MANY_FILES", draw.choice([1, 64]))
    suffixes = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"]
    (tmp_path / "text").mkdir()
    for number in range(draw.choice([1, 3, 12])):
        write_random(tmp_path / "text" / f"{number:02d}{draw.choice(suffixes)}", draw)
    files = find_files(tmp_path / "text")
    expected = plainly(files)
    for size in UNIT_SIZES:
        assert by_units(files, size, tmp_path / "spools") == expected, size


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_every_size_of_a_unit_around_the_ends_of_lines(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that ends exactly where a unit does, one byte before and behind it, and lines longer than a unit."""
    monkeypatch.setattr(units, "_FILE_COST", 0)
    content = json_lines([{"text": "x" * length} for length in (3, 3, 40, 3, 0, 100, 3)])
    for name, data in {"whole": content, "open": content[:-1], "crlf": content.replace(b"\n", b"\r\n")}.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(PACK[suffix](data))
        expected = plainly([path])
        assert len(expected) == 7
        for size in range(1, len(data) + 2):
            assert by_units([path], size, tmp_path / "spools") == expected, (name, size)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_bad_lines_are_named_by_their_number(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_FILE_COST", 0)
    content = json_lines([{"text": "x" * length} if length % 4 else length for length in range(30)])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](content))
    expected = [str(item) for item in scan_rows(path) if isinstance(item, BadInputError)]
    assert expected[1].startswith(f"{path}, line 5: ")
    for size in range(1, len(content) + 2):
        items = [
            item
            for unit in all_units(listed([path]), size, tmp_path / "spools")
            for item in read_unit(unit, "pretrain", LIMIT, count_lines=True)
        ]
        assert [str(item) for item in items if isinstance(item, BadInputError)] == expected, size


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_an_empty_file_is_a_unit(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](b""))
    for size in (1, 10**6):
        found = list(all_units(listed([path]), size, tmp_path / "spools"))
        assert [unit.name for unit in found] == ["00000"]
    assert by_units([path], 1, tmp_path / "spools") == plainly([path])


def test_a_byte_order_mark_belongs_to_the_first_line_alone(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    lines = json_lines({"text": f"line {number}"} for number in range(100))
    for path in (tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"):
        content = mark + lines
        path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
        assert by_units([path], 50, tmp_path / "spools") == [TextRow(f"line {number}") for number in range(100)]
        content = lines[:-1] + b"\n" + mark + b'{"text": "x"}\n'
        path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
        assert by_units([path], 50, tmp_path / "spools")[-1] == "line that is no JSON object"


def test_the_plan_follows_names_and_sizes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_FILE_COST", 0)
    files = [(tmp_path / f"{number}.jsonl", size) for number, size in enumerate([10, 10, 90, 250, 10])]
    plan = plan_units(files, 100)
    assert [planned.place for planned in plan] == list(range(6))
    shown = [
        [(segment.path.name, segment.part and (segment.part.start, segment.part.stop)) for segment in planned.segments]
        for planned in plan
        if isinstance(planned, Unit)
    ]
    assert shown == [
        [("0.jsonl", None), ("1.jsonl", None)],
        [("2.jsonl", None)],
        [("3.jsonl", (0, 83))],
        [("3.jsonl", (83, 166))],
        [("3.jsonl", (166, 250))],
        [("4.jsonl", None)],
    ]


def test_compressed_files_are_unpacked_by_the_parent_unless_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [(tmp_path / f"{number}.jsonl.zst", 10**6) for number in range(3)]
    assert all(isinstance(planned, Stream) for planned in plan_units(files, 1000))
    monkeypatch.setattr(units, "_MANY_FILES", 3)
    assert all(isinstance(planned, Unit) for planned in plan_units(files, 1000))
    monkeypatch.setattr(units, "_MAX_WHOLE_FILE", 10**5)  # too large for one process
    assert all(isinstance(planned, Stream) for planned in plan_units(files, 1000))


def test_names_and_numbers_ascend() -> None:
    made = [Unit(place, part, ()) for place in range(3) for part in range(3)]
    assert [unit.number for unit in made] == sorted({unit.number for unit in made})
    assert [unit.name for unit in made] == sorted({unit.name for unit in made})
    assert Unit(units._MOST_UNITS, 2**16 - 1, ()).number < 2**31


# Spools


def packed_lines(path: Path, rows: int = 300) -> Stream:
    path.write_bytes(zstandard.compress(json_lines({"text": f"line {number}"} for number in range(rows))))
    return Stream(4, path, path.stat().st_size)


def unpack(stream: Stream, folder: Path, **options: Any) -> Iterator[Unit]:
    options = {"is_done": lambda name: False, "stop_at_faults": True, **options}
    return unpack_stream(stream, folder, 500, **options)


def test_spools_are_made_one_at_a_time_and_a_record_in_the_end(tmp_path: Path) -> None:
    stream = packed_lines(tmp_path / "a.jsonl.zst")
    folder = tmp_path / "spools"
    folder.mkdir()
    names = []
    for unit in unpack(stream, folder):
        assert unit.spool is not None
        assert list(folder.iterdir()) == [unit.spool]
        assert unit.spool.read_bytes().endswith(b"\n")
        names.append(unit.name)
        unit.spool.unlink()
    assert names[:3] == ["00004", "00004-00001", "00004-00002"]
    assert [path.name for path in folder.iterdir()] == ["stream-00004.json"]
    # With the record, and all units done, the file is not even looked at.
    stream.path.unlink()
    again = list(unpack(stream, folder, is_done=lambda name: True))
    assert [unit.name for unit in again] == names
    assert not any(unit.spool for unit in again)


def test_units_that_are_done_have_no_spool(tmp_path: Path) -> None:
    stream = packed_lines(tmp_path / "a.jsonl.zst")
    everything = [(unit.name, read(unit)) for unit in unpack(stream, tmp_path)]
    (tmp_path / "stream-00004.json").unlink()
    done = {name for name, _ in everything[::2]}
    left = list(unpack(stream, tmp_path, is_done=done.__contains__))
    assert [unit.name for unit in left] == [name for name, _ in everything]
    assert [(unit.name, read(unit)) for unit in left if unit.spool] == everything[1::2]


def test_rows_of_a_spool_are_named_by_file_and_line(tmp_path: Path) -> None:
    stream = packed_lines(tmp_path / "a.jsonl.zst", 100)
    places = [
        str(item[0])
        for unit in unpack(stream, tmp_path)
        for item in read_unit(unit, "pretrain", LIMIT, count_lines=True)
        if not isinstance(item, BadInputError)
    ]
    assert places == [f"{stream.path}, line {number}" for number in range(1, 101)]


@pytest.mark.parametrize("stop", [True, False])
def test_a_file_that_is_cut_off(tmp_path: Path, stop: bool) -> None:
    path = tmp_path / "a.jsonl.zst"
    frames = [zstandard.compress(json_lines({"text": f"line {n}"} for n in range(begin, begin + 100)))
              for begin in (0, 100, 200)]  # fmt: skip
    path.write_bytes(b"".join(frames)[:-20])
    stream, folder = Stream(0, path, path.stat().st_size), tmp_path / "spools"
    folder.mkdir()
    found: list[Row | str] = []

    def unpack_all() -> None:
        for unit in unpack(stream, folder, stop_at_faults=stop):
            found.extend(read(unit))
            assert unit.spool is not None
            unit.spool.unlink()

    if stop:
        with pytest.raises(BadInputError, match=r"a\.jsonl\.zst is truncated"):
            unpack_all()
        assert list(folder.iterdir()) == []  # neither a spool that was begun nor a record
    else:
        unpack_all()
        assert found[-1] == "rest of a file that is cut off or damaged"
        assert found.count(found[-1]) == 1
        assert found[:200] == [TextRow(f"line {number}") for number in range(200)]


def test_a_spool_that_cannot_be_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = packed_lines(tmp_path / "a.jsonl.zst")
    (tmp_path / "spools").mkdir()

    def full(file: Any, *_: Any) -> int:
        file.write(b"half a l")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(units, "_copy", full)
    with pytest.raises(OSError, match="No space"):
        list(unpack(stream, tmp_path / "spools"))
    assert list((tmp_path / "spools").iterdir()) == []


def test_spools_are_removed_and_nothing_else(tmp_path: Path) -> None:
    stream = packed_lines(tmp_path / "a.jsonl.zst")
    kept = set(tmp_path.iterdir())
    spools = {unit.spool for unit in unpack(stream, tmp_path)}
    assert len(spools) > 5
    assert spools < set(tmp_path.iterdir())
    remove_spools(tmp_path)
    assert set(tmp_path.iterdir()) == kept | {tmp_path / "stream-00004.json"}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_no_spool_is_left_when_preprocessing_ends_or_stops(
    tmp_path: Path, tokenizer_path: Path, prepare: Callable[..., Any], num_proc: int
) -> None:
    prepare({"a": [{"text": "a first source"}]})
    raw, path = tmp_path / "raw" / "a", tmp_path / "b.jsonl.zst"
    good = json_lines({"text": f"line {number}"} for number in range(300))

    def run(content: bytes) -> None:
        path.write_bytes(zstandard.compress(content))
        source = json.loads((raw / "source.json").read_text())
        entry = {**source["files"][0], "path": str(path), "bytes": path.stat().st_size, "sha256": ""}
        (raw / "source.json").write_text(json.dumps({**source, "files": [entry]}))
        options: dict[str, Any] = {"num_proc": num_proc, "unit_bytes": 3000, "overwrite": True}
        preprocess(tmp_path, tmp_path, tokenizer_path, PreprocessSettings(), **options)

    with pytest.raises(UserError, match=r"b\.jsonl\.zst, line 301: invalid JSON"):
        run(good + b"no json\n" + good)
    assert not list(tmp_path.rglob("spool-*"))
    run(good)
    assert not list(tmp_path.rglob("spool-*"))


# Files that are not what they were


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "more"}\n')


def exhaust(items: Iterable[object], then: Callable[[], None]) -> None:
    """Does something after each item."""
    for _ in items:
        then()


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_grows_while_it_is_read(tmp_path: Path, when: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines({"text": f"line {number}"} for number in range(500)))
    for unit in all_units(listed([path]), 3000, tmp_path):
        path.write_bytes(path.read_bytes()[: unit.segments[0].bytes])
        if when == "before":
            grow(path)
        rows = read_unit(unit, "pretrain", LIMIT, count_lines=False)
        with pytest.raises(UserError, match=r"a\.jsonl changes while it is read.*download_datasets"):
            exhaust(rows, then=lambda: grow(path) if when == "while" else None)


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_compressed_file_that_grows_while_it_is_unpacked(tmp_path: Path, when: str) -> None:
    stream = packed_lines(tmp_path / "a.jsonl.zst")
    if when == "before":
        grow(stream.path)
    parts = unpack(stream, tmp_path, stop_at_faults=False)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst changes while it is read"):
        exhaust(parts, then=lambda: grow(stream.path))
    assert not (tmp_path / "stream-00004.json").exists()  # so it does not count as done


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([{"text": "x"}]))
    (unit,) = all_units(listed([path]), 1000, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl does not exist any more"):
        read(unit)


# Parquet


@pytest.mark.parametrize("groups", [1, 7, 100])
def test_parquet_is_cut_at_row_groups(tmp_path: Path, groups: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": f"{n} " * (n % 9)} for n in range(700)]), path,
                   row_group_size=700 // groups)  # fmt: skip
    sizes = [pq.read_metadata(path).row_group(index).total_byte_size for index in range(groups)]
    for limit in (0, max(sizes), 3 * max(sizes), 10**9):
        parts = parquet_parts(path, limit)
        assert [part.start for part, _ in parts] == [0, *(part.stop for part, _ in parts[:-1])]
        assert parts[-1][0].stop == groups
        assert [part.before for part, _ in parts] == [part.start * (700 // groups) for part, _ in parts]
        assert [size for _, size in parts] == [sum(sizes[part.start : part.stop]) for part, _ in parts]
        assert all(size <= limit or part.stop - part.start == 1 for part, size in parts)
        # A part ends only where the next row group would have been too much.
        following = [sizes[part.stop] for part, _ in parts[:-1]]
        assert all(size + more > limit for (_, size), more in zip(parts, following, strict=False))


def test_a_damaged_parquet_is_one_unit_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + b"x" * 5000)
    assert parquet_parts(path, 100) == []
    (unit,) = all_units(listed([path]), 100, tmp_path)
    assert read(unit) == ["rest of a file that is cut off or damaged"]
