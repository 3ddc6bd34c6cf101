"""EfficientNet-Lite0: EfficientNet (arXiv:1905.11946) without squeeze-and-excitation, with ReLU6."""

from functools import partial

from torch import Tensor, flatten, nn

# Expansion, kernel, stride, channels out, repeats: the stages of EfficientNet-B0.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """Convolution with TensorFlow's SAME padding (at stride 2 one pixel more at the end), batch norm, ReLU6."""
    even = (kernel - 1) // 2 if stride == 1 else 0
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    layers = [] if even or kernel == 1 else [nn.ZeroPad2d((before, after, before, after))]
    layers += [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=even, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if active else []))


class _Block(nn.Module):
    """Inverted residual: expand, filter each channel, project; plus the input where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.layers = nn.Sequential(
            *([_convolution(inputs, wide)] if expansion > 1 else []),
            _convolution(wide, wide, kernel, stride, groups=wide),
            _convolution(wide, outputs, active=False),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class EfficientNetLite0(nn.Module):
    """Logits [n, classes] of images [n, 3, 224, 224] normalised with mean 0.498, std 0.502."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, kernel, stride, outputs, repeats in STAGES:
            block = partial(_Block, expansion=expansion, kernel=kernel)
            blocks.append(block(channels, outputs, stride=stride))
            blocks += [block(outputs, outputs, stride=1) for _ in range(repeats - 1)]
            channels = outputs
        self.features = nn.Sequential(_convolution(3, 32, 3, 2), *blocks, _convolution(channels, 1280))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(flatten(self.pool(self.features(x)), 1))
