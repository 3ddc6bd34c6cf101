"""How simple a map is: qualities that cost no row."""

from dataclasses import dataclass

from torch import Tensor

from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.measure import Quality, QualityScore
from torchserve_explain.attribution.methods import Attribution


@dataclass(frozen=True)
class Sparseness(Quality):
    """How few pixels hold the map, as the Gini index of its absolute values, 0 (even) to 1 (one pixel): higher is better.

    sum_i (2 i - n - 1) a_i / (n sum_i a_i), a sorted upwards; arXiv:1810.06583.
    """

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        yield from ()
        shares = _shares(attribution).sort().values
        places = shares.new_tensor(range(1, len(shares) + 1))
        return QualityScore(float(((2 * places - len(shares) - 1) * shares).sum() / len(shares)))


@dataclass(frozen=True)
class Complexity(Quality):
    """How many pixels a person would have to look at, as the entropy of the map's shares, 0 to ln(pixels): lower is better.

    -sum_i p_i ln p_i, p the absolute values over their sum; arXiv:2005.00631.
    """

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        yield from ()
        shares = _shares(attribution)
        return QualityScore(float(-shares.xlogy(shares).sum()))


def _shares(attribution: Attribution) -> Tensor:
    """Return each pixel's share [pixels] of the map's absolute values; a map of zeros is even."""
    sizes = attribution.map.sum(0).double().abs().flatten()
    total = sizes.sum()
    return sizes / total if total > 0 else sizes.new_full((len(sizes),), 1 / len(sizes))
