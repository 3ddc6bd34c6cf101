"""Completeness: a map's sum against the score's rise from the baseline to the image."""

from math import isnan

from torch import Tensor

from torchserve_explain.attribution.methods.method import Case

ROUNDING = 1e-4  # of a score: as far as the sum of a float32 map can be trusted


def completeness_error(total: float, score: float, baseline_score: float) -> float:
    """Return |sum of the map - (score - baseline score)| / |score - baseline score|, finite also where the two are equal."""
    return abs(total - (score - baseline_score)) / rise(score, baseline_score)


def rise(score: float, baseline_score: float) -> float:
    """Return how far two scores are apart, or what rounding could make of it, so that it can divide."""
    return max(abs(score - baseline_score), ROUNDING * max(abs(score), abs(baseline_score)), 1e-12)


def known_error(attribution: Tensor, case: Case, baseline_score: float) -> float | None:
    """Return the completeness error; None for a noisy copy, whose own score is not known."""
    if isnan(case.known_score):
        return None
    return completeness_error(float(attribution.sum()), case.known_score, baseline_score)
