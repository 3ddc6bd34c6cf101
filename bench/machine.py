"""What a measurement was made on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "captum", "grad-cam", "zennit", "torchserve")


def describe(threads: int) -> dict[str, str]:
    """Return the machine, the versions, the threads and the arithmetic, in words."""
    text = Path("/proc/cpuinfo").read_text()
    name = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor()
    )
    return {
        "processor": f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(threads),
        "dtype": "float32",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
