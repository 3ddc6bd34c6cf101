"""Colour maps as lookup tables: a few anchors, interpolated to 256 colours."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

# Sequential: inferno, magma and viridis by van der Walt and Smith (CC0); cividis by Nunez, Anderton and Renslow (CC0), which
# looks alike with and without red-green blindness. Diverging: bright enough to be seen on a photo; the positive colour first.
_ANCHORS = {
    "inferno": "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754"
    " d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4",
    "magma": "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779"
    " d0416f e75263 f56b5c fc8961 fea772 fec488 fde2a3 fcfdbf",
    "viridis": "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c"
    " 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
    "cividis": "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78"
    " 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
    "gray": "000000 ffffff",
    "red_blue": "0022b8 1a55ff 7fa6ff f7f7f7 ffa08c ff3b1a b81500",
    "orange_blue": "002a9e 1a5cff 86adff f7f7f7 ffb86b ee8200 a85000",
}
COLORMAPS = tuple(_ANCHORS)
DIVERGING = ("red_blue", "orange_blue")
SEQUENTIAL_DEFAULT, DIVERGING_DEFAULT = "inferno", "red_blue"


@cache
def table(name: str) -> NDArray[np.uint8]:
    """Return the colour map's 256 colours [256, 3]."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in _ANCHORS[name].split()], dtype=float)
    at = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.stack(channels, 1).round().astype(np.uint8)
