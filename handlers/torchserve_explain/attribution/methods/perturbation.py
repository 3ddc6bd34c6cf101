"""Perturbation: the score with parts of the image hidden; forward rows alone."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, both
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.method import Attribution, Case, Draw, Method, Samples, stacked
from torchserve_explain.attribution.rows import Evaluation

CELLS = 7  # across a random mask
WINDOWS = 8  # side by side across the image; each is moved by half its side


@dataclass(frozen=True)
class Occlusion(Method):
    """How much the score falls when a window slides over the image and puts the baseline there.

    map[y, x] = mean over the windows w that cover it of F(x) - F(x hidden in w), signed; arXiv:1311.2901,
    section 4.2. A window is an eighth of the image wide and high, and moves by half of that.
    """

    name: ClassVar[str] = "occlusion"
    needs_gradient: ClassVar[bool] = False

    baseline: Baseline = Baseline.BLACK

    def evaluations(self, classifier: Classifier) -> int:
        return (2 * WINDOWS - 1) ** 2 + 1

    def attribute(self, case: Case) -> Computation[Attribution]:
        windows = _windows(*case.input.shape[-2:])
        hidden = self.baseline.in_turn(case)

        def occluded(index: int) -> Tensor:
            rows, columns = windows[index]
            image = case.input.clone()
            image[:, rows, columns] = hidden(index)[:, rows, columns]
            return image

        (whole,), scores = yield from both(case.scores(1, lambda _: case.input), case.scores(len(windows), occluded))
        left, covered = (torch.zeros_like(case.input[:1]) for _ in range(2))
        for (rows, columns), score in zip(windows, scores, strict=True):
            left[:, rows, columns] += score
            covered[:, rows, columns] += 1
        return Attribution(whole - left / covered)


def _windows(height: int, width: int) -> list[tuple[slice, slice]]:
    """Return the positions of the sliding window, in reading order; together they cover the image."""
    rows, columns = (_slices(length) for length in (height, width))
    return [(row, column) for row in rows for column in columns]


def _slices(length: int) -> list[slice]:
    side = ceil(length / WINDOWS)
    starts = [round(index * (length - side) / (2 * WINDOWS - 2)) for index in range(2 * WINDOWS - 1)]
    return [slice(start, start + side) for start in starts]


@dataclass(frozen=True)
class Rise(Method):
    """How much higher the score is, on average over random masks, where a pixel is shown.

    map[p] = sum_i M_i(p) F(x under M_i) / sum_i M_i(p) - mean_i F(x under M_i), signed; M_i is 7 x 7 random cells, half of
    them shown, enlarged and shifted; arXiv:1806.07421, equation 6, by each pixel's own sum, less the mean score.
    """

    name: ClassVar[str] = "rise"
    needs_gradient: ClassVar[bool] = False

    baseline: Baseline = Baseline.BLACK
    samples: Samples = 300

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples

    def attribute(self, case: Case) -> Computation[Attribution]:
        hidden = self.baseline.in_turn(case)
        shown, score_shown = (torch.zeros_like(case.input[:1]) for _ in range(2))
        scores: list[float] = []

        def masked(number: int) -> Tensor:
            return torch.lerp(hidden(number), case.input, random_mask(case, number))

        def add(start: int, evaluation: Evaluation) -> None:
            for number, score in enumerate(evaluation.scores.tolist(), start):
                mask = random_mask(case, number)
                shown.add_(mask)
                score_shown.add_(mask, alpha=score)
                scores.append(score)

        yield [case.rows(self.samples, stacked(masked), add, gradient=False)]
        mean = sum(scores) / len(scores)
        return Attribution((score_shown / shown.clamp(min=1e-6) - mean) * (shown > 0))


def random_mask(case: Case, number: int) -> Tensor:
    """Return mask `number` [1, H, W] with values from 0 (hidden) to 1."""
    draw = case.draw(Draw.MASK, number)
    cells = torch.from_numpy(draw.random((1, 1, CELLS + 1, CELLS + 1)) < 0.5).to(case.input)
    height, width = case.input.shape[-2:]
    down, right = ceil(height / CELLS), ceil(width / CELLS)  # a cell's size
    large = interpolate(cells, size=((CELLS + 1) * down, (CELLS + 1) * right), mode="bilinear", align_corners=False)
    top, left = int(draw.integers(down)), int(draw.integers(right))
    return large[0, :, top : top + height, left : left + width]
