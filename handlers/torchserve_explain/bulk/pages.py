"""A lake's maps laid out as the local engine lays them, records and pictures, with the pages that show them."""

import heapq
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import compute

from torchserve_explain.bulk.lake import LARGE, SCHEMA, Lake, LakePlace
from torchserve_explain.errors import ArchiveError
from torchserve_explain.gallery.explain import RECORDS, check_out
from torchserve_explain.gallery.pages import FAILED, Overview, map_path, overlay_path, seen_path
from torchserve_explain.gallery.site import write_gallery
from torchserve_explain.records import Record, add_record


def build(maps: str, out: Path, sample: int | None) -> Path:
    """Write the gallery of a lake's pictures, or of so many of them; return its first page. Raises ArchiveError."""
    place = LakePlace(maps)
    lake = Lake(place)
    about = lake.about()
    check_out(out, Path(place.path()) if place.local else Path(maps), RECORDS)
    chosen = _drawn(lake, sample)
    skipped = {row["path"]: row[FAILED] for row in _small(lake, chosen) if row["predicted"] is None}
    records = list(_records(lake, out, chosen))
    overview = Overview(about["classifier"], about["labels"], about["data"], about["target"], about["versus"], skipped)
    return write_gallery(out, records, overview)


def _drawn(lake: Lake, sample: int | None) -> Any:
    """Return a condition that a sample's rows fulfil; digests of pictures are as good as drawn by lot. None: all do."""
    if sample is None:
        return None
    pictures = {(row["digest"] or "", row["path"]) for row in lake.rows(["digest", "path"])}
    return compute.field("path").isin([path for _, path in heapq.nsmallest(sample, pictures)])


def _small(lake: Lake, condition: Any) -> Iterator[Record]:
    return lake.rows([name for name in SCHEMA.names if name not in LARGE], condition)


def _records(lake: Lake, out: Path, condition: Any) -> Iterator[Record]:
    """Write the pictures of maps, and yield their records as the local engine's."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RECORDS).write_text("")
    for row in lake.rows(SCHEMA.names, condition):
        if row["predicted"] is None:
            continue
        record = {name: row[name] for name in SCHEMA.names if name not in LARGE} | {"path": _inside(row["path"])}
        if row[FAILED] is None:
            record["parameters"] = json.loads(row["parameters"])
            _write(out, record, row)
        add_record(out / RECORDS, record)
        yield record


def _write(out: Path, record: Record, row: Mapping[str, Any]) -> None:
    if row["overlay"] is None:
        raise ArchiveError("the maps were made without pictures; allowed: explain --engine ray --overlays, into a new place")
    values = np.frombuffer(row["values"], row["dtype"]).reshape(row["shape"])
    path = map_path(out, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values, allow_pickle=False)
    overlay_path(out, record).write_bytes(row["overlay"])
    seen_path(out, record).write_bytes(row["seen"])


def _inside(path: str) -> str:
    """Return a path that stays in the folder that it is put into; raises ArchiveError."""
    parts = [part for part in path.split("/") if part]
    if not parts or {".", ".."} & set(parts):
        raise ArchiveError(f"{path!r} is no name for a page; allowed: paths without . and ..")
    return "/".join(parts)
