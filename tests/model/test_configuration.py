"""Configs that cannot work are refused with the field and a value that would do; the others survive JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from doge_lm import DogeConfig, DogeForCausalLM, DogeModel

from .support import TINY, tiny_config

SIZES = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "num_attention_heads",
    "num_inner_values",
    "inner_values_retrieval_size",
    "cross_domain_intermediate_size",
    "private_expert_intermediate_size",
    "num_cdmmoe_experts",
    "num_cdmmoe_heads",
    "num_cdmmoe_experts_per_head",
]

# Changes of the small config, and the field the message must name.
INVALID_NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 5}, "num_attention_heads"),
    ({"num_attention_heads": 48}, "num_attention_heads"),
    ({"num_attention_heads": 7, "hidden_size": 256}, "num_attention_heads"),
    ({"num_attention_heads": 8}, "num_attention_heads"),  # heads of 3 features
    ({"num_attention_heads": 24}, "num_attention_heads"),  # heads of 1 feature
    ({"hidden_size": 25, "num_attention_heads": 1}, "hidden_size"),
    ({"num_cdmmoe_experts_per_head": 13}, "num_cdmmoe_experts_per_head"),
    ({"num_cdmmoe_experts_per_head": 1000}, "num_cdmmoe_experts_per_head"),
    ({"private_expert_intermediate_size": 13}, "private_expert_intermediate_size"),
    ({"private_expert_intermediate_size": 1}, "private_expert_intermediate_size"),
    ({"num_cdmmoe_experts": 13}, "num_cdmmoe_experts"),
    ({"num_cdmmoe_experts": 257}, "num_cdmmoe_experts"),
    ({"num_cdmmoe_experts": 65537}, "num_cdmmoe_experts"),
    ({"num_cdmmoe_experts": 1, "num_cdmmoe_experts_per_head": 1}, "num_cdmmoe_experts"),
    ({"num_cdmmoe_experts": 3}, "num_cdmmoe_experts"),
    ({"hidden_dropout": -0.1}, "hidden_dropout"),
    ({"hidden_dropout": 1.5}, "hidden_dropout"),
    ({"embedding_multiplier": 0.0}, "embedding_multiplier"),
    ({"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    ({"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
    ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping"),
    ({"final_logit_softcapping": 1e39}, "final_logit_softcapping"),
    ({"final_logit_softcapping": 1e-46}, "final_logit_softcapping"),
    ({"initializer_range": 0.0}, "initializer_range"),
    ({"initializer_range": -0.02}, "initializer_range"),
    ({"hidden_size": 24.0}, "hidden_size"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
]

INVALID_WORDS: list[tuple[str, str, list[str]]] = [
    ("hidden_act", "siluu", ["silu"]),
    ("hidden_act", "", ["silu"]),
    ("inner_value_init", "ones", ["identity", "normal"]),
    ("weight_init", "xavier", ["normal", "fan_in"]),
    ("cdmoe_path", "scattered", ["auto", "gather", "dense"]),
]


def refusal(base: dict[str, Any], **changes: Any) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what the callers check)
        DogeConfig(**{**base, **changes})
    return str(caught.value)


def works(base: dict[str, Any], **changes: Any) -> bool:
    """Whether a config is accepted and, where it is small, a model of it with one layer runs."""
    try:
        config = DogeConfig(**{**base, **changes})
    except ValueError:
        return False
    config.num_hidden_layers = 1
    if config.vocab_size > 1000:
        with torch.device("meta"):
            DogeForCausalLM(config)
        return True
    with torch.no_grad():
        logits = DogeForCausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).logits
    return bool(torch.isfinite(logits).all())


def numbers_that_do(message: str, base: dict[str, Any], field: str, changes: dict[str, Any]) -> list[float]:
    """The numbers in a message that, in place of the value refused, make a config that works."""
    refused = changes[field]
    found = []
    for text in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?!\w)", message):
        number = float(text) if type(refused) is float and not float(text).is_integer() else int(float(text))
        if field in ("hidden_dropout", "initializer_range", "embedding_multiplier", "final_logit_softcapping"):
            number = float(text)
        if (type(number), number) != (type(refused), refused) and works(base, **{**changes, field: number}):
            found.append(number)
    return found


def test_a_whole_number_that_no_float_holds_is_refused() -> None:
    assert "embedding_multiplier is 1000" in refusal(TINY, embedding_multiplier=10**400)


@pytest.mark.parametrize(("changes", "field"), INVALID_NUMBERS, ids=str)
def test_invalid_number_names_the_field_and_a_value_that_would_do(changes: dict[str, Any], field: str) -> None:
    base = TINY
    if field == "num_cdmmoe_experts":
        base = {**TINY, "num_cdmmoe_experts_per_head": 1}  # the number offered may be below the small config's k
    message = refusal(base, **changes)
    assert field in message
    assert numbers_that_do(message, base, field, changes), f"no number in {message!r} makes a config that works"


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in SIZES for value in (0, -4) if field != "num_cdmmoe_experts" or value],
)
def test_size_below_one_names_the_field_and_a_value_that_would_do(field: str, value: int) -> None:
    """Beside the default of every other field."""
    message = refusal({}, **{field: value})
    assert field in message
    assert numbers_that_do(message, {}, field, {field: value}), f"no number in {message!r} makes a config that works"


@pytest.mark.parametrize(
    ("field", "value"), [("pad_token_id", 61), ("pad_token_id", -1), ("bos_token_id", 99), ("eos_token_id", [2, 61])]
)
def test_special_token_outside_the_vocabulary(field: str, value: Any) -> None:
    message = refusal(TINY, **{field: value})
    assert field in message
    assert "vocab_size 61" in message


@pytest.mark.parametrize(("field", "value", "allowed"), INVALID_WORDS)
def test_invalid_word_names_the_field_and_the_choices(field: str, value: str, allowed: list[str]) -> None:
    message = refusal(TINY, **{field: value})
    assert field in message
    for word in allowed:
        assert word in message
        assert works(TINY, **{field: word})


def test_invalid_config_file_is_refused_too(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, "num_cdmmoe_experts": 13}), encoding="utf-8")
    with pytest.raises(ValueError, match="num_cdmmoe_experts"):
        DogeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 12},
        {"num_cdmmoe_experts_per_head": 12},
        {"num_cdmmoe_experts": 14},
        {"num_cdmmoe_experts": 4},
        {"num_hidden_layers": 1, "num_cdmmoe_heads": 1, "num_inner_values": 1},
        {"hidden_act": "gelu", "hidden_dropout": 0.1},
        {"pad_token_id": None, "eos_token_id": [2, 3]},
    ],
    ids=str,
)
def test_edge_of_what_is_allowed(changes: dict[str, Any]) -> None:
    assert works(TINY, **changes)


def test_every_field_survives_json(tmp_path: Path) -> None:
    changes = {
        **TINY,
        "hidden_bias": True,
        "hidden_dropout": 0.1,
        "hidden_act": "gelu",
        "use_cache": False,
        "inner_value_init": "normal",
        "weight_init": "fan_in",
        "initializer_range": 0.03,
        "tie_word_embeddings": True,
        "embedding_multiplier": 4.0,
        "final_logit_softcapping": 15.0,
        "cdmoe_path": "gather",
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        "eos_token_id": [2, 5],
    }
    config = DogeConfig(**changes)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["model_type"] == "doge_ifa"
    for loaded in (
        DogeConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        DogeConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        DogeConfig.from_dict(config.to_dict()),
    ):
        assert type(loaded) is DogeConfig
        for name, value in changes.items():
            assert getattr(loaded, name) == value, name
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_every_field_has_a_default() -> None:
    """transformers builds a config without arguments to find what differs from it."""
    config = DogeConfig()
    assert config.hidden_act == "silu"
    assert config.rope_theta == 10000.0
    assert not config.tie_word_embeddings
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 777.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}],
    ids=["as published", "as in transformers 5"],
)
def test_rope_theta_in_either_spelling(changes: dict[str, Any], tmp_path: Path) -> None:
    fields = {name: value for name, value in TINY.items() if name != "rope_theta"}
    config = DogeConfig(**{**fields, **changes})
    config.save_pretrained(tmp_path)
    for each in (config, DogeConfig.from_pretrained(tmp_path)):
        assert each.rope_theta == 777.0
        assert each.rope_parameters["rope_theta"] == 777.0
        model = DogeModel(each)
        cos, _ = model.rotary_emb(torch.zeros(1), torch.tensor([[5]]))
        torch.testing.assert_close(cos[0, 0, 1], torch.cos(torch.tensor(5 * 777.0 ** (-2 / 8))), rtol=0, atol=1e-5)


def test_contradicting_rope_thetas_are_refused() -> None:
    message = refusal(TINY, rope_theta=5.0, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    assert "rope_theta" in message


def test_unknown_rope_type_is_refused() -> None:
    with pytest.raises((ValueError, KeyError), match="spiral"):
        DogeForCausalLM(tiny_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}))


def test_auto_classes_know_the_model_type() -> None:
    config = AutoConfig.for_model("doge_ifa", **TINY)
    assert type(config) is DogeConfig
    assert type(AutoModel.from_config(config)) is DogeModel
    assert type(AutoModelForCausalLM.from_config(config)) is DogeForCausalLM


def test_transformers_own_doge_is_left_alone() -> None:
    """`doge` is a different, incompatible model in transformers; ours neither is it nor hides it."""
    assert DogeConfig.model_type == "doge_ifa"
    theirs = AutoConfig.for_model("doge")
    assert type(theirs).__module__.startswith("transformers.")
    small = AutoConfig.for_model(
        "doge", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    assert type(AutoModelForCausalLM.from_config(small)).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_type": "foo"}),
        ("rope_parameters", {"rope_type": "linear"}),
        ("rope_parameters", {"rope_type": "linear", "factor": "abc"}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0.0}),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ("rope_parameters", {"rope_typ": "linear", "factor": 2.0}),
        ("rope_parameters", [1]),
        ("hidden_dropout", "a"),
        ("hidden_dropout", 1.0),
        ("rms_norm_eps", None),
        ("initializer_range", float("nan")),
        ("rope_theta", 0),
        ("rope_theta", -1.0),
        ("pad_token_id", 1.5),
        ("eos_token_id", [2, 99_999_999]),
    ],
)
def test_values_of_the_wrong_kind_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        DogeConfig(**{field: value})


def test_a_huge_size_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="hidden_size is 100000000000; it must be"):
        DogeConfig(hidden_size=10**11)
    with pytest.raises(ValueError, match=r"num_attention_heads 7 .* 8 would do"):
        DogeConfig(hidden_size=2**24, num_attention_heads=7)
