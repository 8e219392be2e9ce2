"""Cost of keeping attention within documents: a training step of Doge by each way of doing it, on one NVIDIA GPU.

    python benchmarks/document_mask.py --preset model/config/doge_25M.yaml --preset model/config/doge_80M.yaml

Weights and tokens are random; rows are packed from documents of lognormal lengths. The ways:

    none    attention over the whole row, no mask (what the others are measured against)
    dense   SDPA with a B×1×T×T mask
    found   FlashAttention for unequal lengths, which the compiled model finds in the positions: one for each token
    given   the same with `cu_seq_lens_q` of a fixed size, as the trainer gives it
    blocks  FlexAttention by `document_blocks`, for rows of a multiple of 128 tokens

Prints a JSON record a line. A way that fails prints its error, and the next one runs. `logits` and `loss` are the
differences from `dense` on the first step; of logits, the median over tokens in the row where that is largest. `none`
differs, since its documents see each other.
`compilations` are those in the measured steps, whose batches all differ: it should be 0.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch._dynamo.utils import counters

from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.model.document_attention import BLOCK, cumulative_lengths, document_blocks
from doge_lm.model.modeling_doge import DogeForCausalLM, DogeModel

WAYS = ("dense", "none", "found", "given", "blocks")
WARM_UP = 3
SIGMA = 1.0  # of the logarithm of a document's length

Batch = dict[str, Any]


def packed_positions(rng: np.random.Generator, batch: int, length: int, mean: float) -> Tensor:
    """Positions (B, T) of rows filled with documents, the last of a row cut."""
    rows = np.empty((batch, length), dtype=np.int64)
    for row in rows:
        start = 0
        while start < length:
            size = min(length - start, max(1, int(rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA))))
            row[start : start + size] = np.arange(size)
            start += size
    return torch.from_numpy(rows)


def draw_batches(args: argparse.Namespace, vocab_size: int, way: str) -> list[Batch]:
    """The same tokens and documents for every way, on the GPU."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(WARM_UP + args.steps):
        positions = packed_positions(rng, args.batch_size, args.length, args.mean_length).cuda()
        ids = torch.from_numpy(rng.integers(3, vocab_size, positions.shape)).cuda()
        batch: Batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "use_cache": False}
        if way != "none":
            batch["position_ids"] = positions
        if way == "given":
            starts = cumulative_lengths(positions).starts
            if len(starts) > args.documents:
                raise ValueError(f"{len(starts) - 1} documents in a batch; raise --documents, now {args.documents}")
            missing = args.documents - len(starts)
            batch["cu_seq_lens_q"] = nn.functional.pad(starts, (0, missing), value=positions.numel())
        if way == "blocks":
            if args.length % BLOCK != 0:
                raise ValueError(f"--length {args.length} is not a multiple of {BLOCK}")
            batch["document_blocks"] = document_blocks(positions)._asdict()
        batches.append(batch)
    return batches


def measure(args: argparse.Namespace, config: DogeConfig, way: str) -> tuple[dict[str, Any], Tensor, float]:
    """Train some steps one way: the record, and some logits of every row and loss of the first step."""
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    model = DogeForCausalLM(config).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model, fullgraph=True)
    batches = draw_batches(args, config.vocab_size, way)

    def step(batch: Batch) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            out = run(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out

    first = step(batches[0])
    logits, loss = first.logits[:, ::64].detach().float().cpu(), float(first.loss.detach())
    del first
    for batch in batches[1:WARM_UP]:
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    compiled = counters["stats"]["unique_graphs"]
    start = time.perf_counter()
    for batch in batches[WARM_UP:]:
        step(batch)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / args.steps
    record = {
        "tokens_per_second": round(args.batch_size * args.length / seconds),
        "seconds_per_step": round(seconds, 5),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "compilations": counters["stats"]["unique_graphs"] - compiled,
    }
    return record, logits, loss


def run_way(args: argparse.Namespace, config: DogeConfig, way: str) -> tuple[dict[str, Any], Tensor | None, float]:
    """`measure` from a clean start; an error becomes the record."""
    documents = DogeModel._documents
    if way == "dense":
        DogeModel._documents = lambda *_: None  # type: ignore[method-assign]
    try:
        return measure(args, config, way)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}, None, float("nan")
    finally:
        DogeModel._documents = documents  # type: ignore[method-assign]
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    """Measure each way with each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", type=Path, action="append", required=True)
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--mean_length", type=float, default=600.0)
    parser.add_argument("--documents", type=int, default=1024, help="size that cu_seq_lens_q is padded to")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it measures on an NVIDIA GPU")
    device = torch.cuda.get_device_name()
    for preset in args.preset:
        config = DogeConfig(**yaml.safe_load(preset.read_text(encoding="utf-8"))["model"])
        reference: tuple[Tensor, float] | None = None
        for way in args.way or WAYS:
            found, logits, loss = run_way(args, config, way)
            if logits is not None and way == "dense":
                reference = logits, loss
            elif logits is not None and reference is not None:
                differences_BT = (logits - reference[0]).abs().amax(-1)
                found["logits"] = float(differences_BT.median(dim=1).values.max())
                found["loss"] = abs(loss - reference[1])
            sizes = {"preset": preset.stem, "way": way, "batch_size": args.batch_size, "length": args.length}
            print(json.dumps({**sizes, **found, "torch": torch.__version__, "device": device}), flush=True)


if __name__ == "__main__":
    main()
