"""Vegetables of 15 classes, report 1: ResNet34 of which the last stage and a new head learn; or a CNN, `--backbone cnn`."""

from torch import nn
from torchvision import transforms

from training.recipe import Part, Recipe

RECIPE = Recipe(
    backbones=("resnet34", "cnn"),
    part=Part.LAST_STAGE,
    first={"lite0": "features.13"},  # after the last halving of the grid: as accurate, and half as dear to train
    # The report names none of its random transforms, but that none is of brightness or contrast.
    augmentation=nn.Sequential(
        transforms.RandomHorizontalFlip(),
        transforms.RandomAffine(degrees=20, translate=(0.1, 0.1), scale=(0.9, 1.2)),
    ),
    learning_rate=5e-4,
    epochs=30,
    batch=64,
)
