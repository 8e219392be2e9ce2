"""`benchmarks/train_step.py` and `peers.py`: the peers are what they are said to be, and every row becomes figures."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama import modeling_llama

from doge_lm import DogeConfig, DogeForCausalLM
from doge_lm.errors import UserError
from doge_lm.training.plan import count_model
from doge_lm.training.settings import load_settings
from tests.benchmarks.conftest import Command
from tests.conftest import ALL
from tests.training.support import LENGTH, World, make_settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import quality  # noqa: E402
import train_step  # noqa: E402

PRESETS = ["doge_25M", "doge_80M", "doge_450M"]


def small_config(**changes):
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_inner_values": 3,
        "inner_values_retrieval_size": 8, "cross_domain_intermediate_size": 40, "private_expert_intermediate_size": 10,
        "num_cdmmoe_experts": 15, "num_cdmmoe_heads": 2, "num_cdmmoe_experts_per_head": 4, "weight_init": "fan_in",
    }  # fmt: skip
    return DogeConfig(**{**sizes, **changes})


def packed_batch(documents):
    ids = torch.randint(3, 61, (2, 12))
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}
    if documents:
        batch["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(1), *range(8), *range(3)]])
    return batch


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("changes", [{}, {"hidden_bias": True, "num_cdmmoe_heads": 1, "tie_word_embeddings": True}])
def test_published_is_doge(changes, documents) -> None:
    torch.manual_seed(0)
    config = small_config(**changes)
    doge = DogeForCausalLM(config).double()
    published = peers.PublishedForCausalLM(small_config(**changes)).double()
    published.load_state_dict(doge.state_dict())
    batch = packed_batch(documents)
    ours, theirs = doge(**batch), published(**batch)
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert (doge(**unlabelled).logits - published(**unlabelled).logits).abs().max() < 1e-9
    assert abs(ours.loss - theirs.loss) < 1e-9
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(published.named_parameters())
    # Behind the last choice of inner values the two have the same gradient; before it Doge's is straight-through.
    for name, parameter in doge.named_parameters():
        if name.startswith(("model.layers.1.feed_forward", "model.layers.1.in_ff", "model.final", "lm_head")):
            assert (parameter.grad - gradients[name].grad).abs().max() < 1e-9, name
    assert gradients["model.layers.1.attn.v_keys"].grad is None


def test_published_refuses_other_rotary_angles() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_parameters: rope_type is 'linear'"):
        peers.PublishedForCausalLM(small_config(rope_parameters=rope))


def test_published_starts_from_the_weights_of_a_doge() -> None:
    settings = make_settings()
    torch.manual_seed(3)
    doge = peers.build_doge(settings.model_config(), settings.train)
    torch.manual_seed(3)
    published = peers.build_published(settings.model_config(), settings.train)
    for name, weight in published.state_dict().items():
        assert torch.equal(weight, doge.state_dict()[name]), name


@pytest.mark.parametrize("options", [[], ["dense_skips=true", "value_residual=true", "key_shift=true", "qk_norm=true"]])
@pytest.mark.parametrize("preset", PRESETS)
def test_work_is_counted_as_the_plan_counts_it(preset, options) -> None:
    config = load_settings(preset, options).model_config()
    with torch.device("meta"):
        model = DogeForCausalLM(config)
    assert peers.flops_per_token(model, 2048) == count_model(config).flops_per_token(2048)


@pytest.mark.parametrize("tied", [False, True])
def test_work_of_the_other_models_by_hand(tied) -> None:
    settings = make_settings({"tie_word_embeddings": tied})
    config, train = settings.model_config(), replace(settings.train, document_mask=True)
    d, layers, head, attention = 32, 2, 32 * 400, 6 * 2 * 100 * 32
    llama = peers.build_llama_fair(config, train)
    width = llama.config.intermediate_size
    assert peers.flops_per_token(llama, 100) == 6 * (layers * (4 * d * d + 3 * d * width) + head) + attention
    dense = peers.build_dense(config, train)
    values = 16 * d + 2 * 16
    assert peers.flops_per_token(dense, 100) == 6 * (layers * (3 * d * d + values + 2 * d * 64) + head) + attention
    theirs = peers.build_transformers_doge(config, train)
    width = theirs.config.intermediate_size
    layer = 4 * d * d + d * 2 + 3 * d * width + d * 8 + 2 * 2 * d  # dt_proj has h outputs, the router 2·√N
    assert peers.flops_per_token(theirs, 100) == 6 * (layers * layer + head) + attention


def test_dense_has_a_plain_mlp_in_place_of_the_experts() -> None:
    torch.manual_seed(0)
    settings = make_settings({"weight_init": "fan_in"})
    model = peers.build_dense(settings.model_config(), settings.train).double()
    assert not any(name.endswith(peers.EXPERT_TABLES) for name, _ in model.named_parameters())
    mlp = model.model.layers[1].feed_forward
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    inner = x @ mlp.up_proj.weight.T
    expected = (inner / (1 + (-inner).exp())) @ mlp.down_proj.weight.T
    assert torch.allclose(mlp(x), expected, rtol=0, atol=1e-12)
    assert abs(mlp.down_proj.weight.std().item() * 64**0.5 - 1) < 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_the_peers_have_about_as_many_parameters(preset) -> None:
    settings = load_settings(preset)
    config, total = settings.model_config(), count_model(settings.model_config()).total
    with torch.device("meta"):
        llama = peers.build_llama_fair(config, settings.train)
        doge = peers.TransformersDoge(peers.transformers_doge_like(config))
    for model in (llama, doge):
        assert model.config.intermediate_size % 64 == 0
        assert model.config.num_hidden_layers == config.num_hidden_layers
        assert abs(sum(parameter.numel() for parameter in model.parameters()) / total - 1) < 0.02
    assert doge.config.num_experts == config.num_cdmmoe_experts


@pytest.mark.parametrize("documents", [False, True])
def test_llama_without_a_mask_has_the_same_loss(documents, monkeypatch) -> None:
    masks = []
    attend = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def noting(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return attend(module, query, key, value, attention_mask, **kwargs)

    settings = make_settings({"vocab_size": 61}, document_mask=documents)
    llama = peers.build_llama_fair(settings.model_config(), settings.train).double()
    batch = {**packed_batch(documents), "use_cache": False}  # as the trainer has it
    attention = "sdpa" if documents else quality.CAUSAL
    monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS._global_mapping, attention, noting)
    loss = llama(**batch).loss
    assert all((mask is not None) == documents for mask in masks)
    assert len(masks) == 2
    llama.set_attn_implementation("eager")  # which always writes the mask out
    assert abs(llama(**batch).loss - loss) < 1e-6  # the loss is in float32


def test_one_llama_has_the_mask_that_transformers_makes() -> None:
    settings = make_settings({"vocab_size": 61}, document_mask=False)
    builders = (train_step.BUILDERS["llama"], quality.build_llama, peers.build_llama_fair)
    found = [build(settings.model_config(), settings.train).config._attn_implementation for build in builders]
    assert found == ["sdpa", quality.CAUSAL, quality.CAUSAL]


@pytest.mark.parametrize("peer", ["llama_fair", "transformers_doge", "published"])
def test_a_peer_without_capped_logits_refuses_a_cap(peer: str) -> None:
    settings = make_settings({"vocab_size": 61, "final_logit_softcapping": 15.0})
    with pytest.raises(UserError, match=f"{peer} has no final_logit_softcapping.*final_logit_softcapping=null"):
        train_step.BUILDERS[peer](settings.model_config(), settings.train)


def test_llama_compiles_without_a_mask() -> None:
    """A mask of T×T in the graph, or a break of it, would cost the peer its flash kernel."""
    calls = []

    def noting(graph, _inputs):
        calls.extend(node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target))
        return graph.forward

    settings = make_settings({"vocab_size": 61}, document_mask=False)
    llama = peers.build_llama_fair(settings.model_config(), settings.train)
    llama.compile(fullgraph=True, dynamic=False, backend=noting)
    llama(**packed_batch(False), use_cache=False)
    assert len(calls) == 2
    assert all(call.kwargs["attn_mask"] is None and call.kwargs["is_causal"] for call in calls)


def test_summary_leaves_the_first_lines_out() -> None:
    rates = [1.0, 2.0, 400.0, 100.0, 200.0]
    lines = [{"step": 10 * i, "loss": 5.0 - i, "tokens_per_second": rate} for i, rate in enumerate(rates)]
    figures = train_step.summarize(lines, tokens_per_step=50)
    assert figures["tokens_per_second"] == 200
    assert figures["ms_per_step"] == 250
    assert (figures["slowest_line"], figures["fastest_line"]) == (100, 400)
    assert figures["measured_steps"] == 30


def test_comparisons_and_tables() -> None:
    def row(kind, rate, flops):
        return {
            "preset": "p", "row": kind, "tokens_per_second": rate, "flops_per_token": flops, "ms_per_step": 1000 / rate,
            "mfu": 0.25, "micro_batch": 4,
        }  # fmt: skip

    rows = [row("doge", 90, 110), row("doge", 110, 110), row("dense", 125, 100), row("bare", 104, 110)]
    rows.append({"preset": "p", "row": "llama", "micro_batch": 4, "error": "OutOfMemoryError: too large"})
    (found,) = train_step.compare(rows)
    assert found["doge / dense"] == 0.8
    assert found["doge / dense, by work"] == 0.88
    assert found["doge / llama"] is None
    # The median of the two times of doge, 1000/90 and 1000/110 ms, over that of bare.
    assert found["trainer overhead"] == pytest.approx((1000 / 90 + 1000 / 110) / 2 / (1000 / 104) - 1, abs=1e-4)
    lines = train_step.results_table(rows).splitlines()
    assert {line.count("|") for line in lines[:7]} == {len(train_step.COLUMNS) + 1}
    assert "25.0%" in lines[2]
    assert lines[-1] == "p, llama: OutOfMemoryError: too large"
    assert "| 0.80 |" in train_step.comparison_table([found])
    assert "5.1%" in train_step.comparison_table([found])


def test_a_short_set_is_passed_more_than_once() -> None:
    args = SimpleNamespace(
        micro_batch=None, peer_micro_batch=None, steps=120, sequence_length=2048, document_mask=False,
        overrides=["a=1"], output_dir=Path("out"), dataset_path="d", tokenizer_path="t", memory_cap_gib=None,
    )  # fmt: skip
    row = train_step.make_row(args, "doge_25M", "doge", 0, rows_of_data=1000)
    assert (row.micro_batch, row.steps, row.logging_steps) == (32, 120, 10)
    assert {"num_train_epochs=4", "per_epoch_max_steps=30", "a=1"} <= set(row.settings)
    assert train_step.make_row(args, "doge_25M", "published", 0, 10**6).micro_batch == 8


def flags_of(world, config, out):
    return [
        *("--preset", str(config), "--steps", "5", "--output_dir", str(out)),
        *("--dataset_path", str(world.data), "--tokenizer_path", str(world.tokenizer_path)),
    ]


@pytest.mark.slow
def test_every_row_runs_through_the_trainer(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    # Of the rows' processes: threads wait for each other in so small a model, and the conftest's interpreter of Triton
    # would take the place of the paths that a CPU has.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    world = World(tmp_path / "world")
    config = tmp_path / "settings.yaml"
    config.write_text(make_settings({"hidden_dropout": 0.0}).to_yaml(), encoding="utf-8")
    rows = ("doge", "dense", "llama_fair", "transformers_doge", "published", "bare")  # llama: in test_quality.py
    if not ALL:  # each is a process of its own
        rows = ("doge", "dense", "published")
    flags = ("--sequence_length", str(LENGTH), "--peer_micro_batch", "4", "--rows", *rows)
    output = command(train_step, *flags_of(world, config, tmp_path / "out"), *flags)
    report = json.loads((tmp_path / "out" / "train_step.json").read_text(encoding="utf-8"))
    found = {row["row"]: row for row in report["rows"]}
    assert tuple(found) == rows
    for row in found.values():
        assert "error" not in row, row
        assert row["measured_steps"] == 3
        assert row["last_loss"] < row["first_loss"]
        assert row["compilations"] == 0
        assert row["tokens_per_second"] == pytest.approx(4 * LENGTH / row["ms_per_step"] * 1000, rel=0.01)
        assert 0 < row["first_step_seconds"] < row["seconds"]
    # The same weights, the same batches in the same order and the same settings; other models start elsewhere.
    assert found["published"]["first_loss"] == pytest.approx(found["doge"]["first_loss"], abs=1e-5)
    assert abs(found["dense"]["first_loss"] - found["doge"]["first_loss"]) > 1e-5
    config = load_settings(str(config)).model_config()
    assert found["doge"]["flops_per_token"] == count_model(config).flops_per_token(LENGTH)
    assert report["comparisons"][0]["doge / dense"] > 0
    assert "| settings | published |" in output
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_what_goes_wrong_becomes_the_error_of_a_row(tmp_path) -> None:
    row = train_step.Row(
        kind="doge", preset="doge_tiny", dataset_path=str(tmp_path / "none"), tokenizer_path=str(tmp_path), steps=5,
        place=str(tmp_path / "row"), logging_steps=1, micro_batch=4, memory_cap_gib=None,
        settings=["sequences_per_step=auto", "per_device_train_batch_size=4", "accumulate_steps=1"],
    )  # fmt: skip
    assert train_step.run_row(row, timeout=0.01) == {"error": "not done after 0 s"}
    error = train_step.run_row(row, timeout=300)["error"]
    assert error.startswith("UserError: ")
    assert str(tmp_path) in error


def test_bad_flags_are_named(tmp_path, monkeypatch) -> None:
    world = World(tmp_path / "world")
    config = tmp_path / "settings.yaml"
    config.write_text(make_settings().to_yaml(), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train_step.py", *flags_of(world, config, tmp_path / "out")])
    with pytest.raises(UserError, match=f"--sequence_length {LENGTH}"):
        train_step.main()
    sys.argv += ["--memory_cap_gib", "0"]
    with pytest.raises(UserError, match=r"--memory_cap_gib 0.0: it must be above 0"):
        train_step.main()


def test_settings_that_have_a_flag_are_refused() -> None:
    args = SimpleNamespace(
        micro_batch=4, peer_micro_batch=None, steps=12, sequence_length=32, document_mask=False,
        overrides=["train.logging_steps=3"], output_dir=Path("out"), memory_cap_gib=None,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"--set train.logging_steps=3: the benchmark settles it"):
        train_step.make_row(args, "doge_25M", "doge", 0, rows_of_data=1000)
