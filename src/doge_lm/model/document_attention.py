"""Causal attention within the documents of packed rows, without a T×T mask.

A document starts at the beginning of a row and wherever the position is not the one before it plus 1. There are three
layouts of the same documents, each with its kernel:

    DocumentGroups  any device and type: one causal SDPA for all documents of the same length; sizes come from the
                    data, so it is not for `torch.compile`
    CumulativeLengths  CUDA in half precision: FlashAttention for sequences of unequal length
    BlockMask  the same, compiled, where the caller gives `DocumentBlocks`: FlexAttention, which passes over whole
               blocks of the T×T scores; nearly as fast as plain causal attention

Letters in names of tensors are those of `modeling_doge`; here M counts the tokens of the batch, B·T, and J the blocks
of a row, T/128.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

BLOCK = 128
"""Tokens on a side of a block of the scores."""

# What FlashAttention takes; of the sizes of heads that FlexAttention takes, those for which it pays no padding.
_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_FLEX_HEADS = (16, 32, 64, 128)


class DocumentGroups(NamedTuple):
    """The documents sorted by length.

    `order` lists the tokens of the batch, document after document; `inverse` takes them back; `shapes` holds
    (documents, length) for each length.
    """

    order: Tensor
    inverse: Tensor
    shapes: list[tuple[int, int]]


class CumulativeLengths(NamedTuple):
    """Where documents start in the batch as one row, int32, and at the end B·T (repeated at will); and the longest."""

    starts: Tensor
    longest: int


class DocumentBlocks(NamedTuple):
    """What a `BlockMask` is made of, int32, the same sizes for all documents.

    A block of the scores is 128 queries by 128 keys. Full: every query sees every key. Partial: some do, which the
    mask function finds out from `documents` (B, T), the number of each token's document in its row. For each of the J
    rows of blocks, counts (B, 1, J) tell how many there are, and indices (B, 1, J, J) begin with their columns and go
    on with the others.

    Under `torch.compile` these must come from outside the graph: FlexAttention gave wrong results where its mask read a
    tensor that was made in the same graph (PyTorch 2.11 on an H100; docs/log.md).
    """

    documents: Tensor
    partial_counts: Tensor
    partial_indices: Tensor
    full_counts: Tensor
    full_indices: Tensor


Layout = DocumentGroups | CumulativeLengths | BlockMask


def document_starts(position_ids_BT: Tensor) -> Tensor:
    """(B, T) bool, true at the first token of each document."""
    later = position_ids_BT[:, 1:] != position_ids_BT[:, :-1] + 1
    return torch.cat((torch.ones_like(position_ids_BT[:, :1], dtype=torch.bool), later), dim=1)


def document_layout(
    position_ids_BT: Tensor,
    dtype: torch.dtype,
    head_dim: int,
    given_starts: Tensor | None = None,
    given_blocks: DocumentBlocks | None = None,
) -> Layout | None:
    """The layout for a device, a type and the way of running.

    Args:
        position_ids_BT: (B, T) positions, which start over at each document.
        dtype: the type of the queries, keys and values.
        head_dim: features of a head.
        given_starts: `CumulativeLengths.starts`, where the caller has made them. Keep their number fixed under
            `torch.compile`; without them, a compiled run takes as many as there are tokens.
        given_blocks: `DocumentBlocks` of these positions, where the caller has made them.

    Returns:
        The layout, or None where there is none: compiled, on a CPU or in a type or size FlashAttention does not take.
    """
    half_on_gpu = position_ids_BT.is_cuda and dtype in _HALF
    flash = half_on_gpu and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD
    compiled = torch.compiler.is_compiling()
    # Not compiled, FlexAttention would write out all scores.
    flex = half_on_gpu and compiled and head_dim in _FLEX_HEADS and position_ids_BT.shape[1] % BLOCK == 0
    if flex and given_blocks is not None:
        return block_mask(given_blocks)
    if not flash:
        return None if compiled else document_groups(position_ids_BT)
    if given_starts is not None:
        return CumulativeLengths(given_starts, position_ids_BT.shape[1])
    return (padded_lengths if compiled else cumulative_lengths)(position_ids_BT)


def cumulative_lengths(position_ids_BT: Tensor) -> CumulativeLengths:
    """The layout for FlashAttention; it waits for the device once, to learn the number of documents."""
    starts = document_starts(position_ids_BT).flatten().nonzero().flatten()
    return CumulativeLengths(
        nn.functional.pad(starts, (0, 1), value=position_ids_BT.numel()).int(), position_ids_BT.shape[1]
    )


def padded_lengths(position_ids_BT: Tensor) -> CumulativeLengths:
    """The same in B·T + 1 numbers whatever the documents are, so that a new batch compiles nothing."""
    starts_M = document_starts(position_ids_BT).flatten()
    index_M = torch.arange(len(starts_M), device=starts_M.device)
    starts = torch.where(starts_M, index_M, len(starts_M)).sort().values
    return CumulativeLengths(nn.functional.pad(starts, (0, 1), value=len(starts_M)).int(), position_ids_BT.shape[1])


def document_blocks(position_ids_BT: Tensor) -> DocumentBlocks:
    """The parts of a `BlockMask`, for T of whole blocks; not for a graph that attends with them (`DocumentBlocks`)."""
    documents_BT = document_starts(position_ids_BT).cumsum(1)
    first_BJ, last_BJ = documents_BT[:, ::BLOCK], documents_BT[:, BLOCK - 1 :: BLOCK]
    index_J = torch.arange(first_BJ.shape[1], device=position_ids_BT.device)
    before_JJ = index_J[None, :] < index_J[:, None]
    # Rows of blocks are queries, columns keys.
    full_BJJ = before_JJ & (first_BJ[:, None, :] == last_BJ[:, :, None])
    seen_BJJ = (before_JJ & (last_BJ[:, None, :] >= first_BJ[:, :, None])) | (index_J[None, :] == index_J[:, None])
    lists = []
    for listed_BJJ in (seen_BJJ & ~full_BJJ, full_BJJ):
        indices_BJJ = (~listed_BJJ).to(torch.int8).argsort(dim=-1, stable=True)
        lists += [listed_BJJ.sum(-1).int()[:, None], indices_BJJ.int()[:, None]]
    return DocumentBlocks(documents_BT.int(), *lists)


def block_mask(blocks: DocumentBlocks) -> BlockMask:
    """The layout for FlexAttention."""
    documents_BT = blocks.documents

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BT[b, query] == documents_BT[b, key])

    length = documents_BT.shape[1]
    return BlockMask.from_kv_blocks(
        blocks.partial_counts,
        blocks.partial_indices,
        blocks.full_counts,
        blocks.full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def document_groups(position_ids_BT: Tensor) -> DocumentGroups:
    """The layout for one SDPA a length."""
    starts_M = document_starts(position_ids_BT).flatten()
    starts = starts_M.nonzero().flatten()
    lengths = torch.diff(starts, append=starts.new_tensor([position_ids_BT.numel()]))
    length_M = lengths[starts_M.cumsum(0) - 1]
    order_M = length_M.argsort(stable=True)
    sizes, counts = lengths.unique(return_counts=True)
    return DocumentGroups(order_M, order_M.argsort(), list(zip(counts.tolist(), sizes.tolist(), strict=True)))


def document_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    """Causal attention within documents: query, key and value (B, h, T, f) to the output (B, T, h, f)."""
    if isinstance(layout, BlockMask):
        found = flex_attention(query, key, value, block_mask=layout, scale=scaling)
        assert isinstance(found, Tensor)
        return found.transpose(1, 2)
    shape = query.transpose(1, 2).shape
    query_Mhf, key_Mhf, value_Mhf = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if isinstance(layout, CumulativeLengths):
        return _by_flash(query_Mhf, key_Mhf, value_Mhf, layout, scaling).view(shape)
    return _by_groups(query_Mhf, key_Mhf, value_Mhf, layout, scaling).view(shape)


def _by_flash(
    query_Mhf: Tensor, key_Mhf: Tensor, value_Mhf: Tensor, layout: CumulativeLengths, scaling: float
) -> Tensor:
    starts, longest = layout
    window = (-1, 0)  # causal
    found = varlen_attn(
        query_Mhf, key_Mhf, value_Mhf, starts, starts, longest, longest, scale=scaling, window_size=window
    )
    assert isinstance(found, Tensor)
    return found


def _by_groups(query_Mhf: Tensor, key_Mhf: Tensor, value_Mhf: Tensor, layout: DocumentGroups, scaling: float) -> Tensor:
    sizes = [documents * length for documents, length in layout.shapes]
    split = [x.index_select(0, layout.order).split(sizes) for x in (query_Mhf, key_Mhf, value_Mhf)]
    outputs = []
    for shape, *parts in zip(layout.shapes, *split, strict=True):
        q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.inverse)
