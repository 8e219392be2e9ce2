"""Causal attention within the documents of packed rows, without a T×T mask.

A document starts at the beginning of a row and wherever the position is not the one before it plus 1. There are three
layouts of the same documents, each with its kernel:

    DocumentGroups  any device and type: one causal SDPA for all documents of the same length; sizes come from the
                    data, so it is not for `torch.compile`
    CumulativeLengths  CUDA in half precision: FlashAttention for sequences of unequal length
    BlockMask       CUDA under `torch.compile`: FlexAttention; all shapes are fixed, so a new batch compiles nothing

Letters in names of tensors are those of `modeling_doge`; here M counts the tokens of the batch, B·T, and K the blocks
of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

BLOCK = 128

# What FlashAttention takes; FlexAttention takes float32 too.
_HALF = (torch.float16, torch.bfloat16)
_SMALLEST_FLEX_HEAD = 16
_LARGEST_HEAD = 256


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


Layout = DocumentGroups | CumulativeLengths | BlockMask


def document_starts(position_ids_BT: Tensor) -> Tensor:
    """(B, T) bool, true at the first token of each document."""
    later = position_ids_BT[:, 1:] != position_ids_BT[:, :-1] + 1
    return torch.cat((torch.ones_like(position_ids_BT[:, :1], dtype=torch.bool), later), dim=1)


def document_layout(
    position_ids_BT: Tensor, dtype: torch.dtype, head_dim: int, given_starts: Tensor | None = None
) -> Layout | None:
    """The layout for a device, a type and the way of running.

    Args:
        position_ids_BT: (B, T) positions, which start over at each document.
        dtype: the type of the queries, keys and values.
        head_dim: features of a head.
        given_starts: `CumulativeLengths.starts`, where the caller has made them. Keep their number fixed under
            `torch.compile`.

    Returns:
        The layout, or None where there is none: compiled, on a CPU or in a type or size FlexAttention does not take.
    """
    cuda = position_ids_BT.is_cuda
    flash = cuda and dtype in _HALF and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD
    if flash and given_starts is not None:
        return CumulativeLengths(given_starts, position_ids_BT.shape[1])
    if torch.compiler.is_compiling():
        flex = cuda and dtype in (*_HALF, torch.float32) and _SMALLEST_FLEX_HEAD <= head_dim <= _LARGEST_HEAD
        return block_mask(position_ids_BT) if flex else None
    return cumulative_lengths(position_ids_BT) if flash else document_groups(position_ids_BT)


def cumulative_lengths(position_ids_BT: Tensor) -> CumulativeLengths:
    """The layout for FlashAttention; it waits for the device once, to learn the number of documents."""
    starts = document_starts(position_ids_BT).flatten().nonzero().flatten()
    return CumulativeLengths(
        nn.functional.pad(starts, (0, 1), value=position_ids_BT.numel()).int(), position_ids_BT.shape[1]
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


def block_mask(position_ids_BT: Tensor) -> BlockMask:
    """The layout for FlexAttention, made from the ends of its blocks alone: B·(T/128)² entries.

    Documents are numbered upwards along a row. So a block of keys is seen in part where its last document is not
    before the first of the queries, and in full where it lies wholly before the queries, in one document with them.
    """
    T = position_ids_BT.shape[1]
    document_BT = document_starts(position_ids_BT).cumsum(1)
    blocks = -(-T // BLOCK)
    first_BK = document_BT[:, ::BLOCK]
    ends = torch.arange(1, blocks + 1, device=document_BT.device) * BLOCK - 1
    last_BK = document_BT[:, ends.clamp(max=T - 1)]
    index = torch.arange(blocks, device=document_BT.device)
    seen_BKK = (index[:, None] >= index) & (last_BK[:, None, :] >= first_BK[:, :, None])
    # A last block that is cut short stays partial: its missing rows have no document.
    whole = (index[:, None] > index) & (ends < T)[:, None]
    full_BKK = whole & (first_BK[:, None, :] == last_BK[:, :, None])

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[b, query] == document_BT[b, key])

    return BlockMask.from_kv_blocks(
        *_listed(seen_BKK & ~full_BKK), *_listed(full_BKK), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(T, T)
    )


def _listed(blocks_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees, (B, 1, K), and their indices first, (B, 1, K, K)."""
    indices = blocks_BKK.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_BKK.sum(-1).int().unsqueeze(1), indices.int().unsqueeze(1)


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
