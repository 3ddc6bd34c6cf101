"""The methods by name: one small class each, in the file of its family."""

from attribution.methods import cam, gradient, path, relevance
from attribution.methods.method import METHODS, Attribution, Case, Method
from attribution.methods.noise import Smoothing

__all__ = ["METHODS", "Attribution", "Case", "Method", "Smoothing", "cam", "gradient", "path", "relevance"]
