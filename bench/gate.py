"""The gate: ratios of a run against those of an earlier one; seconds are never compared."""

from collections.abc import Sequence
from typing import Any

NOISE = 0.8  # of a ratio: how far it may fall before it is called fallen


def fallen(found: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each peer whose ratio to the engine fell below its earlier one by more than noise explains."""
    known = {_key(line): line["ratio"] for line in before if line.get("ratio")}
    return [
        f"{' / '.join(map(str, _key(line)))}: {line['ratio']:.2f}x, was {known[_key(line)]:.2f}x"
        for line in found
        if line.get("ratio") and _key(line) in known and line["ratio"] < NOISE * known[_key(line)]
    ]


def _key(line: dict[str, Any]) -> tuple[str, int, str, str]:
    return line["network"], line["batch"], line["work"], line["contestant"]
