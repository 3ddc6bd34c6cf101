"""Path methods: gradients between a baseline and the input."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.completeness import completeness_error, known_error
from torchserve_explain.attribution.methods.method import Attribution, Case, Draw, Method, register, scores_into, stacked
from torchserve_explain.attribution.rows import Evaluation, Rows

FIRST_INTERVALS = 8  # of the bisected path
BISECTED_AT_ONCE = 8  # intervals a round


@register("integrated_gradients")
@dataclass(frozen=True)
class IntegratedGradients(Method):
    """The gradient averaged on the straight path from a baseline, times what the input adds to the baseline.

    map = (x - b) * integral_0^1 dF(b + t (x - b))/dx dt; it sums to F(x) - F(b); arXiv:1703.01365, equation 1.
    With `steps`: that many Gauss-Legendre nodes. Else the path is bisected where it errs, with trapezoid
    weights, until the completeness error is at most `max_error` or the case's budget of rows ends.
    """

    baseline: Baseline = Baseline.BLACK
    max_error: float = 0.05
    steps: int | None = None

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """A given number of steps leaves nothing to decide."""
        return self.steps is None

    def evaluations(self, classifier: Classifier) -> int:
        return FIRST_INTERVALS + 1 if self.steps is None else self.steps + 1  # with the baseline's score

    def attribute(self, case: Case) -> Computation[Attribution]:
        path = _Path(case, self.baseline.image(case))
        if self.steps is not None:
            return (yield from path.gauss_legendre(self.steps))
        return (yield from path.bisected(self.max_error))


class _Path:
    """The straight line from a baseline to a case's input."""

    def __init__(self, case: Case, baseline: Tensor) -> None:
        self._case = case
        self._baseline = baseline
        self._step = case.input - baseline

    def gauss_legendre(self, steps: int) -> Computation[Attribution]:
        """Integrate with fixed nodes; memory does not grow with their number."""
        nodes, weights = (torch.from_numpy(v).to(self._step) for v in np.polynomial.legendre.leggauss(steps))
        nodes, weights = (nodes + 1) / 2, weights / 2  # from [-1, 1] to [0, 1]
        total = torch.zeros_like(self._step)

        def add(start: int, evaluation: Evaluation) -> None:
            total.add_(evaluation.weighted_gradient(weights[start : start + len(evaluation.scores)]))

        ends: list[float] = []
        baseline_row = self._case.rows(1, self._points(nodes.new_zeros(1)), scores_into(ends), gradient=False)
        yield [self._case.rows(steps, self._points(nodes), add, summed=True), baseline_row]
        attribution = self._step * total
        return Attribution(attribution, ends[0], known_error(attribution, self._case, ends[0]))

    def bisected(self, max_error: float) -> Computation[Attribution]:
        """Refine the intervals that err most; completeness holds on each, so each tells its own error."""
        nodes = [_Node(i / FIRST_INTERVALS) for i in range(FIRST_INTERVALS + 1)]
        yield [self._measure(nodes)]
        evaluations = len(nodes)
        first, last = nodes[0], nodes[-1]
        intervals = [_Interval(a, b) for a, b in pairwise(nodes)]
        heapq.heapify(intervals)
        integral = sum(interval.trapezoid for interval in intervals)
        while completeness_error(integral, last.score, first.score) > max_error and evaluations < self._case.budget:
            worst = [heapq.heappop(intervals) for _ in range(min(BISECTED_AT_ONCE, self._case.budget - evaluations))]
            middles = [_Node((interval.left.t + interval.right.t) / 2) for interval in worst]
            yield [self._measure(middles)]
            evaluations += len(middles)
            for interval, middle in zip(worst, middles, strict=True):
                for half in (_Interval(interval.left, middle), _Interval(middle, interval.right)):
                    heapq.heappush(intervals, half)
            integral = sum(interval.trapezoid for interval in intervals)
        total = torch.zeros_like(self._step)
        for interval in intervals:
            for node in (interval.left, interval.right):
                total.add_(node.gradient, alpha=interval.width / 2)
        attribution = self._step * total
        error = completeness_error(float(attribution.sum()), last.score, first.score)
        return Attribution(attribution, first.score, error)

    def _points(self, at: Tensor) -> Callable[[int, int], Tensor]:
        return lambda start, stop: torch.lerp(self._baseline, self._case.input, at[start:stop, None, None, None])

    def _measure(self, nodes: list["_Node"]) -> Rows:
        at = self._step.new_tensor([node.t for node in nodes])

        def keep(start: int, evaluation: Evaluation) -> None:
            slopes = torch.tensordot(evaluation.gradients, self._step, 3).tolist()
            scores = evaluation.scores.tolist()
            for node, gradient, slope, score in zip(nodes[start:], evaluation.gradients, slopes, scores, strict=False):
                node.gradient = gradient.clone()  # a view would keep the whole pass's gradients alive
                node.slope, node.score = slope, score

        return self._case.rows(len(nodes), self._points(at), keep)


class _Node:
    """A point t of the path: its score, the gradient there, and the score's slope along the path."""

    gradient: Tensor
    slope: float
    score: float

    def __init__(self, t: float) -> None:
        self.t = t


class _Interval:
    """A piece of the path; the one that errs most sorts first."""

    def __init__(self, left: _Node, right: _Node) -> None:
        self.left, self.right = left, right
        self.width = right.t - left.t
        self.trapezoid = self.width * (left.slope + right.slope) / 2
        self._error = abs(right.score - left.score - self.trapezoid)

    def __lt__(self, other: "_Interval") -> bool:
        return self._error > other._error


@register("gradient_shap")
@dataclass(frozen=True)
class GradientShap(Method):
    """Expected gradients: gradients at random points of paths from baselines to the (noisy) input.

    map = E[(x + e - b) * dF(b + u (x + e - b))/dx], u uniform in [0, 1], e Gaussian of `stdev` times the
    input's range, b the baseline (with `noise`, another one for each sample). It sums to F(x) - E[F(b)] in
    expectation; the error told is of this sample. arXiv:1906.10670, equation 7; SHAP's GradientExplainer.
    """

    baseline: Baseline = Baseline.BLACK
    samples: int = 50
    stdev: float = 0.0

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples + self._baselines()

    def _baselines(self) -> int:
        return self.samples if self.baseline is Baseline.NOISE else 1

    def attribute(self, case: Case) -> Computation[Attribution]:
        fixed = self.baseline.image(case)
        # One random offset for evenly spaced points: as unbiased as free draws of u, and they err less.
        offset = case.draw(Draw.PATH, 0).random()
        one_path = not self.stdev and self.baseline is not Baseline.NOISE
        total = torch.zeros_like(case.input)

        def baseline(sample: int) -> Tensor:
            return self.baseline.image(case, sample) if self.baseline is Baseline.NOISE else fixed

        def end(sample: int) -> Tensor:
            return case.input + case.noise(sample, self.stdev) if self.stdev else case.input

        def point(sample: int) -> Tensor:
            return torch.lerp(baseline(sample), end(sample), (sample + offset) / self.samples)

        def add(start: int, evaluation: Evaluation) -> None:
            if one_path:
                weights = evaluation.scores.new_full(evaluation.scores.shape, 1 / self.samples)
                total.add_(evaluation.weighted_gradient(weights) * (case.input - fixed))
                return
            for sample, gradient in enumerate(evaluation.gradients, start):
                total.add_(gradient * (end(sample) - baseline(sample)), alpha=1 / self.samples)

        ends: list[float] = []
        yield [
            case.rows(self.samples, stacked(point), add, summed=one_path),
            case.rows(self._baselines(), stacked(baseline), scores_into(ends), gradient=False),
        ]
        baseline_score = sum(ends) / len(ends)
        return Attribution(total, baseline_score, known_error(total, case, baseline_score))
