"""The servers of the contract test: each serves archives on loopback and tells its URL; stopped by their own process."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from live import served

from torchserve_explain.servers.torchserve import _sockets

# Ray's own processes find each other over loopback, as they do on other systems unless told otherwise; replicas have a
# port on every address that no setting moves.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
RAY = """
import sys, ray
from ray import serve

def replicas_on_loopback():
    from ray.serve._private import replica
    add = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))

hook = {"worker_process_setup_hook": replicas_on_loopback}
ray.init(runtime_env=hook, include_dashboard=False, num_cpus=4, object_store_memory=100_000_000)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]), "request_timeout_s": 120})
from torchserve_explain.servers.ray import app
serve.run(app, blocking=True)
"""


@contextmanager
def torchserve(archives: dict[str, Path], run: Path) -> Iterator[str]:
    """Serve with TorchServe."""
    with served([f"{name}={path.stem}" for name, path in archives.items()], next(iter(archives.values())).parent, run) as one:
        yield one.inference


@contextmanager
def kserve(archives: dict[str, Path], run: Path) -> Iterator[str]:
    """Serve with KServe's model server."""
    port = _free_port()
    told = [f"{name}={path}" for name, path in archives.items()]
    with _running(["-m", "torchserve_explain", "kserve", *told, "--port", port], run, {}) as process:
        yield _until_ready(f"http://127.0.0.1:{port}", archives, process, run)


@contextmanager
def ray(archives: dict[str, Path], run: Path) -> Iterator[str]:
    """Serve with Ray Serve, one replica an archive."""
    port = _free_port()
    told = {"ARCHIVES": ",".join(f"{name}={path}" for name, path in archives.items())} | LOOPBACK
    with _running(["-c", RAY, port], run, told) as process:
        yield _until_ready(f"http://127.0.0.1:{port}", archives, process, run)


SERVERS = {
    "torchserve": (torchserve, "ts"),
    "kserve": (kserve, "kserve"),
    "ray": (ray, "ray"),
}


def installed(name: str) -> object:
    """Return a server as a test's parameter, skipped where its package is not installed."""
    missing = importlib.util.find_spec(SERVERS[name][1]) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{name} is not installed"))


def _free_port() -> str:
    with _sockets(1) as (port,):
        return str(port)


@contextmanager
def _running(arguments: list[str], run: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    own = {**os.environ, "PYTHONPATH": str(ROOT / "handlers"), "OMP_NUM_THREADS": "1", **environment}
    with (run / "log").open("wb") as log:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=run, env=own, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until_ready(url: str, names: dict[str, Path], process: subprocess.Popen, run: Path) -> str:
    """Return the URL once every model answers."""
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        try:
            if all(httpx.get(f"{url}/explanations/{name}", timeout=10).status_code == 200 for name in names):
                return url
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not ready: {(run / 'log').read_text()[-3000:]}")
