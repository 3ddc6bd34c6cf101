"""The photo that the demo and the README explain: a cup of espresso (by Rachel Michetti, CC0), from scikit-image."""

from importlib.resources import files
from pathlib import Path


def photo_path() -> Path:
    """Return where the installed package holds the photo."""
    return Path(str(files("skimage"))) / "data" / "coffee.png"


if __name__ == "__main__":
    print(photo_path())
