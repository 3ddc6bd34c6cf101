"""What is measured: each technique on each photo, and on grids of photos."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from torch import Tensor

from study.techniques import Technique
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.quality import Deletion, Infidelity, Insertion, MaxSensitivity, Measurement, Quality

PACK = 16


@dataclass(frozen=True)
class Settings:
    """What the study measures with."""

    infidelity: Infidelity = field(default_factory=lambda: Infidelity(samples=25))
    deletion: Deletion = field(default_factory=lambda: Deletion(steps=25))
    insertion: Insertion = field(default_factory=lambda: Insertion(steps=25))
    max_sensitivity: MaxSensitivity = field(default_factory=lambda: MaxSensitivity(samples=5))
    disturbed: int = 4  # photos that max sensitivity is measured on: it repeats each explanation
    grids: int = 3  # of 2 x 2 photos


@dataclass(frozen=True)
class Photo:
    """A photo as the classifier takes it, on its device: normalised [C, H, W], the predicted class, its probability."""

    name: str
    input: Tensor
    target: int
    score: float
    probability: float


def read_photo(name: str, image: Tensor, engine: Engine) -> Photo:
    """Return the photo with what the classifier says of it."""
    image = image.to(engine.classifier.device, engine.classifier.dtype)
    logits = engine.logits([image])[0]
    target = int(logits.argmax())
    return Photo(name, image, target, float(logits[target]), float(logits.softmax(0)[target]))


def measure_photo(engine: Engine, technique: Technique, photo: Photo, settings: Settings, disturbed: bool) -> dict[str, Any]:
    """Explain a photo's predicted class with a technique; return rows, milliseconds and qualities."""
    case = Case(engine.classifier, photo.input, photo.target, known_score=photo.score)
    job = Job(technique.method, case, technique.smoothing)
    began = time.perf_counter()
    (finished,) = engine.results([job])
    milliseconds = 1000 * (time.perf_counter() - began)
    qualities: dict[str, Quality] = {
        "infidelity": settings.infidelity,
        "deletion": settings.deletion,
        "insertion": settings.insertion,
    }
    if disturbed:
        qualities["max_sensitivity"] = settings.max_sensitivity
    measured = engine.results([Measurement(quality, job, finished.value) for quality in qualities.values()])
    values = {name: one.value.value for name, one in zip(qualities, measured, strict=True)}
    return {
        "photo": photo.name,
        "technique": technique.name,
        "rows": finished.evaluations,
        "milliseconds": milliseconds,
        "completeness_error": finished.value.completeness_error,
        **values,
    }


def make_grids(photos: Sequence[Photo], count: int) -> Iterator[tuple[str, Tensor, int, int]]:
    """Yield grids [C, 2 H, 2 W] of the surest photos of different classes: name, image, target class, its cell 0 to 3."""
    surest: Mapping[int, Photo] = {photo.target: photo for photo in sorted(photos, key=lambda photo: photo.probability)}
    chosen = sorted(surest.values(), key=lambda photo: -photo.probability)[: 4 * count]
    for number in range(len(chosen) // 4):
        four = chosen[4 * number : 4 * number + 4]
        rows = [torch.cat([left.input, right.input], 2) for left, right in (four[:2], four[2:])]
        cell = number % 4
        yield f"grid {number}", torch.cat(rows, 1), four[cell].target, cell


def measure_grid(engine: Engine, technique: Technique, name: str, image: Tensor, target: int, cell: int) -> dict[str, Any]:
    """Explain a grid for one cell's class; return the share of positive attribution in that cell (arXiv:2205.10435)."""
    score = float(engine.logits([image])[0][target])
    case = Case(engine.classifier, image, target, known_score=score)
    (finished,) = engine.results([Job(technique.method, case, technique.smoothing)])
    return {"photo": name, "technique": technique.name, "localisation": share_in_cell(finished.value.map, cell)}


def share_in_cell(attribution: Tensor, cell: int) -> float:
    """Return which part of a map's positive attribution [C, 2 H, 2 W] lies in cell 0 to 3; a quarter by chance."""
    positive = attribution.sum(0).clamp(min=0)
    height, width = positive.shape[0] // 2, positive.shape[1] // 2
    row, column = divmod(cell, 2)
    inside = positive[row * height : (row + 1) * height, column * width : (column + 1) * width].sum()
    return float(inside / positive.sum()) if float(positive.sum()) else nan
