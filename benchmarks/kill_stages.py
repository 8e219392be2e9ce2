"""SIGKILLs at random moments over all stages: is every final result byte-identical to an uninterrupted one?

    python benchmarks/kill_stages.py --tokenizer_path ./tokenizer [--kills 200] [--seed 0] [--text_dir ../shared/data]

Prepares a small corpus once without interruption, each stage in turn. Then each stage is run, killed with its whole
process group at a random moment of its own duration, and run again (and perhaps killed again) until it ends by itself;
so on until the stage has had its share of the kills. Afterwards every file of the result must have the same sha256 as
before, and no shard that was finished when a kill came (its record lay beside it) may have been written again: its
inode and time of change are the same. Prints counts by stage; the exit status is 1 for any difference.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from synthetic_corpus import write_corpus

ROOT = Path(__file__).resolve().parents[1]
_LOCKS = (".lock",)
_DYING_SECONDS = 10


@dataclass(frozen=True)
class Stage:
    """A stage: its name, its command, and the folder that it writes."""

    name: str
    command: list[str]
    folder: Path


@dataclass
class Count:
    """What happened to one stage."""

    seconds: float = 0.0
    first_output: float = 0.0
    files: int = 0
    kills: int = 0
    results: int = 0
    ended_before_the_kill: int = 0
    finished_shards_seen: int = 0
    redone_shards: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, temporary ones among them; locks are no result."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in _LOCKS
    }


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Shards that have a record: name -> inode and time of change. `.tmp-NAME` counts as `NAME`."""
    return {name: mark for name, (path, mark) in _marks(folder).items() if any(map(Path.is_file, _records(path)))}


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """All files that are there, as `finished` gives those with a record."""
    return {name: mark for name, (_, mark) in _marks(folder).items()}


def _marks(folder: Path) -> dict[str, tuple[Path, tuple[int, int]]]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            parts = [part.removeprefix(".tmp-") for part in path.relative_to(folder).parts]
            status = path.stat()
            found["/".join(parts)] = (path, (status.st_ino, status.st_mtime_ns))
    return found


def _records(shard: Path) -> list[Path]:
    """Where the record of a shard may lie: beside it, or where its stage keeps records while it is at work."""
    stem = shard.name.partition(".")[0]
    split = shard.parent.parent / "work" / f"{shard.parent.name}-{stem.removeprefix('data-')}.json"
    unit = stem.removeprefix("part-").rpartition("-")[0]
    return {
        ".arrow": [shard.with_name(shard.name + ".json"), shard.parent / "work" / f"{stem}.json", split],
        ".zst": [shard.parent / "progress" / f"unit-{unit}.json"],
    }.get(shard.suffix, [])


def redone(before: dict[str, tuple[int, int]], folder: Path, result: dict[str, str]) -> list[str]:
    """Finished shards that were written again, or are gone although the result has them."""
    now = everything(folder)
    return [name for name, mark in before.items() if (name in now or name in result) and now.get(name) != mark]


def start(stage: Stage, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "doge_lm.cli", *stage.command]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def end_well(process: subprocess.Popen[bytes], stage: Stage, error: bytes | None = None) -> None:
    """Waits for a run to end by itself; `error` is what it has printed, if that was read already.

    Raises:
        RuntimeError: if it fails.
    """
    if error is None:
        _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{stage.name} ended with status {process.returncode}: {error.decode()[-2000:]}")


def kill(process: subprocess.Popen[bytes]) -> bytes:
    """Kills a process with its whole group, waits until none of them is left, and gives what it has printed."""
    os.killpg(process.pid, signal.SIGKILL)
    _, error = process.communicate()
    until = time.monotonic() + _DYING_SECONDS
    while _group_lives(process.pid):
        if time.monotonic() > until:
            raise RuntimeError(f"the process group {process.pid} outlives SIGKILL")
        time.sleep(0.01)
    return error


def _group_lives(group: int) -> bool:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, process_group = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state != "Z":
            return True
    return False


def reference(stage: Stage, environment: dict[str, str], count: Count) -> dict[str, str]:
    """Runs a stage once without interruption; notes its duration and when it first wrote."""
    begin = time.monotonic()
    process = start(stage, environment)
    while process.poll() is None:
        if not count.first_output and stage.folder.exists() and any(stage.folder.iterdir()):
            count.first_output = time.monotonic() - begin
        time.sleep(0.02)
    end_well(process, stage)
    count.seconds = time.monotonic() - begin
    result = digests(stage.folder)
    count.files = len(result)
    return result


def torture(
    stage: Stage, environment: dict[str, str], result: dict[str, str], kills: int, rng: random.Random, count: Count
) -> None:
    """Kills a stage so many times, and compares each result that it comes to in between."""
    while count.kills < kills:
        shutil.rmtree(stage.folder)
        before: dict[str, tuple[int, int]] = {}
        ended = False
        while not ended:
            process = start(stage, environment)
            error = None
            if count.kills < kills:
                # Before it writes, a kill has nothing to spoil: most of them come later.
                moment = rng.uniform(0.8 * count.first_output, count.seconds)
                try:
                    process.wait(moment)
                    count.ended_before_the_kill += 1
                except subprocess.TimeoutExpired:
                    error = kill(process)
                    # It may have ended by itself at the last moment.
                    killed = process.returncode == -signal.SIGKILL
                    count.kills += killed
                    count.ended_before_the_kill += not killed
            if process.returncode != -signal.SIGKILL:
                end_well(process, stage, error)
                ended = True
            count.redone_shards += redone(before, stage.folder, result)
            before = finished(stage.folder)
            count.finished_shards_seen += 0 if ended else len(before)
        count.results += 1
        made = digests(stage.folder)
        differences = [name for name in sorted(made.keys() | result.keys()) if made.get(name) != result.get(name)]
        if differences:
            count.differences += differences
            make_anew(stage, environment, result)


def make_anew(stage: Stage, environment: dict[str, str], result: dict[str, str]) -> None:
    """Makes a stage's result anew after a difference, so that the next stage has sound input."""
    shutil.rmtree(stage.folder)
    end_well(start(stage, environment), stage)
    if digests(stage.folder) != result:
        raise RuntimeError(f"{stage.name} does not come to the same result twice, even uninterrupted")


def has_flag(command: str, flag: str) -> bool:
    """Whether a command of this version has a flag."""
    shown = subprocess.run(
        [sys.executable, "-m", "doge_lm.cli", command, "--help"], check=True, capture_output=True, text=True
    )
    return flag in shown.stdout


@contextmanager
def hub(rows: int) -> Iterator[str]:
    """A hub on loopback with a source of four files; gives its address."""
    sys.path.insert(0, str(ROOT))
    from tests.data import loopback  # noqa: PLC0415 - not part of the package

    rng = random.Random(0)
    files: dict[str, bytes] = {"README.md": b""}
    for number in range(4):
        texts = [" ".join(str(rng.getrandbits(30)) for _ in range(40)) for _ in range(rows // 4)]
        columns = {"text": texts, "prompt": [text[:20] for text in texts]}
        files[f"cosmopedia-v2/train-{number:05d}-of-00004.parquet"] = loopback.parquet(columns)
    card = [{"config_name": "cosmopedia-v2", "data_files": [{"split": "train", "path": "cosmopedia-v2/train-*"}]}]
    files["README.md"] = f"---\nconfigs: {json.dumps(card)}\n---\n".encode()
    with loopback.serve(loopback.hub_handler({"HuggingFaceTB/smollm-corpus": files})) as address:
        yield address


def make_stages(work: Path, tokenizer: Path, sources: dict[str, Path], num_proc: int, rows: int) -> list[Stage]:
    """All stages, in the order in which they need each other."""
    run, clean, fetched = work / "run", work / "deduplicated", work / "fetched"
    processes = ["--num_proc", str(num_proc)]
    local = [part for name, path in sources.items() for part in ("--local", f"{name}={path}")]
    # Short rows make several shards of little text.
    preprocess = ["preprocess_datasets", "--datasets_dir", str(run), "--tokenizer_path", str(tokenizer)]
    preprocess += ["--max_len", "64", *processes]
    merge = ["merge_datasets", "--datasets_dir", str(run), "--save_dir", str(run), *processes]
    fetch = ["download_datasets", "--save_dir", str(fetched), "--cache_dir", str(work / "cache"), *processes]
    stages = [
        Stage("download --local", ["download_datasets", "--save_dir", str(run), *local], run / "raw"),
        Stage("preprocess", [*preprocess, "--save_dir", str(run)], run / "tokenized"),
    ]
    if has_flag("preprocess_datasets", "--deduplicate"):
        cleaning = [*preprocess, "--save_dir", str(clean), "--deduplicate"]
        stages.append(Stage("preprocess --deduplicate", cleaning, clean / "tokenized"))
    fetch += ["--datasets", "cosmopedia-v2", "--max_rows", str(rows)]
    return [*stages, Stage("merge", merge, run / "pretrain"), Stage("download from a hub", fetch, fetched / "raw")]


def show(counts: dict[str, Count]) -> None:
    """Prints a table and one line of JSON."""
    print("| stage | uninterrupted, s | kills | results | identical | finished shards at kills | written again |")
    print("|---|---|---|---|---|---|---|")
    for name, count in counts.items():
        print(
            f"| {name} | {count.seconds:.1f} | {count.kills} | {count.results} | "
            f"{'all' if not count.differences else 'NOT ALL'} | {count.finished_shards_seen} | "
            f"{len(count.redone_shards)} |"
        )
    print(json.dumps({name: asdict(count) for name, count in counts.items()}))


def run_all(args: argparse.Namespace, work: Path, log: Callable[[str], None]) -> dict[str, Count]:
    """Makes the corpus and the results, then kills."""
    written = write_corpus(
        work / "corpus", round(args.corpus_mb * 10**6), text_dir=args.text_dir, file_bytes=round(args.file_mb * 10**6)
    )
    sources = {name: work / "corpus" / name for name in written}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(work / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    counts: dict[str, Count] = {}
    with hub(args.hub_rows) as address:
        environment["HF_ENDPOINT"] = address
        stages = make_stages(work, args.tokenizer_path, sources, args.num_proc, args.hub_rows)
        if args.stages:
            stages = [stage for stage in stages if stage.name in args.stages]
        results = {}
        for stage in stages:
            counts[stage.name] = Count()
            results[stage.name] = reference(stage, environment, counts[stage.name])
            log(f"{stage.name}: {counts[stage.name].seconds:.1f} s, {counts[stage.name].files} files")
        rng = random.Random(args.seed)
        for number, stage in enumerate(stages):
            share = args.kills // len(stages) + (number < args.kills % len(stages))
            torture(stage, environment, results[stage.name], share, rng, counts[stage.name])
            log(f"{stage.name}: {counts[stage.name].kills} kills, {counts[stage.name].results} results")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200, help="over all stages (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--text_dir", type=Path, help="real text; by default the sources of Python's standard library")
    parser.add_argument("--corpus_mb", type=float, default=100, help="MB of JSON lines (default: 100)")
    parser.add_argument("--file_mb", type=float, default=8, help="MB of JSON lines a file (default: 8)")
    parser.add_argument("--hub_rows", type=int, default=20_000, help="rows of the source on the hub (default: 20,000)")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--stages", nargs="+", help="only these, in the order of their need (default: all)")
    parser.add_argument("--work", type=Path, help="where to write a temporary folder")
    args = parser.parse_args()
    args.tokenizer_path = args.tokenizer_path.resolve()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        counts = run_all(args, Path(folder), lambda line: print(line, file=sys.stderr, flush=True))
    show(counts)
    return 1 if any(count.differences or count.redone_shards for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
