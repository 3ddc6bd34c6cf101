"""How far two versions of a classifier are apart on the same pictures: predictions, and maps by rank, angle and mass."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata
from skimage.segmentation import slic

from torchserve_explain.serving.pictures import Map

SEGMENTS = 50  # of a picture, about; SLIC decides
Crop = Sequence[int]  # left, top, right, bottom in the upright original's pixels
Box = tuple[float, float, float, float]  # likewise, of a map or an image


@dataclass(frozen=True)
class Movement:
    """How far a picture's map moved; None where one of the maps is constant, or has no positive value.

    `rank_correlation` is Spearman's, `cosine` that of the values, both 1 where nothing moved; `moved_mass` is the fraction
    (0 to 1) of the positive values' sum that lies in other segments of the picture than before.
    """

    rank_correlation: float | None
    cosine: float | None
    moved_mass: float | None


@dataclass(frozen=True)
class Version:
    """What one version says of a picture."""

    predicted: str
    probability: float


@dataclass(frozen=True)
class Compared:
    """A picture under both versions: its label, where it has one; predictions; movements by the map's name."""

    path: str
    label: str | None
    target: str
    old: Version
    new: Version
    maps: Mapping[str, Movement | None]  # None: a version has no map of it

    @property
    def changed(self) -> bool:
        """Whether the prediction is another one."""
        return self.old.predicted != self.new.predicted

    @property
    def fixed(self) -> bool:
        """Whether the old version was wrong and the new one is right."""
        return self.changed and self.new.predicted == self.label

    @property
    def broken(self) -> bool:
        """Whether the old version was right and the new one is wrong."""
        return self.changed and self.old.predicted == self.label


@dataclass(frozen=True)
class Threshold:
    """A measure beside its limit, which is the least that is allowed, or the most."""

    name: str
    measured: float
    limit: float
    least: bool

    @property
    def met(self) -> bool:
        """Whether the measure is within its limit; one that is NaN is not."""
        return self.measured >= self.limit if self.least else self.measured <= self.limit


def on_one_frame(old: Map, old_crop: Crop, new: Map, new_crop: Crop) -> tuple[Map, Map, Crop]:
    """Return two maps of a picture over the part that both versions see, with as few values as the coarser has there."""
    crop = (*map(max, old_crop[:2], new_crop[:2]), *map(min, old_crop[2:], new_crop[2:]))
    boxes = [_box(values.shape, seen, crop) for values, seen in ((old, old_crop), (new, new_crop))]
    width = min(max(1, round(right - left)) for left, _, right, _ in boxes)
    height = min(max(1, round(bottom - top)) for _, top, _, bottom in boxes)
    before, after = (_cut(values, box, (width, height)) for values, box in zip((old, new), boxes, strict=True))
    return before, after, crop


def _cut(values: Map, box: Box, size: tuple[int, int]) -> Map:
    """Return a part of a map, averaged down to a size (width, height)."""
    height, width = values.shape
    wide = values.astype(np.float32)
    whole = [*size, *box] == [width, height, 0, 0, width, height]
    return wide if whole else np.asarray(Image.fromarray(wide).resize(size, Image.Resampling.BOX, box=box))


def _box(shape: tuple[int, ...], seen: Crop, crop: Crop) -> Box:
    """Return where a part of the original lies on what was seen of it, an image or a map of height and width `shape`."""
    across, down = shape[1] / (seen[2] - seen[0]), shape[0] / (seen[3] - seen[1])
    left, top, right, bottom = crop
    return (left - seen[0]) * across, (top - seen[1]) * down, (right - seen[0]) * across, (bottom - seen[1]) * down


def segments_of(seen: Image.Image, seen_crop: Crop, crop: Crop, size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the segment's number of each pixel [H, W] of a part of a picture, by SLIC (10.1109/TPAMI.2012.120)."""
    box = _box((seen.height, seen.width), seen_crop, crop)
    pixels = np.asarray(seen.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=box)) / 255
    labels: NDArray[np.int64] = slic(pixels, n_segments=SEGMENTS, compactness=10, sigma=1, start_label=0, channel_axis=-1)
    return labels


def movement(old: Map, new: Map, segments: NDArray[np.int64]) -> Movement:
    """Return how far a map [H, W] moved over a picture's segments [H, W]."""
    before, after = (values.astype(np.float64).ravel() for values in (old, new))
    ranks = [rankdata(values) for values in (before, after)]
    shares = [np.bincount(segments.ravel(), values.clip(min=0)) for values in (before, after)]
    moved = None
    if all(share.sum() > 0 for share in shares):
        moved = float(np.abs(shares[0] / shares[0].sum() - shares[1] / shares[1].sum()).sum() / 2)
    return Movement(_cosine(*(rank - rank.mean() for rank in ranks)), _cosine(before, after), moved)


def _cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    lengths = float(np.sqrt((first @ first) * (second @ second)))  # one root: exactly 1 where nothing moved
    return float(first @ second) / lengths if lengths else None


def accuracies(pictures: Sequence[Compared]) -> tuple[float, float] | None:
    """Return the fraction that each version predicts right; None without labels."""
    labelled = [one for one in pictures if one.label is not None]
    if not labelled:
        return None
    old, new = (sum(getattr(one, which).predicted == one.label for one in labelled) for which in ("old", "new"))
    return old / len(labelled), new / len(labelled)


def changed_share(pictures: Sequence[Compared]) -> float:
    """Return the fraction whose prediction changed."""
    return sum(one.changed for one in pictures) / len(pictures)


def changes(pictures: Sequence[Compared]) -> list[tuple[tuple[str, str], int]]:
    """Return which prediction became which, and how often, most often first."""
    return Counter((one.old.predicted, one.new.predicted) for one in pictures if one.changed).most_common()


def quantile(pictures: Sequence[Compared], name: str, measure: str, share: float) -> float:
    """Return a quantile over the pictures of a map's measure; NaN where no picture has it."""
    found = (getattr(one.maps[name], measure, None) for one in pictures)
    values = [value for value in found if value is not None]
    return float(np.quantile(values, share)) if values else float("nan")


def most_moved(pictures: Iterable[Compared], name: str, count: int) -> list[Compared]:
    """Return the pictures of which most of a map's mass moved, the farthest first."""

    def moved(one: Compared) -> float:
        return getattr(one.maps[name], "moved_mass", None) or 0.0

    return sorted(pictures, key=lambda one: (-moved(one), one.path))[:count]


def thresholds(pictures: Sequence[Compared], names: Sequence[str], limits: Mapping[str, float | None]) -> list[Threshold]:
    """Return the measures that have a limit; those of maps are of the picture in the middle, for each map's name."""
    found: list[Threshold] = []
    for key, measure in (("accuracy_drop", _drop), ("changed", changed_share)):
        if (limit := limits.get(key)) is not None:
            found.append(Threshold(key, measure(pictures), limit, least=False))
    for key in ("rank_correlation", "cosine", "moved_mass"):
        if (limit := limits.get(key)) is not None:
            least = key != "moved_mass"
            found += [Threshold(f"{key}, {name}", quantile(pictures, name, key, 0.5), limit, least) for name in names]
    return found


def _drop(pictures: Sequence[Compared]) -> float:
    """Return by how much the accuracy fell; below 0 where it rose, NaN without labels."""
    both = accuracies(pictures)
    return both[0] - both[1] if both else float("nan")


def as_json(pictures: Sequence[Compared], found: Sequence[Threshold]) -> dict[str, Any]:
    """Return all that was measured, ready for JSON."""
    both = accuracies(pictures)
    return {
        "accuracy": None if both is None else {"old": both[0], "new": both[1]},
        "changed": changed_share(pictures),
        "thresholds": [asdict(one) | {"met": one.met} for one in found],
        "pictures": [asdict(one) | {"changed": one.changed} for one in pictures],
    }
