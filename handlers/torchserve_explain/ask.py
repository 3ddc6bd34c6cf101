"""Asks a server what a photo is, and why; prints the numbers, and saves or shows the picture."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageShow

from torchserve_explain.client import Client, ExplainedImage, ExplainedMap
from torchserve_explain.errors import ExplainError
from torchserve_explain.serving.pictures import Cell, Scale, contact_sheet, with_scale
from torchserve_explain.terminal import half_blocks, printable

URL = "http://127.0.0.1:8080"
KEY = "TORCHSERVE_EXPLAIN_KEY"  # of the environment: other users of a machine see a command line


def sentence(one: ExplainedMap) -> str:
    """Say an explanation in one line: method, layer where it has one, target, numbers."""
    layer = f" at {one.parameters['layer']}" if "layer" in one.parameters else ""
    numbers = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in one.numbers.items())
    return printable(f"{one.method}{layer} of {one.question}: {', '.join(numbers)}")


def drawn(found: ExplainedImage) -> Image.Image:
    """Return the overlay with its scale, or a labelled contact sheet of several."""
    if len(found.explanations) > 1:
        return contact_sheet([Cell(one.overlay, one.method, one.question, _scale(one)) for one in found.explanations])
    (one,) = found.explanations
    return with_scale(one.overlay, _scale(one))


def _scale(one: ExplainedMap) -> Scale:
    return Scale(one.heatmap.scale.colormap, one.heatmap.scale.highest)


def tell(found: ExplainedImage, draw: bool) -> None:
    """Print each map's numbers, and the map below them where it is to be drawn."""
    size = shutil.get_terminal_size()
    for one in found.explanations:
        print(sentence(one))
        if draw:
            print(half_blocks(one.overlay, size.columns, max(1, size.lines - 2)))


def open_picture(picture: Image.Image) -> None:
    """Open a picture with the system's viewer; raises ExplainError where there is none."""
    if not ImageShow.show(picture, "why"):
        raise ExplainError("no program shows pictures here; --out FILE saves it")


def field(text: str) -> tuple[str, str]:
    """Read a parameter."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: NAME=VALUE, such as baseline=blur")
    return name, value


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the question to a command line."""
    command.add_argument("photo", type=Path, metavar="PHOTO", help="an image's file")
    command.add_argument("--url", default=URL, help=f"the server (default: {URL}); its key, if any, is in ${KEY}")
    command.add_argument("--model", default="imagenet", help="the model as it is registered (default: imagenet)")
    command.add_argument("--method", help="a method, a comma list, or all (default: the archive's)")
    command.add_argument("--target", help="a class index, a label, or a comma list (default: the predicted class)")
    command.add_argument("-F", "--field", type=field, action="append", default=[], metavar="NAME=VALUE",
                         help="any other parameter of docs/asking.md; may be repeated")  # fmt: skip
    command.add_argument("--out", type=Path, metavar="FILE", help="save the picture; several maps as a contact sheet")
    command.add_argument("--show", action="store_true", help="draw the maps in the terminal; elsewhere, open the picture")


def main(options: argparse.Namespace) -> int:
    """Ask, and tell the answers."""
    parameters = {"values": False, "method": options.method, "target": options.target} | dict(options.field)
    try:
        with Client(options.url, os.environ.get(KEY), model=options.model) as client:
            predictions = client.predict(options.photo).root.items()
            print(", ".join(printable(f"{label} {probability:.1%}") for label, probability in predictions))
            found = client.explain(options.photo, **parameters)
        if options.out is not None:
            drawn(found).save(options.out)
        terminal = sys.stdout.isatty()
        tell(found, options.show and terminal)
        if options.show and not terminal:
            open_picture(drawn(found))
    except (ExplainError, OSError, ValueError) as reason:
        print(f"ask: {printable(str(reason))}", file=sys.stderr)
        return 1
    return 0
