"""Waits until models, or a version of one, have no request in flight: scaling or unregistering them would answer it 500.

New requests are still taken meanwhile, so clients are sent elsewhere first. The exit status is 0 once two looks in a row
find none in flight, and 1 where the time is over, the server does not answer or does not know a name.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable

import httpx

from torchserve_explain.errors import ServerError

METRICS = "http://127.0.0.1:8082"
PAUSE = 0.2  # seconds between two looks
GAUGE = re.compile(r"^RequestsInFlight\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


def versions_in_flight(metrics: str) -> dict[tuple[str, str], float]:
    """Return the requests in flight of each model that the handler serves, by name and version; raises httpx.HTTPError."""
    text = httpx.get(f"{metrics}/metrics", timeout=2).raise_for_status().text
    found = ((dict(LABEL.findall(labels)), float(count)) for labels, count in GAUGE.findall(text))
    return {(labels["ModelName"], labels.get("ModelVersion", "")): count for labels, count in found}


def in_flight(metrics: str) -> dict[str, float]:
    """Return the requests in flight of each model, all of its versions together; raises httpx.HTTPError."""
    counts: dict[str, float] = {}
    for (name, _), count in versions_in_flight(metrics).items():
        counts[name] = counts.get(name, 0.0) + count
    return counts


def wait_until_idle(count: Callable[[], float], seconds: float) -> float:
    """Wait until two counts in a row are 0, since the gauge counts a request only after its first step.

    Returns 0 then, and the last count that was not where so many seconds are over before.
    """
    deadline, idle, left = time.monotonic() + seconds, 0, 0.0
    while True:
        if found := count():
            idle, left = 0, found
        else:
            idle += 1
        if idle == 2:
            return 0
        if time.monotonic() >= deadline:
            return left
        time.sleep(PAUSE)


def drain(names: list[str], metrics: str, seconds: float) -> None:
    """Wait until none of the models, NAME or NAME/VERSION, has a request in flight.

    Raises ServerError where that cannot be seen in time.
    """

    def count() -> float:
        try:
            found = versions_in_flight(metrics)
        except httpx.HTTPError as error:
            raise ServerError(f"{metrics}/metrics does not answer: {error}") from None
        each = {name: [count for known, count in found.items() if name in (known[0], "/".join(known))] for name in names}
        if missing := [name for name in names if not each[name]]:
            known = ", ".join("/".join(filter(None, pair)) for pair in found)
            raise ServerError(f"{metrics}/metrics has nothing of {', '.join(missing)}; known: {known or 'none'}")
        return sum(map(sum, each.values()))

    if left := wait_until_idle(count, seconds):
        raise ServerError(f"{left:g} requests of {', '.join(names)} are still in flight after {seconds:g} s")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is waited for to a command line."""
    command.add_argument("names", nargs="+", metavar="NAME", help="models as they are registered; NAME/VERSION: one version")
    command.add_argument("--seconds", type=float, default=100, help="seconds to wait for the last request (default: 100)")


def main(options: argparse.Namespace) -> int:
    """Wait; TS_METRICS_ADDRESS says where the server has its metrics."""
    try:
        drain(options.names, os.environ.get("TS_METRICS_ADDRESS", METRICS).replace("0.0.0.0", "127.0.0.1"), options.seconds)
    except ServerError as reason:
        print(f"drain: {reason}", file=sys.stderr)
        return 1
    return 0
