import itertools
import json
import pickle
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from doge_lm.cli import main
from doge_lm.data import dataset as dataset_module
from doge_lm.data.dataset import PackedCollator, load_prepared
from doge_lm.errors import UserError
from doge_lm.model.modeling_doge import DogeForCausalLM, DogeModel
from doge_lm.training import pretrain
from doge_lm.training.checkpoints import RunRecord, check_whole, list_checkpoints
from doge_lm.training.hardware import Hardware
from doge_lm.training.order import StreamSampler
from doge_lm.training.run import Machine
from doge_lm.training.settings import load_settings
from doge_lm.training.trainer import DogeTrainer

from . import support
from .support import (
    LENGTH,
    TWO_PROCESSES,
    finish,
    log_lines,
    losses,
    make_rows,
    make_set,
    make_settings,
    make_tokenizer,
    one_thread,
    start,
)


def train(world, place, *flags, **train_settings):
    return main(["train", *world.flags(place, *flags, **train_settings)])


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A whole run of 12 steps, as the tests' settings say."""
    place = tmp_path_factory.mktemp("run")
    assert train(world, place) == 0
    return place


def test_the_model_is_loaded_from_the_output_without_knowing_the_package(run, world):
    """In a process that has no doge_lm: the code must travel with the weights."""
    program = (
        "import sys; sys.modules['doge_lm'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(run / 'out')!r}, trust_remote_code=True)\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(run / 'out')!r}, trust_remote_code=True)\n"
        "assert model.config.use_cache\n"
        "ids = tokenizer('import', return_tensors='pt').input_ids\n"
        "print(model(ids).logits[0, -1].double().sum().item())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8", env=one_thread(), check=False
    )
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(run / "out")
    tokenizer = AutoTokenizer.from_pretrained(run / "out")
    expected = model(tokenizer("import", return_tensors="pt").input_ids).logits[0, -1].double().sum().item()
    assert float(result.stdout) == pytest.approx(expected, abs=1e-4)


def test_processes_that_read_data_do_without_transformers(world, tmp_path, monkeypatch):
    """A spawned worker imports what it is sent, and transformers takes it seconds and hundreds of megabytes."""
    loaders = []

    def kept(trainer):
        loaders.append(honest(trainer))
        return loaders[-1]

    honest = DogeTrainer.get_train_dataloader
    monkeypatch.setattr(DogeTrainer, "get_train_dataloader", kept)
    assert train(world, tmp_path, per_epoch_max_steps=1, num_train_epochs=1, dataloader_num_workers=1) == 0
    loader = loaders[0].base_dataloader  # what accelerate reads
    assert loader.num_workers == 1
    (tmp_path / "sent").write_bytes(pickle.dumps([loader.dataset, loader.collate_fn, loader.worker_init_fn]))
    program = (
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "dataset, collate, begin = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "begin and begin(0)\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
        "print(collate([dataset[0]])['input_ids'][0].tolist())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "sent")]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=one_thread(), check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == loader.collate_fn([loader.dataset[0]])["input_ids"][0].tolist()


def test_the_loss_falls_and_the_rate_follows_the_schedule(run):
    lines = log_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.4
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0  # the first step of the warm-up
    assert max(rates) == rates[1] == 3e-3  # 12 × 0.1 is one step of warm-up
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[1:]))
    assert rates[-1] > 3e-4  # the minimum is a tenth of the peak


def test_tokens_seen_equal_the_plan(run, world):
    plan, last = log_lines(run, "plan")[0], log_lines(run)[-1]
    assert last["tokens_seen"] == plan["total_tokens"] == 12 * 8 * LENGTH
    data = load_prepared(world.data)
    labels = PackedCollator(0, LENGTH)([data.train[index] for index in range(50)])["labels"]
    targets = (labels != -100).sum(dim=1).tolist()
    assert last["targets_seen"] == sum(targets[row] for row in StreamSampler([50], 96, 233))


def test_every_figure_is_logged(run):
    line = log_lines(run)[-1]
    assert line["tokens_per_second"] > 0
    plan = log_lines(run, "plan")[0]
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * plan["flops_per_token"] / plan["peak_flops"])
    assert line["grad_norm"] > 0
    assert line["epoch"] == 2.0
    evaluations = log_lines(run, "eval")
    assert [line["step"] for line in evaluations] == [5, 10, 12]
    for name in ("", "english_", "python_"):
        assert {f"eval_{name}loss", f"eval_{name}perplexity", f"eval_{name}bits_per_byte"} <= set(evaluations[-1])
    assert list((run / "log").glob("events.out.tfevents.*"))
    assert (run / "log" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_output_holds_the_last_checkpoints_and_the_settings(run):
    names = sorted(path.name for path in (run / "out").iterdir() if path.is_dir())
    assert names == ["checkpoint-12", "checkpoint-6", "checkpoint-9"]  # 3 went: save_total_limit is 3
    assert (run / "out" / "checkpoint-12" / "model.safetensors").is_file()
    saved = load_settings(run / "out" / "train_settings.yaml")
    assert saved.train.learning_rate == 3e-3
    assert not list((run / "out").glob(".tmp-*"))


@pytest.mark.parametrize("micro", [1, 8])
def test_the_batch_size_changes_neither_the_tokens_nor_the_loss(world, tmp_path, micro):
    """The loss is averaged by targets over the whole step: rows differ in targets, so a mean of means would differ."""
    places = [tmp_path / "two", tmp_path / "other"]
    for place, size in zip(places, (2, micro), strict=True):
        model = {"hidden_dropout": 0.0}
        flags = world.flags(place, model=model, per_device_train_batch_size=size, num_train_epochs=1)
        assert main(["train", *flags]) == 0
    two, other = (log_lines(place) for place in places)
    for a, b in zip(two, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert (a["tokens_seen"], a["targets_seen"]) == (b["tokens_seen"], b["targets_seen"])


def test_the_first_logged_loss_is_that_of_the_first_rows_of_the_order(world, tmp_path):
    """Recomputed with nothing of the Trainer: rows by the permutation, loss summed over targets."""
    flags = world.flags(tmp_path, model={"hidden_dropout": 0.0}, per_epoch_max_steps=1, num_train_epochs=1)
    assert main(["train", *flags]) == 0
    data = load_prepared(world.data)
    torch.manual_seed(233)
    model = DogeForCausalLM(make_settings({"hidden_dropout": 0.0}).model_config())
    rows = [data.train[index] for index in StreamSampler([50], 8, 233)]
    batch = PackedCollator(0, LENGTH, True)(rows)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits.double().log_softmax(-1)
    total = count = 0
    for b in range(8):
        for t in range(1, LENGTH):
            if labels[b, t] != -100:
                total -= logits[b, t - 1, labels[b, t]].item()
                count += 1
    assert losses(tmp_path)[1] == pytest.approx(total / count, abs=1e-5)
    assert log_lines(tmp_path)[0]["targets_seen"] == count


def test_blocks_reach_the_model_and_change_no_loss(world, tmp_path, monkeypatch):
    """Over micro-batches and evaluations; a model on a CPU takes the positions all the same."""
    settings = {"document_mask": True, "per_epoch_max_steps": 2, "num_train_epochs": 1, "dataloader_num_workers": 0}
    assert LENGTH % dataset_module._BLOCK  # so that none are made
    assert train(world, tmp_path / "without", **settings) == 0
    monkeypatch.setattr(dataset_module, "_BLOCK", LENGTH // 2)
    given = []
    documents = DogeModel._documents

    def noting(self, x_BTd, position_ids, starts, blocks):
        given.append((self.training, blocks["documents"].shape == position_ids.shape, starts is not None))
        return documents(self, x_BTd, position_ids, starts, blocks)

    monkeypatch.setattr(DogeModel, "_documents", noting)
    assert train(world, tmp_path / "with", **settings) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert set(given) == {(True, True, True), (False, True, True)}


@pytest.mark.slow
def test_two_processes_train_as_one(world, tmp_path):
    model = {"hidden_dropout": 0.0}
    settings = {"per_device_train_batch_size": "auto", "num_train_epochs": 1, "logging_steps": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *world.flags(one, model=model, **settings)]) == 0
    output = finish(start(world.flags(two, model=model, **settings), TWO_PROCESSES))
    assert "4 sequences x 1 accumulated x 2 devices" in output
    assert "broadcast_buffers" not in output  # a warning of PyTorch about a name that transformers uses
    checkpoint = list_checkpoints(two / "out")[-1]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(RunRecord.read(checkpoint).files)
    check_whole(checkpoint)
    for a, b in zip(log_lines(one), log_lines(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert (a["tokens_seen"], a["targets_seen"]) == (b["tokens_seen"], b["targets_seen"])
    for a, b in zip(log_lines(one, "eval"), log_lines(two, "eval"), strict=True):
        for key in ("eval_loss", "eval_bits_per_byte", "eval_python_bits_per_byte"):
            assert a[key] == pytest.approx(b[key], abs=2e-5)


def test_bf16_by_autocast_keeps_the_weights_in_float32(world, tmp_path):
    assert train(world, tmp_path, bf16=True, per_epoch_max_steps=2, num_train_epochs=1) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain = tmp_path / "plain"
    assert train(world, plain, per_epoch_max_steps=2, num_train_epochs=1) == 0
    assert losses(tmp_path)[1] != losses(plain)[1]
    assert losses(tmp_path)[1] == pytest.approx(losses(plain)[1], abs=0.02)


def test_gradient_checkpointing_and_a_constant_rate(world, tmp_path):
    flags = {"per_epoch_max_steps": 3, "num_train_epochs": 1}
    assert train(world, tmp_path / "a", lr_scheduler_type="constant", warmup_ratio=0.0, **flags) == 0
    assert (
        train(
            world,
            tmp_path / "b",
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            gradient_checkpointing=True,
            **flags,
        )
        == 0
    )
    assert {line["learning_rate"] for line in log_lines(tmp_path / "a")} == {3e-3}
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


def test_shorter_data_is_said_and_strict_refuses_it(world, tmp_path, capsys):
    assert train(world, tmp_path / "a", per_epoch_max_steps=7, num_train_epochs=1, save_steps=100) == 0
    assert "the data holds 6 steps an epoch, not the 7" in capsys.readouterr().out
    assert train(world, tmp_path / "b", "--strict", per_epoch_max_steps=7) == 1
    assert "the data has 50 rows, an epoch of 7 steps" in capsys.readouterr().err


def test_a_dry_run_needs_neither_data_nor_tokenizer(world, tmp_path, capsys):
    flags = world.flags(tmp_path, "--dry_run", "--dataset_path", "nowhere", "--tokenizer_path", "nowhere")
    assert main(["train", *flags]) == 0
    assert "rows of data       not looked at" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_builds_no_model_of_sizes_that_do_not_fit(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("doge_lm.training.plan.count_model", lambda config: pytest.fail("it was built"))
    assert main(["train", *world.flags(tmp_path, "--dry_run", model={"num_attention_heads": 3})]) == 1
    assert "model: num_attention_heads" in capsys.readouterr().err


def test_a_missing_dataset_says_which_commands_make_it(world, tmp_path, capsys):
    flags = world.flags(tmp_path, "--dataset_path", str(tmp_path / "none"))
    assert main(["train", *flags]) == 1
    error = capsys.readouterr().err
    for part in (str(tmp_path / "none"), "download_datasets.py", "preprocess_datasets.py", "merge_datasets.py"):
        assert part in error
    assert f"--max_len {LENGTH}" in error


def test_another_sequence_length_than_the_data_s_is_refused(world, tmp_path, capsys):
    assert train(world, tmp_path, sequence_length=64) == 1
    assert f"holds sequences of {LENGTH} tokens and sequence_length is 64" in capsys.readouterr().err


def test_a_tokenizer_of_another_size_is_refused(world, tmp_path, capsys):
    assert main(["train", *world.flags(tmp_path, model={"vocab_size": 500})]) == 1
    assert "has 400 tokens and vocab_size is 500" in capsys.readouterr().err


def test_another_tokenizer_than_the_data_s_is_refused(world, tmp_path, capsys):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=3), encoding="utf-8")
    assert len(tokenizer) == 400
    flags = world.flags(tmp_path, "--tokenizer_path", str(tmp_path / "tokenizer"))
    assert main(["train", *flags]) == 1
    assert "was made with another tokenizer" in capsys.readouterr().err


def test_a_new_run_does_not_bury_another(run, world, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "settings.yaml"}
    assert train(world, run) == 1
    error = capsys.readouterr().err
    assert "holds the checkpoints of another run (up to checkpoint-12)" in error
    assert "--resume_from_checkpoint" in error
    assert train(world, run, "--output_dir", str(tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert f"train.jsonl is the log of another run, which left nothing in {tmp_path / 'out'}" in error
    assert "--overwrite" in error
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_new_run_does_not_bury_a_model_or_a_file(world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    assert train(world, tmp_path) == 1
    assert "out holds a model" in capsys.readouterr().err
    (tmp_path / "taken").touch()
    assert train(world, tmp_path, "--output_dir", str(tmp_path / "taken" / "out")) == 1
    assert f"--output_dir {tmp_path / 'taken' / 'out'} cannot be made" in capsys.readouterr().err


def test_overwrite_starts_anew(world, tmp_path):
    short = {"num_train_epochs": 1, "per_epoch_max_steps": 4, "save_steps": 3}
    assert train(world, tmp_path, **short) == 0
    (tmp_path / "out" / ".tmp-checkpoint-9").mkdir()
    assert train(world, tmp_path, "--overwrite", **{**short, "save_steps": 2}) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert names == ["checkpoint-2", "checkpoint-4"]
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4]


SHORT = {"num_train_epochs": 1, "per_epoch_max_steps": 2, "save_steps": 100}


def test_a_run_that_ended_before_its_first_checkpoint_is_started_anew_as_the_message_says(world, tmp_path, capsys):
    log = tmp_path / "log" / "train.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 0, "kind": "plan"}\n{"step": 1, "kind": "train", "loss": 6.0}\n', encoding="utf-8")
    assert train(world, tmp_path, "--resume_from_checkpoint", **SHORT) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out'} holds no checkpoint to resume from" in error
    assert "give --overwrite in place of --resume_from_checkpoint" in error
    assert train(world, tmp_path, **SHORT) == 1
    assert "start anew with --overwrite, which removes the log" in capsys.readouterr().err
    assert train(world, tmp_path, "--overwrite", **SHORT) == 0
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]


def test_a_log_without_a_line_of_training_makes_way(world, tmp_path):
    log = tmp_path / "log" / "train.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 0, "kind": "plan"}\n', encoding="utf-8")
    assert train(world, tmp_path, **SHORT) == 0
    assert len(log_lines(tmp_path, "plan")) == 1


def test_a_diverging_run_stops_and_says_so(world, tmp_path, capsys):
    assert train(world, tmp_path, learning_rate=1e30, max_grad_norm=0.0, save_steps=100) == 1
    assert "training has diverged" in capsys.readouterr().err


def test_a_full_disk_leaves_no_checkpoint_and_names_it(world, tmp_path, capsys, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.trainer.Trainer._save_optimizer_and_scheduler", no_space)
    assert train(world, tmp_path) == 1
    error = capsys.readouterr().err
    assert "the disk is full" in error
    assert "checkpoint-3" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_disk_is_said_before_the_first_step(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert train(world, tmp_path) == 1
    assert "one checkpoint takes about 0.50 MB and only 0.00 MB are free" in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


def test_a_token_beyond_the_vocabulary_is_named(world, tmp_path, capsys, monkeypatch):
    rows = make_rows(world.tokenizer, 22)
    rows[-1]["input_ids"][-1] = 400
    monkeypatch.setattr(support, "make_rows", lambda tokenizer, count: rows)
    data = make_set(tmp_path / "set", world.tokenizer_path, world.tokenizer, train_rows=16)
    assert train(world, tmp_path, "--dataset_path", str(data), per_epoch_max_steps=2, num_train_epochs=1) == 1
    assert "holds the token id 400, but the vocabulary has 400 ids" in capsys.readouterr().err


def test_only_the_sources_of_the_test_set_are_scored(world, tmp_path):
    place = tmp_path / "set"
    make_set(place, world.tokenizer_path, world.tokenizer, train_rows=16, test_rows=1)
    flags = world.flags(tmp_path, "--dataset_path", str(place), num_train_epochs=1, per_epoch_max_steps=1)
    assert main(["train", *flags]) == 0
    line = log_lines(tmp_path, "eval")[-1]
    assert "eval_english_loss" in line
    assert "eval_python_loss" not in line


def test_a_compiled_mask_of_flex_attention_is_refused(world, tmp_path, capsys):
    flags = world.flags(tmp_path, attn_implementation="flex_attention", document_mask=True, torch_compile=True)
    assert main(["train", *flags]) == 1
    assert "set attn_implementation: sdpa" in capsys.readouterr().err


class _NoWaiting(TrainerCallback):
    """From step 3 on, the host must not wait for the GPU but where a line is logged."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        free = state.global_step >= 3 and not (control.should_log or control.should_evaluate or control.should_save)
        self.steps += free
        torch.cuda.set_sync_debug_mode("error" if free else "default")  # until the end of the next step


@pytest.mark.gpu
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_step_never_waits_for_the_gpu(world, tmp_path, monkeypatch, document_mask):
    watch = _NoWaiting()

    class WatchedTrainer(pretrain.DogeTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(watch)

    monkeypatch.setattr(pretrain, "DogeTrainer", WatchedTrainer)
    settings = {"logging_steps": 6, "eval_steps": 100, "save_steps": 100, "document_mask": document_mask}
    settings |= {"per_device_train_batch_size": 8}  # 256 tokens: enough for every kernel
    try:
        assert train(world, tmp_path, bf16=True, torch_compile=True, **settings) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.steps >= 5


@pytest.mark.gpu
def test_cuda_graphs_change_no_loss(world, tmp_path):
    """Over two micro-batches a step, whose gradients a graph writes into the same memory each time."""
    settings = {"bf16": True, "torch_compile": True, "eval_steps": 6, "model": {"hidden_dropout": 0.0}}
    settings |= {"sequences_per_step": 16, "per_device_train_batch_size": 8}  # 256 tokens: enough for every kernel
    settings |= {"per_epoch_max_steps": 3, "num_train_epochs": 4}
    found = []
    for graphs in (True, False):
        place = tmp_path / str(graphs)
        assert train(world, place, cuda_graphs=graphs, **settings) == 0
        found.append(losses(place))
    assert found[0] == pytest.approx(found[1], abs=2e-3)
    assert len(found[0]) == 12


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(world, tmp_path, graphs):
    """Over two micro-batches a step, of which only the last one's gradients travel, and more of them than 1 MiB.

    They travel in two parts then, and the compiled model is cut between them.
    """
    model = {"hidden_dropout": 0.0, "cross_domain_intermediate_size": 4096, "tie_word_embeddings": True}
    settings = {"bf16": True, "torch_compile": True, "eval_steps": 6, "model": model}
    settings |= {"sequences_per_step": 32, "per_epoch_max_steps": 1, "num_train_epochs": 12, "logging_steps": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(world, one, per_device_train_batch_size=16, cuda_graphs=False, **settings) == 0
    flags = world.flags(two, per_device_train_batch_size=8, cuda_graphs=graphs, **settings)
    output = finish(start(flags, TWO_PROCESSES))
    assert "8 sequences x 2 accumulated x 2 devices" in output
    found = re.search(r"parameters +([\d,]+) total", output)
    assert found is not None
    assert 4 * int(found[1].replace(",", "")) > 2**20
    assert losses(two) == pytest.approx(losses(one), abs=2e-3)
    assert len(losses(two)) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_implementation": "flex_attention", "torch_compile": True}, "flex_attention with document_mask: true"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: flash_attention_2 cannot be used here"),
    ],
)
def test_what_cannot_run_costs_no_earlier_run(world, tmp_path, capsys, changes, message):
    settings = {"per_epoch_max_steps": 1, "num_train_epochs": 1, "save_steps": 1, "document_mask": True}
    assert train(world, tmp_path, **settings) == 0
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert main(["train", *world.flags(tmp_path, **settings, **changes), "--overwrite"]) == 1
    assert message in capsys.readouterr().err
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert after >= set(before)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("device", "processes", "changes", "obstacle"),
    [
        ("cuda", 1, {}, None),
        ("cpu", 1, {}, "the device is cpu"),
        ("cuda", 2, {}, None),
        ("cuda", 1, {"torch_compile": False}, "the model is not compiled"),
        ("cuda", 1, {"attn_implementation": "flash_attention_2"}, "attn_implementation is flash_attention_2"),
    ],
)
def test_cuda_graphs_where_there_can_be_some(monkeypatch, device, processes, changes, obstacle):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    hardware = Hardware(torch.device(device), "the tests' own", 2**34)
    found = {}
    for wanted in ("auto", True, False):
        settings = make_settings(**{"torch_compile": True, "cuda_graphs": wanted, **changes})
        if wanted is True and obstacle is not None:
            with pytest.raises(UserError, match=f"cuda_graphs: true is not possible: {obstacle}"):
                Machine.settle(settings.train, settings.model_config(), hardware)
        else:
            found[wanted] = Machine.settle(settings.train, settings.model_config(), hardware).graphs
    assert found == {"auto": obstacle is None, False: False, **({} if obstacle else {True: True})}


def test_attention_without_gradients_is_refused(world, tmp_path, capsys):
    assert train(world, tmp_path, attn_implementation="flex_attention", document_mask=False) == 1
    assert "set attn_implementation: sdpa" in capsys.readouterr().err


def test_a_path_that_is_too_long_for_sockets_is_refused(world, tmp_path, capsys, monkeypatch):
    """Processes that read data would hang."""
    place = f"/tmp/{'x' * 80}"
    monkeypatch.setattr(tempfile, "tempdir", place)
    assert train(world, tmp_path, dataloader_num_workers=1) == 1
    error = capsys.readouterr().err
    assert place in error
    assert "set TMPDIR" in error
    settings = make_settings(dataloader_num_workers=0)
    Machine.settle(settings.train, settings.model_config(), Hardware(torch.device("cpu"), "the tests' own", 2**34))


def test_kernels_for_a_gpu_are_refused_on_a_cpu(world, tmp_path, capsys):
    assert train(world, tmp_path, model={"cdmoe_path": "sparse"}) == 1
    assert "set cdmoe_path: auto" in capsys.readouterr().err
