"""From the one matrix product of all experts and keys to the experts' hidden values: two Triton kernels, and one back.

The dense path of `cdmoe.cdmoe` scores all experts by a matrix product, and the choice of experts is made from a second
one with the same input. As one product they read their input once, and so does its gradient; what lies between it and
the product with U is here. Of the first product, only the K numbers at the chosen experts are kept for the way back.

Shapes, the one legend of this file:

    M  tokens             H  expert heads                       C   columns of the product: N, then H·r, then padding
    N  experts, n1·n2     k  experts of a head, K = H·k         BM  tokens of a program
    r  n1 + n2, rows of a head's two key tables                 BN, BR  N and H·r, rounded up to a power of 2
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .routing_triton import choose
from .triton_operator import by_rows, launcher, operator

MOST_CHOSEN = 64
"""Experts of a token that the kernels are made for: they are taken one by one."""

MOST_EXPERTS = 8192
"""Columns that a program holds in registers."""

_MOST_UNROLLED = 8  # of them in code that is written out; 64 would compile for ten minutes
_CELLS = 4096  # of the columns that a program holds at a time, where a row is shorter


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _choice(product_ptr, weights_ptr, experts_ptr, inner_ptr, m, n, M, product_stride, K, i):
    """Each row's choice i: silu(weight · inner) in its expert's column, (BM, BN), and `inner` stored."""
    expert = tl.load(experts_ptr + m * K + i, mask=m < M, other=0)
    weight = tl.load(weights_ptr + m * K + i, mask=m < M, other=0.0)
    inner = tl.load(product_ptr + m * product_stride + expert, mask=m < M, other=0.0)
    tl.store(inner_ptr + m * K + i, inner, mask=m < M)
    x = weight * inner.to(tl.float32)
    return tl.where(expert.to(tl.int32)[:, None] == n, (x * _sigmoid(x))[:, None], 0.0)


@triton.jit
def _hidden_kernel(
    product_ptr, weights_ptr, experts_ptr, hidden_ptr, inner_ptr, M, N, product_stride,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """BM rows: silu(weight · inner) at each chosen expert, the sum where two heads chose it, and zeros.

    And `inner`: the product there.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)[None, :]
    hidden = tl.zeros((BM, BN), tl.float32)
    if UNROLLED:
        for i in tl.static_range(K):
            hidden += _choice(product_ptr, weights_ptr, experts_ptr, inner_ptr, m, n, M, product_stride, K, i)
    else:
        for i in range(K):
            hidden += _choice(product_ptr, weights_ptr, experts_ptr, inner_ptr, m, n, M, product_stride, K, i)
    mask = (m < M)[:, None] & (n < N)
    tl.store(hidden_ptr + m[:, None] * N + n, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, there, at, N):
    """Of the choices `at`: expert, weight, and the gradients of product and weight, each (BM,)."""
    expert = tl.load(experts_ptr + at, mask=there, other=0)
    weight = tl.load(weights_ptr + at, mask=there, other=0.0)
    inner = tl.load(inner_ptr + at, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + m * N + expert, mask=there, other=0.0).to(tl.float32)
    x = weight * inner
    share = _sigmoid(x)
    grad *= share * (1 + x * (1 - share))
    return expert.to(tl.int32), weight, grad * weight, grad * inner


@triton.jit
def _expert_gradient(grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, n, there, at, N):
    """Of the choices `at`: the gradient of the product, (BM, BN), and weight · its gradient, (BM,)."""
    expert, weight, product_grad, weight_grad = _gradients(
        grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, there, at, N
    )
    return tl.where(expert[:, None] == n, product_grad[:, None], 0.0), weight * weight_grad


@triton.jit
def _key_gradient(grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, r, there, at, mean, begin, N, n1, n2):
    """Of the choices `at`: the gradient of the key scores, (BM, BR), for `mean`, the sum of weight · its gradient."""
    expert, weight, _, weight_grad = _gradients(grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, there, at, N)
    score = (weight * (weight_grad - mean))[:, None]
    first = tl.where((begin + expert // n2)[:, None] == r, score, 0.0)
    return first + tl.where((begin + n1 + expert % n2)[:, None] == r, score, 0.0)


@triton.jit
def _hidden_backward_kernel(
    grad_ptr, inner_ptr, weights_ptr, experts_ptr, out_ptr, M, N, C, n1, n2,
    H: tl.constexpr, k: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """The gradient of BM rows of the product: of the experts, of the key scores (that of a softmax), and zeros."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = m < M
    n, r = tl.arange(0, BN)[None, :], tl.arange(0, BR)[None, :]
    experts = tl.zeros((BM, BN), tl.float32)
    keys = tl.zeros((BM, BR), tl.float32)
    if UNROLLED:
        for h in tl.static_range(H):
            mean = tl.zeros((BM,), tl.float32)
            for i in tl.static_range(k):
                at = (m * H + h) * k + i
                grad, part = _expert_gradient(grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, n, there, at, N)
                experts += grad
                mean += part
            for i in tl.static_range(k):
                at, begin = (m * H + h) * k + i, h * (n1 + n2)
                keys += _key_gradient(
                    grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, r, there, at, mean, begin, N, n1, n2
                )
    else:
        for h in range(H):
            mean = tl.zeros((BM,), tl.float32)
            for i in range(k):
                at = (m * H + h) * k + i
                grad, part = _expert_gradient(grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, n, there, at, N)
                experts += grad
                mean += part
            for i in range(k):
                at, begin = (m * H + h) * k + i, h * (n1 + n2)
                keys += _key_gradient(
                    grad_ptr, inner_ptr, weights_ptr, experts_ptr, m, r, there, at, mean, begin, N, n1, n2
                )
    to = out_ptr + m[:, None] * C
    tl.store(to + n, experts.to(out_ptr.dtype.element_ty), mask=there[:, None] & (n < N))
    tl.store(to + N + r, keys.to(out_ptr.dtype.element_ty), mask=there[:, None] & (r < C - N))


def _tile(columns: int) -> tuple[int, int, int]:
    """BM, the columns rounded up, and the warps of a program."""
    width = triton.next_power_of_2(columns)
    return max(1, _CELLS // width), width, 4 if width <= _CELLS else 8


@operator("doge_lm::chosen_hidden")
def chosen_hidden(
    product_MC: Tensor, num_experts: int, n1: int, heads: int, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose experts by their keys' scores, and give silu(weight · product) at the chosen ones and 0 elsewhere.

    Args:
        product_MC: float32 or shorter; the input's products with D, then for each head with its first and its second
            key table; what stands beyond has no meaning.
        num_experts: N, at most `MOST_EXPERTS`.
        n1: rows of the first table; the second has N/n1.
        heads: H.
        k: experts of a head; H·k at most `MOST_CHOSEN`.

    Returns:
        hidden (M, N) in the product's type; the products with the chosen experts, inner (M, H, k), and what
        `cdmoe.product_topk` returns, all three without a gradient.
    """
    m, n2 = product_MC.shape[0], num_experts // n1
    product_MC = by_rows(product_MC)
    hidden_MN = product_MC.new_empty((m, num_experts))
    scores_MHr = product_MC[:, num_experts : num_experts + heads * (n1 + n2)].unflatten(1, (heads, n1 + n2))
    weights_MHk, experts_MHk = choose(scores_MHr[..., :n1], scores_MHr[..., n1:], k)
    inner_MHk = product_MC.new_empty(experts_MHk.shape)
    if m:
        rows, width, warps = _tile(num_experts)
        launcher(_hidden_kernel)[(triton.cdiv(m, rows),)](
            product_MC, weights_MHk, experts_MHk, hidden_MN, inner_MHk, m, num_experts, product_MC.stride(0),
            K=heads * k, BM=rows, BN=width, UNROLLED=heads * k <= _MOST_UNROLLED, num_warps=warps,
        )  # fmt: skip
    return hidden_MN, inner_MHk, weights_MHk, experts_MHk


@operator("doge_lm::chosen_hidden_backward")
def chosen_hidden_backward(
    grad_MN: Tensor, inner_MHk: Tensor, weights_MHk: Tensor, experts_MHk: Tensor, n1: int, columns: int
) -> Tensor:
    """The gradient of the product, (M, C) for C = `columns`, by that of `hidden`."""
    (m, heads, k), num_experts = weights_MHk.shape, grad_MN.shape[1]
    out_MC = inner_MHk.new_empty((m, columns))
    if m:
        keys = triton.next_power_of_2(columns - num_experts)
        rows, _, warps = _tile(max(num_experts, keys))
        launcher(_hidden_backward_kernel)[(triton.cdiv(m, rows),)](
            grad_MN.contiguous(), inner_MHk, weights_MHk, experts_MHk, out_MC, m, num_experts, columns,
            n1, num_experts // n1,
            H=heads, k=k, BM=rows, BN=triton.next_power_of_2(num_experts), BR=keys,
            UNROLLED=heads * k <= _MOST_UNROLLED, num_warps=warps,
        )  # fmt: skip
    return out_MC


@chosen_hidden.register_fake
def _(product_MC: Tensor, num_experts: int, n1: int, heads: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = product_MC.shape[0]
    return (
        product_MC.new_empty((m, num_experts)),
        product_MC.new_empty((m, heads, k)),
        product_MC.new_empty((m, heads, k), dtype=torch.float32),
        product_MC.new_empty((m, heads, k), dtype=torch.int64),
    )


@chosen_hidden_backward.register_fake
def _(grad_MN: Tensor, inner_MHk: Tensor, weights_MHk: Tensor, experts_MHk: Tensor, n1: int, columns: int) -> Tensor:
    return inner_MHk.new_empty((grad_MN.shape[0], columns))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    product_MC, _, ctx.n1, _, _ = inputs
    ctx.columns = product_MC.shape[1]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_MN: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return chosen_hidden_backward(grad_MN, *ctx.saved_tensors, ctx.n1, ctx.columns), None, None, None, None


chosen_hidden.register_autograd(_backward, setup_context=_save)
