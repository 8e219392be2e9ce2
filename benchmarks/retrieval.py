"""Time of finding experts, and of a layer of them, against the number of experts: product keys beside ordinary routers.

    python benchmarks/retrieval.py [--experts 256 1024 4096 16384 65536] [--heads 1] [--k 8] [--json FILE]

*Wonderful Matrices* (arXiv 2407.16958) has expert retrieval with more than 1,024 experts 8 to 10 times faster than in
a mixture of experts of equal size. Here three groups of ways, each way a row for each N:

    retrieval  from x to the weights and numbers of K = H·k experts for each token
        product keys     queries W_q x, whose halves meet two tables of about √N keys (`cdmoe_route`)
        folded           the same scores without queries, (key W_q) x, as the model does it where that is less work
        no queries       the keys meet x itself (`router_queries: false`)
        ordinary         N scores by one matrix; `topk`, softmax
    layer      N experts of one hidden unit each, computed by `cdmoe(path="auto")`
        product keys, no queries, ordinary  are the retrieval
        model            `DogeCDMoE.experts`, as a model runs it: folded, and up to some N one kernel for both
    mixture    an ordinary mixture: E experts d → w → d with SiLU, `--moe_k` of them for a token, found as by "ordinary"
        E=8 loop         for each expert that a token chose: its rows, two products, `index_add`
        E=8 grouped      all experts at once by `torch._grouped_mm`, in bfloat16 on a GPU
        E=N loop         every tiny expert an MLP of its own, up to `--loop_experts`

An expert of width w is w rows of the very tables D and U of the tiny experts, so that all have equal parameters.

Everything runs in this process, all ways of an N one after the other in each of `--rounds`; a time is the median of the
rounds' medians, taken as in `cdmoe.py`: on a GPU of its own time, "with host" from an empty queue. The loop asks the
GPU for its rows, so its time always has the host in it. Ratios are those of the times to "product keys" of the same
group, for `mixture` to the layer's. What does not fit prints why.

Before, in float64, product keys are held to `topk` over N scores by a matrix made of them, W[i·n2 + j] = W1[i] + W2[j];
and, where they are measured and in that type, the sums that they choose to the highest of all N. If either fails, so
does the program.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cdmoe import Clock
from flags import positive
from records import circumstances, markdown, write_whole
from torch import Tensor
from torch.nn import functional as F

from doge_lm.model.cdmoe import cdmoe, cdmoe_route, folded_keys, key_table_sizes, product_topk
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.model.modeling_doge import DogeCDMoE

EXPERTS = (256, 1024, 4096, 16384, 65536)
BASE = "product keys"
CHECKED_SIZE = 64  # the most of d where product keys are compared in float64
GROUPED_ALIGNMENT = 8  # rows of `_grouped_mm` begin at whole 16 bytes: 8 numbers in bfloat16
Choice = tuple[Tensor, Tensor]


# Ways to choose: weights (M, H, k) and experts (M, H, k)


def route_by_queries(x_Md: Tensor, n1: int, k: int, query_weight: Tensor, keys: Tensor) -> Choice:
    """Product keys as published; keys (H, n1 + n2, d/2)."""
    return cdmoe_route(F.linear(x_Md, query_weight).unflatten(-1, (keys.shape[0], -1)), keys, n1, k)


def route_without_queries(x_Md: Tensor, n1: int, k: int, keys: Tensor) -> Choice:
    """Product keys that meet x itself; keys (H, n1 + n2, d)."""
    scores_MHn = F.linear(x_Md, keys.flatten(0, 1)).unflatten(-1, keys.shape[:2])
    return product_topk(scores_MHn[..., :n1], scores_MHn[..., n1:], k)


def route_by_folded(x_Md: Tensor, n1: int, k: int, query_weight: Tensor, keys: Tensor) -> Choice:
    """As `route_by_queries`, by fewer operations."""
    return route_without_queries(x_Md, n1, k, folded_keys(query_weight, keys, n1))


def route_ordinarily(x_Md: Tensor, k: int, weight: Tensor) -> Choice:
    """A score for each of N experts, weight (N, d); the k best, as one head."""
    best_Mk, experts_Mk = F.linear(x_Md, weight).topk(k)
    weights_Mk = best_Mk.softmax(-1, dtype=torch.promote_types(best_Mk.dtype, torch.float32))
    return weights_Mk.unsqueeze(1), experts_Mk.unsqueeze(1)


# An ordinary mixture: `up` and `down` (E, w, d), weights and experts (M, K); Σ weight · σ(x upᵀ) down


def loop_mixture(x_Md: Tensor, weights_MK: Tensor, experts_MK: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One expert after the other, those that a token chose.

    The tables are cut once, by `unbind`: its backward pass writes each gradient once, where that of `up[e]` would
    write zeros of the whole table for every expert.
    """
    ups, downs = up.unbind(), down.unbind()
    y_Md = torch.zeros_like(x_Md)
    for e in experts_MK.unique().tolist():
        place = torch.nonzero(experts_MK.flatten() == e).squeeze(1)
        token = place // experts_MK.shape[1]
        hidden = F.silu(F.linear(x_Md.index_select(0, token), ups[e]))
        weight = weights_MK.flatten().index_select(0, place).unsqueeze(-1)
        y_Md.index_add_(0, token, (hidden @ downs[e]) * weight)
    return y_Md


def grouped_mixture(x_Md: Tensor, weights_MK: Tensor, experts_MK: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """All experts at once: rows in order of their experts, and two grouped products; nothing waits for the host."""
    experts, order = experts_MK.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(len(up), device=experts.device), right=True, out_int32=True)
    token = order // experts_MK.shape[1]
    hidden = F.silu(torch._grouped_mm(x_Md.index_select(0, token), up.transpose(1, 2), ends))
    rows = torch._grouped_mm(hidden, down, ends) * weights_MK.flatten().index_select(0, order).unsqueeze(-1)
    return torch.zeros_like(x_Md).index_add(0, token, rows)


MIXTURES: dict[str, Callable[..., Tensor]] = {"loop": loop_mixture, "grouped": grouped_mixture}


# What is measured


@dataclass
class Way:
    """A row: what it calls on its leaves, which get gradients, or why it does not run."""

    group: str
    name: str
    call: Callable[..., Tensor] = field(default=lambda *_: torch.empty(0))
    leaves: tuple[Tensor, ...] = ()
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Drawn:
    """The tensors of one N: normal, matrices by 1/√(their columns), so that scores are N(0, 1)."""

    def __init__(self, args: argparse.Namespace, num_experts: int) -> None:
        self._generator = torch.Generator(args.device).manual_seed(0)
        self._type = getattr(torch, args.dtype)
        self.n1, n2 = key_table_sizes(num_experts)
        d, rows = args.size, self.n1 + n2
        self.x = self.normal(args.tokens, d)
        self.direction = self.normal(args.tokens, d).detach()
        self.choice_direction = self.normal(args.tokens, args.heads * args.k).detach().float()
        self.queries = self.matrix(args.heads * d, d)
        self.keys = self.matrix(args.heads, rows, d // 2)
        self.direct_keys = self.matrix(args.heads, rows, d)
        self.down, self.up = self.matrix(num_experts, d), self.normal(num_experts, d)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A leaf."""
        drawn = torch.randn(*shape, generator=self._generator, device=self._generator.device)
        return (drawn * scale).to(self._type).requires_grad_()

    def matrix(self, *shape: int) -> Tensor:
        """A leaf, of rows about 1 long."""
        return self.normal(*shape, scale=shape[-1] ** -0.5)


def ways_of(args: argparse.Namespace, num_experts: int, drawn: Drawn) -> Iterator[Way]:
    """All rows of an N."""
    n1, k, chosen = drawn.n1, args.k, args.heads * args.k
    routers: dict[str, tuple[Callable[..., Choice], tuple[Tensor, ...]]] = {
        BASE: (lambda x, *own: route_by_queries(x, n1, k, *own), (drawn.queries, drawn.keys)),
        "folded": (lambda x, *own: route_by_folded(x, n1, k, *own), (drawn.queries, drawn.keys)),
        "no queries": (lambda x, *own: route_without_queries(x, n1, k, *own), (drawn.direct_keys,)),
    }
    scores = args.tokens * num_experts * drawn.x.element_size()
    too_large = f"its scores would take {scores / 2**30:.1f} GiB (--most_bytes)" if scores > args.most_bytes else ""
    if not too_large:
        weight = drawn.matrix(num_experts, args.size)
        routers["ordinary"] = (lambda x, *own: route_ordinarily(x, chosen, *own), (weight,))

    for name, (route, own) in routers.items():
        yield Way("retrieval", name, lambda x, *own, route=route: route(x, *own)[0], (drawn.x, *own))
    if too_large:
        yield Way("retrieval", "ordinary", reason=too_large)

    for name, (route, own) in routers.items():
        if name == "folded":  # that is the row "model"
            continue

        def layer(x: Tensor, down: Tensor, up: Tensor, *own: Tensor, route: Callable[..., Choice] = route) -> Tensor:
            return cdmoe(x, *route(x, *own), down, up, F.silu)

        yield Way("layer", name, layer, (drawn.x, drawn.down, drawn.up, *own))
    if too_large:
        yield Way("layer", "ordinary", reason=too_large)
    yield model_way(args, num_experts, drawn)
    yield from mixture_ways(args, num_experts, drawn)


def model_way(args: argparse.Namespace, num_experts: int, drawn: Drawn) -> Way:
    """The experts of a model's layer, with the drawn weights."""
    config = DogeConfig(
        hidden_size=args.size,
        cross_domain_intermediate_size=1,  # the shared part is not measured
        private_expert_intermediate_size=args.size,
        num_cdmmoe_experts=num_experts,
        num_cdmmoe_heads=args.heads,
        num_cdmmoe_experts_per_head=args.k,
    )
    with torch.device("meta"):
        layer = DogeCDMoE(config)
    names = ("queries.weight", "keys", "down_embed.weight", "up_embed.weight")
    own = (drawn.queries, drawn.keys, drawn.down, drawn.up)
    layer.load_state_dict(dict(zip(names, own, strict=True)), strict=False, assign=True)
    # Assigning makes parameters of the drawn tensors: these are what gets gradients.
    leaves = tuple(layer.get_parameter(name) for name in names)
    return Way("layer", "model", lambda x, *_: layer.experts(x.unsqueeze(0)).squeeze(0), (drawn.x, *leaves))


def mixture_ways(args: argparse.Namespace, num_experts: int, drawn: Drawn) -> Iterator[Way]:
    """The ordinary mixtures of as many parameters as N tiny experts."""
    grouped_runs = torch.device(args.device).type == "cuda" and args.dtype == "bfloat16"
    for count in dict.fromkeys((*args.moe_experts, num_experts)):
        width, rest = divmod(num_experts, count)
        label = "E=N" if count == num_experts else f"E={count}"
        facts = {"moe_experts": count, "width": width, "units_of_a_token": args.moe_k * width}
        if rest or count < args.moe_k:
            reason = f"{num_experts} is no multiple of {count}" if rest else f"a token takes {args.moe_k} (--moe_k)"
            yield Way("mixture", label, reason=reason, facts=facts)
            continue
        router = drawn.matrix(count, args.size)
        for how, mixture in MIXTURES.items():
            reason = ""
            if how == "loop" and count > args.loop_experts:
                reason = f"more than {args.loop_experts} experts, each some kernels (--loop_experts)"
            elif how == "grouped" and not grouped_runs:
                reason = "needs a GPU and bfloat16"
            elif how == "grouped" and width % GROUPED_ALIGNMENT:
                reason = f"a width of {width} is no multiple of {GROUPED_ALIGNMENT}"

            def call(
                x: Tensor,
                router: Tensor,
                down: Tensor,
                up: Tensor,
                mixture: Callable[..., Tensor] = mixture,
                count: int = count,
            ) -> Tensor:
                weights_M1k, experts_M1k = route_ordinarily(x, args.moe_k, router)
                tables = (table.unflatten(0, (count, -1)) for table in (down, up))  # D leads up to hidden units
                return mixture(x, weights_M1k.flatten(1).to(x.dtype), experts_M1k.flatten(1), *tables)

            yield Way("mixture", f"{label} {how}", call, (drawn.x, router, drawn.down, drawn.up), reason, facts)


def measure(args: argparse.Namespace, num_experts: int, clock: Clock) -> list[dict[str, Any]]:
    """A record a way, its times in ms."""
    try:
        drawn = Drawn(args, num_experts)
        ways = list(ways_of(args, num_experts, drawn))
    except RuntimeError as error:  # a want of memory
        return [{"experts": num_experts, "group": "all", "way": "all", "error": first_line(error)}]
    records: list[dict[str, Any]] = []
    for way in ways:
        records.append({"experts": num_experts, "group": way.group, "way": way.name, **way.facts})
        if way.reason:
            records[-1]["error"] = way.reason
    times: list[list[tuple[float, float, float]]] = [[] for _ in ways]
    for _ in range(args.rounds):
        for way, record, found in zip(ways, records, times, strict=True):
            if "error" in record:
                continue
            direction = drawn.choice_direction if way.group == "retrieval" else drawn.direction
            try:
                found.append(time_way(way, direction, clock, record))
            except (ValueError, RuntimeError) as error:  # most of them a want of memory
                record["error"] = first_line(error)
                if drawn.x.is_cuda:
                    torch.cuda.empty_cache()
    for record, found in zip(records, times, strict=True):
        if "error" not in record:
            medians = (statistics.median(column) for column in zip(*found, strict=True))
            record["forward_ms"], record["both_ms"], record["host_ms"] = medians
    add_ratios(records)
    return records


def first_line(error: Exception) -> str:
    """What a table has room for."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def time_way(way: Way, direction: Tensor, clock: Clock, record: dict[str, Any]) -> tuple[float, float, float]:
    """Forward, forward and backward, and the latter with the host; notes the most memory of both passes."""

    def both() -> None:
        output = way.call(*way.leaves)
        torch.autograd.grad(output, way.leaves, direction.view_as(output))

    with torch.no_grad():
        forward, _ = clock(lambda: way.call(*way.leaves))
    passes, record["peak_bytes"] = clock(both)
    # Without a GPU there is no queue, and it would be the same again.
    host = clock(both, queued=False)[0] if direction.is_cuda else passes
    return forward, passes, host


def add_ratios(records: list[dict[str, Any]]) -> None:
    """Each time to that of product keys, in the same group or, for a mixture, in a layer."""
    bases = {record["group"]: record for record in records if record["way"] == BASE}
    for record in records:
        base = bases["layer" if record["group"] == "mixture" else record["group"]]
        for kind in ("forward", "both"):
            if "error" not in record and "error" not in base:
                record[f"{kind}_ratio"] = record[f"{kind}_ms"] / base[f"{kind}_ms"]


# Whether product keys find the best of all


def checked_tokens(num_experts: int) -> int:
    """So many that their scores of all experts take little memory."""
    return max(1, min(256, 2**24 // num_experts))


def ordinary_matrix(keys: Tensor, n1: int) -> Tensor:
    """The (N, d) of an ordinary router with the scores of product keys (n1 + n2, d): row i·n2 + j is W1[i] + W2[j]."""
    return (keys[:n1].unsqueeze(1) + keys[n1:].unsqueeze(0)).flatten(0, 1)


def check_float64(num_experts: int, heads: int, k: int, size: int) -> dict[str, Any]:
    """Product keys, with queries and without, against an ordinary router of the same scores, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(2)
    n1, n2 = key_table_sizes(num_experts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(checked_tokens(num_experts), size)
    query_weight, keys = normal(heads * size, size) / size, normal(heads, n1 + n2, size // 2)
    direct = normal(heads, n1 + n2, size) / size**0.5
    same, difference = True, 0.0
    for (weights_MHk, experts_MHk), full_HnE in (
        (route_by_queries(x, n1, k, query_weight, keys), folded_keys(query_weight, keys, n1)),
        (route_without_queries(x, n1, k, direct), direct),
    ):
        for head, keys_nE in enumerate(full_HnE):
            expected_weights, expected = route_ordinarily(x, k, ordinary_matrix(keys_nE, n1))
            same = same and torch.equal(experts_MHk[:, head], expected.squeeze(1))
            found = (weights_MHk[:, head] - expected_weights.squeeze(1)).abs().max()
            difference = max(difference, float(found))
    return {"experts": num_experts, "float64_same_choice": same, "float64_weights_difference": difference}


def check_device(args: argparse.Namespace, num_experts: int) -> bool:
    """Whether, where and as it is measured, the sums chosen are the highest of all N, and the choice has no repeats.

    The sums and not the experts: equal scores are common in bfloat16, and `topk` promises no order among them.
    """
    n1, n2 = key_table_sizes(num_experts)
    generator, dtype = torch.Generator(args.device).manual_seed(3), getattr(torch, args.dtype)
    first, second = (
        torch.randn(checked_tokens(num_experts), args.heads, n, generator=generator, device=args.device).to(dtype)
        for n in (n1, n2)
    )
    weights, experts = product_topk(first, second, args.k)
    sums = (first.float().unsqueeze(-1) + second.float().unsqueeze(-2)).flatten(-2)
    best = sums.topk(args.k).values
    ordered = experts.sort(-1).values
    return (
        torch.equal(sums.gather(-1, experts), best)
        and bool((ordered[..., 1:] > ordered[..., :-1]).all())
        and torch.allclose(weights, best.softmax(-1), atol=1e-6)
    )


# The program


def table(records: list[dict[str, Any]]) -> str:
    """The records in Markdown."""
    columns = ("forward_ms", "both_ms", "host_ms", "forward_ratio", "both_ratio")
    lines = [["N", "group", "way", "forward, ms", "forward + backward, ms", "with host", "ratio", "ratio, both", "MiB"]]
    for record in records:
        start = [f"{record['experts']:,}", record["group"], record["way"]]
        if "error" in record:
            lines.append([*start, record["error"], *([""] * 5)])
            continue
        digits = {name: 3 if name.endswith("ms") else 2 for name in columns}
        # There is no ratio where product keys themselves did not run.
        cells = [f"{record[name]:.{places}f}" if name in record else "" for name, places in digits.items()]
        lines.append([*start, *cells, f"{record['peak_bytes'] / 2**20:,.0f}"])
    return markdown(lines)


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=positive, nargs="+", default=EXPERTS, metavar="N")
    parser.add_argument("--tokens", type=positive, default=16384)
    parser.add_argument("--size", type=positive, default=1024, help="d and e")
    parser.add_argument("--heads", type=positive, default=1)
    parser.add_argument("--k", type=positive, default=8, help="experts of a head")
    parser.add_argument("--moe_experts", type=positive, nargs="+", default=(8, 64), metavar="E", help="beside E = N")
    parser.add_argument("--moe_k", type=positive, default=2, help="experts of a token in an ordinary mixture")
    parser.add_argument("--loop_experts", type=positive, default=1024, help="the most for the loop")
    parser.add_argument("--most_bytes", type=positive, default=8 * 2**30, help="of a score for each token and expert")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, or else float32")
    parser.add_argument("--warm_up", type=positive, default=3)
    parser.add_argument("--repetitions", type=positive, default=10)
    parser.add_argument("--rounds", type=positive, default=3, help="times that all ways take their turn")
    parser.add_argument("--json", type=Path, help="write the records there")
    args = parser.parse_args()
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device {args.device}: expected cpu or cuda")
    if device.type == "cuda" and not on_gpu:
        parser.error(f"--device {args.device}: PyTorch finds no NVIDIA GPU")
    if args.size % 2:
        parser.error(f"--size {args.size}: it must be even, for a query is cut in halves")
    if args.heads * args.k > min(args.experts):
        parser.error(f"--heads {args.heads} --k {args.k}: no token can choose {args.heads * args.k} different experts "
                     f"of {min(args.experts)}")  # fmt: skip
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return args


def main() -> int:
    """Checks, measures and prints."""
    args = parse_arguments()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {args.tokens:,} tokens, d = e = {args.size}, H = {args.heads}, "
          f"k = {args.k}, {args.dtype}; mixtures take {args.moe_k} experts of E\n")  # fmt: skip
    checks = []
    for num_experts in args.experts:
        check = check_float64(num_experts, args.heads, args.k, min(args.size, CHECKED_SIZE))
        check["measured_type_highest_sums"] = check_device(args, num_experts)
        checks.append(check)
        exact = "as topk over all" if check["float64_same_choice"] else "NOT AS topk over all"
        highest = "highest" if check["measured_type_highest_sums"] else "NOT HIGHEST"
        print(f"N = {num_experts:,}: product keys choose {exact} in float64, weights within "
              f"{check['float64_weights_difference']:.1e}; sums in {args.dtype} {highest}")  # fmt: skip
    records: list[dict[str, Any]] = []
    clock = Clock(device, args.warm_up, args.repetitions)
    for num_experts in args.experts:
        print(f"measuring N = {num_experts:,}", file=sys.stderr, flush=True)
        records += measure(args, num_experts, clock)
        if args.json:  # what there is, should a later N end the program
            settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
            heading = {**circumstances(), "device": name, "settings": settings, "checks": checks}
            write_whole(args.json, {**heading, "records": records})
    print(f"\n{table(records)}")
    right = all(check["float64_same_choice"] and check["measured_type_highest_sums"] for check in checks)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
