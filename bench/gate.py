"""The gate: ratios of a run against those of an earlier one, or against the least allowed; seconds are never compared."""

from collections.abc import Callable, Sequence
from typing import Any

Line = dict[str, Any]
NOISE = 0.8  # of a ratio: how far it may fall before it is called fallen


def confirmed(found: Sequence[Line], before: Sequence[Line], again: Callable[[str, int, str], Sequence[Line]]) -> list[str]:
    """Return a line for each peer whose ratio to the engine fell twice.

    A contest (network, batch, work) in which one fell is measured `again` before it is told.
    """
    told = fallen(found, before)
    contests = dict.fromkeys(key[:3] for key in told)
    twice = fallen([line for contest in contests for line in again(*contest)], before)
    return [f"{told[key]}; again {text}" for key, text in twice.items() if key in told]


def fallen(found: Sequence[Line], before: Sequence[Line]) -> dict[tuple[str, int, str, str], str]:
    """Return the peers whose ratio is below its least, or was known and is no longer measured, each in words."""
    known = {_key(line): line for line in before if line.get("ratio") or line.get("least")}
    pairs = [(line, known[_key(line)]) for line in found if _key(line) in known]
    return {_key(line): _told(line, earlier) for line, earlier in pairs if (line.get("ratio") or 0) < least(earlier)}


def least(line: Line) -> float:
    """Return the least ratio that a line allows: what it says, or a fifth below what was measured."""
    return float(line.get("least") or NOISE * line["ratio"])


def _told(line: Line, earlier: Line) -> str:
    ratio = f"{line['ratio']:.2f}x" if line.get("ratio") else line["refusal"]
    known = f"was {earlier['ratio']:.2f}x" if earlier.get("ratio") else f"at least {earlier['least']:.2f}x is asked for"
    return f"{' / '.join(map(str, _key(line)))}: {ratio}, {known}"


def _key(line: Line) -> tuple[str, int, str, str]:
    return line["network"], line["batch"], line["work"], line["contestant"]
