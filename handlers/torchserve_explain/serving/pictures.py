"""Maps drawn: heat maps, overlays, their scale, and the contact sheet of several."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from torchserve_explain.serving.colormaps import DIVERGING, DIVERGING_DEFAULT, SEQUENTIAL_DEFAULT, table

Map = NDArray[np.float32]
INK, PAPER = (235, 235, 235), (24, 24, 28)
LARGEST_SIDE = 256  # of a picture, in pixels; the values travel at full size when asked for
STRIP = 12  # height of a scale, in pixels
SHADE = 0.6  # how far the image darkens where the map says nothing, at full opacity
VIVID = 0.75  # where in its colours an overlay starts


@dataclass(frozen=True)
class Scale:
    """How values become colours: full colour stands for `limit`; values below zero have colours of their own or none."""

    colormap: str
    limit: float

    @classmethod
    def of(cls, values: Map, signed: bool, colormap: str | None, clip: float) -> "Scale":
        """Choose the scale of a map: `clip` is the percentile of |value| that gets full colour.

        A signed map gets a diverging colour map unless another is named; a sequential one shows its positive part.
        """
        name = colormap or (DIVERGING_DEFAULT if signed else SEQUENTIAL_DEFAULT)
        size = np.abs(values) if name in DIVERGING else values.clip(min=0)
        limit = float(np.percentile(size, clip))
        # A sparse map may have nothing below its percentile; a map of zeros has no scale at all.
        return cls(name, limit or float(size.max()))

    @property
    def lowest(self) -> float:
        """The value that the first colour stands for: zero lies at the start of the colours, or in their middle."""
        return -self.limit if self.colormap in DIVERGING else 0.0

    def strength(self, values: Map) -> Map:
        """Return each value as a fraction of full colour, 0..1, or -1..1 with a diverging colour map."""
        fraction = np.zeros_like(values) if self.limit == 0 else values / np.float32(self.limit)
        return fraction.clip(-1 if self.colormap in DIVERGING else 0, 1)

    def indices(self, values: Map) -> NDArray[np.uint8]:
        """Return each value's place in the colour table."""
        strength = self.strength(values)
        unit = (strength + 1) / 2 if self.colormap in DIVERGING else strength
        return (unit * 255).round().astype(np.uint8)


def draw_heatmap(values: Map, scale: Scale) -> Image.Image:
    """Draw the map [H, W] alone, one table entry a pixel."""
    image = Image.fromarray(scale.indices(values))
    image.putpalette(table(scale.colormap).tobytes())
    return image


def draw_overlay(values: Map, scale: Scale, seen: Image.Image, opacity: float) -> Image.Image:
    """Lay the map over what the model saw: the stronger a value, the more of its colour.

    `opacity` 0 leaves the image alone, 1 hides it where the map is strongest.
    """
    image = np.asarray(seen.convert("RGB"), dtype=np.float32)
    if scale.colormap in DIVERGING:  # red and blue would be lost among an image's own colours
        grey = np.asarray(seen.convert("L"), dtype=np.float32)[..., None]
        image = image + min(1, 2 * opacity) * (grey - image)
    strength = scale.strength(values)
    weight = np.minimum(1, 2 * opacity * np.abs(strength))[..., None]
    # The vivid end of the colours stands for strength; their dark or white start would only cover the image.
    vivid = np.copysign(np.maximum(np.abs(strength), VIVID), strength) * np.float32(scale.limit)
    colours = table(scale.colormap)[scale.indices(vivid)].astype(np.float32)
    shown = image * (1 - SHADE * opacity) * (1 - weight) + colours * weight
    return Image.fromarray(shown.round().astype(np.uint8))


def draw_scale(scale: Scale, width: int) -> Image.Image:
    """Draw the colours with the values of their ends, `width` x STRIP pixels."""
    strip = Image.new("RGB", (width, STRIP), PAPER)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(10)
    texts = (f"{scale.lowest:.2g}", f"{scale.limit:.2g}")
    left, right = (int(pen.textlength(text, font)) + 6 for text in texts)
    pen.text((3, STRIP // 2), texts[0], INK, font, anchor="lm")
    pen.text((width - 3, STRIP // 2), texts[1], INK, font, anchor="rm")
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
    font, small, gap, head = ImageFont.load_default(13), ImageFont.load_default(11), 8, 34
    width = max(max(cell.picture.width for cell in cells), 160) + gap
    height = max(cell.picture.height for cell in cells) + head + STRIP + gap
    sheet = Image.new("RGB", (columns * width + gap, -(-len(cells) // columns) * height + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, cell in enumerate(cells):
        x, y = gap + place % columns * width, gap + place // columns * height
        pen.text((x, y), _fitted(pen, cell.title, font, width - gap), INK, font)
        pen.text((x, y + 17), _fitted(pen, cell.subtitle, small, width - gap), INK, small)
        sheet.paste(cell.picture.convert("RGB"), (x, y + head))
        if cell.scale is not None:
            sheet.paste(draw_scale(cell.scale, cell.picture.width), (x, y + head + cell.picture.height))
    return sheet


def _fitted(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a text to one line of a width in pixels."""
    text = " ".join(text.split())[:200]
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def reduced(values: Map, seen: Image.Image) -> tuple[Map, Image.Image]:
    """Return map and image no larger than LARGEST_SIDE, averaged down, so that an answer stays small."""
    height, width = values.shape
    ratio = LARGEST_SIDE / max(height, width)
    if ratio >= 1:
        return values, seen
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    smaller = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))
    return smaller, seen.resize(size, Image.Resampling.BOX)


def compact(values: Map) -> Map | NDArray[np.float16]:
    """Return a map's values as float16; a map that float16 cannot hold (beyond 65,504, or all below 6e-5) as float32."""
    largest = float(np.abs(values).max())
    return values.astype("<f2" if largest == 0 or 1e-2 <= largest <= 65504 else "<f4")


def png(image: Image.Image) -> bytes:
    """Encode a picture."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def small_png(image: Image.Image) -> bytes:
    """Encode an overlay with 256 colours: a third of its size, and hardly seen."""
    return png(image.quantize(256))
