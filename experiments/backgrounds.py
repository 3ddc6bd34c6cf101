"""Pictures of a leaf changed to see what a classifier decides by: its ground, its surface, its outline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2gray

from experiments.segmentation import Mask, Pixels, without

FEATHER = 1.0  # pixels that a leaf's outline is softened by where it is pasted
BLUR = 10.0  # standard deviation in pixels


@dataclass(frozen=True)
class Scene:
    """A picture [H, W, 3], where its leaf is, and where it is diseased."""

    pixels: Pixels
    leaf: Mask
    diseased: Mask

    @property
    def ground(self) -> Pixels:
        """The picture without its leaf."""
        return without(self.pixels, self.leaf)


def pasted(scene: Scene, ground: Pixels) -> Pixels:
    """Return the scene's leaf on another ground."""
    weight = gaussian_filter(scene.leaf.astype(float), FEATHER)[..., None]
    both: Pixels = (weight * scene.pixels + (1 - weight) * ground).round().astype(np.uint8)
    return both


def flat(scene: Scene, colour: tuple[int, int, int]) -> Pixels:
    """Return a ground of one colour."""
    return np.full_like(scene.pixels, colour)


def blurred(pixels: Pixels) -> Pixels:
    """Return the picture out of focus."""
    out_of_focus: Pixels = gaussian_filter(pixels.astype(float), (BLUR, BLUR, 0)).round().astype(np.uint8)
    return out_of_focus


def recoloured(pixels: Pixels, where: Mask, like: Pixels, there: Mask) -> Pixels:
    """Return the picture with each colour's mean and deviation in `where` made those of another picture's `there`."""
    own, other = pixels[where].astype(float), like[there].astype(float)
    changed = pixels.copy()
    moved = (own - own.mean(0)) / (own.std(0) + 1e-6) * other.std(0) + other.mean(0)
    changed[where] = moved.round().clip(0, 255).astype(np.uint8)
    return changed


def grey(pixels: Pixels) -> Pixels:
    """Return the picture without colour."""
    return np.repeat((255 * rgb2gray(pixels)).round().astype(np.uint8)[..., None], 3, -1)


Change = Callable[[Scene, Scene], Pixels]  # of a scene, and one of the other class


def changes(ground: tuple[int, int, int], surface: tuple[int, int, int]) -> Mapping[str, Change]:
    """Return the changes by what they do; `ground` and `surface` are the mean colours over the training pictures."""

    def outline(scene: Scene, _other: Scene) -> Pixels:
        return np.where(scene.leaf[..., None], np.array(surface, np.uint8), flat(scene, ground))

    def recoloured_all(scene: Scene, other: Scene) -> Pixels:
        leaf_changed = recoloured(scene.pixels, scene.leaf, other.pixels, other.leaf)
        return recoloured(leaf_changed, ~scene.leaf, other.pixels, ~other.leaf)

    return {
        "as it is": lambda scene, _: scene.pixels,
        "ground: one grey": lambda scene, _: pasted(scene, flat(scene, ground)),
        "ground: blurred": lambda scene, _: pasted(scene, blurred(scene.ground)),
        "ground: of the other class": lambda scene, other: pasted(scene, other.ground),
        "ground alone": lambda scene, _: scene.ground,
        "diseased places painted over": lambda scene, _: without(scene.pixels, scene.diseased, scene.leaf),
        "leaf in the other class's colours": lambda scene, other: recoloured(
            scene.pixels, scene.leaf, other.pixels, other.leaf
        ),
        "leaf and ground in the other class's colours": recoloured_all,
        "no colour": lambda scene, _: grey(scene.pixels),
        "outline alone": outline,
    }
