"""What is browsed: a page for each class, and an overview."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.gallery.located import Located, Scores, measure, summary, write_table
from torchserve_explain.gallery.pages import CLASSES, FAILED, MEANS, PICTURES, ClassGroup, Overview, group, stored, write_mean
from torchserve_explain.gallery.reasons import find_reasons, write_different
from torchserve_explain.gallery.truth import Truth
from torchserve_explain.records import Record
from torchserve_explain.serving.capabilities import first_sentence


def write_gallery(out: Path, records: Sequence[Record], overview: Overview, truth: Truth | None = None) -> Path:
    """Write pages and mean maps of records whose maps and pictures lie in `out`; return the overview's path."""
    for folder in (MEANS, CLASSES):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir()
    groups = group(records, overview.labels)
    maps, parts = _maps(records), tuple(groups[0].parts) if groups else ()
    measured = {} if truth is None else _measured(out, groups, truth)
    located = _located(out, groups, measured)
    reasons = {one.number: [reason for name in maps for reason in find_reasons(out, one, name, measured)] for one in groups}
    different = [(one, reason) for one in groups for reason in reasons[one.number] if reason.different]
    write_different(out / "different.csv", different)
    common: dict[str, Any] = {
        "overview": overview, "groups": groups, "maps": maps, "parts": parts, "labelled": "correct" in parts,
        "pictures": PICTURES, "means": {one.number: _write_means(out, one) for one in groups},
        "reasons": reasons, "different": different,
        "measured": measured, "located": located, "unmasked": {} if truth is None else truth.missing,
    }  # fmt: skip
    template = _template()
    for place, one in enumerate(groups):
        beside = {"before": groups[place - 1] if place else None, "after": dict(enumerate(groups)).get(place + 1)}
        page = template.render(common | beside, group=one, root="../")
        (out / CLASSES / f"{one.number}.html").write_text(page, encoding="utf-8")
    (out / "index.html").write_text(template.render(common, group=None, root=""), encoding="utf-8")
    return out / "index.html"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {"meaning": lambda method: first_sentence(METHODS[method])}
    environment.undefined = jinja2.StrictUndefined
    return environment.get_template("gallery.html")


def _measured(out: Path, groups: Iterable[ClassGroup], truth: Truth) -> dict[str, dict[str, Scores]]:
    """Score the maps of pictures that have a mask, where they explain the class that it belongs to, by the picture's path."""
    found = {}
    for shot in (shot for one in groups for shots in one.parts.values() for shot in shots):
        own = shot.facts["label"] in (None, shot.facts["target"])
        if own and (mask := truth.mask(shot.facts["path"])) is not None:
            maps = _maps(shot.records.values())
            found[shot.facts["path"]] = measure(dict(zip(maps, stored(out, maps.values()), strict=True)), mask)
    return found


def _located(
    out: Path, groups: Iterable[ClassGroup], measured: dict[str, dict[str, Scores]]
) -> dict[str | None, list[Located]]:
    """Write the mean scores, and return them by class."""
    (out / "localization.csv").unlink(missing_ok=True)
    if not measured:
        return {}
    shots = ((one.label, shot.facts["path"]) for one in groups for shots in one.parts.values() for shot in shots)
    rows = summary((label, measured[path]) for label, path in shots if path in measured)
    write_table(out / "localization.csv", rows)
    return {label: [row for row in rows if row.label == label] for label in {row.label for row in rows}}


def _maps(records: Iterable[Record]) -> dict[str, Record]:
    """Return a record of each map's name, to tell its method, parameters and sign."""
    return {record["map"]: record for record in records if record[FAILED] is None}


def _write_means(out: Path, one: ClassGroup) -> dict[tuple[str, str], str]:
    """Write a class's mean maps and their pictures; return the pictures' paths by part and map."""
    written: dict[tuple[str, str], str] = {}
    for part, shots in one.parts.items():
        records = [record for shot in shots for record in shot.records.values() if record[FAILED] is None]
        for name in _maps(records):
            named = [record for record in records if record["map"] == name]
            written[part, name] = write_mean(out, f"{one.number}-{part}-{name}", named)
    return written
