"""Letters of any script on pictures: each drawn in the first font that has it, or said to be missing."""

import unicodedata
from functools import cache

from PIL import Image, ImageDraw, ImageFont, features

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Pillow's own font has no letter beyond ASCII. These are looked for where the system keeps its fonts.
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf",
    "NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "NotoEmoji-Regular.ttf", "seguiemj.ttf", "Symbola.ttf",
)  # fmt: skip
NOWHERE = "\uffff"  # which no font has: it draws what stands for a missing letter


def drawable(text: str, size: int) -> str:
    """Return a text in letters that can be drawn: accents go where no font has them, what is left is counted."""
    plain = "".join(char if _font(char, size) else _without_accents(char) for char in unicodedata.normalize("NFC", text))
    return "".join(run if font else _missing(run) for font, run in _runs(plain, size))


def length(text: str, size: int) -> float:
    """Return the width of a drawable text in pixels."""
    return sum(font.getlength(run) for font, run in _runs(text, size) if font)


def write(
    on: Image.Image, at: tuple[float, float], text: str, size: int, ink: tuple[int, int, int], anchor: str = "la"
) -> None:
    """Draw a drawable text on a picture, from its left end on."""
    pen, (x, y) = ImageDraw.Draw(on), at
    for font, run in _runs(text, size):
        if font:
            pen.text((x, y), run, ink, font, anchor)
            x += font.getlength(run)


def _without_accents(char: str) -> str:
    return "".join(part for part in unicodedata.normalize("NFKD", char) if not unicodedata.combining(part))


def _missing(letters: str) -> str:
    """Say how many letters have no font; marks belong to the letter before them."""
    count = sum(unicodedata.category(char)[0] not in "CM" for char in letters)
    return f"[{count} letter{'s' if count > 1 else ''} without a font]" if count else ""


def _runs(text: str, size: int) -> list[tuple[Font | None, str]]:
    """Return a text's runs of letters of one font, or of none; marks, joiners and spaces stay with what is before them."""
    runs: list[tuple[Font | None, str]] = []
    for char in text:
        kind = unicodedata.category(char)[0]
        stays = bool(runs) and (kind in "CM" or (kind == "Z" and runs[-1][0] is not None))
        font = runs[-1][0] if stays else _font(char, size)
        if runs and runs[-1][0] is font:
            runs[-1] = (font, runs[-1][1] + char)
        else:
            runs.append((font, char))
    return runs


@cache
def _font(char: str, size: int) -> Font | None:
    """Return the first font that has a letter; without Pillow's Raqm none can set letters from right to left."""
    if unicodedata.bidirectional(char) in ("R", "AL") and not features.check("raqm"):
        return None
    return next((font for font in _fonts(size) if _mask(font, char) != _mask(font, NOWHERE)), None)


def _mask(font: Font, char: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(char)
    return mask.size, bytes(mask)


@cache
def _fonts(size: int) -> list[Font]:
    """Return Pillow's own font, and those of the system."""
    return [ImageFont.load_default(size), *(font for name in SYSTEM_FONTS if (font := _opened(name, size)))]


def _opened(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None
