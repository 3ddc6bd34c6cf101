"""LibraGrad: its gradient is autograd's of the literal rules, and input x gradient with what biases add sums to the score."""

import pytest
import torch
from conftest import NORMALIZATION
from support import ARCHITECTURES, trained_like
from torch import nn
from torch.nn import functional
from transformers import NETWORKS, SIDE, Literal, randomised

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.backward import Backward, Libra
from torchserve_explain.attribution.methods.gradient import InputXGradient, Saliency, Sensitivity
from torchserve_explain.attribution.methods.method import OwnRow

TARGET = 3


def images(count=1, side=SIDE):
    return NORMALIZATION(torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def maps(classifier, inputs, method):
    cases = [Case(classifier, image, TARGET, known_score=1.0) for image in inputs]
    return torch.stack([outcome.value.map for outcome in Engine(classifier, 8).results([Job(method, case) for case in cases])])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_is_that_of_the_literal_rules(name):
    model = randomised(NETWORKS[name])
    x = images().requires_grad_()
    with Literal(attention=False):
        logits = model(x.clone())
    (expected,) = torch.autograd.grad(logits[0, TARGET], x)
    found = maps(Classifier(model, NORMALIZATION, (SIDE, SIDE)), images(), InputXGradient(Backward.LIBRA))
    torch.testing.assert_close(found, images() * expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_without_biases_input_times_gradient_sums_to_the_score(name):
    classifier = Classifier(randomised(NETWORKS[name], biases=False), NORMALIZATION, (SIDE, SIDE))
    scores = classifier.logits(images(3))[:, TARGET]
    plain, libra = (maps(classifier, images(3), InputXGradient(way)).sum((1, 2, 3)) for way in Backward)
    torch.testing.assert_close(libra, scores, rtol=1e-6, atol=1e-9)
    assert float((plain - scores).norm() / scores.norm()) > 0.1


@pytest.mark.parametrize("name", ["vit", "swin", "efficientnet_v2_s"])
def test_input_and_biases_times_their_gradients_sum_to_the_score(name):
    """FullGrad's completeness, with the biases that batch norms have become, a class's token and positions."""
    model = trained_like(ARCHITECTURES[name]).double() if name in ARCHITECTURES else randomised(NETWORKS[name])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
    model = Classifier(model, NORMALIZATION, (SIDE, SIDE))._model
    added = [p.requires_grad_() for n, p in model.named_parameters() if n.endswith(("bias", "token", "embedding")) and p.any()]
    x = images().requires_grad_()

    def missed(model):
        score = model(x.clone())[0, TARGET]
        gradients = torch.autograd.grad(score, [x, *added], allow_unused=True)
        total = sum(float((g * p).sum()) for g, p in zip(gradients, (x, *added), strict=True) if g is not None)
        return abs(total / float(score) - 1)

    assert missed(Libra().apply(model)) < 1e-6
    assert missed(model) > 0.1


def slope(body, x):
    class Net(nn.Module):
        def forward(self, x):
            return body(x)

    x = x.clone().requires_grad_()
    y = Libra().apply(Net())(x)
    torch.testing.assert_close(y, body(x))
    return torch.autograd.grad(y.sum(), x)[0]


def test_each_rule_alone():
    x = torch.tensor([[-2.0, -0.5, 0.5, 3.0]], dtype=torch.float64)
    for gated in (functional.gelu, functional.silu, functional.hardswish, functional.mish, torch.tanh, functional.elu):
        torch.testing.assert_close(slope(gated, x), gated(x) / x)
    torch.testing.assert_close(slope(functional.gelu, torch.zeros(1)), torch.tensor([0.5]))
    torch.testing.assert_close(
        slope(lambda x: x * x.sigmoid().mean(1, keepdim=True), x), x.sigmoid().mean() * torch.ones_like(x)
    )
    torch.testing.assert_close(slope(lambda x: x.sigmoid() * x, x), x.sigmoid())
    torch.testing.assert_close(slope(lambda x: (3 * x) * x, x), 3 * x)
    torch.testing.assert_close(slope(lambda x: x / x.norm(), x), torch.ones_like(x) / x.norm())
    torch.testing.assert_close(slope(functional.normalize, x), torch.ones_like(x) / x.norm())
    torch.testing.assert_close(slope(lambda x: x @ x.mT, x), x)
    assert not slope(lambda x: x.softmax(1) + 0 * x, x).any()
    torch.testing.assert_close(slope(lambda x: x.relu(), x), (x > 0).double())


@pytest.mark.parametrize("method", [Saliency, Sensitivity, InputXGradient])
def test_the_way_back_is_a_parameter_of_the_methods_of_one_gradient(method):
    classifier = Classifier(randomised(NETWORKS["vit"]), NORMALIZATION, (SIDE, SIDE))
    plain, libra = (maps(classifier, images(), method(way)) for way in Backward)
    assert not torch.allclose(plain, libra)
    torch.testing.assert_close(plain, maps(classifier, images(), method()))
    assert method().own_row is OwnRow.GRADIENT and method(Backward.LIBRA).own_row is None
