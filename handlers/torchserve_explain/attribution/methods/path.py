"""Path methods: gradients between a baseline and the input."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from math import sqrt
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, both
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.completeness import completeness_error, known_error
from torchserve_explain.attribution.methods.method import (
    Attribution,
    Case,
    Deviation,
    Draw,
    MaxError,
    Method,
    Range,
    Samples,
    Steps,
    stacked,
)
from torchserve_explain.attribution.rows import Evaluation

FIRST_INTERVALS = 8  # of the bisected path
BISECTED_AT_ONCE = 8  # intervals a round
# What is left of an interval's share of the map's error in each half: along a path of a network with kinks the gradient
# moves like a random walk, so half as long a piece has a change smaller by sqrt(2).
HALVED = 1 / sqrt(8)


class PathRule(StrEnum):
    """How a path's gradients are summed: as an integral, or each by how much the score rises after it."""

    RIEMANN = "riemann"
    IDGI = "idgi"


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """The gradient averaged on the straight path from a baseline, times what the input adds to the baseline.

    map = (x - b) * integral_0^1 dF(b + t (x - b))/dx dt; it sums to F(x) - F(b); arXiv:1703.01365, equation 1.
    With `steps`: that many Gauss-Legendre nodes. Else the intervals of the path with the largest error are bisected, with
    trapezoid weights, until the completeness error is at most `max_error`, and, where it is given, the map error at most
    `max_map_error`, or until the case's budget of rows is spent.

    The map error is |map - exact map| / |map|, l2, of the maps summed over channels. It is estimated as the distance to the
    same path with every second node left out, over sqrt(3): of a random walk the trapezoid rule errs by a third of what
    that changes, in squares.

    With `rule` idgi the rise of the score on each interval is shared by the squared gradient at its start, sum of g^2 /
    |g|^2 (F(x_j+1) - F(x_j)): what gradients across the path add is left out; arXiv:2303.14242, algorithm 1. The intervals
    are the same, or `steps` of one length; the map error is not known, and `max_map_error` bounds nothing.
    """

    name: ClassVar[str] = "integrated_gradients"

    baseline: Baseline = Baseline.BLACK
    max_error: MaxError = 0.05
    steps: Steps = None
    rule: PathRule = PathRule.RIEMANN
    max_map_error: Annotated[float | None, Range("a fraction above 0, at most 1", gt=0, le=1)] = None

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """Whether the number of rows is not fixed by `steps`."""
        return self.steps is None

    def evaluations(self, classifier: Classifier) -> int:
        return FIRST_INTERVALS + 1 if self.steps is None else self.steps + 1  # with the baseline's score

    def attribute(self, case: Case) -> Computation[Attribution]:
        path = _Path(case, self.baseline.image(case))
        if self.steps is None:
            return (yield from path.bisected(self.max_error, self.max_map_error, self.rule))
        if self.rule is PathRule.IDGI:
            return (yield from path.important_directions(self.steps))
        return (yield from path.gauss_legendre(self.steps))


class _Path:
    """The straight line from a baseline to a case's input."""

    def __init__(self, case: Case, baseline: Tensor) -> None:
        self._case = case
        self._baseline = baseline
        self._step = case.input - baseline
        self._known: dict[tuple[float, float], float] = {}  # the roughness of intervals

    def gauss_legendre(self, steps: int) -> Computation[Attribution]:
        """Integrate with fixed nodes; memory does not grow with their number."""
        nodes, weights = (torch.from_numpy(v).to(self._step) for v in np.polynomial.legendre.leggauss(steps))
        nodes, weights = (nodes + 1) / 2, weights / 2  # from [-1, 1] to [0, 1]
        integral, (baseline_score,) = yield from both(
            self._case.weighted_gradient(weights, self._points(nodes)), self._case.scores(1, lambda _: self._baseline)
        )
        attribution = self._step * integral
        return Attribution(attribution, baseline_score, known_error(attribution, self._case, baseline_score))

    def important_directions(self, steps: int) -> Computation[Attribution]:
        """Share the rise of the score on each of `steps` even intervals by the squared gradient at its start."""
        shares, scores, latest = torch.zeros_like(self._step), list[float](), list[Tensor]()

        def add(_start: int, evaluation: Evaluation) -> None:
            for score, gradient in zip(evaluation.scores.tolist(), evaluation.gradients, strict=True):
                if scores:
                    _share(shares, latest.pop(), score - scores[-1])
                scores.append(score)
                latest.append(gradient.clone())

        at = torch.arange(steps + 1).to(self._step) / steps
        yield [self._case.rows(steps + 1, self._points(at), add)]
        error = completeness_error(float(shares.sum()), scores[-1], scores[0])
        return Attribution(shares, scores[0], error)

    def bisected(self, max_error: float, max_map_error: float | None, rule: PathRule) -> Computation[Attribution]:
        """Bisect the intervals that err most: in the map, then in the score, whose rise on each is known."""
        nodes = yield from self._nodes([i / FIRST_INTERVALS for i in range(FIRST_INTERVALS + 1)])
        bounded = max_map_error if rule is PathRule.RIEMANN else None
        # An interval cut several times in one round meets completeness with fewer rows, but leaves the map farther off.
        halved = 0.0 if bounded is None else HALVED
        while (left_over := self._case.budget - len(nodes)) > 0:
            count = min(BISECTED_AT_ONCE, left_over)
            if bounded is not None and self._map_error(nodes) > bounded:
                at = _middles(nodes, self._roughness, halved, count)
            elif completeness_error(sum(map(_rise, nodes, nodes[1:])), nodes[-1].score, nodes[0].score) > max_error:
                at = _middles(nodes, _miss, halved, count)
            else:
                break
            nodes = sorted([*nodes, *(yield from self._nodes(at))], key=lambda node: node.t)
        if rule is PathRule.RIEMANN:
            attribution, map_error = _trapezoid(nodes) * self._step, self._map_error(nodes)
        else:
            attribution, map_error = torch.zeros_like(self._step), None
            for left, right in pairwise(nodes):
                _share(attribution, left.gradient, right.score - left.score)
        error = completeness_error(float(attribution.sum()), nodes[-1].score, nodes[0].score)
        return Attribution(attribution, nodes[0].score, error, map_error)

    def _shown(self, gradient: Tensor) -> Tensor:
        """Return what a gradient contributes to the map [H, W], summed over channels."""
        return (gradient * self._step).sum(0)

    def _map_error(self, nodes: Sequence["_Node"]) -> float:
        """Return the estimate of the map's own error."""
        fine, coarse = _trapezoid(nodes), _trapezoid([*nodes[:-1:2], nodes[-1]])
        return float(self._shown(fine - coarse).norm()) / sqrt(3) / (float(self._shown(fine).norm()) or 1.0)

    def _roughness(self, left: "_Node", right: "_Node") -> float:
        """Return how much the map changes on an interval, times its width: the measure of what the interval errs by."""
        if (ends := (left.t, right.t)) not in self._known:
            self._known[ends] = (right.t - left.t) * float(self._shown(right.gradient - left.gradient).norm())
        return self._known[ends]

    def _points(self, at: Tensor) -> Callable[[int, int], Tensor]:
        return lambda start, stop: torch.lerp(self._baseline, self._case.input, at[start:stop, None, None, None])

    def _nodes(self, at: list[float]) -> Computation[list["_Node"]]:
        """Evaluate the path's points at fractions of its length."""
        nodes: list[_Node] = []

        def add(start: int, evaluation: Evaluation) -> None:
            slopes = torch.tensordot(evaluation.gradients, self._step, 3).tolist()
            scores = evaluation.scores.tolist()
            for t, score, slope, gradient in zip(at[start:], scores, slopes, evaluation.gradients, strict=False):
                # A view would keep the whole pass's gradients alive.
                nodes.append(_Node(t, score, slope, gradient.clone()))

        yield [self._case.rows(len(at), self._points(self._step.new_tensor(at)), add)]
        return nodes


@dataclass(frozen=True)
class _Node:
    """A point t of the path: its score, the score's slope along the path, and its gradient."""

    t: float
    score: float
    slope: float
    gradient: Tensor


def _share(shares: Tensor, gradient: Tensor, rise: float) -> None:
    """Add to shares what each value has of a rise of the score, by its squared gradient; of none where the gradient is zero."""
    squares = gradient.square()
    if (total := float(squares.sum())) > 0:
        shares.add_(squares, alpha=rise / total)


def _trapezoid(nodes: Sequence[_Node]) -> Tensor:
    """Return the integral of the gradient over the path."""
    total = torch.zeros_like(nodes[0].gradient)
    for before, node, after in zip((nodes[0], *nodes), nodes, (*nodes[1:], nodes[-1]), strict=False):
        total.add_(node.gradient, alpha=(after.t - before.t) / 2)
    return total


def _rise(left: _Node, right: _Node) -> float:
    """Return the score's rise on an interval by the trapezoid rule."""
    return (right.t - left.t) * (left.slope + right.slope) / 2


def _miss(left: _Node, right: _Node) -> float:
    """Return by how much the trapezoid rule misses the score's rise on an interval."""
    return abs(right.score - left.score - _rise(left, right))


def _middles(nodes: Sequence[_Node], error: Callable[[_Node, _Node], float], halved: float, count: int) -> list[float]:
    """Bisect the interval with the largest error `count` times; each half is expected to have `halved` of it."""
    intervals = [(-error(left, right), left.t, right.t) for left, right in pairwise(nodes)]
    heapq.heapify(intervals)
    middles = []
    for _ in range(count):
        largest, start, stop = heapq.heappop(intervals)
        middles.append(middle := (start + stop) / 2)
        for half in ((start, middle), (middle, stop)):
            heapq.heappush(intervals, (largest * halved, *half))
    return middles


@dataclass(frozen=True)
class GradientShap(Method):
    """Expected gradients: gradients at random points of paths from baselines to the (noisy) input.

    map = E[(x + e - b) * dF(b + u (x + e - b))/dx], u uniform in [0, 1], e Gaussian of `stdev` times the
    input's range, b the baseline (with `noise`, another one for each sample). It sums to F(x) - E[F(b)] in
    expectation; the completeness error is this sample's. arXiv:1906.10670, equation 7; SHAP's GradientExplainer.
    """

    name: ClassVar[str] = "gradient_shap"

    baseline: Baseline = Baseline.BLACK
    samples: Samples = 50
    stdev: Deviation = 0.0

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples + (self.samples if self.baseline is Baseline.NOISE else 1)

    def attribute(self, case: Case) -> Computation[Attribution]:
        paths = _Paths(self, case)
        attribution, scores = yield from both(paths.expectation(), case.scores(paths.baselines, paths.baseline))
        baseline_score = sum(scores) / len(scores)
        return Attribution(attribution, baseline_score, known_error(attribution, case, baseline_score))


class _Paths:
    """The random paths of one case, from a baseline to the input, and a point on each; all are one path without draws."""

    def __init__(self, method: GradientShap, case: Case) -> None:
        self._method, self._case = method, case
        self._fixed = method.baseline.image(case)
        self.baselines = method.samples if method.baseline is Baseline.NOISE else 1
        # One random offset for evenly spaced points: as unbiased as free draws of u, with a smaller error.
        self._offset = case.draw(Draw.PATH, 0).random()

    def baseline(self, sample: int) -> Tensor:
        """Return the start of a sample's path."""
        return self._fixed if self.baselines == 1 else self._method.baseline.image(self._case, sample)

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
        if self.baselines == 1 and not self._method.stdev:
            mean = yield from self._case.weighted_gradient(self._case.input.new_full((samples,), 1 / samples), point)
            return mean * (self._case.input - self._fixed)
        total = torch.zeros_like(self._case.input)

        def add(start: int, evaluation: Evaluation) -> None:
            for sample, gradient in enumerate(evaluation.gradients, start):
                total.add_(gradient * (self.end(sample) - self.baseline(sample)), alpha=1 / samples)

        yield [self._case.rows(samples, point, add)]
        return total
