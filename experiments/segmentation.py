"""Objects told from their background without the classifier: leaves on a table, and what is diseased on them."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_closing, binary_dilation, binary_fill_holes, gaussian_filter, label
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu

Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
CLOSED = 3  # pixels that a gap in a mask may be wide
DARK = 40.0  # added to a pixel's brightness: the hue of what is nearly black is noise
SMOOTHED = 1.5  # pixels, before a pixel's colour is judged
BROWN, YELLOW = 2.0, 8.0  # a* of a lesion in CIELAB, and how much higher its b* is than the ground's
NEAR = 8  # pixels from green tissue that a lesion reaches beyond it
WIDE = 16.0  # pixels that surroundings are averaged over to fill what is taken out


def leaf(pixels: Pixels) -> Mask:
    """Return where the leaf is on an image [H, W, 3]: its largest green part, the lesions at it, and holes.

    Green is judged relative to brightness, so that leaves in the shade are found, and the shadows that they cast are not.
    """
    red, green, blue = np.moveaxis(_smoothed(pixels.astype(float)), -1, 0)
    greenness = (2 * green - red - blue) / (red + green + blue + DARK)
    middle = threshold_otsu(greenness)  # type: ignore[no-untyped-call]
    ground = np.median(greenness[greenness <= middle])
    tissue = _largest(binary_closing(greenness > (ground + middle) / 2, iterations=CLOSED))  # gloss is hardly green
    near = binary_dilation(tissue, iterations=NEAR)
    filled: Mask = binary_fill_holes(_largest(tissue | (_brown(pixels, tissue) & near)))
    return filled


def lesions(pixels: Pixels, leaf_mask: Mask) -> Mask:
    """Return where a leaf is brown rather than green."""
    return _brown(pixels, leaf_mask) & leaf_mask


def without(pixels: Pixels, taken: Mask, within: Mask | None = None) -> Pixels:
    """Return the image with what is taken out, its outline too, filled with the average of what surrounds it `within`."""
    taken = binary_dilation(taken, iterations=CLOSED)
    taken = taken if within is None else taken & within
    known = (~taken if within is None else within & ~taken).astype(float)
    weight = gaussian_filter(known, WIDE)
    mean = pixels[known > 0].mean(0) if known.any() else np.full(3, 127.0)
    around = np.stack([gaussian_filter(pixels[..., channel] * known, WIDE) for channel in range(3)], -1)
    far = 1e-3  # the share of known pixels below which the whole image's mean stands for the surroundings
    filling = (around + far * mean) / (weight + far)[..., None]
    soft = gaussian_filter(taken.astype(float), SMOOTHED)[..., None].clip(0, 1)
    soft = np.where(taken[..., None], 1.0, soft)
    mixed: Pixels = (soft * filling + (1 - soft) * pixels).round().clip(0, 255).astype(np.uint8)
    return mixed


def _brown(pixels: Pixels, tissue: Mask) -> Mask:
    lab = _smoothed(rgb2lab(pixels))
    ground = float(np.median(lab[..., 2][~tissue])) if not tissue.all() else 0.0
    brown: Mask = (lab[..., 1] > BROWN) & (lab[..., 2] > ground + YELLOW)
    return brown


def _largest(found: Mask) -> Mask:
    """Return the largest connected part."""
    parts, count = label(found)
    if not count:
        return np.zeros_like(found)
    largest: Mask = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    return largest


def _smoothed(image: NDArray[np.float64]) -> NDArray[np.float64]:
    smoothed: NDArray[np.float64] = gaussian_filter(image, (SMOOTHED, SMOOTHED, 0))
    return smoothed
