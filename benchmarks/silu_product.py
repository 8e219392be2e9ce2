"""silu(h) Wᵀ by one Triton kernel that never writes silu(h), beside a product after a SiLU, on one NVIDIA GPU.

    python benchmarks/silu_product.py [--preset doge_25M doge_80M doge_450M] [--json FILE]

The kernels of `recompute_activation` (docs/speed.md) by tiles: without silu(h) in memory, a training step keeps M·K
numbers less for each layer, and the backward pass, which reads h anyway, writes it again for the gradient of W. Rows,
medians in ms:

    product             the matrix product alone, of silu(h) that is there
    silu, product       what the two cost now
    backward            the gradient of the SiLU as it is now
    backward, again     the same, with silu(h) written beside it
    BM×BN×BK …          the fused kernel by its tiles, warps and stages; `tanh`: with the GPU's approximate tanh

Every fused kernel is held to float64 on its first rows; one that is off, or does not fit the chip, says so.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from flags import run_command
from records import circumstances, markdown, write_whole
from train_step import MICRO_BATCHES

from doge_lm.errors import UserError
from doge_lm.model.silu_product_triton import _silu_backward_kernel, fused_product
from doge_lm.training.settings import load_settings

TILES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 256, 64, 4, 3), (128, 128, 64, 4, 4))
TOLERANCE = 6e-3  # of bfloat16 operands
CHECKED = 512
BLOCK = 2048


@triton.jit
def _silu_gradient_kernel(h_ptr, grad_ptr, BLOCK: tl.constexpr):
    """The gradient of h in place of that of silu(h): what PyTorch's compiler makes of it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h, grad = tl.load(h_ptr + at).to(tl.float32), tl.load(grad_ptr + at).to(tl.float32)
    share = 1 / (1 + tl.exp(-h))
    tl.store(grad_ptr + at, (grad * share * (1 + h * (1 - share))).to(grad_ptr.dtype.element_ty))


def measure(preset: str) -> dict[str, Any]:
    """Medians in ms of a preset's shapes; a text where a kernel is wrong or does not run."""
    settings = load_settings(preset)
    config, length = settings.model_config(), settings.train.sequence_length
    m = MICRO_BATCHES.get(Path(preset).stem, 4) * length
    k, n = config.cross_domain_intermediate_size, config.private_expert_intermediate_size
    h_MK, grad_MK, weight_NK = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((m, k), (m, k), (n, k)))
    weight_NK *= k**-0.5
    activated_MK = torch.empty_like(h_MK)
    expected = torch.nn.functional.silu(h_MK[:CHECKED].double()) @ weight_NK.double().t()

    def backward(again: bool) -> None:
        if again:
            launch = _silu_backward_kernel[(m * k // BLOCK,)]
            launch(h_MK, grad_MK, activated_MK, m * k, BLOCK=BLOCK, num_warps=8)
        else:
            _silu_gradient_kernel[(m * k // BLOCK,)](h_MK, grad_MK, BLOCK=BLOCK, num_warps=8)

    def fused(tile: tuple[int, int, int, int, int], tanh: bool) -> float | str:
        try:
            found = fused_product(h_MK, weight_NK, tile, tanh)[:CHECKED].double()
        except triton.runtime.errors.OutOfResources as error:
            return str(error)
        error = float((found - expected).norm() / expected.norm())
        return time(lambda: fused_product(h_MK, weight_NK, tile, tanh)) if error < TOLERANCE else f"off by {error:.1e}"

    def time(call: Callable[[], Any]) -> float:
        return round(triton.testing.do_bench(call, warmup=30, rep=120, return_mode="median"), 4)

    figures: dict[str, Any] = {
        "shape": [m, k, n],
        "product": time(lambda: h_MK @ weight_NK.t()),
        "silu, product": time(lambda: torch.nn.functional.silu(h_MK) @ weight_NK.t()),
        "backward": time(lambda: backward(False)),
    }
    grad_MK.normal_()  # it was written over many times
    figures["backward, again"] = time(lambda: backward(True))
    for tile in TILES:
        for tanh in (False, True):
            rows, columns, depth, warps, stages = tile
            name = f"{rows}×{columns}×{depth}, {warps} warps, {stages} stages{', tanh' if tanh else ''}"
            figures[name] = fused(tile, tanh)
    return figures


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["doge_25M", "doge_80M", "doge_450M"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("these kernels are measured on an NVIDIA GPU")
    results = {preset: measure(preset) for preset in args.preset}
    if args.json:
        write_whole(args.json, {**circumstances(), "device": torch.cuda.get_device_name(), "results": results})
    names = list(next(iter(results.values())))
    lines = [["ms", *results], *([name, *(str(each[name]) for each in results.values())] for name in names)]
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    run_command(main)
