"""Curves, ROC and confusion as pictures that stand in a page."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

DOTS = 100  # an inch
MANY = 6  # classes whose names are turned
FEW = 3  # trainings that are drawn on the training images too
SPLITS = (("training", ""), ("validation", "val_"))

Points = tuple[Sequence[float], Sequence[float]]


def save_chart(
    path: Path, panels: Mapping[str, Mapping[str, Points]], x_title: str, logarithmic: Set[str] = frozenset()
) -> None:
    """Draw a panel for each y-axis, side by side: lines by their names."""
    figure = Figure((4.2 * len(panels), 3.2), layout="constrained")
    for place, (y_title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for name, (x, y) in lines.items():
            axes.plot(x, y, label=name, marker="." if len(x) < DOTS else "")
        axes.set(xlabel=x_title, ylabel=y_title)
        if y_title in logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _save(figure, path)


def save_curves(path: Path, every: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the loss and the accuracy of each epoch, of trainings' metrics by their names.

    Of many, those on the validation images, the loss on a logarithmic axis: that of one epoch may be far from all others.
    """
    many = len(every) > FEW
    panels: dict[str, dict[str, Points]] = {"loss": {}, "accuracy": {}}
    for name, metrics in every.items():
        numbers = range(1, len(metrics["epochs"]) + 1)
        for key, lines in panels.items():
            for split, prefix in SPLITS[many:]:
                lines[f"{name}, {split}"] = (numbers, [epoch[prefix + key] for epoch in metrics["epochs"]])
    save_chart(path, panels, "epoch", {"loss"} if many else frozenset())


def save_confusion(path: Path, metrics: Mapping[str, Any]) -> None:
    """Draw how often each class of the test images is taken for each."""
    classes, counts = metrics["classes"], np.array(metrics["test"]["confusion"])
    side = 2.5 + 0.3 * len(classes)
    figure = Figure((side, side), layout="constrained")
    shown = ConfusionMatrixDisplay(counts, display_labels=classes)
    turned = "vertical" if len(classes) > MANY else "horizontal"
    shown.plot(ax=figure.add_subplot(), cmap="Blues", colorbar=False, xticks_rotation=turned)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS)
