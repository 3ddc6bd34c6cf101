"""Report 4, CIFAR-100: seven architectures from nothing, one transferred, and Grad-CAM at layers of falling resolution.

A fifth of the classes. Insertion and deletion tell what a layer's map is worth, beside a map that is the image's centre.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.charts import save_curves
from experiments.output import arguments, carried_out, heatmap, overlaid, save_sheet, write
from experiments.trained import Pixels, Row, Trained, accuracies, train
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.quality import Deletion, Insertion
from torchserve_explain.gallery.pages import mean_map
from torchserve_explain.serving.pictures import Map
from training.data import read_folder
from training.recipe import read_recipe

SIZE = 32  # of the images
SHOWN = 4  # pictures that are drawn
STEPS = 16  # of insertion and deletion


def main() -> None:
    """Run the experiment that the command line asks for."""
    options = arguments("cifar100", __doc__, _more)
    folder = chosen_classes(options.data, options.out / "images", options.every)
    recipe, _ = read_recipe("cifar100")
    tuned = ("--backbone", options.backbone, "--part", "head", "--views", "2", "--epochs", "15", "--learning-rate", "5e-3")
    nothing = ("--weights", "random", "--size", str(SIZE), "--epochs", str(options.epochs))
    scratch = {
        name: train("cifar100", folder, options.out / name, "--backbone", name, *nothing)
        for name in options.networks or recipe.backbones
    }
    transferred = {
        f"{options.backbone}, head, at {size}": train(
            "cifar100", folder, options.out / f"{options.backbone}-{size}", *tuned, "--size", str(size)
        )
        for size in (SIZE, 2 * SIZE, 4 * SIZE)
    }
    every = scratch | transferred
    save_curves(options.out / "pictures" / "scratch.png", {name: one.metrics for name, one in scratch.items()})
    save_curves(options.out / "pictures" / "transferred.png", {name: one.metrics for name, one in transferred.items()})
    layers = [row for name, one in every.items() for row in layer_maps(name, one, folder, options)]
    write(
        options.out,
        {name: one.metrics["test"] for name, one in every.items()},
        {"accuracy": accuracies(every), "Grad-CAM by layer": layers},
    )


def _more(command: argparse.ArgumentParser) -> None:
    command.add_argument("--every", type=int, default=5, help="classes: one in so many (default: %(default)s)")
    command.add_argument("--epochs", type=int, default=5, help="of the networks from nothing (default: %(default)s)")
    command.add_argument("--networks", nargs="+", help="default: the report's seven")
    command.add_argument("--explained", type=int, default=20, help="test pictures that are explained (default: %(default)s)")


def chosen_classes(data: Path, folder: Path, every: int) -> Path:
    """Link every so many of the classes of a folder with train/ and test/ into another; return it."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for path in sorted((data / split).iterdir())[::every]:
            link = folder / split / path.name
            if not link.is_symlink():
                link.symlink_to(path.resolve())
    return folder


def layer_maps(name: str, trained: Trained, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Draw Grad-CAM's maps of some test pictures at the last layer of each resolution; yield what they are worth."""
    read = read_folder(folder, trained.preprocessing, read_recipe("cifar100")[0].ratio, trained.metrics["seed"])
    samples = read.splits["test"][:: max(1, len(read.splits["test"]) // options.explained)][: options.explained]
    images, targets = [trained.pixels(sample.path) for sample in samples], [sample.label for sample in samples]
    cells = [(Image.fromarray(images[place]), trained.classes[targets[place]], "test picture") for place in range(SHOWN)]
    means = []
    for layer, grid in last_layers(trained).items():
        maps = trained.maps(images, targets, GradCam(layer=layer))
        yield {"network": name, "layer": layer, "grid": grid, **worth(trained, images, targets, maps)}
        cells += [(overlaid(images[place], maps[place]), layer, grid) for place in range(SHOWN)]
        mean = mean_map(maps)
        assert mean is not None
        means.append((heatmap(mean), layer, f"{grid}, mean of {len(maps)}"))
    centre = [centred(images[0].shape[0])] * len(images)
    yield {"network": name, "layer": "the image's centre", "grid": "-", **worth(trained, images, targets, centre)}
    save_sheet(options.out / "pictures" / f"{name}.webp", cells, 112, SHOWN)
    save_sheet(options.out / "pictures" / f"{name} means.webp", means, 112, len(means))


def last_layers(trained: Trained) -> dict[str, str]:
    """Return the last layer of each resolution but the input's own, and its grid, in their order."""
    found: dict[str, str] = {}
    for layer, grid in trained.engine.classifier.spatial_layers.items():
        found[f"{grid.height} x {grid.width}"] = layer
    return {layer: grid for grid, layer in found.items()}


def worth(trained: Trained, images: list[Pixels], targets: list[int], maps: list[Map]) -> Mapping[str, float]:
    """Return the mean insertion and deletion of maps, and what the one is above the other."""
    insertion, deletion = (trained.quality(images, targets, maps, way(STEPS)) for way in (Insertion, Deletion))
    return {"insertion": insertion, "deletion": deletion, "insertion less deletion": insertion - deletion}


def centred(side: int) -> Map:
    """Return a map [side, side] that falls from the image's centre."""
    place = np.linspace(-1, 1, side, dtype=np.float32)
    falling: Map = np.exp(-2 * (place[:, None] ** 2 + place[None] ** 2))
    return falling


if __name__ == "__main__":
    sys.exit(carried_out(main))
