"""Quality: what further evaluations of the model say of an explanation that has been made."""

from dataclasses import dataclass, replace
from math import nan

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity as ssim
from torch import Tensor

from torchserve_explain.attribution.complexity import Complexity, Sparseness
from torchserve_explain.attribution.computation import Computation, together
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.measure import Measurement, Quality, QualityScore, pixel_ranks, target_probabilities
from torchserve_explain.attribution.methods import Attribution, Case
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.method import Draw, scores_into, stacked
from torchserve_explain.attribution.removal import Road, SingleDeletion
from torchserve_explain.errors import Unsupported

Floats = NDArray[np.float64]


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
    """The probability of the target while pixels change from one image to another, those the map names first first."""

    steps: int = 50

    def rows(self) -> int:
        return self.steps + 1

    def between(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return the images that the curve starts and ends with."""
        raise NotImplementedError

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        first, last = self.between(job.case)
        ranks = pixel_ranks(job.case, attribution)

        def changed(step: int) -> Tensor:
            return torch.where(ranks < step * ranks.numel() / self.steps, last, first)

        probabilities = yield from target_probabilities(job.case, self.steps + 1, changed)
        return QualityScore(float(np.trapezoid(probabilities) / self.steps), tuple(probabilities))


@dataclass(frozen=True)
class Deletion(_Curve):
    """Area under the target's probability while the most relevant pixels are blacked out first: lower is better.

    arXiv:1806.07421, section 4.2.
    """

    baseline: Baseline = Baseline.BLACK

    def between(self, case: Case) -> tuple[Tensor, Tensor]:
        return case.input, self.baseline.image(case)


@dataclass(frozen=True)
class Insertion(_Curve):
    """Area under the target's probability while the most relevant pixels come into the blurred image first: higher is better.

    arXiv:1806.07421, section 4.2.
    """

    baseline: Baseline = Baseline.BLUR

    def between(self, case: Case) -> tuple[Tensor, Tensor]:
        return self.baseline.image(case), case.input


@dataclass(frozen=True)
class RandomLogit(Quality):
    """How alike the map is to that of another class, drawn at random, which the model was not asked about: lower is better.

    Structural similarity (SSIM) of both maps, each over its largest absolute value; 1: they are the same;
    arXiv:1912.09818.
    """

    similarity: str = "ssim"

    @property
    def repeats(self) -> int:
        return 1

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        other = replace(job, case=self.other(job.case)).compute()
        maps: list[Attribution] = []
        yield from together([other], maps.append)
        return QualityScore(structural_similarity(*(one.map.sum(0).double().cpu().numpy() for one in (attribution, *maps))))

    def other(self, case: Case) -> Case:
        """Return the case of another class; raises Unsupported where there is none."""
        classes = [index for index in range(case.classifier.classes) if index != case.target]
        if not classes:
            raise Unsupported("the model has no other output to compare with")
        drawn = classes[int(case.draw(Draw.CLASS, 0).integers(len(classes)))]
        versus = case.target if drawn == case.versus else case.versus
        return replace(case, target=drawn, versus=versus, known_score=nan, known=None)


def structural_similarity(first: Floats, second: Floats) -> float:
    """Return the SSIM of two maps [H, W], each over its largest absolute value."""
    scaled = [values / (np.abs(values).max() or 1.0) for values in (first, second)]
    spread = max(float(np.max(scaled) - np.min(scaled)), 1e-12)
    side = min(7, *first.shape)
    found: float = ssim(*scaled, win_size=side - 1 + side % 2, data_range=spread)  # type: ignore[no-untyped-call]
    return float(found)


QUALITIES: dict[str, type[Quality]] = {
    "max_sensitivity": MaxSensitivity,
    "infidelity": Infidelity,
    "deletion": Deletion,
    "insertion": Insertion,
    "sparseness": Sparseness,
    "complexity": Complexity,
    "random_logit": RandomLogit,
    "single_deletion": SingleDeletion,
    "road": Road,
}

__all__ = ["QUALITIES", "Measurement", "Quality", "QualityScore"]
