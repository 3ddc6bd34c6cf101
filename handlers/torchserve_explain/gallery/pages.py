"""What is browsed: a page for each class with right and wrong predictions apart, class-mean maps, and an overview."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.records import Record
from torchserve_explain.serving.capabilities import first_sentence
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


def write_gallery(out: Path, records: Sequence[Record], overview: Overview) -> Path:
    """Write pages and mean maps of records whose maps and pictures lie in `out`; return the overview's path."""
    for folder in (MEANS, CLASSES):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir()
    groups = group(records, overview.labels)
    means = {one.number: _write_means(out, one) for one in groups}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {"meaning": lambda method: first_sentence(METHODS[method])}
    environment.undefined = jinja2.StrictUndefined
    parts = tuple(groups[0].parts) if groups else ()
    shown = {"maps": _maps(records), "parts": parts, "labelled": "correct" in parts, "pictures": PICTURES}
    common: dict[str, Any] = {"overview": overview, "groups": groups, "means": means, **shown}
    template = environment.get_template("gallery.html")
    for place, one in enumerate(groups):
        beside = {"before": groups[place - 1] if place else None, "after": dict(enumerate(groups)).get(place + 1)}
        page = template.render(common | beside, group=one, root="../")
        (out / CLASSES / f"{one.number}.html").write_text(page, encoding="utf-8")
    (out / "index.html").write_text(template.render(common, group=None, root=""), encoding="utf-8")
    return out / "index.html"


def _maps(records: Iterable[Record]) -> dict[str, Record]:
    """Return a record of each map's name, to tell its method, parameters and sign."""
    return {record["map"]: record for record in records if record[FAILED] is None}


def _write_means(out: Path, one: ClassGroup) -> dict[tuple[str, str], str]:
    """Write a class's mean maps and their pictures; return the pictures' names by part and map."""
    written: dict[tuple[str, str], str] = {}
    for part, shots in one.parts.items():
        for name, record in _maps(record for shot in shots for record in shot.records.values()).items():
            mean = mean_map(_stored(out, shots, name))
            assert mean is not None
            stem = f"{MEANS}/{one.number}-{part}-{name}"
            np.save(out / f"{stem}.npy", mean, allow_pickle=False)
            (out / f"{stem}.png").write_bytes(png(draw_heatmap(mean, Scale.of(mean, record["signed"], None, CLIP))))
            written[part, name] = f"{stem}.png"
    return written


def _stored(out: Path, shots: Iterable[Shot], name: str) -> Iterator[Map]:
    for shot in shots:
        if (record := shot.records.get(name)) is not None and record[FAILED] is None:
            yield np.load(map_path(out, record), allow_pickle=False)
