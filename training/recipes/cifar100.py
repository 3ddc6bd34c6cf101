"""CIFAR-100 as a folder of images, report 4: seven architectures, AdamW or SGD, batches of 64.

At 32 x 32 the last layer of most of them is 1 x 1, and of Swin's windows nothing is left: images are enlarged to
128 x 128, which keeps pretrained weights meaningful and gives Grad-CAM a last layer of 4 x 4.
"""

from torch import nn
from torchvision import transforms

from training.recipe import Part, Recipe

RECIPE = Recipe(
    backbones=(
        *("efficientnet_v2_s", "mobilenet_v3_large", "regnet_y_400mf"),
        *("resnet34", "resnet50", "resnet101", "swin_t"),
    ),
    part=Part.ALL,
    size=128,
    augmentation=nn.Sequential(transforms.RandomHorizontalFlip(), transforms.RandomAffine(0, translate=(0.125, 0.125))),
    epochs=40,
    batch=64,
    ratio=(0.8, 0.1, 0.1),  # where the folder brings test/, a ninth of train/ validates
)
