"""Whether maps notice that what the model has learned is gone: the parameter randomisation test, once for all layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import entropy, spearmanr
from torch import Tensor

from torchserve_explain.attribution.computation import Result
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case, Method
from torchserve_explain.attribution.quality import structural_similarity

BINS = 100  # of the histogram whose entropy is a map's complexity
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Randomisation:
    """How alike the maps of a model and of its shuffled twin are, means over images; each is 0 where a map is all alike.

    `rank_correlation` is Spearman's of the values' sizes and `similarity` the SSIM, lower is better (arXiv:1810.03292).
    `complexity_rise` is the relative rise of the entropy of the values' histogram, higher is better (arXiv:2401.06465).
    """

    rank_correlation: float
    similarity: float
    complexity_rise: float


def randomisation(method: Method, trained: Engine, shuffled: Engine, images: Sequence[Tensor]) -> Randomisation | None:
    """Explain images [C, H, W] by both models, for what the trained one predicts; None where a map was not made."""
    targets = [int(logits.argmax()) for logits in trained.logits(images)]
    pairs = zip(*(_maps(method, engine, images, targets) for engine in (trained, shuffled)), strict=True)
    found = [compared(*pair) for pair in pairs if not any(one is None for one in pair)]
    return Randomisation(*np.mean(found, 0).tolist()) if len(found) == len(images) else None


def _maps(method: Method, engine: Engine, images: Sequence[Tensor], targets: Sequence[int]) -> list[Floats | None]:
    scores = [float(logits[target]) for logits, target in zip(engine.logits(images), targets, strict=True)]
    cases = [Case(engine.classifier, *one) for one in zip(images, targets, strict=True)]
    jobs = [Job(method, replace(case, known_score=score)) for case, score in zip(cases, scores, strict=True)]
    outcomes = engine.run(jobs)
    return [one.value.map.sum(0).double().cpu().numpy() if isinstance(one, Result) else None for one in outcomes]


def compared(first: Floats, second: Floats) -> tuple[float, float, float]:
    """Return rank correlation, similarity and rise of complexity of a map [H, W] and its twin."""
    before, after = (float(entropy(np.histogram(values, BINS)[0])) for values in (first, second))
    rise = (after - before) / before if before else 0.0
    if not (np.ptp(np.abs(first)) and np.ptp(np.abs(second))):
        return 0.0, 0.0, rise
    correlation = float(spearmanr(np.abs(first), np.abs(second), axis=None).statistic)
    return correlation, structural_similarity(first, second), rise
