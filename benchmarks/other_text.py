"""Text by which no setting was chosen, for `quality.py --also_test`: turns of conversations, and Python of a folder.

    python benchmarks/other_text.py OUT --conversations english=FILE chinese=FILE --python FOLDER

Writes OUT/NAME.jsonl with a `text` a line, which `download_datasets --local NAME=OUT/NAME.jsonl` takes: the turns of a
conversation one after the other, and whole files, drawn by a fixed seed. An empty turn is left out.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from flags import positive, run_command

from doge_lm.data.sources import ConversationRow, read_rows, read_text
from doge_lm.errors import UserError

BYTES = (2_000, 60_000)  # of a Python file: no empty one, and none that is half of the set


def conversation_texts(path: Path) -> list[str]:
    """The turns of each row, with an empty line between.

    Raises:
        UserError: as `read_rows`.
    """
    rows = read_rows([path], "finetune")
    turns = [[content.strip() for _, content in row.turns] for row in rows if isinstance(row, ConversationRow)]
    texts = ["\n\n".join(filter(None, each)) for each in turns]
    return [text for text in texts if text]


def python_texts(folder: Path) -> list[str]:
    """The Python files of a folder and its subfolders that are neither small nor large, in sorted order.

    Raises:
        UserError: if there is none.
    """
    least, most = BYTES
    paths = [path for path in sorted(folder.rglob("*.py")) if least <= path.stat().st_size <= most]
    if not paths:
        raise UserError(f"--python {folder}: no Python file of {least:,} to {most:,} bytes there")
    return [read_text(path) for path in paths]


def write_sample(texts: Sequence[str], most: int, path: Path) -> None:
    """Draw up to `most` of the texts, and write a line for each."""
    drawn = random.Random(0).sample(texts, min(most, len(texts)))
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in drawn]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--conversations", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--python", type=Path, metavar="FOLDER")
    parser.add_argument("--most", type=positive, default=4000, help="conversations of each file")
    parser.add_argument("--most_files", type=positive, default=150, help="Python files")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for choice in args.conversations:
        name, equals, path = choice.partition("=")
        if not (name and equals and path):
            raise UserError(f"--conversations {choice}: expected NAME=FILE")
        write_sample(conversation_texts(Path(path)), args.most, args.output_dir / f"{name}.jsonl")
    if args.python is not None:
        write_sample(python_texts(args.python), args.most_files, args.output_dir / "python.jsonl")
    return 0


if __name__ == "__main__":
    run_command(main)
