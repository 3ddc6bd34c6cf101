"""What a terminal is given: pictures as half blocks in true colour, and texts that command nothing."""

import numpy as np
from PIL import Image, ImageOps

UPPER_HALF = "\N{UPPER HALF BLOCK}"
RESET = "\x1b[0m"


def half_blocks(picture: Image.Image, columns: int, lines: int) -> str:
    """Return a picture as text, at most so many characters wide and high: each holds an upper and a lower pixel."""
    fitted = ImageOps.contain(picture.convert("RGB"), (columns, 2 * lines), Image.Resampling.LANCZOS)
    pixels = np.asarray(fitted)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])  # a last row alone would stand on the terminal's own colour
    return "\n".join(_line(upper, lower) for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True))


def printable(text: str) -> str:
    """Return a server's text without characters that a terminal obeys."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _line(upper: list[list[int]], lower: list[list[int]]) -> str:
    """Return two rows of pixels as one line: colours above are the letter's, those below the ground's."""
    cells = (f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{R};{G};{B}m{UPPER_HALF}"
             for (r, g, b), (R, G, B) in zip(upper, lower, strict=True))  # fmt: skip
    return "".join(cells) + RESET
