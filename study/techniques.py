"""The techniques that are compared: a method, smoothed or not."""

from collections.abc import Iterator
from dataclasses import dataclass

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.methods import METHODS, Method, Smoothing
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.gradient import Saliency
from torchserve_explain.attribution.methods.guided import GuidedBackprop, GuidedGradCam
from torchserve_explain.attribution.methods.lrp import LayerwiseRelevance
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.perturbation import Occlusion
from torchserve_explain.attribution.methods.smoothing import SmoothingKind

COPIES = 4  # of the smoothed techniques


@dataclass(frozen=True)
class Technique:
    """A method with its parameters, smoothed or not."""

    name: str
    method: Method
    smoothing: Smoothing | None = None


# Those that docs/study compares with a report on ResNet-18: Integrated Gradients three times, and five others.
EIGHT = (
    Technique("integrated_gradients", IntegratedGradients()),
    Technique("integrated_gradients smoothgrad_sq", IntegratedGradients(), Smoothing(SmoothingKind.SMOOTHGRAD_SQ, COPIES)),
    Technique("integrated_gradients vargrad", IntegratedGradients(), Smoothing(SmoothingKind.VARGRAD, COPIES)),
    Technique("gradient_shap", GradientShap()),
    Technique("occlusion", Occlusion()),
    Technique("lrp", LayerwiseRelevance()),
    Technique("guided_backprop", GuidedBackprop()),
    Technique("guided_grad_cam", GuidedGradCam()),
)
SMOOTHED = Technique("saliency smoothgrad", Saliency(), Smoothing(SmoothingKind.SMOOTHGRAD))


def techniques(classifier: Classifier) -> Iterator[Technique]:
    """Yield the eight, a smoothed gradient, and every other method, those that serve the classifier."""
    known = {technique.name for technique in EIGHT}
    others = (Technique(name, method()) for name, method in METHODS.items() if name not in known)
    for technique in (*EIGHT, SMOOTHED, *others):
        if technique.method.unsupported(classifier) is None:
            yield technique
