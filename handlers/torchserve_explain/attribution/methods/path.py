"""Path methods: gradients between a baseline and the input."""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from math import ceil
from statistics import fmean
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, both, together
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.completeness import completeness_error, known_error, rise
from torchserve_explain.attribution.methods.method import (
    Attribution,
    Case,
    Deviation,
    Draw,
    MaxError,
    Method,
    Samples,
    Steps,
    stacked,
)
from torchserve_explain.attribution.rows import Evaluation

FIRST_INTERVALS = 8  # of the bisected path
FIRST_PATHS = 6  # that are cut into so many; of more paths each has fewer, about 50 in all
BISECTED_AT_ONCE = 8  # intervals a round


class PathRule(StrEnum):
    """How a path's gradients are summed: as an integral, or each by how much the score rises after it."""

    RIEMANN = "riemann"
    IDGI = "idgi"


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """The gradient averaged on the straight path from a baseline, times what the input adds to the baseline.

    map = (x - b) * integral_0^1 dF(b + t (x - b))/dx dt; it sums to F(x) - F(b); arXiv:1703.01365, equation 1. With
    references it is the mean over the paths from each, which sums to F(x) - mean F(b).
    With `steps`: that many Gauss-Legendre nodes. Else the intervals of the path with the largest error are bisected, with
    trapezoid weights, until the completeness error is at most `max_error` or the case's budget of rows is spent.

    With `rule` idgi the rise of the score on each interval is shared by the squared gradient at its start, sum of g^2 /
    |g|^2 (F(x_j+1) - F(x_j)): what gradients across the path add is left out; arXiv:2303.14242, algorithm 1. The intervals
    are the same, or `steps` of one length.
    """

    name: ClassVar[str] = "integrated_gradients"

    baseline: Baseline = Baseline.BLACK
    max_error: MaxError = 0.05
    steps: Steps = None
    rule: PathRule = PathRule.RIEMANN

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """Whether the number of rows is not fixed by `steps`."""
        return self.steps is None

    def evaluations(self, classifier: Classifier) -> int:
        count = self.baseline.size(classifier)
        if self.steps is None:
            return count * _first_intervals(count) + 1  # the paths share their end
        return count * self.steps + (count if self.rule is PathRule.IDGI else self.baseline.score_rows)

    def attribute(self, case: Case) -> Computation[Attribution]:
        baselines, starts = self.baseline.images(case), list[float]()
        if self.steps is None:
            return (yield from _Paths(case, baselines).bisected(self.max_error, self.rule))
        if self.rule is PathRule.IDGI:
            lines = (_important_directions(case, baseline, self.steps, starts) for baseline in baselines)
            attribution = yield from _mean(case, lines, len(baselines))
        else:
            lines = (_gauss_legendre(case, baseline, self.steps) for baseline in baselines)
            attribution, starts = yield from both(_mean(case, lines, len(baselines)), self.baseline.scores(case))
        baseline_score = fmean(starts)
        return Attribution(attribution, baseline_score, known_error(attribution, case, baseline_score))


def _first_intervals(paths: int) -> int:
    """Return in how many intervals each of some paths is cut before any is bisected: fewer of each where paths are many."""
    return max(1, FIRST_INTERVALS // ceil(paths / FIRST_PATHS))


def _mean(case: Case, maps: Iterable[Computation[Tensor]], count: int) -> Computation[Tensor]:
    """Return the mean of maps [C, H, W], of which few are in memory."""
    total = torch.zeros_like(case.input)

    def add(one: Tensor) -> None:
        total.add_(one, alpha=1 / count)

    yield from together(maps, add)
    return total


def _points(case: Case, baseline: Tensor, at: Tensor) -> Callable[[int, int], Tensor]:
    """Return the inputs of rows at fractions [n] of the path from a baseline."""
    return lambda start, stop: torch.lerp(baseline, case.input, at[start:stop, None, None, None])


def _gauss_legendre(case: Case, baseline: Tensor, steps: int) -> Computation[Tensor]:
    """Return the path's map by fixed nodes; memory does not grow with their number."""
    nodes, weights = (torch.from_numpy(v).to(case.input) for v in np.polynomial.legendre.leggauss(steps))
    nodes, weights = (nodes + 1) / 2, weights / 2  # from [-1, 1] to [0, 1]
    integral = yield from case.weighted_gradient(weights, _points(case, baseline, nodes))
    return (case.input - baseline) * integral


def _important_directions(case: Case, baseline: Tensor, steps: int, starts: list[float]) -> Computation[Tensor]:
    """Return the map that shares the rise on each of `steps` even intervals by the squared gradient at its start.

    `starts` takes the baseline's score.
    """
    shares, scores, latest = torch.zeros_like(case.input), list[float](), list[Tensor]()

    def add(_start: int, evaluation: Evaluation) -> None:
        for score, gradient in zip(evaluation.scores.tolist(), evaluation.gradients, strict=True):
            if scores:
                _share(shares, latest.pop(), score - scores[-1])
            scores.append(score)
            latest.append(gradient.clone())

    yield [case.rows(steps + 1, _points(case, baseline, torch.arange(steps + 1).to(case.input) / steps), add)]
    starts.append(scores[0])
    return shares


class _Paths:
    """The straight lines from baselines [n, C, H, W] to a case's input; their end is one."""

    def __init__(self, case: Case, baselines: Tensor) -> None:
        self._case = case
        self._baselines = baselines
        self._steps = case.input - baselines

    def bisected(self, max_error: float, rule: PathRule) -> Computation[Attribution]:
        """Bisect the intervals with the largest error; completeness holds on each, so each one's own error is known."""
        intervals = yield from self._first(_first_intervals(len(self._steps)))
        starts, end = [one.left.score for one in intervals if one.left.t == 0], intervals[-1].right.score
        baseline_score = fmean(starts)
        heapq.heapify(intervals)
        while (left_over := self._case.budget - len(intervals) - 1) > 0:
            if self._error(intervals, starts, end) <= max_error:
                break
            worst = [heapq.heappop(intervals) for _ in range(min(BISECTED_AT_ONCE, left_over, len(intervals)))]
            middles = yield from self._nodes([(one.left.path, (one.left.t + one.right.t) / 2) for one in worst])
            for interval, middle in zip(worst, middles, strict=True):
                heapq.heappush(intervals, _Interval(interval.left, middle))
                heapq.heappush(intervals, _Interval(middle, interval.right))
        attribution = self._map(intervals, rule)
        return Attribution(attribution, baseline_score, completeness_error(float(attribution.sum()), end, baseline_score))

    def _first(self, count: int) -> Computation[list["_Interval"]]:
        """Cut each path into `count` intervals of one length."""
        paths = range(len(self._steps))
        *nodes, end = yield from self._nodes([(path, i / count) for path in paths for i in range(count)] + [(paths[-1], 1.0)])
        slopes = torch.tensordot(self._steps, end.gradient, 3).tolist()
        rows = [[*nodes[path * count :][:count], replace(end, path=path, slope=slopes[path])] for path in paths]
        return [_Interval(left, right) for row in rows for left, right in pairwise(row)]

    def _error(self, intervals: list["_Interval"], starts: list[float], end: float) -> float:
        """Return the completeness error of the mean over the paths, or their own where that is larger: errors may cancel."""
        errors = [0.0] * len(starts)
        for interval in intervals:
            errors[interval.left.path] += interval.error
        own = fmean(map(abs, errors)) / fmean(rise(end, start) for start in starts)
        return max(own, abs(fmean(errors)) / rise(end, fmean(starts)))

    def _map(self, intervals: list["_Interval"], rule: PathRule) -> Tensor:
        """Return the map [C, H, W] of all intervals: the mean over the paths."""
        attribution, count = torch.zeros_like(self._case.input), len(self._steps)
        for one in intervals:
            if rule is PathRule.IDGI:
                _share(attribution, one.left.gradient, (one.right.score - one.left.score) / count)
                continue
            for node in (one.left, one.right):
                attribution.addcmul_(node.gradient, self._steps[node.path], value=one.width / 2 / count)
        return attribution

    def _nodes(self, at: list[tuple[int, float]]) -> Computation[list["_Node"]]:
        """Evaluate points: of which path, at what fraction of its length."""
        nodes: list[_Node] = []
        path = torch.tensor([path for path, _ in at], device=self._steps.device)
        fractions = self._steps.new_tensor([t for _, t in at])[:, None, None, None]

        def points(start: int, stop: int) -> Tensor:
            return torch.lerp(self._baselines[path[start:stop]], self._case.input, fractions[start:stop])

        def add(start: int, evaluation: Evaluation) -> None:
            steps = self._steps[path[start : start + len(evaluation.scores)]]
            slopes = (evaluation.gradients * steps).sum((1, 2, 3)).tolist()
            scores = evaluation.scores.tolist()
            for place, score, slope, gradient in zip(at[start:], scores, slopes, evaluation.gradients, strict=False):
                # A view would keep the whole pass's gradients alive.
                nodes.append(_Node(*place, score, slope, gradient.clone()))

        yield [self._case.rows(len(at), points, add)]
        return nodes


@dataclass(frozen=True)
class _Node:
    """A point t of a path: its score, the score's slope along the path, and its gradient."""

    path: int
    t: float
    score: float
    slope: float
    gradient: Tensor


def _share(shares: Tensor, gradient: Tensor, rise: float) -> None:
    """Add to shares what each value has of a rise of the score, by its squared gradient; of none where the gradient is zero."""
    squares = gradient.square()
    if (total := float(squares.sum())) > 0:
        shares.add_(squares, alpha=rise / total)


class _Interval:
    """A piece of a path, and the trapezoid rule's `error` for the score's rise on it; the one with the largest sorts first."""

    def __init__(self, left: _Node, right: _Node) -> None:
        self.left, self.right = left, right
        self.width = right.t - left.t
        self.error = self.width * (left.slope + right.slope) / 2 - (right.score - left.score)

    def __lt__(self, other: "_Interval") -> bool:
        return abs(self.error) > abs(other.error)


@dataclass(frozen=True)
class GradientShap(Method):
    """Expected gradients: gradients at random points of paths from baselines to the (noisy) input.

    map = E[(x + e - b) * dF(b + u (x + e - b))/dx], u uniform in [0, 1], e Gaussian of `stdev` times the
    input's range, b the baseline (with `noise` another one for each sample, with `references` all in turn). It sums to
    F(x) - E[F(b)] in expectation; the completeness error is this sample's. arXiv:1906.10670, equation 7; SHAP's
    GradientExplainer.
    """

    name: ClassVar[str] = "gradient_shap"

    baseline: Baseline = Baseline.BLACK
    samples: Samples = 50
    stdev: Deviation = 0.0

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples + (self.samples if self.baseline is Baseline.NOISE else self.baseline.score_rows)

    def attribute(self, case: Case) -> Computation[Attribution]:
        draws = _Draws(self, case)
        attribution, scores = yield from both(draws.expectation(), draws.scores())
        baseline_score = fmean(scores)
        return Attribution(attribution, baseline_score, known_error(attribution, case, baseline_score))


class _Draws:
    """The random paths of one case, from a baseline to the input, and a point on each; all are one path without draws."""

    def __init__(self, method: GradientShap, case: Case) -> None:
        self._method, self._case = method, case
        self._noise = method.baseline is Baseline.NOISE
        self._in_turn = method.baseline.in_turn(case)
        # One random offset for evenly spaced points: as unbiased as free draws of u, with a smaller error.
        self._offset = case.draw(Draw.PATH, 0).random()

    def baseline(self, sample: int) -> Tensor:
        """Return the start of a sample's path."""
        return self._method.baseline.image(self._case, sample) if self._noise else self._in_turn(sample)

    def scores(self) -> Computation[list[float]]:
        """Return the scores of all starts."""
        if self._noise:
            return self._case.scores(self._method.samples, self.baseline)
        return self._method.baseline.scores(self._case)

    def end(self, sample: int) -> Tensor:
        """Return the end of a sample's path."""
        stdev = self._method.stdev
        return self._case.input + self._case.noise(sample, stdev) if stdev else self._case.input

    def point(self, sample: int) -> Tensor:
        """Return the point of a sample's path where its gradient is taken."""
        fraction = (sample + self._offset) / self._method.samples
        return torch.lerp(self.baseline(sample), self.end(sample), fraction)

    def expectation(self) -> Computation[Tensor]:
        """Return the mean over samples of path times gradient."""
        samples, point = self._method.samples, stacked(self.point)
        if not (self._noise or self._method.stdev or self._method.baseline is Baseline.REFERENCES):
            mean = yield from self._case.weighted_gradient(self._case.input.new_full((samples,), 1 / samples), point)
            return mean * (self._case.input - self.baseline(0))
        total = torch.zeros_like(self._case.input)

        def add(start: int, evaluation: Evaluation) -> None:
            for sample, gradient in enumerate(evaluation.gradients, start):
                total.add_(gradient * (self.end(sample) - self.baseline(sample)), alpha=1 / samples)

        yield [self._case.rows(samples, point, add)]
        return total
