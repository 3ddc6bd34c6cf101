"""What a measurement was made on."""

import os
import platform
from importlib.metadata import version

import torch

from torchserve_explain.runtimes import processor

PACKAGES = ("torch", "torchvision", "captum", "grad-cam", "zennit", "torchserve", "openvino")


def describe(threads: int) -> dict[str, str]:
    """Return the machine, the versions, the threads and the arithmetic, in words."""
    return {
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(threads),
        "dtype": "float32",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
