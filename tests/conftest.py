"""Small networks with every trait that the engine must survive, and the default classifier with its real weights."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from torchserve_explain.attribution.classifier import Classifier, Normalization
from torchserve_explain.attribution.methods import METHODS

# Several threads wait for each other where other processes have the cores.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIZE = (16, 16)
# What explains a network that has no attention.
WITHOUT_ATTENTION = {name: method for name, method in METHODS.items() if name != "attention_rollout"}


class SmallCnn(nn.Module):
    """Batch norms, an in-place ReLU used twice, a skip, a depthwise convolution, a bias here and none there."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.reduce = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(x + self.norm2(self.depthwise(x)))
        return self.head(torch.flatten(self.pool(self.reduce(x).relu()), 1))


def small_cnn(seed=0, classes=5):
    torch.manual_seed(seed)
    model = SmallCnn(classes).double().eval()
    with torch.no_grad():
        for norm in (model.norm, model.norm2):
            norm.get_buffer("running_mean").normal_()
            norm.get_buffer("running_var").uniform_(0.5, 2)
            norm.weight.normal_(1, 0.3)
            norm.bias.normal_()
    return model


def around_passes(classifier, wrapped):
    """Let `wrapped(evaluate, inputs, *arguments, **options)` stand for each pass, those aside included."""
    for one in (classifier, classifier.aside):
        one.evaluate = partial(wrapped, one.evaluate)


def watched_passes(classifier):
    """Return the list that the number of rows of each pass is added to."""
    sizes = []

    def watched(evaluate, inputs, *arguments, **options):
        sizes.append(len(inputs))
        return evaluate(inputs, *arguments, **options)

    around_passes(classifier, watched)
    return sizes


class Linear(nn.Module):
    """Logits W x + b: everything about it is known in closed form."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(3 * SIZE[0] * SIZE[1], 4).double()

    def forward(self, x):
        return self.layer(x.flatten(1))

    def weight(self, target):
        return self.layer.weight[target].detach().reshape(3, *SIZE)


@pytest.fixture
def model():
    return small_cnn()


@pytest.fixture
def classifier(model):
    return Classifier(model, NORMALIZATION, SIZE)


@pytest.fixture
def image():
    return NORMALIZATION(torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.fixture(scope="session")
def lite0():
    """The default classifier's network with its real weights."""
    folder = ROOT / "classifiers" / "imagenet"
    sys.path.insert(0, str(folder))
    import source
    from model import EfficientNetLite0

    network = EfficientNetLite0().eval()
    network.load_state_dict(source.state_dict())
    return network


@pytest.fixture(scope="session")
def photo():
    from torchserve_explain.photo import photo_path

    return photo_path().read_bytes()


@pytest.fixture
def linear():
    return Linear()


@pytest.fixture
def linear_classifier(linear):
    return Classifier(linear, NORMALIZATION, SIZE)
