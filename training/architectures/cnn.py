"""A plain CNN: three blocks of convolution, max pooling and dropout, and two linear layers."""

from itertools import pairwise

from torch import Tensor, flatten, nn


class Cnn(nn.Module):
    """Logits [n, classes] of images [n, 3, H, W], H and W 32 or more."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        blocks = (
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2))
            for before, after in pairwise((3, 32, 64, 128))
        )
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.classifier = nn.Sequential(nn.Linear(128 * 4 * 4, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(flatten(self.pool(self.features(x)), 1))
        return logits
