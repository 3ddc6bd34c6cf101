"""Starts KServe's model server or Ray Serve on loopback, for tests and measurements, and stops it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from torchserve_explain.bulk.loopback import LOOPBACK
from torchserve_explain.errors import ServerError
from torchserve_explain.paths import PACKAGE
from torchserve_explain.servers.torchserve import free_sockets

# Replicas have a port on every address that no setting moves.
RAY = """
import pathlib, signal, sys, ray
from ray import serve

def replicas_on_loopback():
    from ray.serve._private import replica
    add = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))

hook = {"worker_process_setup_hook": replicas_on_loopback}
ray.init(address="local", runtime_env=hook, include_dashboard=False, num_cpus=4, object_store_memory=100_000_000)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]), "request_timeout_s": 120})
from torchserve_explain.servers import ray as ours
if int(sys.argv[2]):
    ours.SCALING = {"num_replicas": int(sys.argv[2]), "max_ongoing_requests": 32}
serve.run(ours.app)  # until every replica is there
pathlib.Path("ready").touch()
signal.pause()
"""


@contextmanager
def kserve(archives: Mapping[str, Path], run: Path) -> Iterator[str]:
    """Serve archives by their names with KServe's model server; give its URL."""
    specifications = [f"{name}={path}" for name, path in archives.items()]
    with free_sockets(1) as (port,):
        pass
    with _running(["-m", "torchserve_explain", "kserve", *specifications, "--port", str(port)], run, {}) as process:
        yield _until_ready(f"http://127.0.0.1:{port}", archives, process, run / "log")


@contextmanager
def ray(archives: Mapping[str, Path], run: Path, replicas: int = 0) -> Iterator[str]:
    """Serve archives with Ray Serve, each with so many replicas; 0: as many as requests need. Gives its URL."""
    environment = {"ARCHIVES": ",".join(f"{name}={path}" for name, path in archives.items())} | LOOPBACK
    with free_sockets(1) as (port,):
        pass
    with _running(["-c", RAY, str(port), str(replicas)], run, environment) as process:
        yield _until_ready(f"http://127.0.0.1:{port}", archives, process, run / "ready")


@contextmanager
def _running(arguments: Sequence[str], run: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    own = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", **environment}
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


def _until_ready(url: str, names: Mapping[str, Path], process: "subprocess.Popen[bytes]", file: Path) -> str:
    """Return the URL once a file is there and every model answers; raises ServerError."""
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        try:
            if file.exists() and all(httpx.get(f"{url}/explanations/{name}", timeout=10).status_code == 200 for name in names):
                return url
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise ServerError(f"it is not ready: {file.with_name('log').read_text()[-3000:]}")
