"""Line charts as SVG, with axes and numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 40  # margins around the plotting area
STEPS = 5  # about so many numbers stand at an axis


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, and its points."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def chart(lines: Sequence[Line], x_title: str, y_title: str) -> str:
    """Draw lines into one chart; the y-axis begins at 0, the x-axis at the least x.

    The first line has the class `first`, the second `second`; the legend belongs to the caller.
    """
    left, right = min(min(line.xs) for line in lines), max(max(line.xs) for line in lines)
    top = max(max(line.ys) for line in lines) or 1.0
    across, up = ticks(left, right), ticks(0, top, beyond=True)
    if all(isinstance(value, int) for line in lines for value in line.xs):
        across = [value for value in across if value == int(value)]
    span = (right - left) or 1.0
    scale = up[-1]

    def x(value: float) -> float:
        return LEFT + (value - left) / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / scale * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)} over {escape(x_title)}">']
    for value in up:
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="up" x="{LEFT - 6}" y="{y(value) + 4:.1f}">{value:g}</text>')
    parts += [f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}">{value:g}</text>' for value in across]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x_title)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="12" y="{middle}" transform="rotate(-90 12 {middle})">{escape(y_title)}</text>')
    for name, line in zip(("first", "second"), lines, strict=False):
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.xs, line.ys, strict=True))
        parts.append(f'<polyline class="{name}" points="{points}"><title>{escape(line.name)}</title></polyline>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, beyond: bool = False) -> list[float]:
    """Return round numbers from `low` to `high`, about five; the last one reaches `high` where they go `beyond` it."""
    if high <= low:
        return [low]
    rough = (high - low) / STEPS
    power: float = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = ceil(low / step - 1e-9), ceil(high / step - 1e-9) if beyond else floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]
