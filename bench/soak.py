"""The server under a mixed load for minutes: hostile requests, clients that leave, workers that are killed.

Every answer is compared with what the same request is answered alone. The exit status is 1 if one is wrong, or lost
without a killed worker having held it.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench import machine
from bench.mixed import MixedRequest, Reply, difference, friendly, hostile, send
from bench.server import quantile
from torchserve_explain.archiver import ensure_archive
from torchserve_explain.demo import methods_of
from torchserve_explain.errors import ServerError
from torchserve_explain.paths import ROOT, STORE
from torchserve_explain.photo import photo_path
from torchserve_explain.servers import drain
from torchserve_explain.servers.torchserve import Server, free_ports, serving

NAME = "imagenet"
CLIENTS = 12
HOSTILE, LEAVING, PREDICTING = 0.1, 0.03, 0.5  # shares of the requests
PATIENCE = 0.2  # seconds after which a client leaves
ENDS = "3"  # seconds that the request of a client who leaves may take
KILLS_A_MINUTE = 0.5
TELLING = 30  # seconds between two lines of progress
SAMPLES = {  # of methods that would draw more
    "rise": "40",
    "lime": "40",
    "kernel_shap": "40",
    "gradient_shap": "8",
}
PIXELS = 50_000_000  # the archive's limit
HELD = "held by a killed worker"


@dataclass
class Tally:
    """What came of the requests so far."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    left: int = 0
    told_to_come_again: int = 0
    kills: list[tuple[float, float]] = field(default_factory=list)  # when, and when a worker was ready again
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds and megabytes
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def requests(self) -> int:
        """All that were sent."""
        return sum(map(len, self.seconds.values())) + sum(self.lost.values()) + self.left + self.told_to_come_again

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong, and nothing lost but what a killed worker held."""
        return not self.wrong and not set(self.lost) - {HELD}

    def answered(self, case: MixedRequest, alone: Reply, reply: Reply, began: float) -> None:
        """Count an answer."""
        ended = time.monotonic()
        with self.lock:
            if reply.status == 503 and b"try again" in reply.body:
                self.told_to_come_again += 1
            elif reply.status >= 500 and reply.status != alone.status:
                self.lost[self.cause(began, ended, f"{reply.status}: {reply.body[:120]!r}")] += 1
            elif (why := difference(alone, reply)) is not None:
                self.wrong.append(f"{case.name}: {why}")
            else:
                self.seconds[case.kind].append(ended - began)

    def broken(self, began: float, error: httpx.HTTPError) -> None:
        """Count a request whose connection broke."""
        with self.lock:
            self.lost[self.cause(began, time.monotonic(), repr(error))] += 1

    def cause(self, began: float, ended: float, otherwise: str) -> str:
        """Say what a request was lost by: a worker that was killed meanwhile, or something else."""
        return HELD if any(began <= killed <= ended for killed, _ in self.kills) else otherwise


def worker(server: Server) -> dict[str, str]:
    """Return TorchServe's description of the model's one worker."""
    (model,) = httpx.get(f"{server.management}/models/{NAME}", headers=server.authorization("management"), timeout=10).json()
    found: dict[str, str] = model["workers"][0]
    return found


def load(
    server: Server,
    cases: list[MixedRequest],
    refused: list[MixedRequest],
    alone: dict[str, Reply],
    tally: Tally,
    until: float,
    seed: int,
) -> None:
    """Be one client: one request after another until the time is over."""
    generator = random.Random(seed)
    predictions = [case for case in cases if case.kind == "prediction"]
    explanations = [case for case in cases if case.kind != "prediction"]
    with httpx.Client(timeout=300, headers=server.authorization()) as client:
        while time.monotonic() < until:
            if (drawn := generator.random()) < LEAVING:
                leave(server, tally)
                continue
            refusing = drawn < LEAVING + HOSTILE
            case = generator.choice(refused if refusing else predictions if generator.random() < PREDICTING else explanations)
            began = time.monotonic()
            try:
                tally.answered(case, alone[case.name], send(client, server.inference, NAME, case), began)
            except httpx.HTTPError as error:
                tally.broken(began, error)


def leave(server: Server, tally: Tally) -> None:
    """Ask for something long, and go before it is there."""
    fields = {"method": "occlusion", "timeout": ENDS}
    with suppress(httpx.HTTPError):
        httpx.post(f"{server.inference}/explanations/{NAME}", files={"data": photo_path().read_bytes()}, data=fields,
                   headers=server.authorization(), timeout=PATIENCE)  # fmt: skip
    with tally.lock:
        tally.left += 1


def kill(server: Server, tally: Tally) -> None:
    """Kill the worker, and wait until another one is ready."""
    pid = int(worker(server)["pid"])
    with tally.lock:  # what comes back with an error from here on was held by it
        os.kill(pid, signal.SIGKILL)
        tally.kills.append((time.monotonic(), float("inf")))
    while (found := worker(server))["status"] != "READY" or int(found["pid"]) == pid:
        time.sleep(0.2)
    tally.kills[-1] = (tally.kills[-1][0], time.monotonic())


def watch(server: Server, tally: Tally, began: float, until: float) -> None:
    """Tell every so often how it goes, and kill workers on the way."""
    kills = iter([began + (index + 0.5) * 60 / KILLS_A_MINUTE for index in range(int((until - began) / 60 * KILLS_A_MINUTE))])
    following, telling = next(kills, until), began + TELLING
    while (now := time.monotonic()) < until:
        if now >= following:
            kill(server, tally)
            following = next(kills, until)
        if now >= telling:
            telling += TELLING
            resident = memory(int(worker(server)["pid"]))
            tally.memory.append((now - began, resident))
            lost = sum(tally.lost.values())
            print(f"{now - began:.0f} s: {tally.requests} requests, {len(tally.wrong)} wrong, {lost} lost, "
                  f"{len(tally.kills)} workers killed, {resident:.0f} MB", flush=True)  # fmt: skip
        time.sleep(0.2)


def memory(pid: int) -> float:
    """Return what a process holds, in megabytes; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


def soak(server: Server, minutes: float) -> Tally:
    """Load the server for so many minutes."""
    image = photo_path().read_bytes()
    methods = {name: {"samples": SAMPLES[name]} if name in SAMPLES else {} for name in methods_of(server)}
    cases, refused = friendly(image, methods), hostile(image, PIXELS)
    with httpx.Client(timeout=300, headers=server.authorization()) as client:
        alone = {case.name: send(client, server.inference, NAME, case) for case in (*cases, *refused)}
    if failed := [case.name for case in cases if alone[case.name].status != 200]:
        raise ServerError(f"answered alone with an error: {', '.join(failed)}")
    print(f"{len(alone)} kinds of requests were answered alone", flush=True)
    tally, began = Tally(), time.monotonic()
    until = began + 60 * minutes
    threads = [
        threading.Thread(target=load, args=(server, cases, refused, alone, tally, until, seed)) for seed in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    watch(server, tally, began, until)
    for thread in threads:
        thread.join()
    drain.drain([NAME], server.metrics, 60)
    return tally


def table(tally: Tally, minutes: float) -> str:
    """Return what happened, as Markdown."""
    text = [", ".join(f"{key} {value}" for key, value in machine.describe(len(os.sched_getaffinity(0))).items()), ""]
    text += [f"{minutes:g} minutes, {CLIENTS} clients, {len(tally.kills)} workers killed", ""]
    text += ["| requests | wrong | lost | clients that left | told to come again |", "|---|---|---|---|---|"]
    lost = sum(tally.lost.values())
    text += [f"| {tally.requests} | {len(tally.wrong)} | {lost} | {tally.left} | {tally.told_to_come_again} |", ""]
    text += ["| lost by | requests |", "|---|---|", *(f"| {cause} | {count} |" for cause, count in tally.lost.items()), ""]
    text += ["| kind | answers | p50, ms | p99, ms |", "|---|---|---|---|"]
    for kind, seconds in sorted(tally.seconds.items()):
        p50, p99 = (1000 * quantile(seconds, share) for share in (0.5, 0.99))
        text.append(f"| {kind} | {len(seconds)} | {p50:.0f} | {p99:.0f} |")
    text += ["", "| after, s | worker, MB |", "|---|---|", *(f"| {at:.0f} | {held:.0f} |" for at, held in tally.memory)]
    kinds = Counter(why.partition(":")[0] for why in tally.wrong)
    examples = {why.partition(":")[0]: why for why in tally.wrong}
    text += ["", *(f"- wrong, {count} times: {examples[kind]}" for kind, count in kinds.most_common())]
    return "\n".join(text).rstrip() + "\n"


def main() -> int:
    """Soak, print the table, and write it to run/soak/."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--minutes", type=float, default=30)
    minutes = command.parse_args().minutes
    out = ROOT / "run" / "soak"
    out.mkdir(parents=True, exist_ok=True)
    ensure_archive(NAME)
    with tempfile.TemporaryDirectory() as folder, serving([NAME], STORE, free_ports(), Path(folder, "run")) as server:
        tally = soak(server, minutes)
    (out / "soak.md").write_text(text := table(tally, minutes))
    print(text)
    return 0 if tally.passed else 1


if __name__ == "__main__":
    sys.exit(main())
