"""The device of a run: its name, its memory, and how fast it multiplies matrices."""

import os
import platform
import time
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
import torch

# Dense bfloat16 peaks in FLOP/s from the makers' data sheets (without sparsity), longest names first so that
# "H100 PCIe" is found before "H100".
_PEAKS: dict[str, float] = {
    "RTX 6000 Ada": 364e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
    "GH200": 989e12,
    "MI300X": 1307e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A30": 165e12,
    "L4": 121e12,
}

_LONGEST_PRODUCT = 0.2  # seconds; float32 on one core of any CPU takes less
_ASKED_SECONDS = 0.1  # of small products: where others want the cores, the first of them can take fifty times as long


@dataclass(frozen=True)
class Hardware:
    """One device. `memory` is in bytes: all of the GPU's, or of the machine's for a CPU: every process
    of a run must come to the same plan.
    """

    device: torch.device
    name: str
    memory: int


@dataclass(frozen=True)
class Peak:
    """The rate that model-FLOPs utilization is a share of, in FLOP/s, and where the figure comes from."""

    flops: float
    source: str


def detect_hardware() -> Hardware:
    """The device this process will train on: under torchrun the GPU of its local rank."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(index)
        return Hardware(torch.device("cuda", index), properties.name, properties.total_memory)
    if torch.backends.mps.is_available():
        return Hardware(torch.device("mps"), "Apple GPU", torch.mps.recommended_max_memory())
    return Hardware(torch.device("cpu"), platform.processor() or platform.machine(), psutil.virtual_memory().total)


def peak_flops(hardware: Hardware, bf16: bool) -> Peak:
    """The device's peak: the data sheet's for a known GPU, otherwise measured with large matrix products."""
    known = known_peak(hardware.name) if hardware.device.type == "cuda" else None
    if known is not None:
        return Peak(known, f"data sheet of {hardware.name}, dense bfloat16")
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Peak(measure_matmul(hardware.device, dtype), f"measured, {str(dtype).removeprefix('torch.')} matrix product")


def known_peak(name: str) -> float | None:
    """The dense bfloat16 peak of a GPU by its reported name, in FLOP/s; None for one not in the table."""
    words = name.replace("-", " ")
    for key in sorted(_PEAKS, key=len, reverse=True):
        if f" {key.lower()} " in f" {words.lower()} ":
            return _PEAKS[key]
    return None


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products of large square matrices: of 4,096 rows, on a CPU 1,024.

    A CPU that has no units for a type is asked by small products, for large ones would take seconds.
    """
    if device.type != "cpu":
        return matmul_rate(device, dtype, 4096)
    rate = matmul_rate(device, dtype, 256, _ASKED_SECONDS)
    return matmul_rate(device, dtype, 1024) if 2 * 1024**3 / rate < _LONGEST_PRODUCT else rate


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.2) -> float:
    """FLOP/s of products of square matrices of `size` rows: the best of all within `seconds`, at least three."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best, count, begun = float("inf"), 0, time.perf_counter()
    while count < 3 or time.perf_counter() - begun < seconds:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        count += 1
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def bf16_is_faster(device: torch.device) -> bool:
    """Whether bfloat16 pays on this device: on GPUs that have it, and on CPUs whose matrix units compute in it.

    A CPU is asked by measuring: without such units, bfloat16 is several times slower than float32; with them, faster.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    return measure_matmul(device, torch.bfloat16) > 1.5 * measure_matmul(device, torch.float32)
