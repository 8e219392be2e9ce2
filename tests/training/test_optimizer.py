"""Which parameter is updated how, at which learning rate and decay."""

import re
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from doge_lm.cli import main
from doge_lm.errors import UserError
from doge_lm.model.modeling_doge import DogeForCausalLM
from doge_lm.training import muon
from doge_lm.training.muon import Muon, hidden_matrices, newton_schulz, scaled_orthogonal
from doge_lm.training.optimizer import (
    check_optimizer,
    decayed_names,
    is_plain_adamw,
    learning_rate_factors,
    make_optimizer,
    weight_decay_factors,
)
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


DECAYS = {
    "v_embed": 0.0, "word_embed": 0.5, "feed_forward.keys": 0.25, "queries": 2.0, "v_queries": 0.0, "down_embed": 3.0,
    "lm_head": 1.0,
}  # fmt: skip
EXPECTED_DECAYS = {
    "v_embed.weight": 0.0, "word_embed.weight": 0.5, "keys": 0.25, "queries.weight": 2.0, "v_queries.weight": 0.0,
    "queries.bias": 0.0, "down_embed.weight": 3.0,
}  # fmt: skip
LAZY = {"down_embed.weight", "up_embed.weight"}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_factors_are_on_every_weight_decay(kind, lazy):
    assert not is_plain_adamw(make_settings(weight_decay_scales=DECAYS).train)
    model = doge(hidden_bias=True)
    rates = {"word_embed": 3.0, "lm_head": 3.0}
    train = make_settings(
        optimizer=kind, weight_decay=0.2, weight_decay_scales=DECAYS, learning_rate_scales=rates, lazy_expert_rows=lazy
    ).train
    optimizer = make_optimizer(model, train, decayed(model))
    for name, group in by_name(model, optimizer).items():
        factor = EXPECTED_DECAYS.get(short(name), 1.0) if name in decayed(model) else 0.0
        assert group["weight_decay"] == 0.2 * factor, name
        base = 0.02 if group.get("muon") else 3e-3
        assert group["lr"] == base * rates.get(short(name).removesuffix(".weight"), 1.0), name
        assert bool(group.get("muon")) == (kind == "muon" and name in hidden_matrices(model))
        assert group["lazy_rows"] == (lazy and short(name) in LAZY)
    # As few groups as there are ways to treat a parameter: what has the factor 0 joins the norms and biases.
    treatments = [
        (group.get("muon"), group["lazy_rows"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups
    ]
    assert len(set(treatments)) == len(treatments)


@pytest.mark.parametrize("scales", [None, {}])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_without_factors_on_decay_the_groups_are_as_ever(kind, scales):
    """Checkpoints from before the key hold their parameters in this order."""
    train = make_settings(optimizer=kind, weight_decay=0.2, lazy_expert_rows=True, weight_decay_scales=scales).train
    assert is_plain_adamw(make_settings(weight_decay_scales=scales).train)
    model = doge(hidden_bias=True)
    named = dict(model.named_parameters())
    matrices = hidden_matrices(model) if kind == "muon" else set()
    tables = {name for name in named if short(name) in LAZY}
    decaying = decayed(model)
    expected = [
        (decaying - matrices - tables, 3e-3, 0.2, False),
        (set(named) - decaying, 3e-3, 0.0, False),
        (matrices, 0.02, 0.2, False),
        (tables, 3e-3, 0.2, True),
    ]
    groups = make_optimizer(model, train, decaying).param_groups
    names = {parameter: name for name, parameter in named.items()}
    found = [
        ([names[p] for p in group["params"]], group["lr"], group["weight_decay"], group["lazy_rows"])
        for group in groups
    ]
    assert found == [([name for name in named if name in group], *rest) for group, *rest in expected if group]


SCHEDULE = (0.5, 1.0, 0.8, 0.3, 0.1)


def by_definition(weight, grads, way, rate, decay, train):
    """A weight after all steps, by the formulas of AdamW, its lazy rows and Muon, in float64; `decay` is a factor."""
    weight = weight.clone()
    average, square = torch.zeros_like(weight), torch.zeros_like(weight)
    beta1, beta2 = train.adam_beta1, train.adam_beta2
    missed = torch.ones_like(weight)
    for t, (grad, share) in enumerate(zip(grads, SCHEDULE, strict=True), start=1):
        lr = rate * share
        missed *= 1 - lr * train.weight_decay * decay
        if way == "muon":
            average = train.muon_momentum * average + (1 - train.muon_momentum) * grad
            ahead = (1 - train.muon_momentum) * grad + train.muon_momentum * average
            update = scaled_orthogonal([ahead])[0]
        else:
            average = beta1 * average + (1 - beta1) * grad
            square = beta2 * square + (1 - beta2) * grad**2
            upper, lower = average / (1 - beta1**t), (square / (1 - beta2**t)).sqrt()
            update = upper / (lower + train.adam_epsilon)
        moves = torch.ones_like(weight, dtype=torch.bool)
        if way == "lazy":
            moves &= (grad != 0).any(dim=1, keepdim=True)
        weight = torch.where(moves, weight * missed - lr * update, weight)
        missed = torch.where(moves, 1.0, missed)
    return weight


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_decay_by_their_factors(kind, lazy, monkeypatch):
    monkeypatch.setattr(muon, "newton_schulz", partial(newton_schulz, dtype=torch.float64))
    model = doge(hidden_bias=True).double()
    rates = {"word_embed": 3.0, "up_embed": 0.5, "o_proj": 2.0}
    train = make_settings(
        optimizer=kind, learning_rate=0.02, muon_learning_rate=0.1, weight_decay=0.7, weight_decay_scales=DECAYS,
        learning_rate_scales=rates, lazy_expert_rows=lazy,
    ).train  # fmt: skip
    optimizer = make_optimizer(model, train, decayed(model))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grads = {name: [torch.randn_like(weight) for _ in SCHEDULE] for name, weight in before.items()}
    for name, steps in grads.items():
        if short(name) in LAZY:
            for grad in steps:
                grad[torch.rand(len(grad)) < 0.5] = 0
    peaks = [group["lr"] for group in optimizer.param_groups]
    for t, share in enumerate(SCHEDULE):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name][t].clone()
        optimizer.step()
    for name, parameter in model.named_parameters():
        matrix = kind == "muon" and name in hidden_matrices(model)
        way = "muon" if matrix else "lazy" if lazy and short(name) in LAZY else "adamw"
        rate = (0.1 if matrix else 0.02) * next((f for part, f in rates.items() if part in name), 1.0)
        decay = EXPECTED_DECAYS.get(short(name), 1.0) if name in decayed(model) else 0.0
        wanted = by_definition(before[name], grads[name], way, rate, decay, train)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


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


def test_the_longest_part_counts_for_decay_too():
    model = doge(hidden_bias=True)
    factors = weight_decay_factors(model, {"proj": 2.0, "q_proj": 0.0, "layers.1.attn": 4.0}, decayed(model))
    assert factors["model.layers.0.attn.q_proj.weight"] == 0.0
    assert factors["model.layers.1.attn.q_proj.weight"] == 4.0
    assert factors["model.layers.0.attn.k_proj.weight"] == 2.0
    assert factors["lm_head.weight"] == 1.0
    # What has no decay has none whatever the factor.
    assert factors["model.layers.1.attn.q_proj.bias"] == 0.0
    assert factors["model.layers.1.in_attn_layernorm.weight"] == 0.0
    for nothing in (None, {}):
        found = weight_decay_factors(model, nothing, decayed(model))
        assert found == {name: float(name in decayed(model)) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"hidden_bias": True, "qk_norm": True}])
def test_norms_and_biases_do_not_decay(options):
    model = doge(**options)
    assert decayed_names(model) == decayed(model)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"embed_tokens": 2.0}, r"takes its factor from 'embed_tokens'.*names are model\.word_embed\.weight, model\."),
        ({"proj": 2.0, "_proj": 3.0}, r"from 'proj', as it is in the name of no parameter.*or only beside a longer"),
        ({"q_proj": 2.0, "attn.q": 3.0}, r"'q_proj' and 'attn\.q' are both in model\.layers\.0\.attn\.q_proj\.weight"),
    ],
)
def test_parts_that_do_not_fit_are_errors(scales, message):
    model = doge()
    with pytest.raises(UserError, match=rf"^learning_rate_scales: .*{message}"):
        learning_rate_factors(model, scales)
    with pytest.raises(UserError, match=rf"^weight_decay_scales: .*{message}"):
        weight_decay_factors(model, scales, decayed(model))


@pytest.mark.parametrize(
    ("scales", "listed"),
    [
        ({"layernorm": 0.5}, r"model\.layers\.0\.in_attn_layernorm\.weight, .*final_layernorm\.weight$"),
        ({"bias": 0.0, "lm_head": 0.0}, r"model\.layers\.0\.attn\.q_proj\.bias, "),
        # The weight takes its factor from the longer part.
        ({"k_proj": 2.0, "k_proj.weight": 0.0}, r"model\.layers\.0\.attn\.k_proj\.bias$"),
    ],
)
def test_a_factor_on_what_has_no_decay_is_an_error(scales, listed):
    model = doge(hidden_bias=True)
    learning_rate_factors(model, dict.fromkeys(scales, 2.0))  # which has no such exception
    start = (
        f"^weight_decay_scales: '{next(iter(scales))}' gives its factor only to parameters that have no weight decay"
    )
    with pytest.raises(UserError, match=f"{start} .*: {listed}"):
        check_optimizer(model, make_settings(weight_decay_scales=scales).train)


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
        (["learning_rate_scales.embed_tokens=2"], "learning_rate_scales: nothing takes its factor from 'embed_tokens'"),
        (["weight_decay_scales.embed_tokens=2"], "weight_decay_scales: nothing takes its factor from 'embed_tokens'"),
        (["weight_decay_scales.layernorm=0"], "weight_decay_scales: 'layernorm' gives its factor only to parameters"),
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


def test_a_factor_is_as_another_setting(world, tmp_path):
    """With a factor on everything, the run is the one at that rate and decay; what is logged is the rate without it."""
    places = [tmp_path / "scaled", tmp_path / "plain"]
    scales = {"model": 0.5, "lm_head": 0.5}
    scaled = {"weight_decay": 0.2, "learning_rate_scales": scales, "weight_decay_scales": scales}
    assert main(["train", *world.flags(places[0], **scaled)]) == 0
    assert main(["train", *world.flags(places[1], learning_rate=1.5e-3, weight_decay=0.1)]) == 0
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
