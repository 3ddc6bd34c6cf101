"""What a measurement was made on."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from torchserve_explain.runtimes import processor

PACKAGES = ("torch", "torchvision", "captum", "grad-cam", "zennit", "torchserve", "openvino")
SIDE, COPIED, TRIES = 2048, 2**28, 7  # of a matrix; bytes that are copied, more than any cache has; the best of so many


@dataclass(frozen=True)
class Speed:
    """What the machine does a second at its best: multiply-adds in float32, and bytes read or written."""

    multiply_adds: float
    bytes: float


@cache
def speed(threads: int) -> Speed:
    """Measure the speed of so many threads: a large matrix product, and a large copy, which reads and writes."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, other, product = (torch.ones(SIDE, SIDE) for _ in range(3))
        source, copied = (torch.ones(COPIED // 4) for _ in range(2))
        return Speed(
            SIDE**3 / _best(lambda: torch.mm(one, other, out=product)), 2 * COPIED / _best(lambda: copied.copy_(source))
        )
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[], Tensor]) -> float:
    """Return the least seconds of several runs."""
    seconds: list[float] = []
    for _ in range(TRIES):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def describe(threads: int) -> dict[str, str]:
    """Return the machine, its measured speed, the versions, the threads and the arithmetic, in words."""
    measured = speed(threads)
    return {
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(threads),
        "multiply-adds": f"{measured.multiply_adds / 1e9:.1f} G/s",
        "copy": f"{measured.bytes / 1e9:.1f} GB/s",
        "dtype": "float32",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
