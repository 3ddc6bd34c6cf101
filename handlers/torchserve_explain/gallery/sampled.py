"""Builds the gallery of what `explain --engine ray` has written, or of a sample of it."""

import argparse
import sys
from pathlib import Path

from torchserve_explain.errors import ArchiveError
from torchserve_explain.options import whole


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is shown, and where the pages go, to a command line."""
    command.add_argument("maps", help="where explain --engine ray --overlays has written to: a folder, or s3://BUCKET/PREFIX")
    command.add_argument("--out", type=Path, required=True, help="where the pages go")
    command.add_argument("--sample", type=whole(1), help="how many pictures are shown, drawn evenly (default: all)")


def main(options: argparse.Namespace) -> int:
    """Build the gallery that the command line names, and say where it is."""
    try:
        from torchserve_explain.bulk.pages import build
    except ImportError as error:
        print(f"gallery: Ray Data's package is missing ({error.name}); install torchserve-explain[ray]", file=sys.stderr)
        return 1
    try:
        print(build(options.maps, options.out, options.sample))
    except (ArchiveError, ValueError, OSError) as reason:
        print(f"gallery: {reason}", file=sys.stderr)
        return 1
    return 0
