"""`doge-lm merge_datasets`: tokenized sources -> a shuffled training set and a test set, physically in that order.

Sources are grouped by what they are for, `pretrain` and `finetune`. All samples of a kind are permuted by the seed
and written shard by shard, so that training reads files from front to back. The test set is made of whole groups
(see `doge_lm.data.packing`). Groups that hold the same document, of whatever source, are joined first (see
`doge_lm.data.repeats`), so that no document is on both sides, even if it occurs more than once.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from doge_lm.data.manifest import (
    KINDS,
    MANIFEST_NAME,
    RAW_FOLDER,
    SOURCE_NAME,
    TOKENIZED_FOLDER,
    InputFile,
    Kind,
    Manifest,
    OutputFile,
    RawSource,
    SampleCounts,
    atomic_directory,
    check_name,
    check_sums,
    package_versions,
)
from doge_lm.data.repeats import Pieces, join_groups, pieces_of_batch
from doge_lm.data.storage import (
    ROWS_PER_BATCH,
    ROWS_PER_SHARD,
    RowReader,
    ShardWriter,
    check_files,
    count_batch,
    describe_dataset,
    describe_dataset_dict,
    id_dtype,
    row_features,
    shard_name,
)
from doge_lm.data.workers import Workers, check_num_proc
from doge_lm.errors import UserError

_Indices = npt.NDArray[np.int64]
# Rows gathered at a time: 4,096 of 2,048 tokens are 17 MB. More rows mean longer runs in each file that is read.
_GATHER_ROWS = 4096
# A test set that takes more of a source than this is worth a word.
_LARGE_TEST_SHARE = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `merge_datasets`."""
    parser.add_argument(
        "--datasets_dir", type=Path, required=True, help="where preprocess_datasets saved: DIR/tokenized is read"
    )
    parser.add_argument("--save_dir", type=Path, required=True, help="DIR/pretrain and DIR/finetune are written")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that write (default: 1)")
    parser.add_argument("--seed", type=int, default=233, help="fixes the order and the split (default: 233)")
    parser.add_argument("--test_size", type=int, default=1000, help="samples of the test set (default: 1000)")


def run(args: argparse.Namespace) -> int:
    """Runs `merge_datasets`; see `merge`."""
    manifests = merge(
        args.datasets_dir, args.save_dir, num_proc=args.num_proc, seed=args.seed, test_size=args.test_size
    )
    for kind in KINDS:
        if kind not in manifests:
            print(f"{kind}: no source of this kind in {args.datasets_dir / TOKENIZED_FOLDER}, so none was written")
            continue
        manifest = manifests[kind]
        print(f"{args.save_dir / kind}: sequences of {manifest.sequence_length:,} tokens")
        print(_split_table(manifest))
        for note in _split_notes(manifest):
            print(f"{kind}: note: {note}")
        if manifest.repeated_documents:
            print(f"{kind}: {_repeats(manifest.repeated_documents)}; their samples stay on one side of the split")
        wanted, got = args.test_size, manifest.split_counts("test").samples
        if got != wanted:
            print(
                f"{kind}: the test set has {got:,} samples, not {wanted:,}: samples that share a document stay "
                "together, and no choice of them comes nearer"
            )
    return 0


def merge(
    datasets_dir: Path, save_dir: Path, *, num_proc: int = 1, seed: int = 233, test_size: int = 1000
) -> dict[Kind, Manifest]:
    """Merges all tokenized sources by kind, shuffles and splits; writes `save_dir/KIND`, whole or not at all.

    The result is the same for any `num_proc`.

    Args:
        datasets_dir: holds `tokenized/NAME`, as `preprocess_datasets` leaves it.
        save_dir: where to write.
        num_proc: processes that write shards; 1 works in this process.
        seed: fixes the order and the split.
        test_size: samples of the test set; fewer only where whole groups do not come to it.

    Returns:
        The manifest of each kind that was there.

    Raises:
        UserError: if there is nothing to merge, a file is damaged, two sources differ in tokenizer or length (or,
            within a kind, in another setting), there are too few samples, or the disk is full.
    """
    check_num_proc(num_proc)
    if test_size < 1:
        raise UserError(f"--test_size {test_size} is not possible; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed} is not possible; it must be between 0 and {2**32 - 1:,}")
    sources = _tokenized_sources(datasets_dir / TOKENIZED_FOLDER)
    _check_alike([source.manifest for source in sources])
    plans = {}
    for kind in KINDS:
        chosen = [source for source in sources if source.manifest.kind == kind]
        if chosen:
            _check_same_settings([source.manifest for source in chosen])
            plans[kind] = _plan(kind, chosen, seed, test_size)
    settings = {"seed": seed, "test_size": test_size}
    return {kind: _write(plan, save_dir / kind, settings, num_proc) for kind, plan in plans.items()}


@dataclass(frozen=True)
class _Source:
    directory: Path
    manifest: Manifest

    @property
    def files(self) -> list[Path]:
        return [self.directory / file.path for file in self.manifest.files]


@dataclass(frozen=True)
class _Plan:
    """Which rows go where. Rows are numbered source after source, in the order of `sources`."""

    kind: Kind
    sources: list[_Source]
    splits: dict[str, _Indices]
    repeated_documents: int


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
    now = [(Path(file.path).name, file.bytes) for file in RawSource.read(raw).files]
    then = [(Path(file.path).name, file.bytes) for file in manifest.inputs]
    if now != then:
        raise UserError(f"{raw} names other files than {manifest.name!r} was tokenized from; run {command} again")


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


def _check_same_settings(manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        for name in sorted(first.settings.keys() | other.settings.keys()):
            one, two = first.settings.get(name), other.settings.get(name)
            if one != two:
                raise UserError(
                    f"the sources {first.name!r} and {other.name!r} were made with different --{name} ({one} and "
                    f"{two}); preprocess one of them again"
                )


# ---------------------------------------------------------------------------------------------------------------
# Order and split
# ---------------------------------------------------------------------------------------------------------------


def _plan(kind: Kind, sources: list[_Source], seed: int, test_size: int) -> _Plan:
    groups, repeated = _groups(sources)
    total = len(groups)
    if total <= test_size:
        raise UserError(
            f"{kind}: there are only {total:,} samples, so --test_size {test_size} leaves none to train on; choose a "
            "smaller --test_size or add data"
        )
    row_source = np.repeat(np.arange(len(sources)), [_rows(source) for source in sources])
    in_test = share_test_groups(groups, row_source, test_size, seed)[groups]
    if not in_test.any():
        raise UserError(
            f"{kind}: no test set of up to {test_size:,} samples can be split off: the {total:,} samples share "
            f"documents so that every group of them is larger; choose a larger --test_size"
            + (f", or remove repeats ({_repeats(repeated)})" if repeated else "")
        )
    order = _random(seed, 0).permutation(total)
    return _Plan(kind, sources, {"train": order[~in_test[order]], "test": order[in_test[order]]}, repeated)


def _groups(sources: list[_Source]) -> tuple[_Indices, int]:
    """The group of every row, numbered from 0 over all sources, and how many documents occur more than once.

    Rows that share a document have the same group: rows of one source by packing, and all others because the same
    document stands in both.
    """
    rows: list[_Indices] = []
    pieces: list[Pieces] = []
    count = 0
    for source in sources:
        manifest = source.manifest
        reader = RowReader(source.files)
        groups = reader.column("group").astype(np.int64) + count
        begin = 0
        for batch in reader.batches:
            end = begin + batch.num_rows
            bos, length = manifest.tokenizer.bos_token_id, manifest.sequence_length
            pieces.append(pieces_of_batch(batch, groups[begin:end], bos, length))
            begin = end
        rows.append(groups)
        count = 1 + int(groups.max(initial=count - 1))
    if not pieces:
        return np.concatenate(rows), 0
    joined, repeated = join_groups(Pieces.join(pieces), count)
    return joined[np.concatenate(rows)], repeated


def _repeats(count: int) -> str:
    return "1 document occurs more than once" if count == 1 else f"{count:,} documents occur more than once"


def _random(seed: int, stream: int) -> np.random.RandomState:
    # The legacy generator: its stream is frozen (NEP 19), so a seed means the same order with every later numpy.
    return np.random.RandomState([seed, stream])


def _rows(source: _Source) -> int:
    return sum(file.rows for file in source.manifest.files)


def share_test_groups(groups: _Indices, row_source: _Indices, test_size: int, seed: int) -> npt.NDArray[np.bool_]:
    """Chooses groups for the test set, from each source in proportion to its samples as far as its groups allow.

    What a source's groups are too large for is made up from the others, for the size comes first.

    Args:
        groups: the group of every row, (R,).
        row_source: the source of every row, (R,), ascending.
        test_size: samples wanted.
        seed: fixes the choice.

    Returns:
        Which groups are chosen, (G,).
    """
    sizes = np.bincount(groups)
    owner = np.zeros(len(sizes), np.int64)
    owner[groups[::-1]] = row_source[::-1]  # a group over several sources counts as the first one's
    chosen = np.zeros(len(sizes), np.bool_)
    for source, share in enumerate(_shares(np.bincount(row_source), test_size)):
        own = np.flatnonzero((owner == source) & (sizes > 0))
        chosen[own] = choose_test_groups(sizes[own], share, seed)
    rest = np.flatnonzero(~chosen)
    chosen[rest] = choose_test_groups(sizes[rest], test_size - int(sizes[chosen].sum()), seed)
    if sizes[chosen].sum() < test_size:
        over_all = choose_test_groups(sizes, test_size, seed)
        if sizes[over_all].sum() > sizes[chosen].sum():
            return over_all
    return chosen


def _shares(counts: _Indices, total: int) -> list[int]:
    """`total` shared out in proportion to `counts` in whole numbers, by the largest remainders."""
    exact = counts * total
    shares = exact // counts.sum()
    order = np.argsort(-(exact % counts.sum()), kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return [int(share) for share in shares]


def choose_test_groups(sizes: npt.NDArray[np.int64], test_size: int, seed: int) -> npt.NDArray[np.bool_]:
    """Chooses groups at random whose sizes sum to `test_size`, or to as near below it as there is a choice.

    Groups are taken in random order while they fit. Where that falls short, the sum that comes nearest is worked out
    exactly, and groups of the sizes it needs are taken in the same random order.

    Args:
        sizes: samples of each group, (G,).
        test_size: samples wanted.
        seed: fixes the choice.

    Returns:
        Which groups are chosen, (G,).
    """
    order = _random(seed, 1).permutation(len(sizes))
    chosen = np.zeros(len(sizes), np.bool_)
    room = test_size
    for group in map(int, order):
        if sizes[group] <= room:
            chosen[group] = True
            room -= int(sizes[group])
            if room == 0:
                return chosen
    needed = _nearest_sum(sizes[order], test_size)
    if sum(size * count for size, count in needed.items()) == test_size - room:
        return chosen
    chosen[:] = False
    for size, count in needed.items():
        chosen[order[sizes[order] == size][:count]] = True
    return chosen


def _nearest_sum(sizes: npt.NDArray[np.int64], limit: int) -> dict[int, int]:
    """How many groups of each size to take for the largest sum up to `limit`: a bounded knapsack over sums."""
    values, counts = np.unique(sizes[sizes <= limit], return_counts=True)
    reached = {0: (0, 0)}  # sum -> (size that was added to get there, how many of it)
    for value, available in zip(values.tolist(), counts.tolist(), strict=True):
        for begin in sorted(reached):
            for number in range(1, available + 1):
                total = begin + number * value
                if total > limit or total in reached:
                    break
                reached[total] = (value, number)
    needed: dict[int, int] = {}
    total = max(reached)
    while total:
        value, number = reached[total]
        needed[value] = number
        total -= value * number
    return needed


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ShardTask:
    split: str
    path: Path
    rows: _Indices


def _write(plan: _Plan, target: Path, settings: dict[str, Any], num_proc: int) -> Manifest:
    first = plan.sources[0].manifest
    files = [file for source in plan.sources for file in source.files]
    dtype = id_dtype(first.tokenizer.vocab_size)
    with atomic_directory(target) as folder:
        tasks = _tasks(plan, folder)
        written: dict[str, list[OutputFile]] = {split: [] for split in plan.splits}
        samples: dict[str, dict[str, SampleCounts]] = {split: {} for split in plan.splits}
        # Processes are worth their start only for full shards.
        used = max(1, min(num_proc, sum(len(task.rows) == ROWS_PER_SHARD for task in tasks)))
        with (
            Workers(used, _start_worker, (files, dtype)) as workers,
            closing(workers.map(_write_shard, tasks)) as results,
            tqdm(desc=plan.kind, total=len(tasks), unit=" shards", disable=None) as progress,
        ):
            for task, (output, counts) in zip(tasks, results, strict=True):
                written[task.split].append(output)
                for name, count in counts.items():
                    samples[task.split].setdefault(name, SampleCounts()).add(count)
                progress.update()
        _worker.clear()  # lets go of the files that were read, if they were read in this process
        for split, outputs in written.items():
            describe_dataset(folder / split, row_features(dtype), outputs, split)
        describe_dataset_dict(folder, list(plan.splits))
        _check_complete(plan, samples)
        manifest = Manifest(
            stage="merged",
            name=plan.kind,
            kind=plan.kind,
            sequence_length=first.sequence_length,
            tokenizer=first.tokenizer,
            settings={
                **settings,
                "sources": {source.manifest.name: source.manifest.settings for source in plan.sources},
            },
            inputs=[InputFile(str(path), path.stat().st_size) for path in files],
            files=[
                OutputFile(f"{split}/{output.path}", output.bytes, output.rows, output.sha256)
                for split, outputs in written.items()
                for output in outputs
            ],
            accounting={name: entry for source in plan.sources for name, entry in source.manifest.accounting.items()},
            samples=samples,
            versions=package_versions(),
            repeated_documents=plan.repeated_documents,
        )
        manifest.write(folder)
    return manifest


def _tasks(plan: _Plan, folder: Path) -> list[_ShardTask]:
    """Shards of a fixed number of rows, whoever writes them."""
    tasks = []
    for split, rows in plan.splits.items():
        (folder / split).mkdir()
        for index, begin in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
            path = folder / split / shard_name(index)
            tasks.append(_ShardTask(split, path, rows[begin : begin + ROWS_PER_SHARD]))
    return tasks


_worker: dict[str, Any] = {}  # a process keeps its reader here between shards


def _start_worker(files: list[Path], dtype: np.dtype[Any]) -> None:
    _worker["reader"] = RowReader(files)
    _worker["dtype"] = dtype


def _write_shard(task: _ShardTask) -> tuple[OutputFile, dict[str, SampleCounts]]:
    reader: RowReader = _worker["reader"]
    schema = row_features(_worker["dtype"]).arrow_schema
    counts: dict[str, SampleCounts] = {}
    with ShardWriter(task.path, schema) as shard:
        for begin in range(0, len(task.rows), _GATHER_ROWS):
            gathered = reader.take(task.rows[begin : begin + _GATHER_ROWS]).replace_schema_metadata(schema.metadata)
            names = np.asarray(gathered.column("source").to_pylist())
            for name in np.unique(names):
                part = gathered.filter(names == name)
                counts.setdefault(str(name), SampleCounts()).add(count_batch(part))
            for offset in range(0, gathered.num_rows, ROWS_PER_BATCH):
                shard.write(gathered.slice(offset, ROWS_PER_BATCH))
    return shard.output(), counts


def _check_complete(plan: _Plan, samples: dict[str, dict[str, SampleCounts]]) -> None:
    """Checks that the rows of both splits together are the rows of the sources."""
    for source in plan.sources:
        name = source.manifest.name
        total = SampleCounts()
        for split in plan.splits:
            total.add(samples[split].get(name, SampleCounts()))
        before = source.manifest.samples["all"][name]
        check_sums(
            name,
            {f"{field} of all splits": (value, getattr(before, field)) for field, value in vars(total).items()},
        )


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
