"""Quality: what further evaluations of the model say of an explanation that has been made."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isfinite, nan
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from torchserve_explain.attribution.computation import Computation, together
from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Attribution, Case
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.method import Draw, scores_into, stacked
from torchserve_explain.attribution.rows import Score
from torchserve_explain.errors import NotFinite, Unsupported

QUALITIES: dict[str, type["Quality"]] = {}

Q = TypeVar("Q", bound=type["Quality"])


@dataclass(frozen=True)
class QualityScore:
    """A quality's value, and the curve that it is the area of, if it is one."""

    value: float
    curve: tuple[float, ...] | None = None


class Quality:
    """A measure of an explanation; its dataclass fields are the settings that are told with it."""

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


def _register(name: str) -> Callable[[Q], Q]:
    def decorate(quality: Q) -> Q:
        QUALITIES[name] = quality
        return quality

    return decorate


@_register("max_sensitivity")
@dataclass(frozen=True)
class MaxSensitivity(Quality):
    """How far the map can move when the image hardly does: the largest change over random perturbations, lower is better.

    max_k |map(x + e_k) - map(x)| / |map(x)|, e_k uniform within `radius` of the normalised input, Frobenius norm;
    arXiv:1901.09392, definition 2. Random methods draw the same samples for every perturbation.
    """

    radius: float = 0.02
    samples: int = 10
    norm: str = "fro"

    @property
    def repeats(self) -> int:
        return self.samples

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        size = float(attribution.map.norm()) or 1.0
        changes: list[float] = []
        copies = (replace(job, case=self.perturbed(job.case, k)).compute() for k in range(self.samples))
        yield from together(copies, lambda copy: changes.append(float((copy.map - attribution.map).norm()) / size))
        return QualityScore(max(changes))

    def perturbed(self, case: Case, index: int) -> Case:
        """Return the case of the image moved by perturbation number `index`."""
        moved = case.draw(Draw.PERTURBATION, index).uniform(-self.radius, self.radius, tuple(case.input.shape))
        return replace(case, input=case.input + torch.from_numpy(moved).to(case.input), known_score=nan)


@_register("infidelity")
@dataclass(frozen=True)
class Infidelity(Quality):
    """How badly the map foretells what hiding a part does to the score, lower is better.

    mean_k (beta * sum(I_k map) - (F(x) - F(x - I_k)))^2, I_k = x - baseline in a random square, beta the factor that
    suits the map best, so that maps in other units compare; arXiv:1901.09392, definition 1 and section 3.
    """

    perturbation: str = "square"
    side: float = 0.25
    baseline: Baseline = Baseline.BLACK
    samples: int = 50
    normalized: bool = True

    def rows(self) -> int:
        return self.samples

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        case, hidden, scores = job.case, self.baseline.image(job.case), list[float]()

        def without(number: int) -> Tensor:
            return torch.where(self.square(case, number), hidden, case.input)

        yield [case.rows(self.samples, stacked(without), scores_into(scores), gradient=False)]
        # A map of one channel speaks of all of them alike.
        removed = (case.input - hidden) * attribution.map / (len(case.input) / len(attribution.map))
        foretold = np.array([float((removed * self.square(case, k)).sum()) for k in range(self.samples)])
        fell = case.known_score - np.array(scores)
        beta = float(foretold @ fell) / (float(foretold @ foretold) or 1.0)
        return QualityScore(float(np.mean((beta * foretold - fell) ** 2)))

    def square(self, case: Case, number: int) -> Tensor:
        """Return mask `number` [1, H, W], true in a random square."""
        height, width = case.input.shape[-2:]
        side = max(1, round(self.side * min(height, width)))
        draw = case.draw(Draw.PERTURBATION, number)
        top, left = int(draw.integers(height - side + 1)), int(draw.integers(width - side + 1))
        mask = torch.zeros(1, height, width, dtype=torch.bool, device=case.input.device)
        mask[:, top : top + side, left : left + side] = True
        return mask


@dataclass(frozen=True)
class _Curve(Quality):
    """The probability of the target while pixels change from one image to another, those the map names first first.

    Of a difference it is the probability of the target rather than of what it is compared with, sigma(difference of logits).
    """

    steps: int = 50

    def rows(self) -> int:
        return self.steps + 1

    def between(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return the images that the curve starts and ends with."""
        raise NotImplementedError

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        if job.case.classifier.head is Head.NONE:
            raise Unsupported("a quantity has no probability that a curve could follow")
        compared, scores = job.case.versus is not None, list[float]()
        case = replace(job.case, score=Score.LOGIT if compared else Score.PROBABILITY)
        first, last = self.between(case)
        rank = self.rank(case, attribution)

        def changed(step: int) -> Tensor:
            return torch.where(rank < step * rank.numel() / self.steps, last, first)

        yield [case.rows(self.steps + 1, stacked(changed), scores_into(scores), gradient=False)]
        probabilities = torch.tensor(scores).sigmoid().tolist() if compared else scores
        return QualityScore(float(np.trapezoid(probabilities) / self.steps), tuple(probabilities))

    def rank(self, case: Case, attribution: Attribution) -> Tensor:
        """Return each pixel's place [H, W] in the order of falling values; equal ones in random order."""
        values = attribution.map.sum(0).flatten()
        shuffled = torch.from_numpy(case.draw(Draw.ORDER, 0).permutation(values.numel())).to(values.device)
        order = shuffled[values[shuffled].argsort(descending=True, stable=True)]
        return (
            torch.empty_like(order)
            .scatter_(0, order, torch.arange(len(order), device=order.device))
            .view(attribution.map.shape[1:])
        )


@_register("deletion")
@dataclass(frozen=True)
class Deletion(_Curve):
    """Area under the target's probability while the most relevant pixels are blacked out first: lower is better.

    arXiv:1806.07421, section 4.2.
    """

    baseline: Baseline = Baseline.BLACK

    def between(self, case: Case) -> tuple[Tensor, Tensor]:
        return case.input, self.baseline.image(case)


@_register("insertion")
@dataclass(frozen=True)
class Insertion(_Curve):
    """Area under the target's probability while the most relevant pixels come into the blurred image first: higher is better.

    arXiv:1806.07421, section 4.2.
    """

    baseline: Baseline = Baseline.BLUR

    def between(self, case: Case) -> tuple[Tensor, Tensor]:
        return self.baseline.image(case), case.input
