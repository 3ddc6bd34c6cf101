"""An experiment: what the command line asks for, what its learning part sees, and what has been learnt."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchserve_explain.serving.settings import Preprocessing
from training.data import SPLITS, Data, Images
from training.export import Architecture
from training.features import Place, Source, digest_of, made_fast, read_source
from training.fit import Epoch
from training.gan import Drawing
from training.networks import preprocessing_for
from training.recipe import Recipe


@dataclass(frozen=True)
class Experiment:
    """What the command line asks for."""

    name: str
    recipe: Recipe
    backbone: str
    weights: str
    folder: Path
    out: Path
    seed: int
    place: Place
    states: Path
    drawing: Drawing | None = None
    masks: Path | None = None  # of what the images show, or a file of boxes; neither decides what is learnt
    boxes: Path | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the model's input, here and when it is served."""
        return preprocessing_for(self.backbone, self.recipe.size, self.recipe.normalization.get(self.backbone))

    def settings(self) -> dict[str, Any]:
        """Return all that decides what is learnt, except the images."""
        recipe = {key: value for key, value in vars(self.recipe).items() if key not in ("backbones", "normalization")}
        chosen = {"recipe": self.name, "backbone": self.backbone, "weights": self.weights, "seed": self.seed}
        prepared = {"augmentation": repr(self.recipe.augmentation), "preprocessing": self.preprocessing.model_dump(mode="json")}
        return chosen | recipe | prepared


@dataclass(frozen=True)
class Learnt:
    """A trained model, what its archive builds it from, its logits of each held-out split, and how it came about."""

    model: nn.Module
    architecture: Architecture
    logits: dict[str, Tensor]
    epochs: list[Epoch] = field(default_factory=list)
    seconds_before: float = 0.0  # of the epochs that an earlier run trained
    more: dict[str, Any] = field(default_factory=dict)


def read_sources(
    experiment: Experiment, data: Data, frozen: nn.Sequential, augmentation: nn.Module | None
) -> dict[str, Source]:
    """Return what the learning part sees of each split; only training images are augmented."""
    fast = made_fast(frozen)
    return {
        split: read_source(
            Images(data.splits[split], experiment.preprocessing, augmentation if split == "train" else None, experiment.seed),
            fast,
            experiment.place,
            experiment.recipe.views,
        )
        for split in SPLITS
    }


def state_key(experiment: Experiment, data: Data, model: nn.Module) -> str:
    """Return what a training under way is known by: its settings, its images, and the model that it starts from."""
    images = {split: [(sample.digest, sample.label) for sample in data.splits[split]] for split in SPLITS}
    return digest_of(model, json.dumps([experiment.settings(), images], default=str))
