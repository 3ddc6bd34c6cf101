"""The methods by name, in the order in which they are listed: one small class each, in the file of its family."""

from torchserve_explain.attribution.methods.attention import AttentionRollout
from torchserve_explain.attribution.methods.biased_layer import BiasedLayer
from torchserve_explain.attribution.methods.cam import EigenCam, GradCam, GradCamPlusPlus, HiResCam, LayerCam, ScoreCam
from torchserve_explain.attribution.methods.deep_lift import DeepLift
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.full_gradient import FullGrad
from torchserve_explain.attribution.methods.gradient import InputXGradient, Saliency, Sensitivity
from torchserve_explain.attribution.methods.guided import GuidedBackprop, GuidedGradCam
from torchserve_explain.attribution.methods.lrp import LayerwiseRelevance
from torchserve_explain.attribution.methods.method import Attribution, Case, Method
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.perturbation import Occlusion, Rise
from torchserve_explain.attribution.methods.smoothing import Smoothing
from torchserve_explain.attribution.methods.superpixels import KernelShap, Lime
from torchserve_explain.attribution.methods.xrai import Xrai

_LISTED: tuple[type[Method], ...] = (
    IntegratedGradients,
    GradientShap,
    GradCam,
    GradCamPlusPlus,
    LayerCam,
    HiResCam,
    EigenCam,
    AttentionRollout,
    FullGrad,
    Sensitivity,
    Saliency,
    InputXGradient,
    DeepLift,
    GuidedBackprop,
    GuidedGradCam,
    LayerwiseRelevance,
    ScoreCam,
    Occlusion,
    Rise,
    Lime,
    KernelShap,
    Xrai,
    BiasedLayer,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _LISTED}

__all__ = ["METHODS", "Attribution", "Case", "Method", "Smoothing"]
