"""The head of a language model and its cross entropy in one, so that the logits of all tokens never exist together.

Shapes, the one legend of this file; a tensor's name ends in its shape where it helps:

    M  tokens (batch and sequence as one)     d  hidden size
    R  tokens at a time, a chunk              V  vocabulary
    B  batch                                  T  tokens of a row

The gradient of a chunk's logits needs nothing that is not at hand when its loss is computed, but the factor that
arrives in the backward pass, one number for all of them. So the forward pass computes both, and what is kept for
the backward pass is as large as the gradients of `hidden_Md` and `weight_Vd` themselves.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import HAVE_TRITON, kernels_take

if HAVE_TRITON:
    from .linear_cross_entropy_triton import losses_and_gradient_by_kernel_


CHUNK_LOGITS = 2**28
"""Logits to hold at a time: 8,192 tokens of 32,768, which is half a GiB in bfloat16. The matrix products are then as
fast as with all tokens, and the sum over chunks of the weight's gradient costs little beside them."""

CHUNK_LOGITS_CPU = 2**24
"""As `CHUNK_LOGITS`: 512 tokens of 32,768. Few tokens fill a CPU's cores, and less memory is faster."""


def linear_cross_entropy(
    hidden_Md: Tensor,
    weight_Vd: Tensor,
    targets_M: Tensor,
    divisor: Tensor | float | None = None,
    ignore_index: int = -100,
    *,
    cap: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """The sum over targets of -log softmax(hidden weightᵀ)[target], divided by `divisor`.

    Computes what `F.linear` and `F.cross_entropy` do, under autocast too. The weight's gradient is summed in float32
    over all tokens and rounded to no shorter type on its way to a weight in float32. Waits for the device nowhere.

    Args:
        hidden_Md: (M, d).
        weight_Vd: (V, d), of the type of `hidden_Md` unless autocast makes them one.
        targets_M: (M,), int64. A target that is neither in [0, V) nor `ignore_index` makes the loss NaN on every
            device: to raise an error would mean to wait for the device.
        divisor: None for the number of targets that are not ignored; without any, the loss is NaN and the gradient
            zero, as of `F.cross_entropy`. A tensor of one number, or a number (a constant to `torch.compile`).
        ignore_index: the target of tokens without loss.
        cap: of the logits (`cap_logits`); 0 for none.
        chunk: tokens at a time, at most; None for as many as have `CHUNK_LOGITS` logits.

    Returns:
        A scalar in float32 (of float64 inputs, float64). It can be differentiated once.

    Raises:
        ValueError: for shapes or types that do not fit each other, or a cap below 0.
        RuntimeError: in the backward pass, for a graph of it (`create_graph`).
    """
    _check(hidden_Md, weight_Vd, targets_M, divisor, cap, chunk)
    device, dtype = hidden_Md.device, hidden_Md.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    elif dtype != weight_Vd.dtype:
        raise ValueError(f"hidden_Md is {dtype}, weight_Vd {weight_Vd.dtype}; cast one of them, or use autocast")
    grad = torch.is_grad_enabled()
    hidden_grad, weight_grad = grad and hidden_Md.requires_grad, grad and weight_Vd.requires_grad
    if chunk is None:
        most = CHUNK_LOGITS_CPU if device.type == "cpu" else CHUNK_LOGITS
        chunk = max(1, most // weight_Vd.shape[0])
    wanted = hidden_grad, weight_grad
    total, _, _ = summed_loss(hidden_Md, weight_Vd, targets_M, ignore_index, chunk, dtype, *wanted, float(cap))
    if divisor is None:
        count = (targets_M != ignore_index).sum()
        return torch.where(count > 0, total / count.clamp(min=1), torch.nan)
    if isinstance(divisor, Tensor):
        return total / divisor.reshape(()).to(device, total.dtype, non_blocking=True)
    return total / divisor


def cap_logits(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), between -cap and cap, as in Gemma 2 (arXiv 2408.00118, section 2); 0 leaves them alone.

    Args:
        logits: of any shape.
        cap: above 0, or 0.

    Returns:
        Capped, in float32 or better: near the cap, steps of a short type would make different logits equal.
    """
    if not cap:
        return logits
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap).tanh() * cap


def next_token_loss(
    hidden_BTd: Tensor,
    weight_Vd: Tensor,
    labels_BT: Tensor,
    divisor: Tensor | float | None = None,
    *,
    cap: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` of a language model, as transformers' `ForCausalLMLoss`: t is to predict label t + 1.

    Args:
        hidden_BTd: (B, T, d), what the head is to read.
        weight_Vd: the head, (V, d).
        labels_BT: (B, T), the tokens themselves, -100 where a token is no target.
        divisor, cap: as for `linear_cross_entropy`.
    """
    targets_BT = F.pad(labels_BT, (0, 1), value=-100)[:, 1:]
    return linear_cross_entropy(hidden_BTd.flatten(0, 1), weight_Vd, targets_BT.flatten(), divisor, cap=cap)


def _check(
    hidden_Md: Tensor,
    weight_Vd: Tensor,
    targets_M: Tensor,
    divisor: Tensor | float | None,
    cap: float,
    chunk: int | None,
) -> None:
    if hidden_Md.ndim != 2 or weight_Vd.ndim != 2 or hidden_Md.shape[1] != weight_Vd.shape[1]:
        shapes = f"{tuple(hidden_Md.shape)} and {tuple(weight_Vd.shape)}"
        raise ValueError(f"hidden_Md and weight_Vd have the shapes {shapes}; they must be (M, d) and (V, d)")
    if targets_M.shape != hidden_Md.shape[:1] or targets_M.dtype != torch.int64:
        raise ValueError(
            f"targets_M is {targets_M.dtype} of shape {tuple(targets_M.shape)}; it must be torch.int64 and one a row "
            f"of hidden_Md, ({hidden_Md.shape[0]},)"
        )
    if isinstance(divisor, Tensor) and divisor.numel() != 1:
        raise ValueError(f"divisor has the shape {tuple(divisor.shape)}; it must be one number")
    if not 0 <= cap < math.inf:
        raise ValueError(f"cap is {cap}; it must be a number above 0, or 0 for none")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 or more, or None")


def _forward(
    hidden_Md: Tensor,
    weight_Vd: Tensor,
    targets_M: Tensor,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype,
    hidden_grad: bool,
    weight_grad: bool,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss and its gradients, chunk by chunk; a gradient that is not asked for has no rows.

    The logits and their gradient are in `dtype`. The gradient is not divided by anything yet: a long batch's divisor
    would push it below what float16 can hold.

    Returns:
        The loss, in float32 or better; the gradient of `hidden_Md` in its type; that of `weight_Vd` in float32 or
        better.
    """
    m, v = hidden_Md.shape[0], weight_Vd.shape[0]
    losses_M, d_hidden, d_weight = _outputs(hidden_Md, weight_Vd, dtype, hidden_grad, weight_grad)
    chunks = max(1, -(-m // chunk))
    rows = max(1, -(-m // chunks))  # chunks of one length, or nearly: a short last one would be slow
    logits_RV = hidden_Md.new_empty((rows, v), dtype=dtype)
    weight_Vd = weight_Vd.to(dtype)
    for begin in range(0, m, rows):
        these = slice(begin, min(begin + rows, m))
        hidden_Rd = hidden_Md[these].to(dtype)
        grad_RV = torch.mm(hidden_Rd, weight_Vd.t(), out=logits_RV[: hidden_Rd.shape[0]])
        finish = losses_and_gradient_by_kernel_ if kernels_take(grad_RV) else losses_and_gradient_
        losses_M[these] = finish(grad_RV, targets_M[these], ignore_index, hidden_grad or weight_grad, cap)
        if hidden_grad:
            d_hidden[these] = torch.mm(grad_RV, weight_Vd)
        if weight_grad:
            _add_product(d_weight, grad_RV.t(), hidden_Rd)
    return losses_M.sum(), d_hidden, d_weight


def _outputs(
    hidden_Md: Tensor, weight_Vd: Tensor, dtype: torch.dtype, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the losses (M,) and the gradient of the hidden states; zeros for the gradient of the weight."""
    (m, d), v = hidden_Md.shape, weight_Vd.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    losses_M = hidden_Md.new_empty(m, dtype=wide)
    d_hidden = hidden_Md.new_empty((m if hidden_grad else 0, d))
    d_weight = weight_Vd.new_zeros((v if weight_grad else 0, d), dtype=wide)
    return losses_M, d_hidden, d_weight


def _add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ += a b, in the type of `sum_`, whatever the type of the factors."""
    if a.dtype == sum_.dtype:
        sum_.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(sum_, a, b, out_dtype=sum_.dtype, out=sum_)
    else:
        sum_.addmm_(a.to(sum_.dtype), b.to(sum_.dtype))


def losses_and_gradient_(
    logits_RV: Tensor, targets_R: Tensor, ignore_index: int, gradient: bool, cap: float = 0.0
) -> Tensor:
    """The loss of each row, and in place of its logits, if `gradient`, the loss's gradient.

    That is softmax less one-hot; with a cap, times the derivative of `cap_logits`, 1 - tanh².

    Args:
        logits_RV: (R, V); written over if `gradient`.
        targets_R: (R,), int64.
        ignore_index: the target of rows with no loss and a gradient of zero.
        gradient: whether the gradient is wanted.
        cap: of the logits; 0 for none.

    Returns:
        (R,) in float32 or better; NaN, with a gradient of zero, for targets out of [0, V).
    """
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    ignored_R = targets_R == ignore_index
    counts_R = ~ignored_R & (targets_R >= 0) & (targets_R < logits_RV.shape[1])
    target_R1 = targets_R.where(counts_R, 0).unsqueeze(1)
    capped_RV = cap_logits(logits_RV, cap)
    log_RV = capped_RV.log_softmax(-1, dtype=wide)
    losses_R = log_RV.gather(1, target_R1).squeeze(1).neg()
    losses_R = losses_R.masked_fill(~counts_R, torch.nan).masked_fill(ignored_R, 0)
    if gradient:
        grad_RV = log_RV.exp_()
        grad_RV.scatter_add_(1, target_R1, grad_RV.new_full((1, 1), -1).expand_as(target_R1))
        if cap:
            grad_RV *= 1 - (capped_RV / cap).square()
        logits_RV.copy_(grad_RV).masked_fill_(~counts_R.unsqueeze(1), 0)
    return losses_R


summed_loss = torch.library.custom_op("doge_lm::linear_cross_entropy", _forward, mutates_args=())
"""`_forward` as one operator: `torch.compile` takes it whole."""


@summed_loss.register_fake
def _(
    hidden_Md: Tensor,
    weight_Vd: Tensor,
    targets_M: Tensor,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype,
    hidden_grad: bool,
    weight_grad: bool,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    losses_M, d_hidden, d_weight = _outputs(hidden_Md, weight_Vd, dtype, hidden_grad, weight_grad)
    return losses_M.sum(), d_hidden, d_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, d_hidden, d_weight = output
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.weight_type = inputs[1].dtype
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.set_materialize_grads(False)  # or zeros as large as the gradients would be made for the last two outputs


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is not None and torch.is_grad_enabled() and grad.requires_grad:
        raise RuntimeError(
            "linear_cross_entropy can be differentiated once; for more, take F.linear and F.cross_entropy"
        )
    d_hidden, d_weight = ctx.saved_tensors
    hidden = weight = None
    if grad is not None and ctx.needs_input_grad[0]:
        # In the type of the factor, float32, or the factor itself would be rounded.
        hidden = (d_hidden.to(grad.dtype) * grad).to(d_hidden.dtype)
    if grad is not None and ctx.needs_input_grad[1]:
        weight = (d_weight * grad).to(ctx.weight_type)
    return hidden, weight, None, None, None, None, None, None, None


summed_loss.register_autograd(_backward, setup_context=_save)
