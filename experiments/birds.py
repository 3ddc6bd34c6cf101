"""Report 3, birds: a CNN from nothing with and without augmentation, a transferred network; an American coot explained."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.charts import save_confusion, save_curves
from experiments.output import arguments, carried_out, heatmap, overlaid, save_sheet, write
from experiments.regions import share
from experiments.segmentation import Mask
from experiments.trained import Row, Trained, accuracies, train
from torchserve_explain.attribution.methods import Method
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.superpixels import KernelShap, Lime
from torchserve_explain.attribution.quality import Deletion, Insertion
from torchserve_explain.gallery.pages import mean_map
from training.data import read_folder
from training.recipe import read_recipe

METHODS: dict[str, Method] = {
    "lime": Lime(),
    "kernel_shap": KernelShap(),
    "gradient_shap": GradientShap(),
    "grad_cam": GradCam(),
}
COOT = "AMERICAN COOT"
STEPS = 16  # of insertion and deletion
LONGER = {2: "twice", 5: "five times"}  # as many steps as with as many drawn images as there are; until it gets no better
CENTRE = 0.5  # of the image's side: the square that most birds are in


def main() -> None:
    """Run the experiment that the command line asks for."""
    options = arguments("birds", __doc__, _more)
    cnn = ("--backbone", "cnn", "--size", str(options.cnn_size), "--epochs")
    small = (*cnn, str(options.cnn_epochs))
    drawn = ("--draw", str(options.draw), "--draw-steps", str(options.draw_steps))
    every = {
        "CNN, as photographed": train("birds", options.data, options.out / "cnn-plain", *small, "--unaugmented"),
        "CNN, augmented": train("birds", options.data, options.out / "cnn", *small),
        f"CNN, augmented, {options.draw} GAN images a class": train(
            "birds", options.data, options.out / "cnn-drawn", *small, *drawn
        ),
        **{
            f"CNN, augmented, {words} the epochs": train(
                "birds", options.data, options.out / f"cnn-{times}", *cnn, str(times * options.cnn_epochs)
            )
            for times, words in LONGER.items()
        },
        f"{options.backbone}, head": train(
            *("birds", options.data, options.out / "transferred", "--backbone", options.backbone),
            *("--part", "head", "--epochs", "15", "--learning-rate", "5e-3"),
        ),
    }
    transferred = every[f"{options.backbone}, head"]
    tables = {
        "accuracy": accuracies(every),
        f"maps of the {COOT}": explain_coots(transferred, options.data, options.out, options.explained),
    }
    save_curves(options.out / "pictures" / "curves.png", {name: one.metrics for name, one in list(every.items())[:2]})
    save_confusion(options.out / "pictures" / "confusion.png", transferred.metrics)
    write(options.out, {name: one.metrics["test"] for name, one in every.items()}, tables)


def _more(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cnn-epochs", type=int, default=15, help="of the CNN from nothing (default: %(default)s)")
    command.add_argument("--draw", type=int, default=45, help="GAN images of each class (default: %(default)s)")
    command.add_argument("--draw-steps", type=int, default=150, help="that each class's GAN learns (default: %(default)s)")
    command.add_argument("--explained", type=int, default=15, help="pictures of a coot (default: %(default)s)")
    command.add_argument("--cnn-size", type=int, default=64, help="of the CNN's input (default: %(default)s)")


def explain_coots(trained: Trained, data: Path, out: Path, explained: int) -> list[Row]:
    """Explain test pictures of a coot; draw some, and the mean maps; return how much lies in the image's centre."""
    label = trained.classes.index(COOT)
    read = read_folder(data, trained.preprocessing, read_recipe("birds")[0].ratio, trained.metrics["seed"])
    images = [trained.pixels(sample.path) for sample in read.splits["test"] if sample.label == label][:explained]
    targets, centre = [label] * len(images), centre_square(images[0].shape[0])
    examples: list[Any] = [[(Image.fromarray(image), COOT, "test picture")] for image in images[:4]]
    means, rows = [], []
    for name, method in METHODS.items():
        maps = trained.maps(images, targets, method)
        shares = [share(values, centre) for values in maps]
        mass = sum(one.mass for one in shares) / len(shares)
        worth = {way.__name__.lower(): trained.quality(images, targets, maps, way(STEPS)) for way in (Insertion, Deletion)}
        rows.append({"method": name, "share in the centre": mass, "times chance": mass / shares[0].area, **worth})
        mean = mean_map(maps)
        if mean is not None:
            means.append((heatmap(mean), name, f"mean of {len(maps)}"))
        for cells, image, values in zip(examples, images, maps, strict=False):
            cells.append((overlaid(image, values), name, f"why {COOT}"))
    save_sheet(out / "pictures" / "coots.webp", [cell for cells in examples for cell in cells], 160, 1 + len(METHODS))
    save_sheet(out / "pictures" / "means.webp", means, 160, len(METHODS))
    return rows


def centre_square(side: int) -> Mask:
    """Return the square in the middle of an image [side, side], CENTRE of its side wide."""
    margin = round(side * (1 - CENTRE) / 2)
    square = np.zeros((side, side), bool)
    square[margin : side - margin, margin : side - margin] = True
    return square


if __name__ == "__main__":
    sys.exit(carried_out(main))
