"""Path methods: gradients between a baseline and the input."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, both, together
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.bisection import PathRule, Paths, first_intervals, share
from torchserve_explain.attribution.methods.completeness import known_error
from torchserve_explain.attribution.methods.method import (
    Attribution,
    Case,
    MaxError,
    Method,
    Range,
    Steps,
)
from torchserve_explain.attribution.rows import Evaluation


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """The gradient averaged on the straight path from a baseline, times what the input adds to the baseline.

    map = (x - b) * integral_0^1 dF(b + t (x - b))/dx dt; it sums to F(x) - F(b); arXiv:1703.01365, equation 1. With
    references it is the mean over the paths from each, which sums to F(x) - mean F(b).
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
    first: ClassVar[bool] = True

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
        count = self.baseline.size(classifier)
        if self.steps is None:
            return count * first_intervals(count) + 1  # the paths share their end
        return count * self.steps + (count if self.rule is PathRule.IDGI else self.baseline.score_rows)

    def attribute(self, case: Case) -> Computation[Attribution]:
        baselines, starts = self.baseline.images(case), list[float]()
        if self.steps is None:
            return (yield from Paths(case, baselines).bisected(self.max_error, self.max_map_error, self.rule))
        if self.rule is PathRule.IDGI:
            lines = (_important_directions(case, baseline, self.steps, starts) for baseline in baselines)
            attribution = yield from _mean(case, lines, len(baselines))
        else:
            lines = (_gauss_legendre(case, baseline, self.steps) for baseline in baselines)
            attribution, starts = yield from both(_mean(case, lines, len(baselines)), self.baseline.scores(case))
        baseline_score = fmean(starts)
        return Attribution(attribution, baseline_score, known_error(attribution, case, baseline_score))


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
                share(shares, latest.pop(), score - scores[-1])
            scores.append(score)
            latest.append(gradient.clone())

    yield [case.rows(steps + 1, _points(case, baseline, torch.arange(steps + 1).to(case.input) / steps), add)]
    starts.append(scores[0])
    return shares
