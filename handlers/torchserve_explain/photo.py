"""Photos at hand: the cup of espresso (by Rachel Michetti, CC0) that the README explains, others of scikit-image."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from torchserve_explain.records import SUFFIXES
from torchserve_explain.serving.images import Picture, read_picture
from torchserve_explain.serving.settings import Preprocessing

PACKAGED = ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png")  # photos of scikit-image


def photo_path() -> Path:
    """Return where the installed package holds the photo."""
    return Path(str(files("skimage"))) / "data" / PACKAGED[0]


def pictures(folder: Path | None, preprocessing: Preprocessing) -> Iterator[tuple[str, Picture]]:
    """Yield the photos of a folder by name, or those that scikit-image ships."""
    paths = [photo_path().with_name(name) for name in PACKAGED]
    if folder is not None:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for path in paths:
        yield path.stem, read_picture(path.read_bytes(), preprocessing, 10**8)


if __name__ == "__main__":
    print(photo_path())
