"""Every Triton kernel compiles for NVIDIA GPUs, which the interpreter of the other tests does not show.

Needs no GPU: in a process of its own, where kernels are not interpreted, each launch compiles its kernel instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this machine")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}


class Compiler:
    """Stands for a kernel that is launched: `Compiler(kernel)[grid](…)` compiles it for these arguments."""

    compiled: list[str] = []

    def __init__(self, kernel) -> None:  # type: ignore[no-untyped-def]
        self.kernel = kernel

    def __getitem__(self, grid: object) -> Compiler:
        return self

    def __call__(self, *args: object, **options: object) -> None:
        import triton  # noqa: PLC0415

        tuned = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
        arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **options}
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constexprs = {}, {}
        for name, value in arguments.items():
            if name in constants or value is None:
                signature[name], constexprs[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            else:
                # A Python float is one of 64 bits to `torch.compile`.
                signature[name] = "fp64" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs)
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=tuned)
        assert binary.asm["cubin"]
        self.compiled.append(self.kernel.__name__)


def compile_all(dtype: torch.dtype) -> None:
    """Run each operator, forward and backward, with its launches compiled."""
    from doge_lm.model import (  # noqa: PLC0415
        cdmoe_triton,
        expert_hidden_triton,
        inner_value_triton,
        residual_norm_triton,
        rotation_triton,
        routing_triton,
        silu_product_triton,
        triton_operator,
    )

    assert not triton_operator.INTERPRETED
    for name, module in sys.modules.items():
        if name.startswith("doge_lm.model.") and hasattr(module, "launcher"):
            module.launcher = Compiler
    m, heads, k, n, f = 40, 2, 4, 1024, 256

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_()

    weights, experts = routing_triton.product_topk(leaf(m, heads, 32), leaf(m, heads, 32), k)
    weights.sum().backward()
    routing_triton.product_topk(leaf(m, heads, 256), leaf(m, heads, 256), 16)
    inner_value_triton.inner_value(leaf(m, f), leaf(m, 8), leaf(8, f, dtype=torch.float32)).sum().backward()
    angles = torch.zeros(1, m, 128)
    outputs = rotation_triton.rotated_projections(leaf(1, m, 520), angles, angles, heads, 2)
    sum(x.sum() for x in outputs).backward()
    gains = leaf(128, dtype=torch.float32), leaf(128, dtype=torch.float32)
    outputs = rotation_triton.normed_rotated_projections(leaf(1, m, 520), *gains, angles, angles, heads, 2, 1e-6)
    sum(x.sum() for x in outputs).backward()
    for width in (f, residual_norm_triton.MOST_FEATURES):
        stream, weight = leaf(m, width, dtype=torch.float32), leaf(width, dtype=torch.float32)
        total, normed = residual_norm_triton.add_norm(stream, leaf(m, width), weight, 1e-6)
        normed.sum().backward(retain_graph=True)  # without a gradient of the sum, and then with it
        (total.sum() + normed.sum()).backward()
    experts = torch.zeros_like(experts).flatten(1)
    table = leaf(n, f, dtype=torch.float32)
    few = leaf(m * heads * k // 4, f, dtype=torch.float32)  # rows, so that each has several tokens
    for rows in (table, few):
        out = cdmoe_triton.experts_output(
            leaf(m, f), weights.detach().flatten(1), experts, rows, rows, torch.nn.functional.silu, dtype
        )
        out.sum().backward()
    hidden = expert_hidden_triton.chosen_hidden(leaf(m, n + heads * 64), n, 32, heads, k)[0]
    hidden.sum().backward()
    # So many choices are a loop: written out, they would compile for ten minutes.
    expert_hidden_triton.chosen_hidden(leaf(m, 6 + 16 * 5), 6, 2, 16, 4)[0].sum().backward()
    silu_product_triton.silu_product(leaf(m, 128), leaf(f, 128)).sum().backward()
    if dtype == torch.bfloat16:
        silu_product_triton.fused_product(leaf(m, 128), leaf(f, 128))
    cdmoe_triton.spread(leaf(m, k), experts[:, :k], n, dtype).sum().backward()
    cdmoe_triton.pick(leaf(m, n), experts[:, :k]).sum().backward()


def compile_loss_kernel() -> None:
    """With a gradient and without, capped and not, in one pass and block by block."""
    from doge_lm.model import linear_cross_entropy_triton as loss  # noqa: PLC0415

    loss._softmax_kernel = Compiler(loss._softmax_kernel)
    targets = torch.zeros(3, dtype=torch.int64)
    for gradient in (False, True):
        for cap in (0.0, 15.0):
            for v, dtype in ((1000, torch.bfloat16), (32768, torch.bfloat16), (32768, torch.float32)):
                loss.losses_and_gradient_by_kernel_(torch.zeros(3, v, dtype=dtype), targets, -100, gradient, cap)


def compile_rows_kernel() -> None:
    """That of `RowLazyAdamW`: rows narrow and wide, with and without bounds that 16 divides."""
    from doge_lm.training import row_lazy_adamw_triton  # noqa: PLC0415
    from doge_lm.training.row_lazy_adamw import RowState, StepNumbers  # noqa: PLC0415

    row_lazy_adamw_triton._rows_kernel = Compiler(row_lazy_adamw_triton._rows_kernel)
    for n, f in ((3, 5), (64, 256), (64, 4096)):
        weight = torch.zeros(n, f)
        state = RowState(weight, weight, weight[:, 0], weight[:, 0])
        numbers = StepNumbers(1, 1e-3, -1e-5, 0.9, 0.99, 1e-6)
        row_lazy_adamw_triton.update_rows(weight, weight, state, numbers)


def print_compiled() -> None:
    """The kernels that are compiled for the model's tensors by type, for the loss and for the optimizer, as JSON."""
    found = {}
    for name, compile_ in {
        "bfloat16": lambda: compile_all(torch.bfloat16),
        "float32": lambda: compile_all(torch.float32),
        "loss": compile_loss_kernel,
        "optimizer": compile_rows_kernel,
    }.items():
        Compiler.compiled.clear()
        compile_()
        found[name] = list(Compiler.compiled)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    """One process for all: to import PyTorch and transformers takes as long as to compile."""
    code = "from tests.model.test_triton_compiles import print_compiled; print_compiled()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_compiles(compiled: dict[str, list[str]], dtype: str) -> None:
    kernels = {
        "_add_norm_kernel", "_add_norm_backward_kernel", "_inner_value_kernel", "_inner_value_backward_kernel",
        "_rotation_kernel", "_rotation_backward_kernel", "_normed_backward_kernel", "_topk_kernel",
        "_topk_backward_kernel", "_hidden_kernel", "_hidden_backward_kernel", "_dots_kernel", "_bag_kernel",
        "_scatter_kernel", "_chunk_kernel", "_long_run_kernel", "_join_kernel", "_spread_kernel", "_silu_kernel",
        "_silu_backward_kernel",
    }  # fmt: skip
    assert set(compiled[dtype]) == kernels | ({"_silu_product_kernel"} if dtype == "bfloat16" else set())


def test_the_kernel_of_the_loss_compiles(compiled: dict[str, list[str]]) -> None:
    assert compiled["loss"] == ["_softmax_kernel"] * 12


def test_the_kernel_of_resting_rows_compiles(compiled: dict[str, list[str]]) -> None:
    assert compiled["optimizer"] == ["_rows_kernel"] * 3
