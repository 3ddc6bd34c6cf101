"""The architectures that are checked, and docs/architectures.md's table of what serves them; run, it writes the table anew."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from conftest import NORMALIZATION, ROOT, SmallCnn
from torch import nn
from torchvision.models import MaxVit, get_model

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.methods import METHODS

CLASSES = 6
PAGE = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- architectures: written by 'make support' -->\n", "<!-- end -->"


class PlainCnn(nn.Sequential):
    """Three convolutions with pooling and dropout."""

    def __init__(self) -> None:
        widths = (3, 16, 32, 64)
        blocks = [[nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2)] for a, b in pairwise(widths)]
        super().__init__(*(layer for block in blocks for layer in block), nn.Flatten(), nn.Linear(64 * 64, CLASSES))


@dataclass(frozen=True)
class Architecture:
    """How a network is built, the input that the sweep gives it, and the layer that `last` must mean."""

    build: Callable[[], nn.Module]
    last: str
    side: int = 64


def _torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    return partial(get_model, name, weights=None, num_classes=CLASSES, **options)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES)


ARCHITECTURES = {
    **{f"resnet{depth}": Architecture(_torchvision(f"resnet{depth}"), "layer4") for depth in (18, 34, 50, 101)},
    **{f"vgg{depth}": Architecture(_torchvision(f"vgg{depth}"), "features") for depth in (16, 19)},
    "densenet121": Architecture(_torchvision("densenet121"), "features"),
    "inception_v3": Architecture(_torchvision("inception_v3", init_weights=False), "Mixed_7c", 160),
    "regnet_x_400mf": Architecture(_torchvision("regnet_x_400mf"), "trunk_output"),
    "regnet_y_400mf": Architecture(_torchvision("regnet_y_400mf"), "trunk_output"),
    "mobilenet_v3_large": Architecture(_torchvision("mobilenet_v3_large"), "features"),
    "efficientnet_v2_s": Architecture(_torchvision("efficientnet_v2_s"), "features"),
    "convnext_tiny": Architecture(_torchvision("convnext_tiny"), "features"),
    "swin_t": Architecture(_torchvision("swin_t"), "permute"),
    "swin_v2_t": Architecture(_torchvision("swin_v2_t"), "permute"),
    "vit_b_16": Architecture(_torchvision("vit_b_16", image_size=64), "encoder.layers.encoder_layer_11.ln_1"),
    "timm/legacy_xception": Architecture(partial(_timm, "legacy_xception"), "act4", 96),
    "timm/efficientnet_lite0": Architecture(partial(_timm, "efficientnet_lite0"), "bn2"),
    "a small maxvit": Architecture(
        partial(MaxVit, (64, 64), 32, 4, [32, 64, 128], [2, 2, 2], 16, 0.2, num_classes=CLASSES), "blocks.2"
    ),
    "a plain CNN": Architecture(PlainCnn, "10"),
    "a module of one's own": Architecture(partial(SmallCnn, CLASSES), "reduce"),
}


def trained_like(architecture: Architecture) -> nn.Module:
    """Build a network whose norms fit its activations and whose head is not zero, as if it had been trained."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = architecture.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train().momentum = None  # the mean over what it sees
        model(NORMALIZATION(torch.rand(8, 3, architecture.side, architecture.side)))
    return model.eval()


def classifier_of(name: str) -> Classifier:
    """Return the classifier of an architecture."""
    architecture = ARCHITECTURES[name]
    return Classifier(trained_like(architecture), NORMALIZATION, (architecture.side, architecture.side))


def row(name: str, classifier: Classifier) -> str:
    """Return the architecture's line of the table."""
    refused: dict[str, list[str]] = {}
    for method in METHODS:
        if (why := METHODS[method].unsupported(classifier)) is not None:
            refused.setdefault(why, []).append(f"`{method}`")
    told = "; ".join(f"{', '.join(methods)}: {why}" for why, methods in refused.items())
    count = len(METHODS) - sum(map(len, refused.values()))
    return f"| `{name}` | `{classifier.last_layer}` | {'all' if not refused else count} | {told} |"


def table(rows: list[str]) -> str:
    """Return the table of all rows."""
    head = ["| architecture | layer `last` | methods | which cannot serve it, and why |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def written() -> str:
    """Return the table that the page holds."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    made = table([row(name, classifier_of(name)) for name in ARCHITECTURES])
    PAGE.write_text(re.sub(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", lambda _: made, PAGE.read_text(), flags=re.S))
    print(made)
