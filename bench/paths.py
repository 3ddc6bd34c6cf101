"""How many rows Integrated Gradients takes for an error to hold: the path bisected, against uniform Gauss-Legendre."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.subjects import LITE0, network
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.paths import ROOT
from torchserve_explain.photo import pictures
from torchserve_explain.records import progress
from torchserve_explain.serving.settings import Limits

ERRORS = (0.05, 0.01)
STEPS = (50, 100, 125, 150, 175, 200, 300, 500)  # of the uniform path, chosen before the photo is seen
SHARE = 0.9  # of the photos that an error must hold on


def bisected(engine: Engine, case: Case, error: float) -> int | None:
    """Return the rows after which the bisected path holds an error, or None where it does not."""
    found = engine.results([Job(IntegratedGradients(max_error=error), case)])[0]
    return found.evaluations if float(found.value.completeness_error or 0) <= error else None


def uniform(engine: Engine, case: Case) -> list[float]:
    """Return the errors of the uniform path, for each of STEPS."""
    found = engine.results([Job(IntegratedGradients(steps=steps), case) for steps in STEPS])
    return [float(one.value.completeness_error or 0) for one in found]


def main() -> None:
    """Measure, print, and write paths.json."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--photos", type=Path, help="a folder of photos (default: those that scikit-image ships)")
    options = command.parse_args()
    keep_freed_memory()
    built, preprocessing = network(LITE0)
    engine = Engine(Classifier(built, preprocessing.normalization, preprocessing.size), Limits().pack)
    found: list[dict[str, Any]] = []
    with progress() as shown:
        photos = list(pictures(options.photos, preprocessing))
        bar = shown.add_task("rows for the error to hold", total=len(photos))
        for _, picture in photos:
            logits = engine.logits([picture.input])[0]
            target = int(logits.argmax())
            case = Case(engine.classifier, picture.input, target, known_score=float(logits[target]))
            rows = {str(error): bisected(engine, case, error) for error in ERRORS}
            found.append({"bisected": rows, "uniform": uniform(engine, case)})
            shown.advance(bar)
    out = ROOT / "run" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "paths.json").write_text(json.dumps({"steps": STEPS, "photos": found}, indent=1))
    print(table(found))


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return, as Markdown, the rows with which an error holds on nine photos in ten."""
    lines = ["| error | photos | bisected | uniform | ratio |", "|---|---|---|---|---|"]
    for error in ERRORS:
        rows = sorted(math.inf if one["bisected"][str(error)] is None else one["bisected"][str(error)] for one in found)
        enough = rows[math.ceil(SHARE * len(rows)) - 1]
        held = [mean(one["uniform"][place] <= error for one in found) for place in range(len(STEPS))]
        steps = next((steps for steps, share in zip(STEPS, held, strict=True) if share >= SHARE), None)
        needed = f"{steps}" if steps else f"over {STEPS[-1]}: holds on {held[-1]:.0%}"
        ratio = f"{(steps or STEPS[-1]) / enough:.2f}"
        lines.append(f"| {error:.0%} | {len(found)} | {enough} | {needed} | **{ratio if steps else f'over {ratio}'}** |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
