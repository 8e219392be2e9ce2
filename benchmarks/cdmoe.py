"""Time and memory of the experts of one CDMoE layer, forward and backward, by each path and number of experts.

    python benchmarks/cdmoe.py [--experts 256 1024 … 1048576] [--k 16] [--tokens 16384] [--profile]
        [--json FILE] [--png FILE]

Everything runs in this process, in turns, so that ratios compare within one run:

    gather         the K rows of each token, by plain indexing (`cdmoe(path="gather")`): what the others are measured by
    embedding_bag  the same, with `torch.nn.functional.embedding_bag` and weights for its second half
    dense          all experts scored by one matrix product (`path="dense"`)
    sparse         the Triton kernels (`path="sparse"`), on a GPU only

The routes are drawn: `uniform`, or `hot`, where expert n is chosen with a probability of about 1/(n + 1). The routing
itself is timed apart. Times are medians over `--repetitions`; on a GPU, of its own time, with all of a call's kernels
in its queue before the first one starts, as where the host runs ahead or a step is a CUDA graph. `with host` is from an
empty queue: where that is longer, the host takes longer to start the kernels than they run. A path that does not fit in
memory, or that `--most_bytes` says will not, prints why. `floor` is the time of the bytes that the sparse path must
move, at the copy bandwidth measured in the same run. With `--profile`, a GPU's time by kernels.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_times import kernel_times
from torch import Tensor
from torch.nn import functional as F

from doge_lm.model.cdmoe import cdmoe, cdmoe_route, key_table_sizes

PATHS = ("gather", "embedding_bag", "dense", "sparse")
EXPERTS = tuple(4**power for power in range(4, 11))
QUEUE_CYCLES = 20_000_000  # for which a GPU is held back while the host fills its queue: some 10 ms
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def bag_layer(c_Me: Tensor, weights_MHk: Tensor, experts_MHk: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The layer with PyTorch's weighted bag, which takes the place of reading (M, K, d) rows of U."""
    weights_MK, experts_MK = weights_MHk.flatten(1), experts_MHk.flatten(1)
    inner_MK = torch.einsum("me,mke->mk", c_Me, F.embedding(experts_MK, down))
    hidden_MK = F.silu(weights_MK * inner_MK)
    # Its backward pass for the weights exists on CUDA in no shorter type than float32.
    return F.embedding_bag(experts_MK, up.float(), per_sample_weights=hidden_MK.float(), mode="sum").to(up.dtype)


def layer_of(path: str) -> Layer:
    """The layer by a path."""
    if path == "embedding_bag":
        return bag_layer
    return lambda c, weights, experts, down, up: cdmoe(c, weights, experts, down, up, F.silu, path=path)


class Clock:
    """Times calls: by events on a GPU, by the wall elsewhere."""

    def __init__(self, device: torch.device, warm_up: int, repetitions: int) -> None:
        self._device = device
        self._warm_up = warm_up
        self._repetitions = repetitions

    def __call__(self, call: Callable[[], Any], *, queued: bool = True) -> tuple[float, int]:
        """Median milliseconds of a call, and the highest memory that it took beyond what was there, in bytes.

        On a GPU, with `queued`, from its first kernel to its last, all of them waiting in the queue.
        """
        for _ in range(self._warm_up):
            call()
        if self._device.type != "cuda":
            return statistics.median(self._wall(call) for _ in range(self._repetitions)), 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = [self._events(call, queued) for _ in range(self._repetitions)]
        return statistics.median(times), torch.cuda.max_memory_allocated() - before

    @staticmethod
    def _wall(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begin)

    @staticmethod
    def _events(call: Callable[[], Any], queued: bool) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            torch.cuda._sleep(QUEUE_CYCLES)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


def draw_experts(args: argparse.Namespace, num_experts: int, routes: str, device: torch.device) -> Tensor:
    """Choices (M, H, k): any expert, or the first much more often than the last."""
    shape = (args.tokens, args.heads, args.k)
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    if routes == "hot":  # the inverse of the distribution function log(1 + n) / log(1 + N)
        drawn = torch.expm1(drawn * math.log1p(num_experts)) / num_experts
    return (drawn * num_experts).long().clamp(max=num_experts - 1)


def measure_paths(
    args: argparse.Namespace, num_experts: int, routes: str, clock: Clock, bandwidth: float
) -> list[dict[str, Any]]:
    """One record a path: forward, and forward with backward."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    c, direction = normal(args.tokens, args.size), normal(args.tokens, args.size)
    weights = torch.rand(args.tokens, args.heads, args.k, generator=generator, device=device).softmax(-1)
    experts = draw_experts(args, num_experts, routes, device)
    down, up = normal(num_experts, args.size) / math.sqrt(args.size), normal(num_experts, args.size)
    leaves = [c, weights, down, up]
    for leaf in leaves:
        leaf.requires_grad_()
    rows = args.tokens * args.heads * args.k
    # Both tables' rows are read in each pass, and both gradients written once.
    moved = (4 * rows + 2 * num_experts) * args.size * c.element_size()
    found = []
    for path in args.paths:
        record: dict[str, Any] = {"experts": num_experts, "routes": routes, "path": path}
        layer = layer_of(path)

        def forward(layer: Layer = layer) -> Tensor:
            return layer(c, weights, experts, down, up)

        def both(forward: Callable[[], Tensor] = forward) -> None:
            torch.autograd.grad(forward(), leaves, direction)

        try:
            if path == "dense" and args.tokens * num_experts * c.element_size() > args.most_bytes:
                raise ValueError("left out: it would hold a score for each token and expert")
            with torch.no_grad():
                record["forward_ms"], _ = clock(forward)
            record["both_ms"], record["peak_bytes"] = clock(both)
            record["host_ms"], _ = clock(both, queued=False)
            record["floor_ms"] = 1000 * moved / bandwidth
            if args.profile:
                record["kernels"] = kernel_times(both)
        except (ValueError, RuntimeError) as error:
            record["error"] = str(error).splitlines()[0][:120]
        found.append(record)
        print(json.dumps(record), file=sys.stderr, flush=True)
    return found


def measure_route(args: argparse.Namespace, num_experts: int, clock: Clock) -> dict[str, Any]:
    """The routing, forward and backward."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    n1, n2 = key_table_sizes(num_experts)
    queries = torch.randn(args.tokens, args.heads, args.size, device=device).to(dtype).requires_grad_()
    keys = torch.randn(args.heads, n1 + n2, args.size // 2, device=device).to(dtype).requires_grad_()

    def both() -> None:
        weights, _ = cdmoe_route(queries, keys, n1, min(args.k, num_experts))
        torch.autograd.grad(weights.square().sum(), [queries, keys])

    milliseconds, peak = clock(both)
    return {"experts": num_experts, "path": "route", "both_ms": milliseconds, "peak_bytes": peak}


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds, _ = clock(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds * 1000


def show(records: list[dict[str, Any]]) -> None:
    """Prints the table."""
    gathers = {(r["experts"], r.get("routes")): r.get("both_ms") for r in records if r["path"] == "gather"}
    heads = ("experts", "routes", "path", "forward, ms", "both, ms", "times gather", "with host", "floor, ms", "MiB")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for record in records:
        start = f"| {record['experts']:,} | {record.get('routes', '')} | {record['path']} |"
        if "error" in record:
            print(f"{start} {record['error']} | | | | | |")
            continue
        forward = f"{record['forward_ms']:.3f}" if "forward_ms" in record else ""
        gather = gathers.get((record["experts"], record.get("routes")))
        times = f"{gather / record['both_ms']:.2f}" if gather and record["path"] != "route" else ""
        host, floor = (f"{record[name]:.3f}" if name in record else "" for name in ("host_ms", "floor_ms"))
        memory = f"{record['peak_bytes'] / 2**20:,.0f}"
        print(f"{start} {forward} | {record['both_ms']:.3f} | {times} | {host} | {floor} | {memory} |")


def show_kernels(records: list[dict[str, Any]]) -> None:
    """Prints the kernels of each record that was profiled, forward and backward."""
    for record in records:
        if "kernels" in record:
            print(f"\n{record['experts']:,} experts, {record['routes']}, {record['path']}:\n")
            print("| kernel | ms | launches |\n|---|---|---|")
            for name, (milliseconds, launches) in record["kernels"].items():
                print(f"| {name[:90]} | {milliseconds:.3f} | {launches:.0f} |")


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Draws time against the number of experts, a line for each path and kind of route."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(8, 5))
    for name in sorted({(record["path"], record.get("routes", "")) for record in records}):
        own = [r for r in records if (r["path"], r.get("routes", "")) == name and "both_ms" in r]
        if own:
            axes.plot(
                [r["experts"] for r in own], [r["both_ms"] for r in own], marker="o", label=" ".join(name).strip()
            )
    axes.set(xscale="log", yscale="log", xlabel="experts", ylabel="forward and backward, ms")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--size", type=int, default=1024, help="d and e")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--k", type=int, default=16, help="experts of a head")
    parser.add_argument("--routes", nargs="+", choices=("uniform", "hot"), default=("uniform", "hot"))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--most_bytes", type=int, default=8 * 2**30, help="of a score for each token and expert")
    parser.add_argument("--warm_up", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="time each kernel, on a GPU")
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument("--png", type=Path, help="draw them there")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.profile and device.type != "cuda":
        parser.error("--profile times the kernels of an NVIDIA GPU")
    if args.size % 2:
        parser.error(f"--size {args.size}: it must be even, for a query is cut in halves")
    clock = Clock(device, args.warm_up, args.repetitions)
    bandwidth = copy_bandwidth(device, clock)
    records: list[dict[str, Any]] = []
    for num_experts in args.experts:
        records.append(measure_route(args, num_experts, clock))
        for routes in args.routes:
            records += measure_paths(args, num_experts, routes, clock, bandwidth)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s; {args.tokens:,} tokens, d = e = "
          f"{args.size}, H = {args.heads}, k = {args.k}, {args.dtype}\n")  # fmt: skip
    show(records)
    show_kernels(records)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
        heading = {"device": name, "torch": torch.__version__, "bandwidth": bandwidth, "settings": settings}
        args.json.write_text(json.dumps({**heading, "records": records}, indent=1) + "\n", encoding="utf-8")
    if args.png:
        plot(records, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
