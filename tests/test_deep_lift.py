"""DeepLIFT against Captum where Captum has a rule, and by its axiom where it has none."""

import pytest
import torch
from captum.attr import DeepLift as CaptumDeepLift
from conftest import NORMALIZATION, SIZE
from torch import nn
from torch.nn import functional
from transformers import NETWORKS, SIDE, randomised

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.deep_lift import DeepLift, Rescale

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
    assert outcome.evaluations == 2


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
    torch.testing.assert_close(found, model.get_parameter("1.weight")[TARGET].detach().view(3, *SIZE) * image)


def test_an_image_that_is_its_baseline_has_no_contribution():
    white = NORMALIZATION(torch.ones(3, *SIZE, dtype=torch.float64))
    outcome = explained(Classifier(Net(nn.ReLU).double(), NORMALIZATION, SIZE), white, Baseline.WHITE).value
    assert float(outcome.map.abs().max()) == 0 and outcome.completeness_error == 0


def test_what_has_no_rule_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.LogSoftmax(1), nn.Flatten(), nn.Linear(512, 2))
    assert "LogSoftmax" in (DeepLift.unsupported(Classifier(model, NORMALIZATION, SIZE)) or "")


def multipliers(body, x, base):
    """Return the multipliers of each of a body's outputs, [outputs, values], by its rules for an image and its baseline."""

    class Net(nn.Module):
        def forward(self, pair):
            return body(pair).flatten(1)

    pair = torch.cat([x, base])[None].requires_grad_()
    answer = Rescale().apply(Net())(pair)
    torch.testing.assert_close(answer, body(x[None]).flatten(1))
    rows = [torch.autograd.grad(value, pair, retain_graph=True)[0][0, : len(x)] for value in answer[0]]
    return torch.stack(rows)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BODIES = {
    "softmax": lambda x: x.softmax(-1),
    "masked softmax": lambda x: (x + torch.tensor([0.0, -torch.inf, 0.0, 0.0])).softmax(-1),
    "layer norm": lambda x: functional.layer_norm(x, (4,), torch.arange(1.0, 5).double(), torch.ones(4).double()),
    "group norm": lambda x: functional.group_norm(x[:, :, None], 2),
    "normalize": lambda x: functional.normalize(x),
    "product": lambda x: x * x.flip(1),
    "matrix product": lambda x: x.view(-1, 2, 2) @ x.view(-1, 2, 2).mT,
    "einsum": lambda x: torch.einsum("nij,nkj->nik", x.view(-1, 2, 2), x.view(-1, 2, 2)),
    "constant matrix": lambda x: torch.ones(3, 4).double() @ x[..., None],
    "division": lambda x: x / (x * x).add(1),
    "division of a constant": lambda x: torch.ones(4).double() / (x * x).add(1),
    "attention": lambda x: functional.scaled_dot_product_attention(*[x.view(-1, 1, 2, 2)] * 3),
}


@pytest.mark.parametrize("form", BODIES)
def test_every_rule_shares_the_change_of_every_output(form):
    x, base = drawn(4), drawn(4, seed=1)
    found = multipliers(BODIES[form], x, base)
    change = (BODIES[form](x[None]) - BODIES[form](base[None])).flatten()
    torch.testing.assert_close(found @ (x - base), change)
    # Where the change is none, it is the gradient.
    slopes = torch.autograd.functional.jacobian(lambda x: BODIES[form](x[None]).flatten(), x)
    torch.testing.assert_close(multipliers(BODIES[form], x, x), slopes)
    torch.testing.assert_close(multipliers(BODIES[form], x, x + 1e-6 * base), slopes, rtol=1e-4, atol=1e-4)


def test_a_softmax_shares_by_logarithmic_means():
    x, base = drawn(4), drawn(4, seed=1)
    s, t = x.softmax(0), base.softmax(0)
    m = [(s[i] - t[i]) / (s[i].log() - t[i].log()) for i in range(4)]
    expected = torch.tensor([[m[i] * (float(i == k) - m[k] / sum(m)) for k in range(4)] for i in range(4)])
    torch.testing.assert_close(multipliers(BODIES["softmax"], x, base), expected.double(), rtol=1e-6, atol=1e-7)


def test_a_layer_norm_shares_as_a_product_with_the_inverse_deviation():
    x, base = drawn(4), drawn(4, seed=1)
    c, d = x - x.mean(), base - base.mean()
    s, t = ((v.square().mean() + 1e-5).sqrt() for v in (c, d))
    middle, expected = (c + d) / 2, torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for k in range(4):
            of_inverse = (1 / s - 1 / t) / (s**2 - t**2) * 2 * middle[k] / 4  # d(1/s) through d(s^2) = sum 2 mean(c) dc / n
            centred = (1 / s + 1 / t) / 2 * (i == k) + middle[i] * of_inverse
            for j in range(4):
                expected[i, j] += centred * ((j == k) - 1 / 4)
    found = multipliers(lambda x: functional.layer_norm(x, (4,)), x, base)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_of_zeros_has_no_direction(dtype):
    zeros, x = torch.zeros(4, dtype=dtype), drawn(4).to(dtype)
    assert torch.isfinite(multipliers(functional.normalize, zeros, zeros)).all()
    for image, base in ((x, zeros), (zeros, x)):
        torch.testing.assert_close(multipliers(functional.normalize, image, base), torch.eye(4, dtype=dtype) / x.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_contributions_sum_to_the_difference_through_transformers(name):
    classifier = Classifier(randomised(NETWORKS[name]), NORMALIZATION, (SIDE, SIDE))
    assert DeepLift.unsupported(classifier) is None
    inputs = NORMALIZATION(torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    scores = classifier.logits(inputs)[:, TARGET].tolist()
    cases = [Case(classifier, image, TARGET, known_score=score) for image, score in zip(inputs, scores, strict=True)]
    together = Engine(classifier, 16).results([Job(DeepLift(), case) for case in cases])
    for case, found in zip(cases, together, strict=True):
        assert found.value.completeness_error is not None and found.value.completeness_error < 1e-9
        (alone,) = Engine(classifier, 1).results([Job(DeepLift(), case)])
        torch.testing.assert_close(found.value.map, alone.value.map)


def test_images_may_lie_along_another_dimension(image):
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

        def forward(self, x):
            tokens = self.patches(x).flatten(2).permute(2, 0, 1)
            return self.head(nn.functional.gelu(tokens).mean(0))

    classifier = Classifier(SequenceFirst().double(), NORMALIZATION, SIZE)
    assert DeepLift.unsupported(classifier) is None
    assert explained(classifier, image).value.completeness_error < 1e-9


def test_the_input_and_views_may_be_changed_in_place(image):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = self.first(x.sub_(0.1).relu_())
            x[:, :4].relu_()
            torch.sigmoid_(y := x * 2)
            return self.head((x + y).mean((2, 3)))

    outcome = explained(Classifier(InPlace().double(), NORMALIZATION, SIZE), image).value
    assert outcome.completeness_error < 1e-9


def test_a_change_that_does_not_reach_the_rules_is_refused():
    class Detached(nn.Module):
        def forward(self, x):
            return (x + x.detach().relu()).mean((2, 3))

    assert "would not sum" in (DeepLift.unsupported(Classifier(Detached(), NORMALIZATION, SIZE)) or "")


def test_the_baselines_score_comes_with_the_pass(classifier, image):
    found = explained(classifier, image, Baseline.WHITE).value
    start = Baseline.WHITE.image(Case(classifier, image, TARGET))
    assert found.baseline_score == pytest.approx(float(classifier.logits(start[None])[0, TARGET]))


@pytest.mark.parametrize(
    ("body", "operation"),
    [
        (lambda x: nn.functional.tanhshrink(x), "Tanh"),
        (lambda x: nn.functional.max_pool2d(x, 2, return_indices=True)[0], "MaxPool2DWithIndices"),
        (lambda x: torch.einsum("nchw,nc,nc->nchw", x, x.mean((2, 3)), x.mean((2, 3))), "more than two signals"),
        (lambda x: nn.functional.normalize(x, p=1), "p=2"),
        (lambda x: torch.mul(input=x, other=x.sigmoid()), "by name"),
    ],
)
def test_what_no_rule_reaches_is_refused_when_the_model_is_loaded(body, operation):
    class Net(nn.Module):
        def forward(self, x):
            return body(x).mean((2, 3))

    assert operation in (DeepLift.unsupported(Classifier(Net(), NORMALIZATION, SIZE)) or "")
