"""Backbones by name: built with or without pretrained weights, given a new head, divided into what learns and what stays."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from torchserve_explain.archiver import read_source, read_weights
from torchserve_explain.attribution.classifier import Normalization
from torchserve_explain.errors import ArchiveError, TrainingError
from torchserve_explain.network import MODEL, TIMM
from torchserve_explain.paths import ROOT
from torchserve_explain.serving.settings import Preprocessing
from training.architectures.cnn import Cnn
from training.recipe import Part

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE0 = ROOT / "classifiers" / "imagenet"
FROM_SCRATCH = ("cnn",)  # nobody has trained them
MOMENTUM = 0.1  # of batch norms' running statistics, PyTorch's own
PRETRAINED, RANDOM = "pretrained", "random"  # or the path of a state dict


@dataclass(frozen=True)
class Backbone:
    """What is known of a network: the first module of its last stage, what it was pretrained on, its own file if it has one."""

    last_stage: str = ""  # none of its own: it learns whole
    normalization: Normalization = field(default=IMAGENET)
    interpolation: str = "bilinear"
    source: Path | None = None


BACKBONES = {
    "lite0": Backbone("features.12", Normalization((0.498,) * 3, (0.502,) * 3), "bicubic", LITE0 / MODEL),
    "cnn": Backbone(source=ROOT / "training" / "architectures" / "cnn.py"),
    **{f"resnet{depth}": Backbone("layer4") for depth in (18, 34, 50, 101)},
    "vgg16": Backbone("features.24"),
    "vgg19": Backbone("features.28"),
    "efficientnet_v2_s": Backbone("features.6"),
    "mobilenet_v3_large": Backbone("features.13"),
    "regnet_y_400mf": Backbone("trunk_output.block4"),
    "swin_t": Backbone("features.6", interpolation="bicubic"),
    "timm/legacy_xception": Backbone("block12", Normalization((0.5,) * 3, (0.5,) * 3), "bicubic"),
}


@dataclass(frozen=True)
class Network:
    """A model, and the same as two chains that share its modules: what stays as it is, and what learns on top of it."""

    model: nn.Module
    frozen: nn.Sequential
    trained: nn.Sequential


def preprocessing_for(name: str, size: int, normalization: Normalization | None = None) -> Preprocessing:
    """Return how an image becomes a backbone's input of `size` x `size`."""
    chosen = normalization or BACKBONES[name].normalization
    settings = {"interpolation": BACKBONES[name].interpolation, "mean": chosen.mean, "std": chosen.std}
    return Preprocessing.model_validate({"resize": size, "crop": size, **settings})


def build(name: str, weights: str, classes: int, part: Part, first: str | None = None) -> Network:
    """Build a backbone with a new head for `classes`; raises TrainingError where its weights cannot be had or do not fit."""
    if weights == RANDOM:
        model = _blank(name, classes)
        _quicken_statistics(model)
    else:
        model = build_pretrained(name) if weights == PRETRAINED else _from_file(name, Path(weights))
        _replace_head(model, classes)
    if weights == RANDOM and name not in FROM_SCRATCH and part is not Part.ALL:
        warnings.warn(f"{name} starts from random weights: its frozen part knows nothing of images", stacklevel=2)
    return divided(model, part, first or BACKBONES[name].last_stage)


def start_of(name: str, weights: str) -> str:
    """Return where a backbone's weights come from: random where `pretrained` ones are asked for and there are none."""
    return RANDOM if name in FROM_SCRATCH and weights == PRETRAINED else weights


def check_size(model: nn.Module, size: int, name: str) -> None:
    """Raise TrainingError where a model cannot take images of `size` x `size`."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        raise TrainingError(f"--size {size}: {name} cannot take such images: {error}") from None


def divided(model: nn.Module, part: Part, first: str) -> Network:
    """Freeze what does not learn: all before the head, before `first` of the last stage, or nothing."""
    steps = list(_chain(model))
    names = [name for name, _ in steps]
    starts = {Part.ALL: 0, Part.HEAD: names.index(head_of(model))}
    if part not in starts:
        starts[part] = next(place for place, name in enumerate(names) if f"{name}.".startswith(f"{first}." if first else ""))
    modules = [module for _, module in steps]
    frozen, trained = nn.Sequential(*modules[: starts[part]]), nn.Sequential(*modules[starts[part] :])
    frozen.eval().requires_grad_(False)
    return Network(model, frozen, trained)


def head_of(model: nn.Module) -> str:
    """Return the name of the last linear layer."""
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1]


def _chain(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the steps that a model is a chain of, as all backbones are: its children, flattened before the last."""
    *body, last = model.named_children()
    for child in (*body, ("flatten", nn.Flatten()), last):
        yield from _steps(*child)


def _steps(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module, or the steps inside it where it is no more than a sequence."""
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for inner, step in module.named_children():
        yield from _steps(f"{name}.{inner}", step)


def _replace_head(model: nn.Module, classes: int) -> None:
    name = head_of(model)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Linear(model.get_submodule(name).in_features, classes))  # type: ignore[arg-type]


def _blank(name: str, classes: int) -> nn.Module:
    """Build a backbone with random weights."""
    model: nn.Module
    if name == "lite0":
        model = read_source(LITE0).EfficientNetLite0(classes)
    elif name == "cnn":
        model = Cnn(classes)
    elif name.startswith(TIMM):
        model = _timm().create_model(name.removeprefix(TIMM), num_classes=classes)
    else:
        model = get_model(name, weights=None, num_classes=classes)
    return model


def _quicken_statistics(model: nn.Module) -> None:
    """Let batch norms' running statistics follow a network that learns from nothing, within tens of steps.

    MobileNetV3's follow within hundreds: after twenty epochs of a thousand images its held-out accuracy was still chance.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None:
            module.momentum = max(module.momentum, MOMENTUM)


def build_pretrained(name: str) -> nn.Module:
    """Build a backbone with the weights that its library offers; those of `lite0` lie in an installed package."""
    model: nn.Module
    if name == "lite0":
        source = read_source(LITE0)
        model = source.EfficientNetLite0()
        model.load_state_dict(source.state_dict())
        return model
    try:
        if name.startswith(TIMM):
            model = _timm().create_model(name.removeprefix(TIMM), pretrained=True)
        else:
            model = get_model(name, weights="DEFAULT")
    except TrainingError:
        raise
    except Exception as error:  # whatever a library's download meets
        raise TrainingError(
            f"the pretrained weights of {name} cannot be downloaded ({error}); "
            f"allowed: --backbone lite0, whose weights are installed, --weights FILE, or --weights {RANDOM}"
        ) from None
    return model


def _from_file(name: str, path: Path) -> nn.Module:
    """Build a backbone with the weights of a state dict, which keep the classes that they were trained for."""
    if not path.is_file():
        raise TrainingError(f"--weights: {path} does not exist; allowed: {PRETRAINED}, {RANDOM}, or the file of a state dict")
    head = head_of(_blank(name, 2))
    try:
        state: dict[str, Tensor] = read_weights(path)
        model = _blank(name, len(state[f"{head}.weight"]))
        model.load_state_dict(state)
    except (ArchiveError, KeyError, TypeError, RuntimeError) as error:
        raise TrainingError(f"--weights: {path.name} is no state dict of {name}: {error}") from None
    return model


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise TrainingError(f"backbones of {TIMM} need the package timm: pip install timm") from None
    return timm
