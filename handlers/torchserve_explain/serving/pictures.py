"""Maps drawn: heat maps, overlays, their scale, and the contact sheet of several."""

import io
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchserve_explain.serving.colormaps import DIVERGING, DIVERGING_DEFAULT, SEQUENTIAL_DEFAULT, table
from torchserve_explain.serving.lettering import drawable, length, write

Map = NDArray[np.float32]
INK, PAPER = (235, 235, 235), (24, 24, 28)
LARGEST_SIDE = 256  # to which a large map is reduced, in pixels; the values travel at full size when asked for
SMALLEST_SIDE, LARGEST_ENLARGED = 224, 336  # that a small map's shorter side should have, and its longer at most
STRIP = 12  # height of a scale, in pixels
SHADE = 0.6  # how far the image darkens where the map says nothing, at full opacity
VIVID = 0.75  # where in its colours an overlay starts


@dataclass(frozen=True)
class Scale:
    """How values become colours: full colour stands for `limit`; values below zero have colours of their own or none."""

    colormap: str
    limit: float
    unit: str | None = None  # of the values, where they are amounts of the score

    @classmethod
    def of(cls, values: Map, signed: bool, colormap: str | None, clip: float, unit: str | None = None) -> "Scale":
        """Choose the scale of a map: `clip` is the percentile of |value| that gets full colour.

        A signed map gets a diverging colour map unless another is named; a sequential one shows its positive part.
        """
        name = colormap or (DIVERGING_DEFAULT if signed else SEQUENTIAL_DEFAULT)
        size = np.abs(values) if name in DIVERGING else values.clip(min=0)
        limit = float(np.percentile(size, clip))
        # A sparse map may have nothing below its percentile; a map of zeros has no scale at all.
        return cls(name, limit or float(size.max()), unit)

    @property
    def lowest(self) -> float:
        """The value that the first colour stands for: zero lies at the start of the colours, or in their middle."""
        return -self.limit if self.colormap in DIVERGING else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the contract's form of it."""
        return {"colormap": self.colormap, "from": self.lowest, "to": self.limit, "unit": self.unit}

    def meaning(self, signed: bool) -> str:
        """Return what the colours of a map say."""
        if self.colormap in DIVERGING:
            return "{} raised the score, {} lowered it".format(*self.colormap.split("_")).capitalize()
        return "The brighter, the more " + ("it raised the score" if signed else "the score depends on it")

    def strength(self, values: Map) -> Map:
        """Return each value as a fraction of full colour, 0..1, or -1..1 with a diverging colour map."""
        fraction = np.zeros_like(values) if self.limit == 0 else values / np.float32(self.limit)
        return fraction.clip(-1 if self.colormap in DIVERGING else 0, 1)

    def indices(self, values: Map) -> NDArray[np.uint8]:
        """Return each value's index in the colour table."""
        return self.colours(self.strength(values))

    def colours(self, strength: Map) -> NDArray[np.uint8]:
        """Return the index in the colour table that stands for each fraction of full colour."""
        unit = (strength + 1) / 2 if self.colormap in DIVERGING else strength
        return (unit * 255).round().astype(np.uint8)


def draw_heatmap(values: Map, scale: Scale) -> Image.Image:
    """Draw the map [H, W] alone, one table entry a pixel."""
    return _coloured(scale.indices(values), scale)


def _coloured(indices: NDArray[np.uint8], scale: Scale) -> Image.Image:
    """Return indices in the colour table as a picture with that palette."""
    image = Image.fromarray(indices)
    image.putpalette(table(scale.colormap).tobytes())
    return image


def draw_overlay(values: Map, scale: Scale, seen: Image.Image, opacity: float) -> Image.Image:
    """Lay the map over what the model saw: the stronger a value, the more of its colour.

    `opacity` 0 leaves the image alone, 1 hides it where the map is strongest.
    """
    under = seen.convert("RGB")
    if scale.colormap in DIVERGING:  # red and blue would be lost among an image's own colours
        under = Image.blend(under, seen.convert("L").convert("RGB"), min(1, 2 * opacity))
    under = under.point([round(value * (1 - SHADE * opacity)) for value in range(256)] * 3)
    strength = scale.strength(values)
    size = np.abs(strength)
    weight = (255 * (2 * opacity * size).clip(max=1)).round().astype(np.uint8)
    # The vivid end of the colours stands for strength; their dark or white start would only cover the image.
    vivid = np.copysign(size.clip(min=VIVID), strength)
    return Image.composite(_coloured(scale.colours(vivid), scale).convert("RGB"), under, Image.fromarray(weight))


def draw_scale(scale: Scale, width: int) -> Image.Image:
    """Draw the colours with the values of their ends and their unit, `width` x STRIP pixels."""
    strip = Image.new("RGB", (width, STRIP), PAPER)
    texts = (f"{scale.lowest:.2g}", f"{scale.limit:.2g} {scale.unit or ''}".rstrip())
    left, right = (int(length(text, 10)) + 6 for text in texts)
    for text, at in zip(texts, (3, width - right + 3), strict=True):
        write(strip, (at, STRIP // 2), text, 10, INK, "lm")
    if width > left + right:
        colours = Image.fromarray(table(scale.colormap)[None])
        strip.paste(colours.resize((width - left - right, STRIP - 4), Image.Resampling.BILINEAR), (left, 2))
    return strip


def with_scale(drawn: Image.Image, scale: Scale) -> Image.Image:
    """Return the picture with its scale laid over the last rows, the size unchanged."""
    shown = drawn.convert("RGB")
    if drawn.height > 4 * STRIP:
        shown.paste(draw_scale(scale, drawn.width), (0, drawn.height - STRIP))
    return shown


@dataclass(frozen=True)
class Cell:
    """One picture of a contact sheet: what stands above it, and its scale where it has one."""

    picture: Image.Image
    title: str
    subtitle: str
    scale: Scale | None = None


def contact_sheet(cells: Sequence[Cell]) -> Image.Image:
    """Draw the cells side by side, each under its title and above its scale."""
    columns = ceil(sqrt(len(cells)))
    gap, head = 8, 34
    width = max(max(cell.picture.width for cell in cells), 160) + gap
    height = max(cell.picture.height for cell in cells) + head + STRIP + gap
    sheet = Image.new("RGB", (columns * width + gap, -(-len(cells) // columns) * height + gap), PAPER)
    for index, cell in enumerate(cells):
        x, y = gap + index % columns * width, gap + index // columns * height
        write(sheet, (x, y), _shortened(cell.title, 13, width - gap), 13, INK)
        write(sheet, (x, y + 17), _shortened(cell.subtitle, 11, width - gap), 11, INK)
        sheet.paste(cell.picture.convert("RGB"), (x, y + head))
        if cell.scale is not None:
            sheet.paste(draw_scale(cell.scale, cell.picture.width), (x, y + head + cell.picture.height))
    return sheet


def _shortened(text: str, size: int, width: int) -> str:
    """Shorten a text to one line of a width in pixels, in letters that some font here has."""
    text = drawable(" ".join(text.split())[:200], size)
    if length(text, size) <= width:
        return text

    def too_long(letters: int) -> bool:
        return length(text[:letters] + "...", size) > width

    return text[: bisect_left(range(1, len(text)), True, key=too_long)] + "..."


def fitted(values: Map, seen: Image.Image) -> tuple[Map, Image.Image]:
    """Return map and image at a size fit to be looked at and sent.

    Larger than LARGEST_SIDE, both are averaged down. Where the shorter side is below SMALLEST_SIDE, they are enlarged
    as far as the longer side allows, by a whole factor where one fits: each value becomes a square, the image stays smooth.
    """
    height, width = values.shape
    ratio = LARGEST_SIDE / max(height, width)
    if ratio < 1:
        size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        smaller = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))
        return smaller, seen.resize(size, Image.Resampling.BOX)
    whole = min(ceil(SMALLEST_SIDE / min(height, width)), LARGEST_ENLARGED // max(height, width))
    factor = whole if whole > 1 else min(SMALLEST_SIDE / min(height, width), LARGEST_ENLARGED / max(height, width))
    if factor <= 1:
        return values, seen
    size = (round(width * factor), round(height * factor))
    larger = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
    return larger, seen.resize(size, Image.Resampling.BICUBIC)


def compact(values: Map) -> Map | NDArray[np.float16]:
    """Return a map's values as float16; a map that float16 cannot hold (beyond 65,504, or all below 6e-5) as float32."""
    largest = float(np.abs(values).max())
    return values.astype("<f2" if largest == 0 or 1e-2 <= largest <= 65504 else "<f4")


def png(image: Image.Image) -> bytes:
    """Encode a picture; more effort than this level's takes twice the time for a hundredth of the size."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=4)
    return stream.getvalue()


def small_png(image: Image.Image) -> bytes:
    """Encode an overlay with 256 colours: less than half of its size, and hardly seen.

    Median cut shows no bands in gradients but is slow, so it chooses most colours for a sample of the pixels. Octree
    quantisation is fast and coarse: it adds colours that the sample may have missed, such as a map's only bright spot.
    """
    picture = image.convert("RGB")
    sample = picture.resize((48, 48), Image.Resampling.NEAREST).quantize(192)
    rare = picture.quantize(64, Image.Quantize.FASTOCTREE)
    palette = Image.new("P", (1, 1))
    palette.putpalette(b"".join(bytes(part.getpalette() or ()) for part in (sample, rare)))
    return png(picture.quantize(palette=palette, dither=Image.Dither.NONE))


def heatmap_png(heatmap: Image.Image) -> bytes:
    """Encode a heat map; one of the whole upload has no palette yet."""
    return png(heatmap) if heatmap.mode == "P" else small_png(heatmap)
