"""The tools that check deploy/, and Prometheus with the project's rules beside a live server."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import yaml
from conftest import ROOT
from live import CONTINUOUS, build_small, picture, served
from proxy import CLIENT, proxied


def tool(name):
    """Return a tool's path; .ci/run installs those that no Python package brings."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/usr/local/bin")
    assert found, f"{name} is missing; Debian's packages prometheus and nginx-light have promtool, prometheus and nginx"
    return found


def run(*command, **options):
    done = subprocess.run([tool(command[0]), *map(str, command[1:])], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def declared():
    """Every metric of metrics.yaml with its type and dimensions."""
    config = yaml.safe_load((ROOT / "deploy" / "metrics.yaml").read_text())
    groups = [config["ts_metrics"], config["model_metrics"]]
    return {
        metric["name"]: (kind, metric["dimensions"])
        for group in groups
        for kind, metrics in group.items()
        for metric in metrics
    }


def dashboard_queries(model: str, interval: str) -> list[str]:
    """Return every query of the dashboard, with its variables filled in."""
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [query.replace("$model", model).replace("$__rate_interval", interval) for query in queries]


def metric_names(query: str, declared) -> set[str]:
    """Return the metrics that a query names; fails where one is not declared."""
    names = set(
        re.findall(r"\b(?:ts_\w+|[A-Z]\w+)(?=[{\[]| [>=]|,|$)", re.sub(r'"[^"]*"|by \([^)]*\)|on \([^)]*\)', "", query))
    )
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    assert names <= set(declared), names - set(declared)
    assert names or "up{" in query, query
    return names or {"up"}


class Watcher:
    """A Prometheus that answers queries."""

    def __init__(self, address: str):
        self.address = address

    def query(self, query: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.address}/api/v1/query", params={"query": query}, timeout=20).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def values(self, query: str, since: float) -> list[list[float]]:
        """Return each series of a query from a time on, a value a second."""
        told: dict[str, str | float] = {"query": query, "start": since, "end": time.time(), "step": 1}
        answer = httpx.get(f"{self.address}/api/v1/query_range", params=told, timeout=20).json()
        assert answer["status"] == "success", answer
        return [[float(value) for _, value in series["values"]] for series in answer["data"]["result"]]

    def wait(self, query: str, seconds: float = 60) -> list[dict[str, Any]]:
        """Wait until a query has a result."""
        end = time.monotonic() + seconds
        while not (found := self.query(query)):
            assert time.monotonic() < end, f"{query} stayed empty for {seconds} s"
            time.sleep(0.5)
        return found


def alerts(watcher: Watcher) -> set[str]:
    return {one["metric"]["alertname"] for one in watcher.query('ALERTS{alertstate="firing"}')}


@contextmanager
def prometheus(program: str, folder: Path, target: str):
    """Run Prometheus as deploy/compose.yaml does, asking `target` each second instead."""
    config = (ROOT / "deploy" / "prometheus.yml").read_text().replace("15s", "1s").replace("torchserve:8082", target)
    (folder / "prometheus.yml").write_text(config)
    (folder / "alerts.yml").write_text((ROOT / "deploy" / "alerts.yml").read_text())
    port = free_port()
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["prometheus"]["command"]
    options = [option.replace("/etc/prometheus", str(folder)) for option in compose] + [f"--storage.tsdb.path={folder}/series"]
    with (folder / "prometheus.log").open("wb") as log:
        command = [program, *options, f"--web.listen-address=127.0.0.1:{port}"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        watcher = Watcher(f"http://127.0.0.1:{port}")
        end = time.monotonic() + 30
        while True:
            try:
                if watcher.query("up == 1"):
                    break
            except (httpx.TransportError, ValueError):
                pass
            assert time.monotonic() < end, (folder / "prometheus.log").read_text()[-2000:]
            time.sleep(0.3)
        yield watcher
    finally:
        process.terminate()
        process.wait(20)


@dataclass
class Composed:
    """Server, proxy and Prometheus, and how clients reach the first through the second."""

    server: Any
    watcher: Watcher
    client: httpx.Client

    @contextmanager
    def asked(self, clients: int = 3):
        """Let several ask for all sorts, refusals among them, until the context is left."""
        stop = Event()

        def ask(_number: int) -> None:
            for method in cycle(("grad_cam", "integrated_gradients", "nonsense", "occlusion", "saliency")):
                if stop.is_set():
                    return
                with suppress(httpx.TransportError):  # while the worker is away
                    self.client.post("/explanations/small", files={"data": picture()}, data={"method": method})
                    self.client.post("/predictions/small", files={"data": picture()})

        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(ask, number) for number in range(clients)]
            try:
                yield
            finally:
                stop.set()
            for one in asking:
                one.result()

    def worker(self, killed: int | None = None) -> int:
        """Return the worker's process, once it is ready and not the one that was killed."""
        keys = self.server.authorization("management")
        while True:
            (one,) = httpx.get(f"{self.server.management}/models/small", headers=keys).json()[0]["workers"]
            if one["status"] == "READY" and one["pid"] != killed:
                return int(one["pid"])
            time.sleep(0.2)


@contextmanager
def composed(folder: Path):
    """Start by hand what deploy/compose.yaml starts in containers, but for Grafana."""
    build_small(folder, folder, CONTINUOUS)
    with (
        served(["small"], folder, folder / "run", TS_DISABLE_TOKEN_AUTHORIZATION="false") as server,
        proxied(folder, free_port(), server.inference.removeprefix("http://"), server.run / "key_file.json") as proxy,
        prometheus(tool("prometheus"), folder, server.metrics.removeprefix("http://")) as watcher,
        httpx.Client(base_url=proxy, verify=False, headers=CLIENT, timeout=40) as client,
    ):
        yield Composed(server, watcher, client)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
