"""Runs the bench: the engine beside its peers on the same work; writes JSON, a table and a plot."""

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from bench import gate, machine, roofline, tables
from bench.contest import ContestResult, agreement, compete
from bench.floor import FORWARD_ROWS
from bench.ours import PATH, PATHS, REPEATED, SENSITIVITIES, SMOOTHED, WITHIN, WORKS
from bench.subjects import DEEP, LITE0, NETWORKS, subject
from torchserve_explain.paths import ROOT
from torchserve_explain.records import progress

ON_ONE = {"occlusion", "lime", "kernel_shap", "five methods", SMOOTHED}  # on the smallest network alone
BY_ONE = {PATH, WITHIN, "gradient_shap", SMOOTHED, REPEATED}  # a batch of them takes minutes a round


def plan(quick: bool) -> list[tuple[str, int, str]]:
    """Return the network, batch and work of every contest that ends within minutes."""
    if quick:
        return [(LITE0, 1, work) for work in (PATH, "grad_cam", "saliency")]
    works = [work for work in (*WORKS, *SENSITIVITIES) if work == PATH or work not in PATHS]
    every = product(NETWORKS, (1, 8), works)
    return [contest for contest in every if _ends(*contest)]


def _ends(network: str, batch: int, work: str) -> bool:
    if network == LITE0:
        return batch == 1 or work not in (SMOOTHED, REPEATED, *FORWARD_ROWS)
    if network == DEEP and work == REPEATED:
        return False
    return work not in ON_ONE and (batch == 1 or work not in BY_ONE)


def title(network: str, batch: int, work: str) -> str:
    """Return a contest's name."""
    return f"{network} x {batch}: {work}"


def record(
    network: str, batch: int, work: str, results: list[ContestResult], least: float | None = None
) -> list[dict[str, Any]]:
    """Return a contest as lines of plain values, a line each contestant; `least` are its seconds by the roofline."""
    ours = results[0]
    assert ours.ready is not None
    return [
        {
            "network": network,
            "batch": batch,
            "work": work,
            "contestant": result.contestant,
            "refusal": result.refusal,
            "roofline": least,
            **(_told(result, ours) if result.ready else {}),
        }
        for result in results
    ]


def _told(result: ContestResult, ours: ContestResult) -> dict[str, Any]:
    assert result.ready is not None and ours.ready is not None
    return {
        "seconds": result.median,
        "all_seconds": result.seconds,
        "ratio": result.median / ours.median,
        "memory_mb": result.ready.memory,
        "chunk": result.ready.chunk,
        "rows": result.ready.outcome.rows,
        "error": result.ready.outcome.error,
        "cosine": agreement(ours.ready.outcome.maps, result.ready.outcome.maps),
    }


def measured(options: argparse.Namespace, network: str, batch: int, work: str) -> list[dict[str, Any]]:
    """Run a contest and return its lines."""
    given = partial(subject, network, batch)
    names = None if options.peers is None else {"ours", *options.peers}
    least = roofline.least_seconds(work, given, machine.speed(options.threads))
    results = compete(given, work, options.threads, options.repeats, options.budget, names)
    return record(network, batch, work, results, least)


def command() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(prog="make bench", description=__doc__)
    found.add_argument("--quick", action="store_true", help="three contests instead of all")
    found.add_argument("--only", default="", help="contests whose name, as the bar tells it, holds this; others stay")
    found.add_argument(
        "--peers", nargs="+", choices=tables.PEERS, metavar="NAME", help="who takes part beside the engine (default: all)"
    )
    found.add_argument("--threads", type=int, default=1, help="of torch, for every contestant (default: %(default)s)")
    found.add_argument("--repeats", type=int, default=7, help="rounds of a contest (default: %(default)s)")
    found.add_argument("--budget", type=float, default=30, help="seconds of a contest's rounds (default: %(default)s)")
    found.add_argument("--out", type=Path, default=ROOT / "run" / "bench", help="where the results go (default: run/bench)")
    found.add_argument("--against", type=Path, help="a library.json or gate.json that no ratio may fall far below, twice")
    return found


def main() -> int:
    """Run what the command line asks for."""
    options = command().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    described, kept = machine.describe(options.threads), options.out / "library.json"
    whole = plan(False)
    contests = [contest for contest in plan(options.quick) if options.only in title(*contest)]
    lines: list[dict[str, Any]] = []
    if options.only and kept.exists():  # the others stay as they were measured
        lines = [
            line for line in json.loads(kept.read_text())["results"] if tables.contest_of(line) in set(whole) - set(contests)
        ]
    with progress() as shown:
        bar = shown.add_task("", total=len(contests))
        for contest in contests:
            shown.update(bar, description=title(*contest))
            lines += measured(options, *contest)
            kept.write_text(json.dumps({"machine": described, "results": lines}, indent=1))
            shown.advance(bar)
    lines.sort(key=lambda line: whole.index(tables.contest_of(line)))
    (options.out / "library.md").write_text(tables.markdown(described, lines))
    tables.plot(lines, options.out / "library.png")
    print(tables.markdown(described, lines))
    if options.against is None:
        return 0
    fallen = gate.confirmed(lines, json.loads(options.against.read_text())["results"], partial(measured, options))
    print("\n".join(fallen) or "no ratio has fallen", file=sys.stderr)
    return bool(fallen)


if __name__ == "__main__":
    sys.exit(main())
