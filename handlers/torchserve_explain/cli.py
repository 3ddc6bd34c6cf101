"""The command torchserve-explain: build archives, serve them, drain, try and ask a server, explain folders, compare, replay."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from torchserve_explain import __version__

COMMANDS = {
    "archive": "archiver",
    "serve": "servers.torchserve",
    "kserve": "servers.kserve",
    "drain": "servers.drain",
    "demo": "demo",
    "ask": "ask",
    "explain": "gallery.explain",
    "gallery": "gallery.sampled",
    "compare": "gallery.compare",
    "replay": "replay",
}


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """Return the command line; a subcommand's module says what it takes, and carries it out.

    Where the subcommand is known only its module is imported, since those that serve take seconds for it.
    """
    command = argparse.ArgumentParser(prog="torchserve-explain", description=__doc__)
    command.add_argument("--version", action="version", version=__version__)
    commands = command.add_subparsers(required=True, metavar="COMMAND")
    for name in [chosen] if chosen in COMMANDS else COMMANDS:
        module = import_module(f"torchserve_explain.{COMMANDS[name]}")
        about = (module.__doc__ or "").strip()
        one = commands.add_parser(name, help=about.splitlines()[0], description=about)
        module.add_arguments(one)
        one.set_defaults(carry_out=module.main)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command; return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser(given[0] if given else None).parse_args(given)
    status: int = options.carry_out(options)
    return status
