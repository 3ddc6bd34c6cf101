"""Two classes told apart by the difference of their features' means: nothing is trained by gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from torchserve_explain.errors import TrainingError

FOLDS, REPEATS = 5, 20


@dataclass(frozen=True)
class Roc:
    """What each threshold on g costs and brings: rates of false and true positives of the second class, and their area."""

    false_positives: list[float]
    true_positives: list[float]
    auc: float
    threshold: float


def mean_difference(features: Tensor, labels: Tensor) -> Tensor:
    """Return the direction [d] from the mean of class 0 to that of class 1 among features [n, d], of length 1.

    Raises TrainingError where the means are the same.
    """
    difference = features[labels == 1].mean(0) - features[labels == 0].mean(0)
    if not difference.any():
        raise TrainingError("the features of the two classes have the same mean: nothing tells them apart")
    direction: Tensor = difference / difference.norm()
    return direction


def best_threshold(scores: Tensor, labels: Tensor) -> Roc:
    """Find the threshold on scores [n] with the largest Youden index, true less false positives; class 1 lies above it.

    It is halfway between the scores that it parts.
    """
    false, true, cuts = roc_curve(labels.numpy(), scores.numpy(), drop_intermediate=False)
    place = int(np.argmax(true - false))
    lowest_above = float(cuts[place]) if np.isfinite(cuts[place]) else float(scores.max())
    below = scores[scores < lowest_above]
    threshold = (lowest_above + float(below.max())) / 2 if len(below) else lowest_above
    return Roc(false.tolist(), true.tolist(), float(roc_auc_score(labels.numpy(), scores.numpy())), threshold)


def held_out_accuracy(features: Tensor, labels: Tensor, seed: int) -> float | None:
    """Return the accuracy on images that took no part: each of five folds once, the next one for its threshold.

    The mean over twenty divisions into folds; None where a class has fewer images than there are folds.
    """
    if int(torch.bincount(labels, minlength=2).min()) < FOLDS:
        return None
    rights = [right for repeat in range(REPEATS) for right in _rights(features, labels, seed + repeat)]
    return float(torch.cat(rights).float().mean())


def _rights(features: Tensor, labels: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield, fold by fold, whether each of its images is classified rightly."""
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    folds = [torch.from_numpy(test) for _, test in splitter.split(np.zeros(len(labels)), labels.numpy())]
    for number, test in enumerate(folds):
        val = folds[(number + 1) % FOLDS]
        train = torch.cat([fold for fold in folds if fold is not test and fold is not val])
        direction = mean_difference(features[train], labels[train])
        threshold = best_threshold(features[val] @ direction, labels[val]).threshold
        yield (features[test] @ direction > threshold) == (labels[test] == 1)
