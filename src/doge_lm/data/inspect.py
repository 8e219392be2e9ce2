"""`doge-lm data inspect DIR`: what lies in a tokenized source or a merged set, as tables, sample rows and a picture.

Everything is read file by file through memory maps, so memory does not grow with the set.
"""

import argparse
import io
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from doge_lm.data.manifest import (
    MANIFEST_NAME,
    RAW_FOLDER,
    SOURCE_NAME,
    InputFile,
    Manifest,
    OutputFile,
    RawSource,
    SampleCounts,
    accounting_table,
    irregular_lines,
    without_rows,
)
from doge_lm.data.storage import check_files, read_batches
from doge_lm.data.tokenizer import StreamDecoder, load_tokenizer, tokenizer_sha256
from doge_lm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT_MARKS = "⟦", "⟧"
"""What stands around tokens that are read but never predicted."""
CONTROL_MARKS = "‹", "›"
"""What stands around a control token, so that it is not taken for text."""

_WHOLE = "all"  # the only split of a tokenized source
_SHOWN_INPUTS = 10
_SHA256_PREFIX = 12
_HISTOGRAM_BINS = 64
# Settings of a merged set that have a table of their own.
_TABULATED = ("inputs", "mixture", "sources")
# Settings that are no flags, in words; the others are known by their flags.
_PLAIN_NAMES = {
    "unit_bytes": "text done at a time, bytes",
    "candidates": "samples the test set was chosen among",
    "left_out": "left out by --mix",
}
_NGRAM_SETTINGS = ("ngram_rule", "ngram_words", "ngram_chars")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `data inspect`."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="a folder DIR/tokenized/NAME, DIR/pretrain, DIR/finetune")
    parser.add_argument("--samples", type=int, default=3, help="random rows to show (default: 3)")
    parser.add_argument("--split", help="of a merged set: train or test (default: train); a tokenized source has none")
    parser.add_argument("--seed", type=int, default=0, help="fixes which rows are shown (default: 0)")
    parser.add_argument(
        "--tokenizer_path",
        type=Path,
        metavar="TOK",
        help="the tokenizer of the ids; without it no text is shown",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="the picture (default: ./NAME-inspect.png)")


def run(args: argparse.Namespace) -> int:
    """Runs `data inspect`.

    Raises:
        UserError: if the directory was not made by this package or is damaged, the tokenizer is another one, or a
            flag is wrong.
    """
    if args.samples < 0 or args.seed < 0:
        flag = "samples" if args.samples < 0 else "seed"
        raise UserError(f"--{flag} {getattr(args, flag)} is not possible; it must not be negative")
    if (args.dir / SOURCE_NAME).is_file():
        print(describe_source(args.dir, RawSource.read(args.dir)))
        return 0
    _refuse_others(args.dir)
    manifest = Manifest.read(args.dir)
    split = _split(args.dir, manifest, args.split)
    png = args.png or Path(f"{manifest.name}-inspect.png")
    if png.suffix.lower() != ".png":
        raise UserError(f"--png {png}: the picture is a PNG; give a name that ends in .png")
    if not png.parent.is_dir():
        raise UserError(f"--png {png}: the folder {png.parent} does not exist; make it, or choose another place")
    if args.tokenizer_path is not None:
        _check_tokenizer(args.tokenizer_path, args.dir, manifest)
    files = _files(manifest, split)
    check_files(args.dir, files)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows its number instead.
        sys.stdout.reconfigure(errors="backslashreplace")
    print(describe(args.dir, manifest), flush=True)  # what comes next imports much, slowly where it is the first time
    print()
    tokenizer = load_tokenizer(args.tokenizer_path) if args.tokenizer_path is not None and args.samples else None
    for row in sample_rows(args.dir, files, args.samples, args.seed):
        print(show_row(row, manifest.tokenizer.bos_token_id, tokenizer))
        print()
    if tokenizer is None and args.samples:
        print("To see the text, give the tokenizer that made the ids: --tokenizer_path TOK")
    lengths = piece_lengths(args.dir, files, manifest.sequence_length)
    draw(png, f"{manifest.name} ({split})", lengths, manifest.samples[split])
    print(f"lengths and mix: {png}")
    return 0


def _refuse_others(directory: Path) -> None:
    """Says of a directory that is near to one with a manifest, or of another stage, which to give.

    Raises:
        UserError: if the directory is such a one.
    """
    if (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} is a tokenizer; give it as --tokenizer_path, and as DIR what it tokenized")
    if (directory / MANIFEST_NAME).is_file():
        return
    place = directory.absolute()
    if (place / "dataset_info.json").is_file() and (place.parent / MANIFEST_NAME).is_file():
        raise UserError(f"{directory} is a split of a merged set; give {directory.parent} --split {place.name}")
    patterns = [f"{stage}{name}" for stage in ("", "*/") for name in (f"*/{MANIFEST_NAME}", f"*/{SOURCE_NAME}")]
    found = {path.parent for pattern in patterns for path in directory.glob(pattern)}
    shown = sorted(str(path) for path in found if not path.name.startswith(".") and _is_inspected(path))
    if shown:
        raise UserError(f"{directory} is a folder of several; give one of them: {', '.join(shown)}")


def _is_inspected(directory: Path) -> bool:
    return not (directory / "tokenizer.json").is_file()


def _split(directory: Path, manifest: Manifest, wanted: str | None) -> str:
    if manifest.stage == "tokenized":
        if wanted not in (None, _WHOLE):
            raise UserError(f"--split {wanted}: {directory} is a tokenized source, which has no splits; leave it out")
        return _WHOLE
    split = wanted or "train"
    if split not in manifest.samples:
        raise UserError(f"--split {split}: {directory} has no such split, only {', '.join(manifest.samples)}")
    return split


def _files(manifest: Manifest, split: str) -> list[OutputFile]:
    if split == _WHOLE:
        return manifest.files
    return [file for file in manifest.files if file.path.startswith(f"{split}/")]


def _check_tokenizer(path: Path, directory: Path, manifest: Manifest) -> None:
    """Checks that a tokenizer is the one that made the ids.

    Raises:
        UserError: if it is another one.
    """
    found = tokenizer_sha256(path)
    if found != manifest.tokenizer.sha256:
        raise UserError(
            f"--tokenizer_path {path} is not the tokenizer that made {directory}: the sha256 of its tokenizer.json is "
            f"{found[:_SHA256_PREFIX]}..., the manifest names {manifest.tokenizer.sha256[:_SHA256_PREFIX]}...; give "
            "that one"
        )


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


def describe(directory: Path, manifest: Manifest) -> str:
    """The manifest as tables of plain text.

    Args:
        directory: holds it; for the heading.
        manifest: of a tokenized source or a merged set.
    """
    parts = [_heading(directory, manifest), _settings(manifest), _inputs(manifest)]
    if manifest.stage == "tokenized":
        parts.append("accounting\n" + accounting_table(manifest.accounting, manifest.samples[_WHOLE]))
    else:
        parts.append(_accounting(manifest))
        if manifest.settings.get("mixture"):
            parts.append(_mixture(manifest.settings["mixture"]))
    parts.append(_samples(manifest))
    return "\n\n".join(parts)


def describe_source(directory: Path, source: RawSource) -> str:
    """A source that is not tokenized yet, as tables of plain text."""
    rows = [
        ("name", source.name),
        ("stage", f"{RAW_FOLDER}: not tokenized yet; preprocess_datasets does that"),
        ("kind", source.kind),
        ("origin", source.origin),
        ("licence", source.licence),
        *([("revision", source.revision)] if source.revision else []),
        *((reason, f"{count:,}") for reason, count in source.counts.items()),
        ("files", f"{len(source.files):,}, {sum(file.bytes for file in source.files):,} bytes"),
    ]
    return f"{directory}\n{_table([], rows)}\n\n{_files_table(source.files, {})}"


def _heading(directory: Path, manifest: Manifest) -> str:
    tokenizer = manifest.tokenizer
    rows = [
        ("name", manifest.name),
        ("stage", manifest.stage),
        ("kind", manifest.kind),
        ("sequence length", f"{manifest.sequence_length:,}"),
        ("tokenizer", f"{tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256}"),
        ("files", f"{len(manifest.files):,}, {sum(file.bytes for file in manifest.files):,} bytes"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]
    if manifest.repeated_documents:
        rows.append(("repeated", f"{manifest.repeated_documents:,} documents occur more than once"))
    if manifest.files_without_rows:
        rows.append(("empty", without_rows(manifest.files_without_rows)))
    return f"{directory}\n" + _table([], rows)


def _settings(manifest: Manifest) -> str:
    hidden = _TABULATED if manifest.stage == "merged" else ()
    own = _plain({name: value for name, value in manifest.settings.items() if name not in hidden})
    text = "settings\n" + _table([], list(own.items()))
    if manifest.stage == "merged":
        sources = {name: _plain(settings) for name, settings in manifest.settings.get("sources", {}).items()}
        names = dict.fromkeys(name for settings in sources.values() for name in settings)
        rows = [[name, *(settings.get(name, "-") for settings in sources.values())] for name in names]
        text += "\n\n" + _table(["settings of the sources", *sources], rows)
    return text


def _plain(settings: dict[str, Any]) -> dict[str, str]:
    """Settings in words for a reader; those of n-grams only where benchmarks are compared."""
    hidden = ("ngram_rule",) if settings.get("decontaminate") else _NGRAM_SETTINGS
    return {_PLAIN_NAMES.get(name, name): _in_words(value) for name, value in settings.items() if name not in hidden}


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{name} {str(entry)[:_SHA256_PREFIX]}" for name, entry in value.items()]  # benchmarks, their sha256
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or None
    return "none" if value is None else str(value)


def _inputs(manifest: Manifest) -> str:
    # A merged set keeps the hashes of its sources among the settings, by their names.
    return _files_table(manifest.inputs, manifest.settings.get("inputs", {}) if manifest.stage == "merged" else {})


def _files_table(files: Sequence[InputFile], hashes: dict[str, Any]) -> str:
    """The first files with their sizes and hashes; `hashes` has those that are not among the files, by name."""

    def prefix(file: InputFile) -> str:
        found = file.sha256 or hashes.get(Path(file.path).name, (0, ""))[1]
        return found[:_SHA256_PREFIX] or "-"

    rows = [(file.path, f"{file.bytes:,}", prefix(file)) for file in files[:_SHOWN_INPUTS]]
    lines = [_table(["input", "bytes", "sha256"], rows)]
    left = files[_SHOWN_INPUTS:]
    if left:
        lines.append(f"... and {len(left):,} more, {sum(file.bytes for file in left):,} bytes")
    return "\n".join(lines)


def _accounting(manifest: Manifest) -> str:
    """The accounts of a merged set's sources: as they were tokenized, before any were repeated or left out."""
    rows = []
    for name, account in manifest.accounting.items():
        dropped = sum(entry.tokens for entry in account.dropped.values())
        numbers = (account.documents_in, account.documents_kept, account.bytes_in, account.tokens_in, dropped)
        rows.append((name, *(f"{number:,}" for number in numbers)))
    header = ["tokenized source", "documents in", "kept", "bytes in", "tokens in", "tokens dropped"]
    reasons = [line for name, account in manifest.accounting.items() for line in irregular_lines(name, account)]
    return "\n".join([_table(header, rows), *reasons])


def _mixture(mixture: dict[str, dict[str, Any]]) -> str:
    total = sum(entry["tokens_taken"] for entry in mixture.values())
    rows = []
    for name, entry in mixture.items():
        left_out = sum(dropped["samples"] for dropped in entry["dropped"].values())
        rows.append(
            (
                name,
                *(f"{entry[f'tokens_{what}']:,}" for what in ("there", "wanted", "taken")),
                f"{entry['tokens_taken'] / total:.1%}" if total else "-",
                f"{entry['epochs']:.2f}",
                f"{entry['repeated']['samples']:,}",
                f"{left_out:,}",
            )
        )
    header = ["mix of train", "tokens there", "wanted", "taken", "share", "epochs", "samples repeated", "left out"]
    return _table(header, rows)


def _samples(manifest: Manifest) -> str:
    columns = ["samples", "pieces", "tokens", "targets", "context", "padding", "empty", "bytes a token"]
    rows = []
    for split, sources in manifest.samples.items():
        for name, counts in sorted(sources.items()):
            numbers = (counts.samples, counts.pieces, counts.tokens, counts.targets, counts.context, counts.padding)
            empty = _empty_share(counts, manifest.sequence_length)
            rows.append((split, name, *(f"{number:,}" for number in numbers), empty, _bytes_a_token(counts)))
    return _table(["split", "source", *columns], rows, left=2)


def _empty_share(counts: SampleCounts, sequence_length: int) -> str:
    """What of full-length samples is not filled, whether padding is stored there or left to training."""
    return f"{1 - counts.tokens / (counts.samples * sequence_length):.2%}" if counts.samples else "-"


def _bytes_a_token(counts: SampleCounts) -> str:
    return f"{counts.text_bytes / counts.targets:.3f}" if counts.targets else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they need, the first `left` ones aligned to the left; without a header, all of them."""
    lines = [*([header] if header else []), *rows]
    if not lines:
        return "(none)"
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if number < left or not header else ">" for number in range(len(widths))]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )


# ---------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of a set: `number` counts from the beginning of its split, the rest are its columns."""

    number: int
    source: str
    input_ids: npt.NDArray[Any]
    document_lengths: npt.NDArray[np.int32]
    context_spans: npt.NDArray[np.int32]

    def ignored(self) -> npt.NDArray[np.bool_]:
        """Which tokens are not predicted: the first of each piece, context, padding; shape (tokens,)."""
        ignored = np.zeros(len(self.input_ids), np.bool_)
        ends = np.cumsum(self.document_lengths)
        ignored[ends - self.document_lengths] = True
        for begin, end in zip(self.context_spans[::2], self.context_spans[1::2], strict=True):
            ignored[begin:end] = True
        ignored[int(self.document_lengths.sum()) :] = True
        return ignored


def sample_rows(directory: Path, files: Sequence[OutputFile], count: int, seed: int) -> Iterator[Row]:
    """Random rows, in the order in which they stand; all of them if there are no more than `count`.

    Args:
        directory: holds the files.
        files: the arrow files, in order.
        count: rows wanted.
        seed: fixes the choice.
    """
    starts = np.cumsum([0, *(file.rows for file in files)])
    total = int(starts[-1])
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    for position, file in enumerate(files):
        own = chosen[(chosen >= starts[position]) & (chosen < starts[position + 1])]
        if not len(own):
            continue
        batches = list(read_batches(directory / file.path))
        ends = starts[position] + np.cumsum([batch.num_rows for batch in batches])
        for number in own.tolist():
            index = int(np.searchsorted(ends, number, "right"))
            batch = batches[index].slice(number - int(ends[index]) + batches[index].num_rows, 1)
            ids, lengths, spans = (
                batch.column(name)[0].values.to_numpy(zero_copy_only=False)
                for name in ("input_ids", "document_lengths", "context_spans")
            )
            yield Row(number, batch.column("source")[0].as_py(), ids, lengths, spans)


def show_row(row: Row, bos_token_id: int, tokenizer: "PreTrainedTokenizerFast | None") -> str:
    """A row as text: a line before each piece, and marks around what is not predicted.

    Args:
        row: to be shown.
        bos_token_id: with it a document begins; a piece without it continues one.
        tokenizer: made the ids. Without it lengths and spans are shown instead of text.
    """
    ignored = row.ignored()
    tokens = int(row.document_lengths.sum())
    lines = [
        f"═══ sample {row.number:,} of {row.source}: {tokens:,} tokens, pieces: {len(row.document_lengths):,}, "
        f"targets: {int((~ignored).sum()):,}, padding: {len(row.input_ids) - tokens:,}"
    ]
    end = 0
    for number, length in enumerate(row.document_lengths.tolist(), start=1):
        begin, end = end, end + length
        kind = "begins a document" if row.input_ids[begin] == bos_token_id else "continues a document"
        lines.append(f"─── piece {number}: {length:,} tokens, {kind}")
        if tokenizer is not None:
            lines.append(mark_text(tokenizer, row.input_ids[begin:end], ignored[begin:end], bos_token_id))
        else:
            spans = ", ".join(f"{first}-{last}" for first, last in _stretches(ignored[begin:end]))
            lines.append(f"    not predicted: tokens {spans}")
    return "\n".join(lines)


def mark_text(
    tokenizer: "PreTrainedTokenizerFast", ids: npt.NDArray[Any], ignored: npt.NDArray[np.bool_], bos_token_id: int
) -> str:
    """The text of a piece with `⟦…⟧` around what is not predicted and `‹…›` around control tokens.

    A character whose bytes are spread over several tokens stands where its last token is.

    Args:
        tokenizer: made the ids.
        ids: of the piece.
        ignored: which of them are not predicted.
        bos_token_id: see `show_row`.
    """
    decoder = StreamDecoder(tokenizer, continues=bool(ids[0] != bos_token_id))
    control = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    open_, close = CONTEXT_MARKS
    parts: list[str] = []
    inside = False
    for index, is_ignored in zip(ids.tolist(), ignored.tolist(), strict=True):
        if is_ignored != inside:
            parts.append(open_ if is_ignored else close)
            inside = is_ignored
        if index in control:
            parts += [_visible(decoder.end()), CONTROL_MARKS[0], control[index], CONTROL_MARKS[1]]
        else:
            parts.append(_visible(decoder.put(index)))
    parts.append(_visible(decoder.end()))
    if inside:
        parts.append(close)
    return "".join(parts)


def _visible(text: str) -> str:
    """Writes out control characters, which could do anything to a terminal, but for line feeds and tabs."""
    return "".join(
        f"\\x{ord(character):02x}" if unicodedata.category(character) == "Cc" and character not in "\n\t" else character
        for character in text
    )


def _stretches(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The stretches of True as first and last index."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(first), int(behind) - 1) for first, behind in zip(edges[::2], edges[1::2], strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------


def piece_lengths(directory: Path, files: Sequence[OutputFile], sequence_length: int) -> npt.NDArray[np.int64]:
    """How many pieces there are of each length: shape (sequence_length + 1,).

    Raises:
        UserError: if a piece is longer than a row can be.
    """
    total = np.zeros(sequence_length + 1, np.int64)
    for file in tqdm(files, desc="lengths", unit="file", disable=None):
        for batch in read_batches(directory / file.path):
            lengths = batch.column("document_lengths").flatten().to_numpy(zero_copy_only=False)
            if lengths.max(initial=0) > sequence_length or lengths.min(initial=0) < 0:
                raise UserError(f"{directory / file.path} is damaged: a piece does not fit its row; make it again")
            total += np.bincount(lengths, minlength=sequence_length + 1)
    return total


def draw(png: Path, title: str, lengths: npt.NDArray[np.int64], sources: dict[str, SampleCounts]) -> None:
    """Draws the lengths of the pieces and the mix by source.

    Args:
        png: the file to write.
        title: stands above.
        lengths: how many pieces there are of each length.
        sources: source name -> what lies in its rows.
    """
    # Here, for it takes most of a second; a `Figure` of its own needs no display.
    import matplotlib  # noqa: PLC0415

    if not list(Path(matplotlib.get_cachedir()).glob("fontlist*")):
        print("drawing: matplotlib looks for fonts first, which may take a minute, once", file=sys.stderr)
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(12, 4 + 0.2 * len(sources)), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    width = -(-len(lengths) // _HISTOGRAM_BINS)  # the same for every bin, so that their heights compare
    starts = np.arange(0, len(lengths), width)
    left.stairs(np.add.reduceat(lengths, starts), [*starts, starts[-1] + width], fill=True)
    left.set(xlabel="tokens of a piece", ylabel="pieces", title=f"{int(lengths.sum()):,} pieces by length")
    left.set_yscale("symlog", linthresh=1)  # the full pieces outnumber the others by far, and 0 must have a place
    left.set_ylim(bottom=0)
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.set_major_formatter("{x:,.0f}")
    right.xaxis.set_major_locator(MaxNLocator(4))  # the numbers are long
    names = sorted(sources, key=lambda name: sources[name].tokens)
    tokens = [sources[name].tokens for name in names]
    total = sum(tokens)
    bars = right.barh(names, tokens)
    right.bar_label(bars, [f"{count / total:.1%}" for count in tokens], padding=3)
    right.margins(x=0.15)
    right.set(xlabel="tokens", title=f"{total:,} tokens by source")
    figure.savefig(png, format="png", dpi=120)
