"""`doge-lm preprocess_datasets`: raw text -> packed rows of token ids, one directory a source.

One pass over units (`doge_lm.data.units`): a process reads a unit as a stream, cleans, tokenizes, packs and writes it
as one arrow file, and then its record. The parent hands the units out, and puts a source in its place when all of its
units have their records. Rows depend on the units alone, never on the number of processes; a run that was killed
goes on with the units that have no record. Memory is that of a batch and a packing window in each process.
"""

import argparse
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from doge_lm.data import cleaning, encoders
from doge_lm.data.cleaning import Cleaner, CleaningSettings
from doge_lm.data.documents import PieceBatch, SystemPrompt, Tokenizing, batch_rows, nothing_to_learn
from doge_lm.data.manifest import (
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
    SourceAccounting,
    TokenizerIdentity,
    accounting_from_json,
    accounting_table,
    check_name,
    check_taken_in,
    explain_disk_errors,
    file_sha256,
    file_state,
    is_made,
    made_already,
    make_identity,
    package_versions,
    read_record,
    resumable_directory,
    scratch_directory,
    without_rows,
    write_record,
)
from doge_lm.data.mix import Mix, parse_tokens
from doge_lm.data.packing import Packing, RowMaker, cutting_length, make_row_maker
from doge_lm.data.sources import (
    HOW_TO_SKIP,
    MAX_DOCUMENT_BYTES,
    BadInputError,
    Location,
    Row,
    add_bad_input_arguments,
    row_texts,
    scan_rows,
)
from doge_lm.data.storage import RowWriter, describe_dataset, id_dtype
from doge_lm.data.units import (
    Stream,
    Unit,
    plan_units,
    read_unit,
    remove_spools,
    unpack_stream,
    usual_unit_bytes,
)
from doge_lm.data.workers import Workers, check_num_proc
from doge_lm.errors import UserError

# Documents on which the backends are compared: so many, with so much text, of all sources together.
_SAMPLE_ROWS = 200
_SAMPLE_CHARACTERS = 10**6
# Within a directory that is not finished: records, spools and hashes.
_WORK_FOLDER = "work"

# A source that misses its share by more than this is worth a warning.
_SHARE_TOLERANCE = 0.05

Padding = Literal["packed", "max_length"]
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class PreprocessSettings:
    """What the rows depend on, beside the text and the tokenizer.

    Attributes:
        sequence_length: tokens of a row.
        padding: whether documents share rows.
        packing: how they share them, `best_fit` or `concat`; the latter is refused with `max_length`.
        train_on_prompts: whether the loss covers the prompt of a text.
        on_error: whether bad input (a row with nothing to learn, one that cannot be read, a damaged file) ends the
            run, or is left out and counted.
        max_document_bytes: lines, texts and rows above this are bad input.
        cleaning: which rows are left out.
        tokens: how many targets the sources for pre-training give, in all; None for all there are.
        mix: the shares of these tokens; may be None for one source.
        system_prompt: opens conversations that have none.
    """

    sequence_length: int = 2048
    padding: Padding = "packed"
    packing: Literal["best_fit", "concat"] = "best_fit"
    train_on_prompts: bool = False
    on_error: OnError = "stop"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    cleaning: CleaningSettings = field(default_factory=CleaningSettings)
    tokens: int | None = None
    mix: Mix | None = None
    system_prompt: SystemPrompt = field(default_factory=SystemPrompt)

    @property
    def row_maker(self) -> Packing:
        """How rows are made of documents."""
        return self.packing if self.padding == "packed" else "max_length"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `preprocess_datasets`."""
    parser.add_argument(
        "--datasets_dir", type=Path, required=True, help="where download_datasets saved: DIR/raw is read"
    )
    parser.add_argument("--save_dir", type=Path, required=True, help="DIR/tokenized/NAME is written for each source")
    parser.add_argument("--tokenizer_path", type=Path, required=True, help="made by `doge-lm tokenizer build`")
    parser.add_argument("--max_len", type=int, default=2048, help="tokens of a training sample (default: 2048)")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that tokenize (default: 1)")
    parser.add_argument(
        "--train_on_prompts",
        action="store_true",
        help="let the pre-training loss cover prompts too; conversations are always trained on the assistant's words",
    )
    parser.add_argument(
        "--system_prompt",
        default="",
        metavar="TEXT",
        help="opens conversations that have no system text of their own, as context (default: none)",
    )
    parser.add_argument(
        "--system_prompt_share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of these conversations that get it (default: 1), so that the model also learns to do without",
    )
    parser.add_argument(
        "--padding",
        choices=("packed", "max_length"),
        default="packed",
        help="packed: documents share samples (default); max_length: one piece of a document a sample, padded",
    )
    parser.add_argument(
        "--packing",
        choices=("best_fit", "concat"),
        default="best_fit",
        help="best_fit: only documents longer than a sample are cut (default); concat: documents one after another, "
        "cut wherever a sample ends; docs/packing.md compares them. Not with --padding max_length",
    )
    add_bad_input_arguments(parser, "an empty text, a conversation without an answer, ")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="the sources to do (default: all there are)")
    parser.add_argument(
        "--tokens",
        metavar="N",
        help="prepare only about so many tokens for pre-training (4B, 500M): each source stops at its share",
    )
    parser.add_argument(
        "--mix",
        metavar="NAME=WEIGHT,...",
        help="with --tokens: the shares of the sources for pre-training; those not named are left out",
    )
    parser.add_argument(
        "--backend",
        choices=encoders.BACKENDS,
        default="auto",
        help="what tokenizes, with the same result (default: auto, which takes the faster gigatoken where it is "
        "installed and gives the same ids on a sample of the documents)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make sources anew that were made with other settings, or finished"
    )
    cleaning.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `preprocess_datasets`; see `preprocess`."""
    settings = PreprocessSettings(
        sequence_length=args.max_len,
        padding=args.padding,
        packing=args.packing,
        train_on_prompts=args.train_on_prompts,
        on_error=args.on_error,
        max_document_bytes=args.max_document_bytes,
        cleaning=cleaning.settings_from_args(args),
        tokens=None if args.tokens is None else parse_tokens(args.tokens),
        mix=None if args.mix is None else Mix.parse(args.mix),
        system_prompt=SystemPrompt(args.system_prompt, args.system_prompt_share),
    )
    manifests = preprocess(
        args.datasets_dir,
        args.save_dir,
        args.tokenizer_path,
        settings,
        num_proc=args.num_proc,
        names=args.datasets,
        backend=args.backend,
        overwrite=args.overwrite,
    )
    accounts = {name: manifest.accounting[name] for name, manifest in manifests.items()}
    rows = {name: manifest.samples["all"][name] for name, manifest in manifests.items()}
    print(accounting_table(accounts, rows))
    for name, manifest in manifests.items():
        if manifest.files_without_rows:
            print(f"warning: {name}: {without_rows(manifest.files_without_rows)}")
        if (note := _share_note(name, manifest)) is not None:
            print(note)
    print(f"next: doge-lm merge_datasets --datasets_dir {args.save_dir} --save_dir {args.save_dir}")
    return 0


def _share_note(name: str, manifest: Manifest) -> str | None:
    """What a source gave of its share of `--tokens`, with a warning if that is not about the same."""
    share = manifest.settings.get("tokens")
    if share is None:
        return None
    taken = manifest.accounting[name].targets
    if taken < share:
        note = f"{name}: has {taken:,} tokens to train on, fewer than its share of {share:,}: all were taken"
    else:
        note = f"{name}: stopped at its share of --tokens: {taken:,} of {share:,} tokens to train on"
    off = abs(taken - share) / share
    return f"warning: {note} ({off:.0%} off)" if off > _SHARE_TOLERANCE else note


def preprocess(
    datasets_dir: Path,
    save_dir: Path,
    tokenizer_path: Path,
    settings: PreprocessSettings,
    *,
    num_proc: int = 1,
    names: list[str] | None = None,
    backend: encoders.WantedBackend = "auto",
    overwrite: bool = False,
    unit_bytes: int | None = None,
) -> dict[str, Manifest]:
    """Tokenizes and packs sources; writes `save_dir/tokenized/NAME` for each, whole or not at all.

    What is finished with the same settings is left as it is; what an interrupted run began is gone on with.

    Args:
        datasets_dir: holds `raw/NAME/source.json`, as `download_datasets` leaves it.
        save_dir: where to write.
        tokenizer_path: a directory that `doge_lm.data.tokenizer.load_tokenizer` opens.
        settings: length, padding, loss on prompts, cleaning, what becomes of bad input.
        num_proc: processes that tokenize; 1 works in this process.
        names: the sources to do; all by default.
        backend: what tokenizes; the ids are the same.
        overwrite: make sources anew that are there already, whatever they were made with.
        unit_bytes: about how much text a unit has; by the size of the source by default.

    Returns:
        The manifest of each source.

    Raises:
        UserError: for bad flags, missing or broken input, results of other settings, a source of which nothing is
            left, and a full disk.
    """
    _check_settings(settings)
    check_num_proc(num_proc)  # before anything is read
    sources = _raw_sources(datasets_dir / RAW_FOLDER, names)
    shares = _shares(settings, [source for _, source in sources])
    _check_languages(settings, [source.name for _, source in sources])
    files = {source.name: source.paths(directory) for directory, source in sources}
    tokenizer_hash = encoders.tokenizer_sha256(tokenizer_path)
    encoder, note = encoders.choose_encoder(tokenizer_path, backend, _sample(files, settings.max_document_bytes))
    if note is not None:
        print(note)
    chosen, special = encoder.name, encoder.special
    tokenizer = TokenizerIdentity(tokenizer_hash, encoder.vocab_size, special.pad, special.bos, special.eos)
    # What was opened for the comparison serves this process; others open their own.
    opened = encoder if num_proc == 1 else (tokenizer_path, chosen)
    del encoder
    with (
        # Not among the sources, which may have any name.
        scratch_directory(save_dir / "ngrams") if settings.cleaning.decontaminate else nullcontext() as index_dir,
        Workers(num_proc, _start_worker, (opened, settings, index_dir)) as workers,
        ExitStack() as stack,
    ):
        jobs = [
            _Job(source, files[source.name], save_dir / TOKENIZED_FOLDER / source.name, tokenizer, settings,
                 shares.get(source.name), unit_bytes)
            for _, source in sources
            if source.kind != "pretrain" or settings.mix is None or source.name in settings.mix.weights
        ]  # fmt: skip
        for warning in cleaning.warnings_of_deduplicated(
            [job.name for job in jobs], "prepared", "name the one that you want with --datasets"
        ):
            print(f"warning: {warning}")
        versions = {**package_versions(), "backend": chosen}
        _Run(jobs, settings, workers, versions, stack, overwrite=overwrite).run(index_dir)
    return {job.name: Manifest.read(job.target) for job in jobs}


def _check_settings(settings: PreprocessSettings) -> None:
    if settings.sequence_length < 8:
        raise UserError(f"--max_len {settings.sequence_length} is too short; it must be at least 8")
    if settings.max_document_bytes < 1:
        raise UserError(f"--max_document_bytes {settings.max_document_bytes} is not possible; it must be at least 1")
    if settings.padding == "max_length" and settings.packing != "best_fit":
        raise UserError(
            f"--packing {settings.packing} says how documents share samples, but with --padding max_length they share "
            "none; leave one of the two out"
        )
    prompt = settings.system_prompt
    if not 0 < prompt.share <= 1:
        raise UserError(f"--system_prompt_share {prompt.share} is not possible; it must be above 0 and at most 1")
    if prompt.text and not prompt.text.strip():
        raise UserError("--system_prompt holds nothing but blanks; give a text, or leave it out")
    if prompt.share < 1 and not prompt.text:
        raise UserError("--system_prompt_share needs a --system_prompt; give one, or leave it out")
    if settings.mix is not None and settings.tokens is None:
        raise UserError("--mix says how to share out --tokens; give a number of --tokens too, or give --mix to "
                        "merge_datasets")  # fmt: skip


def _raw_sources(raw: Path, names: list[str] | None) -> list[tuple[Path, RawSource]]:
    """The sources to do, in the order of their names."""
    if not raw.is_dir():
        raise UserError(f"{raw} does not exist; run `doge-lm download_datasets --save_dir {raw.parent}` first")
    there = sorted(entry.name for entry in raw.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    foreign = [name for name in there if not (raw / name / SOURCE_NAME).is_file()]
    if foreign:
        raise UserError(
            f"{raw / foreign[0]} has no {SOURCE_NAME}; to take in files of your own, run `doge-lm download_datasets "
            f"--save_dir {raw.parent} --local NAME=PATH`"
        )
    for name in names or []:
        if name not in there:
            raise UserError(f"--datasets {name}: no such source in {raw} (there: {', '.join(there) or 'none'})")
    chosen = [name for name in there if names is None or name in names]
    if not chosen:
        raise UserError(f"{raw} holds no source; run `doge-lm download_datasets --save_dir {raw.parent}` first")
    sources = [(raw / name, RawSource.read(raw / name)) for name in chosen]
    for directory, source in sources:
        check_name(directory, source.name)
    return sources


def _shares(settings: PreprocessSettings, sources: Sequence[RawSource]) -> dict[str, int]:
    """How many targets each source for pre-training gives, by `--tokens` and `--mix`; empty for all there are."""
    if settings.tokens is None:
        return {}
    names = [source.name for source in sources if source.kind == "pretrain"]
    if settings.mix is not None:
        settings.mix.check_names(names)
        return {name: -int(-settings.tokens * weight // 1) for name, weight in settings.mix.weights.items()}
    if len(names) > 1:
        raise UserError(f"--tokens with several sources ({', '.join(names)}) needs their shares: give --mix too")
    return dict.fromkeys(names, settings.tokens)


def _check_languages(settings: PreprocessSettings, there: Sequence[str]) -> None:
    """Refuses `--languages NAME=...` for a source that is not there, which would keep nothing of what it should."""
    for entry in settings.cleaning.languages:
        name, separator, _ = entry.partition("=")
        if separator and name not in there:
            raise UserError(
                f"--languages {entry} names {name}, but there is no such source (there: {', '.join(sorted(there))})"
            )


def _sample(files: dict[str, list[Path]], max_document_bytes: int) -> list[str]:
    """Some texts of the beginning of each source; bad input is passed over here, since it will be met again."""
    limit = min(max_document_bytes, _SAMPLE_CHARACTERS)
    characters, count = _SAMPLE_CHARACTERS // len(files) + 1, _SAMPLE_ROWS // len(files) + 1
    return [text for paths in files.values() for text in encoders.take_texts(_texts(paths, limit), characters, count)]


def _texts(paths: Iterable[Path], max_document_bytes: int) -> Iterator[str]:
    for path in paths:
        for item in scan_rows(path, max_document_bytes=max_document_bytes, count_lines=False):
            if not isinstance(item, BadInputError):
                yield from row_texts(item[1])


# ---------------------------------------------------------------------------------------------------------------
# The parent: sources, their units, and what is done of them
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """A unit of a source, as a process is told of it.

    Attributes:
        source: the source's name.
        kind: what its rows are for.
        unit: what to read.
        folder: the source's partial directory.
        target: where it will be in the end, for messages.
        drops: the rows that are duplicates, as `cleaning.mark_duplicates` wrote them, or None.
        limit: how many targets to stop at, or None for the whole unit.
    """

    source: str
    kind: Kind
    unit: Unit
    folder: Path
    target: Path
    drops: Path | None = None
    limit: int | None = None

    @property
    def record_path(self) -> Path:
        return _record_path(self.folder, self.unit.name)

    @property
    def hash_path(self) -> Path:
        return _hash_path(self.folder, self.unit.name)


def _record_path(folder: Path, unit: str) -> Path:
    return folder / _WORK_FOLDER / f"data-{unit}.json"


def _hash_path(folder: Path, unit: str) -> Path:
    return folder / _WORK_FOLDER / f"rows-{unit}.npy"


class _Job:
    """A source that is being made: its identity, and which of its units are done."""

    def __init__(
        self,
        source: RawSource,
        files: list[Path],
        target: Path,
        tokenizer: TokenizerIdentity,
        settings: PreprocessSettings,
        share: int | None,
        unit_bytes: int | None,
    ) -> None:
        self.name = source.name
        self.kind: Kind = source.kind
        self.target = target
        # The sizes of when they were taken in: a file that grows from then on is found out when it is read.
        self.inputs = [
            InputFile(os.path.abspath(path), file.bytes) for path, file in zip(files, source.files, strict=True)
        ]
        self.tokenizer = tokenizer
        self.sequence_length = settings.sequence_length
        self.share = share
        self.unit_bytes = unit_bytes or usual_unit_bytes(self.files())
        self.settings: dict[str, Any] = {
            "padding": settings.padding,
            "packing": settings.packing,
            "train_on_prompts": settings.train_on_prompts,
            "max_document_bytes": settings.max_document_bytes,
            "unit_bytes": self.unit_bytes,
            **settings.cleaning.for_source(source.name).identity(),
        }
        if share is not None:
            self.settings["tokens"] = share
        if settings.system_prompt.text and self.kind == "finetune":
            self.settings |= {
                "system_prompt": settings.system_prompt.text,
                "system_prompt_share": settings.system_prompt.share,
            }
        if not self.is_small:
            for file in self.inputs:
                file.state = file_state(Path(file.path))
        self.folder = target  # the partial directory, as soon as there is one
        self.stack = ExitStack()  # closes the partial directory, which puts it in its place
        self.order: list[str] = []  # names of the units so far
        self.segments: Counter[str] = Counter()  # of each file, in the units so far
        self.hashed: list[str] = []  # names of the units whose rows were hashed, to find duplicates
        self.records: dict[str, dict[str, Any]] = {}
        self.stored = 0  # units that an earlier run had finished
        self.pending = 0  # units that processes are at
        self.exhausted = False  # all units were handed out
        self.finished = False
        self.targets = 0  # of the units that `prefix` counts
        self._prefix = 0
        self._expected = [file.sha256 for file in source.files]

    def files(self) -> list[tuple[Path, int]]:
        """The files, each with its size."""
        return [(Path(file.path), file.bytes) for file in self.inputs]

    @cached_property
    def plan(self) -> list[Unit | Stream]:
        """How the files are cut into units."""
        return plan_units(self.files(), self.unit_bytes)

    @cached_property
    def is_small(self) -> bool:
        """Whether the content of the inputs is part of the identity."""
        return sum(file.bytes for file in self.inputs) <= MAX_IDENTITY_BYTES

    def identity(self) -> Identity:
        """What the result is made from."""
        return make_identity(self.kind, self.sequence_length, self.tokenizer, self.settings, self.inputs)

    def hash_inputs(self) -> None:
        """Takes the sha256 of the inputs; those of large sources are kept in records.

        Raises:
            UserError: if a file is not what was downloaded.
        """
        for index, (file, expected) in enumerate(zip(self.inputs, self._expected, strict=True)):
            record = self.folder / _WORK_FOLDER / f"input-{index:05d}.json"
            known = None if self.is_small else read_record(record)
            if known is not None and (known.get("bytes"), known.get("state")) != (file.bytes, file.state):
                known = None
            file.sha256 = known["sha256"] if known is not None else _sha256(Path(file.path))
            if file.sha256:
                check_taken_in(self.name, file.path, file.sha256, expected)
            if known is None and not self.is_small:
                write_record(record, {"sha256": file.sha256, "bytes": file.bytes, "state": file.state})

    def check_inputs(self) -> None:
        """Checks that large inputs are still those of which the units and the sha256 were taken.

        Raises:
            UserError: naming the file that was written to meanwhile.
        """
        for file in self.inputs:
            if file.state and file_state(Path(file.path)) != file.state:
                raise UserError(
                    f"{file.path} of the source {self.name!r} was changed while it was read; take the source in again "
                    "with `doge-lm download_datasets`, and run this again with --overwrite"
                )

    def stored_record(self, unit: str, on_error: OnError) -> dict[str, Any] | None:
        """The record of a unit that an earlier run finished, if its file is there too.

        With `stop`, what an earlier run skipped is to be met again.
        """
        record = read_record(_record_path(self.folder, unit))
        if record is None or (on_error == "stop" and record["skipped"]):
            return None
        if record["output"] is None:
            return record
        path = self.folder / record["output"]["path"]
        return record if path.is_file() and path.stat().st_size == record["output"]["bytes"] else None

    def stored_units(self, on_error: OnError) -> int:
        """How many units an earlier run finished."""
        records = (self.folder / _WORK_FOLDER).glob("data-*.json")
        names = (path.stem.removeprefix("data-") for path in records)
        return sum(self.stored_record(name, on_error) is not None for name in names)

    def prefix(self) -> int:
        """How many units belong to the result, as far as they are done; with a share, the fewest that reach it."""
        while self._prefix < len(self.order) and not self.enough:
            record = self.records.get(self.order[self._prefix])
            if record is None:
                break
            self._prefix += 1
            self.targets += record["account"]["targets"]
        return self._prefix

    @property
    def enough(self) -> bool:
        """Whether the first units reach the share of the source."""
        return self.share is not None and self.targets >= self.share

    def is_complete(self) -> bool:
        """Whether every unit of the result is done, and no process is at another one."""
        self.prefix()
        return not self.finished and self.pending == 0 and (self.exhausted or self.enough)


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""  # whoever reads it will say what is wrong


class _Run:
    """Makes sources: hands out their units, and finishes each source that is done.

    Args:
        jobs: the sources.
        settings: for all of them.
        workers: their `start` must be `_start_worker`.
        versions: for the manifests.
        stack: closes the partial directories, should anything end with an exception.
        overwrite: make anew what is there already.
    """

    def __init__(
        self,
        jobs: Sequence[_Job],
        settings: PreprocessSettings,
        workers: Workers,
        versions: dict[str, str],
        stack: ExitStack,
        *,
        overwrite: bool,
    ) -> None:
        self._jobs = jobs
        self._settings = settings
        self._workers = workers
        self._versions = versions
        self._stack = stack
        self._overwrite = overwrite

    def run(self, index_dir: Path | None) -> None:
        """Makes what is not made yet; the n-grams of benchmarks, if there are any, go into `index_dir`."""
        jobs = [job for job in self._jobs if not self._is_made(job)]
        if index_dir is not None and jobs:
            with explain_disk_errors(index_dir):
                cleaning.prepare_index(self._settings.cleaning, index_dir)
        if self._settings.cleaning.deduplicate:
            self._mark_duplicates(jobs)
        by_name = {job.name: job for job in jobs}
        background = ThreadPoolExecutor(1)
        self._stack.callback(background.shutdown, cancel_futures=True)
        hashes = {job.name: background.submit(job.hash_inputs) for job in jobs if not job.is_small}
        documents = 0
        with (
            _bar("preprocess", jobs, sum(job.stored for job in jobs)) as progress,
            closing(self._workers.unordered(_make_unit, self._tasks(jobs))) as results,
        ):
            for task, record in results:
                job = by_name[task.source]
                job.pending -= 1
                job.records[task.unit.name] = record
                _remove_spool(task.unit)
                documents += record["account"]["documents_in"]
                progress.set_postfix_str(f"{documents:,} documents", refresh=False)
                progress.update()
                if job.is_complete():
                    self._finish(job, hashes.get(job.name))
        for job in jobs:
            if job.is_complete():
                self._finish(job, hashes.get(job.name))

    def _is_made(self, job: _Job) -> bool:
        """Whether a source is there already; opens its partial directory if not."""
        if job.is_small:
            job.hash_inputs()

        def before(directory: Path) -> Identity:
            identity = Manifest.read(directory).identity()
            if self._settings.on_error == "skip":
                identity.pop("on_error", None)  # what stopped at nothing would have skipped nothing
            return identity

        if is_made(job.target, job.identity(), before, overwrite=self._overwrite):
            print(made_already(job.target))
            return True
        job.stack = self._stack.enter_context(ExitStack())
        job.folder = job.stack.enter_context(resumable_directory(job.target, job.identity(), overwrite=self._overwrite))
        with explain_disk_errors(job.target):
            if self._is_whole(job):
                self._put_in_place(job)
                return True
            work = job.folder / _WORK_FOLDER
            work.mkdir(exist_ok=True)
            remove_spools(work)  # of a run that was killed
            job.stack.callback(remove_spools, work)  # of one that ends with an error
            job.stored = job.stored_units(self._settings.on_error)
        if job.stored:
            print(f"{job.name}: going on, {job.stored:,} {'unit is' if job.stored == 1 else 'units are'} done")
        return False

    def _is_whole(self, job: _Job) -> bool:
        """Whether a run was killed when only the renaming was left to do."""
        if not (job.folder / MANIFEST_NAME).is_file():
            return False
        if self._settings.on_error == "skip" or "on_error" not in Manifest.read(job.folder).settings:
            return True
        (job.folder / MANIFEST_NAME).unlink()
        return False

    def _units(self, job: _Job, is_done: Callable[[str], bool], *, stop_at_faults: bool) -> Generator[Unit, None, None]:
        work = job.folder / _WORK_FOLDER
        with explain_disk_errors(job.target):
            for planned in job.plan:
                if isinstance(planned, Stream):
                    yield from unpack_stream(planned, work, job.unit_bytes, is_done, stop_at_faults=stop_at_faults)
                else:
                    yield planned

    def _tasks(self, jobs: Sequence[_Job]) -> Generator[_Task, None, None]:
        """The units that are not done, of one source after another; takes note of those that are."""
        on_error = self._settings.on_error
        for job in jobs:
            is_done = _done_check(job, on_error)
            with closing(self._units(job, is_done, stop_at_faults=on_error == "stop")) as units:
                for unit in units:
                    job.order.append(unit.name)
                    job.segments.update(str(segment.path) for segment in unit.segments)
                    record = job.stored_record(unit.name, on_error)
                    if record is not None:
                        job.records[unit.name] = record
                    else:
                        job.pending += 1
                        yield self._task(job, unit)
                    job.prefix()
                    if job.enough:
                        break
            job.exhausted = True

    def _task(self, job: _Job, unit: Unit) -> _Task:
        """A unit to do; with a share, no more of it than is missing as far as is known."""
        drops = None
        if self._settings.cleaning.deduplicate:
            drops = cleaning.drops_path(_hash_path(job.folder, unit.name), job.folder / _WORK_FOLDER)
        limit = None if job.share is None else job.share - job.targets
        return _Task(job.name, job.kind, unit, job.folder, job.target, drops, limit)

    def _trim(self, job: _Job) -> None:
        """Makes the last unit of a share anew if it went on beyond it.

        What was missing when the unit was begun was not known if processes were still at units before it. So the
        result is the same for any number of them.
        """
        if job.share is None or not job.enough:
            return
        name = job.order[job.prefix() - 1]
        record = job.records[name]
        missing = job.share - (job.targets - record["account"]["targets"])
        if record.get("limit") == missing:
            return
        with closing(self._units(job, lambda unit: unit != name, stop_at_faults=False)) as units:
            unit = next(unit for unit in units if unit.name == name)
            job.targets = job.share - missing
            ((_, job.records[name]),) = self._workers.unordered(_make_unit, [self._task(job, unit)])
            job.targets += job.records[name]["account"]["targets"]
        _remove_spool(unit)

    def _mark_duplicates(self, jobs: Sequence[_Job]) -> None:
        """The first pass of `--deduplicate`: hashes all rows, and finds those that an equal one stands before."""
        done = sum(1 for job in jobs for _ in job.folder.glob(f"{_WORK_FOLDER}/rows-*[0-9].npy"))
        with _bar("looking for duplicates", jobs, done) as progress:
            for task, _ in self._workers.unordered(_hash_unit, self._hash_tasks(jobs)):
                _remove_spool(task.unit)
                progress.update()
        for job in jobs:
            with explain_disk_errors(job.target):
                paths = [_hash_path(job.folder, name) for name in job.hashed]
                cleaning.mark_duplicates(paths, job.folder / _WORK_FOLDER)

    def _hash_tasks(self, jobs: Sequence[_Job]) -> Generator[_Task, None, None]:
        """The units of which the rows are not hashed yet."""
        for job in jobs:
            is_done = _hashed_check(job)
            for unit in self._units(job, is_done, stop_at_faults=False):
                job.hashed.append(unit.name)
                if not is_done(unit.name):
                    yield _Task(job.name, job.kind, unit, job.folder, job.target)

    def _finish(self, job: _Job, hashes: Future[None] | None) -> None:
        """Sums up the units of a source, and puts it in its place."""
        job.finished = True
        if hashes is not None:
            hashes.result()
        job.check_inputs()
        self._trim(job)
        records = [job.records[name] for name in job.order[: job.prefix()]]
        account, counts = SourceAccounting(), SampleCounts()
        for record in records:
            account.add(accounting_from_json(record["account"]))
            counts.add(SampleCounts(**record["counts"]))
        if account.documents_kept == 0:
            shutil.rmtree(job.folder)
            raise _nothing_left(job.name, account)
        account.check(job.name, counts)
        files = [OutputFile(**record["output"]) for record in records if record["output"] is not None]
        # A file is empty if all of its parts are.
        parts = Counter(path for record in records for path in record.get("without_rows", ()))
        empty = [path for path, count in parts.items() if count == job.segments[path]]
        skipped = {"on_error": "skip"} if any(record["skipped"] for record in records) else {}
        with explain_disk_errors(job.target):
            for path in job.folder.glob("*.arrow"):  # units beyond the share
                if path.name not in {file.path for file in files}:
                    path.unlink()
            describe_dataset(job.folder, id_dtype(job.tokenizer.vocab_size), files, split=None)
            Manifest(
                stage="tokenized",
                name=job.name,
                kind=job.kind,
                sequence_length=job.sequence_length,
                tokenizer=job.tokenizer,
                settings={**job.settings, **skipped},
                inputs=job.inputs,
                files=files,
                accounting={job.name: account},
                samples={"all": {job.name: counts}},
                versions=self._versions,
                files_without_rows=empty,
            ).write(job.folder)
            self._put_in_place(job)

    @staticmethod
    def _put_in_place(job: _Job) -> None:
        shutil.rmtree(job.folder / _WORK_FOLDER, ignore_errors=True)
        job.stack.close()


def _bar(description: str, jobs: Sequence[_Job], done: int) -> "tqdm[Any]":
    """A bar over the units of sources; their number is not known where files are unpacked, or a share ends a source."""
    known = all(job.share is None and not any(isinstance(planned, Stream) for planned in job.plan) for job in jobs)
    total = sum(len(job.plan) for job in jobs) if known else None
    return tqdm(desc=description, total=total, initial=done, unit=" units", disable=None)


def _done_check(job: _Job, on_error: OnError) -> Callable[[str], bool]:
    return lambda unit: job.stored_record(unit, on_error) is not None


def _hashed_check(job: _Job) -> Callable[[str], bool]:
    return lambda unit: _hash_path(job.folder, unit).is_file()


def _remove_spool(unit: Unit) -> None:
    if unit.spool is not None:
        unit.spool.unlink(missing_ok=True)


def _nothing_left(name: str, account: SourceAccounting) -> UserError:
    found = "".join(f"; dropped, {reason}: {entry.times:,} times" for reason, entry in sorted(account.dropped.items()))
    return UserError(
        f"nothing is left of the source {name!r}, so it is not written (documents read: {account.documents_in:,}"
        f"{found}); give it other files, or leave it out with --datasets"
    )


# ---------------------------------------------------------------------------------------------------------------
# The processes: one unit at a time
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class _WorkerState:
    """What a process keeps between units."""

    encoder: encoders.Encoder
    tokenizing: Tokenizing
    settings: PreprocessSettings
    index_dir: Path | None
    cleaners: dict[str, Cleaner | None] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the token ids."""
        return id_dtype(self.encoder.vocab_size)

    def row_maker(self) -> RowMaker:
        """What makes the rows of one unit."""
        return make_row_maker(
            self.settings.row_maker,
            self.settings.sequence_length,
            pad_token_id=self.encoder.special.pad,
            byte_lengths=self.encoder.byte_lengths,
        )

    def cleaner(self, source: str) -> Cleaner | None:
        """The filters of a source, or None if there are none. Only those of one source are kept."""
        if source not in self.cleaners:
            settings = self.settings.cleaning.for_source(source)
            self.cleaners = {source: Cleaner(settings, self.index_dir) if settings.filtering else None}
        return self.cleaners[source]


_worker: dict[str, _WorkerState] = {}


def _start_worker(
    opened: encoders.Encoder | tuple[Path, encoders.Backend], settings: PreprocessSettings, index_dir: Path | None
) -> None:
    encoder = encoders.load_encoder(*opened) if isinstance(opened, tuple) else opened
    length = cutting_length(settings.row_maker, settings.sequence_length)
    tokenizing = Tokenizing(
        encoder, length, train_on_prompts=settings.train_on_prompts, system_prompt=settings.system_prompt
    )
    _worker["state"] = _WorkerState(encoder, tokenizing, settings, index_dir)


def _hash_unit(task: _Task) -> None:
    """Hashes the rows of a unit, to find duplicates; what is bad will be met again."""
    settings = _worker["state"].settings
    items = read_unit(task.unit, task.kind, settings.max_document_bytes, count_lines=False)
    with explain_disk_errors(task.target):
        cleaning.write_hashes(
            task.hash_path, cleaning.hash_rows(item[1] for item in items if not isinstance(item, BadInputError))
        )


def _make_unit(task: _Task) -> dict[str, Any]:
    """Reads, cleans, tokenizes, packs and writes a unit; writes and returns its record."""
    state = _worker["state"]
    path = task.folder / f"data-{task.unit.name}.arrow"
    reader = _UnitReader(task, state)
    maker = state.row_maker()
    with explain_disk_errors(task.target):
        writer = RowWriter(path, task.source, task.unit.number << 32, state.dtype)
        try:
            with closing(reader.rows()) as rows:
                for batch in batch_rows(rows):
                    for part, result in reader.tokenize(batch):
                        reader.count(part, result)
                        for document in result.documents():
                            for row in maker.add(document):
                                writer.write(row)
                    if reader.has_enough:
                        break
            for row in maker.finish():
                writer.write(row)
            writer.close()
        finally:
            writer.abandon()
        reader.account.add(maker.changes)
        reader.account.check(task.source, writer.counts)
        record = {
            "output": None if writer.output is None else asdict(writer.output),
            "account": asdict(reader.account),
            "counts": asdict(writer.counts),
            "skipped": reader.skipped,
            "without_rows": reader.without_rows,
            "limit": task.limit,
        }
        write_record(task.record_path, record)
    return record


class _UnitReader:
    """The rows of a unit that are to be tokenized, and the account of all of it."""

    def __init__(self, task: _Task, state: _WorkerState) -> None:
        self.account = SourceAccounting()
        self.skipped = 0  # what `--on_error stop` would have stopped at
        self.without_rows: list[str] = []  # files, or files of parts, that could be read and hold nothing
        self._examples: dict[str, str] = {}  # of rows with nothing to learn, by the reason
        self._task = task
        self._state = state
        self._stop = state.settings.on_error == "stop"

    @property
    def has_enough(self) -> bool:
        """Whether the limit of the unit is reached."""
        return self._task.limit is not None and self.account.targets >= self._task.limit

    def tokenize(self, batch: list[Row]) -> Iterator[tuple[list[Row], PieceBatch]]:
        """Tokenizes rows, all at once, or where the limit lies among them one by one up to it."""
        result = self._state.tokenizing(batch)
        limit = self._task.limit
        if limit is None or self.account.targets + result.account.targets <= limit:
            yield batch, result
            return
        for row in batch:
            if self.has_enough:
                return
            yield [row], self._state.tokenizing([row])

    def rows(self) -> Generator[Row, None, None]:
        """Reads and cleans.

        Raises:
            UserError: with `--on_error stop`, for bad input.
        """
        cleaner = self._state.cleaner(self._task.source)
        drops = np.empty(0, np.int64) if self._task.drops is None else cleaning.load_drops(self._task.drops)
        passed = 0  # drops that lie behind
        number = -1
        for item in self._items():
            if isinstance(item, BadInputError):
                self._bad(item)
                continue
            location, row = item
            number += 1
            is_duplicate = passed < len(drops) and drops[passed] == number
            passed += is_duplicate
            reason = "duplicate" if is_duplicate else cleaner.reason(row) if cleaner is not None else None
            if reason is not None:
                self.account.leave_out(reason, _row_bytes(row))
                continue
            if nothing := nothing_to_learn(row):
                if self._stop:
                    raise UserError(f"{location}: {nothing}{HOW_TO_SKIP}")
                self.skipped += 1
                self._examples.setdefault(nothing, f"{location}: {nothing}{self._counted_from}")
            yield row

    def _items(self) -> Iterator[tuple[Location, Row] | BadInputError]:
        """What the unit holds, file by file."""
        limit = self._state.settings.max_document_bytes
        for segment in self._task.unit.segments:
            alone = replace(self._task.unit, segments=(segment,))
            items = read_unit(alone, self._task.kind, limit, count_lines=self._stop)
            first = next(items, None)
            if first is not None:
                yield first
                yield from items
            else:
                self.without_rows.append(str(segment.path))

    def count(self, batch: Sequence[Row], result: PieceBatch) -> None:
        """Takes over the account of tokenized rows."""
        result.account.documents_dropped += len(batch) - result.account.documents_kept
        for reason, example in self._examples.items():
            if reason in result.account.dropped:
                result.account.drop(reason, example=example)
        self.account.add(result.account)

    def _bad(self, error: BadInputError) -> None:
        if self._stop:
            raise UserError(f"{error.with_flag}{HOW_TO_SKIP}") from error
        self.skipped += 1
        example = f"{error.with_flag}{self._counted_from}"
        self.account.leave_out(error.reason, error.bytes, is_document=error.is_row, example=example)

    @property
    def _counted_from(self) -> str:
        part = self._task.unit.segments[0].part  # the lines before it are not counted for examples
        return "" if part is None else part.counted_from


def _row_bytes(row: Row) -> int:
    return sum(len(text.encode("utf-8")) for text in row_texts(row))
