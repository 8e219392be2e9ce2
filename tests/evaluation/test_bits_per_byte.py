import math

import pytest
import torch
from datasets import Dataset
from torch import nn

from doge_lm.data import dataset as dataset_module
from doge_lm.data.dataset import PackedCollator
from doge_lm.errors import UserError
from doge_lm.evaluation.bits_per_byte import Scores, evaluate
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.model.modeling_doge import DogeForCausalLM

T, VOCABULARY = 16, 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DogeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        inner_values_retrieval_size=8,
        cross_domain_intermediate_size=32,
        private_expert_intermediate_size=8,
        num_cdmmoe_experts=4,
        hidden_dropout=0.5,
        initializer_range=0.5,  # far from uniform
    )
    return DogeForCausalLM(config).train()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    rows = []
    for index, lengths in enumerate([[16], [5, 11], [7], [4, 4, 3], [16], [2]]):
        rows.append(
            {
                "input_ids": torch.randint(3, VOCABULARY, (sum(lengths),)).tolist(),
                "document_lengths": lengths,
                "context_spans": [1, 3] if index == 0 else [],
                "text_bytes": 3 * sum(lengths) + index,
                "source": "ab"[index % 2],
            }
        )
    return rows


def dataset(rows):
    return Dataset.from_list(rows).with_format("numpy")


def test_equals_a_sum_over_documents_run_apart(model, data):
    reference = DogeForCausalLM(model.config).eval()
    reference.load_state_dict(model.state_dict())
    sums = {"a": [0.0, 0, 0], "b": [0.0, 0, 0]}
    for row in data:
        start = 0
        for length in row["document_lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            with torch.no_grad():
                logs = reference(ids, use_cache=False).logits.double().log_softmax(-1)[0]
            for t in range(1, length):
                spans = row["context_spans"]
                if not (spans and spans[0] <= start + t < spans[1]):
                    sums[row["source"]][0] -= logs[t - 1, ids[0, t]].item()
                    sums[row["source"]][1] += 1
            start += length
        sums[row["source"]][2] += row["text_bytes"]
    result = evaluate(model, dataset(data), PackedCollator(0, T, True), batch_size=4)
    assert set(result.by_source) == {"a", "b"}
    for name, (nll, tokens, size) in sums.items():
        scores = result.by_source[name]
        assert (scores.tokens, scores.bytes) == (tokens, size)
        assert scores.nll == pytest.approx(nll, rel=1e-6)
        assert scores.loss == pytest.approx(nll / tokens, rel=1e-6)
        assert scores.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert scores.bits_per_byte == pytest.approx(nll / math.log(2) / size, rel=1e-6)
    assert result.total.nll == pytest.approx(sums["a"][0] + sums["b"][0], rel=1e-6)
    assert result.total.tokens == sums["a"][1] + sums["b"][1]


def test_is_deterministic_for_any_batch_size_and_leaves_the_mode(model, data):
    collator = PackedCollator(0, T, True)
    first = evaluate(model, dataset(data), collator, batch_size=2)
    assert evaluate(model, dataset(data), collator, batch_size=2) == first
    assert model.training
    other = evaluate(model, dataset(data), collator, batch_size=6)
    assert other.total.nll == pytest.approx(first.total.nll, rel=1e-6)
    assert other.total.tokens == first.total.tokens


def test_takes_batches_with_blocks(model, data, monkeypatch):
    """Tensors within a dictionary within the batch."""
    expected = evaluate(model, dataset(data), PackedCollator(0, T, True), batch_size=4)
    monkeypatch.setattr(dataset_module, "_BLOCK", T // 2)
    given = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: given.append(inputs) or forward(**inputs))
    collator = PackedCollator(0, T, True, document_blocks=True)
    assert evaluate(model, dataset(data), collator, batch_size=4) == expected
    assert [inputs["document_blocks"]["full_counts"].shape for inputs in given] == [(4, 1, 2), (2, 1, 2)]


def test_draws_no_random_numbers(model, data):
    """A run that evaluates must go on as one that does not."""
    before = torch.get_rng_state()
    evaluate(model, dataset(data), PackedCollator(0, T), batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)


class Share:
    """One of two processes; the sums of both are added up afterwards."""

    num_processes = 2

    def __init__(self, index, collected):
        self.process_index, self.collected = index, collected

    def reduce(self, tensor, reduction="sum"):
        assert reduction == "sum"
        self.collected.append(tensor)
        return sum(self.collected)


def test_two_processes_share_the_rows(model, data):
    collator, collected = PackedCollator(0, T, True), []
    whole = evaluate(model, dataset(data), collator, batch_size=2)
    seen = []
    results = [
        evaluate(model, dataset(data), collator, batch_size=2, reducer=Share(index, collected), progress=seen.append)
        for index in range(2)
    ]
    assert sum(seen) == len(data)
    assert results[1].total.tokens == whole.total.tokens
    assert results[1].total.nll == pytest.approx(whole.total.nll, rel=1e-9)


def test_only_one_batch_of_logits_is_held(data):
    class Counting(nn.Module):
        """Gives equal logits, and remembers how many rows it was asked for at once."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.rows = []

        def forward(self, input_ids, use_cache):
            self.rows.append(len(input_ids))
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, VOCABULARY)})()

    counting = Counting()
    result = evaluate(counting, dataset(data), PackedCollator(0, T), batch_size=4)
    assert counting.rows == [4, 2]
    assert result.total.loss == pytest.approx(math.log(VOCABULARY))


def test_a_set_without_text_is_refused(model, data):
    silent = [{**row, "text_bytes": 0} for row in data]
    with pytest.raises(UserError, match="holds no text to predict"):
        evaluate(model, dataset(silent), PackedCollator(0, T), batch_size=2)


def test_a_huge_loss_has_an_infinite_perplexity():
    assert Scores(nll=1e6, tokens=1, bytes=1).perplexity == math.inf
