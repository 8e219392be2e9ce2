"""Attention within the documents of packed rows: equal to a dense mask, without its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from doge_lm.model import modeling_doge
from doge_lm.model.document_attention import (
    CumulativeLengths,
    DocumentBlocks,
    block_mask,
    cumulative_lengths,
    document_attention,
    document_blocks,
    document_groups,
    document_layout,
    document_starts,
    padded_lengths,
)

from .support import random_ids, tiny_model

ROWS = {
    "several": [[5, 1, 7, 3], [8, 8]],
    "all of length 1": [[1] * 6, [1] * 6],
    "whole rows": [[9], [9]],
    "a row of one beside pieces": [[12], [1, 1, 9, 1], [4, 4, 4]],
    "one row": [[3, 2]],
}


BLOCK_ROWS = {
    "a row of one block": [[5, 1, 122], [128], [1] * 128],
    "boundaries at edges of blocks": [[128, 128], [127, 129], [129, 127], [256]],
    "long rows": [[128, 512, 384], [1024], [1, 639, 1, 383], [700, 324], [1] * 1024],
    "padding that starts over": [[300, 84, 640], [1000, 24]],
}


def positions_of(rows: list[list[int]], first: int = 0) -> Tensor:
    """Positions of packed rows, given the lengths of their documents."""
    return torch.stack([torch.cat([torch.arange(length) + first for length in lengths]) for lengths in rows])


def allowed(position_ids: Tensor) -> Tensor:
    """(B, 1, T, T), true where a query sees a key, told by plain loops."""
    batch, length = position_ids.shape
    seen = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b, row in enumerate(position_ids.tolist()):
        start = 0
        for t in range(length):
            if t > 0 and row[t] != row[t - 1] + 1:
                start = t
            seen[b, 0, t, start : t + 1] = True
    return seen


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in out if isinstance(out, tuple | list) else (out,):
            if isinstance(found, Tensor):
                self.numel = max(self.numel, found.numel())
        return out


def attend(
    position_ids: Tensor, dtype: torch.dtype, *, dense: bool, features: int = 6, heads: int = 2
) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of queries, keys and values, for one fixed loss."""
    generator = torch.Generator().manual_seed(0)
    shape = (*position_ids.shape, heads, features)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    for leaf in leaves:
        leaf.requires_grad_()
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    if dense:
        scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~allowed(position_ids), -torch.inf)
        output = (scores.softmax(-1) @ value).transpose(1, 2)
    else:
        output = document_attention(query, key, value, document_groups(position_ids), 0.3)
    return output.detach(), list(torch.autograd.grad((output * weight).sum(), leaves))


@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_groups_equal_a_dense_mask(rows: list[list[int]], first: int) -> None:
    position_ids = positions_of(rows, first)
    expected, expected_gradients = attend(position_ids, torch.float64, dense=True)
    found, gradients = attend(position_ids, torch.float64, dense=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-12)


def test_groups_in_bfloat16() -> None:
    position_ids = positions_of(ROWS["several"])
    expected, expected_gradients = attend(position_ids, torch.float64, dense=True)
    found, gradients = attend(position_ids, torch.bfloat16, dense=False)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=0.1)


def test_cumulative_lengths() -> None:
    starts, longest = cumulative_lengths(positions_of([[5, 1, 7, 3], [8, 8]]))
    assert starts.tolist() == [0, 5, 6, 13, 16, 24, 32]
    assert starts.dtype == torch.int32
    assert longest == 16


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_padded_lengths_are_the_same_in_as_many_numbers_as_tokens(rows: list[list[int]], compiled: bool) -> None:
    position_ids = positions_of(rows)
    find = torch.compile(padded_lengths, fullgraph=True, backend="aot_eager") if compiled else padded_lengths
    starts, longest = find(position_ids)
    expected = cumulative_lengths(position_ids)
    assert starts.dtype == torch.int32
    assert starts.shape == (position_ids.numel() + 1,)
    assert torch.equal(starts[: len(expected.starts)], expected.starts)
    assert set(starts[len(expected.starts) :].tolist()) <= {position_ids.numel()}
    assert longest == expected.longest


def test_a_document_starts_wherever_positions_do_not_go_on() -> None:
    position_ids = torch.tensor([[4, 5, 6, 0, 1, 0, 0, 7]])
    assert document_starts(position_ids).tolist() == [[True, False, False, True, False, True, True, True]]


def gradients_of(model: Any, ids: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(ids, labels=ids, **inputs)
    out.loss.backward()
    return out.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_model_equals_a_dense_mask(rows: list[list[int]], use_cache: bool, checkpointing: bool) -> None:
    """Logits and every gradient against the eager model with its T×T mask."""
    position_ids = positions_of(rows)
    ids = random_ids(*position_ids.shape)
    expected, expected_gradients = gradients_of(
        tiny_model(attention="eager", dtype=torch.float64), ids, position_ids=position_ids, use_cache=False
    )
    model = tiny_model(dtype=torch.float64).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, gradients = gradients_of(model, ids, position_ids=position_ids, use_cache=use_cache and not checkpointing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-7)


def test_one_row_of_positions_serves_the_whole_batch() -> None:
    model, ids = tiny_model(), random_ids(3, 9)
    position_ids = positions_of([[4, 5]])
    with torch.no_grad():
        found = model(ids, position_ids=position_ids, use_cache=False).logits
        expected = model(ids, position_ids=position_ids.expand(3, -1), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_tensor_is_as_large_as_a_mask() -> None:
    """Forward and backward of a training step; the eager model shows that a T×T tensor would be seen."""
    length = 600
    position_ids = positions_of([[250, 1, 49, 300]])
    ids = random_ids(*position_ids.shape)
    largest = {}
    for attention in ("sdpa", "eager"):
        model = tiny_model(attention=attention).train()
        with LargestTensor() as watch:
            model(ids, position_ids=position_ids, labels=ids, use_cache=False).loss.backward()
        largest[attention] = watch.numel
    assert largest["sdpa"] < length * length <= largest["eager"]


def random_block_rows(seed: int, length: int) -> list[list[int]]:
    """Four rows of random documents."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for longest in (8, 100, 400, length):
        lengths: list[int] = []
        while (left := length - sum(lengths)) > 0:
            lengths.append(min(left, int(torch.randint(1, longest + 1, (), generator=generator))))
        rows.append(lengths)
    return rows


@pytest.mark.parametrize(
    "rows",
    [*BLOCK_ROWS.values(), *(random_block_rows(seed, length) for seed in range(3) for length in (128, 256, 1024))],
)
def test_blocks_are_those_of_pytorch(rows: list[list[int]]) -> None:
    position_ids = positions_of(rows)
    batch, length = position_ids.shape
    seen = allowed(position_ids)[:, 0]
    expected = create_block_mask(lambda b, h, q, k: seen[b, q, k], batch, None, length, length, device="cpu")
    blocks = document_blocks(position_ids)
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in blocks)
    found = block_mask(blocks)
    assert found.mask_mod is not None
    grid = torch.meshgrid(torch.arange(batch), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(found.mask_mod(grid[0], torch.tensor(0), grid[1], grid[2]), seen)
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, lists = getattr(found, name + "_num_blocks"), getattr(found, name + "_indices")
        expected_counts, expected_lists = getattr(expected, name + "_num_blocks"), getattr(expected, name + "_indices")
        assert torch.equal(counts, expected_counts), name
        listed = torch.arange(lists.shape[-1]) < counts[..., None]
        assert torch.equal(lists[listed], expected_lists[listed]), name
        # Kernels may read ahead: what is not listed must be a block too, and each is there once.
        assert torch.equal(lists.sort(-1).values, torch.arange(lists.shape[-1]).int().expand_as(lists)), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rows", BLOCK_ROWS.values(), ids=BLOCK_ROWS.keys())
def test_blocks_equal_a_dense_mask(rows: list[list[int]]) -> None:
    """Forward only: FlexAttention has no backward pass on a CPU."""
    position_ids = positions_of(rows)
    generator = torch.Generator().manual_seed(0)
    shape = (len(position_ids), 2, position_ids.shape[1], 16)
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~allowed(position_ids), -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    found = document_attention(query, key, value, block_mask(document_blocks(position_ids)), 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_takes_blocks(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    """In one graph for all documents; the layout is that of a GPU, the operators are PyTorch's own."""
    monkeypatch.setattr(modeling_doge, "document_layout", lambda *args: block_mask(args[4]))
    sizes = {"hidden_size": 32, "num_attention_heads": 2}
    model, eager = (tiny_model(attention=a, dtype=torch.float64, **sizes).train() for a in ("sdpa", "eager"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    graphs = counters["stats"]["unique_graphs"]
    ids = random_ids(2, 256)
    for rows in ([[5, 250, 1], [128, 128]], [[1] * 256, [256]]):
        position_ids = positions_of(rows)
        given = document_blocks(position_ids)._asdict()
        with torch.no_grad():
            found = run(ids, position_ids=position_ids, document_blocks=given, use_cache=False).logits
            expected = eager(ids, position_ids=position_ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, BlockMask),
        ({"dtype": torch.float16, "head_dim": 16}, BlockMask),
        ({"compiled": False}, CumulativeLengths),
        ({"given": False}, CumulativeLengths),
        ({"length": 192}, CumulativeLengths),
        ({"head_dim": 8}, CumulativeLengths),
        ({"head_dim": 96}, CumulativeLengths),
        ({"head_dim": 256}, CumulativeLengths),
        ({"dtype": torch.float32}, type(None)),
        ({"device": "cpu"}, type(None)),
        ({"head_dim": 12}, type(None)),
    ],
)
def test_the_layout_for_a_case(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], kind: type) -> None:
    case = {"compiled": True, "given": True, "length": 256, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    case |= changes
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: case["compiled"])
    with FakeTensorMode():  # no GPU is needed to say that it is on one
        position_ids = torch.zeros(2, case["length"], dtype=torch.int64, device=case["device"])
    blocks = document_blocks(positions_of([[100, 156], [256]])) if case["given"] else None
    starts = torch.tensor([0, 512], dtype=torch.int32)
    assert type(document_layout(position_ids, case["dtype"], case["head_dim"], starts, blocks)) is kind


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["as it is", "compiled", "compiled, lengths given", "compiled, blocks given"])
def test_attention_on_a_gpu_equals_a_dense_mask(way: str) -> None:
    """FlashAttention and FlexAttention in bfloat16, forward and backward, from positions to gradients, in every row.

    The operator alone: in a whole model, rounding changes the experts of some tokens, and with them what follows.
    """

    kind = BlockMask if way == "compiled, blocks given" else CumulativeLengths

    def attention(
        q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, starts: Tensor | None, blocks: DocumentBlocks | None
    ) -> Tensor:
        layout = document_layout(position_ids, q.dtype, q.shape[-1], starts, blocks)
        assert isinstance(layout, kind)
        return document_attention(q, k, v, layout, 0.3)

    run = attention if way == "as it is" else torch.compile(attention, fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    graphs = counters["stats"]["unique_graphs"]
    for rows in ([[200, 1, 311], [512], [1] * 512], [[3, 253, 256], [100, 412], [511, 1]]):
        position_ids = positions_of(rows)
        starts = blocks = None
        if way == "compiled, blocks given":
            blocks = DocumentBlocks(*(part.cuda() for part in document_blocks(position_ids)))
        if way == "compiled, lengths given":
            starts = cumulative_lengths(position_ids).starts
            starts = torch.nn.functional.pad(starts, (0, 600 - len(starts)), value=position_ids.numel()).cuda()
        expected, expected_gradients = attend(position_ids, torch.float64, dense=True, features=64)
        generator = torch.Generator().manual_seed(0)
        shape = (*position_ids.shape, 2, 64)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().cuda() for _ in range(4)]
        *leaves, weight = tensors
        for leaf in leaves:
            leaf.requires_grad_()
        output = run(*(leaf.transpose(1, 2) for leaf in leaves), position_ids.cuda(), starts, blocks)
        gradients = torch.autograd.grad((output * weight).sum(), leaves)
        torch.testing.assert_close(output.double().cpu(), expected, rtol=0.02, atol=0.05)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            difference = (gradient.double().cpu() - expected_gradient).norm()
            assert float(difference) <= 0.02 * float(expected_gradient.norm())
    assert counters["stats"]["unique_graphs"] == graphs + (way != "as it is")
