"""What is written: the table as Markdown and CSV, and the montage of positive and blended maps."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from study.techniques import EIGHT
from torchserve_explain.records import Record
from torchserve_explain.serving.pictures import Cell, Map, Scale, contact_sheet, draw_heatmap, draw_overlay

# Column: key of a record, how a cell is written, which end is the better one.
COLUMNS = (
    ("max sensitivity", "max_sensitivity", "{:.3f}", "lower"),
    ("infidelity", "infidelity", "{:.2f}", "lower"),
    ("deletion", "deletion", "{:.3f}", "lower"),
    ("insertion", "insertion", "{:.3f}", "higher"),
    ("completeness error", "completeness_error", "{:.1%}", "lower"),
    ("localisation", "localisation", "{:.1%}", "higher"),
    ("ms", "milliseconds", "{:.0f}", ""),
    ("rows", "rows", "{:.0f}", ""),
)


def medians(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Return each technique's median of each measure over the photos, in the order of first appearance."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for _, key, _, _ in COLUMNS:
            value = record.get(key)
            if value is not None and not isnan(value):
                values[record["technique"]][key].append(value)
    return {name: {key: median(found) for key, found in measures.items()} for name, measures in values.items()}


def markdown(records: Iterable[Record]) -> str:
    """Return the table; the eight stand first and are marked."""
    eight = {technique.name for technique in EIGHT}
    head = ["technique", *(f"{title} ({better} is better)" if better else title for title, _, _, better in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, measures in medians(records).items():
        cells = [form.format(measures[key]) if key in measures else "-" for _, key, form, _ in COLUMNS]
        lines.append(f"| {name}{' *' if name in eight else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write one line for each photo and technique."""
    names = ["photo", "technique", *(key for _, key, _, _ in COLUMNS)]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _rounded(record.get(key)) for key in names} for record in records)


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def montage(seen: Image.Image, maps: Sequence[tuple[str, Map, bool]]) -> Image.Image:
    """Draw each technique's positive map and the map blended with the photo, side by side; maps: name, values, signed."""
    cells = []
    for name, values, signed in maps:
        positive = Scale.of(values, signed, "inferno", 99)
        blended = Scale.of(values, signed, None, 99)
        pair = np.concatenate(
            [
                np.asarray(draw_heatmap(values, positive).convert("RGB")),
                np.asarray(draw_overlay(values, blended, seen, 0.5)),
            ],
            1,
        )
        cells.append(Cell(Image.fromarray(pair), name, "positive part, and blended"))
    return contact_sheet(cells)
