"""The options beside the published form, each alone and all together, by the same tests as the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from doge_lm import DogeForCausalLM
from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.model import cdmoe, linear_cross_entropy, modeling_doge
from tests.conftest import ALL

from .support import SHIFTS, TINY, random_ids, reference_of, relative_error, tiny_config, tiny_model

# Parallel experts read the layer's input, so e is d there.
OPTIONS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "key_shift": {"key_shift": True},
    "attention_shift": {"attention_shift": True},
    "feed_forward_shift": {"feed_forward_shift": True},
    "value_residual": {"value_residual": True},
    "dense_skips": {"dense_skips": True, "num_hidden_layers": 4},
    "shared_gate": {"shared_gate": True},
    "parallel": {"parallel_experts": True, "private_expert_intermediate_size": 24},
    "no queries": {"router_queries": False},
    "multiplier": {"embedding_multiplier": 3.0},
    "cap": {"final_logit_softcapping": 3.0},
    "no experts": {"num_cdmmoe_experts": 0, "private_expert_intermediate_size": 24},
    "all but shifts": {
        **{"qk_norm": True, "shared_gate": True, "parallel_experts": True, "private_expert_intermediate_size": 24},
        **{"router_queries": False, "dense_skips": True, "value_residual": True},
    },
    "all": {
        **{"qk_norm": True, "shared_gate": True, "parallel_experts": True, "private_expert_intermediate_size": 24},
        **{"router_queries": False, "dense_skips": True, "value_residual": True, "embedding_multiplier": 0.5, **SHIFTS},
        **{"final_logit_softcapping": 3.0},
    },
    "all but experts": {
        **{"qk_norm": True, "shared_gate": True, "num_cdmmoe_experts": 0, "private_expert_intermediate_size": 24},
        **SHIFTS,
    },
}
each_option = pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
TOGETHER = [name for name in OPTIONS if ALL or name.startswith("all")]  # what takes ten seconds; has every option


def test_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_model().state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tiny_model(**OPTIONS["all"]).state_dict().items()}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        del shapes[f"{prefix}.feed_forward.queries.weight"]
        shapes |= {
            f"{prefix}.attn.q_norm.weight": (8,),
            f"{prefix}.attn.k_norm.weight": (8,),
            f"{prefix}.attn.k_shift.shares": (24,),
            f"{prefix}.attn_shift.shares": (24,),
            f"{prefix}.ff_shift.shares": (24,),
            f"{prefix}.feed_forward.shared_gate_proj.weight": (28, 24),
            f"{prefix}.feed_forward.shared_down_proj.weight": (24, 28),
            f"{prefix}.feed_forward.keys": (2, 3 + 4, 24),
            f"{prefix}.feed_forward.down_embed.weight": (12, 24),
        }
    assert found == shapes | {"model.skips.gains": (1, 24), "model.layers.1.attn.value_gains": (24,)}


def test_biases() -> None:
    model = tiny_model(hidden_bias=True, dtype=torch.float64, **OPTIONS["all"])
    assert model.model.layers[0].feed_forward.shared_gate_proj.bias.shape == (28,)
    assert_equals_reference(model, random_ids(2, 6))


def test_parallel_experts_need_the_width_of_the_layer() -> None:
    message = r"private_expert_intermediate_size is 14.*must equal hidden_size, 24"
    with pytest.raises(ValueError, match=message):
        tiny_config(parallel_experts=True)
    with pytest.raises(ValueError, match=message):
        tiny_config(num_cdmmoe_experts=0)
    with pytest.raises(ValueError, match="num_cdmmoe_experts is -1; it must be a whole number from 0"):
        tiny_config(num_cdmmoe_experts=-1)


def assert_equals_reference(model: DogeForCausalLM, ids: Tensor) -> None:
    """Logits and all gradients in float64."""
    direction = torch.randn(
        *ids.shape, TINY["vocab_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    found = model(ids).logits
    (found * direction).sum().backward()
    expected = reference_of(model)
    for tensor in expected.state.values():
        tensor.requires_grad_()
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(ids.shape[1])[None])
    logits = expected.run(ids, cos, sin).logits
    torch.testing.assert_close(found, logits, rtol=1e-10, atol=1e-10)
    (logits * direction).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 1e-6, name
        torch.testing.assert_close(parameter.grad, expected.state[name].grad, rtol=1e-8, atol=1e-8, msg=name)


@each_option
@pytest.mark.parametrize("path", ["gather", "dense"])
def test_equals_reference(path: str, changes: dict[str, Any]) -> None:
    assert_equals_reference(tiny_model(cdmoe_path=path, dtype=torch.float64, seed=6, **changes), random_ids(2, 6))


@each_option
def test_a_token_changes_nothing_before_it_and_nothing_in_another_row(changes: dict[str, Any]) -> None:
    model = tiny_model(dtype=torch.float64, **changes)
    ids = random_ids(3, 8)
    changed = ids.clone()
    changed[0, 4] = 3 + (ids[0, 4] - 2) % (TINY["vocab_size"] - 3)
    with torch.no_grad():
        moved = (model(changed).logits - model(ids).logits).abs().amax(-1)
    assert float(moved[0, 4:].min()) > 1e-6
    assert float(moved[0, :4].max()) < 1e-12
    assert float(moved[1:].max()) < 1e-12


@pytest.mark.parametrize("weight_init", ["normal", "fan_in"])
def test_weights_start_where_the_config_says(weight_init: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "private_expert_intermediate_size": 192, "num_attention_heads": 2}
    options = dict.fromkeys(("qk_norm", "shared_gate", "parallel_experts"), True) | {"router_queries": False}
    model = DogeForCausalLM(tiny_config(**sizes, **options, weight_init=weight_init, initializer_range=0.03))
    layer = model.model.layers[0]
    std = 0.03 if weight_init == "normal" else 192**-0.5
    for tensor in (layer.feed_forward.keys, layer.feed_forward.shared_gate_proj.weight):
        assert abs(float(tensor.detach().std()) / std - 1) < 0.1
    assert bool((layer.attn.q_norm.weight == 1).all())
    assert bool((layer.attn.k_norm.weight == 1).all())


@each_option
def test_decoding_gives_the_tokens_of_whole_passes(changes: dict[str, Any]) -> None:
    """Over caches, with rows padded; the decoder also lends products of weights."""
    model = tiny_model(**changes)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (7, 3)]
    found = Decoder(model).generate(prompts, Sampling(6))
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            while ids.shape[1] < len(prompt) + len(tokens):
                ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        assert tokens == ids[0, len(prompt) :].tolist()


@each_option
def test_a_packed_row_equals_its_documents_run_apart(changes: dict[str, Any]) -> None:
    model = tiny_model(dtype=torch.float64, **changes)
    ids = random_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(part).logits for part in ids.split([4, 5], dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-10, atol=1e-10)


@each_option
def test_saving_and_loading(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    loaded = DogeForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("changes", [OPTIONS[name] for name in TOGETHER], ids=TOGETHER)
def test_compiled_and_put_together_as_plain(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # each option compiles the same code again, and PyTorch counts how often
    model = tiny_model(dtype=torch.float64, **changes).train()
    ids = random_ids(2, 10)
    parameters = list(model.parameters())
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(expected, parameters)
    monkeypatch.setattr(modeling_doge, "MERGE_MIN_TOKENS", 1)
    monkeypatch.setattr(modeling_doge, "folding_pays", lambda *sizes: True)
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = run(ids, labels=ids, skip_logits=True, use_cache=False).loss
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        for one, other in zip(torch.autograd.grad(loss, parameters), gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@each_option
def test_kernels_give_the_plain_loss_and_gradients(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, or on a GPU."""
    pytest.importorskip("triton", reason="there is no Triton for this machine")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model(**changes).to(device).train()
    ids = random_ids(3, 12).to(device)
    monkeypatch.setattr(modeling_doge, "MERGE_MIN_TOKENS", ids.numel())
    monkeypatch.setattr(cdmoe, "DENSE_MIN_TOKENS", ids.numel())
    monkeypatch.setattr(modeling_doge, "folding_pays", lambda *sizes: True)
    used = []

    def note(module: Any, name: str) -> None:
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: (used.append(name), plain(*args, **options))[1])

    rotation = "fused_normed_rotation" if changes.get("qk_norm") else "fused_rotation"
    kernels = {rotation, "chosen_hidden"} - ({rotation} if changes.get("key_shift") else set())
    if changes.get("num_cdmmoe_experts") == 0:
        kernels.remove("chosen_hidden")
    for module, name in ((modeling_doge, rotation), (cdmoe, "chosen_hidden")):
        note(module, name)

    def loss_and_gradients(take: bool) -> tuple[Tensor, dict[str, Tensor]]:
        for module in (cdmoe, linear_cross_entropy, modeling_doge):
            monkeypatch.setattr(module, "kernels_take", lambda x: take and x.dtype != torch.float64)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = loss_and_gradients(False)
    assert not used
    found, found_gradients = loss_and_gradients(True)
    assert set(used) == kernels
    assert abs(found - expected) < 1e-5
    assert found_gradients.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert relative_error(found_gradients[name], gradient) < 2e-4, name


def test_norms_that_are_more_than_gains_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on a norm of queries acts where the kernel would have taken its place."""
    pytest.importorskip("triton", reason="there is no Triton for this machine")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = tiny_model(qk_norm=True).to(device).eval(), random_ids(3, 12).to(device)
    monkeypatch.setattr(modeling_doge, "MERGE_MIN_TOKENS", ids.numel())
    before = model(ids, use_cache=False).logits
    model.model.layers[0].attn.q_norm.register_forward_hook(lambda module, args, out: out.roll(1, -1))
    expected = model(ids, use_cache=False).logits
    assert relative_error(before, expected) > 1e-2
    for module in (cdmoe, modeling_doge):
        monkeypatch.setattr(module, "kernels_take", lambda x: x.dtype != torch.float64)
    assert relative_error(model(ids, use_cache=False).logits, expected) < 1e-4


def test_a_first_layer_whose_input_is_lost_is_named() -> None:
    model = tiny_model(value_residual=True)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out[0])
    with pytest.raises(ValueError, match="value_residual needs what attention reads in the first layer"):
        model(random_ids(1, 5))


def test_skips_of_a_model_in_bfloat16_are_rounded_once() -> None:
    skips = modeling_doge.DenseSkips(layers=25, size=64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        skips.gains.normal_(generator=generator)
    skips.bfloat16()
    outputs = [torch.randn(2, 5, 64, generator=generator).bfloat16() for _ in range(25)]
    gains = skips.gains[-24:].double()
    expected = outputs[-1] + sum(g * x for g, x in zip(gains, outputs, strict=False))  # type: ignore[operator]
    found = skips(outputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_type_of_products_is_that_of_a_product(dtype: torch.dtype) -> None:
    x = torch.ones(2, 2, dtype=dtype)
    assert cdmoe.type_of_products(x) == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert cdmoe.type_of_products(x) == (x @ x).dtype


def test_autocast_leaves_the_type_of_the_products() -> None:
    """A norm with gains in float32 must not make queries wider than values, or attention takes another kernel."""
    model = tiny_model(qk_norm=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        attention = model.model.layers[0].attn
        angles = model.model.rotary_emb(torch.zeros(1), torch.arange(5)[None])
        query, key, _ = attention.rotated_projections(torch.randn(2, 5, 24), *angles)
    assert query.dtype == key.dtype == torch.bfloat16
