"""A classifier of two classes by one direction in the space of a network's features."""

import torch
from torch import Tensor, flatten, nn
from torch.nn.functional import linear


class Direction(nn.Module):
    """Logits [n, 2] of images: threshold - g and g - threshold, g = direction . phi(x) of the flattened features phi."""

    direction: Tensor
    threshold: Tensor

    def __init__(self, features: nn.Module, length: int) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("direction", torch.zeros(length))
        self.register_buffer("threshold", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        # A function, not a Linear: rules for layers, such as BiasedLayer's, are for those of the features.
        weight = torch.stack([-self.direction, self.direction])
        return linear(flatten(self.features(x), 1), weight, torch.cat([self.threshold, -self.threshold]))
