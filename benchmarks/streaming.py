"""Rows made while training would read them: their rate, and the anonymous memory that it takes, over some time (Linux).

    python benchmarks/streaming.py --stream TEXT --tokenizer_path TOKENIZER [--workers 2] [--seconds 180]

Reads rows of `--stream` (a file, a folder or a data set of the hub) as a run does, epoch after epoch, and keeps none.
Prints one line of JSON: rows and tokens a second, CPU seconds of this process (which unpacks large compressed files and
takes the rows) and of the workers for each million of tokens, the peak of anonymous memory of each process, and what
they hold at some moments: equal numbers there are what a stream without a leak shows.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from memory import MemoryWatch, anonymous_bytes, children

from doge_lm.data.encoders import BACKENDS, choose_backend
from doge_lm.data.streaming import HeldOut, RowStream, StreamSettings, open_source, sample_texts

_MOMENTS = 6


def main() -> None:
    """Reads, measures, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", required=True, help="as the setting of that name")
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenize and pack (default: 2)")
    parser.add_argument("--seconds", type=float, default=180, help="how long to read (default: 180)")
    parser.add_argument("--sequence_length", type=int, default=2048, help="tokens of a row (default: 2048)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what tokenizes (default: auto)")
    args = parser.parse_args()
    source = open_source(args.stream)
    backend, note = choose_backend(args.tokenizer_path, args.backend, sample_texts(source, 233))
    settings = StreamSettings(args.tokenizer_path, args.sequence_length, backend=backend)
    stream = RowStream(source, settings, HeldOut([], frozenset()), length=10**12, workers=args.workers)
    with MemoryWatch(os.getpid()) as watch:
        try:
            figures = read(stream, args.seconds)
        finally:
            stream.close()
    peaks = [(process.role, round(process.peak_bytes / 2**20)) for process in watch.processes]
    waited = os.times()
    million = figures["tokens"] / 10**6
    figures |= {
        "backend": backend,
        "note": note,
        "cpu_seconds_per_million_tokens": round((waited.user + waited.system) / million, 4),
        "cpu_seconds_per_million_tokens_workers": round((waited.children_user + waited.children_system) / million, 4),
        "peak_of_sum_mib": round(watch.peak_of_sum / 2**20),
        "peaks_mib": peaks,
    }
    print(json.dumps(figures))


def read(stream: RowStream, seconds: float) -> dict[str, Any]:
    """Reads rows for some time from the first one on, and looks at the memory meanwhile."""
    tokens = len(stream[0]["input_ids"])
    begin = time.perf_counter()
    number = 1
    moments: list[list[int]] = []
    while (passed := time.perf_counter() - begin) < seconds:
        tokens += len(stream[number]["input_ids"])
        number += 1
        if number % 64 == 0:
            stream.state(number)  # as checkpoints and the log do: what lies before may be forgotten
        if passed > seconds * (len(moments) + 1) / (_MOMENTS + 1):
            pids = [os.getpid(), *sorted(children(os.getpid()))]
            moments.append([round((anonymous_bytes(pid) or 0) / 2**20) for pid in pids])
    return {
        "seconds": round(passed, 1),
        "tokens": tokens,
        "epochs": stream.state(number).epoch,
        "rows_per_second": round(number / passed, 1),
        "tokens_per_second": round(tokens / passed),
        "held_mib_at_moments": moments,
    }


if __name__ == "__main__":
    main()
