"""FullGrad: what is found sums to the score exactly, the map is its naive replica, the rest is refused."""

from collections.abc import Callable

import pytest
import torch
from conftest import NORMALIZATION, SIZE, small_cnn
from test_methods import case_of, explain
from torch import nn
from torch.nn.functional import batch_norm, interpolate
from torchvision.models import densenet121, resnet18

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.gathering import TOTAL
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods.full_gradient import BiasGradients, FullGrad


class Whole(BiasGradients):
    """All that biases add, wherever they act."""

    def placed(self, shares):
        return shares.flatten(1).sum(1)[:, None, None, None].expand(-1, 1, self.height, self.width)


class Varied(nn.Module):
    """Constants that are added and taken away, biases of norms that nothing folds, activations that saturate and bend."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=False), nn.Linear(8, 5)
        self.mean, self.norm = nn.Parameter(torch.rand(6)), nn.BatchNorm2d(4)

    def forward(self, x):
        x = nn.functional.relu6(4 * self.first(1 - (x - 0.3) / 2))
        x = batch_norm(x, self.mean, self.mean + 1, self.mean, self.mean)
        x = nn.functional.hardswish(x + 0.5)
        x = nn.functional.gelu(self.norm(nn.functional.max_pool2d(self.second(x), 2))).mul_(1.5)
        x = torch.cat([x.sigmoid(), nn.functional.softplus(x)], 1)
        return self.head(x.mean((2, 3)))


def randomised(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").normal_()
            module.get_buffer("running_var").uniform_(0.5, 2)
            nn.init.normal_(module.bias)
    return model.double().eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norms folded": small_cnn,
    "everything": Varied,
    "skips": lambda: resnet18(num_classes=5),
    "norms before convolutions": lambda: densenet121(num_classes=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_input_and_biases_sum_to_the_score(name):
    torch.manual_seed(0)
    classifier = Classifier(randomised(NETWORKS[name]()), NORMALIZATION, (64, 64))
    images = NORMALIZATION(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    assert FullGrad.unsupported(classifier) is None
    found = classifier.evaluate(images, [1, 3], [], gradient=True, layers=[TOTAL], rule=Whole(64, 64))
    sums = (images * found.gradients).flatten(1).sum(1) + found.layers[TOTAL].gradient[:, 0, 0, 0]
    torch.testing.assert_close(sums, found.scores)
    torch.testing.assert_close(found.logits, classifier.logits(images))
    assert float(found.layers[TOTAL].gradient.abs().min()) > 0


def test_the_map_is_its_naive_replica(model, classifier, image):
    """Of the folded network: three convolutions with biases, and ReLUs, which have none."""
    folded, outputs = classifier._model, []
    assert classifier.folded == 2
    convolutions = [one for one in folded.modules() if isinstance(one, nn.Conv2d)]

    def keep(_module, _inputs, output):
        outputs.append(output)
        return output.clone()

    hooks = [one.register_forward_hook(keep) for one in convolutions]
    x = image[None].clone().requires_grad_()
    score = folded(x.clone())[0, 1]
    for hook in hooks:
        hook.remove()
    to_input, *gradients = torch.autograd.grad(score, [x, *outputs])

    def psi(channel):
        size = channel.abs() - channel.abs().min()
        return (
            interpolate((size / size.max())[None, None], SIZE, mode="bilinear")[0, 0] if size.max() > 0 else torch.zeros(SIZE)
        )

    expected = sum(psi(one) for one in (x * to_input)[0].detach())
    for layer, gradient in zip(convolutions, gradients, strict=True):
        expected = expected + sum(psi(bias * one) for bias, one in zip(layer.get_parameter("bias"), gradient[0], strict=True))
    found = explain(Job(FullGrad(), case_of(classifier, image)))
    torch.testing.assert_close(found.value.map[0], expected)
    assert found.evaluations == 1


def test_a_network_with_products_of_signals_is_refused_by_their_name():
    class Gated(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[1]((x * x.sigmoid()).mean((2, 3)))

    refused = FullGrad.unsupported(Classifier(Gated(nn.Conv2d(3, 4, 3), nn.Linear(4, 3)), NORMALIZATION, SIZE))
    assert refused == "FullGrad has no rule for Mul of two"
