"""`doge-lm serve` under load: many streaming clients at once, against the same requests one at a time.

    python benchmarks/serve.py [MODEL | --preset doge_tiny] [--clients 64] [--seconds 300] [--fuzz 10000] [--json FILE]

Starts the server in a process of its own, on a CPU, and

1. sends `--requests` different requests (three in four greedy, the others drawn with a seed) one at a time, as streams:
   their answers are what each must be later, and their speed is the base;
2. writes the greedy ones with `Decoder` too, one at a time, in this process;
3. lets `--clients` clients send them, in turns and without a pause, for `--seconds`, and compares every answer;
4. sends `--fuzz` malformed requests, drawn from the server's own description, to a server that answers real ones too.

The memory is that of the server's process (RSS), first when step 1 is over, then all through step 3. The clients run in
this process and take a share of the same cores. A preset's weights are random, its tokenizer is the published one.
"""

import argparse
import asyncio
import collections
import http.client
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from records import circumstances, write_whole

from doge_lm import DogeForCausalLM
from doge_lm.data.tokenizer import StreamDecoder, build_tokenizer, encode_text, load_tokenizer
from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.inference.loading import load_model
from doge_lm.training.settings import load_settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.inference.fuzzing import Description
from tests.inference.test_fuzz import send

Record = dict[str, Any]

WORDS = ["the", "dog", "ran", "over", "a hill", "and saw", "what", "no one", "had seen", "天气", "很好", "return x + 1"]


@dataclass
class Tally:
    """What came back."""

    answers: int = 0
    tokens: int = 0
    different: int = 0
    errors: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        place = args.model or random_model(args.preset, Path(folder) / args.preset)
        requests = make_requests(args.requests, args.max_tokens)
        process = start(place, args.flags)
        try:
            port = port_of(process)
            record = asyncio.run(measure(args, place, requests, port, psutil.Process(process.pid)))
            if args.fuzz:
                record["fuzz"] = fuzz(port, place.resolve().name, args.fuzz)
                print(f"malformed: {record['fuzz']}", flush=True)
            process.terminate()
            record["exit_status"] = process.wait(60)
        finally:
            process.kill()
            process.wait()
    print(f"exit status after SIGTERM: {record['exit_status']}")
    if args.json:
        write_whole(args.json, {**circumstances(), **record})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="directory of a model; default: --preset, at random")
    parser.add_argument("--preset", default="doge_tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--requests", type=int, default=128, help="different requests")
    parser.add_argument("--max_tokens", type=int, default=96, help="of the longest answer")
    parser.add_argument("--fuzz", type=int, default=0, help="malformed requests at the end")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="flags of the server, last of all")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def random_model(preset: str, place: Path) -> Path:
    torch.manual_seed(0)
    DogeForCausalLM(load_settings(preset).model_config()).save_pretrained(place)
    build_tokenizer(place.with_name("tokenizer")).save_pretrained(place)
    return place


def make_requests(count: int, longest: int) -> list[Record]:
    draw = random.Random(0)
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 60))),
            "max_tokens": draw.randint(longest // 6, longest),
            "temperature": 0.8 if number % 4 == 3 else 0,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(count)
    ]


def start(place: Path, flags: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "doge_lm.cli", "serve", str(place), "--port", "0", "--device", "cpu", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"API +http://\S+:(\d+)/v1", line)
        if found:
            return int(found.group(1))
    raise SystemExit(f"the server ended with status {process.wait()}")


async def measure(
    args: argparse.Namespace, place: Path, requests: list[Record], port: int, server: psutil.Process
) -> Record:
    tally, begin = Tally(), time.monotonic()
    expected = [await stream(port, place.name, request, tally) for request in requests]
    alone_seconds = time.monotonic() - begin
    alone = tally.tokens / alone_seconds
    print(f"one at a time: {tally.tokens} tokens in {alone_seconds:.1f} s, {alone:.1f} tokens/s", flush=True)
    assert not tally.errors, tally.errors
    greedy = [(request, text) for request, text in zip(requests, expected, strict=True) if not request["temperature"]]
    same = sum(text == written for (_, text), written in zip(greedy, by_decoder(place, greedy), strict=True))
    print(f"of {len(greedy)} greedy answers, {same} are those of Decoder, one at a time", flush=True)

    tally, begin, before = Tally(), time.monotonic(), mebibytes(server)
    end = begin + args.seconds
    order = itertools.cycle(range(len(requests)))
    watch = asyncio.create_task(watch_memory(server, tally, begin, args.seconds / 60))
    await asyncio.gather(
        *(client(port, place.name, requests, expected, order, tally, end) for _ in range(args.clients))
    )
    watch.cancel()
    seconds = time.monotonic() - begin
    late = [memory for at, memory in tally.memory if at > args.seconds / 2]
    record = {
        "clients": args.clients,
        "seconds": seconds,
        "alone_tokens_per_second": alone,
        "tokens_per_second": tally.tokens / seconds,
        "ratio": tally.tokens / seconds / alone,
        "answers": tally.answers,
        "tokens": tally.tokens,
        "different": tally.different,
        "errors": tally.errors[:20],
        "greedy_like_decoder": [same, len(greedy)],
        "first_seconds_median": statistics.median(tally.first_seconds),
        "first_seconds_most": max(tally.first_seconds),
        "memory_before": before,
        "memory": tally.memory,
        "memory_after": mebibytes(server),
    }
    print(
        f"{args.clients} clients: {tally.answers} answers, {tally.tokens} tokens in {seconds:.1f} s, "
        f"{record['tokens_per_second']:.1f} tokens/s, {record['ratio']:.2f} times as many; {tally.different} differ, "
        f"{len(tally.errors)} errors; first token after {record['first_seconds_median']:.2f} s (median), "
        f"{record['first_seconds_most']:.2f} s at most; memory {before:.0f} MiB before, "
        f"{min(late):.0f} to {max(late):.0f} in the second half, {record['memory_after']:.0f} after",
        flush=True,
    )
    return record


def by_decoder(place: Path, greedy: list[tuple[Record, str]]) -> list[str]:
    torch.set_num_threads(1)  # the server is there as well
    tokenizer = load_tokenizer(place)
    decoder = Decoder(load_model(place, torch.device("cpu"), "float32"))
    texts = []
    for request, _ in greedy:
        ids = [tokenizer.bos_token_id, *encode_text(tokenizer, request["prompt"])]
        (row,) = decoder.generate([ids], Sampling(request["max_tokens"]), eos_token_id=tokenizer.eos_token_id)
        spelling = StreamDecoder(tokenizer, continues=True)
        texts.append("".join(map(spelling.put, row)) + spelling.end())
    return texts


async def client(
    port: int,
    model: str,
    requests: list[Record],
    expected: list[str],
    order: "itertools.cycle[int]",
    tally: Tally,
    end: float,
) -> None:
    while time.monotonic() < end:
        number = next(order)
        try:
            text = await stream(port, model, requests[number], tally)
        except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")
            continue
        tally.different += text != expected[number]


async def stream(port: int, model: str, request: Record, tally: Tally) -> str:
    """The text of one answer. Raises ValueError for a reply that is not a whole stream."""
    body = json.dumps({"model": model, **request}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    begin = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer_head = await reader.readuntil(b"\r\n\r\n")
        if not answer_head.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"{answer_head!r} {await reader.read()!r}")
        parts = [await reader.read(65536)]
        tally.first_seconds.append(time.monotonic() - begin)
        while parts[-1]:
            parts.append(await reader.read(65536))
    finally:
        writer.close()
    lines = [line for line in b"".join(parts).decode().split("\n") if line.startswith("data: ")]
    if not lines or lines.pop() != "data: [DONE]":
        raise ValueError(f"the stream broke off: {lines[-1:]}")
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    tally.answers += 1
    tally.tokens += events[-1]["usage"]["completion_tokens"]
    return "".join(choice["text"] for event in events for choice in event["choices"])


async def watch_memory(server: psutil.Process, tally: Tally, begin: float, pause: float) -> None:
    while True:
        tally.memory.append((round(time.monotonic() - begin, 1), mebibytes(server)))
        await asyncio.sleep(pause)


def mebibytes(server: psutil.Process) -> float:
    return server.memory_info().rss / 2**20


def fuzz(port: int, model: str, count: int) -> Record:
    """Statuses of malformed requests, which must be 4xx, and the longest wait for one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/openapi.json")
    description = Description(json.loads(connection.getresponse().read()), model)
    statuses: collections.Counter[int] = collections.Counter()
    slowest = 0.0
    for request in itertools.islice(description.malformed(seed=0), count):
        begin = time.monotonic()
        status, _ = send(connection, request)
        slowest = max(slowest, time.monotonic() - begin)
        statuses[status] += 1
        if not 400 <= status < 500:
            print(f"status {status}: {request}", file=sys.stderr)
    connection.request("GET", "/health")
    health = connection.getresponse()
    health.read()
    return {"statuses": dict(statuses), "slowest_seconds": round(slowest, 3), "health_after": health.status}


if __name__ == "__main__":
    main()
