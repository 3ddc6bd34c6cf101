"""The servers of the contract test: each serves archives on loopback and tells its URL; stopped by their own process."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live import served

from bench.launch import kserve, ray


@contextmanager
def torchserve(archives: dict[str, Path], run: Path) -> Iterator[str]:
    """Serve with TorchServe."""
    with served([f"{name}={path.stem}" for name, path in archives.items()], next(iter(archives.values())).parent, run) as one:
        yield one.inference


SERVERS = {
    "torchserve": (torchserve, "ts"),
    "kserve": (kserve, "kserve"),
    "ray": (ray, "ray"),
}


def installed(name: str) -> object:
    """Return a server as a test's parameter, skipped where its package is not installed."""
    missing = importlib.util.find_spec(SERVERS[name][1]) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{name} is not installed"))
