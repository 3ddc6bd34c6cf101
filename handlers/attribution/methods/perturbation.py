"""Perturbation: the score with parts of the image hidden; forward rows alone."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from attribution.classifier import Classifier
from attribution.methods.baselines import Baseline
from attribution.methods.method import Attribution, Case, Method, register, scores_into, stacked
from attribution.rows import Asking, Evaluation

WINDOWS = 8  # side by side across the image; each is moved by half its side


@register("occlusion")
@dataclass(frozen=True)
class Occlusion(Method):
    """How much the score falls when a window slides over the image and puts the baseline there.

    map[y, x] = mean over the windows w that cover it of F(x) - F(x hidden in w), signed; arXiv:1311.2901,
    section 4.2. A window is an eighth of the image wide and high, and moves by half of that.
    """

    baseline: Baseline = Baseline.BLACK

    def evaluations(self, classifier: Classifier) -> int:
        return (2 * WINDOWS - 1) ** 2 + 1

    def attribute(self, case: Case) -> Asking[Attribution]:
        windows = _windows(*case.input.shape[-2:])
        hidden = self.baseline.image(case)
        left, covered = (torch.zeros_like(case.input[:1]) for _ in range(2))
        whole: list[float] = []

        def occluded(place: int) -> Tensor:
            rows, columns = windows[place]
            image = case.input.clone()
            image[:, rows, columns] = hidden[:, rows, columns]
            return image

        def add(start: int, evaluation: Evaluation) -> None:
            for (rows, columns), score in zip(windows[start:], evaluation.scores.tolist(), strict=False):
                left[:, rows, columns] += score
                covered[:, rows, columns] += 1

        yield [
            case.rows(1, lambda _start, _stop: case.input[None], scores_into(whole), gradient=False),
            case.rows(len(windows), stacked(occluded), add, gradient=False),
        ]
        return Attribution(whole[0] - left / covered)


def _windows(height: int, width: int) -> list[tuple[slice, slice]]:
    """Return the places of the sliding window, in reading order; together they cover the image."""
    rows, columns = (_slices(length) for length in (height, width))
    return [(row, column) for row in rows for column in columns]


def _slices(length: int) -> list[slice]:
    side = ceil(length / WINDOWS)
    starts = [round(place * (length - side) / (2 * WINDOWS - 2)) for place in range(2 * WINDOWS - 1)]
    return [slice(start, start + side) for start in starts]
