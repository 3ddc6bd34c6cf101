"""What a recipe is: the settings of one experiment. Each file of training/recipes/ holds one."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module

from torch import nn

from torchserve_explain.attribution.classifier import Normalization
from training import recipes


class Part(StrEnum):
    """What of a backbone learns; the rest stays as it is."""

    HEAD = "head"
    LAST_STAGE = "last-stage"
    ALL = "all"
    DIRECTION = "direction"  # nothing by gradient: the mean difference of the features of two classes


@dataclass(frozen=True)
class Recipe:
    """An experiment's settings; the first of its backbones is the default, and `lite0` serves every recipe.

    `first` names a backbone's first module that learns, where its last stage is not enough. Images are resized by
    their shorter side to `size` and cropped to the centre. Where a part is frozen, its features of `views` augmented views
    of each training image are computed once and taken in turn; with 0 every epoch draws new ones. `normalization` replaces
    a backbone's own. Training ends after `epochs`, or `patience` of them without a better one on the validation images.
    """

    backbones: tuple[str, ...]
    part: Part
    first: Mapping[str, str] = field(default_factory=dict)
    size: int = 224
    augmentation: nn.Module | None = None
    views: int = 4
    normalization: Mapping[str, Normalization] = field(default_factory=dict)
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    epochs: int = 30
    batch: int = 32
    patience: int = 8
    ratio: tuple[float, float, float] = (0.7, 0.15, 0.15)  # train, val, test
    draws: bool = False  # a GAN may draw more images
    method: str = "grad_cam"  # explains by default

    @property
    def allowed(self) -> tuple[str, ...]:
        """The backbones that may be asked for."""
        return tuple(dict.fromkeys((*self.backbones, "lite0")))


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return [module.name for module in pkgutil.iter_modules(recipes.__path__)]


def read_recipe(name: str) -> tuple[Recipe, str]:
    """Return a recipe and what it says of itself."""
    module = import_module(f"training.recipes.{name}")
    return module.RECIPE, module.__doc__ or ""
