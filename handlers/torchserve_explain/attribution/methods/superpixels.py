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
from torchserve_explain.attribution.methods.drawing import DrawingMethod
from torchserve_explain.attribution.methods.method import Attribution, Case, Draw, Family, pixels_of

SEGMENTS = 50  # about; SLIC decides
FREEDOM = 3  # samples more than values, at least, for their spread to tell anything
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

    def sampling_error(self, fit: "Fit", weights: Floats) -> float | None:
        """Return the sampling error of the map of these weights, whose variances are those of a fit; see DrawingMethod."""
        if fit.variances is None:
            return None
        areas = self._labels.flatten().bincount(minlength=self.count).clamp(min=1).cpu().numpy()
        squared = float((weights**2 / areas).sum())
        return float(np.sqrt((fit.variances / areas).sum() / max(squared, 1e-24)))


@dataclass(frozen=True)
class Lime(DrawingMethod):
    """The weights of a linear model that predicts the score from which superpixels are shown, fitted near the image.

    Ridge regression on `samples` random coalitions, weighted by exp(-d^2 / (2 * 0.25^2)), d the cosine distance to the
    whole image; arXiv:1602.04938, equation 1. A region's pixels share its weight, signed. The sampling error is that of
    the regression.
    """

    name: ClassVar[str] = "lime"
    family: ClassVar[Family] = Family.PARTS
    needs_gradient: ClassVar[bool] = False

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples

    def attribute(self, case: Case) -> Computation[Attribution]:
        regions = yield from background(Superpixels, case, self.baseline)
        turn, coalitions, scores = self.baseline.turns(case), np.empty((0, regions.count)), np.empty(0)

        def estimate(numbers: range) -> Computation[Attribution]:
            nonlocal coalitions, scores
            draw = case.draw(Draw.COALITION, numbers.start // self.samples)
            new = (draw.random((len(numbers), regions.count)) < 0.5).astype(float)
            new[: numbers.start == 0] = 1  # the image itself
            new_scores = yield from regions.scores(new, [turn(number) for number in numbers])
            coalitions, scores = np.concatenate([coalitions, new]), np.concatenate([scores, new_scores])
            fit = local_ridge(coalitions, scores)
            return Attribution(regions.spread(fit.values), sampling_error=regions.sampling_error(fit, fit.values))

        return (yield from self.drawn(case, estimate))


@dataclass(frozen=True)
class Fit:
    """The values [count] of a regression, and their variances [count] over draws; None where too few leave nothing to tell."""

    values: Floats
    variances: Floats | None


def fitted(x: Floats, y: Floats, weights: Floats, ridge: float = 0.0) -> Fit:
    """Fit values [count] to samples y [n] at x [n, count] by weighted least squares; the smallest where many fit.

    The variances are those of the residuals themselves, each over what its own leverage leaves of it (HC2,
    10.1016/0304-4076(85)90158-7): two halves of the samples would often be too few for a fit.
    """
    inverse = np.linalg.pinv(x.T @ (weights[:, None] * x) + ridge * np.eye(x.shape[1]), rcond=1e-10, hermitian=True)
    reach = weights[:, None] * (x @ inverse)
    left = 1 - (reach * x).sum(1)
    values: Floats = reach.T @ y
    if left.sum() < FREEDOM:
        return Fit(values, None)
    return Fit(values, ((y - x @ values) ** 2 / left.clip(min=1e-6)) @ reach**2)


def local_ridge(coalitions: Floats, scores: Floats) -> Fit:
    """Return the ridge weights [count] of coalitions [n, count] near the full one; the intercept is not penalised."""
    distance = 1 - np.sqrt(coalitions.mean(1))
    weights = np.exp(-(distance**2) / (2 * KERNEL_WIDTH**2))
    centred, rise = (values - np.average(values, 0, weights) for values in (coalitions, scores))
    return fitted(centred, rise, weights, RIDGE)


@dataclass(frozen=True)
class KernelShap(DrawingMethod):
    """Shapley values of superpixels: each one's mean rise of the score over all orders in which they are shown.

    Least squares over `samples` coalitions drawn by the Shapley kernel, each with its complement, under the constraint
    that the values sum to F(x) - F(b); arXiv:1705.07874, theorem 2; the pairs arXiv:2012.01536. A region's pixels share
    its value, signed. With references a pair has one of them, in turn, and its rise is that above the reference's own
    score: values of games add, so these are those of the mean game, and sum to F(x) - mean F(b). The sampling error is
    that of the regression.
    """

    name: ClassVar[str] = "kernel_shap"
    family: ClassVar[Family] = Family.PARTS
    needs_gradient: ClassVar[bool] = False

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples + 1 + self.baseline.score_rows  # all regions, and none where that is not known

    def attribute(self, case: Case) -> Computation[Attribution]:
        regions = yield from background(Superpixels, case, self.baseline)
        ends = both(regions.scores(np.ones((1, regions.count)), [0]), self.baseline.scores(case))
        (whole,), nothing = yield from ends
        own, total = np.array(nothing), whole - fmean(nothing)
        turn, rounds = self.baseline.turns(case), list[tuple[Floats, Floats, Floats]]()

        def estimate(numbers: range) -> Computation[Attribution]:
            draw = case.draw(Draw.COALITION, numbers.start // self.samples)
            coalitions = shapley_coalitions(regions.count, len(numbers), draw)
            behind = [turn(numbers.start // 2 + place // 2) for place in range(len(numbers))]
            scores = yield from regions.scores(coalitions, behind)
            rounds.append(paired(coalitions, scores - own[behind], whole - own[behind]))
            x, y, weights = (np.concatenate(parts) for parts in zip(*rounds, strict=True))
            fit = fitted(x, y, weights)
            values = fit.values + total / regions.count
            attribution = regions.spread(values)
            error = completeness_error(float(attribution.sum()), whole, whole - total)
            return Attribution(attribution, whole - total, error, regions.sampling_error(fit, values))

        return (yield from self.drawn(case, estimate))


def shapley_coalitions(count: int, samples: int, draw: np.random.Generator) -> Floats:
    """Return random coalitions [samples, count] whose sizes follow the Shapley kernel; the odd ones complement the even."""
    sizes = np.arange(1, max(count, 2))
    chances = 1 / (sizes * (sizes[-1] + 1 - sizes))
    pairs: list[Floats] = []
    for size in draw.choice(sizes, -(-samples // 2), p=chances / chances.sum()):
        one = (draw.permutation(count) < size).astype(float)
        pairs += [one, 1 - one]
    return np.stack(pairs)[:samples]


def paired(coalitions: Floats, rises: Floats, totals: Floats) -> tuple[Floats, Floats, Floats]:
    """Return what values beside even ones, which sum to zero, are to be fitted to: x [n, count], y [n], weights [n].

    A coalition's rise is of a game whose values sum to its total. It and its complement tell the same of such values,
    so that a pair is one sample, twice as heavy.
    """
    shares = coalitions.mean(1, keepdims=True)
    x, y, whole = coalitions - shares, rises - shares[:, 0] * totals, len(rises) // 2 * 2
    y = np.append((y[:whole:2] - y[1:whole:2]) / 2, y[whole:])
    return x[::2], y, np.repeat([2.0, 1.0], [whole // 2, len(rises) - whole])
