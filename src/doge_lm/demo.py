"""`doge-lm demo`: the whole path, from text to a model to chat with, on a corpus that needs no network.

The corpus is what Python itself and the installed packages ship: the standard library's sources, the texts behind
`help()`, and the descriptions of the packages; of the texts of `help()`, conversations are made too. Every stage is
the real command, printed as one would type it.
"""

import argparse
import hashlib
import importlib
import json
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .cli import main
from .errors import UserError

PRESET = "doge_tiny"
PROMPTS = ("The function returns", "def main(")
QUESTION = "What is the statement return?"
MOST_TURNS = 12
"""Answers of one conversation."""
# Directories of the standard library that hold tests, data tables or other people's packages.
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
# What the demo makes in its directory: a later demo may remove these, and nothing else.
_FOLDERS = ("corpus", "tokenizer", "datasets", "log", "model", "log_chat", "chat")
_RECORD = "demo.json"
_MADE_HERE = b'{"made_by": "doge-lm demo"}\n'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `doge-lm demo`."""
    parser.add_argument("--work_dir", type=Path, default=Path("demo"), help="where everything goes (default: ./demo)")
    parser.add_argument("--steps", type=int, help="steps of either training, in place of the presets'")
    parser.add_argument(
        "--max_documents", type=int, help="take only so many documents of each source (all conversations stay)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo: corpus, tokenizer, data, training, generation, fine-tuning, chat, each by its own command."""
    for name in ("steps", "max_documents"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    work_dir: Path = args.work_dir
    _start_afresh(work_dir)
    corpus = write_corpus(work_dir / "corpus", args.max_documents)
    for command in commands(work_dir, corpus, args.steps):
        status = _execute(command)
        if status != 0:
            return status
    _conclude(work_dir)
    return 0


def commands(work_dir: Path, corpus: dict[str, Path], steps: int | None) -> list[list[str]]:
    """The commands of the demo, in order, each as the arguments of `doge-lm`."""
    from .training.settings import load_settings  # noqa: PLC0415  (imports PyTorch: help does without)

    settings = load_settings(PRESET)
    datasets, tokenizer, model, chat = (str(work_dir / name) for name in ("datasets", "tokenizer", "model", "chat"))
    local = [part for name, path in corpus.items() for part in ("--local", f"{name}={path}")]
    shorter = [] if steps is None else ["--set", f"per_epoch_max_steps={steps}", "--set", "num_train_epochs=1"]
    return [
        ["tokenizer", "build", "--save_dir", tokenizer],
        ["download_datasets", "--save_dir", datasets, "--cache_dir", f"{datasets}/cache", *local],
        [
            *["preprocess_datasets", "--datasets_dir", datasets, "--save_dir", datasets],
            *["--tokenizer_path", tokenizer, "--max_len", str(settings.train.sequence_length), "--num_proc", "2"],
        ],
        ["merge_datasets", "--datasets_dir", datasets, "--save_dir", datasets, "--test_size", "16", "--num_proc", "2"],
        [
            *["train", "--config_path", PRESET, "--logging_dir", str(work_dir / "log"), "--output_dir", model],
            *["--tokenizer_path", tokenizer, "--dataset_path", f"{datasets}/pretrain", *shorter],
        ],
        *(["generate", model, prompt, "--max_new_tokens", "64", "--seed", "233"] for prompt in PROMPTS),
        [
            *["finetune", "--config_path", PRESET, "--model_path", model, "--dataset_path", f"{datasets}/finetune"],
            *["--logging_dir", str(work_dir / "log_chat"), "--output_dir", chat, *shorter],
        ],
        ["chat", chat, "--message", QUESTION, "--max_new_tokens", "64", "--seed", "233"],
    ]


def write_corpus(directory: Path, max_documents: int | None = None) -> dict[str, Path]:
    """Write the embedded corpus as JSON lines and return the file of each source.

    Documents come in an order that depends on their text alone, so that `max_documents` takes a mixture.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sources = {
        "python-library": _library_sources(),
        "python-help": _help_topics(),
        "package-descriptions": _package_descriptions(),
    }
    paths = {}
    for name, texts in sources.items():
        ordered = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())[:max_documents]
        paths[name] = directory / f"{name}.jsonl"
        _write_rows(paths[name], ({"text": text} for text in ordered))
    paths["python-answers"] = directory / "python-answers.jsonl"
    conversations = filter(None, map(conversation, _help_topics()))
    _write_rows(paths["python-answers"], ({"messages": turns} for turns in conversations))
    return paths


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def conversation(page: str) -> list[dict[str, str]]:
    """A page of the manual as turns: its heading as a question, its first paragraphs of prose as the answers.

    Empty where a page has no prose.
    """
    heading, _, body = page.partition("\n")
    statement = re.fullmatch(r'The "(\w+)" statement', heading)
    question = f"What is the statement {statement[1]}?" if statement else f"Explain: {heading}"
    paragraphs = [" ".join(part.split()) for part in body.split("\n\n")]
    # Without grammar, code and single words.
    prose = [part for part in paragraphs if len(part) > 60 and "::=" not in part and part[0].isalpha()]
    turns = []
    for number, answer in enumerate(prose[:MOST_TURNS]):
        turns.append({"role": "user", "content": "Go on." if number else question})
        turns.append({"role": "assistant", "content": answer})
    return turns


def _library_sources() -> Iterator[str]:
    """The modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts[:-1]):
            text = path.read_bytes().decode("utf-8", errors="replace")
            if "\ufffd" not in text and text.strip():
                yield text


def _help_topics() -> Iterator[str]:
    """The reference manual's pages that `help()` shows."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield from (text for text in topics.values() if text.strip())


def _package_descriptions() -> Iterator[str]:
    """What the installed packages say of themselves."""
    for distribution in metadata.distributions():
        _, _, text = (distribution.read_text("METADATA") or "").partition("\n\n")
        if len(text) > 200:  # shorter ones say nothing
            yield text


def _start_afresh(work_dir: Path) -> None:
    """Make `work_dir`, or empty it of an earlier demo; anything else in it is refused and stays.

    Raises:
        UserError: if something is there that the demo did not make.
    """
    if work_dir.exists() and not work_dir.is_dir():
        raise UserError(f"--work_dir {work_dir} is not a directory; give another --work_dir")
    record = work_dir / _RECORD
    made_here = record.is_file() and record.read_bytes() == _MADE_HERE
    for path in sorted(work_dir.iterdir()) if work_dir.exists() else []:
        ours = path == record or (path.name in _FOLDERS and path.is_dir() and not path.is_symlink())
        if not (made_here and ours):
            raise UserError(f"{path} was not made by the demo; move it away, or give another --work_dir")
    for name in _FOLDERS:
        if (work_dir / name).exists():
            shutil.rmtree(work_dir / name)
    work_dir.mkdir(parents=True, exist_ok=True)
    record.write_bytes(_MADE_HERE)


def _own_name() -> str:
    """What one types here to call this program: `doge-lm`, or its path if that is not where the shell would look."""
    typed = Path(sys.argv[0]).with_suffix("")  # on Windows there may be an .exe
    found = shutil.which("doge-lm")
    in_path = found is not None and Path(found).resolve().with_suffix("") == typed.resolve()
    if typed.name != "doge-lm" or in_path:
        return "doge-lm"
    return f'"{typed}"' if " " in str(typed) else str(typed)


def _execute(arguments: list[str]) -> int:
    print(f"\n$ {_own_name()} {shlex.join(arguments)}", flush=True)
    return main(arguments)


def _conclude(work_dir: Path) -> None:
    from .training.report import CURVE_NAME  # noqa: PLC0415  (as above)

    print(
        f"\nmodel:  {work_dir / 'model'}, and after fine-tuning {work_dir / 'chat'}\n"
        f"curve:  {work_dir / 'log' / CURVE_NAME}\n"
        f"next:   {_own_name()} serve {work_dir / 'chat'}   (a chat page in the browser)\n"
        f"        and with texts of your own: {_own_name()} download_datasets --help"
    )
