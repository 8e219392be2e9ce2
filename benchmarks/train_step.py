"""Speed and memory of a training step of Doge and of its peers, through the project's own trainer, in one run.

    python benchmarks/train_step.py --dataset_path DIR --tokenizer_path DIR --output_dir OUT
        [--preset doge_25M …] [--rows doge dense …] [--steps 120] [--gpus 1] [--json FILE]

Each row is a process of its own: clean memory and a clean state of the compiler. The rows:

    doge              as shipped: `pretrain.run`, which is what train.py calls
    dense             the same Doge, each CDMoE replaced by a dense d → d_cross → d MLP
    llama             transformers' Llama of equal parameters and depth, compiled by the same trainer
    llama_fair        the same at its best: MLP width a multiple of 64, causal attention without a T×T mask
    published         the published mathematics in eager PyTorch
    transformers_doge transformers' own `doge` with experts
    bare              Doge in a bare loop, its batches on the device already: what the trainer adds is the difference

`published` and `transformers_doge` hold T×T scores or masks for all layers; they get a quarter of the micro-batch.
Without accumulation a step is a micro-step. The speed is the median over the log lines of the run after the first two,
each the mean over the steps since the line before (a line waits for the device, a step does not); evaluation and
checkpoints are left out. `of matmul` is the share of a matrix product's speed, measured in the same process after the
steps; `MFU` the share of the data sheet's. `first step` counts from the start of the process. Compiled code is kept in
OUT/compiled (or TORCHINDUCTOR_CACHE_DIR), so a row that is named twice is measured with a warm cache the second time;
`compile_caches`, in the JSON, counts what of it served, and `start_seconds` says what went before the first step.
`compiled` is the number of graphs compiled in the measured steps, which should be 0. With `--gpus N` as many rows run
at a time, each on a GPU of its own; `matmul_flops` in the JSON says how far the cards are alike.

Work is counted as the plan of a run counts it (`peers.flops_per_token`), so `doge / dense, by work` is how well the
one uses the device over how well the other does: 1 where experts cost no more than their arithmetic.
"""

import argparse
import gc
import itertools
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate.utils import send_to_device
from flags import run_command
from peers import (
    build_dense,
    build_doge,
    build_llama_as_given,
    build_llama_fair,
    build_published,
    build_transformers_doge,
    flops_per_token,
)
from records import circumstances, markdown, write_whole
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from doge_lm.data.dataset import PackedCollator, load_prepared
from doge_lm.errors import UserError
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.training import pretrain
from doge_lm.training import run as running
from doge_lm.training.callbacks import LOG_NAME, read_log
from doge_lm.training.flags import add_pretrain_arguments
from doge_lm.training.hardware import detect_hardware, measure_matmul, peak_flops, synchronize
from doge_lm.training.settings import Settings, TrainSettings, load_settings
from doge_lm.training.trainer import DogeTrainer, prepare_model

BUILDERS: dict[str, pretrain.ModelBuilder] = {
    "doge": build_doge,
    "dense": build_dense,
    "llama": build_llama_as_given,
    "llama_fair": build_llama_fair,
    "published": build_published,
    "transformers_doge": build_transformers_doge,
    "bare": build_doge,
}
# Settings of one row alone.
ROW_SETTINGS = {"published": ("torch_compile=false",)}
QUARTER_BATCH = ("published", "transformers_doge")
MICRO_BATCHES = {"doge_25M": 32, "doge_80M": 32, "doge_200M": 16, "doge_320M": 16, "doge_450M": 16}
LINES = 12  # of the log of a row
WARM_UP_LINES = 2
BARE_BATCHES = 16
RESULT_NAME, OUTPUT_NAME = "result.json", "output.txt"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What the process of one row is told. `settings` are overrides, as --set takes them."""

    kind: str
    preset: str
    dataset_path: str
    tokenizer_path: str
    place: str
    steps: int
    logging_steps: int
    micro_batch: int
    settings: list[str]
    memory_cap_gib: float | None


# In the process of a row


def _age() -> float:
    """Seconds since this process began."""
    return round(time.time() - psutil.Process().create_time(), 2)


class Watch(TrainerCallback):
    """Notes the time of the first step and what is compiled after the warm-up; keeps evaluation and saving out."""

    def __init__(self, row: Row, device: torch.device):
        self._warm_up = max(row.logging_steps, WARM_UP_LINES)  # the step of the last line that is left out
        self._device = device
        self._graphs = 0
        self.first_step_seconds = math.nan
        self.start: dict[str, float] = {"imported": _age()}
        """Seconds of the process when all is imported, when training begins and when the first batch is there."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Model, data and optimizer are there."""
        self.start["begun"] = _age()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first batch is there."""
        self.start.setdefault("first_batch", _age())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step of the trainer is done."""
        self.step_done(state.global_step)
        control.should_evaluate = control.should_save = False

    def step_done(self, step: int) -> None:
        """Look at the clock after step 1 and at the compiler after the warm-up."""
        if step == 1:
            synchronize(self._device)
            self.first_step_seconds = _age()
        if step == self._warm_up:
            self._graphs = counters["stats"]["unique_graphs"]

    @property
    def compilations(self) -> int:
        """Graphs compiled since the warm-up."""
        return counters["stats"]["unique_graphs"] - self._graphs


def run_trainer(row: Row, builder: pretrain.ModelBuilder, watch: Watch) -> list[Figures]:
    """Train by the project's trainer; returns the lines of its log."""

    class WatchedTrainer(DogeTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.add_callback(watch)

    pretrain.DogeTrainer = WatchedTrainer  # type: ignore[misc]
    running.save_final = lambda *_: None  # some of the models have nothing that is worth a file
    place = Path(row.place)
    parser = argparse.ArgumentParser()
    add_pretrain_arguments(parser)
    flags = ["--config_path", row.preset, "--dataset_path", row.dataset_path, "--tokenizer_path", row.tokenizer_path]
    flags += ["--logging_dir", str(place / "log"), "--output_dir", str(place / "model"), "--overwrite"]
    flags += [part for setting in row.settings for part in ("--set", setting)]
    pretrain.run(parser.parse_args(flags), build_model=builder)
    return [line for line in read_log(place / "log" / LOG_NAME) if line["kind"] == "train"]


def bare_step(
    builder: pretrain.ModelBuilder, settings: Settings, graphs: bool = True
) -> tuple[Callable[[dict[str, torch.Tensor]], torch.Tensor], PreTrainedModel]:
    """A call that takes the training step of a batch and returns its loss, and the model.

    Without `graphs` the passes are no CUDA graphs, whatever the settings say.
    """
    train, hardware = settings.train, detect_hardware()
    device, machine = hardware.device, running.Machine.settle(settings.train, settings.model_config(), hardware)
    graphs = graphs and machine.graphs
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    torch.manual_seed(train.seed)
    model = builder(settings.model_config(), train).to(device).train()
    model.config.use_cache = False
    prepare_model(model, train, machine.compiled, graphs)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon,
        weight_decay=train.weight_decay, fused=True,
    )  # fmt: skip

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, torch.bfloat16, enabled=machine.bf16):
            loss = model(**batch, skip_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, model


def run_bare(row: Row, builder: pretrain.ModelBuilder, settings: Settings, watch: Watch) -> list[Figures]:
    """Train in the shortest loop that takes the same steps; returns lines as those of the trainer's log."""
    train, device = settings.train, detect_hardware().device
    take_step, _ = bare_step(builder, settings)
    batches = itertools.cycle(load_batches(row, settings, device))
    lines, begun, logged = [], time.perf_counter(), 0
    for step in range(1, row.steps + 1):
        loss = take_step(next(batches))
        watch.step_done(step)
        if step == 1 or step % row.logging_steps == 0 or step == row.steps:
            synchronize(device)
            tokens = (step - logged) * row.micro_batch * train.sequence_length
            line = {"step": step, "loss": loss.item(), "tokens_per_second": tokens / (time.perf_counter() - begun)}
            if device.type == "cuda":
                line["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            lines.append(line)
            begun, logged = time.perf_counter(), step
    return lines


def load_batches(row: Row, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """The first batches of the training set, on the device."""
    train, micro = settings.train, row.micro_batch
    padding = settings.model.pad_token_id or 0
    collate = PackedCollator(padding, train.sequence_length, train.document_mask, document_blocks=True)
    data = load_prepared(Path(row.dataset_path)).train
    count = max(1, min(BARE_BATCHES, row.steps, len(data) // micro))
    batches = [collate([data[index * micro + b] for b in range(micro)]) for index in range(count)]
    return [send_to_device(batch, device) for batch in batches]


def measure(row: Row) -> Figures:
    """The figures of a row, measured in this process."""
    hardware = detect_hardware()
    device = hardware.device
    if row.memory_cap_gib is not None and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, row.memory_cap_gib * 2**30 / hardware.memory), device)
    settings = load_settings(row.preset, row.settings)
    length = settings.train.sequence_length
    figures: Figures = {}

    def counted(config: DogeConfig, train: TrainSettings) -> PreTrainedModel:
        model = BUILDERS[row.kind](config, train)
        figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        figures["flops_per_token"] = flops_per_token(model, length)
        return model

    watch = Watch(row, device)
    lines = run_bare(row, counted, settings, watch) if row.kind == "bare" else run_trainer(row, counted, watch)
    gc.collect()  # of the trainer, which refers to itself: under a cap the matrices below need the memory
    bf16 = running.Machine.settle(settings.train, settings.model_config(), hardware).bf16
    ceiling = measure_matmul(device, torch.bfloat16 if bf16 else torch.float32)
    figures |= summarize(lines, row.micro_batch * length)
    work = figures["flops_per_token"] * figures["tokens_per_second"]
    return figures | {
        "first_step_seconds": watch.first_step_seconds,
        "start_seconds": watch.start,
        "compilations": watch.compilations,
        "compile_caches": compile_caches(),
        "matmul_flops": ceiling,
        "share_of_matmul": round(work / ceiling, 4),
        "mfu": round(work / peak_flops(hardware, bf16).flops, 4),
        "device": hardware.name,
    }


def compile_caches() -> dict[str, int]:
    """How often the caches of the compiler held what was asked for, in this process: why a warm start is slow."""
    return {
        name: count
        for part in ("aot_autograd", "inductor")
        for name, count in counters[part].items()
        if "_cache_" in name
    }


def summarize(lines: Sequence[Figures], tokens_per_step: int) -> Figures:
    """Median speed of the lines of a log after the warm-up, and the peak of memory up to the last of them."""
    measured = lines[WARM_UP_LINES:]
    rates = [line["tokens_per_second"] for line in measured]
    median = statistics.median(rates)
    return {
        "tokens_per_second": round(median),
        "slowest_line": round(min(rates)),
        "fastest_line": round(max(rates)),
        "ms_per_step": round(1000 * tokens_per_step / median, 3),
        "measured_steps": measured[-1]["step"] - lines[WARM_UP_LINES - 1]["step"],
        "peak_memory_gib": measured[-1].get("peak_memory_gib"),
        "first_loss": lines[0]["loss"],
        "last_loss": measured[-1]["loss"],
    }


def child(text: str) -> None:
    """Measure the row that `text` describes and leave its figures, or its error, in its place."""
    row = Row(**json.loads(text))
    try:
        figures = measure(row)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        figures = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:1000]}
    write_whole(Path(row.place) / RESULT_NAME, figures)


# In the process that the user starts


def run_row(row: Row, timeout: float, gpu: str | None = None) -> Figures:
    """Measure a row in a process of its own; whatever goes wrong there becomes the `error` of its figures.

    The process sees the GPU of that name alone, as CUDA_VISIBLE_DEVICES names it, or with None what this one sees.

    The process has no main file: the workers of the data loader would import that anew, with all that it imports.
    """
    place, folder = Path(row.place), str(Path(__file__).resolve().parent)
    place.mkdir(parents=True, exist_ok=True)
    (place / RESULT_NAME).unlink(missing_ok=True)
    code = "import sys, train_step; train_step.child(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(asdict(row))]
    caches = {"TORCHINDUCTOR_CACHE_DIR": "compiled", "TRITON_CACHE_DIR": "compiled/triton"}
    environment = {name: str(place.parent.resolve() / cache) for name, cache in caches.items()} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with (place / OUTPUT_NAME).open("w", encoding="utf-8") as output:
        try:
            status = subprocess.run(
                command, stdout=output, stderr=output, env=environment, timeout=timeout, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout:.0f} s"}
    try:
        return json.loads((place / RESULT_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"error": f"the process ended with status {status}; see {place / OUTPUT_NAME}"}


def gpu_names(count: int) -> list[str | None]:
    """The first so many GPUs as CUDA_VISIBLE_DEVICES names them; for one None: what this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [None] if count == 1 else [*visible.split(",")[:count]] if visible else [str(n) for n in range(count)]


def run_rows(rows: Sequence[Row], timeout: float, gpus: int) -> Iterator[Figures]:
    """The figures of all rows, as they are done; with several GPUs, each runs as many rows one after the other."""
    names = gpu_names(gpus)
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for name in names:
        free.put(name)

    def run(row: Row) -> Figures:
        gpu, begun = free.get(), time.perf_counter()
        try:
            figures = run_row(row, timeout, gpu)
        finally:
            free.put(gpu)
        head = {"preset": Path(row.preset).stem, "row": row.kind, "micro_batch": row.micro_batch}
        return {**head, "seconds": round(time.perf_counter() - begun, 1), **figures}

    with ThreadPoolExecutor(len(names)) as pool:
        for done in as_completed([pool.submit(run, row) for row in rows]):
            yield done.result()


def make_row(args: argparse.Namespace, preset: str, kind: str, number: int, rows_of_data: int) -> Row:
    """The row of a kind, with settings under which it takes exactly `--steps` steps or a few more.

    Raises:
        UserError: for a `--set` of what has a flag here or follows from others.
    """
    micro = args.micro_batch or MICRO_BATCHES.get(Path(preset).stem, 4)
    if kind in QUARTER_BATCH:
        micro = args.peer_micro_batch or max(1, micro // 4)
    epochs = math.ceil(args.steps / max(1, min(args.steps, rows_of_data // micro)))
    per_epoch = math.ceil(args.steps / epochs)
    steps = per_epoch * epochs
    logging_steps = max(1, steps // LINES)
    settings = {
        "sequence_length": args.sequence_length,
        "sequences_per_step": "auto",
        "per_device_train_batch_size": micro,
        "accumulate_steps": 1,
        "per_epoch_max_steps": per_epoch,
        "num_train_epochs": epochs,
        "document_mask": str(args.document_mask).lower(),
        "logging_steps": logging_steps,
    }
    for override in args.overrides:
        if override.split("=")[0].removeprefix("train.") in settings:
            raise UserError(f"--set {override}: the benchmark settles it; see --help for flags that do the same")
    return Row(
        kind=kind,
        preset=preset,
        dataset_path=args.dataset_path,
        tokenizer_path=args.tokenizer_path,
        place=str(args.output_dir / f"{Path(preset).stem}-{kind}-{number}"),
        steps=steps,
        logging_steps=logging_steps,
        micro_batch=micro,
        settings=[*(f"{key}={value}" for key, value in settings.items()), *args.overrides, *ROW_SETTINGS.get(kind, ())],
        memory_cap_gib=args.memory_cap_gib,
    )


def compare(results: Sequence[Figures]) -> list[Figures]:
    """What one row is to another, for each preset; None where one of them has no figures."""

    def median(preset: str, kind: str, figure: str) -> float:
        found = [each[figure] for each in results if (each["preset"], each["row"]) == (preset, kind) and figure in each]
        return statistics.median(found) if found else math.nan

    def known(ratio: float) -> float | None:
        return None if math.isnan(ratio) else round(ratio, 4)

    comparisons = []
    for preset in dict.fromkeys(each["preset"] for each in results):
        rates = {kind: median(preset, kind, "tokens_per_second") for kind in BUILDERS}
        work = {kind: median(preset, kind, "flops_per_token") for kind in BUILDERS}
        steps = {kind: median(preset, kind, "ms_per_step") for kind in BUILDERS}
        comparisons.append(
            {
                "preset": preset,
                "doge / dense, by work": known(rates["doge"] * work["doge"] / (rates["dense"] * work["dense"])),
                "doge / dense": known(rates["doge"] / rates["dense"]),
                **{
                    f"doge / {kind}": known(rates["doge"] / rates[kind])
                    for kind in ("llama", "llama_fair", "published", "transformers_doge")
                },
                "trainer overhead": known(steps["doge"] / steps["bare"] - 1),
            }
        )
    return comparisons


COLUMNS = {
    "preset": "preset",
    "row": "row",
    "tokens_per_second": "tokens/s",
    "ms_per_step": "ms a step",
    "micro_batch": "micro-batch",
    "peak_memory_gib": "GiB",
    "parameters": "parameters",
    "mflop": "MFLOP a token",
    "share_of_matmul": "of matmul",
    "mfu": "MFU",
    "first_step_seconds": "first step, s",
    "compilations": "compiled",
}


def results_table(results: Sequence[Figures]) -> str:
    """The rows as a table in Markdown, errors below it."""
    lines = [list(COLUMNS.values())]
    for each in results:
        shown = dict(each)
        if "flops_per_token" in each:
            shown["mflop"] = round(each["flops_per_token"] / 1e6, 1)
        if "error" in each:
            shown["tokens_per_second"] = "error"
        lines.append([_cell(name, shown.get(name)) for name in COLUMNS])
    errors = [f"{each['preset']}, {each['row']}: {each['error']}" for each in results if "error" in each]
    return "\n".join([markdown(lines), *(f"\n{error}" for error in errors)])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("share_of_matmul", "mfu"):
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def comparison_table(comparisons: Sequence[Figures]) -> str:
    """The comparisons as a table in Markdown."""
    lines = [list(comparisons[0])]
    for each in comparisons:
        texts = {name: "-" if value is None else value for name, value in each.items()}
        if each["trainer overhead"] is not None:
            texts["trainer overhead"] = f"{each['trainer overhead']:.1%}"
        lines.append([f"{text:.2f}" if isinstance(text, float) else text for text in texts.values()])
    return markdown(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", required=True, help="a prepared set with sequences of --sequence_length")
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", nargs="+", default=["doge_25M"])
    parser.add_argument("--rows", nargs="+", choices=BUILDERS, default=list(BUILDERS), metavar="ROW")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sequence_length", type=int, default=2048)
    parser.add_argument("--micro_batch", type=int, help="sequences of a step (default: by preset)")
    parser.add_argument("--peer_micro_batch", type=int, help=f"the same for {' and '.join(QUARTER_BATCH)}")
    parser.add_argument("--document_mask", action="store_true", help="keep attention within documents")
    parser.add_argument("--memory_cap_gib", type=float, help="memory that PyTorch may take on the GPU")
    parser.add_argument("--gpus", type=int, default=1, help="rows that run at a time, each on a GPU of its own")
    parser.add_argument("--row_timeout", type=float, default=600.0, help="seconds until a row is given up")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="a setting")
    parser.add_argument("--json", type=Path, help="default: OUT/train_step.json")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> int:
    """Refuse what no row could run with; returns the number of rows of the training set.

    Raises:
        UserError: names the flag.
    """
    if args.steps < 2 * WARM_UP_LINES:
        raise UserError(f"--steps {args.steps}: the first are not measured; give at least {2 * WARM_UP_LINES}")
    for name in ("micro_batch", "peer_micro_batch", "memory_cap_gib", "row_timeout", "gpus"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: it must be above 0")
    if args.gpus > max(1, torch.cuda.device_count()):
        raise UserError(f"--gpus {args.gpus}: there are {torch.cuda.device_count()}")
    for preset in args.preset:
        load_settings(preset, args.overrides).model_config()
    data = load_prepared(Path(args.dataset_path))
    if data.manifest.sequence_length != args.sequence_length:
        raise UserError(
            f"--dataset_path {args.dataset_path} holds sequences of {data.manifest.sequence_length} tokens; give "
            f"--sequence_length {data.manifest.sequence_length}, or a set that was prepared with --max_len "
            f"{args.sequence_length}"
        )
    return len(data.train)


def main() -> int:
    args = parse_arguments()
    rows_of_data = check_arguments(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.json or args.output_dir / "train_step.json"
    results: list[Figures] = []
    about = circumstances()
    rows = [
        make_row(args, preset, kind, number, rows_of_data)
        for preset in args.preset
        for number, kind in enumerate(args.rows)
    ]
    for figures in run_rows(rows, args.row_timeout, args.gpus):
        results.append(figures)
        print(json.dumps(figures), flush=True)
        write_whole(path, {**about, "rows": results, "comparisons": compare(results)})
    print(f"\n{results_table(results)}\n\n{comparison_table(compare(results))}\n\n{path}")
    return 0


if __name__ == "__main__":
    run_command(main)
