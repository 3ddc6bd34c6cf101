"""Asks the TorchServe beside it whether every model can answer, or whether no request is left; for probes.

It runs in TorchServe's working directory, where key_file.json is, and needs the standard library alone.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

KEYS = Path("key_file.json")
RENEW = timedelta(minutes=5)  # a management key that ends sooner is replaced
SECONDS = 4  # what one answer may take; below the probes' own limit
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment is not for this machine


def main() -> int:
    """Return 0 where the question is answered with yes, and 1 with the reason on stderr where not."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("question", choices=["ready", "drained"])
    command.add_argument("--after", type=float, default=0, help="drained: seconds to wait before the first look")
    command.add_argument("--seconds", type=float, default=100, help="drained: seconds to wait for the last request")
    options = command.parse_args()
    try:
        if options.question == "ready":
            ready()
        else:
            time.sleep(options.after)
            drained(options.seconds)
    except (OSError, ValueError, LookupError, Unready) as reason:
        print(f"{options.question}: no, {reason}", file=sys.stderr)
        return 1
    return 0


class Unready(Exception):
    """The server answers, and the answer is no."""


def ready() -> None:
    """Raise Unready where a model has no worker that is ready; /ping would say Healthy all the same."""
    names = [model["modelName"] for model in _management("/models?limit=1000")["models"]]
    if not names:
        raise Unready("no model is registered")
    for name in names:
        workers = [worker for version in _management(f"/models/{name}/all") for worker in version["workers"]]
        if not any(worker["status"] == "READY" for worker in workers):
            raise Unready(f"{name} has no worker that is ready: {[worker['status'] for worker in workers]}")


def drained(seconds: float) -> None:
    """Wait until two looks in a row find no request in flight; raises Unready after so many seconds."""
    end, idle = time.monotonic() + seconds, 0
    while idle < 2:
        count = _in_flight()
        idle = idle + 1 if count == 0 else 0
        if idle < 2 and time.monotonic() > end:
            raise Unready(f"{count:g} requests are still in flight after {seconds:g} s")
        time.sleep(0.5)


def _in_flight() -> float:
    """Return how many requests the workers hold, as the handler's gauge tells."""
    lines = _get(_address("METRICS", 8082) + "/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("RequestsInFlight{"))


def _management(path: str) -> Any:
    address = _address("MANAGEMENT", 8081)
    return json.loads(_get(address + path, _management_key(address)))


def _management_key(address: str) -> str:
    """Return the management key, replaced where it ends soon: TorchServe's keys last for an hour, probes for longer."""
    if not KEYS.exists():
        return ""  # token authorization is off
    keys = json.loads(KEYS.read_text())
    if datetime.fromisoformat(keys["management"]["expiration time"]) < datetime.now(UTC) + RENEW:
        _get(f"{address}/token?type=management", keys["API"]["key"])
        keys = json.loads(KEYS.read_text())
    return str(keys["management"]["key"])


def _get(url: str, key: str = "") -> str:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with DIRECT.open(urllib.request.Request(url, headers=headers), timeout=SECONDS) as answer:
        return str(answer.read().decode())


def _address(api: str, port: int) -> str:
    """Return where this machine reaches an API, also where it listens on every interface."""
    return os.environ.get(f"TS_{api}_ADDRESS", f"http://127.0.0.1:{port}").replace("0.0.0.0", "127.0.0.1")


if __name__ == "__main__":
    sys.exit(main())
