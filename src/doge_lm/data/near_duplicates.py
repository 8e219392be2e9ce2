"""`doge-lm data near_duplicates`: of documents that are nearly the same, keep one. MinHash, by the library datatrove.

Four steps, each of tasks that run side by side: signatures (a task a unit of the source), buckets (pairs whose
signatures agree), clusters, and the filter, which writes the parts of `raw/NAME-dedup` in the form that
`preprocess_datasets` reads. Nothing is downloaded: words are told apart by letters and spaces, in scripts without
spaces every character is a word.

Everything is written in `.tmp-NAME-dedup` beside the result. datatrove marks a task that is done by an empty file,
after the task has closed its files, and does any other task again from its beginning; so an interrupted run is gone on
with. On a cluster with Slurm every step is an array of jobs that waits for the one before, and a last job puts the
result in its place by the command for one machine, which finds all tasks done.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zstandard
from tqdm import tqdm

from doge_lm.data.manifest import (
    DEDUPLICATED_SUFFIX,
    MAX_IDENTITY_BYTES,
    PART_SUFFIX,
    RAW_FOLDER,
    SOURCE_NAME,
    Identity,
    InputFile,
    Kind,
    RawSource,
    check_taken_in,
    explain_disk_errors,
    file_sha256,
    file_state,
    is_made,
    made_already,
    partial_directory,
    read_record,
    resumable_directory,
    write_record,
)
from doge_lm.data.sources import (
    HOW_TO_SKIP,
    MAX_DOCUMENT_BYTES,
    BadInputError,
    ConversationRow,
    Row,
    TextRow,
    add_bad_input_arguments,
)
from doge_lm.data.units import Segment, Stream, Unit, plan_units, read_unit, usual_unit_bytes
from doge_lm.data.workers import Workers, check_num_proc
from doge_lm.errors import UserError

_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
# Every task of the buckets reads the signatures of all units at once: their number stays below that of the files that
# a process may have open, and below that of the jobs that Slurm takes in one array.
_MOST_TASKS = 400
# A document is compared in pieces of so many characters, and so many of its n-grams are hashed at a time: a piece takes
# some tens of MB, a hash of all n-grams at once would take gigabytes where a document has 16 MiB.
_PIECE_CHARACTERS = 2**18
_NGRAMS_AT_ONCE = 2**12
# Within the partial directory: what datatrove writes, and records of what was read and written.
_WORK_FOLDER = "work"
_JOBS_NAME = "slurm.json"

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class NearDuplicateSettings:
    """How alike two documents must be, and what is bad input.

    Two documents that share the fraction s of their n-grams are found with the probability 1 - (1 - s^h)^b, for b
    buckets of h hashes: 92% at s = 0.8 and 56% at 0.7 with the defaults.

    Attributes:
        ngram_words: words of an n-gram.
        buckets: b.
        hashes: h.
        on_error: whether bad input ends the run, or is left out and counted.
        max_document_bytes: lines, texts and rows above this are bad input.
    """

    ngram_words: int = 5
    buckets: int = 14
    hashes: int = 8
    on_error: OnError = "stop"
    max_document_bytes: int = MAX_DOCUMENT_BYTES


@dataclass(frozen=True)
class SlurmSettings:
    """What every job asks of Slurm.

    Attributes:
        partition: where it runs.
        time: its limit, as `sbatch --time` takes it.
        memory_gb: memory of a job, of which each has one processor.
        qos: quality of service; empty for the cluster's own default.
    """

    partition: str
    time: str
    memory_gb: int
    qos: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `data near_duplicates`."""
    default = NearDuplicateSettings()
    parser.add_argument("--datasets_dir", type=Path, required=True, help="DIR/raw/NAME is read for each source")
    parser.add_argument("--datasets", nargs="+", required=True, metavar="NAME", help="the sources to do")
    parser.add_argument("--save_dir", type=Path, required=True, help="DIR/raw/NAME-dedup is written for each source")
    parser.add_argument("--num_proc", type=int, default=1, help="tasks at a time (default: 1)")
    parser.add_argument(
        "--ngram_words", type=int, default=default.ngram_words, help=f"words of an n-gram ({default.ngram_words})"
    )
    parser.add_argument("--buckets", type=int, default=default.buckets, help=f"buckets ({default.buckets})")
    parser.add_argument("--hashes", type=int, default=default.hashes, help=f"hashes of a bucket ({default.hashes})")
    add_bad_input_arguments(parser, "")
    parser.add_argument("--overwrite", action="store_true", help="make results anew that are there already")
    group = parser.add_argument_group("clusters of machines", "--num_proc is then the number of jobs at a time")
    group.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="local: on this machine (default); slurm: submit jobs to Slurm and return; DIR must be on a file system "
        "that all machines share",
    )
    group.add_argument("--slurm_partition", metavar="NAME", help="the partition (needed with --executor slurm)")
    group.add_argument("--slurm_time", default="24:00:00", metavar="TIME", help="limit of a job (default: 24:00:00)")
    group.add_argument("--slurm_mem_gb", type=int, default=4, metavar="GB", help="memory of a job (default: 4)")
    group.add_argument("--slurm_qos", default="", metavar="NAME", help="quality of service (default: the cluster's)")


def run(args: argparse.Namespace) -> int:
    """Runs `data near_duplicates`; see `remove_near_duplicates`."""
    check_num_proc(args.num_proc)
    for flag in ("ngram_words", "buckets", "hashes", "max_document_bytes", "slurm_mem_gb"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least 1")
    settings = NearDuplicateSettings(
        args.ngram_words, args.buckets, args.hashes, args.on_error, args.max_document_bytes
    )
    slurm = None
    if args.executor == "slurm":
        if not args.slurm_partition:
            raise UserError("--executor slurm needs --slurm_partition; `sinfo` lists the partitions that there are")
        slurm = SlurmSettings(args.slurm_partition, args.slurm_time, args.slurm_mem_gb, args.slurm_qos)
    for name in args.datasets:
        source = remove_near_duplicates(
            args.datasets_dir / RAW_FOLDER / name,
            args.save_dir / RAW_FOLDER / f"{name}{DEDUPLICATED_SUFFIX}",
            settings,
            num_proc=args.num_proc,
            overwrite=args.overwrite,
            slurm=slurm,
        )
        if source is not None:
            kept, dropped, *skipped = source.counts.items()
            print(f"{source.name}: kept {kept[1]:,}, dropped {dropped[1]:,} near duplicates")
            for reason, times in skipped:
                print(f"{source.name}: dropped, {reason}: {times:,} times")
            print(f"next: doge-lm preprocess_datasets --datasets_dir {args.save_dir} --datasets {source.name} …")
    return 0


def remove_near_duplicates(
    directory: Path,
    target: Path,
    settings: NearDuplicateSettings,
    *,
    num_proc: int = 1,
    overwrite: bool = False,
    slurm: SlurmSettings | None = None,
    unit_bytes: int | None = None,
) -> RawSource | None:
    """Writes a source without its near duplicates.

    What is finished with the same settings is left as it is; what an interrupted run began is gone on with.

    Args:
        directory: `raw/NAME` of the source.
        target: where to write; its name is that of the new source.
        settings: how alike two documents must be, and what becomes of bad input.
        num_proc: tasks at a time.
        overwrite: make it anew if it is there already, or was begun with other settings.
        slurm: submit jobs instead of working here.
        unit_bytes: about how much text a task has, for work on this machine; by the size of the source by default.

    Returns:
        The description of the new source, with `kept`, `dropped` and the reasons for what was skipped in its counts;
        None if jobs were submitted.

    Raises:
        UserError: if the package is missing, the source is missing or bad, the target was made or begun with other
            settings, nothing is left, or Slurm refuses a job.
    """
    _require_datatrove()
    job = _Job.plan(directory, target, settings, num_proc, unit_bytes)
    if is_made(target, job.identity, job.made_from, overwrite=overwrite):
        print(made_already(target))
        return RawSource.read(target)
    _refuse_running_jobs(job)
    try:
        with resumable_directory(target, job.identity, overwrite=overwrite) as folder:
            job.meet_skipped_again()
            if not (folder / SOURCE_NAME).is_file():  # otherwise a run was killed when this was all that was left to do
                job.work.mkdir(exist_ok=True)
                if slurm is not None and not job.is_complete():
                    write_record(job.work / _JOBS_NAME, {"jobs": []})
                    raise _LeftToJobsError
                job.run()
                job.describe()
            shutil.rmtree(job.work, ignore_errors=True)
    except _LeftToJobsError:
        assert slurm is not None
    else:
        return RawSource.read(target)
    _submit(job, slurm, overwrite=overwrite)
    return None


class _LeftToJobsError(Exception):
    """Leaves the partial directory as it is, for jobs to go on with."""


def _require_datatrove() -> None:
    try:
        import datatrove  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise UserError("near duplicates need the package datatrove: pip install 'doge-lm[clean]'") from error


# ---------------------------------------------------------------------------------------------------------------
# One source
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """A step: its name, what a task does, and how many tasks there are."""

    name: str
    pipeline: list[Any]
    tasks: int


@dataclass(frozen=True)
class _Job:
    """A source that is being made.

    Attributes:
        source: what is read.
        directory: where it is.
        target: where the result belongs.
        settings: how it is made.
        num_proc: tasks at a time.
        units: what is read, a task each.
        identity: what the result depends on.
    """

    source: RawSource
    directory: Path
    target: Path
    settings: NearDuplicateSettings
    num_proc: int
    units: list[Unit]
    identity: Identity

    @classmethod
    def plan(
        cls, directory: Path, target: Path, settings: NearDuplicateSettings, num_proc: int, unit_bytes: int | None
    ) -> "_Job":
        """Reads the source's description and cuts its files into units."""
        source = RawSource.read(directory)
        # The sizes of when they were taken in: a file that grows from then on is found out when it is read.
        files = [
            (Path(os.path.abspath(path)), file.bytes)
            for path, file in zip(source.paths(directory), source.files, strict=True)
        ]
        unit_bytes, units = _plan_units(files, unit_bytes)
        identity = {
            "source": source.name,
            "kind": source.kind,
            "ngram_words": settings.ngram_words,
            "buckets": settings.buckets,
            "hashes": settings.hashes,
            "max_document_bytes": settings.max_document_bytes,
            "unit_bytes": unit_bytes,
            "inputs": _hashed_inputs(source, files),
        }
        return cls(source, directory, Path(os.path.abspath(target)), settings, num_proc, units, identity)

    @property
    def folder(self) -> Path:
        """The partial directory."""
        return partial_directory(self.target)

    @property
    def work(self) -> Path:
        """What is in the partial directory only until it is whole."""
        return self.folder / _WORK_FOLDER

    def logs(self, step: str) -> Path:
        """Where datatrove logs a step, and notes which of its tasks are done."""
        return self.work / "logs" / step

    def made_from(self, directory: Path) -> Identity:
        """What a finished directory was made from, for comparison with `identity`."""
        identity = dict(RawSource.read(directory).settings)
        if self.settings.on_error == "skip":
            identity.pop("on_error", None)  # what stopped at nothing would have skipped nothing
        return identity

    def meet_skipped_again(self) -> None:
        """With `--on_error stop`, forgets that tasks are done in which an earlier run has skipped something."""
        if self.settings.on_error == "skip":
            return
        if (self.folder / SOURCE_NAME).is_file() and "on_error" in RawSource.read(self.folder).settings:
            (self.folder / SOURCE_NAME).unlink()
        for task in range(len(self.units)):
            record = read_record(_read_path(self.work, task))
            if record is not None and record["skipped"]:
                (self.logs("signatures") / "completions" / f"{task:05d}").unlink(missing_ok=True)

    def steps(self) -> list[_Step]:
        """What is to be done, in order."""
        # Here: the package is large, and only this command needs it.
        from datatrove.pipeline.dedup.minhash import (  # noqa: PLC0415
            MinhashConfig,
            MinhashDedupBuckets,
            MinhashDedupCluster,
            MinhashDedupFilter,
        )
        from datatrove.utils.hashing import HashConfig  # noqa: PLC0415

        settings = self.settings
        # datatrove's `xxhash` gives strings to the package of that name, which from version 4 on takes bytes only.
        config = MinhashConfig(
            settings.ngram_words, settings.buckets, settings.hashes, hash_config=HashConfig(hash_fc="sha1")
        )
        signatures, pairs, removals = (str(self.work / name) for name in ("signatures", "pairs", "removals"))
        read = ReadDocuments(self.units, self.source.kind, settings, self.work)
        write = WriteDocuments(self.folder, self.work)
        sign = _signatures(signatures, config)
        return [
            _Step("signatures", [read, sign], len(self.units)),
            _Step("buckets", [MinhashDedupBuckets(signatures, pairs, config=config)], settings.buckets),
            _Step("clusters", [MinhashDedupCluster(pairs, removals, config=config)], 1),
            _Step("filter", [read, MinhashDedupFilter(removals), write], len(self.units)),
        ]

    def is_complete(self) -> bool:
        """Whether all tasks are done, so that only `describe` is left."""
        return all(self.is_done(step, task) for step in self.steps() for task in range(step.tasks))

    def is_done(self, step: _Step, task: int) -> bool:
        """Whether datatrove has marked a task as done."""
        return (self.logs(step.name) / "completions" / f"{task:05d}").is_file()

    def run(self) -> None:
        """Does on this machine what is not done yet."""
        steps = self.steps()
        with Workers(self.num_proc, _start_worker, (self,)) as workers:
            for number, step in enumerate(steps):
                left = [(number, task) for task in range(step.tasks) if not self.is_done(step, task)]
                done = workers.unordered(_run_task, left)
                for _ in tqdm(done, f"{self.source.name}: {step.name}", len(left), unit=" tasks", disable=None):
                    pass

    def describe(self) -> None:
        """Writes the description of the new source, from the records of the tasks.

        Raises:
            UserError: if nothing is left.
        """
        read = [_record(_read_path(self.work, task)) for task in range(len(self.units))]
        written = [_record(_written_path(self.work, task)) for task in range(len(self.units))]
        rows = sum(record["rows"] for record in read)
        kept = sum(record["kept"] for record in written)
        skipped = sum((Counter(record["skipped"]) for record in read), Counter[str]())
        if not kept:
            found = "".join(f"; dropped, {reason}: {times:,} times" for reason, times in sorted(skipped.items()))
            raise UserError(f"nothing is left of the source {self.source.name!r}, so it is not written{found}")
        RawSource(
            name=self.target.name,
            kind=self.source.kind,
            origin=f"{self.source.name} ({self.source.origin}) without near duplicates",
            licence=self.source.licence,
            files=[InputFile(**record["file"]) for record in written],
            counts={"kept": kept, "dropped": rows - kept, **dict(sorted(skipped.items()))},
            settings={**self.identity, **({"on_error": "skip"} if skipped else {})},
        ).write(self.folder)


def _plan_units(files: list[tuple[Path, int]], unit_bytes: int | None = None) -> tuple[int, list[Unit]]:
    """Cuts files into units, and says how large these are. A large compressed file, which cannot be cut, is one."""
    unit_bytes = unit_bytes or max(usual_unit_bytes(files), sum(size for _, size in files) // _MOST_TASKS)
    while len(planned := plan_units(files, unit_bytes)) > _MOST_TASKS:
        unit_bytes *= 2
    return unit_bytes, [
        Unit(unit.place, 0, (Segment(unit.path, unit.bytes),)) if isinstance(unit, Stream) else unit for unit in planned
    ]


def _hashed_inputs(source: RawSource, files: list[tuple[Path, int]]) -> dict[str, list[Any]]:
    """Path: size and sha256, for the identity; where all files together are too large to be read, what tells changes.

    Raises:
        UserError: if a file is not what was taken in.
    """
    small = sum(size for _, size in files) <= MAX_IDENTITY_BYTES
    inputs: dict[str, list[Any]] = {}
    for (path, size), taken in zip(files, source.files, strict=True):
        if small:
            content = file_sha256(path)
            check_taken_in(source.name, str(path), content, taken.sha256)
        else:
            content = file_state(path)
        inputs[str(path)] = [size, content]
    return inputs


def _read_path(work: Path, task: int) -> Path:
    return work / f"read-{task:05d}.json"


def _written_path(work: Path, task: int) -> Path:
    return work / f"written-{task:05d}.json"


def _record(path: Path) -> dict[str, Any]:
    record = read_record(path)
    if record is None:
        raise UserError(f"{path} of a task that is done is missing; begin anew with --overwrite")
    return record


# ---------------------------------------------------------------------------------------------------------------
# What tasks do, beside what datatrove does
# ---------------------------------------------------------------------------------------------------------------


_worker: dict[str, Any] = {}


def _start_worker(job: _Job) -> None:
    _worker.update(job=job, steps=job.steps())


def _run_task(task: tuple[int, int]) -> None:
    """Does a task: number of the step, and of the task in it. datatrove logs to a file, and marks what is done."""
    from datatrove.executor import LocalPipelineExecutor  # noqa: PLC0415

    number, rank = task
    step = _worker["steps"][number]
    # A copy, since steps count what they do.
    executor = LocalPipelineExecutor(
        copy.deepcopy(step.pipeline), tasks=step.tasks, logging_dir=str(_worker["job"].logs(step.name))
    )
    # Not its own `run`: that waits without end for a process that the system has killed, and leaves processes behind
    # when it is killed itself. What goes wrong is raised, so there is no need to print it too.
    with contextlib.redirect_stderr(io.StringIO()):
        executor._run_for_rank(rank)


def _word_tokenizer() -> Any:
    """Words by letters and spaces, for every language alike; datatrove's own fetch models or need large packages."""
    from datatrove.utils.word_tokenizers import WordTokenizer  # noqa: PLC0415

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return text.splitlines()

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in _WORD.finditer(text)]

    return Words()


def _signatures(folder: str, config: Any) -> Any:
    """datatrove's step that signs documents, with bounded memory whatever the size of a document.

    The signature holds the smallest value of each hash over all n-grams, so it is that of the smallest over pieces.
    """
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature  # noqa: PLC0415
    from datatrove.utils.text import simplify_text  # noqa: PLC0415

    class Signatures(MinhashDedupSignature):
        def get_shingles(self, text: str) -> npt.NDArray[np.uint64]:
            """The smallest values, of shape (buckets, hashes), in place of all n-grams; empty if there are none."""
            smallest = np.empty(0, np.uint64)
            hashes = map(self._hash_func, self.all_ngrams(text))
            while len(some := np.fromiter(islice(hashes, _NGRAMS_AT_ONCE), np.uint64)):
                values = np.array(MinhashDedupSignature.get_signature(self, some.reshape(-1, 1)), np.uint64)
                smallest = np.minimum(smallest, values) if smallest.size else values
            return smallest

        def get_signature(self, shingles: npt.NDArray[np.uint64]) -> list[list[int]]:
            signature: list[list[int]] = shingles.tolist()
            return signature

        def all_ngrams(self, text: str) -> Iterator[str]:
            length = self.config.n_grams
            words: list[str] = []
            for piece in _pieces(text):
                # The last words of the piece before begin n-grams that end in this one.
                words = words[max(0, len(words) - length + 1) :]
                words += self.word_tokenizer.word_tokenize(simplify_text(piece, self.config.norm_config))
                for begin in range(len(words) - length + 1):
                    yield " ".join(words[begin : begin + length])

    return Signatures(folder, config, language=_word_tokenizer())


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces, cut before a space or a line feed, so that no word and no number is cut, if it has any."""
    begin = 0
    while begin < len(text):
        end = begin + _PIECE_CHARACTERS
        if end < len(text):
            space = max(text.rfind(" ", begin + 1, end), text.rfind("\n", begin + 1, end))
            end = space if space > 0 else end
        yield text[begin:end]
        begin = end


@dataclass(frozen=True)
class ReadDocuments:
    """Reads the rows of one unit, that of the task's number, and records how many there are, and what was skipped.

    Attributes:
        units: one a task.
        kind: what the rows are for.
        settings: what becomes of bad input.
        work: where the records go.
    """

    units: list[Unit] = field(repr=False)  # every task logs its pipeline
    kind: Kind
    settings: NearDuplicateSettings
    work: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[Any]:
        """Yields a datatrove document for every row, in order.

        Raises:
            UserError: for bad input, with `--on_error stop`, and for a file that changes while it is read.
        """
        from datatrove.data import Document  # noqa: PLC0415

        stop = self.settings.on_error == "stop"
        rows = 0
        skipped: Counter[str] = Counter()
        for item in read_unit(self.units[rank], self.kind, self.settings.max_document_bytes, count_lines=stop):
            if not isinstance(item, BadInputError):
                yield Document(text=_compared(item[1]), id=str(rows), metadata={"row": item[1]})
                rows += 1
            elif stop:
                raise UserError(f"{item.with_flag}{HOW_TO_SKIP}") from item
            else:
                skipped[item.reason] += 1
        write_record(_read_path(self.work, rank), {"rows": rows, "skipped": dict(skipped)})


@dataclass(frozen=True)
class WriteDocuments:
    """Writes what is left as `part-XXXXX.jsonl.zst`, and records how much that is.

    Attributes:
        folder: where the part goes.
        work: where the record goes.
    """

    folder: Path
    work: Path

    def __call__(self, data: Iterable[Any], rank: int, world_size: int) -> Iterator[Any]:
        """Writes all documents; passes nothing on."""
        path = self.folder / f"part-{rank:05d}.jsonl.zst"
        temporary = path.with_name(path.name + PART_SUFFIX)
        kept = 0
        with explain_disk_errors(path):
            with temporary.open("wb") as file:
                compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
                with compressor.stream_writer(file, closefd=False) as writer:
                    for document in data:
                        writer.write(json.dumps(_values(document.metadata["row"]), ensure_ascii=False).encode() + b"\n")
                        kept += 1
                file.flush()
                os.fsync(file.fileno())
            entry = {"path": path.name, "bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
            temporary.replace(path)
            write_record(_written_path(self.work, rank), {"kept": kept, "file": entry})
        yield from ()


def _compared(row: Row) -> str:
    """The words by which rows are compared: a text without its prompt, or all turns."""
    return row.text if isinstance(row, TextRow) else "\n".join(content for _, content in row.turns)


def _values(row: Row) -> dict[str, Any]:
    if isinstance(row, ConversationRow):
        return {"conversations": [{"from": role, "value": content} for role, content in row.turns]}
    return {"prompt": row.prompt, "text": row.text} if row.prompt else {"text": row.text}


# ---------------------------------------------------------------------------------------------------------------
# Clusters of machines
# ---------------------------------------------------------------------------------------------------------------


def _submit(job: _Job, slurm: SlurmSettings, *, overwrite: bool) -> None:
    """Submits an array of jobs for each step that is not done, and a job that puts the result in its place.

    Raises:
        UserError: if Slurm refuses a job; those before it are submitted.
    """
    from datatrove.executor import SlurmPipelineExecutor  # noqa: PLC0415

    before = None
    ids: list[str] = []
    for step in job.steps():
        before = SlurmPipelineExecutor(
            step.pipeline,
            tasks=step.tasks,
            workers=job.num_proc,
            time=slurm.time,
            partition=slurm.partition,
            mem_per_cpu_gb=slurm.memory_gb,
            qos=slurm.qos,
            job_name=f"{job.target.name}-{step.name}",
            env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            # What waits for a job that has failed is to end too.
            sbatch_args={"kill-on-invalid-dep": "yes"},
            depends=before,
            logging_dir=str(job.logs(step.name)),
            with_srun=False,
        )
        # It would write in the partial directory when the last job has put that in its place.
        before.launch_merge_stats = _nothing
        with _explain_sbatch(step.name):
            before.run()
        if before.job_id != -1:  # -1: all its tasks are done
            ids.append(before.job_id)
            write_record(job.work / _JOBS_NAME, {"jobs": ids})
    with _explain_sbatch("the last job"):
        last = _submit_last(job, before, overwrite=overwrite)
    print(
        f"{job.source.name}: submitted the jobs {', '.join([*ids, last])}; `squeue --me` shows them. When they have "
        f"ended, {job.target} is there. If it is not, the reason is in {job.work / 'logs'}/*/slurm_logs: run the same "
        "command again, and what is not done is done"
    )


def _submit_last(job: _Job, before: Any, *, overwrite: bool) -> str:
    """Submits the command for one machine, to be run after the jobs of the last step; returns its id."""
    from datatrove.executor.slurm import launch_slurm_job  # noqa: PLC0415

    settings = job.settings
    command = [sys.executable, "-m", "doge_lm.cli", "data", "near_duplicates"]
    command += ["--datasets_dir", os.path.abspath(job.directory.parent.parent), "--datasets", job.directory.name]
    command += ["--save_dir", str(job.target.parent.parent), "--on_error", settings.on_error]
    for name in ("ngram_words", "buckets", "hashes", "max_document_bytes"):
        command += [f"--{name}", str(getattr(settings, name))]
    if overwrite:
        command.append("--overwrite")
    # Not within the partial directory, which is gone when this job ends.
    log = str(job.target.with_name(f".slurm-{job.target.name}.out"))
    options = {**before.get_sbatch_args(), "job-name": job.target.name, "output": log, "error": log}
    if before.job_id != -1:
        options["dependency"] = f"afterok:{before.job_id}"
    script = before.get_launch_file_contents(options, shlex.join(command))
    return str(launch_slurm_job(script, before.job_id_retriever))


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _explain_sbatch(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if error.filename != "sbatch":
            raise
        raise UserError("--executor slurm: there is no `sbatch` here; run it on a machine that submits jobs") from error
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"--executor slurm: sbatch did not take the jobs for {what} (status {error.returncode}; its message is "
            "above); mend the flags and run the same command again"
        ) from error


def _refuse_running_jobs(job: _Job) -> None:
    """Refuses to do, or to submit, what jobs are at already.

    Raises:
        UserError: while jobs of an earlier run of this command wait or run.
    """
    record = read_record(job.work / _JOBS_NAME)
    if record is None or not record["jobs"]:
        return
    jobs = ",".join(record["jobs"])
    command = ["squeue", "--noheader", "--format=%i", "--states=PENDING,RUNNING,SUSPENDED", f"--jobs={jobs}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"{job.folder} was begun with --executor slurm, and there is no `squeue` here to ask whether its jobs "
            f"({jobs}) have ended; run the command on a machine that submits jobs"
        ) from error
    # Slurm forgets jobs some minutes after their end.
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"{shlex.join(command)} failed, so nothing was done: {answer.stderr.strip()}")
    if running := answer.stdout.split():
        raise UserError(
            f"{job.target} is being made by jobs that wait or run ({', '.join(running)}); wait until they have ended, "
            f"or end them with `scancel {' '.join(record['jobs'])}`"
        )
