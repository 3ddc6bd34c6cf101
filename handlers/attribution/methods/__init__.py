"""The methods by name: one small class each, in the file of its family."""

from attribution.methods import cam, gradient, guided, path, perturbation, relevance
from attribution.methods.method import METHODS, Attribution, Case, Method
from attribution.methods.noise import Smoothing

FAMILIES = (path, gradient, relevance, guided, cam, perturbation)  # importing a family registers its methods

__all__ = ["METHODS", "Attribution", "Case", "Method", "Smoothing"]
