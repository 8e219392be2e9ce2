"""Near duplicates by MinHash, end to end."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doge_lm.cli import main
from doge_lm.data import near_duplicates
from doge_lm.data.download import take_local
from doge_lm.data.manifest import RawSource
from doge_lm.data.near_duplicates import _MOST_TASKS, _plan_units, _signatures, _word_tokenizer
from doge_lm.data.sources import TextRow, read_rows
from tests.conftest import needs_all
from tests.data.conftest import conversation, json_lines

pytest.importorskip("datatrove")
pytestmark = pytest.mark.slow


@pytest.fixture
def rows(library_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in library_rows if 10_000 < len(row["text"]) < 40_000][:6]


def take_in(place: Path, **files: bytes) -> None:
    """Takes files in as the source `code`: `a=b"..."` is `a.jsonl`."""
    own = place / "own"
    own.mkdir(exist_ok=True)
    for name, content in files.items():
        (own / f"{name}.jsonl").write_bytes(content)
    take_local("code", own, place / "raw" / "code")


def command(place: Path, *more: str, save_dir: Path | None = None) -> list[str]:
    flags = ["--datasets_dir", str(place), "--save_dir", str(save_dir or place), "--datasets", "code"]
    return ["data", "near_duplicates", *flags, "--buckets", "5", *more]


def nearly(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["text"] + "\nand a last line that differs\n"}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_one_of_two_that_are_nearly_the_same_stays(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    take_in(tmp_path, a=json_lines(rows), b=json_lines([nearly(rows[0])]))
    assert main(command(tmp_path, "--num_proc", "2")) == 0
    directory = tmp_path / "raw" / "code-dedup"
    source = RawSource.read(directory)
    assert source.counts == {"kept": len(rows), "dropped": 1}
    texts = [row.text for row in read_rows(source.paths(directory)) if isinstance(row, TextRow)]
    assert len(texts) == len(rows)
    assert {row["text"] for row in rows[1:]} <= set(texts)
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["code", "code-dedup"]


def test_conversations_keep_their_turns(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    turns = [conversation(("human", row["text"]), ("gpt", "Yes.")) for row in rows[:3]]
    take_in(tmp_path, a=json_lines([*turns, turns[1]]))
    assert main(command(tmp_path)) == 0
    directory = tmp_path / "raw" / "code-dedup"
    source = RawSource.read(directory)
    assert source.counts == {"kept": 3, "dropped": 1}
    assert source.kind == "finetune"
    assert set(read_rows(source.paths(directory))) == set(read_rows([tmp_path / "own" / "a.jsonl"]))


def test_a_finished_result_is_left_as_it_is_or_refused(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    take_in(tmp_path, a=json_lines(rows[:3]))
    assert main(command(tmp_path)) == 0
    directory = tmp_path / "raw" / "code-dedup"
    before = digests(directory), directory.stat().st_ino
    assert main(command(tmp_path, "--num_proc", "2")) == 0
    assert f"{directory} is made already" in capsys.readouterr().out
    assert main(command(tmp_path, "--hashes", "9")) == 1
    assert "hashes: was 8, is 9" in capsys.readouterr().err
    assert (digests(directory), directory.stat().st_ino) == before
    take_in(tmp_path, a=json_lines(rows[:4]))
    assert main(command(tmp_path)) == 1
    assert "a.jsonl: was [" in capsys.readouterr().err
    assert main(command(tmp_path, "--overwrite")) == 0
    assert RawSource.read(directory).counts == {"kept": 4, "dropped": 0}


BAD = b'{"text": "\xff"}\nno json\n'


def test_bad_input_stops_with_its_line_or_is_counted(
    tmp_path: Path, rows: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    good = json_lines(rows[:2])
    take_in(tmp_path, a=good + BAD + json_lines([nearly(rows[0])]))
    assert main(command(tmp_path, "--num_proc", "2")) == 1
    assert re.search(r"error: .*a\.jsonl, line 3: invalid UTF-8.*--on_error skip", capfd.readouterr().err)
    assert not (tmp_path / "raw" / "code-dedup").exists()
    assert main(command(tmp_path, "--on_error", "skip")) == 0
    counts = {"kept": 2, "dropped": 1, "invalid UTF-8": 1, "line that is no JSON object": 1}
    assert RawSource.read(tmp_path / "raw" / "code-dedup").counts == counts
    assert "dropped, invalid UTF-8: 1 times" in capfd.readouterr().out
    assert main(command(tmp_path, "--on_error", "skip")) == 0
    assert main(command(tmp_path)) == 1  # what was skipped is to be met
    assert "on_error" in capfd.readouterr().err


def test_what_was_skipped_before_an_interruption_is_met_again(
    tmp_path: Path, rows: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    take_in(tmp_path, a=json_lines(rows[:2]) + BAD)
    process = start(tmp_path, tmp_path, "--on_error", "skip")
    wait_until((tmp_path / "raw" / ".tmp-code-dedup/work/logs/signatures/completions/00000").is_file, process)
    kill(process)
    assert main(command(tmp_path)) == 1
    assert "a.jsonl, line 3" in capfd.readouterr().err


def test_nothing_is_written_where_nothing_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    take_in(tmp_path, a=json_lines([{"text": "a"}]))
    assert main(command(tmp_path, "--on_error", "skip", "--max_document_bytes", "5")) == 1
    assert "nothing is left" in capfd.readouterr().err
    assert not (tmp_path / "raw" / "code-dedup").exists()


@pytest.mark.parametrize("piece_characters", [2**18, 500])
def test_signatures_are_those_of_datatrove(
    tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, piece_characters: int
) -> None:
    """Whether a document is one piece or many: it is cut at spaces, and n-grams go on over the cuts."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature  # noqa: PLC0415
    from datatrove.utils.hashing import HashConfig  # noqa: PLC0415

    monkeypatch.setattr(near_duplicates, "_PIECE_CHARACTERS", piece_characters)
    monkeypatch.setattr(near_duplicates, "_NGRAMS_AT_ONCE", 100)
    config = MinhashConfig(5, 14, 8, hash_config=HashConfig(hash_fc="sha1"))
    own = _signatures(str(tmp_path), config)
    theirs = MinhashDedupSignature(str(tmp_path), config, language=_word_tokenizer())
    spaced = " ".join("汉字没有空格" * 300) + "\nMonday 3.14 résumé " * 100
    for text in [*(row["text"] for row in rows), spaced]:
        assert own.get_signature(own.get_shingles(text)) == theirs.get_signature(theirs.get_shingles(text))
    assert own.get_shingles("four words are few").size == 0
    assert own.get_shingles("").size == 0


@pytest.mark.parametrize("unit", ["lorem ipsum 12 ", pytest.param("汉字", marks=needs_all)])
def test_a_large_document_is_signed_in_bounded_memory(tmp_path: Path, unit: str) -> None:
    from datatrove.pipeline.dedup.minhash import MinhashConfig  # noqa: PLC0415
    from datatrove.utils.hashing import HashConfig  # noqa: PLC0415

    sign = _signatures(str(tmp_path), MinhashConfig(hash_config=HashConfig(hash_fc="sha1")))
    text = unit * (2 * 2**20 // len(unit))
    tracemalloc.start()
    try:
        assert sign.get_shingles(text).shape == (14, 8)
        assert tracemalloc.get_traced_memory()[1] < 120 * 2**20  # all n-grams at once take 20 times as much
    finally:
        tracemalloc.stop()


def test_there_are_never_too_many_tasks(tmp_path: Path) -> None:
    files = [(tmp_path / f"{number}.jsonl.zst", 2**30) for number in range(3000)]
    unit_bytes, units = _plan_units(files)
    assert len(units) <= _MOST_TASKS
    assert [segment.path for unit in units for segment in unit.segments] == [path for path, _ in files]
    assert _plan_units(files) == (unit_bytes, units)


# ---------------------------------------------------------------------------------------------------------------
# Interruption
# ---------------------------------------------------------------------------------------------------------------


def start(place: Path, save_dir: Path, *more: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "doge_lm.cli", *command(place, *more, save_dir=save_dir)]
    return subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not there():
        assert process.poll() is None, "it ended before the kill"
        assert time.monotonic() < until
        time.sleep(0.002)


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Small units, so that several processes are at work.
SEVERAL_TASKS = """
import sys
from pathlib import Path
from doge_lm.data.near_duplicates import NearDuplicateSettings, remove_near_duplicates
settings = NearDuplicateSettings(buckets=5)
remove_near_duplicates(Path(sys.argv[1]), Path(sys.argv[2]), settings, num_proc=2, unit_bytes=30_000)
"""


def start_several_tasks(place: Path, target: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", SEVERAL_TASKS, str(place / "raw" / "code"), str(target)]
    return subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_in_every_step_the_result_is_the_same(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    take_in(tmp_path, a=json_lines(rows), b=json_lines([nearly(rows[0])]))
    whole = tmp_path / "whole" / "code-dedup"
    assert start_several_tasks(tmp_path, whole).wait() == 0
    source = RawSource.read(whole)
    assert source.counts == {"kept": len(rows), "dropped": 1}
    assert len(source.files) > 2
    killed = tmp_path / "killed" / "code-dedup"
    partial = killed.with_name(".tmp-code-dedup")
    for step in ("signatures", "buckets", "clusters", "filter"):
        process = start_several_tasks(tmp_path, killed)
        wait_until((partial / "work" / "logs" / step).exists, process)
        kill(process)
        assert not killed.exists()
    done = partial / "work" / "logs" / "signatures" / "stats" / "00000.json"
    before = done.stat().st_mtime_ns
    process = start_several_tasks(tmp_path, killed)
    wait_until((partial / "work" / "written-00000.json").exists, process)
    assert done.stat().st_mtime_ns == before  # what is finished is not done again
    assert process.wait() == 0
    assert not partial.exists()
    assert digests(killed) == digests(whole)


def test_an_interrupted_run_is_not_gone_on_with_by_other_settings(
    tmp_path: Path, rows: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    take_in(tmp_path, a=json_lines(rows[:2]))
    process = start(tmp_path, tmp_path)
    wait_until((tmp_path / "raw" / ".tmp-code-dedup/work/logs/signatures/completions/00000").is_file, process)
    kill(process)
    assert main(command(tmp_path, "--ngram_words", "4")) == 1
    assert "ngram_words: was 5, is 4" in capfd.readouterr().err
    assert main(command(tmp_path, "--ngram_words", "4", "--overwrite")) == 0


# ---------------------------------------------------------------------------------------------------------------
# Slurm: its commands, played by scripts that run every job at once
# ---------------------------------------------------------------------------------------------------------------

SBATCH = """#!{python}
import json, os, re, subprocess, sys
from pathlib import Path

place = Path(__file__).parent
script = Path(sys.argv[-1]).read_text()
options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.M))
options.update(argument[2:].split("=", 1) for argument in sys.argv[1:-1])
number = len(list(place.glob("job-*.json"))) + 1
(place / f"job-{{number}}.json").write_text(json.dumps(options))
if (place / "refuse").exists() and int((place / "refuse").read_text()) == number:
    sys.exit("sbatch: error: invalid partition specified")
environment = dict(os.environ, SLURM_NODELIST="localhost", SLURM_JOB_ID=str(number))
environment.update(entry.split("=") for entry in options["export"].split(",")[1:]) if "export" in options else None
last = int(re.match(r"0-(\\d+)", options["array"]).group(1))
for task in range(last + 1):
    output = Path(options["output"].replace("%A", str(number)).replace("%a", str(task)))
    with output.open("wb") as file:
        environment["SLURM_ARRAY_TASK_ID"] = str(task)
        subprocess.run(["bash", sys.argv[-1]], env=environment, stdout=file, stderr=file)
print(f"Submitted batch job {{number}}")
"""
SCONTROL = "#!/bin/sh\necho localhost\n"
SQUEUE = '#!/bin/sh\ncat "$(dirname "$0")/queue"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with Slurm's commands; jobs are noted there as `job-N.json`."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "queue").touch()
    for name, text in (("sbatch", SBATCH.format(python=sys.executable)), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


SLURM_FLAGS = ("--executor", "slurm", "--slurm_partition", "cpu", "--slurm_mem_gb", "3", "--slurm_time", "1:00:00")


def test_jobs_of_slurm_make_the_same_result(
    tmp_path: Path, rows: list[dict[str, Any]], slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    take_in(tmp_path, a=json_lines([*rows, nearly(rows[0])]))
    assert main(command(tmp_path, save_dir=tmp_path / "here")) == 0
    assert main(command(tmp_path, *SLURM_FLAGS, "--num_proc", "2", save_dir=tmp_path / "there")) == 0
    assert "submitted the jobs 1, 2, 3, 4, 5" in capfd.readouterr().out
    assert digests(tmp_path / "there" / "raw" / "code-dedup") == digests(tmp_path / "here" / "raw" / "code-dedup")
    jobs = [json_of(slurm / f"job-{number}.json") for number in range(1, 6)]
    assert [job["array"] for job in jobs] == ["0-0%2", "0-4%2", "0-0%2", "0-0%2", "0-0%2"]
    assert [job.get("dependency") for job in jobs] == [None, *(f"afterok:{number}" for number in range(1, 5))]
    for job in jobs:
        assert (job["partition"], job["mem-per-cpu"], job["time"]) == ("cpu", "3G", "1:00:00")
        assert job["kill-on-invalid-dep"] == "yes"
        assert "qos" not in job
    assert main(command(tmp_path, *SLURM_FLAGS, save_dir=tmp_path / "there")) == 0
    assert "is made already" in capfd.readouterr().out


def test_slurm_is_not_asked_twice_and_goes_on_where_it_refused(
    tmp_path: Path, rows: list[dict[str, Any]], slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    take_in(tmp_path, a=json_lines(rows[:2]))
    (slurm / "refuse").write_text("2")
    assert main(command(tmp_path, *SLURM_FLAGS)) == 1
    assert "sbatch did not take the jobs for buckets" in capfd.readouterr().err
    (slurm / "queue").write_text("1\n")
    assert main(command(tmp_path, *SLURM_FLAGS)) == 1
    assert "jobs that wait or run (1)" in capfd.readouterr().err
    assert main(command(tmp_path)) == 1  # nor may this machine do it meanwhile
    assert "jobs that wait or run (1)" in capfd.readouterr().err
    (slurm / "queue").write_text("")
    assert main(command(tmp_path, *SLURM_FLAGS)) == 0
    assert RawSource.read(tmp_path / "raw" / "code-dedup").counts == {"kept": 2, "dropped": 0}
    names = [json_of(path)["job-name"] for path in sorted(slurm.glob("job-*.json"))]
    assert names == [
        f"code-dedup{step}" for step in ("-signatures", "-buckets", "-buckets", "-clusters", "-filter", "")
    ]


def test_slurm_needs_its_flags_and_commands(
    tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    take_in(tmp_path, a=json_lines(rows[:2]))
    assert main(command(tmp_path, "--executor", "slurm")) == 1
    assert "--slurm_partition" in capfd.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(command(tmp_path, *SLURM_FLAGS)) == 1
    assert "no `sbatch` here" in capfd.readouterr().err


def json_of(path: Path) -> dict[str, str]:
    values: dict[str, str] = json.loads(path.read_text())
    return values
