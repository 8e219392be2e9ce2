"""`doge-lm preprocess_datasets`: raw text -> packed rows of token ids, one directory a source.

One streaming pass: the parent reads rows and hands them out in batches, the workers tokenize and cut, and the parent
takes the results in order, packs and writes. Memory is bounded by the batches in flight, a packing window and a
shard's record batch; the rows are the same for any number of workers.
"""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from doge_lm.data.documents import PieceBatch, Tokenizing, nothing_to_learn, special_tokens
from doge_lm.data.manifest import (
    RAW_FOLDER,
    SOURCE_NAME,
    TOKENIZED_FOLDER,
    InputFile,
    Kind,
    Manifest,
    RawSource,
    SourceAccounting,
    TokenizerIdentity,
    accounting_table,
    atomic_directory,
    check_name,
    package_versions,
)
from doge_lm.data.packing import BestFitPacker, Padder, RowMaker
from doge_lm.data.sources import Row, TextRow, read_located_rows
from doge_lm.data.storage import RowWriter, id_dtype
from doge_lm.data.tokenizer import load_tokenizer, tokenizer_sha256
from doge_lm.data.workers import Workers, check_num_proc
from doge_lm.errors import UserError

# A batch goes to a worker as soon as it holds this much text, or this many rows.
_BATCH_CHARACTERS = 2**19
_BATCH_ROWS = 1024

Padding = Literal["packed", "max_length"]
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class PreprocessSettings:
    """What the rows depend on, beside the text and the tokenizer.

    Attributes:
        sequence_length: tokens of a row.
        padding: whether documents share rows.
        train_on_prompts: whether the loss covers the prompt of a text.
        on_error: whether a row with nothing to learn (an empty text, a conversation without an answer) ends the run,
            or is dropped and counted.
    """

    sequence_length: int = 2048
    padding: Padding = "packed"
    train_on_prompts: bool = False
    on_error: OnError = "stop"


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
        "--padding",
        choices=("packed", "max_length"),
        default="packed",
        help="packed: documents share samples (default); max_length: one piece of a document a sample, padded",
    )
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="a text that is empty or a conversation without an answer: stop with an error that names file and line "
        "(default), or skip it and count it as dropped",
    )
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="the sources to do (default: all there are)")


def run(args: argparse.Namespace) -> int:
    """Runs `preprocess_datasets`; see `preprocess`."""
    settings = PreprocessSettings(args.max_len, args.padding, args.train_on_prompts, args.on_error)
    manifests = preprocess(
        args.datasets_dir, args.save_dir, args.tokenizer_path, settings, num_proc=args.num_proc, names=args.datasets
    )
    accounts = {name: manifest.accounting[name] for name, manifest in manifests.items()}
    rows = {name: manifest.samples["all"][name] for name, manifest in manifests.items()}
    print(accounting_table(accounts, rows))
    print(f"next: doge-lm merge_datasets --datasets_dir {args.save_dir} --save_dir {args.save_dir}")
    return 0


def preprocess(
    datasets_dir: Path,
    save_dir: Path,
    tokenizer_path: Path,
    settings: PreprocessSettings,
    *,
    num_proc: int = 1,
    names: list[str] | None = None,
) -> dict[str, Manifest]:
    """Tokenizes and packs sources; writes `save_dir/tokenized/NAME` for each, whole or not at all.

    Args:
        datasets_dir: holds `raw/NAME/source.json`, as `download_datasets` leaves it.
        save_dir: where to write.
        tokenizer_path: a directory that `doge_lm.data.tokenizer.load_tokenizer` opens.
        settings: length, padding, loss on prompts, what becomes of rows with nothing to learn.
        num_proc: processes that tokenize; 1 works in this process.
        names: the sources to do; all by default.

    Returns:
        The manifest of each source.

    Raises:
        UserError: for bad flags, missing or broken input, a source of which nothing is left, and a full disk.
    """
    if settings.sequence_length < 8:
        raise UserError(f"--max_len {settings.sequence_length} is too short; it must be at least 8")
    check_num_proc(num_proc)  # before anything is read
    sources = _raw_sources(datasets_dir / RAW_FOLDER, names)
    tokenizer = load_tokenizer(tokenizer_path)
    special = special_tokens(tokenizer)
    identity = TokenizerIdentity(
        tokenizer_sha256(tokenizer_path), len(tokenizer), special.pad, special.bos, special.eos
    )
    start = (tokenizer_path, settings.sequence_length, settings.train_on_prompts)
    with Workers(num_proc, _start_worker, start) as workers:
        return {
            source.name: _preprocess_source(
                directory, source, save_dir / TOKENIZED_FOLDER / source.name, identity, settings, workers
            )
            for directory, source in sources
        }


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


def _preprocess_source(
    directory: Path,
    source: RawSource,
    target: Path,
    identity: TokenizerIdentity,
    settings: PreprocessSettings,
    workers: Workers,
) -> Manifest:
    files = source.paths(directory)
    batches = _batches(_rows(files, source.kind, settings.on_error))
    maker: RowMaker = (
        BestFitPacker(settings.sequence_length)
        if settings.padding == "packed"
        else Padder(settings.sequence_length, identity.pad_token_id)
    )
    account = SourceAccounting()
    with atomic_directory(target) as folder:
        writer = RowWriter(folder, source.name, id_dtype(identity.vocab_size))
        try:
            with (
                closing(workers.map(_tokenize, batches)) as results,
                tqdm(desc=source.name, unit=" documents", unit_scale=True, disable=None) as progress,
            ):
                for result in results:
                    account.add(result.account)
                    for document in result.documents():
                        for row in maker.add(document):
                            writer.write(row)
                    progress.update(result.account.documents_in)
            for row in maker.finish():
                writer.write(row)
            _check_anything_left(source.name, account)
            writer.close()
        finally:
            writer.abandon()
        account.check(source.name, writer.counts)
        manifest = Manifest(
            stage="tokenized",
            name=source.name,
            kind=source.kind,
            sequence_length=settings.sequence_length,
            tokenizer=identity,
            settings={"padding": settings.padding, "train_on_prompts": settings.train_on_prompts},
            inputs=[InputFile(str(path), path.stat().st_size) for path in files],
            files=writer.files,
            accounting={source.name: account},
            samples={"all": {source.name: writer.counts}},
            versions=package_versions(),
        )
        manifest.write(folder)
    return manifest


def _rows(files: Iterable[Path], kind: Kind, on_error: OnError) -> Iterator[Row]:
    """The rows of files; with `stop`, one with nothing to learn is an error that names its place."""
    for location, row in read_located_rows(files, kind):
        reason = nothing_to_learn(row) if on_error == "stop" else None
        if reason is not None:
            raise UserError(
                f"{location}: {reason}; mend or remove it, or let `--on_error skip` drop and count such rows"
            )
        yield row


def _check_anything_left(name: str, account: SourceAccounting) -> None:
    if account.documents_kept == 0:
        found = "".join(
            f"; dropped, {reason}: {entry.times:,} times" for reason, entry in sorted(account.dropped.items())
        )
        raise UserError(
            f"nothing is left of the source {name!r}, so it is not written (documents read: {account.documents_in:,}"
            f"{found}); give it other files, or leave it out with --datasets"
        )


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in batches whose bounds depend on the rows alone."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        if isinstance(row, TextRow):
            characters += len(row.text) + len(row.prompt)
        else:
            characters += sum(len(content) for _, content in row.turns)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_worker: dict[str, Any] = {}  # a process keeps its tokenizer here between batches


def _start_worker(tokenizer_path: Path, sequence_length: int, train_on_prompts: bool) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    _worker["tokenizing"] = Tokenizing(tokenizer, sequence_length, train_on_prompts=train_on_prompts)


def _tokenize(batch: list[Row]) -> PieceBatch:
    tokenizing: Tokenizing = _worker["tokenizing"]
    return tokenizing(batch)
