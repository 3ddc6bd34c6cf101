"""Runs the bench: the engine beside its peers on the same work; writes JSON, a table and a plot."""

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from bench import gate, machine, tables
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


def record(network: str, batch: int, work: str, results: list[ContestResult]) -> list[dict[str, Any]]:
    """Return a contest as lines of plain values, a line each contestant."""
    ours = results[0]
    assert ours.ready is not None
    return [
        {
            "network": network,
            "batch": batch,
            "work": work,
            "contestant": result.contestant,
            "refusal": result.refusal,
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


def main() -> int:
    """Run what the command line asks for."""
    command = argparse.ArgumentParser(prog="make bench", description=__doc__)
    command.add_argument("--quick", action="store_true", help="three contests instead of all")
    command.add_argument("--only", default="", help="contests whose name, as the bar tells it, holds this; others stay")
    command.add_argument("--threads", type=int, default=1, help="of torch, for every contestant (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=7, help="rounds of a contest (default: %(default)s)")
    command.add_argument("--budget", type=float, default=30, help="seconds of a contest's rounds (default: %(default)s)")
    command.add_argument("--out", type=Path, default=ROOT / "run" / "bench", help="where the results go (default: run/bench)")
    command.add_argument("--against", type=Path, help="a library.json that no ratio may fall far below")
    options = command.parse_args()
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
        for network, batch, work in contests:
            shown.update(bar, description=title(network, batch, work))
            given = partial(subject, network, batch)
            results = compete(given, work, options.threads, options.repeats, options.budget)
            lines += record(network, batch, work, results)
            kept.write_text(json.dumps({"machine": described, "results": lines}, indent=1))
            shown.advance(bar)
    lines.sort(key=lambda line: whole.index(tables.contest_of(line)))
    (options.out / "library.md").write_text(tables.markdown(described, lines))
    tables.plot(lines, options.out / "library.png")
    print(tables.markdown(described, lines))
    if options.against is None:
        return 0
    fallen = gate.fallen(lines, json.loads(options.against.read_text())["results"])
    print("\n".join(fallen) or "no ratio has fallen", file=sys.stderr)
    return bool(fallen)


if __name__ == "__main__":
    sys.exit(main())
