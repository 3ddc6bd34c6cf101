"""A classifier that an experiment trains by one of training's recipes, loaded as a server would load it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from torchserve_explain.archive import Archive
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Attribution, Case, Method, Smoothing
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.quality import Measurement, Quality
from torchserve_explain.attribution.rows import Score
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.pictures import Map
from torchserve_explain.serving.settings import Preprocessing
from training.__main__ import main as training
from training.data import PIXELS
from training.export import METRICS

PACK = 16  # rows of a pass
Pixels = NDArray[np.uint8]


Row = dict[str, object]  # of a table


class NotTrained(Exception):
    """Training has refused; it has said why."""


@dataclass(frozen=True)
class Trained:
    """A trained classifier: its passes, its preprocessing, its classes, and what training measured."""

    engine: Engine
    preprocessing: Preprocessing
    classes: list[str]
    metrics: dict[str, Any]

    def input(self, pixels: Pixels) -> Tensor:
        """Return what the classifier takes for an image [H, W, 3] of its own size."""
        inputs: Tensor = self.preprocessing.normalization(to_tensor(Image.fromarray(pixels)))
        return inputs

    def pixels(self, path: Path) -> Pixels:
        """Return what the classifier sees of a file, as an image [H, W, 3]."""
        return np.asarray(read_picture(path.read_bytes(), self.preprocessing, PIXELS).seen)

    def logits(self, images: Sequence[Pixels]) -> Tensor:
        """Return the logits [n, classes] of images."""
        return self.engine.logits([self.input(image) for image in images])

    def maps(
        self,
        images: Sequence[Pixels],
        targets: Sequence[int],
        method: Method,
        smoothing: Smoothing | None = None,
        score: Score = Score.LOGIT,
    ) -> list[Map]:
        """Explain each image's target; return the maps [H, W], summed over colours."""
        scores = self.logits(images)
        scores = scores if score is Score.LOGIT else scores.softmax(1)
        cases = [
            replace(self._case(image, target), score=score, known_score=float(known[target]))
            for image, target, known in zip(images, targets, scores, strict=True)
        ]
        finished = self.engine.results([Job(method, case, smoothing) for case in cases])
        return [one.value.map.sum(0).float().cpu().numpy() for one in finished]

    def _case(self, image: Pixels, target: int) -> Case:
        return Case(self.engine.classifier, self.input(image), target)

    def quality(self, images: Sequence[Pixels], targets: Sequence[int], maps: Sequence[Map], quality: Quality) -> float:
        """Return the mean of a quality of maps [H, W] of the images' targets, whichever method has made them."""
        measured = self.engine.results(
            [
                Measurement(quality, Job(GradCam(), self._case(image, target)), Attribution(torch.from_numpy(values)[None]))
                for image, target, values in zip(images, targets, maps, strict=True)
            ]
        )
        return float(np.mean([one.value.value for one in measured]))


def train(recipe: str, data: Path, out: Path, *options: str) -> Trained:
    """Train by a recipe, or go on where that was stopped; raises NotTrained."""
    if training([recipe, "--data", str(data), "--out", str(out), *options]) != 0:
        raise NotTrained(recipe)
    return load(out)


def accuracies(every: Mapping[str, Trained]) -> list[Row]:
    """Return each classifier's accuracies and losses: of the training images in the last epoch, of the others by the best."""
    rows: list[Row] = []
    for name, trained in every.items():
        metrics = trained.metrics
        splits = {"train": metrics["epochs"][-1], "val": metrics["val"], "test": metrics["test"]}
        row: Row = {"classifier": name, "epochs": len(metrics["epochs"])}
        for key in ("accuracy", "loss"):
            row |= {f"{key}, {split}": scores[key] for split, scores in splits.items()}
        rows.append(row | {"seconds": round(metrics["seconds"])})
    return rows


def load(folder: Path) -> Trained:
    """Load a classifier that training has written."""
    archive = Archive.load(folder)
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return Trained(Engine(archive.classifier, PACK), archive.settings.preprocessing, metrics["classes"], metrics)
