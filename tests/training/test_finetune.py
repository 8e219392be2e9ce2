"""Fine-tuning on conversations: what is trained on, and a whole run, resumed and with adapters."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
import zstandard
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from doge_lm.cli import main
from doge_lm.data.dataset import PackedCollator, TrainingRows, load_prepared
from doge_lm.data.tokenizer import build_tokenizer, load_tokenizer
from doge_lm.errors import UserError
from doge_lm.model.modeling_doge import DogeForCausalLM
from doge_lm.training import finetune as module
from doge_lm.training.answers import PROMPTS
from doge_lm.training.checkpoints import list_checkpoints
from doge_lm.training.presets import preset_paths
from doge_lm.training.settings import FinetuneSettings, load_settings_of
from doge_lm.training.tuning import load_base
from tests.model.support import tiny_model

from . import support
from .conversations import LENGTH, TUNE, conversations, make_conversations
from .support import TWO_PROCESSES, finish, log_lines, losses


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A model of a few steps of pre-training."""
    place = tmp_path_factory.mktemp("base")
    assert (
        main(["train", *world.flags(place, per_epoch_max_steps=2, num_train_epochs=1, model={"hidden_dropout": 0.0})])
        == 0
    )
    return place / "out"


@pytest.fixture(scope="module")
def data(world, tmp_path_factory):
    return make_conversations(tmp_path_factory.mktemp("talk") / "data", world.tokenizer_path)


def flags(place, base, data, *more, lora=None, **train):
    place.mkdir(parents=True, exist_ok=True)
    settings = {"train": {**TUNE, **train}, "lora": lora or {}}
    (place / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return [
        *("--config_path", str(place / "settings.yaml"), "--model_path", str(base), "--dataset_path", str(data)),
        *("--output_dir", str(place / "out"), "--logging_dir", str(place / "log"), *more),
    ]


def tune(place, base, data, *more, **settings):
    return main(["finetune", *flags(place, base, data, *more, **settings)])


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("tuned")
    assert tune(place, base, data) == 0
    return place


def test_held_out_loss_falls_and_is_known_before(run, base, data):
    evaluations = log_lines(run, "eval")
    assert [line["step"] for line in evaluations] == [0, 5, 10]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.3
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    nll, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in spans_of(load_prepared(data).test):  # conversation by conversation, with no packing
        targets = torch.tensor(labels[1:])
        logits = model(torch.tensor([ids])).logits[0, :-1]
        kept = targets != -100
        nll += torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum")
        count += int(kept.sum())
    assert evaluations[0]["eval_loss"] == pytest.approx(float(nll) / count, rel=1e-5)


def spans_of(rows):
    """Ids and labels of each piece of packed rows."""
    batch = PackedCollator(0, LENGTH)([rows[index] for index in range(len(rows))])
    for index, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        ends = np.cumsum(rows[index]["document_lengths"]).tolist()
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            yield ids[start:end], labels[start:end]


def test_the_report_holds_ten_prompts_and_both_losses(run):
    text = (run / "log" / "report.md").read_text(encoding="utf-8")
    assert len(PROMPTS) == 10
    assert all(f"**{prompt}**" in text for prompt in PROMPTS)
    evaluations = log_lines(run, "eval")
    assert f"| all | {evaluations[0]['eval_loss']:.4f} | {evaluations[-1]['eval_loss']:.4f} |" in text
    assert text.count("\nbefore:\n") == text.count("\nafter:\n") == 10


def test_what_is_left_is_a_model_as_of_pre_training(run):
    model = AutoModelForCausalLM.from_pretrained(run / "out")
    assert isinstance(model, DogeForCausalLM)
    assert model.config.use_cache
    assert "trl" not in json.dumps(json.loads((run / "out" / "config.json").read_text()))
    assert not (run / "out" / "README.md").exists()
    saved = load_settings_of(FinetuneSettings, run / "out" / "train_settings.yaml")
    assert saved.train.learning_rate == TUNE["learning_rate"]
    assert [path.name for path in list_checkpoints(run / "out")] == ["checkpoint-4", "checkpoint-8", "checkpoint-10"]
    assert main(["generate", str(run / "out"), "What", "--max_new_tokens", "3"]) == 0


def test_tokenizer_and_data_still_fit_a_tuned_model(run, data, tmp_path):
    """The tokenizer of a model is that of its data, byte for byte, however often it is tuned."""
    assert tune(tmp_path, run / "out", data, per_epoch_max_steps=1, num_train_epochs=1) == 0


def test_a_resumed_run_is_the_uninterrupted_one(run, base, data, tmp_path):
    class StoppedError(Exception):
        pass

    class Stopping(module.FinetuneTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 6:
                raise StoppedError
            return super().training_step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FinetuneTrainer", Stopping)
        with pytest.raises(StoppedError):
            tune(tmp_path, base, data)
    assert tune(tmp_path, base, data, "--resume_from_checkpoint") == 0
    assert losses(tmp_path) == losses(run)
    assert [line["step"] for line in log_lines(tmp_path, "eval")] == [0, 5, 10]
    one, other = (load_file(place / "out" / "model.safetensors") for place in (run, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_trained_resumed_and_merged(base, data, tmp_path):
    lora = {"rank": 4, "alpha": 8}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"lora": lora, "learning_rate": 3e-2}
    assert tune(whole, base, data, **settings) == 0
    evaluations = log_lines(whole, "eval")
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.04
    adapter = load_file(whole / "out" / "adapter" / "adapter_model.safetensors")
    kinds = {name.split(".")[-3 if name.endswith("weight") else -2] for name in adapter}
    assert kinds >= {"q_proj", "queries", "down_embed", "up_embed", "shared_up_proj"}
    assert all(bool(weight.any()) for weight in adapter.values())  # B starts at 0: all of them learn

    before, after = (load_file(place / "model.safetensors") for place in (base, whole / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == set(FinetuneSettings().lora.names) - {"shared_gate_proj"}

    for checkpoint in list_checkpoints(whole / "out"):
        assert not (checkpoint / "model.safetensors").exists()  # the adapter alone
    stopped = ["--resume_from_checkpoint", str(whole / "out" / "checkpoint-4")]
    assert tune(parts, base, data, *stopped, **settings) == 0
    assert {step: loss for step, loss in losses(whole).items() if step > 4} == losses(parts)
    again = load_file(parts / "out" / "model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)
    # Of a run without adapters in the same place, none stays beside its model.
    assert tune(parts, base, data, "--overwrite", per_epoch_max_steps=1, num_train_epochs=1) == 0
    assert not (parts / "out" / "adapter").exists()


@pytest.mark.slow
def test_two_processes_tune_as_one(base, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"per_device_train_batch_size": "auto", "lora": {"rank": 4}}
    assert tune(one, base, data, **settings) == 0
    output = finish(support.start(flags(two, base, data, **settings), TWO_PROCESSES, "finetune.py"))
    assert "2 sequences x 1 accumulated x 2 devices" in output
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    merged = [load_file(place / "out" / "model.safetensors") for place in (one, two)]
    for name, weight in merged[0].items():
        torch.testing.assert_close(merged[1][name], weight, atol=1e-4, rtol=1e-4)


def test_the_loss_is_that_of_trl(base, data, tmp_path):
    found = []

    class Watched(module.FinetuneTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if not found:
                plain = AutoModelForCausalLM.from_pretrained(base)
                whole = {
                    name: value for name, value in inputs.items() if name in ("input_ids", "labels", "position_ids")
                }
                trl = trl_loss(plain, whole)
                found.append((float(super().compute_loss(model, inputs)), trl))
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FinetuneTrainer", Watched)
        assert tune(tmp_path, base, data, per_epoch_max_steps=1, num_train_epochs=1) == 0
    ours, trl = found[0]
    assert ours == pytest.approx(trl, rel=1e-5)


def trl_loss(model, inputs):
    """Of a batch that TRL itself has collated: each conversation of the rows in a sequence of its own."""
    rows = []
    for ids, labels, positions in zip(
        *(inputs[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True
    ):
        starts = [index for index, position in enumerate(positions) if position == 0]
        rows += [
            {"input_ids": ids[start:end], "labels": labels[start:end]}
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
            if any(label != -100 for label in labels[start:end])
        ]
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    config = SFTConfig("unused", dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, **plain)
    tokenizer = load_tokenizer(model.name_or_path)
    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return float(trainer.compute_loss(model, trainer.data_collator(rows)))


def trained_words(batch, tokenizer):
    """What stretches of targets spell, and the ids before and behind each."""
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        start = None
        for index, label in enumerate([*labels, -100]):
            if label != -100 and start is None:
                start = index
            if label == -100 and start is not None:
                stretch = ids[start:index]
                assert labels[start:index] == stretch
                yield ids[start - 1], stretch, tokenizer.decode(stretch, skip_special_tokens=True)
                start = None


def test_every_token_trained_on_is_an_assistants(world, data):
    rows = load_prepared(data)
    check_targets([rows.train, rows.test], world.tokenizer, conversations(), LENGTH, whole=True)


def test_so_it_is_over_the_whole_mini_set(tmp_path, shared_data):
    tokenizer_path = tmp_path / "tokenizer"
    build_tokenizer(tokenizer_path)
    files = {name: shared_data / "mini" / f"{name}.jsonl.zst" for name in ("instruct_en", "instruct_zh")}
    where = ["--datasets_dir", str(tmp_path), "--save_dir", str(tmp_path)]
    local = [part for name, path in files.items() for part in ("--local", f"{name}={path}")]
    assert main(["download_datasets", "--save_dir", str(tmp_path), *local]) == 0
    assert main(["preprocess_datasets", *where, "--tokenizer_path", str(tokenizer_path)]) == 0
    assert main(["merge_datasets", *where, "--test_size", "2"]) == 0
    rows = load_prepared(tmp_path / "finetune")
    talks = [row for path in files.values() for row in read_lines(path)]
    spelled = check_targets([rows.train, rows.test], load_tokenizer(tokenizer_path), talks, 2048, whole=False)
    assert len(spelled) > 1000


def read_lines(path):
    with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def check_targets(splits, tokenizer, talks, length, whole):
    """Every stretch of targets is an answer with its end, and every answer is one of them."""
    said = ["\n".join(answers) for answers in joined(talks)]
    expected = set(said)
    spelled = []
    open_, end = (tokenizer.convert_tokens_to_ids(token) for token in ("[/INST]", "</s>"))
    for split in splits:
        batch = PackedCollator(0, length)(TrainingRows(split).__getitems__(list(range(len(split)))))
        for before, ids, text in trained_words(batch, tokenizer):
            answers = text if before == open_ else None
            if ids[-1] == end and answers is not None:
                assert text in expected, text
            else:  # cut between two samples
                assert any(text.strip() in answer for answer in expected), text
            spelled.append(text)
    if whole:
        assert sorted(text for text in spelled) == sorted(said)
    return spelled


def joined(talks):
    """Answers as they are trained on: those that follow one another are one."""
    for talk in talks:
        run = []
        for turn in talk["conversations"]:
            if turn["from"] == "gpt":
                run += [turn["value"]] if turn["value"].strip() else []
            elif run:
                yield run
                run = []
        if run:
            yield run


@pytest.mark.parametrize("blocks", [False, True], ids=["mask", "blocks"])
def test_conversations_in_a_sample_know_nothing_of_each_other(base, data, blocks):
    """Another conversation in front changes no logit of one behind it, nor any of its gradients."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).train()
    row = max(load_prepared(data).train, key=lambda row: len(row["document_lengths"]))
    assert len(row["document_lengths"]) > 2
    batch = PackedCollator(0, LENGTH, document_mask=True, document_blocks=blocks)([row])  # the trainer's has blocks
    where = np.cumsum([0, *row["document_lengths"]]).tolist()
    begin, end = where[-2], where[-1]
    packed = model(**batch, use_cache=False).logits[0, begin:end]
    ids = batch["input_ids"][:, begin:end]
    alone = model(ids, use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)

    gradients = []
    for logits in (packed, alone):
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["doge_tiny", "doge_25M", "doge_80M", "doge_200M", "doge_320M", "doge_450M"])
def test_presets_name_every_key(name):
    path = preset_paths("finetune")[name]
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = load_settings_of(FinetuneSettings, name, folder="finetune")
    for part in FinetuneSettings.parts():
        assert list(document[part]) == settings.names(part)
    assert f"Doge-{name.removeprefix('doge_')} " in path.read_text(encoding="utf-8")


def test_adapters_of_a_model_with_options(tmp_path):
    """They change what the model has: its gate, and no queries."""
    tiny_model(shared_gate=True, router_queries=False).save_pretrained(tmp_path)
    settings = FinetuneSettings()
    settings.lora.rank = 2
    adapted = load_base(tmp_path, settings.train, settings.lora)
    trained = {
        name.partition(".lora_")[0].split(".")[-1]
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert trained == set(settings.lora.names) - {"queries"}


def test_what_does_not_fit_is_refused(world, base, data, tmp_path, capsys):
    def refused(*arguments, message, **settings):
        assert tune(tmp_path / "refused", *arguments, **settings) == 1
        error = capsys.readouterr().err
        assert message in error, error
        assert not (tmp_path / "refused" / "out").exists()

    refused(tmp_path, data, message="holds no model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, data, message="holds a model of the type 'llama'")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, data, message="config.json is damaged")
    refused(base, world.data, message="a set of the kind 'pretrain'")
    refused(base, tmp_path / "none", message="does not exist")
    refused(base, data, message="unknown key 'stream'", stream="x")
    refused(base, data, message="targets must be some of: q_proj", lora={"targets": "lm_head"})
    targets = {"rank": 2, "targets": "shared_gate_proj"}
    refused(base, data, message="the model has none of shared_gate_proj", lora=targets)
    refused(base, data, message="lazy_expert_rows", lora={"rank": 2}, lazy_expert_rows=True)
    refused(base, data, message="optimizer: muon is for training all weights", lora={"rank": 2}, optimizer="muon")
    # With adapters the embedding is not trained.
    scales = {"word_embed": 2}
    for key in ("learning_rate_scales", "weight_decay_scales"):
        message = f"{key}: nothing takes its factor from 'word_embed'"
        refused(base, data, message=message, lora={"rank": 2}, **{key: scales})
    message = "weight_decay_scales: 'norm' gives its factor only to parameters that have no weight decay"
    refused(base, data, message=message, weight_decay_scales={"norm": 0.5})
    refused(base, data, message="sequence_length is 32", sequence_length=32)


def test_another_base_or_kind_is_not_resumed(run, base, data, tmp_path, capsys):
    last = ["--resume_from_checkpoint", str(run / "out" / "checkpoint-4")]
    assert tune(tmp_path / "a", run / "out", data, *last) == 1
    assert "base_sha256 is" in capsys.readouterr().err
    pretraining = list_checkpoints(base)[-1]
    assert tune(tmp_path / "b", base, data, "--resume_from_checkpoint", str(pretraining)) == 1
    assert "another kind of training" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_alone(base, data, tmp_path, capsys):
    assert tune(tmp_path, base, data, "--dry_run", per_epoch_max_steps=None) == 0
    assert "within documents" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_nothing_is_known_of_steps_without_data(tmp_path):
    with pytest.raises(UserError, match="per_epoch_max_steps"):
        load_settings_of(FinetuneSettings, "doge_tiny", ["per_epoch_max_steps=0"], "finetune")


def test_an_identity_prompt_is_a_setting_of_the_data(world, tmp_path, capsys):
    make_conversations(tmp_path / "d", world.tokenizer_path)
    where = ["--datasets_dir", str(tmp_path / "d"), "--save_dir", str(tmp_path / "d")]
    command = ["preprocess_datasets", *where, "--tokenizer_path", str(world.tokenizer_path), "--max_len", str(LENGTH)]
    prompt = ["--system_prompt", "I am Doge."]
    assert main([*command, *prompt]) == 1  # as made with other settings
    assert "system_prompt" in capsys.readouterr().err
    assert main([*command, *prompt, "--overwrite"]) == 0
    assert main(["merge_datasets", *where, "--test_size", "6", "--overwrite"]) == 0
    rows = load_prepared(tmp_path / "d" / "finetune")
    spelled = world.tokenizer.decode(
        [token for index in range(len(rows.train)) for token in rows.train[index]["input_ids"]]
    )
    assert spelled.count("I am Doge.") > 40
    check_targets([rows.train, rows.test], world.tokenizer, conversations(), LENGTH, whole=True)
    for wrong, message in (
        (["--system_prompt", " "], "nothing but blanks"),
        (["--system_prompt_share", "0.5"], "needs a --system_prompt"),
        ([*prompt, "--system_prompt_share", "2"], "at most 1"),
    ):
        assert main([*command, *wrong]) == 1
        assert message in capsys.readouterr().err


def test_a_model_says_how_long_its_texts_were(run, base, data, tmp_path):
    """Of pre-training and of tuning, the longer ones: chat and server let a model see no more."""
    tokenizer = AutoTokenizer.from_pretrained(run / "out")
    assert tokenizer.model_max_length == LENGTH
    longer = tmp_path / "base"
    shutil.copytree(base, longer)
    config = json.loads((longer / "tokenizer_config.json").read_text(encoding="utf-8"))
    (longer / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 3 * LENGTH}))
    assert tune(tmp_path, longer, data, per_epoch_max_steps=1, num_train_epochs=1) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 3 * LENGTH
