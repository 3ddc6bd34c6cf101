"""Trains classifiers, and explains what they say of a folder's pictures."""

import argparse
import sys

from training import explain


def main() -> int:
    """Run the subcommand that the command line names."""
    command = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    explain.add_parser(command.add_subparsers(required=True))
    options = command.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
