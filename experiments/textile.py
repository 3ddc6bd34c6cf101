"""Do the maps of the recipe `textile` point at the defect? Measured on its held-out images, with a picture of some.

Where a local defect lies is known without the classifier: a nominal weave is a linear process, so a pixel is
predicted from its neighbours by least squares, and where that fails most is the defect.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from scipy.ndimage import gaussian_filter

from study.measure import PACK
from study.techniques import SMOOTHED, Technique
from torchserve_explain.archiver import load_archive
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.biased_layer import BiasedLayer
from torchserve_explain.attribution.methods.cam import GradCam, LayerCam
from torchserve_explain.attribution.methods.gradient import Sensitivity
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.perturbation import Occlusion
from torchserve_explain.errors import ArchiveError
from torchserve_explain.paths import ROOT
from torchserve_explain.serving.images import Picture, read_picture
from torchserve_explain.serving.pictures import Cell, Map, Scale, contact_sheet, draw_overlay
from torchserve_explain.serving.settings import Preprocessing
from training.data import PIXELS, Data, read_folder
from training.maps import explain
from training.recipe import read_recipe

NEIGHBOURS = tuple((i, j) for i in range(-2, 3) for j in range(-2, 3) if (i, j) != (0, 0))
UNKNOWNS = len(NEIGHBOURS) + 1
MARGIN = 6  # pixels of the images' frames, which are no weave
RADIUS = 16  # pixels around the centre of a defect that count as pointing at it
NOMINAL = 60  # images that the predictor is fitted on
SHOWN = 4
NATIVE = 250  # pixels of an image's side


WAYS = (
    Technique("grad_cam", GradCam()),
    Technique("grad_cam features.11", GradCam(layer="features.11")),
    Technique("layer_cam features.8", LayerCam(layer="features.8")),
    Technique("integrated_gradients", IntegratedGradients()),
    Technique("sensitivity", Sensitivity()),
    SMOOTHED,
    Technique("biased_layer", BiasedLayer()),
    Technique("occlusion", Occlusion()),
)


class Weave:
    """The linear predictor of a nominal weave's pixels from their neighbours."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        squares, products = np.zeros((UNKNOWNS, UNKNOWNS)), np.zeros(UNKNOWNS)
        for picture in pictures:
            neighbours, centre = _neighbourhoods(picture)
            squares += neighbours.T @ neighbours
            products += neighbours.T @ centre.ravel()
        self._weights = np.linalg.solve(squares, products)

    def surprise(self, picture: Picture) -> NDArray[np.float64]:
        """Return how far each pixel is from its prediction, squared and smoothed, without the margin."""
        neighbours, centre = _neighbourhoods(picture)
        surprise: NDArray[np.float64] = gaussian_filter((centre - (neighbours @ self._weights).reshape(centre.shape)) ** 2, 3)
        return surprise

    def defect(self, picture: Picture) -> tuple[int, int]:
        """Return the row and column of the largest surprise."""
        surprise = self.surprise(picture)
        row, column = divmod(int(surprise.argmax()), surprise.shape[1])
        return row + MARGIN, column + MARGIN


def _neighbourhoods(picture: Picture) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each pixel's neighbours and a one [pixels, 25], and the pixels [h, w]."""
    grey = np.asarray(picture.seen.convert("L"), dtype=float)
    height, width = grey.shape
    centre = grey[MARGIN : height - MARGIN, MARGIN : width - MARGIN]
    columns = [grey[MARGIN + i : height - MARGIN + i, MARGIN + j : width - MARGIN + j].ravel() for i, j in NEIGHBOURS]
    return np.stack([*columns, np.ones(centre.size)], 1), centre


@dataclass(frozen=True)
class Pointing:
    """Whether a map's largest value lies at the defect, and how many times more of it does than by chance."""

    hit: bool
    times: float


def point(values: Map, defect: tuple[int, int]) -> Pointing:
    """Measure a map [H, W] against the disc around a defect."""
    rows, columns = np.ogrid[: values.shape[0], : values.shape[1]]
    disc = (rows - defect[0]) ** 2 + (columns - defect[1]) ** 2 <= RADIUS**2
    positive = values.clip(min=0)
    share = float(positive[disc].sum() / positive.sum()) if positive.any() else 0.0
    return Pointing(bool(disc.ravel()[values.argmax()]), share / float(disc.mean()))


@dataclass(frozen=True)
class Measured:
    """How well each way points at the defects, and the cells of the picture."""

    found: dict[str, list[Pointing]]
    cells: list[Cell]


def measure(
    engine: Engine, pictures: Sequence[Picture], defects: Sequence[tuple[int, int]], label: int, shown: str
) -> Measured:
    """Explain each picture's class `label` in every way; draw the first that are classified rightly in the way `shown`."""
    found: dict[str, list[Pointing]] = {way.name: [] for way in WAYS}
    cells: list[Cell] = []
    logits = engine.logits([picture.input for picture in pictures])
    for picture, defect, scores in track(list(zip(pictures, defects, logits, strict=True)), "explaining"):
        case = Case(engine.classifier, picture.input.to(engine.classifier.device, engine.classifier.dtype), label)
        jobs = [Job(way.method, case, way.smoothing) for way in WAYS]
        for way, job, values in zip(WAYS, jobs, explain(engine, jobs), strict=True):
            found[way.name].append(point(values, defect))
            if way.name == shown and len(cells) < SHOWN and int(scores.argmax()) == label:
                overlay = draw_overlay(values, Scale.of(values, job.signed, None, 99.9), picture.seen, 0.5)
                pair = np.concatenate([np.asarray(picture.seen), np.asarray(overlay)], 1)
                caption = f"local, {float(scores.softmax(0)[label]):.1%}; {way.name}"
                cells.append(Cell(Image.fromarray(pair), "a held-out image, and why", caption))
    return Measured(found, cells)


def table(found: dict[str, list[Pointing]]) -> str:
    """Return what was measured, as Markdown."""
    lines = ["| method | maximum at the defect | share at the defect, times chance |", "|---|---|---|"]
    for name, points in found.items():
        lines.append(f"| {name} | {mean(p.hit for p in points):.1%} | {mean(p.times for p in points):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, and draw the picture."""
    command = argparse.ArgumentParser(prog="python -m experiments.textile", description=__doc__)
    command.add_argument("--data", type=Path, required=True, help="the folder that the recipe was trained on")
    command.add_argument("--images", type=int, help="how many held-out local defects are explained (default: all)")
    command.add_argument("--way", default="biased_layer", choices=[way.name for way in WAYS], help="of the picture")
    command.add_argument(
        "--out", type=Path, default=ROOT / "run" / "textile", help="where the results go (default: run/textile)"
    )
    options = command.parse_args()
    try:
        archive = load_archive("textile")
    except ArchiveError as reason:
        print(f"experiments.textile: {reason}; docs/training.md tells how it is trained", file=sys.stderr)
        return 1
    engine, preprocessing = Engine(archive.classifier, PACK), archive.settings.preprocessing
    metrics = json.loads((ROOT / "classifiers" / "textile" / "metrics.json").read_text())
    data: Data = read_folder(options.data, preprocessing, read_recipe("textile")[0].ratio, metrics["seed"])
    local, nominal = data.classes.index("local"), data.classes.index("nominal")

    # The weave is looked at as it was made: resized, a defect is no longer told from the weave for sure.
    native = preprocessing.model_copy(update={"resize": NATIVE, "crop": NATIVE})

    def pictures(split: str, label: int, chosen: Preprocessing = native) -> list[Picture]:
        paths = [sample.path for sample in data.splits[split] if sample.label == label]
        return [read_picture(path.read_bytes(), chosen, PIXELS) for path in paths]

    weave, held_out = Weave(pictures("train", nominal)[:NOMINAL]), pictures("test", local)[: options.images]
    clearest = min(weave.surprise(picture).max() for picture in held_out)
    dullest = max(weave.surprise(picture).max() for picture in pictures("test", nominal))
    scale = preprocessing.size[0] / NATIVE
    defects = [(round(scale * row), round(scale * column)) for row, column in map(weave.defect, held_out)]
    shown = pictures("test", local, preprocessing)[: options.images]
    measured = measure(engine, shown, defects, local, options.way)
    options.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(measured.cells).convert("RGB").save(options.out / "textile.jpg", quality=85)
    (options.out / "table.md").write_text(table(measured.found))
    console = Console()
    console.print(table(measured.found), markup=False)
    figures = f"the least surprise of one is {clearest:.0f}, the largest of a nominal image {dullest:.0f}"
    console.print(f"{len(held_out)} held-out local defects; {figures}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
