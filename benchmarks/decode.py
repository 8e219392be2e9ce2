"""Tokens a second of decoding, Doge beside a Llama of equal width, depth and parameters, in one process.

    python benchmarks/decode.py [--preset doge_25M doge_450M] [--batch 1 64] [--ways graph compiled static]
        [--models doge llama] [--json FILE]

Both models run in each of these ways, in turns, so that ratios compare within one run:

    graph      `Decoder`: a static cache and the whole step as a CUDA graph (plain calls on a CPU)
    compiled   `Decoder(compiled=True)`: the same, with the step through torch.compile
    static     transformers' `generate` with a static cache, its forward pass compiled on a GPU with CUDA graphs (its
               best settings)
    dynamic    transformers' `generate` with its growing cache, nothing compiled

`Decoder` takes a Llama as it takes a Doge: `graph` and `compiled` give it what transformers does not, a step without
anything left to the host. So `doge/llama` compares the models, and the table at the end the best of each.

The prompts of a batch are padded on the left: their lengths lie evenly between half of `--prompt_tokens` and all.
Weights are random, the choice is greedy and nothing ends a row. `prefill` is the time to the first token of each row;
decoding is what the other tokens take beyond it, medians over `--repetitions`. The Llama is that of `quality.py` with
an MLP whose width is a multiple of 64, as GPUs like it. `peak` is the highest memory with the weights, on a GPU.
A row is printed as soon as it is measured; one that fails has its error in it. To compile takes most of the time:
`--ways` and `--models` choose the rows of a run.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from flags import run_command
from quality import llama_like
from records import circumstances, write_whole
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, StoppingCriteria

from doge_lm import DogeConfig, DogeForCausalLM
from doge_lm.errors import UserError
from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.training.settings import load_settings

WAYS = ("graph", "compiled", "static", "dynamic")
MODELS = ("doge", "llama")
Generate = Callable[[int], Any]
Record = dict[str, Any]


class StopAfter(StoppingCriteria):
    """Ends all rows at a length; unlike `max_new_tokens`, it leaves the size of the static cache as it is."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row is at its end, (B,)."""
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._length, device=input_ids.device)


def build_models(config: DogeConfig, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, PreTrainedModel]:
    """Doge and its Llama, with random weights."""
    beside = llama_like(config)
    beside.intermediate_size = max(64, round(beside.intermediate_size / 64) * 64)
    models = {}
    for name, kind, own in (("doge", DogeForCausalLM, config), ("llama", LlamaForCausalLM, beside)):
        torch.manual_seed(seed)
        with torch.device(device):
            models[name] = kind._from_config(own, dtype=dtype, attn_implementation="sdpa").eval()
    return models


def make_prompts(batch: int, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random ids, `batch` rows whose lengths fall evenly from `longest` to about half of it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [longest - longest * row // (2 * batch) for row in range(batch)]
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def generate_by(way: str, model: PreTrainedModel, prompts: list[list[int]], most: int) -> Generate:
    """What generates a number of new tokens, up to `most`, after the prompts."""
    if way in ("graph", "compiled"):
        decoder = Decoder(model, compiled=way == "compiled")
        return lambda new: decoder.generate(prompts, Sampling(new))
    options: dict[str, Any] = {"cache_implementation": "static"} if way == "static" else {}
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask_BT = (ids_BT != 0).long()

    def run(new: int) -> Tensor:
        stop = [StopAfter(longest + new)] if new < most else []
        return model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=stop,
            **options,
        )

    return run


def measure(way: str, model: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, float]:
    """The figures of one model in one way."""
    on_gpu = model.device.type == "cuda"
    before = 0
    if on_gpu:
        before = torch.cuda.memory_allocated() - sum(p.numel() * p.element_size() for p in model.parameters())
        torch.cuda.reset_peak_memory_stats()
    run = generate_by(way, model, prompts, args.new_tokens + 1)

    def seconds(new: int) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run(new)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    warm_up = seconds(args.new_tokens + 1) + seconds(1)
    prefill = statistics.median(seconds(1) for _ in range(args.repetitions))
    whole = statistics.median(seconds(args.new_tokens + 1) for _ in range(args.repetitions))
    decoding = max(whole - prefill, 1e-9)
    return {
        "tokens_per_second": len(prompts) * args.new_tokens / decoding,
        "ms_per_step": 1000 * decoding / args.new_tokens,
        "prefill_ms": 1000 * prefill,
        "warm_up_s": warm_up,
        "peak_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else 0,
    }


def release() -> None:
    """Free what the last way compiled and captured."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_row(way: str, model: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """As `measure`; what goes wrong becomes the `error` of the row."""
    try:
        return measure(way, model, prompts, args)
    except Exception as error:  # of any library; the other rows still run
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    finally:
        release()


def measure_preset(preset: str, args: argparse.Namespace, keep: Callable[[Record], None]) -> None:
    """All rows of one preset; each record goes to `keep` as soon as it is there."""
    config = load_settings(preset).model_config()
    needed = args.prompt_tokens + args.new_tokens + 1
    if needed > config.max_position_embeddings:
        raise UserError(
            f"--prompt_tokens and --new_tokens make {needed} positions with one more; {preset} has "
            f"{config.max_position_embeddings}"
        )
    models = build_models(config, torch.device(args.device), getattr(torch, args.dtype), args.seed)
    for way in args.ways:
        for batch in args.batch:
            prompts = make_prompts(batch, args.prompt_tokens, config.vocab_size, args.seed)
            llama: Record = {}
            for name in sorted(args.models, reverse=True):  # Llama first: the ratio stands in Doge's row
                record: Record = {"preset": Path(preset).stem, "batch": batch, "way": way, "model": name}
                record["parameters"] = sum(p.numel() for p in models[name].parameters())
                record.update(measure_row(way, models[name], prompts, args))
                if name == "llama":
                    llama = record
                elif "tokens_per_second" in record and "tokens_per_second" in llama:
                    record["ratio"] = record["tokens_per_second"] / llama["tokens_per_second"]
                keep(record)


def compare_best(records: list[Record]) -> list[Record]:
    """For each preset and batch the fastest way of Doge over the fastest of Llama, where both were measured."""
    best: dict[tuple[str, int], dict[str, Record]] = {}
    for record in records:
        if "error" in record:
            continue
        fastest = best.setdefault((record["preset"], record["batch"]), {})
        other = fastest.get(record["model"], record)
        fastest[record["model"]] = max(record, other, key=lambda each: each["tokens_per_second"])
    return [
        {
            "preset": preset,
            "batch": batch,
            "doge": fastest["doge"]["way"],
            "llama": fastest["llama"]["way"],
            "ratio": fastest["doge"]["tokens_per_second"] / fastest["llama"]["tokens_per_second"],
        }
        for (preset, batch), fastest in best.items()
        if len(fastest) == len(MODELS)
    ]


def row(record: Record) -> str:
    """A record as a row of the table."""
    start = (
        f"| {record['preset']} | {record['batch']} | {record['way']} | {record['model']} | "
        f"{record['parameters'] / 1e6:,.1f}M |"
    )
    if "error" in record:
        return f"{start} {record['error']} | | | | | |"
    ratio = f"{record['ratio']:.2f}" if "ratio" in record else ""
    return (
        f"{start} {record['tokens_per_second']:,.0f} | {record['ms_per_step']:.3f} | {ratio} | "
        f"{record['prefill_ms']:.1f} | {record['warm_up_s']:.1f} | {record['peak_bytes'] / 2**30:.2f} |"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags.

    Raises:
        UserError: for a number below 1.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["doge_25M", "doge_450M"], help="names, or files of settings")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["graph", "compiled", "static"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--prompt_tokens", type=int, default=127)
    parser.add_argument("--new_tokens", type=int, default=128, help="steps that are timed, after the first token")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--json", type=Path, help="write the records there, after each")
    args = parser.parse_args(arguments)
    for name in ("prompt_tokens", "new_tokens", "repetitions"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if min(args.batch) < 1:
        raise UserError(f"--batch has {min(args.batch)}; every batch must be at least 1")
    args.dtype = args.dtype or ("float32" if torch.device(args.device).type == "cpu" else "bfloat16")
    return args


def main() -> int:
    """Measures and prints."""
    args = parse()
    transformers.logging.set_verbosity_error()
    name = torch.cuda.get_device_name(args.device) if torch.device(args.device).type == "cuda" else "CPU"
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    heading = {**circumstances(), "device": name, "threads": torch.get_num_threads(), "settings": settings}
    records: list[Record] = []

    def keep(record: Record) -> None:
        records.append(record)
        print(row(record), flush=True)
        if args.json:
            write_whole(args.json, {**heading, "records": records, "best": compare_best(records)})

    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; {args.dtype}, "
          f"{args.prompt_tokens} tokens of prompt, {args.new_tokens} steps\n")  # fmt: skip
    print("| preset | batch | way | model | parameters | tokens/s | ms/step | doge/llama | prefill, ms | warm-up, s | "
          "peak, GiB |\n|---|---|---|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    for preset in args.preset:
        measure_preset(preset, args, keep)
        release()
    print("\n| preset | batch | fastest doge | fastest llama | doge/llama |\n|---|---|---|---|---|")
    for best in compare_best(records):
        print(f"| {best['preset']} | {best['batch']} | {best['doge']} | {best['llama']} | {best['ratio']:.2f} |")
    return 0


if __name__ == "__main__":
    run_command(main)
