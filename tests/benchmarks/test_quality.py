"""`benchmarks/quality.py`: the Llama beside Doge is of its size, and a row runs through the project's own trainer."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from doge_lm import DogeConfig, DogeForCausalLM
from doge_lm.training.plan import count_model
from doge_lm.training.settings import load_settings
from tests.benchmarks.conftest import Command
from tests.training.support import World, make_set, make_settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality  # noqa: E402


@pytest.mark.parametrize("preset", ["doge_25M", "doge_80M", "doge_450M"])
def test_the_llama_has_as_many_parameters(preset: str) -> None:
    settings = load_settings(preset)
    config = settings.model_config()
    with torch.device("meta"):
        llama = quality.LlamaForCausalLM(quality.llama_like(config))
    total = count_model(config).total
    step = 8 * 3 * config.hidden_size * config.num_hidden_layers
    assert 0 <= sum(parameter.numel() for parameter in llama.parameters()) - total < step
    assert llama.config.num_hidden_layers == config.num_hidden_layers
    assert llama.config.hidden_size == config.hidden_size


@pytest.mark.parametrize("preset", ["doge_25M", "doge_80M"])
def test_the_llama_can_have_equal_work(preset: str) -> None:
    settings = load_settings(preset)
    config = settings.model_config()
    with torch.device("meta"):
        llama = quality.parse_row("llama:equal_work=true")[1](config, settings.train)
    embedding = llama.model.embed_tokens.weight.numel()
    matrices = sum(parameter.numel() for parameter in llama.parameters() if parameter.ndim == 2) - embedding
    width = 8 * 3 * config.hidden_size * config.num_hidden_layers  # of a step
    assert 0 <= matrices - count_model(config).matmul < width
    with pytest.raises(quality.UserError, match="equal_work is a setting of a llama"):
        quality.parse_row("doge:equal_work=true")


def test_a_llama_that_would_be_larger_is_refused() -> None:
    sizes = {
        "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 128,
        "inner_values_retrieval_size": 4, "cross_domain_intermediate_size": 4, "private_expert_intermediate_size": 64,
        "num_cdmmoe_experts": 0,
    }  # fmt: skip
    with pytest.raises(quality.UserError, match="larger without an MLP than the Doge"):
        quality.llama_like(make_settings(sizes).model_config())


@pytest.mark.parametrize("architecture", ["doge", "llama"])
def test_tied_embeddings_leave_more_to_the_layers(architecture: str) -> None:
    settings = load_settings("doge_25M", ["tie_word_embeddings=true"])
    total = count_model(load_settings("doge_25M").model_config()).total
    settings.model.cross_domain_intermediate_size = quality.fitted_width(quality.build_doge, settings, total)
    with torch.device("meta"):
        model = quality.parse_row(architecture)[1](settings.model_config(), settings.train)
    excess = sum(parameter.numel() for parameter in model.parameters()) - total
    column = settings.model.num_hidden_layers * settings.model.hidden_size  # of one matrix of each layer
    doge_step, llama_step = 8 * 2 * column, 8 * 3 * column
    assert -doge_step / 2 <= excess <= doge_step / 2 + (llama_step if architecture == "llama" else 0)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("llama@qk_norm:learning_rate=1e-2,a.b=true", "llama-qk_norm-learning_rate-1e-2-a.b-true"),
        ("doge:" + "x" * 300, None),
    ],
)
def test_rows_have_folders_of_names_that_fit(row: str, name: str | None) -> None:
    found = quality.place_name(row)
    assert len(found) <= quality.LONGEST_NAME
    if name is None:
        assert found != quality.place_name(row + "x"), "long rows that begin alike have folders of their own"
    else:
        assert found == name


@pytest.mark.parametrize("tied", [False, True])
def test_the_llama_starts_by_the_same_rule(tied: bool) -> None:
    sizes = {"weight_init": "fan_in", "hidden_size": 64, "cross_domain_intermediate_size": 256}
    settings = make_settings({**sizes, "tie_word_embeddings": tied, "embedding_multiplier": 8.0})
    llama = quality.build_llama(settings.model_config(), settings.train)
    assert abs(llama.model.layers[0].self_attn.q_proj.weight.std().item() * 64**0.5 - 1) < 0.05
    assert abs(llama.model.embed_tokens.weight.std().item() / 0.02 - 1) < 0.05
    assert abs(llama.model.embed_tokens(torch.arange(50)).std().item() / 0.16 - 1) < 0.1
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied


class Copying:
    """A model that repeats what followed the like of the newest token, `strength` nats above all else."""

    device = torch.device("cpu")

    def __init__(self, strength: float, size: int = 50) -> None:
        self.strength, self.size = strength, size

    def __call__(self, input_ids: torch.Tensor, **_: object) -> object:
        half = input_ids.shape[1] // 2
        following = input_ids[:, :half].roll(-1, dims=1).repeat(1, 2)
        return SimpleNamespace(logits=self.strength * torch.nn.functional.one_hot(following, self.size))


def test_copying_is_measured_by_position() -> None:
    rows = [{"input_ids": numpy.arange(400) % 50}]
    found = quality.repeat_losses(Copying(100.0), rows, length=20, samples=3)
    assert found.shape == (19,)
    assert float(found.max()) < 1e-6
    without = quality.repeat_losses(Copying(0.0), rows, length=20, samples=3)
    torch.testing.assert_close(without, torch.full((19,), 50.0).log())


SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "inner_values_retrieval_size": 2,
    "cross_domain_intermediate_size": 24, "private_expert_intermediate_size": 16, "num_cdmmoe_experts": 16,
    "weight_init": "fan_in", "dense_skips": True,
}  # fmt: skip


@pytest.mark.parametrize("name", [*quality.CHANGES, "nothing"])
@pytest.mark.parametrize("options", [{}, {"parallel_experts": True, "router_queries": False, "shared_gate": True}])
def test_each_change_trains_and_is_counted(name: str, options: dict[str, bool]) -> None:
    settings = make_settings({**SMALL, **options})
    ids = torch.randint(0, 64, (2, 12))

    def after_a_step(changes: list[str]) -> tuple[DogeForCausalLM, set[str]]:
        """Some changes begin as none: gains from 0."""
        torch.manual_seed(0)
        model = quality.build_doge(settings.model_config(), settings.train, changes)
        model(input_ids=ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
        idle = set()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is None:
                    idle.add(name)
                else:
                    parameter.sub_(parameter.grad)
        return model.eval(), idle

    model, idle = after_a_step([] if name == "nothing" else [name])
    assert all("v_" in each for each in idle), "a linear value leaves the inner values unused, nothing else is"
    plain, _ = after_a_step([])
    with torch.no_grad():
        same = torch.equal(model(ids).logits, plain(ids).logits)
    assert same == (name == "nothing")
    used = quality.usage(model.eval(), [{"input_ids": ids[0].numpy()}])
    assert used["experts_used"]
    assert all(1 <= rank <= 16 for part in ("experts_rank", "shared_rank") for rank in used[part])


@pytest.mark.parametrize("queries", [False, True])
def test_balance_is_the_loss_of_switch_transformers(queries: bool) -> None:
    """The gradient is that of what the layer leads to and of α n Σ f P, written out by key; choices are as without."""
    sizes = {**SMALL, "parallel_experts": True, "router_queries": queries, "num_cdmmoe_heads": 2}
    settings = make_settings({**sizes, "num_cdmmoe_experts": 8})  # tables of 2 and 4 keys
    x_BTd, ahead_BTd = torch.randn(2, 3, 7, 16, dtype=torch.float64)

    def layer_of(changes: list[str]) -> torch.nn.Module:
        torch.manual_seed(1)
        model = quality.build_doge(settings.model_config(), settings.train, changes).double()
        return model.model.layers[0].feed_forward

    balanced, plain = layer_of(["balanced"]), layer_of([])
    with torch.no_grad():
        assert torch.equal(balanced.eval().route(x_BTd.flatten(0, 1))[1], plain.route(x_BTd.flatten(0, 1))[1])
    (balanced.train()(x_BTd) * ahead_BTd).sum().backward()
    loss = (plain.train()(x_BTd) * ahead_BTd).sum()
    _, experts_MHk = plain.route(x_BTd.flatten(0, 1))
    for head in range(2):
        keys_Ce = plain.fold().unflatten(0, (2, -1))[head]
        for rows, choices in ((keys_Ce[:2], experts_MHk[:, head] // 4), (keys_Ce[2:], experts_MHk[:, head] % 4)):
            chances_Mn = (x_BTd.flatten(0, 1) @ rows.t()).softmax(-1)
            for key in range(len(rows)):
                share = (choices == key).double().mean()
                loss = loss + 0.01 * len(rows) * share * chances_Mn[:, key].mean() / 2
    loss.backward()
    assert balanced.keys.grad.abs().max() > 1e-3
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(balanced.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-12)


def test_a_mixture_of_inner_values_is_soft_and_hardens_where_it_is_annealed() -> None:
    """By sums over each value. Annealing begins as soft, and ends almost as the choice, which evaluation makes."""
    settings = make_settings({**SMALL, "num_inner_values": 3})
    config, x_BTd, scores_BTn = (
        settings.model_config(),
        torch.randn(2, 5, 16).double(),
        30 * torch.randn(2, 5, 3).double(),
    )

    def attention_of(change: str) -> torch.nn.Module:
        torch.manual_seed(2)
        return quality.build_doge(config, settings.train, [change] if change else []).double().model.layers[0].attn

    def mixed(temperature: float) -> torch.Tensor:
        power_BTn = (scores_BTn / temperature - scores_BTn.amax(-1, keepdim=True) / temperature).exp()
        rows = attention_of("").v_embed.weight
        return sum(power_BTn[..., j, None] / power_BTn.sum(-1, keepdim=True) * x_BTd * rows[j] for j in range(3))

    soft, annealed, plain = attention_of("soft_value"), attention_of("annealed_value").train(), attention_of("")
    hard = plain.inner_values(x_BTd, scores_BTn)
    torch.testing.assert_close(soft.eval().inner_values(x_BTd, scores_BTn), mixed(1.0))
    for temperature in (1.0, 1 - 1 / 800, 1 - 2 / 800):
        torch.testing.assert_close(annealed.inner_values(x_BTd, scores_BTn), mixed(temperature))
    assert not torch.allclose(mixed(1.0), mixed(0.5))
    annealed.passes.fill_(10_000)
    torch.testing.assert_close(annealed.inner_values(x_BTd, scores_BTn), mixed(0.05))
    torch.testing.assert_close(annealed.eval().inner_values(x_BTd, scores_BTn), hard, rtol=0, atol=0)
    assert annealed.passes == 10_001


def test_mixed_values_are_an_orthogonal_map_ahead_of_the_choice() -> None:
    settings = make_settings(SMALL)
    torch.manual_seed(3)
    model = quality.build_doge(settings.model_config(), settings.train, ["mixed_value"]).double()
    x_BTd, scores_BTn = torch.randn(2, 5, 16).double(), torch.randn(2, 5, 2).double()
    maps = []
    for layer in model.model.layers:
        # The inner value is linear in x: what it does to each unit vector, with the chosen row divided out.
        unit_dTd = torch.eye(16).double()[:, None].expand(16, 5, 16)
        scores_dTn = scores_BTn[:1].expand(16, 5, 2)
        with torch.no_grad():
            row = layer.attn.v_embed.weight[scores_BTn[0, 0].argmax()]
            map_dd = layer.attn.inner_values(unit_dTd, scores_dTn)[:, 0] / row
            found = layer.attn.inner_values(x_BTd, scores_BTn)
            rows_BTd = layer.attn.v_embed.weight[scores_BTn.argmax(-1)]
        torch.testing.assert_close(map_dd @ map_dd.t(), torch.eye(16).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found, x_BTd @ map_dd * rows_BTd)
        maps.append(map_dd)
    assert not torch.allclose(maps[0], maps[1])
    assert not any("mixing" in name for name in model.state_dict())


@pytest.mark.parametrize("architecture", ["doge", "llama"])
def test_capped_logits_are_those_of_a_tanh_in_training_and_scoring(architecture: str) -> None:
    build = quality.build_doge if architecture == "doge" else quality.build_llama
    ids = torch.randint(0, 64, (2, 12))

    def model_of(cap: float | None) -> torch.nn.Module:
        sizes = {"tie_word_embeddings": True, "embedding_multiplier": 4.0, "final_logit_softcapping": cap}
        settings = make_settings({**SMALL, **sizes})
        torch.manual_seed(4)
        model = build(settings.model_config(), settings.train).eval()
        model.lm_head.weight.data *= 400  # logits far beyond the cap
        return model

    plain, capped = model_of(None), model_of(15.0)
    logits = plain(input_ids=ids).logits.double()
    wanted = 15 * torch.tanh(logits / 15)
    assert logits.abs().max() > 20
    torch.testing.assert_close(capped(input_ids=ids).logits.double(), wanted, rtol=1e-5, atol=1e-4)
    loss = capped(input_ids=ids, labels=ids, skip_logits=True).loss
    expected = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["key_shift", "ff_shift"])
def test_the_token_before_is_seen_and_no_later_one(name: str) -> None:
    settings = make_settings(SMALL)
    torch.manual_seed(0)
    model = quality.build_llama(settings.model_config(), settings.train, ["qk_norm", name]).eval()
    ids = torch.randint(0, 64, (1, 9))
    later = ids.clone()
    later[0, 5:] = (ids[0, 5:] + 1) % 64
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, model(input_ids=later).logits
    assert torch.equal(found[:, :5], expected[:, :5])
    assert not torch.isclose(found[:, 5:], expected[:, 5:]).all()


def test_a_change_that_needs_another_width_says_so() -> None:
    settings = make_settings({**SMALL, "private_expert_intermediate_size": 8})
    with pytest.raises(quality.UserError, match="residual needs private_expert_intermediate_size = hidden_size"):
        quality.build_doge(settings.model_config(), settings.train, ["residual"])
    settings = make_settings({**SMALL, "num_cdmmoe_experts": 0})
    with pytest.raises(quality.UserError, match="num_cdmmoe_experts is 0"):
        quality.build_doge(settings.model_config(), settings.train, ["one_pool"])


@pytest.mark.parametrize("experts", [256, 0])
@pytest.mark.parametrize("row", ["doge:", "doge@linear_value:"])
def test_fit_brings_the_total_to_the_presets(row: str, experts: int) -> None:
    options = ["qk_norm=true", "shared_gate=true", "parallel_experts=true", "router_queries=false"]
    settings = load_settings("doge_25M", [*options, f"num_cdmmoe_experts={experts}"])
    _, build, _ = quality.parse_row(row)
    total = 24_422_656
    settings.model.cross_domain_intermediate_size = quality.fitted_width(build, settings, total)
    with torch.device("meta"):
        model = build(settings.model_config(), settings.train)
    # Half a step of the columns of the three matrices of eight layers.
    assert abs(sum(parameter.numel() for parameter in model.parameters()) - total) <= 8 * 8 * 3 * 256 / 2
    assert settings.model.cross_domain_intermediate_size % 8 == 0


def test_fit_says_where_nothing_is_left() -> None:
    settings = load_settings("doge_25M", ["num_cdmmoe_experts=65536"])
    with pytest.raises(quality.UserError, match=r"without the shared part the model has \d+ parameters"):
        quality.fitted_width(quality.parse_row("doge")[1], settings, 24_422_656)


def test_usage_counts_what_the_layers_choose() -> None:
    torch.manual_seed(0)
    config = DogeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, inner_values_retrieval_size=8,
        cross_domain_intermediate_size=16, private_expert_intermediate_size=8, num_cdmmoe_experts=16,
    )  # fmt: skip
    model = DogeForCausalLM(config).eval()
    layer = model.model.layers[0]
    experts = quality.watch_experts(layer.feed_forward, 16)
    values = quality.watch_values(layer.attn, 2)
    with torch.no_grad():
        layer.attn.v_keys.zero_()  # a tie everywhere: the first value is taken
        model(input_ids=torch.randint(0, 64, (3, 10)))
    assert values.tolist() == [30, 0]
    assert experts.sum().item() == 3 * 10 * config.num_cdmmoe_experts_per_head


@pytest.mark.parametrize("parallel", [False, True])
def test_the_rank_is_that_of_the_outputs(parallel: bool) -> None:
    """By the singular values of the outputs themselves; experts with rows that are multiples of one have rank 1."""
    torch.manual_seed(0)
    settings = make_settings({**SMALL, "parallel_experts": parallel})
    model = quality.build_doge(settings.model_config(), settings.train).double().eval()
    layer = model.model.layers[0].feed_forward
    x_BTd = torch.randn(3, 10, 16).double()
    with torch.no_grad():
        plain = {part: getattr(layer, part)(x_BTd).flatten(0, 1) for part in ("experts", "shared")}
        moments = {part: quality.watch_moment(layer, part, 16) for part in plain}
        for part in plain:
            getattr(layer, part)(x_BTd[:2])
            getattr(layer, part)(x_BTd[2:])
        for part, y_Md in plain.items():
            shares = torch.linalg.svdvals(y_Md) ** 2 / y_Md.square().sum()
            expected = (-(shares * shares.log()).sum()).exp().item()
            assert quality.effective_rank(moments[part]) == pytest.approx(expected, rel=1e-9)
        layer.up_embed.weight.copy_(torch.arange(1, 17)[:, None] * layer.up_embed.weight[:1])
        one = quality.watch_moment(layer, "experts", 16)
        layer.experts(x_BTd)
        assert quality.effective_rank(one) == pytest.approx(1.0, abs=1e-6)


def test_a_row_of_each_architecture_runs(command: Command, tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    config = tmp_path / "settings.yaml"
    config.write_text(make_settings(learning_rate=2e-3).to_yaml(), encoding="utf-8")
    small = "sequences_per_step=8,per_epoch_max_steps=2,num_train_epochs=1,logging_steps=1,per_device_eval_batch_size=4"
    fitted = "shared_gate=true,private_expert_intermediate_size=32,key_shift=true,feed_forward_shift=true,fit=true"
    rows = [
        f"doge:{small}",
        f"llama:{small.replace('per_epoch_max_steps=2,', '')},tokens=512",
        f"doge:{small},{fitted},num_cdmmoe_experts=0",
        f"doge:{small},as_is=true",
    ]
    places = ["--dataset_path", str(world.data), "--tokenizer_path", str(world.tokenizer_path)]
    flags = ["--preset", str(config), "--sequence_length", "32", *places, "--output_dir", str(tmp_path / "out")]
    command(quality, *flags, "--also_test", str(world.data), *rows)
    lines = (tmp_path / "out" / "quality.jsonl").read_text(encoding="utf-8").splitlines()
    doge, llama, without, preset = map(json.loads, lines)
    assert doge["tokens"] == llama["tokens"] == 2 * 8 * 32
    assert (doge["preset"], doge["sequence_length"]) == ("settings.yaml", 32)
    assert doge["eval_loss"] != llama["eval_loss"]
    assert len(doge["experts_used"]) == 2
    assert "experts_used" not in llama
    assert without["experts_used"] == []
    assert abs(without["parameters"] / doge["parameters"] - 1) < 0.02
    for row in (doge, llama, without, preset):  # the second set is the first again
        assert row["other_loss"] == pytest.approx(row["eval_loss"], abs=2e-4)
        assert {f"eval{name.removeprefix('other')}" for name in row if name.startswith("other")} <= set(row)

    def highest_rate(row: str) -> float:
        log = (tmp_path / "out" / quality.place_name(row) / "log" / "train.jsonl").read_text(encoding="utf-8")
        return max(json.loads(line).get("learning_rate", 0.0) for line in log.splitlines())

    # The protocol's rate, and the preset's own.
    assert highest_rate(rows[3]) / highest_rate(rows[0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("doge:tokens=abc", "tokens must be a positive number, not 'abc'"),
        ("doge:tokens=-1", "tokens must be a positive number"),
        ("llama:sequences_per_step=1.5", "sequences_per_step must be a positive whole number"),
        ("doge:fit=yes", "fit must be true or false, not 'yes'"),
        ("doge:train.sequence_length=64", "as --sequence_length 64"),
    ],
)
def test_what_a_row_alone_knows_is_looked_through(row: str, message: str) -> None:
    with pytest.raises(quality.UserError, match=message):
        quality.parse_row(row)


def test_what_cannot_be_run_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    places = ["--dataset_path", str(world.data), "--tokenizer_path", str(world.tokenizer_path)]
    file = tmp_path / "file"
    file.touch()
    other = make_set(tmp_path / "other", world.tokenizer_path, world.tokenizer, sequence_length=16)
    for flags, message in (
        (["--output_dir", str(file), "doge"], "is a file; name a folder"),
        (["--output_dir", str(tmp_path / "out"), "doge:tokens=100"], "100 tokens are 0 steps of 64 sequences of 1024"),
        (["--output_dir", str(tmp_path / "out"), "doge:as_is=true"], "as_is=true measures a preset; say which"),
        (["--output_dir", str(tmp_path / "out"), "--also_test", str(other), "doge"], "another --max_len"),
    ):
        monkeypatch.setattr(sys, "argv", ["quality.py", *places, *flags])
        with pytest.raises(quality.UserError, match=message):
            quality.main()
