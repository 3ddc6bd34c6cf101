"""What a command line's numbers may be."""

import argparse
import math
from collections.abc import Callable


def whole(lowest: int) -> Callable[[str], int]:
    """Return what reads a whole number from `lowest`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: a whole number from {lowest}")
        return int(text)

    return read


def positive(text: str) -> float:
    """Read a number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: a number above 0")
    return number


def fraction(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: a number from 0 to 1")
    return number
