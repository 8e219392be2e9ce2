"""silu(h) Wᵀ without silu(h) in memory: the product that follows the wide layer of a feed-forward.

Autograd keeps h alone. Forward, where W is narrow enough for it to pay, one kernel reads h, takes its SiLU in registers
and multiplies; backward, the kernel that makes the gradient of h, and reads h for it, writes silu(h) again for W's.

Shapes, the one legend of this file:

    M  tokens                          BM, BN, BK  a tile of the product, and of its sum
    K  width of h                      BLOCK       elements of a program
    N  rows of W, width of the result
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_operator import INTERPRETED, launcher, operator

MOST_COLUMNS = 512
"""The widest result by the fused kernel, which takes the SiLU anew for every BN of its columns. SiLU and product, and
the fused kernel, in ms on an H100: 0.167 and 0.090 for 65,536 × 1,024 → 256, 0.375 and 0.303 for 65,536 × 2,048 → 512,
0.273 and 0.285 for 16,384 × 4,096 → 1,024 (benchmarks/silu_product.py)."""

_BM, _BN, _BK, _WARPS, _STAGES = TILE = 128, 256, 64, 8, 4
_SHARED_BYTES = _STAGES * (_BM + _BN) * _BK * 2  # of a program of the fused kernel
_BLOCK = 2048


@triton.jit
def _silu_product_kernel(
    h_ptr, weight_ptr, out_ptr, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    """One tile of the result, (BM, BN); K is a multiple of BK. With TANH by the GPU's approximate tanh."""
    across = tl.cdiv(N, BN)
    m = (tl.program_id(0) // across * BM + tl.arange(0, BM)).to(tl.int64)
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, K, BK):
        h = tl.load(h_ptr + m[:, None] * K + (begin + k)[None, :], mask=(m < M)[:, None], other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + n[None, :] * K + (begin + k)[:, None], mask=(n < N)[None, :], other=0.0)
        if TANH:  # silu(h) = h/2 + h/2·tanh(h/2): one special function, off by at most |h|·2⁻¹²
            half = 0.5 * h
            turned = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
            )
            activated = half * turned + half
        else:
            activated = h / (1 + tl.exp(-h))
        total = tl.dot(activated.to(weight_ptr.dtype.element_ty), weight, total, input_precision="ieee")
    there = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _silu_kernel(h_ptr, activated_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(activated_ptr + at, (h / (1 + tl.exp(-h))).to(activated_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _silu_backward_kernel(h_ptr, grad_ptr, activated_ptr, size, BLOCK: tl.constexpr):
    """The gradient of h in place of that of silu(h), and silu(h)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-h))
    tl.store(grad_ptr + at, (grad * share * (1 + h * (1 - share))).to(grad_ptr.dtype.element_ty), mask=at < size)
    tl.store(activated_ptr + at, (h * share).to(activated_ptr.dtype.element_ty), mask=at < size)


def fuses(h_MK: Tensor, weight_NK: Tensor) -> bool:
    """Whether the fused kernel is taken: in bfloat16, on a chip whose multiprocessors hold its tiles."""
    if h_MK.dtype != torch.bfloat16 or weight_NK.shape[0] > MOST_COLUMNS or h_MK.shape[1] % _BK or not h_MK.is_cuda:
        return False
    properties = triton.runtime.driver.active.utils.get_device_properties(h_MK.device.index or 0)
    return properties["max_shared_mem"] >= _SHARED_BYTES


def fused_product(
    h_MK: Tensor, weight_NK: Tensor, tile: tuple[int, int, int, int, int] = TILE, tanh: bool = not INTERPRETED
) -> Tensor:
    """silu(h) Wᵀ by the fused kernel, for contiguous h and W; `tile` is BM, BN, BK, warps and stages."""
    (m, k), n = h_MK.shape, weight_NK.shape[0]
    rows, columns, depth, warps, stages = tile
    out_MN = h_MK.new_empty((m, n))
    if out_MN.numel():
        launcher(_silu_product_kernel)[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
            h_MK, weight_NK, out_MN, m, n, K=k, BM=rows, BN=columns, BK=depth, TANH=tanh,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out_MN


@operator("doge_lm::silu_product")
def silu_product(h_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """silu(h) Wᵀ, (M, N), for h and W of one type; K is at least 1."""
    h_MK, weight_NK = h_MK.contiguous(), weight_NK.contiguous()
    if fuses(h_MK, weight_NK):
        return fused_product(h_MK, weight_NK)
    activated_MK = h_MK.new_empty(h_MK.shape)
    if h_MK.numel():
        launcher(_silu_kernel)[(triton.cdiv(h_MK.numel(), _BLOCK),)](
            h_MK, activated_MK, h_MK.numel(), BLOCK=_BLOCK, num_warps=8
        )
    return activated_MK @ weight_NK.t()


@operator("doge_lm::silu_product_backward")
def silu_product_backward(grad_MN: Tensor, h_MK: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of h and W."""
    h_MK = h_MK.contiguous()
    grad_MK = grad_MN @ weight_NK
    activated_MK = h_MK.new_empty(h_MK.shape)
    if h_MK.numel():
        launcher(_silu_backward_kernel)[(triton.cdiv(h_MK.numel(), _BLOCK),)](
            h_MK, grad_MK, activated_MK, h_MK.numel(), BLOCK=_BLOCK, num_warps=8
        )
    return grad_MK, grad_MN.t() @ activated_MK


@silu_product.register_fake
def _(h_MK: Tensor, weight_NK: Tensor) -> Tensor:
    return h_MK.new_empty((h_MK.shape[0], weight_NK.shape[0]))


@silu_product_backward.register_fake
def _(grad_MN: Tensor, h_MK: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    return h_MK.new_empty(h_MK.shape), weight_NK.new_empty(weight_NK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, Tensor]:
    return silu_product_backward(grad_MN, *ctx.saved_tensors)


silu_product.register_autograd(_backward, setup_context=_save)
