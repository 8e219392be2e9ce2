"""The time of each GPU kernel that a call starts."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

Kernels = dict[str, tuple[float, float]]


def kernel_times(call: Callable[[], object], calls: int = 10) -> Kernels:
    """Of each kernel: milliseconds and launches a call, the mean over `calls`; those that take longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    totals: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiled.events() or []:
        if event.device_type == DeviceType.CUDA:
            totals[event.name] += event.device_time_total
            launches[event.name] += 1
    return {name: (total / 1000 / calls, launches[name] / calls) for name, total in totals.most_common()}
