"""Regions: which segments of the image hold the most attribution."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from skimage.morphology import isotropic_dilation
from skimage.segmentation import felzenszwalb

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, background
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.method import Attribution, Case, MaxError, Method, Steps, pixels_of
from torchserve_explain.attribution.methods.path import IntegratedGradients

SCALES = (50, 100, 150, 250, 500, 1200)  # of Felzenszwalb's segmentation, for pixels from -1 to 1
SMALLEST, MARGIN = 150, 5  # a segment's pixels, and how far it is widened, in an image of 224 x 224

Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Xrai(Method):
    """Regions ranked by the Integrated Gradients that they hold: each pixel shows the density of the region it came in with.

    Segments of six scales are added one after the other, always the one whose new pixels have the largest mean
    attribution; arXiv:1906.02825, algorithm 1, with one baseline. Signed.
    """

    name: ClassVar[str] = "xrai"

    baseline: Baseline = Baseline.BLACK
    max_error: MaxError = 0.05
    steps: Steps = None

    @property
    def path(self) -> IntegratedGradients:
        """The Integrated Gradients that are gathered."""
        return IntegratedGradients(self.baseline, self.max_error, self.steps)

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """Whether the path is."""
        return self.path.adaptive

    def evaluations(self, classifier: Classifier) -> int:
        return self.path.evaluations(classifier)

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradients = yield from self.path.attribute(case)
        attribution = gradients.map.sum(0).double().cpu().numpy()
        density = yield from background(lambda: gathered(attribution, segments(case)))
        return Attribution(torch.from_numpy(density).to(case.input)[None])


def segments(case: Case) -> Masks:
    """Return the image's segments [n, H, W] at six scales, widened so that they hold their edges."""
    pixels = pixels_of(case)
    stretched = 2 * (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-6) - 1
    side = min(pixels.shape[:2]) / 224
    smallest, margin = max(4, round(SMALLEST * side**2)), max(1, round(MARGIN * side))
    scales = (felzenszwalb(stretched, scale, 0.8, smallest) for scale in SCALES)
    return np.stack([mask for labels in scales for mask in widened(labels, margin)])


def widened(labels: NDArray[np.int64], margin: int) -> Iterator[Masks]:
    """Yield each segment's mask [H, W], wider by a margin in pixels."""
    for number, box in enumerate(find_objects(labels + 1)):
        around = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in box)
        mask = np.zeros(labels.shape, dtype=bool)
        mask[around] = isotropic_dilation(labels[around] == number, margin)  # type: ignore[no-untyped-call]
        yield mask


def gathered(attribution: NDArray[np.float64], masks: Masks) -> NDArray[np.float64]:
    """Return the map [H, W] of an attribution [H, W] gathered greedily into masks [n, H, W]."""
    values, inside = attribution.ravel(), masks.reshape(len(masks), -1)
    sums, areas = np.array([values[mask].sum() for mask in inside]), inside.sum(1)  # of each mask's pixels that are still free
    free = np.ones(values.size, dtype=bool)
    density = np.zeros(values.size)
    while areas.any():
        best = int(np.argmax(np.where(areas > 0, sums / np.maximum(areas, 1), -np.inf)))
        new = inside[best] & free
        density[new] = values[new].mean()
        free[new] = False
        sums, areas = sums - inside[:, new] @ values[new], areas - inside[:, new].sum(1)
    return density.reshape(attribution.shape)
