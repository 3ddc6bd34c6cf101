"""Layer-wise relevance against zennit, and on its own where zennit has no rule."""

import copy

import pytest
import torch
from conftest import NORMALIZATION
from torch import nn
from torchvision.models import get_model
from zennit.attribution import Gradient
from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from zennit.torchvision import ResNetCanonizer

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.lrp import Composite, LayerwiseRelevance
from torchserve_explain.attribution.rows import Score

SIZE, TARGET = (64, 64), 3


def randomised(model):
    """Give a network the biases and norms of a trained one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.get_buffer("running_mean").normal_(0, 0.1)
                module.get_buffer("running_var").uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.1)
    return model.double().eval()


def image(size=SIZE):
    return NORMALIZATION(torch.rand(3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def explained(classifier, composite=Composite.EPSILON_PLUS, **options):
    score = float(classifier.logits(image()[None])[0, TARGET])
    case = Case(classifier, image(), TARGET, known_score=score, **options)
    (outcome,) = Engine(classifier, 4).run([Job(LayerwiseRelevance(composite), case)])
    return outcome, score


def zennits(model, composite):
    low, high = (NORMALIZATION(torch.full((1, 3, 1, 1), v, dtype=torch.float64)) for v in (0.0, 1.0))
    built = {
        Composite.EPSILON_PLUS: EpsilonPlus,
        Composite.EPSILON_PLUS_FLAT: EpsilonPlusFlat,
        Composite.EPSILON_ALPHA2_BETA1: EpsilonAlpha2Beta1,
        Composite.EPSILON_GAMMA_BOX: lambda **options: EpsilonGammaBox(low=low, high=high, **options),
    }[composite](canonizers=[ResNetCanonizer()])
    with Gradient(model=copy.deepcopy(model), composite=built) as attributor:
        return attributor(image()[None], torch.eye(7, dtype=torch.float64)[[TARGET]])[1][0]


@pytest.mark.parametrize("composite", list(Composite))
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_relevance_is_zennits(name, composite):
    classifier = Classifier(randomised(get_model(name, weights=None, num_classes=7)), NORMALIZATION, SIZE)
    outcome, score = explained(classifier, composite)
    expected = score * zennits(classifier._model, composite)  # folded: zennit leaves a rest of each norm's epsilon
    torch.testing.assert_close(outcome.value.map, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


class Forms(nn.Module):
    """The same network with modules of its own, or with functions, reused modules and work in place."""

    def __init__(self, plain):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 7)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(2))
        self.shared = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.plain = plain

    def forward(self, x):
        if self.plain:
            x = self.relus[0](self.first(x))
            x = self.relus[1](self.second(x) + x)
            return self.head(self.pool(x).flatten(1))
        x = self.shared(nn.functional.conv2d(x, self.first.weight, bias=self.first.bias))
        y = self.second(x)
        y += x
        torch.relu_(y)
        return nn.functional.linear(y.mean((2, 3)), self.head.weight, self.head.bias)


@pytest.mark.parametrize("composite", list(Composite))
def test_what_form_a_layer_has_does_not_matter(composite):
    maps = [
        explained(Classifier(Forms(plain).double(), NORMALIZATION, SIZE), composite)[0].value.map for plain in (True, False)
    ]
    torch.testing.assert_close(*maps)
    assert float(maps[0].abs().max()) > 0


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU])
def test_without_biases_nothing_is_lost(activation):
    """Relevance is conserved whatever the activation, through skips, gates, strides and depthwise layers.

    But where a layer's inputs have no positive part in an output, and by what keeps divisors from zero.
    """

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
            self.gate, self.head = nn.Conv2d(8, 8, 1, bias=False), nn.Linear(16, 7, bias=False)
            self.act = activation()

        def forward(self, x):
            x = self.act(self.stem(x))
            x = x + self.depthwise(x)
            x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
            x = nn.functional.max_pool2d(x, 3, 2)
            return self.head(torch.cat([x.mean((2, 3)), nn.functional.avg_pool2d(x, 15).flatten(1)], 1))

    outcome, score = explained(Classifier(Net().double(), NORMALIZATION, SIZE))
    assert float(outcome.value.map.sum()) == pytest.approx(score, rel=0.06)


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, x: nn.functional.conv2d(x, m.conv.weight, padding=1),
        lambda m, x: nn.functional.conv2d(x, weight=m.conv.weight, groups=1, padding=1),
        lambda m, x: m.conv(m.conv(x)),  # shared
        lambda m, x: torch.cat([x, -x], 1).relu()[:, :4] + x,
        lambda m, x: 1 - x,
        lambda m, x: torch.neg(-x),
        lambda m, x: torch.divide(torch.multiply(x, 4.0), 3),
        lambda m, x: x.clamp_min(0).clip(0, 9),
        lambda m, x: torch.add(x, m.conv(x), alpha=0.5),
    ],
)
def test_relevance_is_conserved_however_a_function_is_called(middle):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(6)
            self.stem, self.conv = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.head = nn.Linear(4, 7, bias=False)
            self.stem.weight.data.abs_()
            self.conv.weight.data.abs_()

        def forward(self, x):
            return self.head(middle(self, self.stem(x).relu()).mean((2, 3)))

    classifier = Classifier(Net().double(), NORMALIZATION, SIZE)
    assert LayerwiseRelevance.unsupported(classifier) is None
    outcome, score = explained(classifier)
    assert float(outcome.value.map.sum()) == pytest.approx(score, rel=1e-3)


def unsupported(body, *layers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return body(self, x)

    return LayerwiseRelevance.unsupported(Classifier(Net(), NORMALIZATION, (16, 16)))


def test_what_has_no_rule_is_refused_by_name():
    assert "LogSoftmax" in unsupported(lambda m, x: x.log_softmax(1).mean((2, 3)))
    assert "addmm" in unsupported(lambda m, x: torch.addmm(torch.ones(4), x.mean((2, 3)), torch.ones(3, 4)))
    assert "Div by the image" in unsupported(lambda m, x: (torch.ones(3, 1, 1) / (x + 9)).mean((2, 3)))
    assert "conv_transpose2d" in unsupported(lambda m, x: m.layers[0](x).mean((2, 3)), nn.ConvTranspose2d(3, 4, 3))
    assert "of the batch" in unsupported(lambda m, x: nn.functional.instance_norm(x).square().mean((2, 3)))
    assert "Sigmoid in a way" in unsupported(lambda m, x: torch.special.expit(x).mean((2, 3)))
    assert "by name" in unsupported(lambda m, x: nn.functional.gelu(input=x).mean((2, 3)))
    assert unsupported(lambda m, x: (x * 2 + 1).relu().mean((2, 3))) is None


def test_the_softmax_has_no_rule():
    outcome, _ = explained(Classifier(Forms(True).double(), NORMALIZATION, SIZE), score=Score.PROBABILITY)
    assert "softmax" in str(outcome) and isinstance(outcome, Exception)
