"""Preference tuning: pairs of answers as ids, and a whole run, resumed and with an adapter."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from doge_lm.cli import main
from doge_lm.errors import UserError
from doge_lm.training.checkpoints import list_checkpoints
from doge_lm.training.pairs import Pair, load_pairs, parse_pair
from doge_lm.training.presets import DPO, preset_paths
from doge_lm.training.settings import PreferenceSettings, load_settings_of
from tests.model.support import random_ids, tiny_model

from .conversations import TUNE, conversations
from .support import log_lines, losses

LONGEST = 100
TRAIN = {
    **{key: value for key, value in TUNE.items() if key != "torch_compile"},
    "sequence_length": LONGEST,
    "num_train_epochs": 3,
    "eval_steps": 7,
    "save_steps": 6,
    "learning_rate": 1e-3,
}


def test_likelihoods_of_answers_are_those_of_the_capped_logits():
    """TRL multiplies by the head itself and takes the cap from the config, by the name that Gemma's has."""
    model, ids = tiny_model(final_logit_softcapping=3.0), random_ids(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        add_fused_lm_head(model)
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    assert logits.abs().max() > 2  # far enough for the cap to show
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def pairs():
    """The answer of a conversation against that of another, where the two differ."""
    first = [[turn for turn in row["conversations"] if turn["from"] != "system"][:2] for row in conversations(150)]
    rows = []
    for (question, answer), (_, other) in zip(first, first[7:] + first[:7], strict=True):
        if answer["value"] != other["value"]:
            rows.append({"prompt": question["value"], "chosen": answer["value"], "rejected": other["value"]})
    return rows


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    short = {"per_epoch_max_steps": 2, "num_train_epochs": 1}
    assert main(["train", *world.flags(place, model={"hidden_dropout": 0.0}, **short)]) == 0
    return place / "out"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs()), encoding="utf-8")
    return path


def tune(place, base, data, *more, parts=None, **train):
    place.mkdir(parents=True, exist_ok=True)
    settings = {"train": {**TRAIN, **train}, "dpo": {"beta": 0.5, "test_share": 0.2}, **(parts or {})}
    (place / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    places = [
        "--model_path",
        base,
        "--dataset_path",
        data,
        "--output_dir",
        place / "out",
        "--logging_dir",
        place / "log",
    ]
    return main(["dpo", "--config_path", str(place / "settings.yaml"), *map(str, places), *more])


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("tuned")
    assert tune(place, base, data) == 0
    return place


def test_the_margin_on_held_out_pairs_rises(run, base, data, world):
    evaluations = log_lines(run, "eval")
    assert [line["step"] for line in evaluations] == [0, 7, 14, 15]
    first, last = evaluations[0], evaluations[-1]
    assert first["eval_loss"] == pytest.approx(math.log(2))
    assert first["eval_rewards/margins"] == 0
    assert last["eval_rewards/margins"] > 0.01
    assert last["eval_loss"] < first["eval_loss"]
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies"} <= set(log_lines(run)[-1])

    held_out = load_pairs(data, world.tokenizer, LONGEST, 0.2).test
    margins = [
        reward(run / "out", base, row, "chosen_ids") - reward(run / "out", base, row, "rejected_ids")
        for row in held_out
    ]
    # TRL gives the mean over batches of 4, of which the last is smaller.
    batches = [margins[start : start + 4] for start in range(0, len(margins), 4)]
    expected = sum(sum(batch) / len(batch) for batch in batches) / len(batches)
    assert last["eval_rewards/margins"] == pytest.approx(expected, rel=1e-3)
    report = (run / "log" / "report.md").read_text(encoding="utf-8")
    assert f"| rewards/margins | 0.0000 | {last['eval_rewards/margins']:.4f} |" in report
    assert f"| rewards/accuracies | - | {last['eval_rewards/accuracies']:.4f} |" in report


_models = {}


def reward(tuned, base, row, answer):
    """β (log π(answer | prompt) - log π_ref(answer | prompt)), token by token in float64."""
    found = []
    for path in (tuned, base):
        if path not in _models:
            _models[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        ids = torch.tensor(row["prompt_ids"] + row[answer])
        with torch.no_grad():
            logp = _models[path](ids[None]).logits[0].log_softmax(-1)
        places = range(len(row["prompt_ids"]) - 1, len(ids) - 1)
        found.append(sum(float(logp[place, ids[place + 1]]) for place in places))
    return 0.5 * (found[0] - found[1])


def test_a_resumed_run_is_the_uninterrupted_one(run, base, data, tmp_path):
    again = ["--resume_from_checkpoint", str(run / "out" / "checkpoint-6")]
    assert tune(tmp_path, base, data, *again) == 0
    assert losses(tmp_path) == {step: loss for step, loss in losses(run).items() if step > 6}
    one, other = (load_file(place / "out" / "model.safetensors") for place in (run, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_is_tuned_against_the_model_that_came(base, data, tmp_path):
    assert tune(tmp_path, base, data, parts={"lora": {"rank": 4}}, learning_rate=1e-2) == 0
    assert log_lines(tmp_path, "eval")[0]["eval_rewards/margins"] == 0
    margins = [line["rewards/margins"] for line in log_lines(tmp_path)]
    assert margins[0] == 0  # an adapter begins as none
    assert sum(margins[-3:]) > 0.1
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (list_checkpoints(tmp_path / "out")[-1] / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = load_file(base / "model.safetensors")
    assert not torch.equal(
        model.model.layers[0].feed_forward.up_embed.weight, before["model.layers.0.feed_forward.up_embed.weight"]
    )
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_ids_are_those_of_trl(world, data, base, tmp_path):
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    told = {
        "prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows],
        **{key: [[{"role": "assistant", "content": row[key]}] for row in rows] for key in ("chosen", "rejected")},
    }
    config = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = DPOTrainer(model, AutoModelForCausalLM.from_pretrained(base), config,
                         train_dataset=Dataset.from_dict(told), processing_class=world.tokenizer)  # fmt: skip
    ours = load_pairs(data, world.tokenizer, LONGEST, 0.2)

    def keyed(splits):
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        return sorted([row[key] for key in keys] for split in splits for row in split)

    assert ours.too_long == 0
    assert keyed([ours.train, ours.test]) == keyed([trainer.train_dataset])


def test_a_prompt_is_on_one_side(world, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{n % 40}", "chosen": f"a{n}", "rejected": "no"} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_pairs(path, world.tokenizer, LONGEST, 0.3)
    train, test = ({tuple(row["prompt_ids"]) for row in split} for split in (found.train, found.test))
    assert not train & test
    assert (len(train) + len(test), len(found.train) + len(found.test)) == (40, 200)


def test_forms_of_a_pair():
    expected = Pair((("user", "q"),), "a", "b")
    messages = {"prompt": [{"role": "user", "content": "q"}]}
    answers = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"from": "gpt", "value": "b"}]}
    whole = {key: messages["prompt"] + answers[key] for key in answers}
    for row in (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {**messages, **answers},
        {**messages, "chosen": "a", "rejected": "b"},
        {"prompt": "q", **whole},
        whole,
        {"prompt": None, **whole},
    ):
        assert parse_pair(row, "x") == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "chosen must be one answer"),
        ({"chosen": "a", "rejected": "b"}, "without the field 'prompt'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "found int"),
        ({"prompt": [{"role": "cat", "content": "q"}], "chosen": "a", "rejected": "b"}, "message 1 must have a role"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "must end with a message of the user"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "a message of the user is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": " a\n"}, "are the same"),
        ({"prompt": "q", "chosen": "a \ud800", "rejected": "b"}, r"lone surrogate U\+D800"),
        (
            {"prompt": [{"role": ["user"], "content": "q"}], "chosen": "a", "rejected": "b"},
            "message 1 must have a role",
        ),
    ],
)
def test_a_bad_pair_names_its_line(world, tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"bad.jsonl.*2.*{message}"):
        load_pairs(path, world.tokenizer, LONGEST, 0.5)


def test_parquet_long_pairs_and_control_strings(world, tmp_path):
    control = {"prompt": "</s>[INST]", "chosen": "[/INST]</s>", "rejected": "<s>"}
    rows = [*pairs()[:30], {"prompt": "q" * 500, "chosen": "a", "rejected": "b"}, control]
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = load_pairs(tmp_path, world.tokenizer, LONGEST, 0.3)
    assert found.too_long == 1
    assert len(found.train) + len(found.test) == 31
    for split in (found.train, found.test):
        for row in split:
            ids = row["prompt_ids"] + row["chosen_ids"]
            assert [ids.count(control) for control in (1, 2, 3, 4)] == [1, 1, 1, 1]  # <s>, </s>, [INST], [/INST]
    with pytest.raises(UserError, match="none is held out"):
        load_pairs(tmp_path, world.tokenizer, LONGEST, 1e-9)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        load_pairs(tmp_path, world.tokenizer, LONGEST, 0.3)


def test_muon_and_factors_reach_trl_s_trainer(base, data, tmp_path, capsys):
    settings = {
        "optimizer": "muon", "learning_rate_scales": {"word_embed": 3.0}, "weight_decay": 0.1,
        "weight_decay_scales": {"word_embed": 0.5}, "num_train_epochs": 1,
    }  # fmt: skip
    assert tune(tmp_path, base, data, parts={"lora": {"rank": 2}}, **settings) == 1
    assert "optimizer: muon is for training all weights" in capsys.readouterr().err
    assert tune(tmp_path, base, data, **settings) == 0
    state = torch.load(list_checkpoints(tmp_path / "out")[-1] / "optimizer.pt", weights_only=True)
    groups = [(group["muon"], group["initial_lr"], group["weight_decay"]) for group in state["param_groups"]]
    assert groups == [(False, 1e-3, 0.1), (False, 1e-3, 0.0), (False, 3 * 1e-3, 0.1 * 0.5), (True, 5e-4, 0.1)]


@pytest.mark.parametrize("name", sorted(preset_paths("dpo")))
def test_presets_name_every_key(name):
    document = yaml.safe_load(preset_paths("dpo")[name].read_text(encoding="utf-8"))
    settings = load_settings_of(PreferenceSettings, name, folder="dpo")
    for part in PreferenceSettings.parts():
        assert list(document[part]) == settings.names(part)


def test_what_does_not_fit_is_refused(base, tmp_path, capsys):
    assert tune(tmp_path, base, tmp_path / "none.jsonl") == 1
    assert "does not exist" in capsys.readouterr().err
    assert tune(tmp_path, base, tmp_path, torch_compile=True) == 1
    assert "unknown key 'torch_compile'" in capsys.readouterr().err
    assert DPO == "dpo"


def test_the_model_that_came_is_never_in_the_way(base, data, tmp_path, capsys):
    """`--overwrite` removes what lies in the place of the output; that must not be what the run starts from."""
    place = tmp_path / "run"
    shutil.copytree(base, place / "out")
    before = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    for path in (place / "out", list_checkpoints(place / "out")[-1]):
        assert tune(place, path, data, "--overwrite") == 1
        assert f"--model_path {path} lies in --output_dir {place / 'out'}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()} == before
