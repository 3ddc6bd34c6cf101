"""Short requests alone and beside clients that explain: continuous, also by PyTorch alone, in whole batches, stock."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench import machine, tables
from bench.server import CONTINUOUS, STOCK, TORCH, asking, build, load_for, paced, quantile
from bench.subjects import LITE0
from torchserve_explain.paths import ROOT
from torchserve_explain.records import progress
from torchserve_explain.servers.torchserve import Server, free_ports, serving

MODES = {  # of our handler
    "continuous": CONTINUOUS,
    "torch": TORCH,
    "classic": "continuousBatching: false\n",
}
SHORT = {"prediction": ("predictions", {}), "Grad-CAM": ("explanations", {"method": "grad_cam"})}
BUSY = [{"method": "integrated_gradients"}, {"method": "integrated_gradients"}, {"method": "occlusion"}]
CLIENTS = (0, 1, 4, 16)  # that explain without a pause
OUTPUTS = ("json", "png", "npy")
ROUNDS, SECONDS = 2, 8.0  # of each short request, beside each number of clients
WARM, RATED, RATE_CLIENTS = 2.0, 20.0, 8  # seconds before the busy clients count; seconds and clients of a rate

Ask = Callable[[httpx.Client], httpx.Response]


def busy(server: Server, name: str) -> list[Ask]:
    """Return what busy clients ask a registration for, in turn."""
    if name == STOCK:
        return [asking(server, "explanations", name, {})]
    return [asking(server, "explanations", name, fields) for fields in BUSY]


@contextmanager
def clients(asks: Sequence[Ask], count: int) -> Iterator[None]:
    """Keep so many clients asking while the context lasts."""
    over = threading.Event()

    def client(ask: Ask) -> None:
        with httpx.Client(timeout=600) as own:
            while not over.is_set():
                ask(own).raise_for_status()

    with ThreadPoolExecutor(max(1, count)) as pool:
        asking_clients = [pool.submit(client, ask) for ask in islice(cycle(asks), count)]
        time.sleep(WARM if count else 0)
        try:
            yield
        finally:
            over.set()
        for future in asking_clients:
            future.result()  # a load that failed is no load


def latencies(server: Server) -> Iterator[dict[str, Any]]:
    """Yield quantiles of each short request's seconds, the modes in turns."""
    cases = [(mode, asked, count) for count in CLIENTS for asked in SHORT for mode in (*MODES, STOCK)]
    cases = [case for case in cases if case[0] != STOCK or case[1] == "prediction"]  # it has no Grad-CAM
    found: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases}
    with progress() as shown, httpx.Client(timeout=600) as client:
        bar = shown.add_task("", total=ROUNDS * len(cases))
        for case in cases * ROUNDS:
            mode, asked, count = case
            shown.update(bar, description=f"{asked}, {mode}, beside {count}")
            kind, fields = SHORT[asked]
            with clients(busy(server, mode), count):
                found[case] += paced(partial(asking(server, kind, mode, fields), client), SECONDS)
            shown.advance(bar)
    for (mode, asked, count), each in found.items():
        figures = {"p50": quantile(each, 0.5), "p99": quantile(each, 0.99), "answers": len(each)}
        yield {"mode": mode, "asked": asked, "clients": count} | figures


def by_itself(server: Server, mode: str, rates: Sequence[float]) -> dict[str, Any]:
    """Return a mode's explanations a second, its worker's largest memory, and its answers' times over a prediction's."""
    outputs: dict[str, float] = {}
    if mode != STOCK:
        with httpx.Client(timeout=600) as client:
            kinds = {"prediction": ("predictions", dict[str, str]())}
            kinds |= {output: ("explanations", {"method": "grad_cam", "output": output}) for output in OUTPUTS}
            each: dict[str, list[float]] = {name: [] for name in kinds}
            for _ in range(40):
                for name, (kind, fields) in kinds.items():
                    began = time.perf_counter()
                    asking(server, kind, mode, fields)(client).raise_for_status()
                    each[name].append(time.perf_counter() - began)
            outputs = {name: median(each[name]) / median(each["prediction"]) for name in OUTPUTS}
    return {"rate": median(rates), "memory_mb": peak_megabytes(server, mode), "outputs": outputs}


def rates(server: Server) -> Mapping[str, list[float]]:
    """Return explanations a second of clients that have the server to themselves, the modes in turns."""
    found: dict[str, list[float]] = {mode: [] for mode in (*MODES, STOCK)}
    for _ in range(ROUNDS):
        for mode, each in found.items():
            each.append(load_for(busy(server, mode)[0], RATE_CLIENTS, RATED))
    return found


def peak_megabytes(server: Server, name: str) -> float:
    """Return the largest memory that a registration's worker has held."""
    described = httpx.get(f"{server.management}/models/{name}", headers=server.authorization("management")).json()
    status = Path(f"/proc/{described[0]['workers'][0]['pid']}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def main() -> None:
    """Measure, print, and write beside.json."""
    out = ROOT / "run" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        store = Path(temporary, "store")
        store.mkdir()
        for mode, config in MODES.items():
            folder = Path(temporary, mode)
            folder.mkdir()
            build(LITE0, store, folder, config)
            os.replace(store / f"{LITE0}.mar", store / f"{mode}.mar")
            os.replace(store / f"{LITE0}-stock.mar", store / f"{STOCK}.mar")
        with serving([*MODES, STOCK], store, free_ports(), Path(temporary, "run")) as server:
            lines = list(latencies(server))
            measured = {mode: by_itself(server, mode, found) for mode, found in rates(server).items()}
    results = {"machine": machine.describe(len(os.sched_getaffinity(0))), "latencies": lines, "modes": measured}
    tables.write(out / "beside", results, tables.beside(results))


if __name__ == "__main__":
    main()
