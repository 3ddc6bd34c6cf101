"""The report page of a training: curves, confusion, classes, and what was predicted wrongly, with its explanation."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from torchserve_explain.attribution.engine import Engine
from torchserve_explain.serving.images import Picture, read_picture
from torchserve_explain.serving.pictures import Scale, draw_overlay, fitted, small_png
from torchserve_explain.serving.settings import Preprocessing
from training.charts import Line, chart
from training.data import PIXELS, Data
from training.maps import explain, job_of

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html")
EXAMPLES = 8
LARGEST_TABLE = 20  # classes; of more, only what is confused is listed


@dataclass(frozen=True)
class Example:
    """An image, what it was taken for and what it is, and the maps of both, as PNG in base64."""

    name: str
    truth: str
    predicted: str
    probability: float
    seen: str
    maps: list[tuple[str, str]]


def write_report(
    out: Path, metrics: dict[str, Any], data: Data, engine: Engine, logits: Tensor, preprocessing: Preprocessing
) -> None:
    """Write report.html; `logits` [n, classes] are those of the test images."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": lambda share: f"{100 * share:.1f} %"}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=out.name,
        metrics=metrics,
        curves=curves(metrics["epochs"]),
        rocs=rocs(metrics),
        confused=confused(metrics),
        small=len(data.classes) <= LARGEST_TABLE,
        examples=list(examples(engine, data, logits, preprocessing, metrics["method"])),
    )
    (out / REPORT).write_text(text, encoding="utf-8")


def curves(epochs: Sequence[dict[str, float]]) -> dict[str, tuple[Markup, list[Line]]]:
    """Return the diagrams over the epochs by what they show: each drawn, and its lines."""
    keys = {"loss": ("loss", "val_loss"), "accuracy": ("accuracy", "val_accuracy")}
    names, numbers = ("training images", "validation images"), range(1, len(epochs) + 1)
    drawn = {}
    for title, pair in keys.items() if epochs else ():
        lines = [Line(name, numbers, [epoch[key] for epoch in epochs]) for name, key in zip(names, pair, strict=True)]
        drawn[title] = (Markup(chart(lines, "epoch", title)), lines)
    return drawn


def rocs(metrics: dict[str, Any]) -> dict[str, Markup]:
    """Return the receiver operating characteristic of each split that has one, drawn."""
    title = f"true positives of {metrics['classes'][1]}"
    lines = {split: Line(split, roc["false_positives"], roc["true_positives"]) for split, roc in metrics.get("roc", {}).items()}
    return {split: Markup(chart([line], "false positives", title)) for split, line in lines.items()}


def confused(metrics: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Return the pairs of a true and a predicted class that are confused most, and how often."""
    counts, names = np.array(metrics["test"]["confusion"]), metrics["classes"]
    np.fill_diagonal(counts, 0)
    order = counts.ravel().argsort(kind="stable")[::-1][:LARGEST_TABLE]
    pairs = ((int(place) // len(names), int(place) % len(names)) for place in order)
    return [(names[row], names[column], int(counts[row, column])) for row, column in pairs if counts[row, column]]


def examples(engine: Engine, data: Data, logits: Tensor, preprocessing: Preprocessing, method: str) -> Iterator[Example]:
    """Yield the test images that were predicted wrongly, the surest first; where there are none, the least sure ones."""
    probability, predicted = logits.softmax(1).max(1)
    truth = torch.tensor([sample.label for sample in data.splits["test"]])
    wrong = (predicted != truth).nonzero()[:, 0]
    order = wrong[probability[wrong].argsort(descending=True)] if len(wrong) else probability.argsort()
    for place in order[:EXAMPLES].tolist():
        sample = data.splits["test"][place]
        picture = read_picture(sample.path.read_bytes(), preprocessing, PIXELS)
        targets = dict.fromkeys((int(predicted[place]), sample.label))
        maps = [(data.classes[target], overlay(engine, picture, target, method)) for target in targets]
        names = data.classes[sample.label], data.classes[int(predicted[place])]
        yield Example(sample.path.name, *names, float(probability[place]), encoded(picture.seen), maps)


def overlay(engine: Engine, picture: Picture, target: int, method: str) -> str:
    """Explain a picture's target and lay the map over it."""
    job = job_of(engine, picture, target, method)
    values, seen = fitted(explain(engine, [job])[0], picture.seen)
    return encoded(draw_overlay(values, Scale.of(values, job.signed, None, 99), seen, 0.5))


def encoded(image: Image.Image) -> str:
    """Return a picture as base64 of its PNG."""
    return base64.b64encode(small_png(image)).decode()
