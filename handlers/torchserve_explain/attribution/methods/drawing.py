"""Methods that draw at random: how far the draws let their map vary, and more of them until that is little enough."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from torch import Tensor

from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, Range, Samples

MaxSamplingError = Annotated[float | None, Range("a fraction above 0, at most 1", gt=0, le=1)]


@dataclass(frozen=True)
class DrawingMethod(Method):
    """A method whose map is an estimate from random draws.

    Its `sampling_error` estimates how far the map varies from seed to seed: the root mean square distance (l2, channels
    summed) from its expectation, as a fraction of the map. With `max_sampling_error` the samples are doubled until it is at
    most that, or until the case's budget does not suffice for twice as many.
    """

    draws: ClassVar[bool] = True

    baseline: Baseline = Baseline.BLACK
    samples: Samples = 200
    max_sampling_error: MaxSamplingError = None

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """Whether it takes more samples until their error is small."""
        return self.max_sampling_error is not None

    def drawn(self, case: Case, estimate: Callable[[range], Computation[Attribution]]) -> Computation[Attribution]:
        """Draw until the error is small enough; `estimate` takes further samples in and returns the map of all so far."""
        numbers = range(self.samples)
        while True:
            found = yield from estimate(numbers)
            known, most = found.sampling_error, self.max_sampling_error
            twice = range(numbers.stop, 2 * numbers.stop)
            if most is None or (known is not None and known <= most):
                return found
            if replace(self, samples=twice.stop).evaluations(case.classifier) > case.budget:
                return found
            numbers = twice

    def half(self, case: Case, number: int) -> int:
        """Return which half a sample belongs to, 0 or 1; both have all references."""
        images = self.baseline.size(case.classifier)
        return (number % images + number // images) % 2


def error_of_halves(whole: Tensor, one: Tensor, other: Tensor) -> float:
    """Return the sampling error of a map [channels, H, W] by the maps of two halves of its samples, |A - B| / 2 |M|.

    A and B vary independently, each with twice the variance of M: E|A - B|^2 = 4 E|M - E M|^2.
    """
    return float((one - other).sum(0).norm()) / max(2 * float(whole.sum(0).norm()), 1e-12)
