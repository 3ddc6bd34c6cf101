"""Generated folders of images with a known answer: noise, and a patch at a place of its own whose colour is the class."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (20, 40, 240), "green": (30, 230, 60), "red": (240, 30, 30)}
SIDE, PATCH = 64, 20


def patched(colour: str, seed: int) -> tuple[Image.Image, tuple[int, int]]:
    """Return an image of noise with a patch of a colour, and the patch's top and left."""
    generator = np.random.default_rng(seed)
    pixels = generator.normal(128, 25, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    top, left = (int(place) for place in generator.integers(2, SIDE - PATCH - 2, 2))
    pixels[top : top + PATCH, left : left + PATCH] = COLOURS[colour]
    return Image.fromarray(pixels), (top, left)


def write_folder(folder: Path, colours=tuple(COLOURS), count=16, start=0) -> Path:
    """Write a folder of images for each colour."""
    for number, colour in enumerate(colours):
        (folder / colour).mkdir(parents=True)
        for place in range(count):
            patched(colour, 1000 * number + start + place)[0].save(folder / colour / f"{place:03}.png")
    return folder


def times_by_chance(values, corner) -> float:
    """Return how many times more of a map's positive part lies in the patch than if it were spread evenly."""
    positive = np.clip(values, 0, None)
    scale = positive.shape[0] / SIDE
    top, left = (round(place * scale) for place in corner)
    side = round(PATCH * scale)
    share = positive[top : top + side, left : left + side].sum() / positive.sum()
    return float(share / (side / positive.shape[0]) ** 2)
