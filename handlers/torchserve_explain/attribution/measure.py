"""What a quality is: settings, a cost in rows, and a measure of an explanation that has been made."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Attribution, Case
from torchserve_explain.attribution.methods.method import Draw
from torchserve_explain.attribution.rows import Score
from torchserve_explain.errors import NotFinite, Unsupported


@dataclass(frozen=True)
class QualityScore:
    """A quality's value, and the curve that it is the area of, if it is one."""

    value: float
    curve: tuple[float, ...] | None = None


class Quality:
    """A measure of an explanation; its dataclass fields are the settings that are reported with it."""

    @property
    def repeats(self) -> int:
        """How many times it explains anew."""
        return 0

    def rows(self) -> int:
        """Return how many rows it costs beside the repeated explanations."""
        return 0

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        """Ask for rows and return the measure of the job's attribution."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """Return what it was measured with."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Measurement:
    """A quality of a job's attribution, to be measured by the engine."""

    quality: Quality
    job: Job
    attribution: Attribution

    @property
    def evaluations(self) -> int:
        """How many evaluations it takes, or the least of them."""
        return self.quality.repeats * self.job.evaluations + self.quality.rows()

    def compute(self) -> Computation[QualityScore]:
        """Ask for the measure's rows and return it; raises NotFinite."""
        score = yield from self.quality.measure(self.job, self.attribution)
        if not isfinite(score.value):
            raise NotFinite("the quality of this explanation is not a finite number")
        return score


def target_probabilities(case: Case, count: int, image: Callable[[int], Tensor]) -> Computation[list[float]]:
    """Return the target's probability for `count` images, each made when it is due.

    Of a difference it is the probability of the target rather than of what it is compared with, sigma(difference of logits).
    """
    if case.classifier.head is Head.NONE:
        raise Unsupported("a quantity has no probability that could be followed")
    if case.versus is None:
        return (yield from replace(case, score=Score.PROBABILITY).scores(count, image))
    logits = yield from replace(case, score=Score.LOGIT).scores(count, image)
    return torch.tensor(logits).sigmoid().tolist()


def pixel_ranks(case: Case, attribution: Attribution) -> Tensor:
    """Return each pixel's place [H, W] in the order of falling values; equal ones in random order."""
    values = attribution.map.sum(0).flatten()
    shuffled = torch.from_numpy(case.draw(Draw.ORDER, 0).permutation(values.numel())).to(values.device)
    order = shuffled[values[shuffled].argsort(descending=True, stable=True)]
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places).view(attribution.map.shape[1:])
