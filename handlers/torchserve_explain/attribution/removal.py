"""What the score does when parts of the image are taken out: single patches, or the most and the least relevant pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.linalg import splu
from scipy.stats import spearmanr
from torch import Tensor

from torchserve_explain.attribution.computation import Computation, background
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.measure import Quality, QualityScore, pixel_ranks, target_probabilities
from torchserve_explain.attribution.methods import Attribution, Case
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.method import Draw

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SingleDeletion(Quality):
    """How well the map ranks patches by what hiding each alone costs the score, as Spearman's correlation: higher is better.

    `patches` x `patches` of them, each replaced by the baseline; arXiv:2407.11910, without its fine-tuning; 0 where the map
    or the drops are all alike.
    """

    patches: int = 4
    baseline: Baseline = Baseline.BLACK

    def rows(self) -> int:
        return self.patches**2 + 1

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        case, hidden = job.case, self.baseline.image(job.case)
        patch = self.numbers(case)

        def without(number: int) -> Tensor:
            return torch.where(patch == number - 1, hidden, case.input)  # number 0: the image itself

        whole, *scores = yield from case.scores(self.rows(), without)
        sums = attribution.map.sum(0).new_zeros(self.patches**2).index_add(0, patch.flatten(), attribution.map.sum(0).flatten())
        drops, held = whole - np.array(scores), sums.cpu().numpy()
        alike = np.ptp(drops) == 0 or np.ptp(held) == 0
        return QualityScore(0.0 if alike else float(spearmanr(drops, held).statistic))

    def numbers(self, case: Case) -> Tensor:
        """Return the number [H, W] of the patch that each pixel lies in, in reading order."""
        height, width = case.input.shape[-2:]
        rows, columns = (torch.arange(n, device=case.input.device) * self.patches // n for n in (height, width))
        return rows[:, None] * self.patches + columns


@dataclass(frozen=True)
class Road(Quality):
    """How much more of the probability is left when the least relevant pixels go than when the most do: higher is better.

    Mean over fractions removed of (p least - p most) / 2; a removed pixel becomes the weighted mean of its neighbours, all
    of them solved together, plus noise, so that a mask shows no shape; arXiv:2202.00449.
    """

    fractions: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    noise: float = 0.01

    def rows(self) -> int:
        return 2 * len(self.fractions)

    def measure(self, job: Job, attribution: Attribution) -> Computation[QualityScore]:
        case, ranks = job.case, pixel_ranks(job.case, attribution)
        images: list[Tensor] = []
        for number, fraction in enumerate(self.fractions):
            count = round(fraction * ranks.numel())
            for removed in (ranks >= ranks.numel() - count, ranks < count):
                images += [(yield from background(self.without, case, removed, number))]
        left = np.array((yield from target_probabilities(case, len(images), images.__getitem__)))
        return QualityScore(float((left[::2] - left[1::2]).mean() / 2))

    def without(self, case: Case, removed: Tensor, number: int) -> Tensor:
        """Return the image [C, H, W] with the removed pixels [H, W] imputed, and noise of draw `number` on them."""
        missing = removed.cpu().numpy()
        filled = imputed(case.input.double().cpu().numpy(), missing)
        noise = self.noise * case.draw(Draw.PERTURBATION, number).standard_normal(filled.shape)
        return torch.from_numpy(np.where(missing, filled + noise, filled)).to(case.input)


def imputed(image: Floats, missing: Mask) -> Floats:
    """Return an image [C, H, W] whose missing pixels [H, W] are each the weighted mean of their eight neighbours."""
    rows, columns = np.nonzero(missing)
    number = np.full(missing.shape, -1)
    number[rows, columns] = own = np.arange(len(rows))
    known, weights = np.zeros((len(rows), len(image))), np.zeros(len(rows))
    entries: list[tuple[NDArray[np.int64], NDArray[np.int64], float]] = []
    for down, right in ((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)):
        weight = 1 / 12 if down and right else 1 / 6
        y, x = rows + down, columns + right
        inside = (y >= 0) & (x >= 0) & (y < missing.shape[0]) & (x < missing.shape[1])
        weights[inside] += weight
        unknown = inside.copy()
        unknown[inside] = missing[y[inside], x[inside]]
        given = inside & ~unknown
        known[given] += weight * image[:, y[given], x[given]].T
        entries.append((own[unknown], number[y[unknown], x[unknown]], -weight))
    values = np.concatenate([weights, *(np.full(len(one), weight) for one, _, weight in entries)])
    at = np.concatenate([own, *(one for one, _, _ in entries)]), np.concatenate([own, *(other for _, other, _ in entries)])
    filled = image.copy()
    if len(rows):
        filled[:, rows, columns] = (
            splu(
                coo_array((values, at), shape=(len(rows),) * 2).tocsc(),
                permc_spec="MMD_AT_PLUS_A",
                diag_pivot_thresh=0,
                options={"SymmetricMode": True},
            )
            .solve(known)
            .T
        )
    return filled
