"""Where the techniques' maps lie against boxes around what the photos show, beside guesses: the centre, and chance."""

import csv
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from study.measure import Photo, read_photo
from study.techniques import SMOOTHED, Technique
from torchserve_explain.archive import Archive
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.localization import Mask
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.attribution.methods.bisection import PathRule
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.gallery.located import CENTRE, RANDOM, measure
from torchserve_explain.gallery.truth import read_truth
from torchserve_explain.records import Record
from torchserve_explain.serving.images import read_picture

# Fewer than their defaults, so that many photos take no day.
SAMPLES = {"gradient_shap": 25, "score_cam": 64, "rise": 150, "lime": 100, "kernel_shap": 100}
PIXELS = 10**8
IDGI = Technique("integrated_gradients idgi", IntegratedGradients(rule=PathRule.IDGI))
TITLES = {"pointing_game": "pointing game", "mass_accuracy": "mass accuracy", "rank_accuracy": "rank accuracy"}
Means = Mapping[str, Mapping[str, Mapping[str, float]]]  # by network, technique, measure


def located_techniques(classifier: Classifier) -> Iterator[Technique]:
    """Yield every method that serves the classifier, cheapened where it samples, and two variants."""
    of_each = (
        Technique(name, method(**({"samples": SAMPLES[name]} if name in SAMPLES else {}))) for name, method in METHODS.items()
    )
    yield from (one for one in (*of_each, IDGI, SMOOTHED) if one.method.unsupported(classifier) is None)


def is_costly(technique: Technique, classifier: Classifier) -> bool:
    """Whether a map takes more than ten rows."""
    copies = 1 if technique.smoothing is None else technique.smoothing.samples
    return technique.method.adaptive or copies * technique.method.evaluations(classifier) > 10


def located_photos(boxes: Path, folder: Path, archive: Archive, engine: Engine) -> Iterator[tuple[Photo, Mask]]:
    """Yield the photos of a file of boxes with their masks; the target is the `class_index` there, if there is one."""
    with boxes.open(encoding="utf-8", newline="") as stream:
        classes = {line["file"]: line.get("class_index") for line in csv.DictReader(stream)}
    preprocessing = archive.settings.preprocessing
    truth = read_truth(None, boxes, folder, classes, preprocessing, PIXELS)
    assert truth is not None
    for name, index in classes.items():
        if (mask := truth.mask(name)) is not None:
            photo = read_photo(name, read_picture((folder / name).read_bytes(), preprocessing, PIXELS).input, engine)
            if index is not None:
                photo = replace(photo, target=int(index), score=float(engine.logits([photo.input])[0][int(index)]))
            yield photo, mask


def measure_located(engine: Engine, technique: Technique, photo: Photo, mask: Mask) -> list[Record]:
    """Explain a photo's class; return a record of the map's scores, and those of the guesses."""
    case = Case(engine.classifier, photo.input, photo.target, known_score=photo.score)
    began = time.perf_counter()
    (finished,) = engine.results([Job(technique.method, case, technique.smoothing)])
    cost = {"rows": finished.evaluations, "milliseconds": 1000 * (time.perf_counter() - began)}
    scores = measure({technique.name: finished.value.map.sum(0).double().cpu().numpy()}, mask)
    return [
        {"photo": photo.name, "technique": name, **(cost if name == technique.name else {}), **found}
        for name, found in scores.items()
    ]


def located_means(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return each technique's mean scores over its photos, and how far above the centre's its rank accuracy is there."""
    found: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        found[record["technique"]][record["photo"]] = record
    means = {}
    for name, photos in found.items():
        scores = {key: mean(one[key] for one in photos.values()) for key in TITLES}
        above = mean(one["rank_accuracy"] - found[CENTRE][photo]["rank_accuracy"] for photo, one in photos.items())
        means[name] = {**scores, "above": above, "photos": len(photos)}
    return dict(sorted(means.items(), key=lambda item: -item[1]["above"]))


def located_markdown(found: Means) -> str:
    """Return the table of some networks' means, in the order of the first."""
    titles = (f"{network}: {title}" for network in found for title in (*TITLES.values(), "above the centre's", "photos"))
    lines = [f"| technique | {' | '.join(titles)} |", "|" + "---|" * (5 * len(found) + 1)]
    for name in next(iter(found.values())):
        cells = [cell for means in found.values() for cell in _cells(means.get(name))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(scores: Mapping[str, float] | None) -> list[str]:
    if scores is None:
        return ["-"] * 5
    return [*(f"{scores[key]:.0%}" for key in TITLES), f"{scores['above']:+.0%}", f"{scores['photos']}"]


def draw_located(found: Means, path: Path) -> None:
    """Draw the means of some networks side by side: a row for each technique, a mark for each measure."""
    from matplotlib.figure import Figure

    order: Sequence[str] = [name for name in next(iter(found.values())) if name not in (CENTRE, RANDOM)][::-1]
    figure = Figure(figsize=(5.2 * len(found) + 1.6, 0.3 * len(order) + 1.3), layout="constrained")
    for axes, (network, means) in zip(
        figure.subplots(1, len(found), squeeze=False, sharey=True)[0], found.items(), strict=True
    ):
        for marker, colour, (key, title) in zip("osD", ("#1f5a91", "#c0504d", "#5b8c3a"), TITLES.items(), strict=True):
            shown = [name for name in order if name in means]
            axes.plot([means[name][key] for name in shown], shown, marker, color=colour, label=title)
            axes.axvline(means[CENTRE][key], color=colour, linestyle="--", linewidth=1)
        axes.axvline(means[RANDOM]["mass_accuracy"], color="gray", linestyle=":", linewidth=1.5, label="chance")
        axes.set(title=f"{network} (dashed: guessing the centre)", xlim=(0, 1))
        axes.grid(axis="y", linewidth=0.3)
    figure.axes[0].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)
