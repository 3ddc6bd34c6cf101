"""Where a map lies against ground truth: 0 to 1, higher is better, of maps [H, W] and boolean masks [H, W].

The positive part of a map counts: what raises the score. Values that are equal are taken in a random order, whose expected
result is returned, so that a map that is nowhere positive scores the mask's share of the image in all three: what chance does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchserve_explain.errors import AttributionError

Values = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Localization = Callable[[Values, Mask], float]


def pointing_game(values: Values, mask: Mask) -> float:
    """Return whether the map's maximum lies within the mask (arXiv:1608.00825, without its tolerance)."""
    positive = _checked(values, mask)
    return float(mask[positive == positive.max()].mean())


def mass_accuracy(values: Values, mask: Mask) -> float:
    """Return the share of the map that lies within the mask (arXiv:2003.07258, relevance mass accuracy)."""
    positive = _checked(values, mask)
    total = positive.sum()
    return float(positive[mask].sum() / total) if total else float(mask.mean())


def rank_accuracy(values: Values, mask: Mask) -> float:
    """Return the share within the mask of as many of the map's highest pixels as the mask has (arXiv:2003.07258)."""
    positive, count = _checked(values, mask), int(mask.sum())
    least = np.partition(positive, -count, axis=None)[-count]
    higher, equal = positive > least, positive == least
    return float((mask[higher].sum() + (count - higher.sum()) * mask[equal].mean()) / count)


LOCALIZATIONS: dict[str, Localization] = {one.__name__: one for one in (pointing_game, mass_accuracy, rank_accuracy)}


def centre_map(height: int, width: int) -> Values:
    """Return the map [height, width] of whoever guesses the centre: a Gaussian of a quarter of each side."""
    y, x = ((2 * np.arange(side) + 1 - side) * (2 / side) for side in (height, width))  # pixels' centres, in deviations
    centred: Values = np.exp(-(y[:, None] ** 2 + x**2) / 2)
    return centred


def _checked(values: Values, mask: Mask) -> NDArray[np.float64]:
    """Return the positive part of a map that a mask of its size belongs to; raises AttributionError."""
    if values.shape != mask.shape or mask.dtype != np.bool_ or not mask.any():
        allowed = f"a boolean mask of the map's size {values.shape} with a pixel that is true"
        raise AttributionError(f"a mask {mask.shape} of {mask.dtype} is not allowed; allowed: {allowed}")
    return values.astype(np.float64).clip(min=0)
