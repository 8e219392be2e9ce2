"""Caches, packing, attention backends, generation, and what transformers expects of a causal LM."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from doge_lm import DogeForCausalLM, DogeModel

from . import reference
from .support import (
    TINY,
    left_padded,
    random_ids,
    text_batch,
    tiny_config,
    tiny_model,
    with_and_without_shifts,
)

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile's default backend needs a C++ compiler")


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, *, new: int = 8, **options: Any) -> Any:
    """Generate exactly `new` tokens and keep the logits of each."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


# --------------------------------------------------------------------------------------------------------- caches


@with_and_without_shifts
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_equals_uncached_for_left_padded_rows(
    cache: str, attention: str, form: dict[str, bool]
) -> None:
    """And both equal each row generated alone, without padding or cache."""
    model = tiny_model(attention=attention, **form)
    ids, mask = left_padded([9, 4, 6])
    uncached = generate(model, ids, mask, use_cache=False, do_sample=False)
    cached = generate(model, ids, mask, use_cache=True, do_sample=False, cache_implementation=cache)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=1e-4)
    for row in range(len(ids)):
        alone = generate(model, ids[row : row + 1, mask[row] == 1], use_cache=False, do_sample=False)
        assert torch.equal(alone.sequences[0, -8:], cached.sequences[row, -8:])
        found = torch.stack(cached.logits)[:, row]
        torch.testing.assert_close(found, torch.stack(alone.logits)[:, 0], rtol=0, atol=1e-4)


@with_and_without_shifts
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 5], [9, 1], [3, 7]], ids=str)
def test_feeding_pieces_through_a_cache_equals_one_pass(cache: str, pieces: list[int], form: dict[str, bool]) -> None:
    """Prefill in chunks as well as token by token; positions are worked out from what the cache holds."""
    model = tiny_model(dtype=torch.float64, **form)
    ids = random_ids(2, sum(pieces))
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        assert whole.past_key_values is None
        past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
        logits, start = [], 0
        for size in pieces:
            out = model(ids[:, start : start + size], past_key_values=past, use_cache=True)
            logits.append(out.logits)
            start += size
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=1e-10, atol=1e-10)


def test_use_cache_defaults_to_the_config() -> None:
    ids = random_ids(1, 4)
    with torch.no_grad():
        assert tiny_model(use_cache=True)(ids).past_key_values.get_seq_length() == 4
        assert tiny_model(use_cache=False)(ids).past_key_values is None


# -------------------------------------------------------------------------------------------------------- packing


def packed(lengths: list[int], *, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One row of several documents, its positions, and the documents."""
    documents = [random_ids(1, length, seed=seed + index) for index, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.cat(documents, dim=1), positions, documents


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_row_equals_its_documents_run_apart(attention: str) -> None:
    model = tiny_model(attention=attention)
    ids, positions, documents = packed([5, 1, 7, 3])
    other_ids, other_positions, other_documents = packed([8, 8], seed=10)
    with torch.no_grad():
        apart = torch.cat([model(document).logits for document in documents], dim=1)
        other_apart = torch.cat([model(document).logits for document in other_documents], dim=1)
        together = model(
            torch.cat([ids, other_ids]), position_ids=torch.cat([positions, other_positions]), use_cache=False
        ).logits
        by_default = model(
            torch.cat([ids, other_ids]), position_ids=torch.cat([positions, other_positions]), use_cache=True
        ).logits
        without = model(ids, use_cache=False).logits
    torch.testing.assert_close(by_default, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, torch.cat([apart, other_apart]), rtol=0, atol=1e-5)
    assert float((without - apart).abs().max()) > 0.1, "documents do not see each other even without packing"


def test_packed_training_equals_documents_run_apart() -> None:
    """Loss and gradients, with the first token of each document no target."""
    model = tiny_model(dtype=torch.float64)
    ids, positions, documents = packed([5, 7, 3])
    labels = ids.masked_fill(positions == 0, -100)
    model(ids, position_ids=positions, labels=labels, use_cache=False).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    targets = sum(document.shape[1] - 1 for document in documents)
    for document in documents:
        (model(document, labels=document).loss.double() * (document.shape[1] - 1) / targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=f"gradient of {name}")


# ------------------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize(
    ("attention", "form"),
    [
        *[("sdpa", form) for form in ("plain", "left padding", "right padding", "packed")],
        *[pytest.param("flex_attention", form, marks=needs_compiler) for form in ("plain", "left padding", "packed")],
    ],
)
def test_backends_agree(attention: str, form: str) -> None:
    """All against eager, with heads of 16 features; flex_attention has no backward on a CPU, so forward only."""
    changes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4}
    inputs: dict[str, Tensor] = {"input_ids": random_ids(2, 16)}
    real = torch.ones(2, 16, dtype=torch.bool)
    if form.endswith("padding"):
        inputs["input_ids"], mask = left_padded([16, 7])
        if form == "right padding":
            inputs["input_ids"], mask = inputs["input_ids"].flip(1), mask.flip(1)
        inputs["attention_mask"], real = mask, mask.bool()
    elif form == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(11)]).expand(2, -1)
    with torch.no_grad():
        expected = tiny_model(attention="eager", **changes)(**inputs, use_cache=False).logits
        found = tiny_model(attention=attention, **changes)(**inputs, use_cache=False).logits
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)


def test_backends_give_the_same_gradients() -> None:
    ids = random_ids(2, 10)
    gradients = []
    for attention in ("eager", "sdpa"):
        model = tiny_model(attention=attention, dtype=torch.float64)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9)


def test_backend_can_be_changed_on_a_living_model() -> None:
    model = tiny_model(attention="sdpa")
    ids = random_ids(1, 6)
    with torch.no_grad():
        before = model(ids)
        model.set_attn_implementation("eager")
        after = model(ids, output_attentions=True)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-5)
    assert len(after.attentions) == TINY["num_hidden_layers"]


# ----------------------------------------------------------------------------------------------------- generation


def test_greedy_takes_the_likeliest_token_each_time() -> None:
    model = tiny_model()
    ids = random_ids(2, 5)
    out = generate(model, ids, do_sample=False).sequences
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, ids)


def test_generation_stops_at_eos_and_pads() -> None:
    model = tiny_model()
    ids, mask = left_padded([6, 5])
    free = generate(model, ids, mask, new=12, do_sample=False).sequences[:, 6:]
    stop = int(free[0, 2])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=stop)[:, 6:]
    first = free[0].tolist().index(stop)
    assert out[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(out[0, first + 1 :].tolist()) <= {TINY["pad_token_id"]}


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    model = tiny_model()
    ids = random_ids(1, 5)

    def sample(seed: int, rows: int) -> Tensor:
        torch.manual_seed(seed)
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.5, "num_return_sequences": rows}
        return generate(model, ids, new=1, **options).sequences[:, -1]

    drawn = sample(0, 4000)
    assert torch.equal(drawn, sample(0, 4000))
    with torch.no_grad():
        expected = (model(ids).logits[0, -1] / 1.5).softmax(-1)
    found = torch.bincount(drawn, minlength=TINY["vocab_size"]) / 4000
    spread = (expected * (1 - expected) / 4000).sqrt()
    assert float(((found - expected).abs() / (spread + 1e-4)).max()) < 5
    greedy = generate(model, ids, do_sample=False).sequences
    assert torch.equal(generate(model, ids, do_sample=True, top_k=1).sequences, greedy)


def test_beam_search_wide_enough_finds_the_best_of_all_continuations() -> None:
    model = tiny_model(vocab_size=12)
    ids = random_ids(1, 5, vocab_size=12)
    out = generate(model, ids, new=2, num_beams=12, do_sample=False).sequences
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    with torch.no_grad():
        candidates = torch.cat([ids.expand(144, -1), pairs], dim=1)
        scores = model(candidates).logits.log_softmax(-1)
    total = scores[:, 4].gather(1, pairs[:, :1]) + scores[:, 5].gather(1, pairs[:, 1:])
    assert out[0, -2:].tolist() == pairs[int(total.argmax())].tolist()


@with_and_without_shifts
def test_beam_search_with_and_without_cache(form: dict[str, bool]) -> None:
    """The cache is reordered as beams cross."""
    model = tiny_model(**form)
    ids, mask = left_padded([6, 3])
    with_cache = generate(model, ids, mask, num_beams=4, do_sample=False, use_cache=True).sequences
    without = generate(model, ids, mask, num_beams=4, do_sample=False, use_cache=False).sequences
    assert torch.equal(with_cache, without)


@with_and_without_shifts
@pytest.mark.parametrize("helper", ["a worse model", "the model itself", "prompt lookup"])
def test_assisted_generation_equals_greedy(helper: str, form: dict[str, bool]) -> None:
    """The cache is cropped where the assistant's tokens are refused."""
    model = tiny_model(**form)
    ids = random_ids(1, 7)
    expected = generate(model, ids, new=16, do_sample=False).sequences
    options: dict[str, Any]
    if helper == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3}
    else:
        options = {"assistant_model": tiny_model(seed=5, **form) if helper == "a worse model" else copy.deepcopy(model)}
    assert torch.equal(generate(model, ids, new=16, do_sample=False, **options).sequences, expected)


def test_inputs_embeds_in_place_of_ids() -> None:
    model = tiny_model()
    ids = random_ids(2, 6)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, rtol=0, atol=0)
    expected = generate(model, ids, do_sample=False).sequences[:, 6:]
    found = model.generate(
        inputs_embeds=embeds.detach(),
        max_new_tokens=8,
        eos_token_id=None,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
    )
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(ids, inputs_embeds=embeds)


# -------------------------------------------------------------------------------------------------------- outputs


def test_hidden_states_and_attentions() -> None:
    model = tiny_model(attention="eager")
    ids = random_ids(2, 6)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        base = model.model(ids, output_hidden_states=True)
        plain = model(ids)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert len(out.hidden_states) == TINY["num_hidden_layers"] + 1
    torch.testing.assert_close(out.hidden_states[0], model.model.word_embed(ids), rtol=0, atol=0)
    torch.testing.assert_close(out.hidden_states[-1], base.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert len(out.attentions) == TINY["num_hidden_layers"]
    for weights in out.attentions:
        assert weights.shape == (2, TINY["num_attention_heads"], 6, 6)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, TINY["num_attention_heads"], 6))
        assert float(weights.triu(1).abs().max()) == 0


def test_hidden_states_pass_gradients() -> None:
    model = tiny_model(attention="eager")
    out = model(random_ids(1, 6), output_hidden_states=True, output_attentions=True)
    for tensor in (*out.hidden_states, *out.attentions):
        tensor.retain_grad()
    out.logits.square().sum().backward()
    assert all(float(tensor.grad.abs().max()) > 0 for tensor in (*out.hidden_states, *out.attentions))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@with_and_without_shifts
def test_gradient_checkpointing_changes_nothing(form: dict[str, bool], reentrant: bool, dropout: float) -> None:
    ids = random_ids(2, 8)
    results = []
    for checkpointing in (False, True):
        model = tiny_model(hidden_dropout=dropout, dtype=torch.float64, num_hidden_layers=3, **form).train()
        runs = [0]
        model.model.layers[0].attn.register_forward_hook(lambda *_, runs=runs: runs.__setitem__(0, runs[0] + 1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert runs[0] == 1 + checkpointing, "a checkpointed layer runs once more in the backward pass"
        results.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------- embeddings, save, load


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [70, 50])
def test_resizing_embeddings(size: int, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied, embedding_multiplier=2.0)
    ids = random_ids(2, 6, vocab_size=50)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(size, mean_resizing=False)
        after = model(ids, labels=ids)
    kept = min(size, TINY["vocab_size"])
    assert model.config.vocab_size == size
    assert after.logits.shape[-1] == size
    torch.testing.assert_close(after.logits[..., :kept], before[..., :kept])
    expected = reference.next_token_loss(after.logits.double(), ids)
    torch.testing.assert_close(after.loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert (model.lm_head.weight is model.model.word_embed.weight) == tied


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True, embedding_multiplier=2.0)
    untied = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert model.lm_head.weight is model.model.word_embed.weight
    assert sum(p.numel() for p in model.parameters()) == untied - TINY["vocab_size"] * TINY["hidden_size"]
    model.save_pretrained(tmp_path)
    loaded = DogeForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.word_embed.weight
    assert loaded.model.word_embed.embed_scale == 2
    ids = random_ids(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert tiny_model().lm_head.weight is not None
    separate = tiny_model()
    assert separate.lm_head.weight is not separate.model.word_embed.weight


@pytest.mark.parametrize("bias", [False, True])
def test_saving_and_loading(tmp_path: Path, bias: bool) -> None:
    model = tiny_model(hidden_bias=bias)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = DogeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    ids = random_ids(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
        low = DogeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
        assert torch.isfinite(low(ids).logits).all()
        base = DogeModel.from_pretrained(tmp_path)
        torch.testing.assert_close(base(ids).last_hidden_state, model.model(ids).last_hidden_state, rtol=0, atol=0)


def test_a_base_model_becomes_a_language_model(tmp_path: Path) -> None:
    """A checkpoint of DogeModel loads into DogeForCausalLM with a new head, and nothing else is drawn anew."""
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    loaded, info = DogeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    for name, tensor in model.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], tensor, rtol=0, atol=0)


def test_missing_weights_are_drawn_as_at_the_start(tmp_path: Path) -> None:
    """The parameters that are no module's weight (`keys`, `v_keys`) too: neither zero nor whatever memory held."""
    torch.manual_seed(0)
    model = DogeForCausalLM(tiny_config())
    state = {
        name: tensor for name, tensor in model.state_dict().items() if not name.endswith(("keys", "v_embed.weight"))
    }
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = DogeForCausalLM.from_pretrained(tmp_path)
    for layer in loaded.model.layers:
        for tensor in (layer.attn.v_keys, layer.feed_forward.keys):
            assert 0.01 < float(tensor.detach().std()) < 0.04
        assert abs(float(layer.attn.v_embed.weight.detach().mean()) - 1) < 0.1
    ids = random_ids(1, 6)
    with torch.no_grad():
        assert torch.isfinite(loaded(ids).logits).all()


# ----------------------------------------------------------------------------------------------------------- RoPE

FACTORS = [1.0 + 0.25 * i for i in range(4)]
ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "short_factor": FACTORS,
        "long_factor": [2 * factor for factor in FACTORS],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"factor": 2.0},
}


def test_every_rope_type_of_transformers_is_tried() -> None:
    assert set(ROPE_INIT_FUNCTIONS) <= set(ROPE_TYPES), "a type is missing from this file's table"


@pytest.mark.parametrize("rope_type", ["default", *ROPE_INIT_FUNCTIONS])
def test_rope_types_equal_those_of_llama(rope_type: str) -> None:
    """Within and beyond the positions the model was made for; dynamic and longrope change on the way and back."""
    rope = {"rope_type": rope_type, "rope_theta": 5000.0, **ROPE_TYPES[rope_type]}
    model = tiny_model(rope_theta=5000.0, rope_parameters=dict(rope))
    llama = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=TINY["hidden_size"],
            num_attention_heads=TINY["num_attention_heads"],
            max_position_embeddings=TINY["max_position_embeddings"],
            rope_parameters=dict(rope),
        )
    )
    x = torch.zeros(1)
    for length in (20, 200, 400, 20):
        positions = torch.arange(length)[None]
        for found, expected in zip(model.model.rotary_emb(x, positions), llama(x, positions), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    ids = random_ids(1, 12)
    with torch.no_grad():
        out = model(ids, labels=ids)
        assert torch.isfinite(out.logits).all()
        plain = tiny_model(rope_theta=5000.0)(ids).logits
    assert (float((out.logits - plain).abs().max()) > 1e-4) == (rope_type not in ("default", "dynamic"))


@pytest.mark.parametrize("rope_type", ["default", *ROPE_INIT_FUNCTIONS])
def test_rope_types_survive_saving(rope_type: str, tmp_path: Path) -> None:
    """The frequencies are in no checkpoint and must be made again on loading."""
    model = tiny_model(rope_parameters={"rope_type": rope_type, "rope_theta": 5000.0, **ROPE_TYPES[rope_type]})
    model.save_pretrained(tmp_path)
    loaded = DogeForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["cast", "loaded", "made"])
def test_low_precision_model_keeps_its_frequencies(how: str, tmp_path: Path) -> None:
    """A frequency rounded to bfloat16 is off by up to 0.4 %: at position 16,383, by many turns."""
    if how == "cast":
        model = tiny_model().to(torch.bfloat16)
    elif how == "loaded":
        tiny_model().save_pretrained(tmp_path)
        model = DogeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    positions = torch.tensor([[16_383]])
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    expected = reference.rope_tables(positions, 8, 10000.0)
    torch.testing.assert_close(cos.double(), expected[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(sin.double(), expected[1], rtol=0, atol=1e-2)


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize(("form", "path"), [("plain", "gather"), ("plain", "dense"), ("packed", "auto")])
def test_compiles_as_one_graph(form: str, path: str) -> None:
    """Forward with the loss and backward, with no graph break, and equal to eager."""
    torch._dynamo.reset()
    model = tiny_model(cdmoe_path=path, dtype=torch.float64).train()
    ids = random_ids(2, 10)
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
    if form == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(4), torch.arange(6)]).expand(2, -1)
    expected = model(**inputs)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
def test_compiles_with_the_default_backend_under_autocast() -> None:
    """As training runs it: bfloat16, forward and backward, with real kernels."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DogeForCausalLM(tiny_config(vocab_size=256, hidden_size=48)).train().cuda()
    ids = text_batch(2, 64, seed=0, vocab_size=256).cuda()

    def step(run: Any) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = run(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected_loss, expected = step(model)
    found_loss, found = step(torch.compile(model, fullgraph=True))
    assert math.isclose(found_loss, expected_loss, rel_tol=5e-3)
    for name, gradient in expected.items():
        assert torch.isfinite(found[name]).all()
        assert (float(found[name].abs().max()) > 0) == (float(gradient.abs().max()) > 0), name
    head = "lm_head.weight"
    assert float((found[head] - expected[head]).norm() / expected[head].norm()) < 0.05


def test_compiled_plain_attention_has_no_mask() -> None:
    """Training on whole rows: SDPA takes a flash kernel only without a mask, compiled as well as not."""
    torch._dynamo.reset()
    masks: list[tuple[Any, Any]] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                masks.append((node.kwargs.get("attn_mask"), node.kwargs.get("is_causal")))
        return graph

    model = tiny_model()
    ids = random_ids(2, 10)
    torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids, use_cache=False)
    assert masks == [(None, True)] * TINY["num_hidden_layers"]


def test_decoding_with_a_static_cache_compiles_as_one_graph() -> None:
    """As transformers compiles generation on a GPU: one graph for every step, positions read from the cache."""
    torch._dynamo.reset()
    model = tiny_model(dtype=torch.float64)
    ids = random_ids(2, 8)
    past = StaticCache(config=model.config, max_cache_len=12)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = [model(ids[:, :5], past_key_values=past).logits]
        for t in range(5, 8):
            found.append(step(ids[:, t : t + 1], past_key_values=past, position_ids=torch.full((1, 1), t)).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-10, atol=1e-10)
