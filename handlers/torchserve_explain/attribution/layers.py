"""A classifier's spatial layers: which modules answer a grid of features, and how the grid is laid out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Modules that only resample or drop: their output says nothing that the layer before them does not say better.
PASSING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity)


@dataclass(frozen=True)
class Grid:
    """How a layer's output holds an h x w grid: channels first, channels last, or as tokens (`skip` of them before it)."""

    layout: str
    channels: int
    height: int
    width: int
    skip: int = 0

    def channels_first(self, output: Tensor) -> Tensor:
        """Return the output as [n, channels, h, w]."""
        if self.layout == "tokens":
            output = output[:, self.skip :].reshape(len(output), self.height, self.width, -1)
        return output if self.layout == "channels_first" else output.movedim(-1, 1)


def find_spatial_layers(model: nn.Module, example: Tensor) -> dict[str, Grid]:
    """Find the modules whose output is a grid larger than 1 x 1, by dotted name, in the order in which they finish.

    `example` [1, C, H, W] is run twice, in one pass, so that what is no image's own, such as a table of positions, shows.
    Grids are recognised by its aspect ratio. The model is left as it was.
    """
    found: dict[str, Grid] = {}
    pair = torch.cat([example, example])

    def watch(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            usable = isinstance(output, Tensor) and output.is_floating_point() and not output.is_inference()
            grid = _grid(output, pair) if usable else None
            found.pop(name, None)  # a module called again finishes later, and what it answers last counts
            if grid is not None and not isinstance(module, PASSING):
                found[name] = grid

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(pair)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _grid(output: Tensor, example: Tensor) -> Grid | None:
    rows, columns = example.shape[-2:]
    if output.dim() == 0 or len(output) != len(example):  # tiles or windows of images, which are rows of their own there
        return None
    if output.dim() == 4:
        _, a, b, c = output.shape
        for layout, channels, height, width in (("channels_first", a, b, c), ("channels_last", c, a, b)):
            if height * width > 1 and _same_aspect(height, width, rows, columns):
                return Grid(layout, channels, height, width)
    if output.dim() == 3:
        for skip in (0, 1):
            tokens = output.shape[1] - skip
            height = round((tokens * rows / columns) ** 0.5)
            if height > 1 and height * round(height * columns / rows) == tokens:
                return Grid("tokens", output.shape[2], height, round(height * columns / rows), skip)
    return None


def _same_aspect(height: int, width: int, rows: int, columns: int) -> bool:
    """Whether h x w is rows x columns reduced by one stride, up to the rounding of paddings."""
    return abs(height * columns - width * rows) <= max(rows, columns)
