from types import SimpleNamespace

import pytest
import torch

from doge_lm.cli import main
from doge_lm.errors import UserError
from doge_lm.training import hardware as hardware_module
from doge_lm.training.hardware import Hardware, Peak, bf16_is_faster, known_peak
from doge_lm.training.plan import count_model, estimate_memory, make_plan
from doge_lm.training.presets import preset_paths
from doge_lm.training.settings import load_settings

from .support import make_settings

GPU = Hardware(torch.device("cuda", 0), "NVIDIA H100 80GB HBM3", 80 * 2**30)
CPU = Hardware(torch.device("cpu"), "x86_64", 16 * 2**30)

# Design, sections 2 and 5: parameters; MFLOP for a token at T = 2,048; tokens an epoch.
DESIGN = {
    "doge_25M": (24_422_656, 115, 1e9),
    "doge_80M": (78_572_032, 407, 4e9),
    "doge_200M": (194_261_760, 1048, 16e9),
    "doge_320M": (322_094_080, 1724, 16e9),
    "doge_450M": (449_586_176, 2485, 64e9),
}


def plan_of(settings, hardware=CPU, **options):
    return make_plan(settings.model_config(), settings.train, hardware, **options)


@pytest.mark.parametrize("name", DESIGN)
def test_the_plan_has_the_design_s_numbers(name):
    plan = plan_of(load_settings(name), GPU)
    parameters, megaflop, tokens = DESIGN[name]
    assert plan.counts.total == parameters
    # The design's figures leave out the product keys and the chosen experts themselves: under 0.6 %.
    assert plan.flops_per_token / 1e6 == pytest.approx(megaflop, rel=6e-3)
    # "1B" is 4,000 steps of 128 sequences of 2,048 tokens.
    assert plan.steps_per_epoch * plan.tokens_per_step == pytest.approx(tokens, rel=0.05)
    assert plan.total_steps == 2 * plan.steps_per_epoch
    assert plan.warmup_steps == plan.total_steps // 10
    assert plan.micro_batch * plan.accumulate_steps == plan.sequences_per_step
    assert plan.memory.total <= 0.75 * GPU.memory


@pytest.mark.parametrize(
    ("name", "micro_batch", "gib"), [("doge_25M", 32, 4.47), ("doge_80M", 32, 15.65), ("doge_450M", 16, 30.76)]
)
def test_the_estimate_of_memory_is_near_what_was_measured(name, micro_batch, gib):
    """On an H100 and an H200 at a length of 2,048 (benchmarks/RESULTS.md, 2026-11-28)."""
    settings = load_settings(name, ["sequence_length=2048", "document_mask=false"])
    config = settings.model_config()
    found = estimate_memory(config, settings.train, count_model(config), micro_batch, True, True).total / 2**30
    assert gib <= found <= 1.15 * gib


def test_parameters_and_work_counted_by_hand():
    config = make_settings().model_config()
    counts = count_model(config)
    d, r, n, cross, e, experts, k, vocabulary = 32, 16, 2, 64, 16, 16, 2, 400
    layer = 3 * d * d + r * d + n * r + d * cross + cross * e + e * e + (4 + 4) * (e // 2)
    assert counts.matmul == 2 * (layer + k * (e + d)) + vocabulary * d
    unused = 2 * (experts - k) * (e + d)
    rest = 2 * (n * d + 2 * d) + d + vocabulary * d  # inner values, norms, token embedding
    assert counts.active == counts.matmul + rest
    assert counts.total == counts.active + unused
    assert counts.flops_per_token(32) == 6 * counts.matmul + 6 * 2 * 32 * d


def test_gains_and_shares_are_not_multiplied_as_matrices_are():
    options = ["qk_norm", "key_shift", "attention_shift", "feed_forward_shift", "value_residual", "dense_skips"]
    plain = count_model(make_settings().model_config())
    counts = count_model(make_settings(dict.fromkeys(options, True)).model_config())
    assert counts.total > plain.total
    assert counts.matmul == plain.matmul


def test_a_tied_embedding_is_counted_once_and_multiplied():
    config = make_settings({"tie_word_embeddings": True}).model_config()
    tied, untied = count_model(config), count_model(make_settings().model_config())
    assert untied.total - tied.total == 400 * 32
    assert tied.matmul == untied.matmul


def test_without_experts_every_parameter_is_active():
    config = make_settings({"num_cdmmoe_experts": 0, "private_expert_intermediate_size": 32}).model_config()
    counts = count_model(config)
    d, r, n, cross, vocabulary = 32, 16, 2, 64, 400
    assert counts.matmul == 2 * (3 * d * d + r * d + n * r + 2 * d * cross) + vocabulary * d
    assert counts.active == counts.total == counts.matmul + 2 * (n * d + 2 * d) + d + vocabulary * d


@pytest.mark.parametrize(
    ("flops", "shown"), [(1.3e9, "1.30 GFLOP/s"), (7e10, "0.07 TFLOP/s"), (9.89e14, "989.00 TFLOP/s")]
)
def test_the_speed_of_a_device_is_shown_in_digits_that_say_something(flops, shown, capsys, monkeypatch):
    monkeypatch.setattr("doge_lm.training.run.peak_flops", lambda *_: Peak(flops, "asked"))
    assert main(["train", "--config_path", "doge_tiny", "--dry_run"]) == 0
    assert f"at the peak of the device ({shown}, asked)" in capsys.readouterr().out


@pytest.mark.parametrize("name", preset_paths())
def test_every_preset_runs_dry(name, capsys):
    assert main(["train", "--config_path", name, "--dry_run"]) == 0
    assert f"{load_settings(name).train.per_epoch_max_steps:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("world", "micro", "accumulate", "expected"),
    [(1, "auto", "auto", 8), (1, 2, "auto", 2), (1, "auto", 4, 2), (2, "auto", "auto", 4), (4, 1, 2, 1)],
)
def test_the_step_is_the_same_however_it_is_shared(world, micro, accumulate, expected):
    settings = make_settings(per_device_train_batch_size=micro, accumulate_steps=accumulate)
    plan = plan_of(settings, world_size=world)
    assert plan.micro_batch == expected
    assert plan.micro_batch * plan.accumulate_steps * world == plan.sequences_per_step == 8
    assert plan.tokens_per_step == 256


def test_sequences_a_step_follow_from_the_published_keys():
    settings = make_settings(sequences_per_step="auto", per_device_train_batch_size=4, accumulate_steps=3)
    assert plan_of(settings, world_size=2).sequences_per_step == 24


@pytest.mark.parametrize(
    ("world", "train", "message"),
    [
        (1, {"per_device_train_batch_size": 3}, r"batch_size 3 does not.*set it to auto or 1 or 2 or 4 or 8"),
        (3, {}, r"sequences_per_step 8 cannot be shared by 3 devices; 6 or 9 would do"),
        (16, {}, r"cannot be shared by 16 devices; 16 would do"),
        (1, {"sequences_per_step": "auto"}, r"sequences_per_step is auto.*give both"),
        (1, {"sequence_length": 256}, r"sequence_length 256 is more than max_position_embeddings 128"),
    ],
)
def test_what_does_not_come_out_even_names_values_that_do(world, train, message):
    with pytest.raises(UserError, match=message):
        plan_of(make_settings(**train), world_size=world)


@pytest.mark.parametrize("value", [3, 16])
@pytest.mark.parametrize("key", ["per_device_train_batch_size", "accumulate_steps"])
def test_only_keys_that_were_set_are_named(key, value):
    settings = make_settings(**{"per_device_train_batch_size": "auto", "accumulate_steps": "auto", key: value})
    with pytest.raises(UserError) as error:
        plan_of(settings, world_size=2)
    assert str(error.value) == (
        f"{key} {value} does not divide the 4 sequences of each device (sequences_per_step 8, devices 2); "
        "set it to auto or 1 or 2 or 4"
    )


def test_both_keys_are_named_where_both_were_set():
    settings = {"per_device_train_batch_size": 2, "accumulate_steps": 1}
    said = r"^per_device_train_batch_size 2 x accumulate_steps 1 is 2, not the 4 .* set sequences_per_step to 4, or"
    with pytest.raises(UserError, match=said):
        plan_of(make_settings(**settings), world_size=2)
    assert plan_of(make_settings(**settings, sequences_per_step=4), world_size=2).accumulate_steps == 1


def test_auto_fills_a_gpu_but_not_over_the_estimate():
    settings = load_settings("doge_25M")
    small = Hardware(GPU.device, "a small GPU", 12 * 2**30)
    config, train = settings.model_config(), settings.train
    for gpu in (GPU, small):
        micro = make_plan(config, train, gpu).micro_batch
        counts = count_model(config)
        assert estimate_memory(config, train, counts, micro, True, False).total <= 0.75 * gpu.memory
        assert estimate_memory(config, train, counts, 2 * micro, True, False).total > 0.75 * gpu.memory
    assert make_plan(config, train, small).micro_batch < make_plan(config, train, GPU).micro_batch


def test_muon_keeps_one_moment_of_the_matrices():
    d, r, cross, e = 32, 16, 64, 16
    matrices = 2 * (3 * d * d + r * d + d * cross + cross * e + e * e)
    adamw, muon = plan_of(make_settings()), plan_of(make_settings(optimizer="muon"))
    assert adamw.counts.hidden == matrices
    assert adamw.memory.optimizer == 8 * adamw.counts.total
    assert adamw.checkpoint_bytes == 12 * adamw.counts.total
    assert adamw.memory.optimizer - muon.memory.optimizer == 4 * matrices
    assert adamw.checkpoint_bytes - muon.checkpoint_bytes == 4 * matrices
    assert ", AdamW 0.00, " in adamw.table()
    assert ", Muon and AdamW 0.00, " in muon.table()


def test_auto_takes_small_micro_batches_on_a_cpu_however_much_fits():
    settings = load_settings("doge_tiny")
    assert (settings.train.sequence_length, settings.train.sequences_per_step) == (512, 4)
    assert plan_of(settings, CPU).micro_batch == 2
    assert plan_of(settings, GPU).micro_batch == 4
    assert plan_of(load_settings("doge_25M"), CPU).micro_batch == 1  # one sequence is more than that


def test_checkpointing_and_compiling_lower_the_estimate():
    settings = load_settings("doge_80M")
    plain = plan_of(settings, GPU).memory
    settings.train.per_device_train_batch_size = 8
    plain = plan_of(settings, GPU).memory
    assert plan_of(settings, GPU, compiled=True).memory.total < plain.total
    settings.train.gradient_checkpointing = True
    assert plan_of(settings, GPU).memory.activations < plain.activations / 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_skips_keep_an_output_of_each_layer_in_float32(compiled, checkpointing):
    """Also where layers run again in the backward pass: the gradient of the gains is of the whole run."""
    layers, added = activations_added_by("dense_skips", compiled, checkpointing)
    assert added == 4 * (layers + checkpointing)  # one layer's more while it runs again


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_value_residual_keeps_an_input_and_the_sums_of_others(compiled, checkpointing):
    """One sum at a time where layers run again in the backward pass."""
    layers, added = activations_added_by("value_residual", compiled, checkpointing)
    a_sum = 2 if compiled else 4
    assert added == (2 + a_sum if checkpointing else layers * a_sum)


def activations_added_by(option, compiled, checkpointing):
    """The layers of a model, and the bytes of each token and feature that the option adds to what is kept."""
    settings = load_settings("doge_80M", ["per_device_train_batch_size=8", f"gradient_checkpointing={checkpointing}"])
    before = plan_of(settings, GPU, compiled=compiled).memory.activations
    setattr(settings.model, option, True)
    added = plan_of(settings, GPU, compiled=compiled).memory.activations - before
    numbers = 8 * settings.train.sequence_length * settings.model.hidden_size
    return settings.model.num_hidden_layers, added / numbers


def test_data_smaller_than_the_plan_makes_epochs_shorter_and_says_so():
    plan = plan_of(make_settings(), rows=37)  # an epoch of 6 steps of 8 wants 48
    assert (plan.steps_per_epoch, plan.total_steps) == (4, 8)
    assert "holds 4 steps an epoch, not the 6" in plan.table()
    assert "the settings ask for 6" in plan.table()


def test_data_smaller_than_the_plan_is_an_error_if_strict():
    with pytest.raises(UserError, match=r"has 37 rows.*needs 48.*per_epoch_max_steps to at most 4"):
        plan_of(make_settings(), rows=37, strict=True)
    assert plan_of(make_settings(), rows=48, strict=True).steps_per_epoch == 6


def test_data_for_not_even_a_step_is_an_error():
    with pytest.raises(UserError, match=r"not even one step.*sequences_per_step to at most 7"):
        plan_of(make_settings(), rows=7)


def test_data_larger_than_the_plan_says_how_much_stays_out():
    plan = plan_of(make_settings(), rows=100)  # two epochs of 48
    assert plan.total_steps == 12
    assert "4 of its 100 rows" in plan.table()


@pytest.mark.parametrize(
    ("small", "large", "faster", "asked"),
    [
        (1 / 40, 1 / 90, False, {256}),
        (0.8, 0.9, False, {256, 1024}),
        (0.6, 1.4, False, {256, 1024}),
        (0.9, 3.0, True, {256, 1024}),
    ],
)
def test_a_cpu_is_asked_whether_bfloat16_pays(monkeypatch, small, large, faster, asked):
    """By small products where these tell already; `small` and `large`: its rate as a share of that of float32."""
    sizes = []

    def rate(device, dtype, size, seconds=0.2):
        if dtype != torch.bfloat16:
            return 1e11
        sizes.append(size)
        return 1e11 * (small if size == 256 else large)

    monkeypatch.setattr(hardware_module, "matmul_rate", rate)
    assert bf16_is_faster(CPU.device) is faster
    assert set(sizes) == asked


def test_a_cpu_is_not_taken_for_a_slow_one_because_it_was_busy_at_first(monkeypatch):
    """The first five products take 12 ms, as where another process has the core, then 0.2 ms."""
    now, calls = 0.0, 0

    def synchronize(device):
        nonlocal now, calls
        calls += 1
        if calls % 2 == 0:  # behind a product
            now += 0.012 if calls <= 10 else 0.0002

    monkeypatch.setattr(hardware_module, "matmul_rate", hardware_module.matmul_rate.__wrapped__)
    monkeypatch.setattr(hardware_module, "synchronize", synchronize)
    monkeypatch.setattr(hardware_module, "time", SimpleNamespace(perf_counter=lambda: now))
    assert hardware_module.measure_matmul(CPU.device, torch.float32) == pytest.approx(2 * 1024**3 / 0.0002)


def test_known_gpus_by_the_names_they_report():
    assert known_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert known_peak("NVIDIA A10") == 125e12
    assert known_peak("NVIDIA GeForce RTX 4090") == 165.2e12
    assert known_peak("Unheard-of 9000") is None
