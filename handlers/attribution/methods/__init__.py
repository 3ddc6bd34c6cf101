"""The methods by name: one small class each, in the file of its family."""

from attribution.methods import cam, deep_lift, gradient, guided, lrp, path, perturbation, regions, relevance, superpixels
from attribution.methods.method import METHODS, Attribution, Case, Method
from attribution.methods.noise import Smoothing

# Importing a family registers its methods.
FAMILIES = (path, deep_lift, gradient, guided, relevance, lrp, cam, perturbation, superpixels, regions)

__all__ = ["METHODS", "Attribution", "Case", "Method", "Smoothing"]
