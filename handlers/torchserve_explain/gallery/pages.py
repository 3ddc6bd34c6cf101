"""What pages show: where a gallery's files lie, its pictures by class with right and wrong predictions apart, mean maps."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torchserve_explain.records import Record
from torchserve_explain.serving.pictures import Map, Scale, draw_heatmap, png

PICTURES, MEANS, CLASSES = "pictures", "means", "classes"  # folders; the last two are written anew each time
FAILED = "failed"  # key of a record: why there is no map
QUALITY = 85  # of pictures in WebP
CLIP = 99  # percentile of |value| that gets full colour in a mean map


def map_path(out: Path, record: Record) -> Path:
    """Return where a record's map lies: float16 [H, W], positive where it raises the score."""
    return Path(out, PICTURES, record["path"], f"{record['map']}.npy")


def overlay_path(out: Path, record: Record) -> Path:
    """Return where a record's map lies, laid over the picture."""
    return Path(out, PICTURES, record["path"], f"{record['map']}.webp")


def seen_path(out: Path, record: Record) -> Path:
    """Return where what the model saw of a record's picture lies."""
    return Path(out, PICTURES, record["path"], "seen.webp")


@dataclass(frozen=True)
class Overview:
    """What the pages tell beside the records: the classifier, its labels, the folder, what is explained, what it is
    compared with, and what is skipped."""

    classifier: str
    labels: Sequence[str]
    folder: str
    target: str
    versus: str
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class Shot:
    """A picture on a page: what every record of it tells, and its records by the map's name."""

    facts: Record
    records: dict[str, Record] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassGroup:
    """The pictures of a class, in parts, each surest first; `number` is the class's first index, which names its page."""

    label: str
    number: int
    parts: dict[str, list[Shot]]

    @property
    def count(self) -> int:
        """How many pictures the class has."""
        return sum(map(len, self.parts.values()))

    @property
    def right(self) -> int:
        """How many are known to be predicted right."""
        return len(self.parts.get("correct", ()))

    @property
    def explained(self) -> list[Shot]:
        """Those whose maps tell what the class is known by: what is predicted right, or without labels as the class."""
        return self.parts.get("correct", self.parts.get("predicted", []))

    @property
    def accuracy(self) -> float | None:
        """The fraction that is predicted right; None without labels."""
        return self.right / self.count if "correct" in self.parts else None

    @property
    def mistaken(self) -> list[tuple[str, int]]:
        """What the class is taken for instead, and how often, most often first."""
        return Counter(shot.facts["predicted"] for shot in self.parts.get("wrong", ())).most_common()


def group(records: Iterable[Record], labels: Sequence[str]) -> list[ClassGroup]:
    """Return the classes, by label and worst accuracy first, or without labels by prediction, the most frequent first."""
    shots: dict[str, Shot] = {}
    for record in records:
        shots.setdefault(record["path"], Shot(record)).records[record["map"]] = record
    groups: dict[str, ClassGroup] = {}
    for shot in sorted(shots.values(), key=lambda shot: (-shot.facts["probability"], shot.facts["path"])):
        label, correct = shot.facts["label"] or shot.facts["predicted"], shot.facts["correct"]
        parts: dict[str, list[Shot]] = {"predicted": []} if correct is None else {"wrong": [], "correct": []}
        found = groups.setdefault(label, ClassGroup(label, labels.index(label), parts))
        found.parts["predicted" if correct is None else "correct" if correct else "wrong"].append(shot)
    return sorted(groups.values(), key=lambda one: (one.accuracy or 0, -one.count, one.number))


def mean_map(maps: Iterable[Map]) -> Map | None:
    """Return the mean of maps [H, W], signs kept, each first divided by the sum of its absolute values; None of none.

    So every picture weighs the same, however large its score is. A map of zeros stays one. One map is held at a time.
    """
    count, total = 0, np.zeros(())
    for count, values in enumerate(maps, 1):  # noqa: B007 (the last count is how many there were)
        wide = values.astype(np.float64)
        total = total + wide / (np.abs(wide).sum() or 1)
    return (total / count).astype(np.float32) if count else None


def stored(out: Path, records: Iterable[Record]) -> Iterator[Map]:
    """Yield the maps of records, one at a time."""
    return (np.load(map_path(out, record), allow_pickle=False) for record in records)


def write_mean(out: Path, stem: str, records: Sequence[Record]) -> str:
    """Write the mean map of records that have one, and its picture; return the picture's path."""
    mean = mean_map(stored(out, records))
    assert mean is not None
    np.save(out / MEANS / f"{stem}.npy", mean, allow_pickle=False)
    picture = draw_heatmap(mean, Scale.of(mean, records[0]["signed"], None, CLIP))
    (out / MEANS / f"{stem}.png").write_bytes(png(picture))
    return f"{MEANS}/{stem}.png"
