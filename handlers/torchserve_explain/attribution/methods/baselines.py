"""Baselines: the image that stands for "nothing there", given before normalisation, or images of what there usually is."""

from collections.abc import Callable
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from torchserve_explain.attribution.classifier import Classifier, References
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.methods.method import Case, Draw
from torchserve_explain.attribution.scores import selected
from torchserve_explain.errors import Unsupported

# The blur that leaves no object in a photo: 20 pixels at 224 (Sturmfels et al., 10.23915/distill.00022).
BLUR_FRACTION = 20 / 224


class Baseline(StrEnum):
    """The baselines by name; `mean` is the mean of the classifier's training images, its normalisation's mean.

    `references` are the classifier's own images. Paths and DeepLIFT are the mean over all of them; methods that hide parts of
    the image in many rows take them in turn.
    """

    BLACK = "black"
    WHITE = "white"
    MEAN = "mean"
    BLUR = "blur"
    NOISE = "noise"
    REFERENCES = "references"

    def serves(self, classifier: Classifier) -> bool:
        """Whether a classifier has it."""
        return self is not Baseline.REFERENCES or classifier.references is not None

    def size(self, classifier: Classifier) -> int:
        """Return how many images it is."""
        return len(_references(classifier).inputs) if self is Baseline.REFERENCES else 1

    @property
    def score_rows(self) -> int:
        """How many rows its scores cost."""
        return 0 if self is Baseline.REFERENCES else 1

    def images(self, case: Case) -> Tensor:
        """Return all its images [n, C, H, W], normalised."""
        return _references(case.classifier).inputs if self is Baseline.REFERENCES else self.image(case)[None]

    def scores(self, case: Case) -> Computation[list[float]]:
        """Return the scores [n] of its images; those of references are known and cost no row."""
        if self is not Baseline.REFERENCES:
            return (yield from case.scores(1, lambda _: self.image(case)))
        logits = _references(case.classifier).logits
        asked = [[one] * len(logits) for one in (case.target, case.score, case.versus)]
        return selected(case.classifier.head, logits, *asked).tolist()  # type: ignore[arg-type]

    def turns(self, case: Case) -> Callable[[int], int]:
        """Return which of its images row number k takes: all in turn, in random order."""
        order = case.draw(Draw.REFERENCE, 0).permutation(self.size(case.classifier)).tolist()
        return lambda row: order[row % len(order)]

    def in_turn(self, case: Case) -> Callable[[int], Tensor]:
        """Return the image [C, H, W] that row number k takes."""
        images, turn = self.images(case), self.turns(case)
        return lambda row: images[turn(row)]

    def image(self, case: Case, index: int = 0) -> Tensor:
        """Return the normalised baseline [C, H, W]; of `noise` and `references` the one of this number."""
        normalise = case.classifier.normalization
        match self:
            case Baseline.BLACK:
                return normalise(torch.zeros_like(case.input))
            case Baseline.WHITE:
                return normalise(torch.ones_like(case.input))
            case Baseline.MEAN:
                return torch.zeros_like(case.input)
            case Baseline.BLUR:
                sigma = max(1.0, BLUR_FRACTION * min(case.input.shape[-2:]))
                reach = min(int(3 * sigma), min(case.input.shape[-2:]) - 1)  # the blur mirrors the image at its border
                blurred: Tensor = gaussian_blur(case.input[None], [2 * reach + 1] * 2, [sigma, sigma])[0]
                return blurred
            case Baseline.NOISE:
                pixels = case.draw(Draw.BASELINE, index).random(tuple(case.input.shape), dtype=np.float32)
                return normalise(torch.from_numpy(pixels).to(case.input))
            case Baseline.REFERENCES:
                return self.images(case)[index]


def _references(classifier: Classifier) -> References:
    """Return the classifier's references; raises Unsupported where it has none."""
    if classifier.references is None:
        allowed = ", ".join(one for one in Baseline if one.serves(classifier))
        raise Unsupported(f"baseline: references is not allowed: the archive holds no references; allowed: {allowed}")
    return classifier.references
