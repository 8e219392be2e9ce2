"""`doge-lm merge_datasets`: tokenized sources -> a shuffled training set and a test set, physically in that order.

Sources are grouped by what they are for, `pretrain` and `finetune`. All samples of a kind are permuted by the seed
and written shard by shard, so that training reads files from front to back (see `doge_lm.data.shuffle`). The test set
is made of whole groups with no document that is trained on (see `doge_lm.data.split`). With `--mix` and `--tokens`
sources are repeated or cut to their shares (see `doge_lm.data.mix`).

Every step leaves records in `.tmp-KIND/work`, so that an interrupted run goes on where it was. Memory does not grow
with the corpus, but with the test set and the number of shards; the disk must hold the rows twice for a while.
"""

import argparse
import bisect
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from doge_lm.data.cleaning import warnings_of_deduplicated
from doge_lm.data.manifest import (
    KINDS,
    MANIFEST_NAME,
    MAX_IDENTITY_BYTES,
    RAW_FOLDER,
    SOURCE_NAME,
    TOKENIZED_FOLDER,
    Identity,
    InputFile,
    Kind,
    Manifest,
    OutputFile,
    RawSource,
    SampleCounts,
    check_name,
    check_sums,
    file_sha256,
    file_state,
    is_made,
    made_already,
    package_versions,
    read_record,
    resumable_directory,
    write_record,
)
from doge_lm.data.mix import Mix, SourcePlan, epoch_warnings, epochs_table, parse_tokens, plan_epochs
from doge_lm.data.shuffle import (
    BOUND_DTYPE,
    Buckets,
    Dealt,
    DealTask,
    Share,
    ShuffleTask,
    UnitFile,
    count_rows,
    deal,
    runs_of,
    shuffle,
    start_shuffling,
    stop_shuffling,
    unit_batches,
)
from doge_lm.data.split import (
    Candidates,
    ScanTask,
    SearchTask,
    choose_test_rows,
    read_candidates,
    scan,
    search,
    share_out,
    smallest_group,
)
from doge_lm.data.storage import (
    ROWS_PER_SHARD,
    check_files,
    describe_dataset,
    describe_dataset_dict,
    id_dtype,
    shard_name,
)
from doge_lm.data.workers import Workers, check_num_proc
from doge_lm.errors import UserError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_RUN_BYTES = 2**30
# A run is dealt by one process at a time, which holds some 150 bytes for each row that it writes.
_RUN_ROWS = 2**20
_RUN_UNITS = 1024  # memory maps at once
# In a large set runs are larger instead of more: shuffling holds all open.
_MOST_RUNS = 256
# The test set is chosen among groups with so many rows in all: these, or eight times the test set. Where too many of
# them hold documents that stand elsewhere too, or are too large, it is chosen anew among eight times as many, up to a
# limit.
_CANDIDATE_ROWS = 2**16
_CANDIDATE_TIMES = 8
_MOST_CANDIDATE_ROWS = 2**20
# Pieces of documents in the rows of all candidates, about: some 100 bytes are held for each. They come to more than
# this where documents are very short.
_CANDIDATE_PIECES = 2**22
# A test set that takes more of a source than this is worth a word.
_LARGE_TEST_SHARE = 0.2
# Samples of the test set where the user names no number: so many, but in a small set at most this share.
_USUAL_TEST_SIZE = 1000
_USUAL_TEST_SHARE = 0.05
_WORK = "work"
BEYOND_BUDGET = "beyond the token budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `merge_datasets`."""
    parser.add_argument(
        "--datasets_dir", type=Path, required=True, help="where preprocess_datasets saved: DIR/tokenized is read"
    )
    parser.add_argument("--save_dir", type=Path, required=True, help="DIR/pretrain and DIR/finetune are written")
    parser.add_argument("--num_proc", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--seed", type=int, default=233, help="fixes the order and the split (default: 233)")
    parser.add_argument(
        "--test_size",
        type=int,
        help=f"samples of each test set (default: {_USUAL_TEST_SIZE:,}, but at most 5%% of the samples of a kind)",
    )
    parser.add_argument(
        "--mix",
        metavar="NAME=WEIGHT,...",
        help="shares of sources in the tokens of the training set, as in a=0.5,b=0.3,c=0.2; other sources of their "
        "kind are left out (default: every source once)",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        help="tokens of the training set, as in 4B, 500M or 1e9; of the kind that --mix names, or else of the "
        "pre-training set (default: all there are; with --mix as many as there are without repeating a source)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make the sets again, even if they are there with other settings"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `merge_datasets`; see `merge`."""
    manifests = merge(
        args.datasets_dir,
        args.save_dir,
        num_proc=args.num_proc,
        seed=args.seed,
        test_size=args.test_size,
        mix=None if args.mix is None else Mix.parse(args.mix),
        tokens=None if args.tokens is None else parse_tokens(args.tokens),
        overwrite=args.overwrite,
    )
    for kind in KINDS:
        if kind not in manifests:
            print(f"{kind}: no source of this kind in {args.datasets_dir / TOKENIZED_FOLDER}, so none was written")
            continue
        _print_result(args.save_dir / kind, manifests[kind], args.test_size is None)
    return 0


def _print_result(target: Path, manifest: Manifest, usual_size: bool) -> None:
    kind = manifest.kind
    test_size = manifest.settings["test_size"]
    print(f"{target}: sequences of {manifest.sequence_length:,} tokens")
    print(_split_table(manifest))
    if usual_size and test_size < _USUAL_TEST_SIZE:
        print(
            f"{kind}: --test_size was not given, so it is {test_size:,}: {_USUAL_TEST_SHARE:.0%} of the samples, since "
            f"there are too few for {_USUAL_TEST_SIZE:,}"
        )
    for note in _split_notes(manifest):
        print(f"{kind}: note: {note}")
    if manifest.repeated_documents:
        least = "" if manifest.settings["candidates"] == "all" else "at least "
        print(f"{kind}: {least}{_repeats(manifest.repeated_documents)}; their samples stay on one side of the split")
    got = manifest.split_counts("test").samples
    if got != test_size:
        print(f"{kind}: the test set has {got:,} samples, not {test_size:,}: {_why_short(manifest)}")


def _why_short(manifest: Manifest) -> str:
    if manifest.settings["candidates"] == "all":
        return "samples that share a document stay together, and no choice of them comes nearer"
    if not manifest.repeated_documents:
        return "samples that share a document stay together, and no choice of those that were looked at comes nearer"
    return (
        "most samples that it was chosen among hold documents that stand elsewhere too; `doge-lm preprocess_datasets "
        "--deduplicate` removes repeats within a source"
    )


def merge(
    datasets_dir: Path,
    save_dir: Path,
    *,
    num_proc: int = 1,
    seed: int = 233,
    test_size: int | None = None,
    mix: Mix | None = None,
    tokens: int | None = None,
    overwrite: bool = False,
) -> dict[Kind, Manifest]:
    """Merges all tokenized sources by kind, shuffles and splits; writes `save_dir/KIND`, whole or not at all.

    The result is the same for any `num_proc`, and after any interruption. What is there already, made from the same
    sources with the same settings, is left as it is.

    Args:
        datasets_dir: holds `tokenized/NAME`, as `preprocess_datasets` leaves it.
        save_dir: where to write.
        num_proc: processes; 1 works in this process.
        seed: fixes the order and the split.
        test_size: samples of the test set, at most half of those of its kind; fewer only where whole groups do not
            come to it. By default 1,000, or 5% of the samples if that is less.
        mix: shares of the sources of one kind in the tokens of its training set; other sources of that kind are left
            out, and the other kind is merged without it.
        tokens: size of the training set that `mix` is about, or else of the pre-training set (of the fine-tuning set
            if there is no other).
        overwrite: replace sets, and what interrupted runs left, that were made with other settings.

    Returns:
        The manifest of each kind that was there.

    Raises:
        UserError: if there is nothing to merge, a file is damaged, two sources differ in tokenizer or length (or,
            within a kind, in another setting), there are too few samples, a set is there with other settings, or the
            disk is full.
    """
    check_num_proc(num_proc)
    if test_size is not None and test_size < 1:
        raise UserError(f"--test_size {test_size} is not possible; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed} is not possible; it must be between 0 and {2**32 - 1:,}")
    sources = _tokenized_sources(datasets_dir / TOKENIZED_FOLDER)
    _check_alike([source.manifest for source in sources])
    jobs = _jobs(sources, mix, tokens, seed, test_size)
    for job in jobs:
        _check_same_settings([source.manifest for source in job.sources])
        _check_enough(job)
    return {job.kind: _merge_kind(job, save_dir / job.kind, num_proc, overwrite) for job in jobs}


@dataclass(frozen=True)
class _Source:
    directory: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.manifest.files)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.manifest.files)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the sha256s of its files."""
        return hashlib.sha256("".join(file.sha256 for file in self.manifest.files).encode("ascii")).hexdigest()

    def units(self, number: int) -> list[UnitFile]:
        return [
            UnitFile(self.directory / file.path, self.name, number, position, file.rows, file.bytes)
            for position, file in enumerate(self.manifest.files)
        ]


@dataclass(frozen=True)
class _Job:
    """One kind to be merged. `mix` and `tokens` are None where they are not about this kind."""

    kind: Kind
    sources: list[_Source]
    left_out: list[str]
    mix: Mix | None
    tokens: int | None
    seed: int
    test_size: int

    @property
    def units(self) -> list[UnitFile]:
        return [unit for number, source in enumerate(self.sources) for unit in source.units(number)]

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def dtype(self) -> np.dtype[Any]:
        return id_dtype(self.sources[0].manifest.tokenizer.vocab_size)

    @property
    def concatenated(self) -> bool:
        """Whether its rows were cut wherever one ended."""
        settings = self.sources[0].manifest.settings
        return settings.get("padding") == "packed" and settings.get("packing") == "concat"

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "test_size": self.test_size,
            "mix": None if self.mix is None else self.mix.as_text(),
            "tokens": self.tokens,
            "inputs": {source.name: [source.bytes, source.fingerprint] for source in self.sources},
        }

    @property
    def identity(self) -> Identity:
        return _identity(self.sources[0].manifest, self.settings)


_IDENTITY_SETTINGS = ("seed", "test_size", "mix", "tokens", "inputs")


def _identity(manifest: Manifest, settings: dict[str, Any]) -> Identity:
    """What a merged set depends on."""
    return {
        "tokenizer": manifest.tokenizer.sha256,
        "max_len": manifest.sequence_length,
        **{name: settings.get(name) for name in _IDENTITY_SETTINGS},
    }


def _identity_of(target: Path) -> Identity:
    manifest = Manifest.read(target)
    return _identity(manifest, manifest.settings)


def _usual_test_size(rows: int) -> int:
    return min(_USUAL_TEST_SIZE, max(1, int(_USUAL_TEST_SHARE * rows)))


def _jobs(sources: list[_Source], mix: Mix | None, tokens: int | None, seed: int, test_size: int | None) -> list[_Job]:
    """What to merge, kind by kind."""
    by_kind = {kind: [source for source in sources if source.manifest.kind == kind] for kind in KINDS}
    mixed = _mixed_kind(by_kind, mix)
    jobs = []
    for kind, there in by_kind.items():
        if not there:
            continue
        own_mix, own_tokens = (mix, tokens) if kind == mixed else (None, None)
        used = [source for source in there if own_mix is None or source.name in own_mix.weights]
        left_out = [source.name for source in there if source not in used]
        size = _usual_test_size(sum(source.rows for source in used)) if test_size is None else test_size
        jobs.append(_Job(kind, used, left_out, own_mix, own_tokens, seed, size))
    return jobs


def _mixed_kind(by_kind: dict[Kind, list[_Source]], mix: Mix | None) -> Kind:
    """The kind that `--mix` and `--tokens` are about."""
    if mix is None:
        return next(kind for kind in KINDS if by_kind[kind])
    mix.check_names([source.name for there in by_kind.values() for source in there])
    named = {kind: [source.name for source in there if source.name in mix.weights] for kind, there in by_kind.items()}
    kinds = [kind for kind in KINDS if named[kind]]
    if len(kinds) > 1:
        raise UserError(
            f"--mix names sources of two kinds, {' and '.join(f'{named[kind][0]} ({kind})' for kind in kinds)}; they "
            "become two sets: name the sources of one kind, the other is merged without a mix"
        )
    return kinds[0]


def _check_enough(job: _Job) -> None:
    if job.rows <= job.test_size:
        raise UserError(
            f"{job.kind}: there are only {job.rows:,} samples, so --test_size {job.test_size} leaves none to train "
            "on; choose a smaller --test_size or add data"
        )
    if job.test_size > job.rows / 2:
        raise UserError(
            f"{job.kind}: --test_size {job.test_size} is more than half of the {job.rows:,} samples; choose a smaller "
            f"one, such as {_usual_test_size(job.rows)}, or leave it out"
        )


def _tokenized_sources(folder: Path) -> list[_Source]:
    """All tokenized sources, in the order of their names."""
    command = f"`doge-lm preprocess_datasets --datasets_dir {folder.parent} --save_dir {folder.parent}`"
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; run {command} first")
    directories = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not directories:
        raise UserError(f"{folder} holds no tokenized source; run {command} first")
    sources = []
    for directory in directories:
        manifest = Manifest.read(directory)
        if manifest.stage != "tokenized":
            raise UserError(f"{directory / MANIFEST_NAME} is not of a tokenized source; move {directory} elsewhere")
        check_name(directory, manifest.name)
        check_files(directory, manifest.files)
        _check_fresh(folder.parent / RAW_FOLDER / manifest.name, manifest, command)
        sources.append(_Source(directory, manifest))
    return sources


def _check_fresh(raw: Path, manifest: Manifest, command: str) -> None:
    """Refuses a source that was taken in anew after it was tokenized: its old text would be trained on."""
    if not (raw / SOURCE_NAME).is_file():
        return
    files = RawSource.read(raw).files
    now = [(Path(file.path).name, file.bytes) for file in files]
    then = [(Path(file.path).name, file.bytes) for file in manifest.inputs]
    if now != then:
        raise UserError(f"{raw} names other files than {manifest.name!r} was tokenized from; run {command} again")
    small = sum(file.bytes for file in files) <= MAX_IDENTITY_BYTES
    pairs = zip(files, manifest.inputs, strict=True)
    for file, before in tqdm(pairs, f"{manifest.name}: inputs", len(files), unit=" files", disable=None, delay=5):
        path = raw / file.path
        sha256 = file.sha256 or _sha256_now(path, before, small=small)
        if sha256 and before.sha256 and sha256 != before.sha256:
            raise UserError(
                f"{path} has other content than when {manifest.name!r} was tokenized (sha256 {sha256[:12]}..., it was "
                f"{before.sha256[:12]}...); run {command} again"
            )


def _sha256_now(path: Path, before: InputFile, *, small: bool) -> str:
    """The sha256 of an input; empty if it cannot be read, or is of a large source and was not written to since."""
    state = file_state(path) if before.sha256 else ""
    if not state or (not small and before.state in ("", state)):
        return ""
    return file_sha256(path)


def _check_alike(manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        if other.tokenizer != first.tokenizer:
            raise UserError(
                f"the sources {first.name!r} and {other.name!r} were made with different tokenizers (sha256 "
                f"{first.tokenizer.sha256[:12]} and {other.tokenizer.sha256[:12]}); preprocess one of them again"
            )
        if other.sequence_length != first.sequence_length:
            raise UserError(
                f"the sources {first.name!r} and {other.name!r} were made with different --max_len "
                f"({first.sequence_length} and {other.sequence_length}); preprocess one of them again"
            )


# What samples are. The rest (cleaning, budgets, the size of a unit) is each source's own affair.
_SHARED_SETTINGS = ("padding", "packing", "train_on_prompts")


def _check_same_settings(manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        for name in _SHARED_SETTINGS:
            one, two = first.settings.get(name), other.settings.get(name)
            if one != two:
                raise UserError(
                    f"the sources {first.name!r} and {other.name!r} were made with different --{name} ({one} and "
                    f"{two}); preprocess one of them again"
                )


# ---------------------------------------------------------------------------------------------------------------
# One kind, step by step
# ---------------------------------------------------------------------------------------------------------------


class _UnusableError(UserError):
    """These settings come to nothing with these sources: no use in going on with the partial directory."""


def _merge_kind(job: _Job, target: Path, num_proc: int, overwrite: bool) -> Manifest:
    for name in job.left_out:
        print(f"{job.kind}: {name} is left out, since --mix does not name it")
    _warn_of_deduplicated(job)
    if is_made(target, job.identity, _identity_of, overwrite=overwrite):
        print(made_already(target))
        return Manifest.read(target)
    with resumable_directory(target, job.identity, overwrite=overwrite) as folder:
        # The manifest is put there when all else is, so it says that only the work is left to be removed.
        if not (folder / MANIFEST_NAME).is_file():
            try:
                _check_room(job, folder)
                _make(job, folder, num_proc)
            except _UnusableError:
                shutil.rmtree(folder)
                raise
        shutil.rmtree(folder / _WORK, ignore_errors=True)
    return Manifest.read(target)


def _check_room(job: _Job, folder: Path) -> None:
    """Says how large the set is going to be, and refuses one that its disk does not hold.

    An epoch over a source has as many bytes as its files. The dealt rows lie beside the set while it is made. The test
    set comes on top where the training set is limited, as far as is known before it is chosen.

    Args:
        job: the kind.
        folder: where it is made; what an interrupted run wrote there is not written again.

    Raises:
        UserError: if there is too little room.
    """
    there = {source.name: source.manifest.samples["all"][source.name].tokens for source in job.sources}
    tokens, size = sum(there.values()), sum(source.bytes for source in job.sources)
    if job.mix is not None or job.tokens is not None:
        plans = plan_epochs(there, job.mix, job.tokens)
        test = size * job.test_size // job.rows
        tokens = sum(plan.wanted for plan in plans)
        size = test + sum(round(source.bytes * plan.epochs) for source, plan in zip(job.sources, plans, strict=True))
    said = f"about {tokens:,} tokens and {_size(size)}, and as much again while it is merged"
    print(f"{job.kind}: {said}", flush=True)  # before the long work
    need = 2 * size - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if need > free:
        fewer = ", choose fewer --tokens" if job.tokens is not None else ""
        raise UserError(
            f"{job.kind}: the disk is full before the set is finished: about {tokens:,} tokens have {_size(size)}, and "
            f"as much again is needed while it is merged; {_size(need)} ({need:,} bytes) are to be written yet, but "
            f"{_size(free)} ({free:,} bytes) are free at {folder.parent}. Free some space{fewer}, or choose another "
            "--save_dir"
        )


def _size(count: int) -> str:
    return f"{count / 10**9:,.1f} GB" if count >= 10**9 else f"{count / 10**6:,.1f} MB"


def _warn_of_deduplicated(job: _Job) -> None:
    """Warns where a source is merged together with what near_duplicates made of it."""
    way_out = (
        f"move the one that you do not want out of the folder {TOKENIZED_FOLDER}, or name the other one with --mix"
    )
    for warning in warnings_of_deduplicated([source.name for source in job.sources], "merged", way_out):
        print(f"{job.kind}: warning: {warning}")


def _make(job: _Job, folder: Path, num_proc: int) -> None:
    work = folder / _WORK
    work.mkdir(exist_ok=True)
    split = _split(job, work, num_proc)
    plans = _plans(job, split)
    buckets, shares = _shares(job, split, plans)
    runs, bounds, dealt = _deal(job, work, shares, buckets, num_proc)
    written = _shuffle(job, folder, runs, bounds, buckets, num_proc)
    files, samples = _collect(written)
    for name, outputs in files.items():
        describe_dataset(folder / name, job.dtype, outputs, name)
    describe_dataset_dict(folder, list(files))
    for source in job.sources:
        _check_complete(source, dealt[source.name], samples)
    manifest = _manifest(job, split, plans, dealt, files, samples)
    manifest.write(work)
    os.replace(work / MANIFEST_NAME, folder / MANIFEST_NAME)


def _processes(num_proc: int, tasks: Sequence[Any]) -> Workers:
    """For a step whose functions need no preparation of the process."""
    return Workers(max(1, min(num_proc, len(tasks))), _nothing, ())


def _nothing() -> None:
    pass


def _map(
    description: str, processes: Workers, function: Callable[[_Task], _Result], tasks: Sequence[_Task]
) -> list[_Result]:
    return list(_stream(description, processes, function, tasks))


def _stream(
    description: str, processes: Workers, function: Callable[[_Task], _Result], tasks: Sequence[_Task]
) -> Iterator[_Result]:
    """As `_map`, one result at a time: for those that are too large to be held together."""
    with processes as workers, closing(workers.map(function, tasks)) as results:
        yield from tqdm(results, desc=description, total=len(tasks), disable=None)


# ---------------------------------------------------------------------------------------------------------------
# The split
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """The test set.

    Attributes:
        rows: by unit.
        counts: what they come to by source.
        repeated: how many documents are known to occur twice.
        all_candidates: all groups were looked at.
        smallest: where there is no test set, the rows of the smallest group that may be in one; 0 if none may.
    """

    rows: dict[int, list[int]]
    counts: dict[str, SampleCounts]
    repeated: int
    all_candidates: bool
    smallest: int = 0


def _split(job: _Job, work: Path, num_proc: int) -> _Split:
    record = work / "split.json"
    done = read_record(record)
    if done is None:
        split = _choose(job, work, num_proc)
        write_record(record, {**asdict(split), "rows": sorted(split.rows.items())})
        return split
    counts = {name: SampleCounts(**entry) for name, entry in done["counts"].items()}
    return _Split(dict(map(tuple, done["rows"])), counts, done["repeated"], done["all_candidates"])


def _choose(job: _Job, work: Path, num_proc: int) -> _Split:
    """Chooses the test set, among more and more candidates until it is whole or there are no more."""
    room = max(_CANDIDATE_ROWS, _CANDIDATE_TIMES * job.test_size)
    most = max(room, _MOST_CANDIDATE_ROWS)
    limits = _candidate_limits(job, room)
    while True:
        split = _choose_among(job, work, room, limits, num_proc)
        found = sum(map(len, split.rows.values()))
        room = min(room * _CANDIDATE_TIMES, most)
        before, limits = limits, _candidate_limits(job, room)
        if found == job.test_size or limits == before:
            break
    if not split.rows:
        raise _UnusableError(_no_test_set(job, split))
    return split


def _choose_among(job: _Job, work: Path, room: int, limits: list[int] | None, num_proc: int) -> _Split:
    """Chooses the test set among candidates of so many rows, or among all groups where there are no more."""
    units = job.units
    shares = _test_shares(job)
    candidates = _candidates(job, units, limits, num_proc)
    if not len(candidates.groups):  # every group has more rows than there is room for
        return _Split({}, {}, 0, all_candidates=False)
    manifest = job.sources[0].manifest
    concatenated = job.concatenated
    rows = read_candidates(
        units, candidates, manifest.tokenizer.bos_token_id, manifest.sequence_length, concatenated=concatenated
    )
    elsewhere = np.empty(0, np.uint64)
    if limits is not None:
        hashes = work / f"hashes-{room}.npy"
        np.save(hashes, rows.hashes)
        tasks = [
            SearchTask(
                work / f"search-{room}-{number:05d}.json",
                [(units[position], candidates.groups[candidates.units == position]) for position in run],
                hashes,
                manifest.tokenizer.bos_token_id,
                manifest.sequence_length,
                concatenated,
            )
            for number, run in enumerate(_runs(units))
        ]
        for found in _stream(f"{job.kind}: repeated documents", _processes(num_proc, tasks), search, tasks):
            elsewhere = np.union1d(elsewhere, found)
    chosen = choose_test_rows(rows, elsewhere, shares, job.test_size, job.seed)
    repeated = len(np.union1d(rows.repeated, elsewhere))
    smallest = 0 if chosen else smallest_group(rows, elsewhere)
    return _Split(chosen, _count_test(units, chosen), repeated, limits is None, smallest)


def _candidate_limits(job: _Job, room: int) -> list[int] | None:
    """How many rows of each source may be candidates, if there is room for so many in all; None for all there are."""
    counts = [source.manifest.samples["all"][source.name] for source in job.sources]
    if job.rows <= room and sum(count.pieces for count in counts) <= _CANDIDATE_PIECES:
        return None
    shares = _test_shares(job)
    rooms = (share_out(shares, total) for total in (room, _CANDIDATE_PIECES, job.test_size))
    return [
        max(1, least, min(rows, pieces * count.samples // max(1, count.pieces)))
        for rows, pieces, least, count in zip(*rooms, counts, strict=True)
    ]


def _no_test_set(job: _Job, split: _Split) -> str:
    repeats = _repeats(split.repeated)
    advice = "choose a larger --test_size, or " + (
        f"remove repeats ({repeats})" if split.repeated else "make fewer samples of a document, with a larger --max_len"
    )
    if split.smallest:
        among = f"the {job.rows:,} samples" if split.all_candidates else "the samples that it was chosen among"
        cause = (
            f"{among} share documents so that every group of them is larger (the smallest has {split.smallest:,}); "
            f"{advice}"
        )
    elif split.repeated:
        cause = (
            f"all samples that it was chosen among hold documents that stand elsewhere too ({repeats}); remove them "
            "with `doge-lm preprocess_datasets --deduplicate`, or a source that holds the same as another"
        )
    else:
        cause = (
            "the samples of a document stay together, and every document (or group of documents that share samples) "
            f"has more samples than can be looked at; {advice}"
        )
    return f"{job.kind}: no test set of up to {job.test_size:,} samples can be split off: {cause}"


def _test_shares(job: _Job) -> np.ndarray:
    """In what proportion the sources give to the test set."""
    if job.mix is None:
        return np.array([source.rows for source in job.sources])
    return np.array([round(job.mix.weights[source.name] * 10**9) for source in job.sources])


def _runs(units: list[UnitFile]) -> list[list[int]]:
    """Runs of units, as numbers among all units."""
    runs = []
    begin = 0
    run_bytes = max(_RUN_BYTES, -(-sum(unit.bytes for unit in units) // _MOST_RUNS))
    for run in runs_of(units, run_bytes, _RUN_UNITS):
        runs.append(list(range(begin, begin + len(run))))
        begin += len(run)
    return runs


def _candidates(job: _Job, units: list[UnitFile], limits: list[int] | None, num_proc: int) -> Candidates:
    tasks = [
        ScanTask(
            [(position, units[position]) for position in run],
            [None if limits is None else limits[units[position].source] for position in run],
            job.seed,
        )
        for run in _runs(units)
    ]
    best: dict[int, Candidates] = {}
    for found in _stream(f"{job.kind}: groups", _processes(num_proc, tasks), scan, tasks):
        for source, candidates in found:
            joined = Candidates.join([best[source], candidates]) if source in best else candidates
            best[source] = joined if limits is None else joined.first(limits[source])
    return Candidates.join([best[source] for source in sorted(best)])


def _count_test(units: list[UnitFile], chosen: dict[int, list[int]]) -> dict[str, SampleCounts]:
    counts: dict[str, SampleCounts] = {}
    for position, rows in chosen.items():
        unit = units[position]
        begin = 0
        for batch in unit_batches(unit):
            end = begin + batch.num_rows
            own = rows[bisect.bisect_left(rows, begin) : bisect.bisect_left(rows, end)]
            times = np.bincount(np.array(own, np.int64) - begin, minlength=batch.num_rows)
            counts.setdefault(unit.name, SampleCounts()).add(count_rows(batch, times))
            begin = end
    return counts


def _repeats(count: int) -> str:
    return "1 document occurs more than once" if count == 1 else f"{count:,} documents occur more than once"


# ---------------------------------------------------------------------------------------------------------------
# Dealing and shuffling
# ---------------------------------------------------------------------------------------------------------------


def _plans(job: _Job, split: _Split) -> dict[str, SourcePlan]:
    """What to take of each source."""
    there = {}
    for source in job.sources:
        count = source.manifest.samples["all"][source.name].tokens
        there[source.name] = count - split.counts.get(source.name, SampleCounts()).tokens
    if job.mix is None and job.tokens is None:
        return {name: SourcePlan(name, count, count) for name, count in there.items()}
    for name, count in there.items():
        if count == 0:
            raise _UnusableError(
                f"{job.kind}: all of {name} is in the test set, so the training set can have no share of it; choose "
                "a smaller --test_size, or leave it out with --mix"
            )
    plans = plan_epochs(there, job.mix, job.tokens)
    print(epochs_table(plans))
    for warning in epoch_warnings(plans):
        print(f"{job.kind}: warning: {warning}")
    return {plan.name: plan for plan in plans}


def _shares(job: _Job, split: _Split, plans: dict[str, SourcePlan]) -> tuple[Buckets, list[Share]]:
    """How the rows of every unit are dealt."""
    units = job.units
    shares = []
    train = 0
    for number, source in enumerate(job.sources):
        own = [position for position, unit in enumerate(units) if unit.source == number]
        others = [units[position].rows - len(split.rows.get(position, [])) for position in own]
        total = sum(others)
        copies, extra = plans[source.name].copies(total) if total else (1, 0)
        train += copies * total + extra
        before = 0
        for position in own:
            in_test = split.rows.get(position, [])
            dealt = (0, 0)
            for unit in units[position].parts(_RUN_ROWS // max(1, copies)):
                first = unit.begin or 0
                end = first + unit.rows
                picked = in_test[bisect.bisect_left(in_test, first) : bisect.bisect_left(in_test, end)]
                rows = unit.rows - len(picked)
                # What is left over is shared out along the source, so that every unit gives its part, to the row.
                part = extra * (before + rows) // total - extra * before // total if total else 0
                share = Share(unit, tuple(row - first for row in picked), copies, part, dealt)
                shares.append(share)
                dealt = (dealt[0] + share.dealt[0], dealt[1] + share.dealt[1])
                before += rows
    if train == 0:
        raise _UnusableError(f"{job.kind}: --tokens {job.tokens} is less than one sample; choose more")
    test = sum(map(len, split.rows.values()))
    return Buckets(job.seed, -(-train // ROWS_PER_SHARD), -(-test // ROWS_PER_SHARD)), shares


def _deal(
    job: _Job, work: Path, shares: list[Share], buckets: Buckets, num_proc: int
) -> tuple[list[Path], Path, dict[str, Dealt]]:
    """Deals all runs: their files, the file that says where each bucket begins in them, and each source's rows."""
    tasks = [
        DealTask(work / f"dealt-{number:05d}.arrow", [shares[position] for position in run], buckets, job.dtype)
        for number, run in enumerate(_deal_runs(shares))
    ]
    dealt = {source.name: Dealt.none() for source in job.sources}
    bounds = work / "bounds"
    with bounds.open("wb") as file:
        for record in _stream(f"{job.kind}: dealing", _processes(num_proc, tasks), deal, tasks):
            file.write(np.array(record["bounds"], BOUND_DTYPE).tobytes())
            for name, values in record["sources"].items():
                dealt[name].add(Dealt.from_json(values))
    return [task.path for task in tasks], bounds, dealt


def _deal_runs(shares: list[Share]) -> list[list[int]]:
    """As `_runs`, with the rows that are written limited too: those of short rows, or of many copies, are many."""
    runs: list[list[int]] = []
    for run in _runs([share.unit for share in shares]):
        rows = 0
        for position in run:
            # A unit's lookup tables have an entry for every row, dealt or not.
            own = shares[position].unit.rows * max(1, shares[position].copies) + shares[position].extra
            if position == run[0] or rows + own > _RUN_ROWS:
                runs.append([])
                rows = 0
            runs[-1].append(position)
            rows += own
    return runs


def _shuffle(
    job: _Job, folder: Path, runs: list[Path], bounds: Path, buckets: Buckets, num_proc: int
) -> list[tuple[str, OutputFile, dict[str, SampleCounts]]]:
    """Writes a shard for every bucket: split, file, what lies in it by source."""
    tasks, splits = [], []
    for split, first, count in (("train", 0, buckets.train), ("test", buckets.train, buckets.test)):
        (folder / split).mkdir(exist_ok=True)
        for number in range(count):
            record = folder / _WORK / f"{split}-{number:05d}.json"
            tasks.append(ShuffleTask(first + number, folder / split / shard_name(number), record))
            splits.append(split)
    # Processes are worth their start only for full shards.
    used = max(1, min(num_proc, buckets.train if buckets.train > 1 else 1))
    try:
        workers = Workers(used, start_shuffling, (runs, bounds, job.seed, job.dtype))
        results = _map(f"{job.kind}: shuffling", workers, shuffle, tasks)
    finally:
        stop_shuffling()
    return [(split, file, counts) for split, (file, counts) in zip(splits, results, strict=True)]


def _collect(
    written: Iterable[tuple[str, OutputFile, dict[str, SampleCounts]]],
) -> tuple[dict[str, list[OutputFile]], dict[str, dict[str, SampleCounts]]]:
    """Files by split, and counts by split and source."""
    files: dict[str, list[OutputFile]] = {"train": [], "test": []}
    samples: dict[str, dict[str, SampleCounts]] = {"train": {}, "test": {}}
    for split, file, counts in written:
        files[split].append(file)
        for name, count in counts.items():
            samples[split].setdefault(name, SampleCounts()).add(count)
    return files, samples


def _check_complete(source: _Source, dealt: Dealt, samples: dict[str, dict[str, SampleCounts]]) -> None:
    """Checks that the source's rows were dealt or left out, each once but for repeats, and what was dealt written."""
    before = source.manifest.samples["all"][source.name]
    sums = {}
    for field, count in vars(before).items():
        taken = getattr(dealt.train, field) + getattr(dealt.test, field) - getattr(dealt.again, field)
        sums[f"{field} taken and left out"] = (taken + getattr(dealt.left_out, field), count)
        for split, written in samples.items():
            found = getattr(written.get(source.name, SampleCounts()), field)
            sums[f"{field} of {split}"] = (found, getattr(getattr(dealt, split), field))
    check_sums(source.name, sums)


def _manifest(
    job: _Job,
    split: _Split,
    plans: dict[str, SourcePlan],
    dealt: dict[str, Dealt],
    files: dict[str, list[OutputFile]],
    samples: dict[str, dict[str, SampleCounts]],
) -> Manifest:
    first = job.sources[0].manifest
    return Manifest(
        stage="merged",
        name=job.kind,
        kind=job.kind,
        sequence_length=first.sequence_length,
        tokenizer=first.tokenizer,
        settings={
            **job.settings,
            "candidates": "all" if split.all_candidates else "some",
            "sources": {source.name: source.manifest.settings for source in job.sources},
            "mixture": {name: _mixture(plan, dealt[name]) for name, plan in plans.items()},
            "left_out": job.left_out,
        },
        inputs=[InputFile(str(source.directory), source.bytes) for source in job.sources],
        files=[
            OutputFile(f"{name}/{output.path}", output.bytes, output.rows, output.sha256)
            for name, outputs in files.items()
            for output in outputs
        ],
        accounting={name: entry for source in job.sources for name, entry in source.manifest.accounting.items()},
        samples=samples,
        versions=package_versions(),
        repeated_documents=split.repeated,
    )


def _mixture(plan: SourcePlan, dealt: Dealt) -> dict[str, Any]:
    """What the training set took of one source."""
    return {
        "tokens_there": plan.there,
        "tokens_wanted": plan.wanted,
        "tokens_taken": dealt.train.tokens,
        "epochs": round(dealt.train.tokens / plan.there, 6) if plan.there else 0.0,
        "repeated": {"samples": dealt.again.samples, "tokens": dealt.again.tokens},
        "dropped": {BEYOND_BUDGET: {"samples": dealt.left_out.samples, "tokens": dealt.left_out.tokens}}
        if dealt.left_out.samples
        else {},
    }


def _split_notes(manifest: Manifest) -> list[str]:
    """What of the split a user should know: sources that it takes much of, or nothing."""
    notes = []
    train, test = manifest.samples["train"], manifest.samples["test"]
    for name in sorted(train.keys() | test.keys()):
        in_train, in_test = (split[name].samples if name in split else 0 for split in (train, test))
        if in_test > _LARGE_TEST_SHARE * (in_train + in_test):
            notes.append(
                f"{in_test:,} of the {in_train + in_test:,} samples of {name} are in the test set; a smaller "
                "--test_size leaves more to train on"
            )
        elif not in_test:
            notes.append(
                f"nothing of {name} is in the test set: its share is too small for the samples that share a document"
            )
    return notes


def _split_table(manifest: Manifest) -> str:
    header = f"{'split':<6} {'source':<28} {'samples':>12} {'targets':>16} {'context':>14} {'padding':>14}"
    lines = [header]
    for split, sources in manifest.samples.items():
        for name, counts in sorted(sources.items()):
            lines.append(
                f"{split:<6} {name:<28} {counts.samples:>12,} {counts.targets:>16,} {counts.context:>14,} "
                f"{counts.padding:>14,}"
            )
    return "\n".join(lines)
