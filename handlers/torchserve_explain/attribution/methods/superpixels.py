"""Surrogates over superpixels: a linear model of the score with regions of the image hidden; forward rows alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.segmentation import slic
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, background, both
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.completeness import completeness_error
from torchserve_explain.attribution.methods.method import Attribution, Case, Draw, Method, Samples, pixels_of

SEGMENTS = 50  # about; SLIC decides
KERNEL_WIDTH = 0.25  # of LIME's kernel, in cosine distance
RIDGE = 1.0  # of LIME's surrogate

Floats = NDArray[np.float64]


def superpixels(pixels: Floats) -> NDArray[np.int64]:
    """Return each pixel's region [H, W], from 0, of an image [H, W, channels] in [0, 1]; SLIC, 10.1109/TPAMI.2012.120."""
    labels: NDArray[np.int64] = slic(pixels, n_segments=SEGMENTS, compactness=10, sigma=1, start_label=0, channel_axis=-1)
    return labels


class Superpixels:
    """A case's image cut into regions, each shown or hidden behind a baseline."""

    def __init__(self, case: Case, baseline: Baseline) -> None:
        self._case = case
        self._hidden = baseline.images(case)
        labels = superpixels(pixels_of(case))
        self.count = int(labels.max()) + 1
        self._labels = torch.from_numpy(labels).to(case.input.device)

    def scores(self, coalitions: Floats, baselines: Sequence[int]) -> Computation[Floats]:
        """Return the score [n] with a coalition's regions shown and the rest behind the baseline of a number, for each.

        `coalitions` [n, count] are of 0 and 1.
        """
        shown = torch.from_numpy(coalitions > 0).to(self._labels.device)

        def image(number: int) -> Tensor:
            return torch.where(shown[number][self._labels], self._case.input, self._hidden[baselines[number]])

        return np.array((yield from self._case.scores(len(coalitions), image)))

    def spread(self, weights: Floats) -> Tensor:
        """Return the map [1, H, W] in which each region's pixels share its weight evenly."""
        areas = self._labels.flatten().bincount(minlength=self.count)
        shares = torch.from_numpy(weights).to(self._case.input) / areas.clamp(min=1)
        return shares[self._labels][None]


@dataclass(frozen=True)
class Lime(Method):
    """The weights of a linear model that predicts the score from which superpixels are shown, fitted near the image.

    Ridge regression on `samples` random coalitions, weighted by exp(-d^2 / (2 * 0.25^2)), d the cosine distance to the
    whole image; arXiv:1602.04938, equation 1. A region's pixels share its weight, signed.
    """

    name: ClassVar[str] = "lime"
    needs_gradient: ClassVar[bool] = False

    baseline: Baseline = Baseline.BLACK
    samples: Samples = 200

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples

    def attribute(self, case: Case) -> Computation[Attribution]:
        regions = yield from background(Superpixels, case, self.baseline)
        draw, turn = case.draw(Draw.COALITION, 0), self.baseline.turns(case)
        coalitions = (draw.random((self.samples, regions.count)) < 0.5).astype(float)
        coalitions[0] = 1  # the image itself
        scores = yield from regions.scores(coalitions, [turn(number) for number in range(self.samples)])
        return Attribution(regions.spread(local_ridge(coalitions, scores)))


def local_ridge(coalitions: Floats, scores: Floats) -> Floats:
    """Return the ridge weights [count] of coalitions [n, count] near the full one; the intercept is not penalised."""
    distance = 1 - np.sqrt(coalitions.mean(1))
    weights = np.exp(-(distance**2) / (2 * KERNEL_WIDTH**2))
    centred, rise = (values - np.average(values, 0, weights) for values in (coalitions, scores))
    gram = centred.T @ (weights[:, None] * centred) + RIDGE * np.eye(coalitions.shape[1])
    solution: Floats = np.linalg.solve(gram, centred.T @ (weights * rise))
    return solution


@dataclass(frozen=True)
class KernelShap(Method):
    """Shapley values of superpixels: each one's mean rise of the score over all orders in which they are shown.

    Least squares over `samples` coalitions drawn by the Shapley kernel, each with its complement, under the constraint
    that the values sum to F(x) - F(b); arXiv:1705.07874, theorem 2; the pairs arXiv:2012.01536. A region's pixels share
    its value, signed. With references a pair has one of them, in turn, and its rise is that above the reference's own
    score: values of games add, so these are those of the mean game, and sum to F(x) - mean F(b).
    """

    name: ClassVar[str] = "kernel_shap"
    needs_gradient: ClassVar[bool] = False

    baseline: Baseline = Baseline.BLACK
    samples: Samples = 200

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples + 1 + self.baseline.score_rows  # all regions, and none where that is not known

    def attribute(self, case: Case) -> Computation[Attribution]:
        regions = yield from background(Superpixels, case, self.baseline)
        drawn, turn = shapley_coalitions(regions.count, self.samples, case.draw(Draw.COALITION, 0)), self.baseline.turns(case)
        behind = [0, *(turn(number // 2) for number in range(self.samples))]
        asked = regions.scores(np.concatenate([np.ones((1, regions.count)), drawn]), behind)
        (whole, *scores), nothing = yield from both(asked, self.baseline.scores(case))
        own = np.array(nothing)[behind[1:]]
        values = shapley_values(drawn, np.array(scores) - own, whole - own)
        values += (np.mean(own) - np.mean(nothing)) / regions.count  # all references count alike, however many were drawn
        attribution = regions.spread(values)
        return Attribution(attribution, fmean(nothing), completeness_error(float(attribution.sum()), whole, fmean(nothing)))


def shapley_coalitions(count: int, samples: int, draw: np.random.Generator) -> Floats:
    """Return random coalitions [samples, count] whose sizes follow the Shapley kernel; the odd ones complement the even."""
    sizes = np.arange(1, max(count, 2))
    chances = 1 / (sizes * (sizes[-1] + 1 - sizes))
    pairs: list[Floats] = []
    for size in draw.choice(sizes, -(-samples // 2), p=chances / chances.sum()):
        one = (draw.permutation(count) < size).astype(float)
        pairs += [one, 1 - one]
    return np.stack(pairs)[:samples]


def shapley_values(coalitions: Floats, rises: Floats, totals: Floats) -> Floats:
    """Return the values [count] that sum to the mean of `totals` and fit the rises best; the smallest where many do.

    Each coalition's rise is of a game of its own, whose values sum to its total.
    """
    shares = coalitions.mean(1, keepdims=True)
    # What is left of coalitions to values that sum to zero, beside even ones.
    solution: Floats = np.linalg.lstsq(coalitions - shares, rises - shares[:, 0] * totals, rcond=None)[0]
    solution += np.mean(totals) / coalitions.shape[1]
    return solution
