"""Expected gradients: gradients at random points between random baselines and the input."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, both
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.completeness import known_error
from torchserve_explain.attribution.methods.drawing import DrawingMethod, error_of_halves
from torchserve_explain.attribution.methods.method import Attribution, Case, Deviation, Draw, Samples, stacked
from torchserve_explain.attribution.rows import Evaluation


@dataclass(frozen=True)
class GradientShap(DrawingMethod):
    """Expected gradients: gradients at random points of paths from baselines to the (noisy) input.

    map = E[(x + e - b) * dF(b + u (x + e - b))/dx], u uniform in [0, 1], e Gaussian of `stdev` times the
    input's range, b the baseline (with `noise` another one for each sample, with `references` all in turn). It sums to
    F(x) - E[F(b)] in expectation; the completeness error is this sample's. arXiv:1906.10670, equation 7; SHAP's
    GradientExplainer. The sampling error is that of halves; on one path it is sqrt(3) times less, as the variance of
    evenly spaced points falls with the square of their number.
    """

    name: ClassVar[str] = "gradient_shap"

    samples: Samples = 50
    stdev: Deviation = 0.0

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples + (self.samples if self.baseline is Baseline.NOISE else self.baseline.score_rows)

    @property
    def many_paths(self) -> bool:
        """Whether samples lie on different paths, so that they are not evenly spaced on one."""
        return bool(self.stdev) or self.baseline in (Baseline.NOISE, Baseline.REFERENCES)

    def attribute(self, case: Case) -> Computation[Attribution]:
        draws = _Draws(self, case)
        totals, counts, starts = [torch.zeros_like(case.input) for _ in range(2)], [0, 0], list[float]()

        def estimate(numbers: range) -> Computation[Attribution]:
            halves = [[number for number in numbers if draws.half(number) == half] for half in range(2)]
            sums, scores = yield from both(both(*map(draws.total, halves)), draws.scores(numbers))
            starts.extend(scores)
            for half in range(2):
                totals[half] += sums[half]
                counts[half] += len(halves[half])
            attribution, baseline_score = (totals[0] + totals[1]) / sum(counts), fmean(starts)
            error = None
            if all(counts):
                error = error_of_halves(attribution, *(total / count for total, count in zip(totals, counts, strict=True)))
                error /= 1 if self.many_paths else sqrt(3)
            return Attribution(attribution, baseline_score, known_error(attribution, case, baseline_score), error)

        return self.drawn(case, estimate)


class _Draws:
    """The random paths of one case, from a baseline to the input, and a point on each; all are one path without draws."""

    def __init__(self, method: GradientShap, case: Case) -> None:
        self._method, self._case = method, case
        self._noise = method.baseline is Baseline.NOISE
        self._in_turn, self._size = method.baseline.in_turn(case), method.baseline.size(case.classifier)
        # One random offset for evenly spaced points: as unbiased as free draws of u, with a smaller error.
        self._offset = case.draw(Draw.PATH, 0).random() / method.samples

    def baseline(self, sample: int) -> Tensor:
        """Return the start of a sample's path."""
        return self._method.baseline.image(self._case, sample) if self._noise else self._in_turn(self.turn(sample))

    def turn(self, sample: int) -> int:
        """Return which baseline in turn a sample has: each further round pairs them anew with points."""
        further = (sample // self._method.samples).bit_length()
        if not further or self._size == 1:
            return sample % self._size
        return int(self._case.draw(Draw.REFERENCE, further).permutation(self._size)[sample % self._size])

    def half(self, sample: int) -> int:
        """Return which half a sample belongs to, 0 or 1; both have all references."""
        return (self.turn(sample) + sample // self._size) % 2

    def scores(self, samples: range) -> Computation[list[float]]:
        """Return the scores of starts that are not known yet."""
        if self._noise:
            return (yield from self._case.scores(len(samples), lambda row: self.baseline(samples[row])))
        return (yield from self._method.baseline.scores(self._case)) if samples.start == 0 else []

    def end(self, sample: int) -> Tensor:
        """Return the end of a sample's path."""
        stdev = self._method.stdev
        return self._case.input + self._case.noise(sample, stdev) if stdev else self._case.input

    def fraction(self, sample: int) -> float:
        """Return where on its path a sample lies; each round of them lies in the middles between the earlier ones."""
        first = self._method.samples
        if sample < first:
            return self._offset + sample / first
        earlier = first << (sample // first).bit_length() - 1
        return (self._offset + (sample - earlier + 0.5) / earlier) % 1

    def point(self, sample: int) -> Tensor:
        """Return the point of a sample's path where its gradient is taken."""
        return torch.lerp(self.baseline(sample), self.end(sample), self.fraction(sample))

    def total(self, samples: Sequence[int]) -> Computation[Tensor]:
        """Return the sum [C, H, W] over samples of path times gradient."""
        if not samples:
            return torch.zeros_like(self._case.input)
        point = stacked(lambda row: self.point(samples[row]))
        if not self._method.many_paths:
            gradient = yield from self._case.weighted_gradient(self._case.input.new_ones(len(samples)), point)
            return gradient * (self._case.input - self.baseline(0))
        total = torch.zeros_like(self._case.input)

        def add(start: int, evaluation: Evaluation) -> None:
            for sample, gradient in zip(samples[start:], evaluation.gradients, strict=False):
                total.add_(gradient * (self.end(sample) - self.baseline(sample)))

        yield [self._case.rows(len(samples), point, add)]
        return total
