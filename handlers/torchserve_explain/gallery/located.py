"""Maps against ground truth, over the pictures of each class and of all, beside the centre and chance."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchserve_explain.attribution.localization import LOCALIZATIONS, Mask, Values, centre_map

CENTRE, RANDOM = "centre", "random"  # baselines: a map that is a Gaussian in the middle, and what chance scores
Scores = dict[str, float]  # by the measure's name


@dataclass(frozen=True)
class Located:
    """The mean scores of a map, or of a baseline, over pictures of a class; the label is None over all."""

    label: str | None
    map: str
    pictures: int
    scores: Scores


def measure(maps: Mapping[str, Values], mask: Mask) -> dict[str, Scores]:
    """Return the scores of a picture's maps [H, W] by their names, and those of the baselines."""
    every = {**maps, CENTRE: centre_map(*mask.shape)}
    found = {
        name: {measured: score(values, mask) for measured, score in LOCALIZATIONS.items()} for name, values in every.items()
    }
    return found | {RANDOM: dict.fromkeys(LOCALIZATIONS, float(mask.mean()))}


def summary(measured: Iterable[tuple[str, Mapping[str, Scores]]]) -> list[Located]:
    """Return the means over all pictures, given with their labels, and over those of each label."""
    found: dict[tuple[str | None, str], list[Scores]] = defaultdict(list)
    for label, scores in measured:
        for name, one in scores.items():
            found[None, name].append(one)
            found[label, name].append(one)
    rows = [
        Located(label, name, len(several), {key: float(np.mean([one[key] for one in several])) for key in LOCALIZATIONS})
        for (label, name), several in found.items()
    ]
    return sorted(rows, key=lambda row: (row.label or "", row.map in (CENTRE, RANDOM)))


def write_table(path: Path, rows: Sequence[Located]) -> None:
    """Write the means as CSV; the class is empty over all."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["class", "map", "pictures", *LOCALIZATIONS])
        lines.writerows([row.label or "", row.map, row.pictures, *row.scores.values()] for row in rows)
