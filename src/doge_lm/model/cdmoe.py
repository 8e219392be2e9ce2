"""The retrieval and the experts of the Cross Domain Mixture of Experts (arXiv 2407.16958).

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    M  tokens (batch and sequence as one)     e  expert size: the width of c and of a query
    H  expert heads                           d  hidden size
    N  experts, N = n1·n2                     K  experts of a token over all heads, K = H·k
    k  experts per head                       n1, n2  rows of the first and the second key table, n1 ≤ n2

`cdmoe_route` chooses experts, `cdmoe` computes them: one entry point over the paths in `_PATHS`. Every path
takes the same choice and computes the same sum; they differ in what they read and keep.
"""

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import HAVE_TRITON, PLAIN, kernels_take

if HAVE_TRITON:
    from .cdmoe_triton import experts_output, is_usable, pick, spread
    from .expert_hidden_triton import MOST_CHOSEN, MOST_EXPERTS, chosen_hidden
    from .routing_triton import product_topk as fused_product_topk

Activation = Callable[[Tensor], Tensor]

PATHS = ("auto", "gather", "dense", "sparse")

# Where "auto" stops computing all N experts for every token, whatever K is. The two matrix products of the dense path
# cost 2·M·N·(e + d) operations each way; the others read and, in the backward pass, add up 2·M·K rows.
DENSE_MAX_EXPERTS = 2048
# Where the sparse path runs, the dense one is chosen up to so many experts for each of a token's K. On an H200, 16,384
# tokens, d = e = 1,024, K = 32, forward and backward: dense took 0.7 ms at N = 1,024, 1.2 at 2,048, 2.3 at 4,096;
# sparse 1.3 at 1,024, 1.4 at 2,048, 1.0 at 4,096, 1.3 at 65,536. Other K were not measured (benchmarks/cdmoe.py).
DENSE_MAX_EXPERTS_FOR_ONE = 64
# With fewer tokens than this (decoding), the dense path would read all N rows to use K of them a token.
DENSE_MIN_TOKENS = 32


def key_table_sizes(num_experts: int) -> tuple[int, int]:
    """Factor `num_experts` into n1·n2 with n1 ≤ n2, as near square as it goes. A prime gives (1, N)."""
    n1 = next(n for n in range(isqrt(num_experts), 0, -1) if num_experts % n == 0)
    return n1, num_experts // n1


def cdmoe_route(queries_MHe: Tensor, keys: Tensor, n1: int, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best of the N = n1·n2 experts for each token and head, exactly (product keys).

    The score of expert (i, j) is the sum of two: the query's first half with row i of the first key table and its
    second half with row j of the second.

    Args:
        queries_MHe: (M, H, e).
        keys: (H, n1 + n2, e/2), the first table's rows first.
        n1: rows of the first table.
        k: experts to choose, at most n1·n2.

    Returns:
        What `product_topk` returns.
    """
    first_MHe, second_MHe = queries_MHe.chunk(2, dim=-1)
    first_MHn = torch.einsum("mhe,hne->mhn", first_MHe, keys[:, :n1])
    second_MHn = torch.einsum("mhe,hne->mhn", second_MHe, keys[:, n1:])
    return product_topk(first_MHn, second_MHn, k)


def folded_keys(query_weight: Tensor, keys: Tensor, n1: int) -> Tensor:
    """The keys as they meet c itself: (W_q c)·key = c·(W_qᵀ key), since nothing lies between W_q and the keys.

    With these, many tokens need no queries: H·(n1 + n2) columns in place of H·e, then H·(n1 + n2) of half the length.

    Args:
        query_weight: W_q, (H·e, e), the first half of a head's rows for the first table.
        keys: (H, n1 + n2, e/2).
        n1: rows of the first table.

    Returns:
        (H, n1 + n2, e).
    """
    first_Hae, second_Hae = query_weight.unflatten(0, (keys.shape[0], 2, -1)).unbind(1)
    return torch.cat((keys[:, :n1] @ first_Hae, keys[:, n1:] @ second_Hae), dim=1)


def folding_pays(tokens: int, expert_size: int, key_rows: int) -> bool:
    """Whether `folded_keys` and its products take fewer operations than queries do, for n1 + n2 key rows."""
    folded = tokens * key_rows + key_rows * expert_size / 2
    return not PLAIN and folded < tokens * (expert_size + key_rows / 2)


def product_topk(first_MHn: Tensor, second_MHn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k pairs of a row of each table with the highest sums of scores, exactly.

    A pair among the k best has its i among the k best of the first table and its j among the k best of the second, so
    k·k sums are enough. Of equal sums, that with the better i comes first, then that with the better j, where of equal
    scores the lower row is the better: the same on every device and by every path.

    Args:
        first_MHn, second_MHn: (M, H, n1) and (M, H, n2), the scores of each table's rows.
        k: pairs to choose, at most n1·n2.

    Returns:
        weights (M, H, k): softmax of the chosen sums, in float32 or better, the best first;
        experts (M, H, k): int64, expert (i, j) as i·n2 + j.
    """
    if kernels_take(first_MHn):
        return fused_product_topk(first_MHn, second_MHn, k)
    n1, n2 = first_MHn.shape[-1], second_MHn.shape[-1]
    score_type = torch.promote_types(first_MHn.dtype, torch.float32)
    best_first, i = _first_of_sorted(first_MHn.to(score_type), min(k, n1))
    best_second, j = _first_of_sorted(second_MHn.to(score_type), min(k, n2))
    sums = (best_first.unsqueeze(-1) + best_second.unsqueeze(-2)).flatten(-2)
    scores, pair = _first_of_sorted(sums, k)
    width = best_second.shape[-1]
    experts = i.gather(-1, pair // width) * n2 + j.gather(-1, pair % width)
    return scores.softmax(dim=-1), experts


def _first_of_sorted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest and their places, of equals the first: `topk` promises no order among these."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], places[..., :k]


def cdmoe(
    c_Me: Tensor,
    weights_MHk: Tensor,
    experts_MHk: Tensor,
    down_embed: Tensor,
    up_embed: Tensor,
    act: Activation,
    path: str = "auto",
) -> Tensor:
    """Sum the chosen experts: Σ over heads and experts of σ(w · (c·D_expert)) U_expert.

    Args:
        c_Me: (M, e), the input of the experts.
        weights_MHk, experts_MHk: (M, H, k), from `cdmoe_route`; "sparse" does not check that experts are below N.
        down_embed: D, (N, e).
        up_embed: U, (N, d).
        act: σ.
        path: "gather", "dense", "sparse" (which needs Triton and a GPU), or "auto" to choose by size.

    Returns:
        (M, d), in the type of the matrix products (that of autocast, or of the arguments).

    Raises:
        ValueError: for an unknown path, and for "sparse" where it cannot run.
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; it must be one of {', '.join(PATHS)}")
    if path == "auto":
        path = _fastest(c_Me, down_embed.shape[0], weights_MHk.shape[1:].numel())
    weights_MK, experts_MK = weights_MHk.flatten(1), experts_MHk.flatten(1)
    return _PATHS[path](c_Me, weights_MK, experts_MK, down_embed, up_embed, act)


def merges(c_Me: Tensor, num_experts: int, chosen: int, path: str) -> bool:
    """Whether `merged_cdmoe` runs for M tokens that take K = `chosen` of N: where `cdmoe` takes the dense path."""
    if not kernels_take(c_Me) or chosen > MOST_CHOSEN or num_experts > MOST_EXPERTS:
        return False
    return path == "dense" or (path == "auto" and _fastest(c_Me, num_experts, chosen) == "dense")


def merged_cdmoe(
    c_Me: Tensor, keys_CE: Tensor, down_embed: Tensor, up_embed: Tensor, n1: int, heads: int, k: int
) -> Tensor:
    """Choose and sum experts by two matrix products and a kernel between them, with SiLU for σ.

    The first product takes c to the keys and to all D at once, so that c is read once, and so is what comes back.

    Args:
        c_Me: (M, e).
        keys_CE: (H·(n1 + n2), e), the `folded_keys` of all heads below each other.
        down_embed, up_embed: D, (N, e), and U, (N, d).
        n1: rows of the first key table.
        heads: H.
        k: experts of a head.

    Returns:
        (M, d), as `cdmoe`.
    """
    weight_CE = torch.cat((down_embed, keys_CE.to(down_embed.dtype)))
    # Rows of the product begin at whole 16 bytes, for the matrix units.
    product_MC = F.linear(c_Me, F.pad(weight_CE, (0, 0, 0, -len(weight_CE) % 8)))
    hidden_MN = chosen_hidden(product_MC, down_embed.shape[0], n1, heads, k)[0]
    return F.linear(hidden_MN, up_embed.t())


def _fastest(c_Me: Tensor, num_experts: int, chosen: int) -> str:
    """The path for M tokens that take K = `chosen` of N = `num_experts` each."""
    sparse = kernels_take(c_Me)
    if c_Me.shape[0] < DENSE_MIN_TOKENS:
        # Without a gradient, the sparse path need not sort: it is five kernels, of which two read rows.
        return "sparse" if sparse and not torch.is_grad_enabled() else "gather"
    most = max(DENSE_MAX_EXPERTS, DENSE_MAX_EXPERTS_FOR_ONE * chosen) if sparse else DENSE_MAX_EXPERTS
    return "dense" if num_experts <= most else "sparse" if sparse else "gather"


def _gather(
    c_Me: Tensor, weights_MK: Tensor, experts_MK: Tensor, down_embed: Tensor, up_embed: Tensor, act: Activation
) -> Tensor:
    """Read the K rows of each token: the least reading for few tokens, right in any precision."""
    down_MKe = F.embedding(experts_MK, down_embed)
    up_MKd = F.embedding(experts_MK, up_embed)
    inner_MK = torch.einsum("me,mke->mk", c_Me, down_MKe)
    hidden_MK = act(weights_MK * inner_MK)
    return torch.einsum("mk,mkd->md", hidden_MK.to(inner_MK.dtype), up_MKd)


def _dense(
    c_Me: Tensor, weights_MK: Tensor, experts_MK: Tensor, down_embed: Tensor, up_embed: Tensor, act: Activation
) -> Tensor:
    """Score all experts with one matrix product, keep the chosen, and sum with a second.

    Both passes are matrix products, so no two tokens ever add to the same row of a gradient, which is what makes
    the backward pass of `_gather` slow. An expert that two heads of a token choose is added up, hence scatter_add.
    """
    inner_MN = F.linear(c_Me, down_embed)
    if kernels_take(inner_MN):
        hidden_MK = act(weights_MK * pick(inner_MN, experts_MK))
        return F.linear(spread(hidden_MK, experts_MK, inner_MN.shape[1], inner_MN.dtype), up_embed.t())
    hidden_MK = act(weights_MK * inner_MN.gather(1, experts_MK))
    hidden_MN = torch.zeros_like(inner_MN).scatter_add(1, experts_MK, hidden_MK.to(inner_MN.dtype))
    return F.linear(hidden_MN, up_embed.t())


def _sparse(
    c_Me: Tensor, weights_MK: Tensor, experts_MK: Tensor, down_embed: Tensor, up_embed: Tensor, act: Activation
) -> Tensor:
    """As `_gather`, by kernels that hold no (M, K, e) tensor and sort the assignments before they add gradients up."""
    if PLAIN or not (HAVE_TRITON and is_usable(c_Me)):
        raise ValueError(
            'the path "sparse" needs Triton, a GPU, float32 or less, and no DOGE_LM_PLAIN; "auto" runs everywhere'
        )
    dtype = type_of_products(c_Me)
    return experts_output(c_Me.to(dtype), weights_MK, experts_MK, down_embed, up_embed, act, dtype)


def type_of_products(x: Tensor) -> torch.dtype:
    """The type in which matrices are multiplied with x: autocast's, where it runs; it leaves float64 alone."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


_PATHS = {"gather": _gather, "dense": _dense, "sparse": _sparse}
