"""How many rows Integrated Gradients takes for an error to hold: the path bisected, against uniform Gauss-Legendre."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attribution.classifier import Classifier
from attribution.engine import Engine
from attribution.job import Job
from attribution.memory import keep_freed_memory
from attribution.methods import Case
from attribution.methods.path import IntegratedGradients
from bench.subjects import LITE0, network
from deploy import ROOT
from deploy.offline import progress
from serving.settings import Limits
from study.__main__ import pictures

ERRORS = (0.05, 0.01)
STEPS = (25, 50, 75, 100, 125, 150, 200, 250, 300, 400, 500)  # of the uniform path; the first that holds counts for it
BUDGET = 501


def rows_for(engine: Engine, case: Case, error: float) -> dict[str, int]:
    """Return the rows after which the error holds, for both ways; BUDGET where it does not."""
    bisected = engine.results([Job(IntegratedGradients(max_error=error), case)])[0]
    held = float(bisected.result.completeness_error or 0) <= error
    return {"bisected": bisected.evaluations if held else BUDGET, "uniform": next(_uniform(engine, case, error), BUDGET)}


def _uniform(engine: Engine, case: Case, error: float) -> Iterator[int]:
    for steps in STEPS:
        found = engine.results([Job(IntegratedGradients(steps=steps), case)])[0]
        if float(found.result.completeness_error or 0) <= error:
            yield steps


def main() -> None:
    """Measure, print, and write paths.json."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--photos", type=Path, help="a folder of photos (default: those that scikit-image ships)")
    options = command.parse_args()
    keep_freed_memory()
    built, preprocessing = network(LITE0)
    engine = Engine(Classifier(built, preprocessing.normalization, preprocessing.size), Limits().pack)
    found: dict[float, list[dict[str, int]]] = {error: [] for error in ERRORS}
    with progress() as shown:
        photos = list(pictures(options.photos, preprocessing))
        bar = shown.add_task("rows for the error to hold", total=len(photos) * len(ERRORS))
        for _, picture in photos:
            logits = engine.logits([picture.input])[0]
            target = int(logits.argmax())
            case = Case(engine.classifier, picture.input, target, known_score=float(logits[target]))
            for error in ERRORS:
                found[error].append(rows_for(engine, case, error))
                shown.advance(bar)
    out = ROOT / "run" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "paths.json").write_text(json.dumps(found))
    print(table(found))


def table(found: dict[float, list[dict[str, int]]]) -> str:
    """Return the medians and ninth deciles as Markdown."""
    lines = ["| error | photos | bisected, median / 90 % | uniform, median / 90 % | ratio at 90 % |", "|---|---|---|---|---|"]
    for error, photos in found.items():
        tells = {way: np.quantile([one[way] for one in photos], (0.5, 0.9), method="higher") for way in ("bisected", "uniform")}
        both = " | ".join(f"{middle} / {most if most < BUDGET else f'over {BUDGET - 1}'}" for middle, most in tells.values())
        lines.append(f"| {error:.0%} | {len(photos)} | {both} | **{tells['uniform'][1] / tells['bisected'][1]:.2f}** |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
