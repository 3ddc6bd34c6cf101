"""The methods by name: one small class each, in the file of its family."""

from torchserve_explain.attribution.methods import (
    biased_layer,
    cam,
    deep_lift,
    gradient,
    guided,
    lrp,
    path,
    perturbation,
    superpixels,
    xrai,
)
from torchserve_explain.attribution.methods.method import METHODS, Attribution, Case, Method
from torchserve_explain.attribution.methods.smoothing import Smoothing

# Importing a family registers its methods.
FAMILIES = (path, deep_lift, gradient, guided, biased_layer, lrp, cam, perturbation, superpixels, xrai)

__all__ = ["METHODS", "Attribution", "Case", "Method", "Smoothing"]
