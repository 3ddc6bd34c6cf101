"""How Integrated Gradients' time and memory grow with images, pixels, classes and steps: the engine beside Captum."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench import machine, tables
from bench.contest import ContestResult, compete
from bench.ours import PATH, PATHS
from bench.subjects import subject
from torchserve_explain.paths import ROOT
from torchserve_explain.records import progress

NETWORK, NAMES = "resnet18", ("ours", "captum")
ROUNDS, SECONDS = 3, 30
GROWTHS: dict[str, tuple[int, ...]] = {
    "images": (1, 2, 4),
    "pixels a side": (160, 224, 320),
    "classes": (10, 1000, 20000),
    "steps": (50, 100, 200),
}


def contest(growing: str, value: int) -> tuple[partial[Any], str]:
    """Return what is explained and by which work where one thing has a value and the others are as usual."""
    if growing == "steps":
        return partial(subject, NETWORK, 1), next(work for work, steps in PATHS.items() if steps == value)
    batch = value if growing == "images" else 1
    other = {"pixels a side": {"size": value}, "classes": {"classes": value}}.get(growing, {})
    return partial(subject, NETWORK, batch, **other), PATH


def lines(growing: str, value: int, results: list[ContestResult]) -> Iterator[dict[str, Any]]:
    """Yield what each contestant took, or that it could not."""
    for result in results:
        figures = {"seconds": result.median, "memory_mb": result.ready.memory} if result.ready else {"refusal": result.refusal}
        yield {"growing": growing, "value": value, "contestant": result.contestant} | figures


def main() -> None:
    """Measure, print, and write growth.json and growth.md."""
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with progress() as shown:
        bar = shown.add_task("", total=sum(map(len, GROWTHS.values())))
        for growing, values in GROWTHS.items():
            for value in values:
                shown.update(bar, description=f"{value} {growing}")
                found += lines(growing, value, compete(*contest(growing, value), 1, ROUNDS, SECONDS, NAMES))
                shown.advance(bar)
    out = ROOT / "run" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    described = machine.describe(1)
    results = {"machine": described, "network": NETWORK, "results": found}
    tables.write(out / "growth", results, tables.growth(described, NETWORK, found))


if __name__ == "__main__":
    main()
