"""The kernel of the loss by itself: its time on one NVIDIA GPU and its error, by cap of the logits and by block.

    python benchmarks/loss_kernel.py [--caps 0 15] [--one_pass 8192 16384 32768] [--rows 8192] [--json FILE]
    python benchmarks/loss_kernel.py --instructions [--caps 0 15] [--one_pass 16384]

Logits are `--rows` rows of `--vocab_size`, N(0, 6²) in bfloat16; times are medians in ms, less that of the copy which
brings the logits back. A row up to `--one_pass` long is read once, a longer one twice, in blocks of that length. The
loss of the first rows is held to float64 (largest error), their gradient too (‖error‖ / ‖gradient‖, beside that of the
exact gradient rounded to bfloat16).

`--instructions` needs no GPU: it compiles the kernel with its gradient for a Hopper GPU and counts the instructions,
all of them and those of special functions, over the logits of a block that a thread has. Some are outside of the loops
over the blocks: 6 to 8 of the 25 to 75 for two blocks. An H100 or H200 starts 128 instructions a clock and
multiprocessor, of special functions 16; the counts depend on the version of Triton, which the JSON names.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flags import positive, run_command
from records import circumstances, markdown, write_whole

from doge_lm.errors import UserError

SIGMA = 6.0
CHECKED = 512
SHORTEST, LONGEST = 128, 2**20  # what a program reads at a time: a logit for each thread, and what Triton allows
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)")


def reference(logits_RV: torch.Tensor, targets_R: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of their sum in float64."""
    logits_RV = logits_RV.double().requires_grad_()
    capped_RV = cap * torch.tanh(logits_RV / cap) if cap else logits_RV
    losses_R = F.cross_entropy(capped_RV, targets_R, reduction="none")
    return losses_R.detach(), torch.autograd.grad(losses_R.sum(), logits_RV)[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and errors, a row for each cap, block and pass."""
    import triton  # noqa: PLC0415

    from doge_lm.model.linear_cross_entropy_triton import losses_and_gradient_by_kernel_  # noqa: PLC0415

    def time(call: Any) -> float:
        return triton.testing.do_bench(call, warmup=30, rep=150, return_mode="median")

    logits_RV = (torch.randn(args.rows, args.vocab_size, device="cuda") * SIGMA).bfloat16()
    targets_R = torch.randint(args.vocab_size, (args.rows,), device="cuda")
    work_RV = torch.empty_like(logits_RV)
    copying = time(lambda: work_RV.copy_(logits_RV))
    rows: list[dict[str, Any]] = [{"cap": "copy alone", "ms": round(copying, 4)}]
    for cap in args.caps:
        losses_R, grad_RV = reference(logits_RV[:CHECKED], targets_R[:CHECKED], cap)
        for one_pass in args.one_pass:
            for gradient in (False, True):

                def call(cap: float = cap, one_pass: int = one_pass, gradient: bool = gradient) -> torch.Tensor:
                    work_RV.copy_(logits_RV)
                    return losses_and_gradient_by_kernel_(work_RV, targets_R, -100, gradient, cap, one_pass)

                row = {"cap": cap, "one_pass": one_pass, "gradient": gradient, "ms": round(time(call) - copying, 4)}
                row["loss_error"] = float((call()[:CHECKED].double() - losses_R).abs().max())
                if gradient:
                    row["gradient_error"] = relative_error(work_RV[:CHECKED], grad_RV)
                    row["rounding"] = relative_error(grad_RV.bfloat16(), grad_RV)
                rows.append(row)
    return rows


def instructions(cubin: bytes) -> list[str]:
    """The names of the instructions of compiled code, in order, by the disassembler that Triton brings."""
    import triton  # noqa: PLC0415

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([disassembler, "-c", path], capture_output=True, text=True, check=True).stdout
    return INSTRUCTION.findall(text)


def count(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Instructions a logit of the kernel with its gradient, a row for each cap and block."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource, compile  # noqa: PLC0415

    from doge_lm.model import linear_cross_entropy_triton as loss  # noqa: PLC0415

    signature = {"logits_ptr": "*bf16", "targets_ptr": "*i64", "losses_ptr": "*fp32"}
    signature |= dict.fromkeys(("V", "row_stride", "ignore_index"), "i32")
    # As a launch finds them: pointers, and rows of such a length.
    aligned = range(5) if args.vocab_size % 16 == 0 else range(3)
    divisible = {(position,): [["tt.divisibility", 16]] for position in aligned}
    rows = []
    for cap in args.caps:
        for one_pass in args.one_pass:
            constants, options = loss.variant(args.vocab_size, True, cap, one_pass)
            names = {**signature, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(fn=loss._softmax_kernel, signature=names, constexprs=constants, attrs=divisible)
            binary = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            found = instructions(binary.asm["cubin"])
            logits = constants["BLOCK"] / (32 * options["num_warps"])  # of a thread
            special = sum(name == "MUFU" for name in found) / logits
            rows.append(
                {"cap": cap, "one_pass": one_pass, "instructions": len(found) / logits, "special functions": special}
            )
    return rows


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what the kernel is not for.

    Raises:
        UserError: names the flag.
    """
    from doge_lm.model.configuration_doge import _NUMBERS  # noqa: PLC0415

    least, _, most = _NUMBERS["final_logit_softcapping"]
    for cap in args.caps:
        if cap != 0 and not least <= cap < most:
            raise UserError(f"--caps {cap:g}: give 0 for none, or a number from {least:g} to below {most:g}")
    for one_pass in args.one_pass:
        if not SHORTEST <= one_pass <= LONGEST or one_pass & (one_pass - 1):
            raise UserError(f"--one_pass {one_pass}: give a power of two from {SHORTEST} to {LONGEST:,}")
    if args.vocab_size < SHORTEST:
        raise UserError(f"--vocab_size {args.vocab_size}: give at least {SHORTEST}")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.instructions and os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("--instructions compiles the kernel: unset TRITON_INTERPRET, which has it interpreted")
    if not args.instructions and not torch.cuda.is_available():
        raise UserError("times need an NVIDIA GPU; without one, --instructions")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", type=float, nargs="+", default=[0.0, 15.0], help="of the logits; 0: none")
    parser.add_argument("--one_pass", type=positive, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--rows", type=positive, default=8192, help="tokens at a time (of the times alone)")
    parser.add_argument("--vocab_size", type=positive, default=32768)
    parser.add_argument("--instructions", action="store_true", help="count instead of time; needs no GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    check_arguments(args)
    rows = count(args) if args.instructions else measure(args)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    print(markdown([heads, *([shown(row.get(head, "-")) for head in heads] for row in rows)]))
    if args.json:
        about = {**circumstances(), "triton": importlib.metadata.version("triton"), "vocab_size": args.vocab_size}
        device = {} if args.instructions else {"device": torch.cuda.get_device_name(), "tokens": args.rows}
        write_whole(args.json, {**about, **device, "rows": rows})
    return 0


if __name__ == "__main__":
    run_command(main)
