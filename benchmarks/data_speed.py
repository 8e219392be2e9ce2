"""Tokens per second from `.jsonl.zst` to finished shards, beside `datasets.map` doing the same work.

    python benchmarks/data_speed.py --tokenizer_path ./tokenizer [--text_dir ../shared/data] [--repetitions 3]

Each way runs in a process of its own, the ways taking turns, each with `--num_proc` processes:

- `BACKEND command`: the whole command `doge-lm preprocess_datasets --backend BACKEND`, with Python's start and imports;
- `BACKEND call`: the same in a running Python with the package imported, the start of the workers included;
- `datasets.map call`: `load_dataset("json")` into a fresh cache, `map(batched=True, num_proc=…)` with the same
  tokenizer, which builds the documents and packs them best-fit into rows of `--max_len`, `save_to_disk`.

All ways must see the same number of tokens. Prints a table of medians and one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

SOURCES = ("english", "chinese", "python")
BASELINE = "datasets.map call"


def flags(args: argparse.Namespace, backend: str, save_dir: Path) -> list[str]:
    """The flags of `preprocess_datasets`; `default` leaves the backend to the command."""
    chosen = [] if backend == "default" else ["--backend", backend]
    return [
        *("--datasets_dir", str(args.work), "--save_dir", str(save_dir), "--tokenizer_path", str(args.tokenizer_path)),
        *("--max_len", str(args.max_len), "--num_proc", str(args.num_proc), *chosen),
    ]


def tokens_of(save_dir: Path) -> int:
    """The tokens of all documents, as the manifests have them."""
    manifests = sorted(save_dir.glob("tokenized/*/manifest.json"))
    accounts = [json.loads(path.read_text(encoding="utf-8"))["accounting"] for path in manifests]
    return sum(entry["tokens_in"] for account in accounts for entry in account.values())


def call_preprocess(args: argparse.Namespace, backend: str, save_dir: Path) -> tuple[float, int]:
    """Calls the stage in this process; gives seconds and tokens."""
    module = import_module("doge_lm.data.preprocess")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parsed = parser.parse_args(flags(args, backend, save_dir))
    begin = time.perf_counter()
    status = module.run(parsed)
    seconds = time.perf_counter() - begin
    if status:
        raise RuntimeError(f"preprocess_datasets ended with status {status}")
    return seconds, tokens_of(save_dir)


def run_command(args: argparse.Namespace, backend: str, save_dir: Path) -> tuple[float, int]:
    """Runs the whole command; gives seconds and tokens."""
    command = [sys.executable, "-m", "doge_lm.cli", "preprocess_datasets", *flags(args, backend, save_dir)]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin, tokens_of(save_dir)


class PackBatch:
    """What the user of `datasets.map` would write: a batch of rows -> documents -> packed rows of ids and lengths."""

    def __init__(self, tokenizer: Any, max_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_len = max_len
        self._open, self._close = tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"])

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokenizes and packs a batch."""
        prompts = batch.get("prompt", [None] * len(batch["text"]))
        encode = {"add_special_tokens": False, "return_attention_mask": False}
        texts = self._tokenizer(batch["text"], **encode)["input_ids"]
        questions = self._tokenizer([prompt or "" for prompt in prompts], **encode)["input_ids"]
        pieces: list[list[int]] = []
        tokens = 0
        for prompt, question, text in zip(prompts, questions, texts, strict=True):
            asked = [self._open, *question, self._close] if prompt and prompt.strip() else []
            ids = [self._tokenizer.bos_token_id, *asked, *text, self._tokenizer.eos_token_id]
            tokens += len(ids)
            step = self._max_len - 1  # a further piece starts with the last token of the one before
            pieces += [ids[at : at + self._max_len] for at in range(0, max(len(ids) - 1, 1), step)]
        rows = best_fit([len(piece) for piece in pieces], self._max_len)
        return {
            "input_ids": [[token for index in row for token in pieces[index]] for row in rows],
            "document_lengths": [[len(pieces[index]) for index in row] for row in rows],
            "tokens": [tokens] + [0] * (len(rows) - 1),
        }


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the indices of the pieces of each row."""
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> rows
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        room = next((room for room in range(length, capacity) if rooms[room]), capacity)
        if room == capacity:
            rows.append([])
            row = len(rows) - 1
        else:
            row = rooms[room].pop()
        rows[row].append(index)
        rooms[room - length].append(row)
    return rows


def call_map(args: argparse.Namespace, save_dir: Path) -> tuple[float, int]:
    """The same work with `datasets.map`; gives seconds and tokens."""
    datasets = import_module("datasets")
    pack = PackBatch(import_module("doge_lm.data.tokenizer").load_tokenizer(args.tokenizer_path), args.max_len)
    features = datasets.Features(
        input_ids=datasets.List(datasets.Value("uint16")),
        document_lengths=datasets.List(datasets.Value("int32")),
        tokens=datasets.Value("int64"),
    )
    files = [str(args.text_dir / f"{source}.jsonl.zst") for source in SOURCES]
    columns = {name: datasets.Value("string") for name in ("text", "prompt", "source", "license")}
    begin = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=files, split="train", features=datasets.Features(columns), cache_dir=str(save_dir / "cache")
    )
    packed = rows.map(
        pack, batched=True, num_proc=args.num_proc, remove_columns=rows.column_names, features=features
    )  # fmt: skip
    packed.save_to_disk(str(save_dir / "packed"), num_proc=args.num_proc)
    return time.perf_counter() - begin, sum(packed["tokens"])


def one(args: argparse.Namespace, way: str, save_dir: Path) -> tuple[float, int]:
    """Measures one way once, in this process."""
    if way == BASELINE:
        return call_map(args, save_dir)
    backend, kind = way.rsplit(" ", 1)
    return (call_preprocess if kind == "call" else run_command)(args, backend, save_dir)


def one_apart(args: argparse.Namespace, way: str) -> tuple[float, int]:
    """Measures one way once, in a process of its own that writes into a fresh folder."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--tokenizer_path", str(args.tokenizer_path), "--work", str(args.work)]
        command += ["--text_dir", str(args.text_dir), "--max_len", str(args.max_len), "--num_proc", str(args.num_proc)]
        subprocess.run([*command, "--one", way, "--result", str(result)], check=True, stdout=sys.stderr)
        seconds, tokens = json.loads(result.read_text(encoding="utf-8"))
    return seconds, tokens


def compare(args: argparse.Namespace) -> int:
    """Takes the sources in, runs all ways in turn, prints."""
    local = [part for name in SOURCES for part in ("--local", f"{name}={args.text_dir / name}.jsonl.zst")]
    take = [sys.executable, "-m", "doge_lm.cli", "download_datasets", "--save_dir", str(args.work), *local]
    subprocess.run(take, check=True, stdout=subprocess.DEVNULL)
    ways = [f"{backend} {kind}" for backend in args.backends for kind in ("call", "command")] + [BASELINE]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens: dict[str, int] = {}
    for repetition in range(args.repetitions):
        for way in ways if repetition % 2 == 0 else reversed(ways):
            took, tokens[way] = one_apart(args, way)
            seconds[way].append(took)
            print(f"{way}: {took:.2f} s, {tokens[way] / took:,.0f} tokens/s", file=sys.stderr)
    if len(set(tokens.values())) != 1:
        raise RuntimeError(f"the ways have not done the same work: {tokens}")
    median = {way: statistics.median(values) for way, values in seconds.items()}
    print("| way | median, s | lowest to highest | tokens/s | times datasets.map |\n|---|---|---|---|---|")
    for way in ways:
        low, high = min(seconds[way]), max(seconds[way])
        print(
            f"| {way} | {median[way]:.2f} | {low:.2f} to {high:.2f} | {tokens[way] / median[way]:,.0f} | "
            f"{median[BASELINE] / median[way]:.1f} |"
        )
    print(json.dumps({"tokens": tokens[BASELINE], "num_proc": args.num_proc, "seconds": seconds, "median": median}))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--text_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--backends", nargs="+", default=["gigatoken", "tokenizers"], help="`default`: the command's own"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max_len", type=int, default=2048)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.text_dir, args.tokenizer_path = args.text_dir.resolve(), args.tokenizer_path.resolve()
    if args.one:
        args.result.write_text(json.dumps(one(args, args.one, args.result.parent)), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        args.work = Path(folder)
        return compare(args)


if __name__ == "__main__":
    sys.exit(main())
