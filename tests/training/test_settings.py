import json
import re

import pytest
import yaml

from doge_lm.errors import UserError
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.training.presets import preset_paths
from doge_lm.training.settings import (
    ModelSettings,
    TrainSettings,
    apply_override,
    find_preset,
    load_settings,
    parse_settings,
)

from .support import ROOT, make_settings

PUBLISHED = {
    "dataset_path",
    "num_train_epochs",
    "per_epoch_max_steps",
    "accumulate_steps",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "min_lr_rate",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "bf16",
    "max_grad_norm",
}

# Design, section 2: layers, d, heads, n, d_cross, e, N, H, k.
SIZES = {
    "doge_25M": (8, 256, 2, 2, 1024, 256, 256, 1, 2),
    "doge_80M": (12, 512, 4, 4, 2048, 512, 512, 1, 2),
    "doge_200M": (16, 768, 6, 6, 3072, 768, 768, 2, 4),
    "doge_320M": (16, 1024, 8, 8, 4096, 1024, 1024, 2, 4),
    "doge_450M": (24, 1024, 8, 8, 4096, 1024, 1024, 2, 4),
}
# Epochs, steps an epoch, sequences a step, peak learning rate.
RECIPES = {
    "doge_25M": (2, 4000, 128, 8e-4),
    "doge_80M": (2, 8000, 256, 6e-4),
    "doge_200M": (2, 16000, 512, 5e-4),
    "doge_320M": (2, 16000, 512, 4e-4),
    "doge_450M": (2, 32000, 1024, 4e-4),
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_hold_the_design_s_values(name):
    settings = load_settings(name)
    model, train = settings.model, settings.train
    assert SIZES[name] == (
        model.num_hidden_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_inner_values,
        model.cross_domain_intermediate_size,
        model.private_expert_intermediate_size,
        model.num_cdmmoe_experts,
        model.num_cdmmoe_heads,
        model.num_cdmmoe_experts_per_head,
    )
    assert RECIPES[name] == (
        train.num_train_epochs,
        train.per_epoch_max_steps,
        train.sequences_per_step,
        train.learning_rate,
    )
    assert (model.vocab_size, model.hidden_act, model.hidden_bias) == (32768, "silu", False)
    assert (model.max_position_embeddings, model.rope_theta, model.inner_values_retrieval_size) == (16384, 10000.0, 128)
    assert (model.pad_token_id, model.bos_token_id, model.eos_token_id) == (0, 1, 2)
    assert (train.sequence_length, train.seed, train.bf16, train.max_grad_norm) == (2048, 233, True, 1.0)
    assert (train.warmup_ratio, train.weight_decay, train.min_lr_rate) == (0.1, 0.01, 0.1)
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert train.dataset_path == "./datasets/pretrain"


def test_there_are_the_eight_presets():
    assert set(preset_paths()) == {*SIZES, "doge_tiny", "doge2_25M", "doge2_80M"}


@pytest.mark.parametrize("size", ["25M", "80M"])
def test_what_a_preset_takes_from_evidence_cites_rows_that_are_recorded(size):
    """Each key in which a doge2 departs from the doge of its size, but for those that follow from another."""
    follows = {
        *("embedding_multiplier", "cross_domain_intermediate_size", "private_expert_intermediate_size"),
        *("per_epoch_max_steps", "eval_steps", "save_steps"),
    }
    published, better = (load_settings(name).to_dict() for name in (f"doge_{size}", f"doge2_{size}"))
    departs = {key for part in better for key, value in better[part].items() if value != published[part][key]}
    text = preset_paths()[f"doge2_{size}"].read_text(encoding="utf-8")
    cited = dict(re.findall(r"^  (\w+): .*\(([^()]*\d[^()]*)\)$", text, re.M))
    assert set(cited) == departs - follows
    results = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"))
    records = [json.loads(line) for line in results.splitlines()]
    recorded = {str(record.get("row")) for record in records}
    finished = {str(record.get("row")) for record in records if "eval_loss" in record}
    for key, evidence in cited.items():
        known = recorded if "training loss" in evidence else finished
        assert set(re.findall(r"\d+", evidence)) <= known, key


@pytest.mark.parametrize("name", preset_paths())
def test_every_preset_gives_every_key_and_comments_it(name):
    path = preset_paths()[name]
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(document["model"]) == set(vars(ModelSettings()))
    assert set(document["train"]) == set(vars(TrainSettings()))
    for line in path.read_text(encoding="utf-8").split("\n"):
        if re.match(r"  \w+:", line):
            assert re.search(r" # \S", line), f"{path.name}: no comment: {line}"


def test_the_published_keys_are_train_keys():
    assert set(vars(TrainSettings())) >= PUBLISHED


def test_settings_survive_yaml():
    settings = make_settings(learning_rate=1e-5, save_total_limit=None, accumulate_steps="auto")
    again = parse_settings(yaml.safe_load(settings.to_yaml()), "again")
    assert again.to_dict() == settings.to_dict()


def test_a_preset_is_found_by_name_and_by_path():
    path = ROOT / "model" / "config" / "doge_25M.yaml"
    assert find_preset("doge_25M").samefile(path)
    assert find_preset("doge_25M.yaml").samefile(path)
    assert find_preset(path) == path


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"doge_25: no such file.*nearest known one is 'doge_25M'"):
        find_preset("doge_25")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lerning_rate: 1.0e-3\n", r"x\.yaml: train\.lerning_rate: unknown key.*'learning_rate'"),
        ("model:\n  num_cdmoe_experts: 4\n", r"x\.yaml: model\.num_cdmoe_experts: unknown key.*'num_cdmmoe_experts'"),
        ("trian: {}\n", r"x\.yaml: unknown part 'trian'.*'train'"),
        ("train:\n  bf16: 1\n", r"train\.bf16: 1 does not fit; bf16 must be true or false or auto"),
        ("train:\n  num_train_epochs: 2.5\n", r"num_train_epochs must be a whole number"),
        ("train:\n  learning_rate: fast\n", r"learning_rate must be a number"),
        ("train:\n  learning_rate: -1\n", r"learning_rate must be above 0"),
        ("train:\n  learning_rate: .nan\n", r"learning_rate must be a number"),
        ("train:\n  warmup_ratio: 1.0\n", r"warmup_ratio must be 0 or more and below 1"),
        ("train:\n  accumulate_steps: none\n", r"accumulate_steps must be a whole number or auto"),
        ("train:\n  logging_steps: true\n", r"logging_steps must be a whole number"),
        ("train:\n  lr_scheduler_type: linear\n", r"lr_scheduler_type must be cosine or constant"),
        ("train:\n  optimizer: sgd\n", r"optimizer must be adamw or muon"),
        ("train:\n  muon_momentum: 1\n", r"muon_momentum must be 0 or more and below 1"),
        ("train:\n  muon_learning_rate: 0\n", r"muon_learning_rate must be above 0"),
        ("train:\n  learning_rate_scales: 3\n", r"learning_rate_scales must be a mapping of text to numbers or null"),
        ("train:\n  learning_rate_scales: {a: b}\n", r"must be a mapping of text to numbers or null"),
        ("train:\n  learning_rate_scales: {a:3}\n", r"must be a mapping of text to numbers or null"),
        ("train:\n  learning_rate_scales: {1: 3}\n", r"must be a mapping of text to numbers or null"),
        ("train:\n  learning_rate_scales: {a: 0}\n", r"learning_rate_scales must be factors above 0 by parts of names"),
        ("train:\n  learning_rate_scales: {'': 2}\n", r"must be factors above 0 by parts of names"),
        ("train:\n  weight_decay_scales: 3\n", r"weight_decay_scales must be a mapping of text to numbers or null"),
        (
            "train:\n  weight_decay_scales: {a: -1}\n",
            r"weight_decay_scales must be factors of 0 or more by parts of names",
        ),
        (
            "train:\n  weight_decay_scales: {a: .inf}\n",
            r"weight_decay_scales must be a mapping of text to numbers or null",
        ),
        ("train:\n  weight_decay_scales: {'': 2}\n", r"must be factors of 0 or more by parts of names"),
        ("train:\n  seed: 1\n  seed: 2\n", r"x\.yaml: line 3: key 'seed' is given twice"),
        ("train: [1\n", r"x\.yaml: line 2: "),
        ("- 1\n", r"x\.yaml: expected the parts `model:`, `train:`"),
        ("? [a]\n: b\n", r"x\.yaml: line 1: \['a'\] cannot be a key"),
        ("train:\n  ? {a: 1}\n  : b\n", r"x\.yaml: line 2: \{'a': 1\} cannot be a key"),
        ("model:\n  rope_parameters: &r {a: *r}\n", r"x\.yaml: line 2: the alias \*r is not supported"),
        ("model: &m\n  <<: *m\n", r"x\.yaml: line 2: the alias \*m is not supported"),
        ("train: " + "[" * 3000, r"x\.yaml: values are nested too deeply"),
        ("train:\n  seed: 2024-13-45\n", r"x\.yaml: a value cannot be read \(month must be in 1\.\.12\)"),
        ("train:\n  seed: !!bool maybe\n", r"x\.yaml: a value cannot be read"),
        ("train:\n  seed: !!timestamp x\n", r"x\.yaml: a value cannot be read"),
        ("train:\n  learning_rate: 1" + "0" * 400, r"learning_rate must be a number"),
        ("train: 3\n", r"x\.yaml: train: expected `key: value` lines"),
    ],
)
def test_a_bad_file_names_the_culprit(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_settings(path)


def test_sizes_that_do_not_fit_name_the_file_and_the_field(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model:\n  num_attention_heads: 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.yaml: model: num_attention_heads 3"):
        load_settings(path).model_config()


@pytest.mark.parametrize("key", ["learning_rate", "train.learning_rate"])
def test_an_override_reaches_its_key(key):
    settings = load_settings("doge_tiny", [f"{key}=8e-4", "hidden_size=64", "save_total_limit=null"])
    assert settings.train.learning_rate == 8e-4
    assert settings.model.hidden_size == 64
    assert settings.train.save_total_limit is None


@pytest.mark.parametrize("start", ["", "train."])
def test_an_override_reaches_an_entry_of_a_mapping(start):
    key = f"{start}learning_rate_scales"
    settings = load_settings("doge_tiny", [f"{key}={{word_embed: 3, lm_head: 3e-1}}"])
    assert settings.train.learning_rate_scales == {"word_embed": 3.0, "lm_head": 0.3}
    for override in (f"{key}.lm_head=1", f"{key}.feed_forward.keys = 3e-1"):
        apply_override(settings, override)
    assert settings.train.learning_rate_scales == {"word_embed": 3.0, "lm_head": 1.0, "feed_forward.keys": 0.3}
    again = parse_settings(yaml.safe_load(settings.to_yaml()), "again")
    assert again.to_dict() == settings.to_dict()
    fresh = load_settings("doge_tiny", [f"{key}.lm_head=2", "rope_parameters.rope_type=linear", "learning_rate=1"])
    assert (fresh.train.learning_rate_scales, fresh.train.learning_rate) == ({"lm_head": 2.0}, 1.0)
    assert fresh.model.rope_parameters == {"rope_type": "linear"}
    decays = load_settings("doge_tiny", [f"{start}weight_decay_scales.v_embed=0", "weight_decay_scales.lm_head=2"])
    assert decays.train.weight_decay_scales == {"v_embed": 0.0, "lm_head": 2.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", r"--set lerning_rate=1: unknown key 'lerning_rate'.*'learning_rate'"),
        ("train.hidden_size=1", r"unknown key 'hidden_size'"),
        ("tarin.seed=1", r"unknown part 'tarin'.*'train'"),
        ("seed", r"--set seed: expected key=value"),
        ("seed=-1", r"--set seed=-1: -1 does not fit; seed must be 0 or more"),
        ("seed=[1", r"--set seed=\[1: '\[1' is not a YAML value"),
        ("rope_parameters=&r {a: *r}", r"--set rope_parameters=.*: line 1: the alias \*r is not supported"),
        ("rope_parameters={? [a] : 1}", r"--set rope_parameters=.*: line 1: \['a'\] cannot be a key"),
        ("rope_parameters={a: 1, a: 2}", r"--set rope_parameters=.*: line 1: key 'a' is given twice"),
        ("learning_rate_scales.lm_head=-1", r"learning_rate_scales must be factors above 0 by parts of names"),
        ("weight_decay_scales.lm_head=-1", r"weight_decay_scales must be factors of 0 or more by parts of names"),
        ("learning_rate_scales.lm_head=", r"must be a mapping of text to numbers or null"),
        ("learning_rate_scales.=3", r"must be a mapping of text to numbers or null"),
        ("learning_rate.lm_head=3", r"unknown part 'learning_rate'"),
        ("seed=2024-13-45", r"--set seed=2024-13-45: .*month must be in 1\.\.12"),
    ],
)
def test_a_bad_override_names_the_flag(override, message):
    with pytest.raises(UserError, match=message):
        apply_override(make_settings(), override)


def test_the_model_part_is_the_configuration_field_by_field() -> None:
    """The two lists cannot drift apart: every field of `DogeConfig` can be set, with its default."""
    expected = {name: getattr(DogeConfig, name) for name in DogeConfig.__annotations__}
    assert vars(ModelSettings()) == expected
