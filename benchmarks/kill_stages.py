"""SIGKILLs at random moments over all stages: is every final result byte-identical to an uninterrupted one?

    python benchmarks/kill_stages.py --tokenizer_path ./tokenizer [--kills 200] [--seed 0] [--text_dir ../shared/data]

Prepares a small corpus once without interruption, each stage in turn. Then each stage is run, killed with its whole
process group at a random moment, and run again (and perhaps killed again) until it ends by itself; so on until the
stage has had its share of the kills. Afterwards every file of the result must have the same sha256 as before, and no
shard that was finished when a kill came (its record lay beside it) may have been written again: its inode and time of
change are the same. One kind of shard is left out of that: the last one of each source of "preprocess --mix --tokens".
By design it is made anew where processes were ahead of the share when it was begun, without any kill too. Prints
counts by stage; the exit status is 1 for any difference, and for any run that fails.

Half of the moments are uniform over the stage's duration, from shortly before it first writes. For the other half the
clock starts when the first shard is finished, so that a kill has finished work to spoil. So that a small corpus has
many of everything, the stages run with smaller constants than a user's (`SMALL`), set by a launcher before the command
begins: merge deals in runs of 4 MB and writes shards of 16,384 rows, contents are fetched 250 a unit, and near
duplicates and preprocessing with a mix have units of 1 MB.

The stages: files of one's own, preprocessing (plain; with filters, decontamination and duplicates removed; with --mix
and --tokens), merging (plain; with --mix and --tokens, which repeats a source), near duplicates (left out, with a
note, where datatrove is not installed), and from servers on loopback files of the hub and contents by blob id.
"""

import argparse
import hashlib
import importlib.util
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

from synthetic_corpus import read_text, write_corpus

ROOT = Path(__file__).resolve().parents[1]
_LOCKS = (".lock",)
_DYING_SECONDS = 10
_LOOK_SECONDS = 0.02

# What other stages read.
NEEDED = ("download --local", "preprocess")

# Constants of the package, and what they are here.
SMALL = {
    "doge_lm.data.merge._RUN_BYTES": 4 * 10**6,
    "doge_lm.data.merge.ROWS_PER_SHARD": 2**14,
    "doge_lm.data.download._IDS_PER_UNIT": 250,
    "doge_lm.data.units.MIN_UNIT_BYTES": 10**6,
}
# Only the first process of a stage reads them.
_LAUNCHER = """
import importlib, json, sys
for place, value in json.loads(sys.argv[1]).items():
    module, _, name = place.rpartition(".")
    getattr(importlib.import_module(module), name)  # an error if it has another name by now
    setattr(importlib.import_module(module), name, value)
from doge_lm.cli import main
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        name: for the table.
        command: of `doge-lm`.
        folder: what it writes, and nothing else does; what it leaves unfinished lies in it too.
        errors: the file for what it prints on stderr.
        small: the constants that are smaller for it.
        ends_in_a_share: the last shard of each source ends where the source's share does.
    """

    name: str
    command: list[str]
    folder: Path
    errors: Path
    small: tuple[str, ...] = ()
    ends_in_a_share: bool = False


@dataclass
class Count:
    """What happened to one stage."""

    seconds: float = 0.0
    first_output: float = 0.0
    first_finished: float = 0.0
    files: int = 0
    kills: int = 0
    kills_with_finished_shards: int = 0
    results: int = 0
    ended_before_the_kill: int = 0
    finished_shards_seen: int = 0
    may_be_redone: list[str] = field(default_factory=list)
    redone_shards: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


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


def has_finished(folder: Path) -> bool:
    """Whether there is a finished shard, while a stage is at work."""
    try:
        return bool(finished(folder))
    except FileNotFoundError:  # renamed while it was looked at
        return False


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
    of_part = shard.parent / "work" / f"written-{stem.removeprefix('part-')}.json"
    return {
        ".arrow": [shard.with_name(shard.name + ".json"), shard.parent / "work" / f"{stem}.json", split],
        ".zst": [shard.parent / "progress" / f"unit-{unit}.json", of_part],
    }.get(shard.suffix, [])


def redone(before: dict[str, tuple[int, int]], folder: Path, result: dict[str, str]) -> list[str]:
    """Finished shards that were written again, or are gone although the result has them."""
    now = everything(folder)
    return [name for name, mark in before.items() if (name in now or name in result) and now.get(name) != mark]


def last_shards(folder: Path) -> list[str]:
    """The last shard of each source in a folder of tokenized sources, in the order in which they were read."""
    manifests = {path.parent.name: json.loads(path.read_bytes()) for path in sorted(folder.glob("*/manifest.json"))}
    return [f"{name}/{manifest['files'][-1]['path']}" for name, manifest in manifests.items()]


def start(stage: Stage, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    small = json.dumps({name: SMALL[name] for name in stage.small})
    command = [sys.executable, "-c", _LAUNCHER, small, *stage.command]
    with stage.errors.open("wb") as errors:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )


def end_well(process: subprocess.Popen[bytes], stage: Stage) -> None:
    """Waits for a run to end by itself.

    Raises:
        RuntimeError: if it fails.
    """
    if process.wait():
        error = stage.errors.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{stage.name} ended with status {process.returncode}: {error[-2000:]}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with its whole group, and waits until none of them is left."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + _DYING_SECONDS
    while _group_lives(process.pid):
        if time.monotonic() > until:
            raise RuntimeError(f"the process group {process.pid} outlives SIGKILL")
        time.sleep(0.01)


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
    """Runs a stage once without interruption; notes its duration, when it first wrote and had a shard finished."""
    begin = time.monotonic()
    process = start(stage, environment)
    while process.poll() is None:
        if not count.first_output and stage.folder.exists() and any(stage.folder.iterdir()):
            count.first_output = time.monotonic() - begin
        if count.first_output and not count.first_finished and has_finished(stage.folder):
            count.first_finished = time.monotonic() - begin
        time.sleep(_LOOK_SECONDS)
    end_well(process, stage)
    count.seconds = time.monotonic() - begin
    result = digests(stage.folder)
    count.files = len(result)
    if stage.ends_in_a_share:
        count.may_be_redone = last_shards(stage.folder)
    return result


def wait_for_moment(process: subprocess.Popen[bytes], stage: Stage, rng: random.Random, count: Count) -> None:
    """Returns at the moment of the next kill, or when the process has ended."""
    # Before it writes, a kill has nothing to spoil.
    working = time.monotonic() + 0.8 * count.first_output
    delay = rng.uniform(0.0, count.seconds - 0.8 * count.first_output)
    if count.first_finished and count.kills_with_finished_shards <= count.kills / 2:
        while process.poll() is None and not has_finished(stage.folder):
            time.sleep(_LOOK_SECONDS)
        working = max(working, time.monotonic())
        delay = rng.uniform(0.0, count.seconds - count.first_finished)
    try:
        process.wait(max(0.0, working + delay - time.monotonic()))
    except subprocess.TimeoutExpired:
        return


def torture(
    stage: Stage, environment: dict[str, str], result: dict[str, str], kills: int, rng: random.Random, count: Count
) -> None:
    """Kills a stage so many times, and compares each result that it comes to in between."""
    while count.kills < kills:
        shutil.rmtree(stage.folder)
        try:
            run_to_its_end(stage, environment, result, kills, rng, count)
        except RuntimeError as failure:
            count.failures.append(str(failure))
            make_anew(stage, environment, result)
            continue
        count.results += 1
        made = digests(stage.folder)
        differences = [name for name in sorted(made.keys() | result.keys()) if made.get(name) != result.get(name)]
        if differences:
            count.differences += differences
            make_anew(stage, environment, result)


def run_to_its_end(
    stage: Stage, environment: dict[str, str], result: dict[str, str], kills: int, rng: random.Random, count: Count
) -> None:
    """Runs a stage again and again, killed while kills are left, until it ends by itself.

    Raises:
        RuntimeError: if it fails.
    """
    before: dict[str, tuple[int, int]] = {}
    ended = False
    while not ended:
        process = start(stage, environment)
        if count.kills < kills:
            wait_for_moment(process, stage, rng, count)
            if process.poll() is None:
                kill(process)
        # It may have ended by itself at the last moment.
        ended = process.wait() != -signal.SIGKILL
        if ended:
            end_well(process, stage)
            count.ended_before_the_kill += count.kills < kills
        again = redone(before, stage.folder, result)
        count.redone_shards += [name for name in again if name not in count.may_be_redone]
        before = finished(stage.folder)
        if not ended:
            count.kills += 1
            count.finished_shards_seen += len(before)
            count.kills_with_finished_shards += bool(before)


def make_anew(stage: Stage, environment: dict[str, str], result: dict[str, str]) -> None:
    """Makes a stage's result anew after a difference, so that the next stage has sound input."""
    shutil.rmtree(stage.folder)
    end_well(start(stage, environment), stage)
    if digests(stage.folder) != result:
        raise RuntimeError(f"{stage.name} does not come to the same result twice, even uninterrupted")


@contextmanager
def servers(rows: int) -> Iterator[dict[str, str]]:
    """A hub and a bucket on loopback; gives the environment that leads to them.

    The hub has a source of four files, and one of blob ids for a quarter of the rows; the bucket lacks some of them.
    """
    sys.path.insert(0, str(ROOT))
    from tests.data import loopback  # noqa: PLC0415 - not part of the package

    rng = random.Random(0)
    files: dict[str, bytes] = {}
    for number in range(4):
        texts = [" ".join(str(rng.getrandbits(30)) for _ in range(40)) for _ in range(rows // 4)]
        columns = {"text": texts, "prompt": [text[:20] for text in texts]}
        files[f"cosmopedia-v2/train-{number:05d}-of-00004.parquet"] = loopback.parquet(columns)
    ids = [f"{number:040x}" for number in range(rows // 4)]
    blobs = {"blob_id": ids, "repo_name": ids, "path": ids}
    files["python-edu/train-00000-of-00001.parquet"] = loopback.parquet(blobs)
    contents = {id_: rng.randbytes(500).hex().encode() for number, id_ in enumerate(ids) if number % 97}
    cards = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*"}]}
        for name in ("cosmopedia-v2", "python-edu")
    ]
    files["README.md"] = f"---\nconfigs: {json.dumps(cards)}\n---\n".encode()
    hub = loopback.serve(loopback.hub_handler({"HuggingFaceTB/smollm-corpus": files}))
    with hub as address, loopback.serve(loopback.bucket_handler(contents, {})) as bucket:
        yield {"HF_ENDPOINT": address, "DOGE_CONTENTS_ENDPOINT": bucket}


def make_corpus(work: Path, args: argparse.Namespace) -> dict[str, Path]:
    """The sources: those of the corpus, and `extra`, a tenth of their size in a tenth of the file size."""
    size, file_size = round(args.corpus_mb * 10**6), round(args.file_mb * 10**6)
    written = write_corpus(work / "corpus", size, text_dir=args.text_dir, file_bytes=file_size)
    write_corpus(work / "more", size // 10, file_bytes=file_size // 10, seed=1)
    return {name: work / "corpus" / name for name in written} | {"extra": work / "more" / "python"}


def make_benchmark(path: Path) -> None:
    """A benchmark file for the decontamination: beginnings of some of the files that the corpus is made of."""
    texts = [row["text"][:2000] for number, row in enumerate(read_text(None, "python")) if number % 20 == 0]
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts), encoding="utf-8")


def make_stages(work: Path, sources: dict[str, Path], args: argparse.Namespace) -> list[Stage]:
    """All stages, in the order in which they need each other."""
    run, clean, mixed, near, fetched = (work / name for name in ("run", "cleaned", "mixed", "near", "fetched"))
    processes = ["--num_proc", str(args.num_proc)]
    local = [part for name, path in sources.items() for part in ("--local", f"{name}={path}")]
    # Short rows make several shards of little text.
    preprocess = ["preprocess_datasets", "--datasets_dir", str(run), "--tokenizer_path", str(args.tokenizer_path)]
    preprocess += ["--max_len", "64", *processes]
    merge = ["merge_datasets", "--datasets_dir", str(run), *processes]
    fetch = ["download_datasets", "--max_rows", str(args.hub_rows), "--min_free_disk", "0", *processes]
    largest = next(iter(sources))
    # About a fifth of the text, and a source that must be repeated.
    mix = ["--mix", f"{largest}=0.6,extra=0.4", "--tokens", f"{round(args.corpus_mb * 50_000)}"]
    cleaning = ["--min_chars", "500", "--max_chars", "200000", "--deduplicate"]
    cleaning += ["--decontaminate", str(work / "benchmark.jsonl")]
    runs = ("doge_lm.data.merge._RUN_BYTES", "doge_lm.data.merge.ROWS_PER_SHARD")
    contents = ("doge_lm.data.download._IDS_PER_UNIT",)
    units = ("doge_lm.data.units.MIN_UNIT_BYTES",)
    near_duplicates = ["data", "near_duplicates", "--datasets_dir", str(run), "--datasets", "extra", *processes]

    def to(folder: Path) -> list[str]:
        return ["--save_dir", str(folder)]

    def from_hub(name: str) -> list[str]:
        return [*fetch, *to(fetched / name), "--cache_dir", str(work / "cache" / name), "--datasets", name]

    def stage(name: str, command: list[str], folder: Path, small: tuple[str, ...] = (), share: bool = False) -> Stage:
        return Stage(name, command, folder, work / "errors", small, share)

    return [
        stage("download --local", ["download_datasets", *to(run), *local], run / "raw"),
        stage("preprocess", [*preprocess, *to(run)], run / "tokenized"),
        stage("preprocess, cleaned", [*preprocess, *to(clean), *cleaning], clean / "tokenized"),
        stage("preprocess --mix --tokens", [*preprocess, *to(mixed), *mix], mixed / "tokenized", units, share=True),
        stage("merge", [*merge, *to(work / "merged")], work / "merged", runs),
        stage("merge --mix --tokens", [*merge, *to(work / "repeated"), *mix], work / "repeated", runs),
        stage("near_duplicates", [*near_duplicates, *to(near)], near, units),
        stage("download from a hub", from_hub("cosmopedia-v2"), fetched / "cosmopedia-v2" / "raw"),
        stage("download of contents", from_hub("python-edu"), fetched / "python-edu" / "raw", contents),
    ]


def choose_stages(stages: list[Stage], names: list[str] | None, log: Callable[[str], None]) -> list[Stage]:
    """The stages to kill.

    Raises:
        SystemExit: if a name is none of theirs.
    """
    unknown = set(names or []) - {stage.name for stage in stages}
    if unknown:
        raise SystemExit(f"--stages: there is no {sorted(unknown)[0]!r} (there: {[stage.name for stage in stages]})")
    chosen = [stage for stage in stages if not names or stage.name in names]
    if importlib.util.find_spec("datatrove") is None:
        log("near_duplicates is left out: datatrove is not installed")
        chosen = [stage for stage in chosen if stage.name != "near_duplicates"]
    return chosen


def show(counts: dict[str, Count]) -> None:
    """Prints a table and one line of JSON."""
    print(
        "| stage | uninterrupted, s | kills | of them with finished shards | results | identical | "
        "finished shards at kills | written again |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, count in counts.items():
        print(
            f"| {name} | {count.seconds:.1f} | {count.kills} | {count.kills_with_finished_shards} | {count.results} | "
            f"{'all' if not count.differences else 'NOT ALL'} | {count.finished_shards_seen} | "
            f"{len(count.redone_shards)} |"
        )
    for name, count in counts.items():
        for failure in count.failures:
            print(f"{name}, run again after a kill: {failure}")
    print(json.dumps({name: asdict(count) for name, count in counts.items()}))


def run_all(args: argparse.Namespace, work: Path, log: Callable[[str], None]) -> dict[str, Count]:
    """Makes the corpus and the results, then kills."""
    sources = make_corpus(work, args)
    make_benchmark(work / "benchmark.jsonl")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(work / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    counts: dict[str, Count] = {}
    with servers(args.hub_rows) as addresses:
        environment |= addresses
        stages = make_stages(work, sources, args)
        chosen = choose_stages(stages, args.stages, log)
        results = {}
        for stage in stages:
            if stage not in chosen and stage.name not in NEEDED:
                continue
            counts[stage.name] = Count()
            results[stage.name] = reference(stage, environment, counts[stage.name])
            log(f"{stage.name}: {counts[stage.name].seconds:.1f} s, {counts[stage.name].files} files")
        rng = random.Random(args.seed)
        for number, stage in enumerate(chosen):
            share = args.kills // len(chosen) + (number < args.kills % len(chosen))
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
    parser.add_argument("--stages", nargs="+", help="kill only these, by their names (default: all)")
    parser.add_argument("--work", type=Path, help="where to write a temporary folder")
    args = parser.parse_args()
    args.tokenizer_path = args.tokenizer_path.resolve()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        counts = run_all(args, Path(folder), lambda line: print(line, file=sys.stderr, flush=True))
    show(counts)
    return 1 if any(count.differences or count.redone_shards or count.failures for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
