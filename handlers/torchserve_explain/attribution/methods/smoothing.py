"""Smoothing: any gradient method averaged over noisy copies of the input."""

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, zeros_like

from torchserve_explain.attribution.computation import Computation, together
from torchserve_explain.attribution.methods.method import Attribution, Case, Method


class Kind(StrEnum):
    """Mean, mean of squares, or variance of the noisy copies' maps."""

    SMOOTHGRAD = "smoothgrad"
    SMOOTHGRAD_SQ = "smoothgrad_sq"
    VARGRAD = "vargrad"


@dataclass(frozen=True)
class Smoothing:
    """A method's maps over noisy copies, reduced element by element before channels are summed.

    SmoothGrad arXiv:1706.03825, its square arXiv:1806.10758, VarGrad arXiv:1810.03292 (variance over n, not n - 1).
    `stdev` is a fraction of the input's range.
    """

    kind: Kind
    samples: int = 10
    stdev: float = 0.15

    def signed(self, method: Method) -> bool:
        """Whether the smoothed map can be negative."""
        return self.kind is Kind.SMOOTHGRAD and method.signed

    def attribute(self, method: Method, case: Case) -> Computation[Attribution]:
        """Ask for the rows of every copy and return the reduced map; completeness does not carry over to it."""
        moments = Moments()
        copies = (method.attribute(case.noisy(k, self.stdev)) for k in range(self.samples))
        yield from together(copies, lambda attribution: moments.add(attribution.map))
        return Attribution(moments.reduced(self.kind))


class Moments:
    """Running mean and variance of maps (Welford's update), so that no map is kept."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor
        self._squares: Tensor  # sum of squared deviations from the mean

    def add(self, sample: Tensor) -> None:
        """Take one map in."""
        self._count += 1
        if self._count == 1:
            self._mean, self._squares = sample.clone(), zeros_like(sample)
            return
        off = sample - self._mean
        self._mean += off / self._count
        self._squares += off * (sample - self._mean)

    def reduced(self, kind: Kind) -> Tensor:
        """Return the mean, the mean of squares or the variance of the maps taken in."""
        variance = self._squares / self._count
        match kind:
            case Kind.SMOOTHGRAD:
                return self._mean
            case Kind.SMOOTHGRAD_SQ:
                return variance + self._mean.square()
            case Kind.VARGRAD:
                return variance
