"""Baselines: the image that stands for "nothing there", given before normalisation."""

from enum import StrEnum

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from torchserve_explain.attribution.methods.method import Case, Draw

# The blur that leaves no object in a photo: 20 pixels at 224 (Sturmfels et al., 10.23915/distill.00022).
BLUR_FRACTION = 20 / 224


class Baseline(StrEnum):
    """The baselines by name; `mean` is the mean of the classifier's training images, its normalisation's mean."""

    BLACK = "black"
    WHITE = "white"
    MEAN = "mean"
    BLUR = "blur"
    NOISE = "noise"

    def image(self, case: Case, index: int = 0) -> Tensor:
        """Return the normalised baseline [C, H, W]; for `noise`, draw number `index` of uniform pixels."""
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
