"""`doge-lm data near_duplicates`: of documents that are nearly the same, keep one. MinHash, by the library datatrove.

Four steps, each of tasks that run side by side: signatures (a task a file), buckets (pairs whose signatures agree),
clusters, and the filter, which writes `raw/NAME-dedup` in the form that `preprocess_datasets` reads. The work of an
interrupted run is kept in `.near-duplicates-NAME` under `--save_dir` and gone on with. Nothing is downloaded: words
are told apart by letters and spaces, in scripts without spaces every character is a word.
"""

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zstandard

from doge_lm.data.manifest import (
    RAW_FOLDER,
    SOURCE_NAME,
    InputFile,
    RawSource,
    atomic_directory,
    first_difference,
    read_record,
    write_record,
)
from doge_lm.data.sources import ConversationRow, Row, TextRow, read_rows
from doge_lm.errors import UserError

_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
_IDENTITY_NAME = "identity.json"


@dataclass(frozen=True)
class NearDuplicateSettings:
    """How alike two documents must be.

    Two documents that share the fraction s of their n-grams are found with the probability 1 - (1 - s^h)^b, for b
    buckets of h hashes: 92% at s = 0.8 and 56% at 0.7 with the defaults.

    Attributes:
        ngram_words: words of an n-gram.
        buckets: b.
        hashes: h.
    """

    ngram_words: int = 5
    buckets: int = 14
    hashes: int = 8


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
    parser.add_argument("--overwrite", action="store_true", help="make results anew that are there already")


def run(args: argparse.Namespace) -> int:
    """Runs `data near_duplicates`; see `remove_near_duplicates`."""
    for flag in ("num_proc", "ngram_words", "buckets", "hashes"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least 1")
    settings = NearDuplicateSettings(args.ngram_words, args.buckets, args.hashes)
    for name in args.datasets:
        source = remove_near_duplicates(
            args.datasets_dir / RAW_FOLDER / name,
            args.save_dir / RAW_FOLDER / f"{name}-dedup",
            settings,
            num_proc=args.num_proc,
            overwrite=args.overwrite,
        )
        print(f"{source.name}: kept {source.counts['kept']:,}, dropped {source.counts['dropped']:,} near duplicates")
    print(f"next: doge-lm preprocess_datasets --datasets_dir {args.save_dir} --datasets NAME-dedup …")
    return 0


def remove_near_duplicates(
    directory: Path, target: Path, settings: NearDuplicateSettings, *, num_proc: int = 1, overwrite: bool = False
) -> RawSource:
    """Writes a source without its near duplicates.

    Args:
        directory: `raw/NAME` of the source.
        target: where to write; its name is that of the new source.
        settings: how alike two documents must be.
        num_proc: tasks at a time.
        overwrite: make it anew if it is there already, or was begun with other settings.

    Returns:
        The description of the new source, with `kept` and `dropped` in its counts.

    Raises:
        UserError: if the package is missing, the source is, or the target exists.
    """
    _require_datatrove()
    source = RawSource.read(directory)
    files = source.paths(directory)
    if (target / SOURCE_NAME).is_file() and not overwrite:
        raise UserError(f"{target} is there already; remove it, or make it anew with --overwrite")
    work = target.parent.parent / f".near-duplicates-{source.name}"
    _begin(work, {"settings": asdict(settings), "inputs": _inputs(files)}, overwrite=overwrite)
    _run_steps(files, source, work, settings, num_proc)
    return _finish(source, directory, target, work)


def _require_datatrove() -> None:
    try:
        import datatrove  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise UserError("near duplicates need the package datatrove: pip install 'doge-lm[clean]'") from error


def _inputs(files: list[Path]) -> dict[str, Any]:
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _begin(work: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Makes the work directory, or takes over that of an interrupted run of the same settings and files."""
    before = read_record(work / _IDENTITY_NAME)
    difference = None if before is None else first_difference(before, json.loads(json.dumps(identity)))
    if difference is not None and not overwrite:
        raise UserError(
            f"{work} is of an interrupted run with other settings ({difference}); give the same to go on with it, or "
            "throw it away with --overwrite"
        )
    if work.exists() and (before is None or difference is not None or overwrite):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_record(work / _IDENTITY_NAME, identity)


def _run_steps(
    files: list[Path], source: RawSource, work: Path, settings: NearDuplicateSettings, num_proc: int
) -> None:
    # Here: the package is large, and only this command needs it.
    from datatrove.executor import LocalPipelineExecutor  # noqa: PLC0415
    from datatrove.pipeline.dedup.minhash import (  # noqa: PLC0415
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.utils.hashing import HashConfig  # noqa: PLC0415

    # datatrove's `xxhash` gives strings to the package of that name, which from version 4 on takes bytes only.
    config = MinhashConfig(
        settings.ngram_words, settings.buckets, settings.hashes, hash_config=HashConfig(hash_fc="sha1")
    )
    signatures, pairs, removals, parts = (str(work / name) for name in ("signatures", "pairs", "removals", "parts"))
    reader = ReadDocuments(files, source.kind)
    steps: list[tuple[str, list[Any], int]] = [
        ("signatures", [reader, MinhashDedupSignature(signatures, config, language=_word_tokenizer())], len(files)),
        ("buckets", [MinhashDedupBuckets(signatures, pairs, config=config)], settings.buckets),
        ("clusters", [MinhashDedupCluster(pairs, removals, config=config)], 1),
        ("filter", [reader, MinhashDedupFilter(removals), WriteDocuments(Path(parts))], len(files)),
    ]
    for name, pipeline, tasks in steps:
        logs = str(work / "logs" / name)
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(num_proc, tasks), logging_dir=logs).run()


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


@dataclass(frozen=True)
class ReadDocuments:
    """The first step of a pipeline: the rows of one file, the file of the task's number.

    Attributes:
        files: one a task.
        kind: what the rows are for.
    """

    files: list[Path]
    kind: Any

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[Any]:
        """Yields a datatrove document for every row, in order."""
        from datatrove.data import Document  # noqa: PLC0415

        for number, row in enumerate(read_rows([self.files[rank]], self.kind)):
            yield Document(text=_compared(row), id=str(number), metadata={"row": row})


@dataclass(frozen=True)
class WriteDocuments:
    """The last step: writes what is left as `part-XXXXX.jsonl.zst`, and beside it a record of how much that is."""

    folder: Path

    def __call__(self, data: Iterable[Any], rank: int, world_size: int) -> Iterator[Any]:
        """Writes all documents; passes nothing on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{rank:05d}.jsonl.zst"
        kept = 0
        with path.open("wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file) as writer:
            for document in data:
                writer.write(json.dumps(_values(document.metadata["row"]), ensure_ascii=False).encode() + b"\n")
                kept += 1
        write_record(path.with_suffix(".json"), {"kept": kept})
        yield from ()


def _compared(row: Row) -> str:
    """The words by which rows are compared: a text without its prompt, or all turns."""
    return row.text if isinstance(row, TextRow) else "\n".join(content for _, content in row.turns)


def _values(row: Row) -> dict[str, Any]:
    if isinstance(row, ConversationRow):
        return {"conversations": [{"from": role, "value": content} for role, content in row.turns]}
    return {"prompt": row.prompt, "text": row.text} if row.prompt else {"text": row.text}


def _finish(source: RawSource, directory: Path, target: Path, work: Path) -> RawSource:
    """Moves the parts into the new source's directory and describes them."""
    parts = sorted((work / "parts").glob("part-*.jsonl.zst"))
    kept = [int((read_record(path.with_suffix(".json")) or {})["kept"]) for path in parts]
    total = sum(1 for _ in read_rows(source.paths(directory), source.kind))
    with atomic_directory(target) as folder:
        entries = []
        for path in parts:
            place = folder / path.name
            shutil.copyfile(path, place)
            with place.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            entries.append(InputFile(path.name, place.stat().st_size, sha256))
        made = RawSource(
            name=target.name,
            kind=source.kind,
            origin=f"{source.name} ({source.origin}) without near duplicates",
            licence=source.licence,
            files=entries,
            counts={"kept": sum(kept), "dropped": total - sum(kept)},
        )
        made.write(folder)
    shutil.rmtree(work)
    return made
