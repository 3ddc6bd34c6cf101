"""The server under load: explanations and predictions over HTTP by our handler and by TorchServe's own."""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import torch

from bench import machine, tables
from bench.stock import build_stock
from bench.subjects import LITE0, network
from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.paths import ROOT
from torchserve_explain.photo import photo_path
from torchserve_explain.records import progress
from torchserve_explain.servers.torchserve import Server, free_ports, serving

STEPS = 15  # of the stock handler's Integrated Gradients
# The stock handler wants one class in its model file; what that stands on travels beside it.
MODELS = {
    "resnet18": """
from torchvision.models.resnet import BasicBlock, ResNet

class ResNet18(ResNet):
    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2])
""",
    LITE0: """
import network

class Lite0(network.EfficientNetLite0):
    pass
""",
}
CONFIG = """
{minWorkers: 1, maxWorkers: 1, continuousBatching: false, batchSize: 8, maxBatchDelay: 5, responseTimeout: 600,
 explanations: {limits: {seconds: 300}}}
"""
ROUNDS = 3
PAUSE = 0.05  # seconds between two requests of a client that does not press


@dataclass(frozen=True)
class Part:
    """What is asked of the server: which configurations of our handler beside the stock one, by how many clients.

    `clients` tells how many answers so many clients ask for together, `fields` what they ask ours for.
    """

    configs: Mapping[str, str]
    clients: Mapping[int, int]
    fields: dict[str, str]


STOCK = "stock"
CONTINUOUS = "continuousBatching: true\n"
TORCH = "{continuousBatching: true, explanations: {runtime: torch}}\n"
PARTS = {
    "explanations": Part({"ours": CONFIG}, {1: 6, 8: 16, 32: 32}, {"method": "integrated_gradients", "steps": str(STEPS)}),
    "predictions": Part({"ours": CONTINUOUS, "ours, torch": TORCH}, {1: 100, 16: 320}, {}),
}


@dataclass(frozen=True)
class Load:
    """What a load took: seconds of each answer, of all together, of the server's processors, and bytes of an answer."""

    each: list[float]
    wall: float
    processor: float
    size: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.each) / self.wall


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of the values stays below."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def load(server: Server, ask: Callable[[httpx.Client], httpx.Response], clients: int, count: int) -> Load:
    """Let clients ask one after another until `count` answers are there."""
    waiting = iter(range(count))
    each: list[float] = []
    sizes: list[int] = []

    def client() -> None:
        with httpx.Client(timeout=600) as own:
            while next(waiting, None) is not None:
                began = time.perf_counter()
                sizes.append(len(ask(own).raise_for_status().content))
                each.append(time.perf_counter() - began)

    processor, began = processor_seconds(server), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()
    wall = time.perf_counter() - began
    return Load(each, wall, processor_seconds(server) - processor, statistics.mean(sizes))


def load_for(ask: Callable[[httpx.Client], httpx.Response], clients: int, seconds: float) -> float:
    """Return the answers a second that clients get, each asking anew once it has one; the last ones are waited for."""
    began = time.perf_counter()

    def client() -> int:
        count = 0
        with httpx.Client(timeout=600) as own:
            while time.perf_counter() < began + seconds:
                ask(own).raise_for_status()
                count += 1
        return count

    with ThreadPoolExecutor(clients) as pool:
        counts = [future.result() for future in [pool.submit(client) for _ in range(clients)]]
    return sum(counts) / (time.perf_counter() - began)


def processor_seconds(server: Server) -> float:
    """Return what the server's processes have used of the processors so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == server.process.pid:  # the session
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Asked(Protocol):
    """A server as its clients know it."""

    @property
    def inference(self) -> str:
        """The URL of its API."""
        ...

    def authorization(self) -> dict[str, str]:
        """Return the headers that it asks for."""
        ...


def asking(server: Asked, kind: str, name: str, fields: dict[str, str]) -> Callable[[httpx.Client], httpx.Response]:
    """Return a request of the packaged photo."""
    photo, url = photo_path().read_bytes(), f"{server.inference}/{kind}/{name}"
    return lambda client: client.post(url, files={"data": photo}, data=fields, headers=server.authorization())


def build(name: str, store: Path, folder: Path, config: str = CONFIG) -> None:
    """Archive the same network for both handlers, as NAME and NAME-stock, ours with a configuration."""
    model, weights, configured = (folder / file for file in ("model.py", "weights.pth", "model-config.yaml"))
    built, _ = network(name)
    model.write_text(MODELS[name])
    configured.write_text(config)
    torch.save(built.state_dict(), weights)
    own = ROOT / "classifiers" / "imagenet" / "model.py"
    kind = ["--model", str(own)] if name == LITE0 else ["--arch", name]
    options = [*kind, "--weights", str(weights), "--config", str(configured), "--store", str(store)]
    build_archive(name, parser().parse_args([name, *options]))
    beside = [shutil.copyfile(own, folder / "network.py")] if name == LITE0 else []
    build_stock(f"{name}-stock", model, weights, [str(index) for index in range(1000)], store, folder / "stock", beside)


def rates(server: Server, kind: str, part: Part) -> Iterator[dict[str, object]]:
    """Yield, for each number of clients, what each handler's answers take, asked for in turns."""
    requests = {handler: asking(server, kind, registration(handler), part.fields) for handler in part.configs}
    requests[STOCK] = asking(server, kind, STOCK, {})
    with progress() as shown:
        bar = shown.add_task("", total=len(part.clients) * ROUNDS * len(requests))
        for clients, count in part.clients.items():
            loads: dict[str, list[Load]] = {handler: [] for handler in requests}
            for _ in range(ROUNDS):
                for handler, ask in requests.items():
                    shown.update(bar, description=f"{kind}, {clients} clients: {handler}")
                    loads[handler].append(load(server, ask, clients, count))
                    shown.advance(bar)
            for handler, found in loads.items():
                yield {"clients": clients, "handler": handler} | summary(found)


def registration(handler: str) -> str:
    """Return the name that a handler is registered by."""
    return handler.replace(", ", "-")


def summary(loads: Sequence[Load]) -> dict[str, float]:
    """Return the medians over rounds, and quantiles of all answers' seconds."""
    each = [seconds for one in loads for seconds in one.each]
    return {
        "rate": statistics.median(one.rate for one in loads),
        "p50": quantile(each, 0.5),
        "p99": quantile(each, 0.99),
        "bytes": statistics.median(one.size for one in loads),
        "processor_seconds": statistics.median(one.processor / len(one.each) for one in loads),
    }


def paced(ask: Callable[[], object], seconds: float) -> Iterator[float]:
    """Yield the seconds of answers asked for one after another, with a pause between."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        ask()
        yield time.perf_counter() - began
        time.sleep(PAUSE)


@contextmanager
def explaining_clients(server: Asked, name: str, fields: dict[str, str], clients: int) -> Iterator[None]:
    """Keep clients busy with explanations while the context lasts."""
    ask, over = asking(server, "explanations", name, fields), threading.Event()

    def client() -> None:
        with httpx.Client(timeout=600) as own:
            while not over.is_set():
                ask(own).raise_for_status()

    with ThreadPoolExecutor(max(1, clients)) as pool:
        asking_clients = [pool.submit(client) for _ in range(clients)]
        try:
            yield
        finally:
            over.set()
        for future in asking_clients:
            future.result()  # a load that failed is no load


def measured(kind: str, part: Part, folder: Path) -> Iterator[dict[str, object]]:
    """Yield a part's lines, each network served by itself."""
    for name in MODELS:
        own = folder / kind / name
        store = own / "store"
        store.mkdir(parents=True)
        for handler, config in part.configs.items():
            scratch = own / registration(handler)
            scratch.mkdir()
            build(name, store, scratch, config)
            os.replace(store / f"{name}.mar", store / f"{registration(handler)}.mar")
            os.replace(store / f"{name}-stock.mar", store / f"{STOCK}.mar")
        names = [*map(registration, part.configs), STOCK]
        with serving(names, store, free_ports(), own / "run") as server:
            yield from ({"network": name} | line for line in rates(server, kind, part))


def main() -> None:
    """Measure, print, and write server.json; a part that is not measured stays as it was."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--only", choices=PARTS, help="one part instead of both")
    only = command.parse_args().only
    out = ROOT / "run" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "server.json"
    results = json.loads(kept.read_text()) if only and kept.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in [only] if only else PARTS:
            results[kind] = list(measured(kind, PARTS[kind], Path(temporary)))
    results |= {"machine": machine.describe(len(os.sched_getaffinity(0))), "steps": STEPS}
    tables.write(out / "server", results, tables.server(results))


if __name__ == "__main__":
    main()
