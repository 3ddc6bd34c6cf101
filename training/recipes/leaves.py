"""Healthy and diseased leaves, report 5: the mean difference of VGG-16's features, thresholded, explained by its gradient."""

from torchserve_explain.attribution.classifier import Normalization
from training.recipe import Part, Recipe

RECIPE = Recipe(
    backbones=("vgg16",),
    part=Part.DIRECTION,
    normalization={"vgg16": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))},  # pixels in [0, 1], as in the report
    ratio=(0.6, 0.2, 0.2),
    method="biased_layer",
)
