"""Contestants in processes of their own, each made ready and then run in turns, so that all meet the same noise."""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import ours
from bench.floor import FORWARD_ROWS, GRADIENT_ROWS, PACKS, compiled_gradient_run, compiled_run, floor_run
from bench.ours import Outcome, Run
from bench.peers import CAMS, CAPTUM, CHUNKED, CHUNKS, captum_run, grad_cam_run, zennit_run
from bench.subjects import Subject
from torchserve_explain.attribution.memory import keep_freed_memory

MEGABYTE = 2**20
ENDED = "its process ended: out of memory"
PATIENCE = 1800  # seconds that a contestant may take to get ready

Given = Callable[[], Subject]  # what a process can be sent
Prepare = Callable[[str, Subject, int | None], Run]


@dataclass(frozen=True)
class Contestant:
    """How a work is run: `chunks` are rows a pass of which the fastest is kept, `tuned` keeps the freed memory."""

    name: str
    prepare: Prepare
    tuned: bool
    chunks: tuple[int, ...] = ()


def contestants(work: str) -> list[Contestant]:
    """Return who takes part in a work, the engine first."""
    found = [Contestant("ours", ours.prepare, tuned=True)]
    if work in FORWARD_ROWS or work in CAMS:
        found.append(Contestant("ours, bfloat16", ours.prepare_narrow, tuned=True))
        found.append(Contestant("ours, torch", ours.prepare_torch, tuned=True))
    if work in FORWARD_ROWS:
        found.append(Contestant("floor, compiled", compiled_run, tuned=True))
    if work in (*CAPTUM, *ours.SENSITIVITIES, ours.WITHIN, "five methods"):
        found.append(Contestant("captum", captum_run, tuned=False))
        found.append(Contestant("captum, tuned", captum_run, tuned=True, chunks=CHUNKS if work in CHUNKED else ()))
    if work in CAMS:
        found.append(Contestant("pytorch-grad-cam", grad_cam_run, tuned=False))
    if work == "lrp":
        found.append(Contestant("zennit", zennit_run, tuned=False))
    if work in GRADIENT_ROWS or work in FORWARD_ROWS:
        found.append(Contestant("floor", floor_run, tuned=True, chunks=PACKS))
    if work in GRADIENT_ROWS:
        found.append(Contestant("floor, compiled", compiled_gradient_run, tuned=True))
    return found


@dataclass
class Ready:
    """What a contestant tells of its first run: memory in megabytes beyond what it had before, the chunk it chose."""

    memory: float
    chunk: int | None
    outcome: Outcome


@dataclass
class ContestResult:
    """A contestant's seconds, or why it has none."""

    contestant: str
    ready: Ready | None = None
    refusal: str | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of its seconds."""
        return statistics.median(self.seconds)


def compete(
    given: Given, work: str, threads: int, repeats: int, budget: float, names: Collection[str] | None = None
) -> list[ContestResult]:
    """Run a work's contestants in turns, all or those of `names`.

    Turns end after `repeats` rounds, or as many as `budget` seconds allow, two at least.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    every = [(place, ContestResult(contestant.name)) for place, contestant in enumerate(contestants(work))]
    chosen = [(place, result) for place, result in every if names is None or result.contestant in names]
    pipes: list[tuple[ContestResult, Any]] = []
    for place, result in chosen:
        mine, theirs = context.Pipe()
        context.Process(target=_contestant, args=(theirs, given, work, place, threads), daemon=True).start()
        theirs.close()
        answer = _received(mine, PATIENCE)
        if isinstance(answer, Ready):
            result.ready = answer
            pipes.append((result, mine))
        else:
            result.refusal = answer
    began = time.monotonic()
    for number in range(repeats):
        if number >= 2 and (time.monotonic() - began) / number * (number + 1) > budget:
            break
        for result, pipe in pipes:
            if result.ready is not None:
                _take_turn(result, pipe)
    for _, pipe in pipes:
        pipe.close()
    return [result for _, result in chosen]


def _take_turn(result: ContestResult, pipe: Any) -> None:
    """Let a contestant run once more; one whose process has ended takes part no longer."""
    try:
        pipe.send("run")
        answer = _received(pipe, PATIENCE)
    except OSError:
        answer = ENDED
    if isinstance(answer, float):
        result.seconds.append(answer)
    else:
        result.ready, result.refusal = None, answer


def _received(pipe: Any, patience: float) -> Any:
    """Return a process's answer, or in words that there is none."""
    try:
        return pipe.recv() if pipe.poll(patience) else f"no answer within {patience:.0f} s"
    except EOFError:
        return ENDED


def _contestant(pipe: Connection, given: Given, work: str, place: int, threads: int) -> None:
    """Get ready, tell so, and run as often as asked."""
    contestant = contestants(work)[place]
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_DATA, (_available() * 7 // 10,) * 2)
    if contestant.tuned:
        keep_freed_memory()
    try:
        ready, run = _readied(contestant, work, given())
    except Exception as error:  # a peer may raise anything at a network that it cannot take
        text = " ".join(str(error).split())
        short = "out of memory" if "allocate memory" in text or isinstance(error, MemoryError) else text[:160]
        pipe.send(short or type(error).__name__)
        return
    pipe.send(ready)
    try:
        while pipe.recv() == "run":
            pipe.send(_seconds(run))
    except EOFError:
        return


def _readied(contestant: Contestant, work: str, given: Subject) -> tuple[Ready, Run]:
    """Run once for memory and maps, then choose the fastest number of rows a pass."""
    chunk = min(contestant.chunks, default=None)
    run = contestant.prepare(work, given, chunk)
    gc.collect()
    before = _reset_peak()
    outcome = run()
    memory = (_peak() - before) / MEGABYTE
    if len(contestant.chunks) > 1:
        runs = {size: contestant.prepare(work, given, size) for size in contestant.chunks}
        chunk = min(runs, key=lambda size: _seconds(runs[size]))
        run = runs[chunk]
    return Ready(memory, chunk, outcome), run


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _status(key: str, path: str = "/proc/self/status") -> int:
    """Return bytes that the kernel tells in kilobytes."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _available() -> int:
    return _status("MemAvailable:", "/proc/meminfo")


def _reset_peak() -> int:
    """Let the kernel forget the process's peak of memory; return what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def agreement(one: Tensor | None, other: Tensor | None) -> float | None:
    """Return the least cosine between the maps [n, H, W] of two contestants, or None where one has none."""
    if one is None or other is None or one.shape != other.shape:
        return None
    return float(torch.cosine_similarity(one.flatten(1).double(), other.flatten(1).double(), 1).min())
