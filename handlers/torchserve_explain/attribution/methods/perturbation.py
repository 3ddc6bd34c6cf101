"""Perturbation: the score with parts of the image hidden; forward rows alone."""

from copy import copy
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, both
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.drawing import DrawingMethod, error_of_halves
from torchserve_explain.attribution.methods.method import Attribution, Case, Draw, Family, Method, Samples, stacked
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
    family: ClassVar[Family] = Family.NO_GRADIENTS
    first: ClassVar[bool] = True
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
class Rise(DrawingMethod):
    """How much higher the score is, on average over random masks, where a pixel is shown.

    map[p] = sum_i M_i(p) F(x under M_i) / sum_i M_i(p) - mean_i F(x under M_i), signed; M_i is 7 x 7 random cells, half of
    them shown, enlarged and shifted; arXiv:1806.07421, equation 6, by each pixel's own sum, less the mean score. The
    sampling error is that of halves.
    """

    name: ClassVar[str] = "rise"
    family: ClassVar[Family] = Family.NO_GRADIENTS
    needs_gradient: ClassVar[bool] = False

    samples: Samples = 300

    def evaluations(self, classifier: Classifier) -> int:
        return self.samples

    def attribute(self, case: Case) -> Computation[Attribution]:
        hidden, sums = self.baseline.in_turn(case), [_MaskSums(case) for _ in range(2)]

        def estimate(numbers: range) -> Computation[Attribution]:
            def masked(row: int) -> Tensor:
                return torch.lerp(hidden(numbers[row]), case.input, random_mask(case, numbers[row]))

            def add(start: int, evaluation: Evaluation) -> None:
                for number, score in zip(numbers[start:], evaluation.scores.tolist(), strict=False):
                    sums[self.half(case, number)].add(random_mask(case, number), score)

            yield [case.rows(len(numbers), stacked(masked), add, gradient=False)]
            one, other = sums
            whole = (one + other).map()
            return Attribution(whole, sampling_error=error_of_halves(whole, one.map(), other.map()) if other.count else None)

        return self.drawn(case, estimate)


class _MaskSums:
    """The sums over masks of what was shown, and of that times the score."""

    def __init__(self, case: Case) -> None:
        self._shown, self._score_shown = (torch.zeros_like(case.input[:1]) for _ in range(2))
        self._score, self.count = 0.0, 0

    def add(self, mask: Tensor, score: float) -> None:
        """Take one mask [1, H, W] in."""
        self._shown += mask
        self._score_shown.add_(mask, alpha=score)
        self._score += score
        self.count += 1

    def __add__(self, other: "_MaskSums") -> "_MaskSums":
        both = copy(self)
        for name, value in vars(other).items():
            setattr(both, name, getattr(self, name) + value)
        return both

    def map(self) -> Tensor:
        """Return the map [1, H, W]: where nothing was shown it is zero."""
        mean = self._score / self.count
        return (self._score_shown / self._shown.clamp(min=1e-6) - mean) * (self._shown > 0)


def random_mask(case: Case, number: int) -> Tensor:
    """Return mask `number` [1, H, W] with values from 0 (hidden) to 1."""
    draw = case.draw(Draw.MASK, number)
    cells = torch.from_numpy(draw.random((1, 1, CELLS + 1, CELLS + 1)) < 0.5).to(case.input)
    height, width = case.input.shape[-2:]
    down, right = ceil(height / CELLS), ceil(width / CELLS)  # a cell's size
    large = interpolate(cells, size=((CELLS + 1) * down, (CELLS + 1) * right), mode="bilinear", align_corners=False)
    top, left = int(draw.integers(down)), int(draw.integers(right))
    return large[0, :, top : top + height, left : left + width]
