"""Serves archives with KServe's model server: its protocols, and the contract's own routes, in one process.

Needs the extra [kserve].
"""

import argparse
import logging
import sys
from pathlib import Path

from torchserve_explain.errors import ExplainError, ServerError
from torchserve_explain.options import whole
from torchserve_explain.servers.host import DEVICE, Host, named_archives


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is served, and where, to a command line."""
    command.add_argument("archives", nargs="+", metavar="ARCHIVE", help="a .mar or the folder of an unpacked one; or NAME=ONE")
    command.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 in a container")
    command.add_argument("--port", type=whole(1), default=8080, help="the port of HTTP")
    command.add_argument("--device", default=DEVICE, help="what the models run on, such as cuda:0 or cpu")


def main(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C; the port is opened once every model is warm."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        serve(named_archives(options.archives), options.host, options.port, options.device)
    except ExplainError as reason:
        print(f"kserve: {reason}", file=sys.stderr)
        return 1
    return 0


def serve(archives: dict[str, Path], host: str, port: int, device: str) -> None:
    """Serve archives by their names until a signal stops it; raises ArchiveError, or ServerError without KServe."""
    try:
        from torchserve_explain.servers.kserve_model import Explained, KServeServer
    except ImportError as error:
        raise ServerError(f"KServe's package is missing ({error.name}); install torchserve-explain[kserve]") from None
    KServeServer(host, port).start([Explained(name, Host.load(path, name, device)) for name, path in archives.items()])
