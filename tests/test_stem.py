"""The stem: sums of gradients taken back through it as one are the sums of the gradients."""

import pytest
import torch
from conftest import NORMALIZATION, SIZE, SmallCnn
from torch import nn
from torchvision.models import get_model

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.gradient import Saliency
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.rows import Score
from torchserve_explain.attribution.stem import find_stem


class Padded(nn.Module):
    """A stem behind linear steps: centred, and padded on two sides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.pad, self.stem, self.head = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(self.pad(2 * x - 0.3)).relu_()
        return self.head(x.square().mean((2, 3)))


class Around(Padded):
    """The head sees the image beside the stem."""

    def forward(self, x):
        return super().forward(x) + x.square().mean((1, 2, 3))[:, None]


class Curved(Padded):
    """What comes before the stem is not linear."""

    def forward(self, x):
        return super().forward(x.tanh())


class Clamped(Padded):
    """What comes before the stem is linear on all but extreme images."""

    def forward(self, x):
        return super().forward(x.clamp(-3, 3))


class Inverted(Padded):
    """Dark images are seen as their negatives."""

    def forward(self, x):
        return super().forward(torch.where(x.mean() < -1, -x, x))


class Centred(Padded):
    """A constant of each image is taken off it, behind autograd's back."""

    def forward(self, x):
        return super().forward(x - x.square().mean((1, 2, 3), keepdim=True).detach())


class Tiled(Padded):
    """An image's halves are rows of their own until the end."""

    def forward(self, x):
        halves = super().forward(x.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1))
        return halves.unflatten(0, (-1, 2)).mean(1)


class Twice(Padded):
    """The stem is called again."""

    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(3))


class Nested(Padded):
    """A constant offset, a convolution after another one: only the first is the stem."""

    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(6, 6, 3)

    def forward(self, x):
        x = self.second(self.stem(self.pad(x)).relu())
        return self.head(x.relu().mean((2, 3)))


def double(model):
    torch.manual_seed(0)
    return model().double().eval()


def noise(count=2, size=SIZE):
    return NORMALIZATION(torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


@pytest.mark.parametrize("model", [Padded, Nested, SmallCnn])
def test_a_weighted_gradient_is_the_sum_of_each(model):
    classifier = Classifier(double(model), NORMALIZATION, SIZE)
    inputs, weights = noise(5), torch.tensor([0.1, -2.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    plain = inputs.clone().requires_grad_()
    logits = classifier._model(plain.clone())[range(5), [0, 1, 2, 3, 0]].sum()
    expected = torch.autograd.grad(logits, plain)[0]
    found = classifier.evaluate(inputs, [0, 1, 2, 3, 0], [Score.LOGIT], gradient=True)
    torch.testing.assert_close(found.gradients, expected)
    summed = classifier.evaluate(inputs, [0, 1, 2, 3, 0], [Score.LOGIT], gradient=True, each=False)
    assert summed.found is not None and summed.found.each is None
    for evaluation in (found, summed):
        torch.testing.assert_close(evaluation.weighted_gradient(weights), torch.tensordot(weights, expected, 1))
        part = evaluation.slice(1, 4)
        torch.testing.assert_close(part.weighted_gradient(weights[1:4]), torch.tensordot(weights[1:4], expected[1:4], 1))


def test_sums_alone_go_through_the_stem_once():
    classifier = Classifier(double(Padded), NORMALIZATION, SIZE)
    found = classifier.evaluate(noise(4), [1] * 4, [Score.LOGIT], gradient=True, each=False).found
    assert found is not None and found.each is None
    assert found.early is not None and found.early.shape == (4, 6, 8, 8)


@pytest.mark.parametrize("model", [Around, Curved, Clamped, Inverted, Centred, Tiled, Twice])
def test_a_first_convolution_that_is_no_stem_is_not_taken_for_one(model):
    assert find_stem(double(model), noise()) is None
    classifier = Classifier(double(model), NORMALIZATION, SIZE)
    inputs = noise(3).requires_grad_()
    expected = torch.autograd.grad(classifier._model(inputs)[:, 2].sum(), inputs)[0]
    found = classifier.evaluate(inputs.detach(), [2] * 3, [Score.LOGIT], gradient=True)
    torch.testing.assert_close(found.gradients, expected)
    torch.testing.assert_close(found.weighted_gradient(expected.new_ones(3)), expected.sum(0))


def test_a_model_without_a_convolution_has_no_stem(linear):
    assert find_stem(linear, noise()) is None


@pytest.mark.parametrize(
    ("name", "stem"), [("resnet18", "conv1"), ("mobilenet_v3_small", "features.0.0"), ("swin_t", "features.0.0")]
)
def test_torchvisions_stems_are_found(name, stem):
    model = get_model(name, weights=None).eval().requires_grad_(False)
    found = find_stem(model, noise(size=(64, 64)).float())
    assert found is not None and found.name == stem


def test_an_answer_that_the_image_does_not_reach_has_gradients_of_zero():
    class Early(Padded):
        """Blank images are told without a look."""

        def forward(self, x):
            seen = super().forward(x)
            return seen if x.detach().std() > 0.01 else torch.ones_like(seen.detach())

    classifier = Classifier(double(Early), NORMALIZATION, SIZE)
    assert classifier._stem is not None
    blank = torch.zeros(2, 3, *SIZE, dtype=torch.float64)
    for each in (True, False):
        found = classifier.evaluate(blank, [0, 1], [Score.LOGIT], gradient=True, each=each, layers=["stem"])
        assert found.scores.tolist() == [1, 1] and not found.weighted_gradient(blank.new_ones(2)).any()
        assert found.layers["stem"].gradient.shape == (2, 6, 8, 8) and not found.layers["stem"].gradient.any()


@pytest.mark.parametrize("each", [True, False])
def test_a_layer_before_the_stem_is_read_beside_gradients(each):
    classifier = Classifier(double(Padded), NORMALIZATION, SIZE)
    assert "pad" in classifier.spatial_layers and classifier._stem is not None and classifier._stem.name == "stem"
    found = classifier.evaluate(noise(3), [1] * 3, [Score.LOGIT], gradient=True, each=each, layers=["pad", "stem"])
    alone = classifier.evaluate(noise(3), [1] * 3, [Score.LOGIT], layers=["pad"])
    torch.testing.assert_close(found.layers["pad"].gradient, alone.layers["pad"].gradient)
    inputs = noise(3).requires_grad_()
    expected = torch.autograd.grad(classifier._model(inputs)[:, 1].sum(), inputs)[0].sum(0)
    torch.testing.assert_close(found.weighted_gradient(expected.new_ones(3)), expected)


def test_the_model_comes_back_without_hooks():
    model = double(Padded)
    find_stem(model, noise())
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_that_want_sums_share_passes_with_rows_that_want_each():
    classifier = Classifier(double(Nested), NORMALIZATION, SIZE)
    cases = [Case(classifier, image, target=2) for image in noise(2)]
    methods = [IntegratedGradients(steps=7), Saliency(), GradientShap(samples=5), GradientShap(samples=5, stdev=0.1)]
    jobs = [Job(method, case) for case in cases for method in methods]
    together = Engine(classifier, 6).results(jobs)
    for job, found in zip(jobs, together, strict=True):
        torch.testing.assert_close(found.value.map, Engine(classifier, 100).results([job])[0].value.map)
