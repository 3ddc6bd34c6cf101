"""What an experiment writes: figures as JSON and Markdown, and pictures small enough to be shown in a page."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from experiments.trained import NotTrained
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.errors import TrainingError
from torchserve_explain.paths import ROOT
from torchserve_explain.serving.pictures import Cell, Map, Scale, contact_sheet, draw_heatmap, draw_overlay

OPACITY = 0.6
CLIP = 99.5  # percentile of a map that gets full colour
QUALITY = 75  # of JPEG and WebP


def arguments(name: str, about: str | None, more: Callable[[argparse.ArgumentParser], object] | None = None) -> Any:
    """Read an experiment's command line: the data's folder, and where the results go."""
    command = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=about)
    command.add_argument("--data", type=Path, required=True, help="the folder of images; docs/experiments tells which")
    out = ROOT / "run" / "experiments" / name
    command.add_argument("--out", type=Path, default=out, help=f"where the results go (default: run/experiments/{name})")
    command.add_argument("--backbone", default="lite0", help="default: %(default)s")
    if more is not None:
        more(command)
    return command.parse_args()


def carried_out(main: Callable[[], None]) -> int:
    """Carry out an experiment; return its exit status."""
    keep_freed_memory()
    try:
        main()
    except (NotTrained, TrainingError, OSError) as reason:
        print(f"experiments: {reason}", file=sys.stderr)
        return 1
    return 0


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as a Markdown table; the first row names the columns, numbers get three digits."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def write(out: Path, figures: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
    """Write figures.json and tables.md, and print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.json").write_text(json.dumps({**figures, **tables}, indent=1, ensure_ascii=False), encoding="utf-8")
    text = "\n".join(f"### {title}\n\n{table(rows)}" for title, rows in tables.items())
    (out / "tables.md").write_text(text, encoding="utf-8")
    Console().print(text, markup=False, soft_wrap=True)


def overlaid(pixels: NDArray[np.uint8], values: Map) -> Image.Image:
    """Return the positive part of a map laid over what it explains."""
    return draw_overlay(values, Scale.of(values, False, None, CLIP), Image.fromarray(pixels), OPACITY)


def heatmap(values: Map) -> Image.Image:
    """Return the positive part of a map alone."""
    return draw_heatmap(values, Scale.of(values, False, None, CLIP)).convert("RGB")


def save_sheet(path: Path, cells: Sequence[tuple[Image.Image, str, str]], side: int, columns: int) -> None:
    """Save pictures under their titles and subtitles, each `side` pixels wide, `columns` in a row."""
    single = [
        contact_sheet([Cell(picture.convert("RGB").resize((side, side)), title, subtitle)])
        for picture, title, subtitle in cells
    ]
    width, height = single[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(single) // columns) * height))
    for place, one in enumerate(single):
        sheet.paste(one, (place % columns * width, place // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=QUALITY)
