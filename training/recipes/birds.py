"""Birds of 10 species, report 3: a CNN of three blocks, VGG19 or Xception; `--draw N` adds a small GAN's images."""

from torch import nn
from torchvision import transforms

from training.recipe import Part, Recipe

RECIPE = Recipe(
    backbones=("cnn", "vgg19", "timm/legacy_xception"),
    part=Part.LAST_STAGE,  # the CNN learns whole
    augmentation=nn.Sequential(
        transforms.RandomHorizontalFlip(),
        transforms.RandomAffine(degrees=40, translate=(0.2, 0.2), scale=(0.8, 1.2)),
    ),
    epochs=40,
    draws=True,
)
