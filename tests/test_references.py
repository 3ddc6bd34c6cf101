"""The methods against Captum: to rounding in float64, in direction and length in float32 as served."""

import numpy as np
import pytest
import torch
import yaml
from captum.attr import GradientShap as CaptumShap
from captum.attr import GuidedBackprop as CaptumGuided
from captum.attr import GuidedGradCam as CaptumGuidedGradCam
from captum.attr import InputXGradient as CaptumInputXGradient
from captum.attr import IntegratedGradients as CaptumIG
from captum.attr import LayerAttribution, LayerGradCam, NoiseTunnel
from captum.attr import Occlusion as CaptumOcclusion
from captum.attr import Saliency as CaptumSaliency
from conftest import NORMALIZATION, ROOT, SIZE
from torch import nn

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case, Smoothing
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.gradient import InputXGradient, Saliency, Sensitivity
from torchserve_explain.attribution.methods.guided import GuidedBackprop, GuidedGradCam
from torchserve_explain.attribution.methods.method import Draw
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.perturbation import Occlusion
from torchserve_explain.attribution.methods.smoothing import SmoothingKind
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import read_settings

pytestmark = pytest.mark.live
TARGET = 3


def explain(classifier, method, image, smoothing=None, **case):
    score = float(classifier.logits(image[None])[0, TARGET])
    job = Job(method, Case(classifier, image, TARGET, known_score=score, **case), smoothing)
    return Engine(classifier, pack=7).results([job])[0].value.map


def relative_difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def black(classifier, image):
    return classifier.normalization(torch.zeros_like(image))[None]


def fixed_draws(monkeypatch, case, stdev, samples):
    """Make Captum draw the noise that the case draws."""
    noise = torch.stack([case.noise(k, stdev) for k in range(samples)])
    monkeypatch.setattr(torch, "normal", lambda *_: noise)


@pytest.mark.parametrize("steps", [1, 10, 33])
def test_integrated_gradients_is_captums(model, classifier, image, steps):
    expected = CaptumIG(model).attribute(image[None], black(classifier, image), TARGET, n_steps=steps)[0]
    assert relative_difference(explain(classifier, IntegratedGradients(steps=steps), image), expected) < 1e-6


def test_sensitivity_is_the_squared_norm_of_captums_saliency(model, classifier, image):
    gradient = CaptumSaliency(model).attribute(image[None].clone(), TARGET, abs=False)[0]
    assert relative_difference(explain(classifier, Sensitivity(), image)[0], gradient.square().sum(0)) < 1e-6


@pytest.mark.parametrize("layer", ["reduce", "norm2", "stem"])
def test_grad_cam_is_captums(model, classifier, image, layer):
    found = LayerGradCam(model, model.get_submodule(layer)).attribute(image[None], TARGET, relu_attributions=True)
    if layer == "stem":  # folded: the convolution's output is now what the batch norm's was
        found = LayerGradCam(model, model.norm).attribute(image[None], TARGET, relu_attributions=True)
    expected = LayerAttribution.interpolate(found, image.shape[-2:], "bilinear")[0]
    layer = "depthwise" if layer == "norm2" else layer
    assert relative_difference(explain(classifier, GradCam(layer), image), expected.detach()) < 1e-6


def test_saliency_is_captums(model, classifier, image):
    expected = CaptumSaliency(model).attribute(image[None].clone(), TARGET)[0]
    assert relative_difference(explain(classifier, Saliency(), image), expected) < 1e-6


def test_input_x_gradient_is_captums(model, classifier, image):
    expected = CaptumInputXGradient(model).attribute(image[None].clone(), TARGET)[0].detach()
    assert relative_difference(explain(classifier, InputXGradient(), image), expected) < 1e-6


class Relus(nn.Module):
    """A ReLU module for each place, as Captum needs them; or the same ReLUs reused, in place and as functions."""

    def __init__(self, own_modules):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second, self.third = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 5)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(4))
        self.shared = nn.ReLU(inplace=True)
        self.own_modules = own_modules

    def forward(self, x):
        functions = (self.shared, torch.relu, self.shared, nn.functional.relu_)
        a, b, c, d = self.relus if self.own_modules else functions
        x = a(self.first(x))
        x = b(x + self.second(x))
        return self.head(d(c(self.third(x)) - 0.1).mean((2, 3)))


@pytest.mark.parametrize("own_modules", [True, False])
def test_guided_backprop_is_captums_whatever_form_the_relus_have(image, own_modules):
    expected = CaptumGuided(Relus(True).double().eval()).attribute(image[None].clone(), TARGET)[0]
    classifier = Classifier(Relus(own_modules).double(), NORMALIZATION, SIZE)
    assert relative_difference(explain(classifier, GuidedBackprop(), image), expected) < 1e-6


def test_guided_grad_cam_is_captums(image):
    model = Relus(True).double().eval()
    captum = CaptumGuidedGradCam(model, model.third)
    expected = captum.attribute(image[None].clone(), TARGET, interpolate_mode="bilinear")[0].detach()
    classifier = Classifier(model, NORMALIZATION, SIZE)
    assert relative_difference(explain(classifier, GuidedGradCam("third"), image), expected) < 1e-6


@pytest.mark.parametrize("side", [16, 32])
def test_occlusion_is_captums(model, side):
    image = NORMALIZATION(torch.rand(3, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    window, stride = side // 8, side // 16
    classifier = Classifier(model, NORMALIZATION, (side, side))
    expected = CaptumOcclusion(classifier.logits).attribute(
        image[None], (3, window, window), (3, stride, stride), black(classifier, image), TARGET
    )[0, :1]
    assert relative_difference(explain(classifier, Occlusion(), image), expected) < 1e-6


@pytest.mark.parametrize("stdev", [0.0, 0.1])
def test_gradient_shap_is_captums_with_the_same_draws(model, classifier, image, monkeypatch, stdev):
    samples = 6
    case = Case(classifier, image, TARGET, seed=5)
    offset = case.draw(Draw.PATH, 0).random()
    monkeypatch.setattr(np.random, "uniform", lambda *_: (np.arange(samples) + offset) / samples)
    fixed_draws(monkeypatch, case, stdev, samples)
    expected = CaptumShap(model).attribute(image[None], black(classifier, image), samples, stdev, TARGET)[0]
    found = explain(classifier, GradientShap(samples=samples, stdev=stdev), image, seed=5)
    assert relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize("kind", list(SmoothingKind))
def test_smoothing_is_captums_noise_tunnel_with_the_same_draws(model, classifier, image, monkeypatch, kind):
    samples = 5
    fixed_draws(monkeypatch, Case(classifier, image, TARGET, seed=2), 0.15, samples)
    tunnel = NoiseTunnel(CaptumIG(model))
    expected = tunnel.attribute(
        image[None], kind, samples, stdevs=1.0, baselines=black(classifier, image), target=TARGET, n_steps=9
    )[0]
    found = explain(classifier, IntegratedGradients(steps=9), image, Smoothing(kind, samples, 0.15), seed=2)
    assert relative_difference(found, expected) < 1e-6


@pytest.fixture(scope="module")
def served(lite0, photo):
    """The default classifier as it is served, float32 and folded, with the photo."""
    settings = read_settings(yaml.safe_load((ROOT / "classifiers/imagenet/model-config.yaml").read_text()))
    classifier = Classifier(lite0, settings.preprocessing.normalization, settings.preprocessing.size)
    return classifier, read_picture(photo, settings.preprocessing, 10**8).input


@pytest.mark.parametrize("name", ["integrated_gradients", "gradient_shap", "sensitivity", "grad_cam", "smoothgrad"])
def test_in_float32_as_served_maps_keep_direction_and_length(lite0, served, monkeypatch, name):
    classifier, image = served
    baseline, inputs = black(classifier, image), image[None]
    if name == "integrated_gradients":
        found = explain(classifier, IntegratedGradients(steps=20), image)
        expected = CaptumIG(lite0).attribute(inputs, baseline, TARGET, n_steps=20)[0]
    elif name == "gradient_shap":
        offset = Case(classifier, image, TARGET).draw(Draw.PATH, 0).random()
        monkeypatch.setattr(np.random, "uniform", lambda *_: (np.arange(8) + offset) / 8)
        found = explain(classifier, GradientShap(samples=8), image)
        expected = CaptumShap(lite0).attribute(inputs, baseline, 8, 0.0, TARGET)[0]
    elif name == "sensitivity":
        found = explain(classifier, Sensitivity(), image)
        expected = CaptumSaliency(lite0).attribute(inputs.clone(), TARGET, abs=False)[0].square().sum(0, keepdim=True)
    elif name == "grad_cam":
        found = explain(classifier, GradCam(), image)
        cam = LayerGradCam(lite0, lite0.features).attribute(inputs, TARGET, relu_attributions=True)
        expected = LayerAttribution.interpolate(cam, image.shape[-2:], "bilinear")[0].detach()
    else:
        fixed_draws(monkeypatch, Case(classifier, image, TARGET), 0.15, 4)
        found = explain(classifier, IntegratedGradients(steps=12), image, Smoothing(SmoothingKind.SMOOTHGRAD, 4, 0.15))
        tunnel = NoiseTunnel(CaptumIG(lite0))
        expected = tunnel.attribute(inputs, "smoothgrad", 4, stdevs=1.0, baselines=baseline, target=TARGET, n_steps=12)[0]
    assert float(torch.cosine_similarity(found.flatten(), expected.flatten(), 0)) > 0.9999
    assert float((found - expected).norm() / expected.norm()) < 5e-3
