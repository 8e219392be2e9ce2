"""What `doge-lm export` makes of a model: size, bits per byte, and speed of decoding, all in one run on a CPU.

    python benchmarks/export.py MODEL --dataset_path DIR [--limit 40] [--new_tokens 64] [--repetitions 5]
        [--rows float32 bfloat16 …] [--json FILE]
    python benchmarks/export.py MODEL --texts en=FILE [zh=FILE …] …

Each row is an export in a temporary directory, loaded again as a user would:

    float32, bfloat16             the model itself
    int8, int4                    `--quantize`, the rest in float32
    int8-bfloat16, int4-bfloat16  the same, the rest in bfloat16
    onnx                          `--format onnx`, in onnxruntime

`MB` is the size of the weights' files. Bits per byte are those of text that the model was not trained on: the first
`--limit` rows of each source in the test split of a prepared set (`SAVE_DIR/pretrain`), whose targets are scored as
they stand there. Each piece of a row is read by itself, in windows of `--window` tokens, whatever lies before it in the
row; so the figures are not quite those of the training's evaluation, which reads rows whole. With `--texts` they are
those of `doge-lm eval --texts`, over the first `--limit` texts, and it is yours to know that these were held out. `±`
is the standard error of the difference to float32, row by row or text by text. Decoding is greedy, one prompt of
`--prompt_tokens` random ids, by `Decoder` or onnxruntime: the tokens behind the first over the time that they take,
the median over `--repetitions`; rows take turns, so that a busy machine slows all of them alike.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from records import circumstances, write_whole
from transformers.utils import logging

from doge_lm.data.dataset import load_prepared
from doge_lm.data.tokenizer import load_tokenizer, tokenizer_sha256
from doge_lm.errors import UserError
from doge_lm.evaluation.bits_per_byte import Scores
from doge_lm.evaluation.comparison import compare_texts
from doge_lm.evaluation.scorer import PlainScorer, make_scorer
from doge_lm.evaluation.texts import TextScores, parse_group, ratio_stderr, score_texts, windows
from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.inference.export import export
from doge_lm.inference.loading import load_model
from doge_lm.inference.onnx_model import OnnxRunner

ROWS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int8-bfloat16": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "float32", "quantize": "int4"},
    "int4-bfloat16": {"dtype": "bfloat16", "quantize": "int4"},
    "onnx": {"file_format": "onnx"},
}
CPU = torch.device("cpu")
Generate = Callable[[int], list[int]]


class OnnxScorer:
    """Scores windows of text by an exported graph: what `score_texts` asks of a scorer."""

    def __init__(self, place: Path, window: int, threads: int) -> None:
        self._runner = OnnxRunner(place, threads)
        self.tokenizer, self.max_length = load_tokenizer(place), window

    def score_windows(self, windows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The log-likelihood of each second part behind its first, in nats."""
        found = []
        for context, targets in windows:
            ids = np.array([[*context, *targets][:-1]])
            self._runner.reset()
            logits = torch.from_numpy(self._runner.logits(ids, np.ones_like(ids)))[0, -len(targets) :]
            found.append(float(logits.log_softmax(dim=-1)[range(len(targets)), targets].double().sum()))
        return found


def held_out_rows(place: Path, limit: int) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each source in the test split of a prepared set.

    Raises:
        UserError: if it is no prepared set, or its test split is empty.
    """
    test = load_prepared(place).test
    groups: dict[str, list[dict[str, Any]]] = {}
    for index, source in enumerate(test["source"]):
        rows = groups.setdefault(str(source), [])
        if len(rows) < limit:
            rows.append(test[index])
    if not groups:
        raise UserError(f"--dataset_path {place}: the test split is empty; merge the datasets with another --test_size")
    return dict(sorted(groups.items()))


def target_windows(row: dict[str, Any], length: int) -> list[tuple[list[int], list[int]]]:
    """(context, targets) that cover every target of a row once; its pieces apart, each in windows of `length`."""
    found = []
    ids, is_target = row["input_ids"].tolist(), np.ones(len(row["input_ids"]), np.bool_)
    for start, end in row["context_spans"].reshape(-1, 2):
        is_target[start:end] = False
    ends = np.cumsum(row["document_lengths"]).tolist()
    for begin, end in zip([0, *ends], ends, strict=False):
        done = begin + 1
        for context, targets in windows(ids[begin:end], length):
            before = list(context)
            places = range(done, done + len(targets))
            for trained, run in groupby(places, lambda place: bool(is_target[place])):
                part = [ids[place] for place in run]
                if trained:
                    found.append((before, part))
                before = before + part
            done += len(targets)
    return found


def score_rows(scorer: Any, groups: dict[str, list[dict[str, Any]]], window: int) -> dict[str, TextScores]:
    """Bits per byte of the targets of each group's rows; what `score_texts` gives for texts."""
    length = min(scorer.max_length, window)
    results = {}
    for name, rows in groups.items():
        of_rows = [target_windows(row, length) for row in rows]
        found = iter(scorer.score_windows([part for parts in of_rows for part in parts]))
        scores = [
            Scores(
                -math.fsum(next(found) for _ in parts),
                sum(len(targets) for _, targets in parts),
                int(row["text_bytes"]),
            )
            for row, parts in zip(rows, of_rows, strict=True)
        ]
        nats, sizes = [each.nll for each in scores], [each.bytes for each in scores]
        total = Scores(math.fsum(nats), sum(each.tokens for each in scores), sum(sizes))
        results[name] = TextScores(total, len(rows), ratio_stderr(scores), nats, sizes, "rows of one set")
    return results


def check_tokenizer(place: Path, model: Path) -> None:
    """Raises UserError if a prepared set was made with another tokenizer than the model's."""
    if load_prepared(place).manifest.tokenizer.sha256 != tokenizer_sha256(model):
        raise UserError(
            f"--dataset_path {place} was made with another tokenizer than that of {model}; give its own set"
        )


def onnx_generate(runner: OnnxRunner, prompt: list[int]) -> Generate:
    """Greedy decoding by an exported graph."""

    def run(new_tokens: int) -> list[int]:
        runner.reset()
        new, seen, row = prompt, len(prompt), []
        for _ in range(new_tokens):
            logits = runner.logits(np.array([new]), np.ones((1, seen), np.int64))
            new, seen = [int(logits[0, -1].argmax())], seen + 1
            row += new
        return row

    return run


def decoder_generate(decoder: Decoder, prompt: list[int]) -> Generate:
    """Greedy decoding by `Decoder`."""
    return lambda new_tokens: decoder.generate([prompt], Sampling(max_new_tokens=new_tokens))[0]


def weights_bytes(place: Path) -> int:
    """The size of the files that hold weights."""
    return sum(path.stat().st_size for path in place.iterdir() if path.suffix in (".safetensors", ".onnx", ".data"))


def measure_speed(ways: dict[str, Generate], args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of each, measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run(args.new_tokens + 1)
    for _ in range(args.repetitions):
        for name, run in ways.items():
            times = []
            for new in (1, args.new_tokens + 1):
                begin = time.perf_counter()
                run(new)
                times.append(time.perf_counter() - begin)
            seconds[name].append(max(times[1] - times[0], 1e-9))
    return {name: args.new_tokens / statistics.median(taken) for name, taken in seconds.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    read = parser.add_mutually_exclusive_group(required=True)
    read.add_argument("--dataset_path", type=Path, help="a prepared set, whose test split is read")
    read.add_argument("--texts", nargs="+", metavar="NAME=PATH", help="texts that the model was not trained on")
    parser.add_argument("--limit", type=int, default=40, help="rows of a source, or texts of a group")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def scoring(args: argparse.Namespace) -> Callable[[Any], dict[str, TextScores]]:
    """What gives the bits per byte of a scorer, by group."""
    if args.texts is not None:
        groups = {name: [path] for name, path in map(parse_group, args.texts)}
        return lambda scorer: score_texts(cast(PlainScorer, scorer), groups, args.window, args.limit)
    check_tokenizer(args.dataset_path, args.model)
    rows = held_out_rows(args.dataset_path, args.limit)
    return lambda scorer: score_rows(scorer, rows, args.window)


def main() -> None:
    args = parse_arguments()
    logging.disable_progress_bar()
    score = scoring(args)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 1000, (args.prompt_tokens,), generator=generator).tolist()
    threads = torch.get_num_threads()
    records: dict[str, dict[str, Any]] = {}
    ways: dict[str, Generate] = {}
    scores: dict[str, dict[str, TextScores]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            place = Path(folder) / name
            change = export(args.model, place, **ROWS[name])
            if name == "onnx":
                scorer: Any = OnnxScorer(place, args.window, threads)
                ways[name] = onnx_generate(OnnxRunner(place, threads), prompt)
            else:
                model = load_model(place, CPU)
                scorer = make_scorer(model, load_tokenizer(place), batch_tokens=2048)
                ways[name] = decoder_generate(Decoder(model), prompt)
            scores[name] = score(scorer)
            bits = {group: found.scores.bits_per_byte for group, found in scores[name].items()}
            records[name] = {
                "bytes": weights_bytes(place),
                "bits_per_byte": bits,
                "relative_error": change.relative_error,
            }
            print(f"{name}: {records[name]}", flush=True)
        for name, speed in measure_speed(ways, args).items():
            records[name]["tokens_per_second"] = speed
    print_table(records, scores, list(next(iter(scores.values()))))
    if args.json is not None:
        write_whole(args.json, {**circumstances(), "threads": threads, "cpus": os.cpu_count(), "records": records})


def print_table(
    records: dict[str, dict[str, Any]], scores: dict[str, dict[str, TextScores]], groups: Sequence[str]
) -> None:
    """As a table of Markdown; differences in bits per byte are to the first row."""
    heads = ["row", "MB", *(f"{group}: bits per byte, difference" for group in groups), "tokens/s"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    first = next(iter(records))
    for name, record in records.items():
        cells = [name, f"{record['bytes'] / 1e6:.1f}"]
        for group in groups:
            value = f"{record['bits_per_byte'][group]:.4f}"
            if name != first:
                [found], _ = compare_texts({group: scores[first][group]}, {group: scores[name][group]})
                record.setdefault("difference", {})[group] = [found.difference, found.stderr]
                value += f", {found.difference:+.4f} ± {found.stderr:.4f}"
            cells.append(value)
        print("| " + " | ".join([*cells, f"{record['tokens_per_second']:.1f}"]) + " |")


if __name__ == "__main__":
    main()
