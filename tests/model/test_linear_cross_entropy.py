"""The head and loss in one against `F.linear` and `F.cross_entropy` in float64, in plain PyTorch and by the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from doge_lm.model import linear_cross_entropy as module
from doge_lm.model.linear_cross_entropy import cap_logits, linear_cross_entropy, losses_and_gradient_, summed_loss

from .support import EVERY_VARIANT, relative_error

try:
    from doge_lm.model.linear_cross_entropy_triton import losses_and_gradient_by_kernel_
except ImportError:
    losses_and_gradient_by_kernel_ = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}

# (M, V, d, chunk): one token, a vocabulary of one, chunks that divide M and that do not, one chunk, odd sizes.
SIZES = [
    (1, 7, 3, 4),
    (5, 1, 4, 2),
    (12, 33, 8, 4),
    (13, 50, 7, 5),
    (37, 129, 16, 1),
    (20, 64, 24, 100),
]

Inputs = tuple[Tensor, Tensor, Tensor]

with_triton = pytest.mark.skipif(losses_and_gradient_by_kernel_ is None, reason="there is no Triton for this machine")


@pytest.fixture(params=["plain", pytest.param("kernel", marks=with_triton)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Send every chunk to plain PyTorch, or to the kernel (without a GPU, in the interpreter)."""
    by_kernel = request.param == "kernel"
    monkeypatch.setattr(module, "kernels_take", lambda x: by_kernel and x.dtype != torch.float64)
    return request.param


def inputs(
    m: int, v: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, weight: torch.dtype | None = None
) -> Inputs:
    """Leaves for hidden states and weight, logits of order one, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, d, generator=generator).to(DEVICE, dtype).requires_grad_()
    head = (torch.randn(v, d, generator=generator) * d**-0.5).to(DEVICE, weight or dtype).requires_grad_()
    targets = torch.randint(0, v, (m,), generator=generator)
    targets[1::4] = IGNORED
    return hidden, head, targets.to(DEVICE)


def ordinary(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def gradients(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of hidden states and weight."""
    value = loss(hidden, weight, targets)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


def slope(logits: Tensor, cap: float) -> Tensor | float:
    """The derivative of `capped`."""
    return torch.cosh(logits / cap) ** -2 if cap else 1.0


def expected(
    hidden: Tensor, weight: Tensor, targets: Tensor, divisor: float | None = None, cap: float = 0.0
) -> tuple[Tensor, ...]:
    """As `gradients`, in float64 by PyTorch with all logits."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        logits = capped(logits, cap)
        if divisor is None:
            return F.cross_entropy(logits, targets)
        return F.cross_entropy(logits, targets, reduction="sum") / divisor

    doubles = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return gradients(loss, *doubles, targets)


def assert_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for x, y in zip(found, wanted, strict=True):
        # A vocabulary of one has a loss and gradients of 0.
        assert (x.double() - y).norm() <= tolerance * max(float(y.norm()), 1e-3)


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_loss_and_gradients_are_those_of_all_logits(
    sizes: tuple[int, ...], dtype: torch.dtype, cap: float, way: str
) -> None:
    m, v, d, chunk = sizes
    leaves = inputs(m, v, d, seed=sum(sizes), dtype=dtype)
    found = gradients(lambda *x: linear_cross_entropy(*x, cap=cap, chunk=chunk), *leaves)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[0].shape == ()
    assert [x.dtype for x in found[1:]] == [dtype, dtype]
    assert_close(found, expected(*leaves, cap=cap), TOLERANCE[dtype])


def test_a_cap_is_one_of_training_beyond_it_too(way: str) -> None:
    """Logits of hundreds at a cap of 15: no gradient is left, and none is NaN; caps far above them do nothing."""
    leaves = inputs(9, 40, 6)
    large = (leaves[0].detach() * 300).requires_grad_(), *leaves[1:]
    found = gradients(lambda *x: linear_cross_entropy(*x, cap=15), *large)
    assert_close(found, expected(*large, cap=15), 1e-4)
    assert all(x.isfinite().all() for x in found)
    for cap in (1e3, 1e5, 1e6):
        nearly = gradients(lambda *x, cap=cap: linear_cross_entropy(*x, cap=cap), *leaves)
        assert_close(nearly, expected(*leaves, cap=cap), 1e-5)
        assert_close(nearly, expected(*leaves), 1e-5)


def test_capped_logits_are_ordered_as_before() -> None:
    """In bfloat16 two logits above the cap would round to one."""
    logits = torch.tensor([-60.0, -2.0, 0.0, 2.0, 45.0, 46.0], dtype=torch.bfloat16)
    assert cap_logits(logits, 0.0) is logits
    found = cap_logits(logits, 15.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), capped(logits.double(), 15))
    assert (found.diff() > 0).all()
    assert found.bfloat16()[-1] == found.bfloat16()[-2]


@pytest.mark.parametrize("divisor", [3, 2.5, torch.tensor(7), torch.tensor([5.0]), torch.tensor(6, dtype=torch.int32)])
def test_divides_by_the_number_given(divisor: Tensor | float) -> None:
    leaves = inputs(11, 20, 6)
    found = gradients(lambda *x: linear_cross_entropy(*x, divisor, chunk=4), *leaves)
    assert_close(found, expected(*leaves, divisor=float(divisor)), 1e-6)


def test_a_factor_and_a_second_backward_pass_reach_the_gradients(way: str) -> None:
    leaves = inputs(11, 20, 6, dtype=torch.bfloat16)
    hidden, weight, _ = leaves
    once = gradients(lambda *x: linear_cross_entropy(*x, chunk=4), *leaves)
    loss = linear_cross_entropy(*leaves, chunk=4)
    (3 * loss).backward(retain_graph=True)
    assert_close((hidden.grad, weight.grad), tuple(3 * x.double() for x in once[1:]), 5e-3)
    (-3 * loss).backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_gradients_add_up_over_micro_batches() -> None:
    hidden, weight, targets = inputs(12, 20, 6)
    for rows in (slice(0, 5), slice(5, 12)):
        linear_cross_entropy(hidden[rows], weight, targets[rows], torch.tensor(9), chunk=2).backward()
    assert_close((hidden.grad, weight.grad), expected(hidden, weight, targets, divisor=9)[1:], 1e-5)


def test_one_matrix_for_embedding_and_head() -> None:
    """Tied weights: one leaf is used twice, and takes the gradients of both uses."""
    _, weight, targets = inputs(12, 20, 6, dtype=torch.float64)
    ids = torch.arange(12, device=DEVICE)
    found, wanted = (
        torch.autograd.grad(loss(F.embedding(ids, weight).sin(), weight, targets), weight)[0]
        for loss in (linear_cross_entropy, lambda h, w, t: F.cross_entropy(F.linear(h, w), t))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_takes_tensors_of_any_layout(layout: str, way: str) -> None:
    _, _, targets = inputs(10, 20, 6)
    twice = torch.randn(20, 10, device=DEVICE)
    hidden = {"transposed": twice[:6].t(), "every other": twice[::2, :6], "expanded": twice[:1, :6].expand(10, 6)}[
        layout
    ]
    weight = torch.randn(6, 20, device=DEVICE).t()
    leaves = hidden.detach().requires_grad_(), weight.requires_grad_(), targets.repeat_interleave(2)[::2]
    assert not leaves[0].is_contiguous()
    assert_close(gradients(lambda *x: linear_cross_entropy(*x, chunk=4), *leaves), expected(*leaves), 1e-5)


@pytest.mark.parametrize("m", [0, 6])
def test_no_targets(m: int, way: str) -> None:
    """NaN with a gradient of zero, as PyTorch; with a divisor, 0."""
    hidden, weight, _ = inputs(m, 20, 6)
    targets = torch.full((m,), IGNORED, device=DEVICE)
    value, *grads = gradients(lambda *x: linear_cross_entropy(*x, chunk=4), hidden, weight, targets)
    assert value.isnan()
    assert F.cross_entropy(F.linear(hidden, weight), targets).isnan()
    assert not any(x.any() for x in grads)
    value, *grads = gradients(lambda *x: linear_cross_entropy(*x, 5, chunk=4), hidden, weight, targets)
    assert value == 0
    assert [x.shape for x in grads] == [hidden.shape, weight.shape]
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize("ignored", [0, 3, 1000])
def test_any_number_can_mean_no_target(ignored: int, way: str) -> None:
    hidden, weight, targets = inputs(12, 20, 6)
    targets = targets.where(targets != IGNORED, ignored)
    found = gradients(lambda *x: linear_cross_entropy(*x, ignore_index=ignored, chunk=5), hidden, weight, targets)
    assert_close(found, expected(hidden, weight, targets.where(targets != ignored, IGNORED)), 1e-5)


@pytest.mark.parametrize("target", [20, -1, -101, 2**40, -(2**40)])
def test_a_target_out_of_the_vocabulary_gives_nan(target: int, way: str) -> None:
    hidden, weight, targets = inputs(6, 20, 6)
    targets[2] = target
    value, *grads = gradients(lambda *x: linear_cross_entropy(*x, chunk=4), hidden, weight, targets)
    assert value.isnan()
    assert not grads[0][2].any()
    assert all(x.isfinite().all() for x in grads)


def test_large_logits_and_short_types_keep_their_range(way: str) -> None:
    """Logits of thousands, and in float16 a divisor by which its gradients would vanish."""
    leaves = inputs(9, 40, 6)
    large = (leaves[0].detach() * 3000).requires_grad_(), *leaves[1:]
    assert_close(gradients(linear_cross_entropy, *large), expected(*large), 1e-5)
    half = inputs(9, 40, 6, dtype=torch.float16)
    found = gradients(lambda *x: 2.0**24 * linear_cross_entropy(*x, 2**24), *half)
    assert_close(found, expected(*half, divisor=1), 1e-2)


@pytest.mark.parametrize(("hidden_grad", "weight_grad"), [(True, False), (False, True), (False, False)])
def test_computes_only_the_gradients_asked_for(hidden_grad: bool, weight_grad: bool, way: str) -> None:
    hidden, weight, targets = inputs(12, 20, 6)
    wanted = expected(hidden, weight, targets)
    hidden, weight = hidden.detach().requires_grad_(hidden_grad), weight.detach().requires_grad_(weight_grad)
    with Seen() as seen:
        loss = linear_cross_entropy(hidden, weight, targets, chunk=5)
    torch.testing.assert_close(loss.double(), wanted[0])
    _, d_hidden, d_weight = seen.outputs_of("doge_lm::linear_cross_entropy")
    assert (d_hidden.numel() > 0, d_weight.numel() > 0) == (hidden_grad, weight_grad)
    assert loss.requires_grad == (hidden_grad or weight_grad)
    if loss.requires_grad:
        loss.backward()
    for leaf, grad, asked in ((hidden, wanted[1], hidden_grad), (weight, wanted[2], weight_grad)):
        assert (leaf.grad is not None) == asked
        if asked:
            assert relative_error(leaf.grad, grad) <= 1e-5


def test_computes_no_gradient_under_no_grad() -> None:
    leaves = inputs(12, 20, 6)
    with torch.no_grad(), Seen() as seen:
        loss = linear_cross_entropy(*leaves, chunk=5)
    torch.testing.assert_close(loss.double(), expected(*leaves)[0])
    _, d_hidden, d_weight = seen.outputs_of("doge_lm::linear_cross_entropy")
    assert d_hidden.numel() == d_weight.numel() == 0
    with torch.no_grad(), Seen() as inside:  # as PyTorch runs what is inside an operator
        module._forward(*leaves, IGNORED, 5, torch.float32, False, False, 0.0)
    assert inside.names.count("aten::mm") == 3  # the logits of three chunks, and no gradient


@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_holds_the_logits_of_all_tokens(dtype: torch.dtype, cap: float) -> None:
    m, v, d, chunk = 64, 1000, 8, 10
    hidden, weight, targets = inputs(m, v, d)
    with torch.no_grad(), Seen() as inside:  # as PyTorch runs what is inside an operator
        module._forward(hidden, weight, targets, IGNORED, chunk, dtype, True, True, cap)
    assert max(inside.sizes) == chunk * v  # a chunk's logits, and nothing larger
    context = torch.autocast(DEVICE, dtype) if dtype != torch.float32 else nullcontext()
    with Seen() as outside, context:
        linear_cross_entropy(hidden, weight, targets, cap=cap, chunk=chunk).backward()
    assert max(outside.sizes) == v * d  # the weight's gradient
    assert not [name for name in outside.names if "zeros" in name]  # in place of gradients that nothing computed
    with Seen() as all_logits:
        ordinary(hidden, weight, targets).backward()
    assert max(all_logits.sizes) == m * v


def test_the_chunk_follows_from_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", 90)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 90)
    leaves = inputs(9, 20, 6)
    with Seen() as seen:
        linear_cross_entropy(*leaves)
    assert seen.inputs_of("doge_lm::linear_cross_entropy")[4] == 4
    wide = inputs(3, 100, 6)  # not even one token fits
    assert_close(gradients(linear_cross_entropy, *wide), expected(*wide), 1e-5)


def test_autocast_is_as_precise_as_with_all_logits(way: str) -> None:
    """Hidden states in bfloat16, weight in float32, whose gradient nothing rounds to bfloat16."""
    m, v, d = 600, 300, 64
    leaves = inputs(m, v, d, dtype=torch.bfloat16, weight=torch.float32)
    wanted = expected(*leaves)
    errors = []
    for loss in (lambda *x: linear_cross_entropy(*x, chunk=128), ordinary):
        with torch.autocast(DEVICE, torch.bfloat16):
            found = gradients(loss, *leaves)
        assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float32]
        errors.append([relative_error(x, y) for x, y in zip(found, wanted, strict=True)])
    (loss, *ours), (_, *theirs) = errors
    assert loss <= 1e-4
    for our, their in zip(ours, theirs, strict=True):
        assert our <= min(1e-2, 1.5 * their)


def test_autocast_sums_the_gradient_of_the_weight_in_float32() -> None:
    """Summed over 512 chunks or within one matrix product, the same: neither a part nor the sum is rounded."""
    leaves = inputs(512, 10, 8)

    def gradient(chunk: int) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return torch.autograd.grad(linear_cross_entropy(*leaves, chunk=chunk), leaves[1])[0]

    one = gradient(chunk=512)
    assert relative_error(one.bfloat16(), one) > 1e-4
    assert relative_error(gradient(chunk=1), one) <= 1e-5


def test_autocast_takes_float32_and_leaves_float64_alone(way: str) -> None:
    leaves = inputs(12, 20, 6)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(linear_cross_entropy, *leaves)
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert 1e-5 < relative_error(found[1], expected(*leaves)[1]) < 1e-2
    doubles = inputs(12, 20, 6, dtype=torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(linear_cross_entropy, *doubles)
    assert_close(found, expected(*doubles), 1e-13)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend: str) -> None:
    """In the middle of a graph, under autocast, with each kind of divisor: the same numbers as uncompiled."""
    hidden, weight, targets = inputs(12, 20, 6)
    mixer = torch.randn(6, 6, device=DEVICE, requires_grad=True)

    def step(mixer: Tensor, divisor: Tensor | float | None) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return 2 * linear_cross_entropy(F.linear(hidden, mixer), weight, targets, divisor, cap=2.0, chunk=5)

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    for divisor in (None, 7, torch.tensor(7, device=DEVICE)):
        results = []
        for function in (step, compiled):
            loss = function(mixer, divisor)
            results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight, mixer))))
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("grad", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_is_what_it_declares(grad: tuple[bool, bool], weight: torch.dtype) -> None:
    """Types and shapes of the fake, no aliasing, and gradients as with any other operator."""
    hidden, head, targets = inputs(12, 20, 6, dtype=torch.bfloat16, weight=weight)
    leaves = hidden.detach().requires_grad_(grad[0]), head.detach().requires_grad_(grad[1]), targets
    torch.library.opcheck(summed_loss, (*leaves, IGNORED, 5, torch.bfloat16, *grad, 2.0))


@pytest.mark.gpu
def test_never_waits_for_the_device() -> None:
    leaves = inputs(64, 100, 32)
    for divisor in (None, 7.0, torch.tensor(7, device=DEVICE)):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast(DEVICE, torch.bfloat16):
                linear_cross_entropy(*leaves, divisor, chunk=10).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_Md": torch.zeros(2, 3, 4)}, r"\(M, d\) and \(V, d\)"),
        ({"weight_Vd": torch.zeros(5, 3)}, r"\(3, 4\) and \(5, 3\)"),
        ({"weight_Vd": torch.zeros(5, 4, dtype=torch.bfloat16)}, "cast one of them, or use autocast"),
        ({"targets_M": torch.zeros(2, dtype=torch.int64)}, r"one a row of hidden_Md, \(3,\)"),
        ({"targets_M": torch.zeros(3)}, "must be torch.int64"),
        ({"divisor": torch.ones(2)}, "must be one number"),
        ({"chunk": 0}, "chunk is 0"),
        ({"cap": -1.0}, "cap is -1.0"),
        ({"cap": math.nan}, "cap is nan"),
    ],
)
def test_says_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {
        "hidden_Md": torch.zeros(3, 4),
        "weight_Vd": torch.zeros(5, 4),
        "targets_M": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**fitting, **change})


def rows_of_logits(rows: int, v: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, v, generator=generator)
    targets = torch.randint(0, v, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.2] = IGNORED
    return logits.to(DEVICE, dtype), targets.to(DEVICE)


def check_kernel(logits: Tensor, targets: Tensor, cap: float, one_pass: int) -> None:
    """The kernel against softmax in float64, with guard columns on both sides of each row.

    What float32 loses grows with the cap: losses are held to 1e-5 up to a cap of 15, gradients to 1e-6 up to one of 5.
    """
    v, wide = logits.shape[1], capped(logits.double(), cap)
    losses = F.cross_entropy(wide, targets, reduction="none", ignore_index=IGNORED)
    grad = wide.softmax(-1).scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -torch.ones_like(wide[:, :1]))
    grad[targets == IGNORED] = 0
    grad *= slope(logits.double(), cap)
    guarded = F.pad(logits, (3, 5), value=7.0)
    for wanted in (False, True):
        found = losses_and_gradient_by_kernel_(guarded[:, 3 : 3 + v], targets, IGNORED, wanted, cap, one_pass)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5 * max(1, cap / 15))
        assert not (found < 0).any()
        if not wanted:
            assert torch.equal(guarded[:, 3 : 3 + v], logits)
    precision = 1e-6 * max(1, cap / 5) if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps
    torch.testing.assert_close(guarded[:, 3 : 3 + v].double(), grad, rtol=precision, atol=1e-6)
    assert (guarded[:, :3] == 7).all()
    assert (guarded[:, 3 + v :] == 7).all()


@with_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("one_pass", [32768, 16, 4])
@pytest.mark.parametrize("v", [1, 2, 15, 16, 17, 63, *([100, 257] if EVERY_VARIANT else [])])
@pytest.mark.parametrize("cap", [0.0, 2.5])
def test_kernel(cap: float, v: int, one_pass: int, dtype: torch.dtype) -> None:
    """In one pass and block by block."""
    for seed in range(3 if EVERY_VARIANT else 1):
        check_kernel(*rows_of_logits(5, v, seed, dtype), cap, one_pass)


@with_triton
@pytest.mark.parametrize("one_pass", [32768, 8])
@pytest.mark.parametrize("cap", [0.0, 0.5, 15.0, 30.0, 32.0, 33.0, 1e4])
def test_kernel_with_small_caps_and_large(cap: float, one_pass: int) -> None:
    """Also far beyond the cap, where the power that tanh is made of is 0 or infinite, and in rows that are level."""
    logits, targets = rows_of_logits(6, 23, 0, torch.float32)
    targets[:] = torch.arange(6, device=DEVICE)
    logits[1] *= 30
    logits[2, ::2], logits[2, 1::2] = 5e4, -5e4
    logits[3], logits[4], logits[5] = 0.0, 5e4, -5e4
    logits[0, 0] = 200.0  # so sure of the target that rounding could bring the loss below 0
    check_kernel(logits, targets, cap, one_pass)


@with_triton
@pytest.mark.parametrize("one_pass", [32768, 4])
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_kernel_takes_logits_of_minus_infinity(cap: float, one_pass: int) -> None:
    logits, _ = rows_of_logits(3, 13, 0, torch.float32)
    logits[:, :9] = -math.inf
    targets = torch.tensor([9, 10, 12], device=DEVICE)
    plain, kernel = logits.clone(), logits.clone()
    losses = losses_and_gradient_(plain, targets, IGNORED, True, cap)
    torch.testing.assert_close(losses_and_gradient_by_kernel_(kernel, targets, IGNORED, True, cap, one_pass), losses)
    torch.testing.assert_close(kernel, plain)


@with_triton
@pytest.mark.parametrize(
    ("cap", "loss", "gradient"),
    [(0.0, 0, 0), (0.5, 2**-21, 0), (15.0, 2**-21, 0), (32.0, 2**-21, 0), (50.0, 50 * 2**-23, 2**-23)],
)
def test_kernel_gives_no_loss_to_the_only_token(cap: float, loss: float, gradient: float) -> None:
    """What its power is off by, the sum is off too; a GPU divides and takes logarithms to 2^-22 each."""
    logits = torch.linspace(-40, 40, 41, device=DEVICE).unsqueeze(1)
    targets = torch.zeros(41, dtype=torch.int64, device=DEVICE)
    losses = losses_and_gradient_by_kernel_(logits, targets, IGNORED, True, cap)
    assert (losses >= 0).all()
    assert (losses <= loss).all()
    assert (logits.abs() <= gradient).all()


@with_triton
@pytest.mark.parametrize("one_pass", [32768, 4])
@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_kernel_takes_the_largest_numbers(sign: int, cap: float, one_pass: int) -> None:
    """Of all rows of level logits the loss is log V, wherever they lie."""
    logits = torch.full((2, 13), sign * torch.finfo(torch.float32).max, device=DEVICE)
    logits[1, 7:] = 0.0
    targets = torch.tensor([9, 3], device=DEVICE)
    plain, kernel = logits.clone(), logits.clone()
    losses = losses_and_gradient_(plain, targets, IGNORED, True, cap)
    assert losses[0].item() == pytest.approx(math.log(13))
    torch.testing.assert_close(losses_and_gradient_by_kernel_(kernel, targets, IGNORED, True, cap, one_pass), losses)
    torch.testing.assert_close(kernel, plain)


@with_triton
def test_kernel_reads_no_row_that_has_no_target() -> None:
    logits, targets = torch.full((2, 13), math.nan, device=DEVICE), torch.tensor([IGNORED, 13], device=DEVICE)
    losses = losses_and_gradient_by_kernel_(logits, targets, IGNORED, True)
    assert losses[0] == 0
    assert losses[1].isnan()
    assert not logits.any()


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [0.0, 2.5, 15.0])
@pytest.mark.parametrize("v", [32768, 50257, 128256])
def test_kernel_on_vocabularies_in_use(v: int, cap: float) -> None:
    """Also more logits in one call than 32 bits count."""
    rows = 2**31 // v + 2 if v == 32768 else 40
    logits = torch.randn(rows, v, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, v, (rows,), device=DEVICE)
    last = logits[-4:].double()
    losses = losses_and_gradient_by_kernel_(logits, targets, IGNORED, True, cap)
    expected_losses = F.cross_entropy(capped(last, cap), targets[-4:], reduction="none")
    bound = 1e-6 if cap == 15 else 1e-7
    torch.testing.assert_close(losses[-4:].double(), expected_losses, rtol=bound, atol=bound)
    grad = (capped(last, cap).softmax(-1) - F.one_hot(targets[-4:], v)) * slope(last, cap)
    torch.testing.assert_close(logits[-4:].double(), grad, rtol=2**-8, atol=1e-9)


class Seen(TorchDispatchMode):
    """Notes the operators that run, with arguments and results, and how many numbers the results hold."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func._schema.name, args, out))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.sizes += [x.numel() for x in tensors if isinstance(x, Tensor)]
        return out

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]

    def inputs_of(self, name: str) -> tuple[Any, ...]:
        return next(args for called, args, _ in self.calls if called == name)

    def outputs_of(self, name: str) -> Any:
        return next(out for called, _, out in self.calls if called == name)


def test_a_second_derivative_is_refused() -> None:
    """Not left out without a word, where the loss is multiplied by what needs a gradient too."""
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight, targets = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6)
    factor = torch.tensor(2.0, requires_grad=True)
    loss = factor * linear_cross_entropy(hidden, weight, targets)
    (first,) = torch.autograd.grad(loss, [hidden], retain_graph=True)
    assert first.any()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, [hidden], create_graph=True)
