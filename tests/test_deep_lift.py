"""DeepLIFT against Captum where Captum has a rule, and by its axiom where it has none."""

import pytest
import torch
from captum.attr import DeepLift as CaptumDeepLift
from conftest import NORMALIZATION, SIZE
from torch import nn

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.deep_lift import DeepLift

TARGET = 2


def explained(classifier, image, baseline=Baseline.BLACK):
    score = float(classifier.logits(image[None])[0, TARGET])
    case = Case(classifier, image, TARGET, known_score=score)
    (outcome,) = Engine(classifier, 4).run([Job(DeepLift(baseline), case)])
    return outcome


class Net(nn.Module):
    """As Captum wants it: a module of its own for each activation, no overlapping windows (and no ties in them)."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.a, self.b, self.c = activation(), activation(), activation()
        self.pool, self.head, self.out = nn.MaxPool2d(2), nn.Linear(6 * 64, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(self.first(x))
        x = self.pool(x + self.b(self.second(x)))
        return self.out(self.c(self.head(x.flatten(1))))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ELU, nn.LeakyReLU])
@pytest.mark.parametrize("baseline", [Baseline.NOISE, Baseline.BLUR])
def test_rescale_is_captums(image, activation, baseline):
    model = Net(activation).double().eval()
    classifier = Classifier(model, NORMALIZATION, SIZE)
    outcome = explained(classifier, image, baseline)
    start = baseline.image(Case(classifier, image, TARGET))[None]
    expected = CaptumDeepLift(model).attribute(image[None].clone(), start, target=TARGET)[0].detach()
    torch.testing.assert_close(outcome.value.map, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert outcome.evaluations == 3


class Everything(nn.Module):
    """A gate, products, overlapping pooling, a difference, reused and functional and in-place activations."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate, self.head, self.act = nn.Conv2d(8, 8, 1), nn.Linear(8, 5), activation()

    def forward(self, x):
        x = self.act(self.stem(x))
        y = self.depthwise(x)
        y += x
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = nn.functional.max_pool2d(y, 3, stride=2, padding=1)
        torch.relu_(y)
        y = y * y.sigmoid()
        return self.head((y - y.mean(1, keepdim=True)).mean((2, 3)))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, lambda: nn.ReLU(True)])
def test_contributions_sum_to_the_difference_through_every_rule(image, activation):
    classifier = Classifier(Everything(activation).double(), NORMALIZATION, SIZE)
    assert DeepLift.unsupported(classifier) is None
    outcome = explained(classifier, image).value
    assert outcome.completeness_error < 1e-9
    plain = classifier.evaluate(image[None], [TARGET], [], gradient=True).gradients[0]
    assert not torch.allclose(outcome.map, (image - Baseline.BLACK.image(Case(classifier, image, TARGET))) * plain)


def test_a_linear_model_has_its_weights_times_the_difference(image):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).double()
    classifier = Classifier(model, NORMALIZATION, SIZE)
    found = explained(classifier, image, Baseline.MEAN).value.map
    torch.testing.assert_close(found, model[1].weight[TARGET].detach().view(3, *SIZE) * image)


def test_an_image_that_is_its_baseline_has_no_contribution():
    white = NORMALIZATION(torch.ones(3, *SIZE, dtype=torch.float64))
    outcome = explained(Classifier(Net(nn.ReLU).double(), NORMALIZATION, SIZE), white, Baseline.WHITE).value
    assert float(outcome.map.abs().max()) == 0 and outcome.completeness_error == 0


def test_what_has_no_rule_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Flatten(2), nn.LayerNorm(64), nn.Flatten(), nn.Linear(512, 2))
    assert "NativeLayerNorm" in DeepLift.unsupported(Classifier(model, NORMALIZATION, SIZE))


@pytest.mark.parametrize(
    ("body", "operation"),
    [
        (lambda x: nn.functional.tanhshrink(x), "Tanh"),
        (lambda x: nn.functional.max_pool2d(x, 2, return_indices=True)[0], "MaxPool2DWithIndices"),
        (lambda x: torch.einsum("nchw,nc->nchw", x, x.mean((2, 3))), "of two"),
        (lambda x: torch.mul(input=x, other=x.sigmoid()), "by name"),
    ],
)
def test_what_no_rule_reaches_is_refused_when_the_model_is_loaded(body, operation):
    class Net(nn.Module):
        def forward(self, x):
            return body(x).mean((2, 3))

    assert operation in DeepLift.unsupported(Classifier(Net(), NORMALIZATION, SIZE))
