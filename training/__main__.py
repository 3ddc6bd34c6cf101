"""Trains a classifier from a folder of images: `python -m training RECIPE --data FOLDER --out classifiers/NAME`.

`torchserve-explain explain NAME --data FOLDER` then explains every picture of a folder.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.errors import TrainingError
from torchserve_explain.gallery.truth import add_truth_arguments
from torchserve_explain.options import positive, whole
from torchserve_explain.paths import ROOT
from torchserve_explain.records import progress
from training.experiment import Experiment
from training.features import Place
from training.fit import OPTIMIZERS
from training.gan import Drawing
from training.networks import PRETRAINED, start_of
from training.recipe import Part, Recipe, read_recipe, recipe_names
from training.run import run

RUN = ROOT / "run"  # where what can be computed again is kept
OVERRIDES = ("part", "epochs", "batch", "learning_rate", "optimizer", "size", "views")  # of a recipe, by the command line


def add_recipe(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Add a recipe's command; it is carried out by `train`."""
    recipe, about = read_recipe(name)
    summary = about.strip().splitlines()[0]
    command = commands.add_parser(name, help=summary, description=about)
    command.add_argument("--data", type=Path, required=True, help="one folder of images for each class, or train/, val/, test/")
    command.add_argument("--out", type=Path, required=True, help="classifiers/NAME")
    add_truth_arguments(command)
    command.add_argument("--backbone", choices=recipe.allowed, default=recipe.backbones[0], help="default: %(default)s")
    command.add_argument("--weights", default=PRETRAINED, help=f"{PRETRAINED}, random, or a state dict (default: %(default)s)")
    command.add_argument("--size", type=whole(1), default=recipe.size, help="of the model's input (default: %(default)s)")
    if recipe.part is not Part.DIRECTION:
        parts = [str(part) for part in Part if part is not Part.DIRECTION]
        command.add_argument("--part", choices=parts, default=str(recipe.part), help="what learns (default: %(default)s)")
        command.add_argument("--epochs", type=whole(1), default=recipe.epochs, help="at most (default: %(default)s)")
        command.add_argument("--batch", type=whole(1), default=recipe.batch, help="default: %(default)s")
        command.add_argument("--learning-rate", type=positive, default=recipe.learning_rate, help="default: %(default)s")
        command.add_argument("--optimizer", choices=OPTIMIZERS, default=recipe.optimizer, help="default: %(default)s")
    if recipe.augmentation is not None:
        meaning = "augmented views of an image that frozen features are kept of; 0: new ones each epoch (default: %(default)s)"
        command.add_argument("--views", type=whole(0), default=recipe.views, help=meaning)
        command.add_argument("--unaugmented", action="store_true", help="train on the images as they are")
    command.add_argument("--seed", type=whole(0), default=0, help="of splits, weights and order (default: %(default)s)")
    command.add_argument(
        "--workers", type=whole(0), default=min(4, (os.cpu_count() or 1) - 1), help="processes that read images"
    )
    if recipe.draws:
        command.add_argument(
            "--draw", type=whole(0), default=0, metavar="N", help="train again with a GAN's N images a class, and compare"
        )
        command.add_argument("--draw-steps", type=whole(1), default=20_000, help="of each GAN (default: %(default)s)")
    command.set_defaults(carry_out=train, recipe=recipe, name=name)


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line changes of a recipe."""
    changed = {name: getattr(options, name) for name in OVERRIDES if name in options}
    if "part" in changed:
        changed["part"] = Part(changed["part"])
    if getattr(options, "unaugmented", False):
        changed["augmentation"] = None
    return changed


def train(options: argparse.Namespace) -> int:
    """Train by a recipe; the same command goes on where it was stopped."""
    keep_freed_memory()
    recipe: Recipe = replace(options.recipe, **changes(options))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress() as shown:
        place = Place(device, RUN / "features", options.workers, shown)
        drawing = None
        if recipe.draws and options.draw:
            drawing = Drawing(options.draw, options.draw_steps, RUN / "drawn", device, progress=shown)
        weights = start_of(options.backbone, options.weights)
        asked = (options.name, recipe, options.backbone, weights, options.data, options.out, options.seed)
        metrics = run(Experiment(*asked, place, RUN / "training", drawing, options.masks, options.boxes))
    console = Console()
    for path, why in metrics["skipped"].items():
        console.print(f"left out: {path}: {why}", markup=False)
    console.print(
        f"test accuracy {metrics['test']['accuracy']:.3f}, {metrics['seconds']:.0f} s; {options.out}/report.html tells more; "
        f"./archive.sh {options.out.name} archives it, make serve NAME={options.out.name} serves it",
        markup=False,
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="RECIPE")
    for name in recipe_names():
        add_recipe(commands, name)
    options = parser.parse_args(arguments)
    try:
        return int(options.carry_out(options))
    except TrainingError as reason:
        print(f"training: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
