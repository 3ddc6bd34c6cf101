"""What the contestants explain: a network, photos, and the classes predicted for them."""

import zipfile
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model

from torchserve_explain.archive import WEIGHTS
from torchserve_explain.archiver import ensure_archive
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.network import MODEL, build_network
from torchserve_explain.paths import ROOT
from torchserve_explain.photo import pictures
from torchserve_explain.serving.settings import Preprocessing

LITE0 = "efficientnet_lite0"
DEEP = "resnet50"
NETWORKS = ("resnet18", DEEP, LITE0)  # the ResNets with random weights: time does not depend on them


@dataclass(frozen=True)
class Subject:
    """A network as its author made it and as the engine prepares it, and images [n, C, H, W] with their targets."""

    network: nn.Module
    classifier: Classifier
    images: Tensor
    targets: list[int] | Tensor

    @property
    def baselines(self) -> Tensor:
        """The black image, once for each image."""
        return self.classifier.normalization(torch.zeros_like(self.images))

    @property
    def layer(self) -> nn.Module:
        """The network's last layer with a grid."""
        return self.network.get_submodule(self.classifier.last_layer or "")


def network(name: str, size: int = 224, classes: int = 1000) -> tuple[nn.Module, Preprocessing]:
    """Build a network by name, and how its images are prepared; the size and classes of Lite0 are its own."""
    if name != LITE0:
        torch.manual_seed(0)
        return get_model(name, weights=None, num_classes=classes).eval(), Preprocessing(resize=size * 8 // 7, crop=size)
    ensure_archive("imagenet", ROOT / "model_store")
    folder = ROOT / "run" / "bench" / name
    with zipfile.ZipFile(ROOT / "model_store" / "imagenet.mar") as archive:
        archive.extractall(folder)
    grey = Preprocessing(interpolation="bicubic", mean=(0.498,) * 3, std=(0.502,) * 3)
    return build_network(MODEL, folder, load_file(folder / WEIGHTS)).eval(), grey


def subject(name: str, batch: int, size: int = 224, classes: int = 1000) -> Subject:
    """Make a batch of the packaged photos ready; beyond their number they come again."""
    built, preprocessing = network(name, size, classes)
    classifier = Classifier(built, preprocessing.normalization, preprocessing.size)
    photos = [picture.input for _, picture in pictures(None, preprocessing)]
    images = torch.stack(list(islice(cycle(photos), batch)))
    return Subject(built.requires_grad_(True), classifier, images, classifier.logits(images).argmax(1).tolist())
