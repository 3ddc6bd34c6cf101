"""The photo that the demo and the README explain: Chelsea the cat (by Stéfan van der Walt, CC0), from scikit-image."""

from importlib.resources import files
from pathlib import Path


def photo_path() -> Path:
    """Return where the installed package holds the photo."""
    return Path(str(files("skimage"))) / "data" / "chelsea.png"
