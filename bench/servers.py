"""One archive on TorchServe, KServe and Ray Serve: a Grad-CAM beside clients that keep the server busy, and replicas."""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from bench import machine
from bench.launch import kserve, ray
from bench.server import Asked, asking, explaining_clients, load_for, paced, quantile
from torchserve_explain.archiver import ensure_archive
from torchserve_explain.paths import ROOT, STORE
from torchserve_explain.servers.torchserve import free_ports, serving

NAME = "imagenet"
QUICK, SLOW = {"method": "grad_cam"}, {"method": "integrated_gradients"}
BUSY = 4  # clients that explain by Integrated Gradients without a pause
SECONDS = {0: 6.0, BUSY: 16.0}  # for which Grad-CAM is asked for, beside so many of them
SCALED, WARM_SECONDS, SCALED_SECONDS = 8, 2.0, 15.0  # clients of the replicas' rates, seconds before they count and of them


@dataclass(frozen=True)
class Url:
    """A server that asks for no token."""

    inference: str

    def authorization(self) -> dict[str, str]:
        """Return no headers."""
        return {}


@contextmanager
def started(name: str, archive: Path, run: Path) -> Iterator[Asked]:
    """Start a server of that name; `ray 2` has two replicas."""
    if name == "torchserve":
        own = {"OMP_NUM_THREADS": "1"}
        with serving([NAME], archive.parent, free_ports() | own, run) as server:
            yield server
    elif name == "kserve":
        with kserve({NAME: archive}, run) as url:
            yield Url(url)
    else:
        with ray({NAME: archive}, run, int(name.removeprefix("ray "))) as url:
            yield Url(url)


def latencies(server: Asked) -> dict[str, float]:
    """Return quantiles of a Grad-CAM's seconds, alone and beside the busy clients."""
    ask, figures = asking(server, "explanations", NAME, QUICK), dict[str, float]()
    for clients, seconds in SECONDS.items():
        with explaining_clients(server, NAME, SLOW, clients), httpx.Client(timeout=600) as client:
            time.sleep(2 if clients else 0)
            found = list(paced(partial(ask, client), seconds))
        name = "beside" if clients else "alone"
        figures |= {f"{name}_p50": quantile(found, 0.5), f"{name}_p99": quantile(found, 0.99), f"{name}_count": len(found)}
    return figures


def main() -> None:
    """Measure the servers that are named, print, and add them to servers.json."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("servers", nargs="*", default=["torchserve", "kserve", "ray 1", "ray 2"])
    out = ROOT / "run" / "bench" / "servers.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {}
    results["machine"] = machine.describe(1)
    archive = ensure_archive(NAME, STORE)
    for name in command.parse_args().servers:
        with tempfile.TemporaryDirectory() as run, started(name, archive, Path(run)) as server:
            ask = asking(server, "explanations", NAME, SLOW)
            load_for(ask, SCALED, WARM_SECONDS)
            rate = load_for(ask, SCALED, SCALED_SECONDS)
            results[name] = {"rate": rate} | ({} if name == "ray 2" else latencies(server))
        print(name, json.dumps(results[name]), flush=True)
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
