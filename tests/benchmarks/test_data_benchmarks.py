"""The programs that measure the data path: they measure what they say, and their corpus is real and distinct."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import data_speed  # noqa: E402
import kill_stages  # noqa: E402
import memory  # noqa: E402
import prepare_large  # noqa: E402
import synthetic_corpus  # noqa: E402

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

_HOLDS = """
import mmap, multiprocessing, sys, time

def hold(size):
    data = bytearray(b"x") * size
    time.sleep(0.6)

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        touched = sum(mapped[::4096])
        child = multiprocessing.get_context("spawn").Process(target=hold, args=(80_000_000,))
        child.start()
        hold(40_000_000)
        child.join()
"""


@linux
def test_memory_of_a_process_and_of_its_worker_without_mapped_files(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(b"y" * 200_000_000)
    program = tmp_path / "holds.py"
    program.write_text(_HOLDS, encoding="utf-8")
    measured = memory.measure([sys.executable, str(program), str(tmp_path / "mapped")])
    assert measured.exit_status == 0
    assert 40e6 < measured.peak("main") < 80e6
    assert 80e6 < measured.peak("worker") < 120e6
    assert measured.peak("worker") < measured.peak_of_sum_bytes < 200e6
    assert measured.cpu_seconds > 0
    assert measured.wall_seconds > 0.6


@linux
def test_the_exit_status_is_the_commands() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), sys.executable, "-c", "raise SystemExit(7)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert json.loads(done.stdout)["exit_status"] == 7


def test_the_corpus_is_distinct_and_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    options = {"file_bytes": 4_000_000, "seed": 3}
    for number in (1, 2):
        synthetic_corpus.write_corpus(tmp_path / str(number), 30_000_000, num_proc=number, **options)
    one, two = (sorted((tmp_path / number / "python").iterdir()) for number in ("1", "2"))
    assert [path.name for path in one] == [f"part-{number:05d}.jsonl.zst" for number in range(8)]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    with_frames = [zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read() for path in one]
    raw = b"".join(with_frames)
    texts = [json.loads(line)["text"] for line in raw.split(b"\n")[:-1]]
    originals = {row["text"] for row in synthetic_corpus.read_text(None, "python")}
    assert len(raw) >= 30_000_000
    assert len(texts) > len(originals)  # each has been copied at least once
    long = [text for text in texts if len(text) > 2000]
    assert len(set(long)) == len(long)
    assert not originals & set(long)


def test_a_template_changes_words_and_nothing_else() -> None:
    text = 'A "quoted" sentence\nwith escapes, \\ and some thirty words that go on and on, 中文也有字 ' * 20
    template = synthetic_corpus.make_template({"text": text, "prompt": "a\nb"})
    row = json.loads(template.fill(random.Random(0)))
    assert row["prompt"] == "a\nb"
    assert row["text"] != text
    assert row["text"].count("\n") == text.count("\n")
    same = [piece in template.fill(random.Random(1)) for piece in template.pieces]
    assert all(same)


def test_best_fit_fills_rows_and_loses_nothing() -> None:
    lengths = [random.Random(n).randint(1, 64) for n in range(500)]
    rows = data_speed.best_fit(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 64


def test_finished_shards_are_followed_into_their_final_place(tmp_path: Path) -> None:
    partial = tmp_path / ".tmp-a"
    partial.mkdir()
    for name in ("data-00000.arrow", "data-00001.arrow", "data-00000.arrow.json"):
        (partial / name).write_bytes(b"x")
    before = kill_stages.finished(tmp_path)
    assert list(before) == ["a/data-00000.arrow"]
    partial.rename(tmp_path / "a")
    result = kill_stages.digests(tmp_path)
    assert kill_stages.redone(before, tmp_path, result) == []
    (tmp_path / "a" / "new").write_bytes(b"x")
    (tmp_path / "a" / "new").replace(tmp_path / "a" / "data-00000.arrow")
    assert kill_stages.redone(before, tmp_path, result) == ["a/data-00000.arrow"]
    (tmp_path / "a" / "data-00000.arrow").unlink()
    assert kill_stages.redone(before, tmp_path, result) == ["a/data-00000.arrow"]
    assert kill_stages.redone(before, tmp_path, {}) == []  # what the result does not hold may be cleared away


@linux
def test_a_kill_takes_the_whole_group(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    kill_stages.kill(process)
    assert process.returncode == -9
    assert not kill_stages._group_lives(process.pid)


def test_the_estimate_goes_by_bytes_and_cores() -> None:
    # 20 GB in 1,000 s on two cores: a hundred times as much, eight times as many cores.
    assert prepare_large.estimated_hours(1000, 20 * 10**9, 2) == pytest.approx(1000 * 100 / 8 / 3600)


def test_the_last_shard_of_a_share_is_named(tmp_path: Path) -> None:
    for name, shards in {"b": ["data-00000.arrow", "data-00000-00001.arrow"], "a": ["data-00000.arrow"]}.items():
        manifest = tmp_path / name / "manifest.json"
        manifest.parent.mkdir()
        manifest.write_text(json.dumps({"files": [{"path": shard} for shard in shards]}), encoding="utf-8")
    assert kill_stages.last_shards(tmp_path) == ["a/data-00000.arrow", "b/data-00000-00001.arrow"]
