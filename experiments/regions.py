"""How much of a map lies where."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion

from experiments.segmentation import Mask
from torchserve_explain.serving.pictures import Map


@dataclass(frozen=True)
class Share:
    """The share of a map's positive part within a region, and the share of the image that the region is."""

    mass: float
    area: float


def share(values: Map, region: Mask) -> Share:
    """Measure a map [H, W] against a region; a map without a positive part has its mass everywhere alike."""
    positive = values.clip(min=0)
    total, area = float(positive.sum()), float(region.mean())
    return Share(float(positive[region].sum()) / total if total else area, area)


def edge(region: Mask, width: int) -> Mask:
    """Return the band of `width` pixels on both sides of a region's outline."""
    wide: Mask = binary_dilation(region, iterations=width) & ~binary_erosion(region, iterations=width)
    return wide


def mean_shares(found: Iterable[Mapping[str, Share]]) -> dict[str, Share]:
    """Return the mean over pictures of each region's shares; a region that a picture lacks counts with none there."""
    every = list(found)
    return {
        name: Share(float(np.mean([one[name].mass for one in every])), float(np.mean([one[name].area for one in every])))
        for name in every[0]
    }
