"""Which parameter is updated how, and at which learning rate."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from doge_lm.cli import main
from doge_lm.errors import UserError
from doge_lm.model.modeling_doge import DogeForCausalLM
from doge_lm.training.muon import Muon, hidden_matrices
from doge_lm.training.optimizer import check_optimizer, is_plain_adamw, learning_rate_factors, make_optimizer
from doge_lm.training.row_lazy_adamw import RowLazyAdamW

from .support import make_settings

MATRICES = {"q_proj", "k_proj", "v_queries", "o_proj", "shared_up_proj", "shared_down_proj", "queries"}
OTHERS = {
    "v_keys", "v_embed.weight", "keys", "down_embed.weight", "up_embed.weight", "in_attn_layernorm.weight",
    "in_ff_layernorm.weight", "final_layernorm.weight", "word_embed.weight", "lm_head.weight",
}  # fmt: skip


def doge(**model):
    torch.manual_seed(0)
    return DogeForCausalLM(make_settings(model).model_config())


def decayed(model):
    return {name for name, _ in model.named_parameters() if "norm" not in name and "bias" not in name}


def by_name(model, optimizer):
    """Each parameter's group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found) == len(names)
    return found


def short(name):
    return re.sub(r"^(model\.)?(layers\.\d+\.)?(attn\.|feed_forward\.)?", "", name)


def test_the_matrices_are_those_of_linear_maps_but_the_head():
    model = doge(hidden_bias=True)
    assert {short(name) for name in hidden_matrices(model)} == {f"{name}.weight" for name in MATRICES}
    assert hidden_matrices(model) <= set(dict(model.named_parameters()))
    tied = doge(tie_word_embeddings=True)
    assert hidden_matrices(tied) == hidden_matrices(model)
    names = {name for name, _ in model.named_parameters() if not name.endswith("bias")}
    assert {short(name) for name in names - hidden_matrices(model)} == OTHERS


def test_another_architecture_has_them_too():
    config = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    found = {name.split(".")[-2] for name in hidden_matrices(LlamaForCausalLM(config))}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_and_adamw_the_rest(lazy, tied):
    model = doge(hidden_bias=True, tie_word_embeddings=tied)
    train = make_settings(
        optimizer="muon", muon_learning_rate=0.05, muon_momentum=0.8, weight_decay=0.2, lazy_expert_rows=lazy
    ).train
    optimizer = make_optimizer(model, train, decayed(model))
    assert isinstance(optimizer, Muon)
    for name, group in by_name(model, optimizer).items():
        is_matrix = name in hidden_matrices(model)
        assert group["muon"] == is_matrix, name
        assert group["lr"] == (0.05 if is_matrix else 3e-3)
        assert group["weight_decay"] == (0.2 if name in decayed(model) else 0.0)
        assert group["lazy_rows"] == (lazy and short(name) in {"down_embed.weight", "up_embed.weight"})
        assert group["momentum"] == (0.8 if is_matrix else 0.95)
        assert (group["betas"], group["eps"]) == ((train.adam_beta1, train.adam_beta2), train.adam_epsilon)
    assert optimizer.param_groups[0]["lr"] == 3e-3  # the one that is logged


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_factors_are_on_every_learning_rate(kind):
    model = doge()
    scales = {"word_embed": 3.0, "lm_head": 0.3, "feed_forward.keys": 0.25, "queries": 2.0, "v_queries": 0.5}
    train = make_settings(optimizer=kind, learning_rate_scales=scales).train
    assert not is_plain_adamw(train)
    optimizer = make_optimizer(model, train, decayed(model))
    expected = {
        "word_embed.weight": 3.0, "lm_head.weight": 0.3, "keys": 0.25, "queries.weight": 2.0, "v_queries.weight": 0.5
    }  # fmt: skip
    for name, group in by_name(model, optimizer).items():
        base = 0.02 if group.get("muon") else 3e-3
        assert group["lr"] == base * expected.get(short(name), 1.0), name
        assert bool(group.get("muon")) == (kind == "muon" and name in hidden_matrices(model))
    # Even where all have another factor.
    everything = make_settings(learning_rate_scales={"model": 0.5, "lm_head": 2.0}).train
    first = make_optimizer(model, everything, decayed(model)).param_groups[0]
    assert (first["params"], first["lr"]) == ([], 3e-3)


def test_a_factor_of_1_is_adamw_to_the_bit():
    found = []
    for plain in (True, False):
        model = doge()
        if plain:
            named = dict(model.named_parameters())
            groups = [
                {"params": [p for name, p in named.items() if name in decayed(model)], "weight_decay": 0.01},
                {"params": [p for name, p in named.items() if name not in decayed(model)], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, 3e-3, (0.9, 0.999), 1e-8, fused=True)
        else:
            train = make_settings(learning_rate_scales={"keys": 1.0}).train
            optimizer = make_optimizer(model, train, decayed(model))
            assert type(optimizer) is RowLazyAdamW
        ids = torch.arange(64).view(2, 32)
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(1)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_frozen_parameters_are_left_out():
    model = doge()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("word_embed" in name)
    train = make_settings(optimizer="muon").train
    optimizer = make_optimizer(model, train, decayed(model))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    with pytest.raises(UserError, match=r"from 'q_proj'.*names are model\.word_embed\.weight$"):
        learning_rate_factors(model, {"q_proj": 2.0})


def test_the_longest_part_counts():
    factors = learning_rate_factors(doge(), {"proj": 2.0, "q_proj": 3.0, "layers.1.attn.q_proj": 4.0})
    assert factors["model.layers.0.attn.q_proj.weight"] == 3.0
    assert factors["model.layers.1.attn.q_proj.weight"] == 4.0
    assert factors["model.layers.1.attn.k_proj.weight"] == 2.0
    assert factors["lm_head.weight"] == 1.0
    for nothing in (None, {}):
        assert set(learning_rate_factors(doge(), nothing).values()) == {1.0}


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"embed_tokens": 2.0}, r"takes its factor from 'embed_tokens'.*names are model\.word_embed\.weight, model\."),
        ({"proj": 2.0, "_proj": 3.0}, r"from 'proj', as it is in the name of no parameter.*or only beside a longer"),
        ({"q_proj": 2.0, "attn.q": 3.0}, r"'q_proj' and 'attn\.q' are both in model\.layers\.0\.attn\.q_proj\.weight"),
    ],
)
def test_parts_that_do_not_fit_are_errors(scales, message):
    with pytest.raises(UserError, match=message):
        learning_rate_factors(doge(), scales)


def test_an_error_lists_the_names_of_one_layer():
    with pytest.raises(UserError) as error:
        learning_rate_factors(doge(), {"x": 2.0})
    listed = str(error.value).rpartition("names are ")[2].split(", ")
    assert len(listed) == len(MATRICES) + len(OTHERS)
    assert {short(name) for name in listed} == {f"{name}.weight" for name in MATRICES} | OTHERS
    assert not any("layers.1" in name for name in listed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["learning_rate_scales.embed_tokens=2"], "nothing takes its factor from 'embed_tokens'"),
        (
            ["lazy_expert_rows=true", "num_cdmmoe_experts=0", "private_expert_intermediate_size=32"],
            "lazy_expert_rows is true, but the model has no experts",
        ),
    ],
)
def test_what_does_not_fit_the_model_ends_a_run_before_anything_is_removed(changes, message, world, tmp_path, capsys):
    flags = world.flags(tmp_path, *[part for change in changes for part in ("--set", change)])
    assert main(["train", *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    earlier = tmp_path / "out" / "model.safetensors"
    earlier.write_text("of an earlier run", encoding="utf-8")
    assert main(["train", *flags, "--overwrite"]) == 1
    assert earlier.exists()


def test_a_factor_is_as_another_learning_rate(world, tmp_path):
    """With a factor on everything, the run is the one at that rate; what is logged is the rate without it."""
    places = [tmp_path / "scaled", tmp_path / "plain"]
    assert main(["train", *world.flags(places[0], learning_rate_scales={"model": 0.5, "lm_head": 0.5})]) == 0
    assert main(["train", *world.flags(places[1], learning_rate=1.5e-3)]) == 0
    weights = [(place / "out" / "model.safetensors").read_bytes() for place in places]
    assert weights[0] == weights[1]


def test_lazy_rows_need_experts():
    train = make_settings(lazy_expert_rows=True).train
    model = doge(num_cdmmoe_experts=0, private_expert_intermediate_size=doge().config.hidden_size)
    with pytest.raises(UserError, match=r"the model has no experts \(num_cdmmoe_experts is 0\): set it to false"):
        check_optimizer(model, train)
    check_optimizer(doge(), train)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    check_optimizer(llama, train)  # has no such setting to be wrong
