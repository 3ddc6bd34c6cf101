"""What a class is known by: clusters of its maps, the segment that holds most of each, and pictures that differ."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from torchserve_explain.attribution.methods.superpixels import superpixels
from torchserve_explain.gallery.located import RANDOM, Scores
from torchserve_explain.gallery.pages import FAILED, ClassGroup, Shot, map_path, seen_path, stored, write_mean
from torchserve_explain.gallery.shortcuts import Cluster, find_clusters
from torchserve_explain.records import Record
from torchserve_explain.serving.pictures import Map

SHOWN = 6  # pictures of a cluster
MOST = 2000  # maps of a class that are clustered, drawn evenly: the time grows with their cube
MASS = "mass_accuracy"
Measured = Mapping[str, Mapping[str, Scores]]  # by picture and map


@dataclass(frozen=True)
class Segment:
    """The superpixel that holds most of a map's positive part: its share of that and of the image, and the box around it.

    The box is left, top, width and height, in shares of the image.
    """

    share: float
    area: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Reason:
    """Right pictures of a class whose maps of a name are alike, or lie outside of the masks (without a cluster).

    `examples` are some of their records with the segment that holds most of the map; `mean` is their mean map's path.
    """

    map: str
    shots: list[Shot]
    examples: list[tuple[Record, Segment]]
    mean: str
    cluster: Cluster | None
    different: bool


def find_reasons(out: Path, group: ClassGroup, name: str, measured: Measured) -> Iterator[Reason]:
    """Yield the reasons for a class by its maps of a name, the largest cluster first; writes their mean maps."""
    shots = [shot for shot in group.explained if name in _mapped(shot)]
    some = shots[:: -(-len(shots) // MOST) or 1]

    def reason(number: int, found: list[Shot], cluster: Cluster | None, different: bool) -> Reason:
        records = [shot.records[name] for shot in found]
        mean = write_mean(out, f"{group.number}-reason-{number}-{name}", records)
        return Reason(name, found, [(one, _segment(out, one)) for one in records[:SHOWN]], mean, cluster, different)

    clusters = find_clusters(stored(out, (shot.records[name] for shot in some))) if some else []
    for number, cluster in enumerate(reversed(clusters)):
        yield reason(number, [some[place] for place in cluster.places], cluster, cluster.suspicious(len(some)))
    outside = [shot for shot in shots if shot.facts["path"] in measured and _outside(measured[shot.facts["path"]], name)]
    if outside:
        yield reason(len(clusters), outside, None, True)


def _mapped(shot: Shot) -> set[str]:
    return {name for name, record in shot.records.items() if record[FAILED] is None}


def _outside(scores: Mapping[str, Scores], name: str) -> bool:
    """Whether most of a map lies outside of the mask, and less within it than by chance."""
    return scores[name][MASS] < min(0.5, scores[RANDOM][MASS])


def _segment(out: Path, record: Record) -> Segment:
    values = np.load(map_path(out, record), allow_pickle=False).astype(np.float32)
    return top_segment(values, Image.open(seen_path(out, record)))


def write_different(path: Path, reasons: Iterable[tuple[ClassGroup, Reason]]) -> None:
    """Write as CSV which right pictures of which class have another reason by which map, and why that is thought."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["path", "class", "map", "why"])
        for group, reason in reasons:
            why = "outside the mask" if reason.cluster is None else "a cluster of its own"
            lines.writerows([shot.facts["path"], group.label, reason.map, why] for shot in reason.shots)


def top_segment(values: Map, seen: Image.Image) -> Segment:
    """Return the segment of what the model saw that holds most of a map [H, W]."""
    height, width = values.shape
    labels = superpixels(np.asarray(seen.convert("RGB").resize((width, height))) / 255)
    held = np.bincount(labels.ravel(), values.clip(min=0).ravel())
    best = labels == held.argmax()
    (top, left), (bottom, right) = (end(np.nonzero(best), 1) for end in (np.min, np.max))
    box = left / width, top / height, (right + 1 - left) / width, (bottom + 1 - top) / height
    return Segment(float(held.max() / (held.sum() or 1)), float(best.mean()), box)
