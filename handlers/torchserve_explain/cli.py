"""The command torchserve-explain: build archives, serve them, drain a server, try it, explain a folder or a lake."""

import argparse
from collections.abc import Sequence

from torchserve_explain import __version__, archiver, demo
from torchserve_explain.gallery import explain, sampled
from torchserve_explain.servers import drain, kserve, torchserve


def parser() -> argparse.ArgumentParser:
    """Return the command line; a subcommand's module says what it takes, and carries it out."""
    command = argparse.ArgumentParser(prog="torchserve-explain", description=__doc__)
    command.add_argument("--version", action="version", version=__version__)
    commands = command.add_subparsers(required=True, metavar="COMMAND")
    modules = {"archive": archiver, "serve": torchserve, "kserve": kserve, "drain": drain, "demo": demo}
    modules |= {"explain": explain, "gallery": sampled}
    for name, module in modules.items():
        about = (module.__doc__ or "").strip()
        one = commands.add_parser(name, help=about.splitlines()[0], description=about)
        module.add_arguments(one)
        one.set_defaults(carry_out=module.main)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command; return its exit status."""
    options = parser().parse_args(arguments)
    status: int = options.carry_out(options)
    return status
