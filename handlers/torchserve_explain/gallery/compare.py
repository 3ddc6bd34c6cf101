"""Compares two versions of a classifier on the same pictures: accuracy, changed predictions, and how far the maps moved.

Writes a page and comparison.json. The exit status is 0 where every limit that is given is kept, 1 where one is not, and 2
where the two cannot be compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from torchserve_explain.archive import Archive
from torchserve_explain.archiver import load_archive
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.errors import ArchiveError, ExplainError
from torchserve_explain.gallery.comparison import (
    Compared,
    Movement,
    Threshold,
    Version,
    as_json,
    movement,
    on_one_frame,
    segments_of,
    thresholds,
)
from torchserve_explain.gallery.comparison_page import COMPARISON, write_page
from torchserve_explain.gallery.explain import RECORDS, Run, check_out, pair
from torchserve_explain.gallery.pages import FAILED, map_path, seen_path
from torchserve_explain.gallery.question import LABEL, NOTHING, PREDICTED, GallerySample, Question, ask, find_samples
from torchserve_explain.options import fraction, whole
from torchserve_explain.paths import ROOT, STORE
from torchserve_explain.records import Record, in_one_step
from torchserve_explain.serving.errors import shown
from torchserve_explain.serving.parameters import read_parameters

LIMITS = {  # each option's name, what it limits, and its meaning
    "--max-accuracy-drop": ("accuracy_drop", "by how much the accuracy may fall"),
    "--max-changed": ("changed", "the fraction of predictions that may change"),
    "--min-rank-correlation": ("rank_correlation", "Spearman's, of the old and the new map of the picture in the middle"),
    "--min-cosine": ("cosine", "of the old and the new map of the picture in the middle"),
    "--max-moved": ("moved_mass", "the fraction of a map's positive mass that may move to other segments, likewise"),
}


@dataclass(frozen=True)
class Sides:
    """What is asked of the old and the new version, and the folder that holds the folders they explain into."""

    asked: tuple[Question, Question]
    out: Path

    @property
    def folders(self) -> tuple[Path, Path]:
        """Where the maps of the old and the new version lie."""
        return self.out / "old", self.out / "new"


def explained(sides: Sides, data: Path, samples: Sequence[GallerySample], batch: int) -> tuple[list[Compared], dict[str, str]]:
    """Explain the pictures by both versions; return what can be compared, and why others are skipped.

    The new version explains the class that the old one explains, whatever it predicts itself.
    """
    first, second = (Run(asked, data, folder) for asked, folder in zip(sides.asked, sides.folders, strict=True))
    first.explain(samples, batch)
    before = _by_picture(first.found(samples))
    again = [replace(sample, label=before[sample.path][0]["target"]) for sample in samples if sample.path in before]
    second.explain(again, batch)
    after = _by_picture(second.found(again))
    labels = {sample.path: sample.label for sample in samples}
    compared = [_compared(sides, labels[path], before[path], after[path]) for path in before if path in after]
    return compared, first.skipped | second.skipped


def _by_picture(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["path"], []).append(record)
    return found


def _compared(sides: Sides, label: str | None, before: Sequence[Record], after: Sequence[Record]) -> Compared:
    old, new = before[0], after[0]
    later = {record["map"]: record for record in after}
    versions = [Version(record["predicted"], record["probability"]) for record in (old, new)]
    maps = {record["map"]: _movement(sides, record, later[record["map"]]) for record in before}
    return Compared(old["path"], label, old["target"], versions[0], versions[1], maps)


def _movement(sides: Sides, before: Record, after: Record) -> Movement | None:
    if before[FAILED] is not None or after[FAILED] is not None:
        return None
    records = tuple(zip(sides.folders, (before, after), strict=True))
    maps = [np.load(map_path(folder, record), allow_pickle=False) for folder, record in records]
    old, new, crop = on_one_frame(maps[0], before["crop"], maps[1], after["crop"])
    with Image.open(seen_path(*records[0])) as seen:
        segments = segments_of(seen, before["crop"], crop, (old.shape[1], old.shape[0]))
    return movement(old, new, segments)


def questions(old: Archive, new: Archive, options: argparse.Namespace) -> tuple[Question, Question]:
    """Return what is asked of both: each archive's own defaults lie beneath; raises ArchiveError where the two do not fit."""
    if missing := [name for name in old.labels if name not in new.labels]:
        raise ArchiveError(f"the new archive has no class {shown(missing[0])}, which the old one has; allowed: further classes")
    methods = options.methods or ",".join(read_parameters(new.settings.explanations.defaults).method)
    target = options.target
    # The class that the new archive is to explain is recorded with each picture.
    given = dict(options.set)
    first, second = ask(old, methods, target, given, NOTHING), ask(new, methods, LABEL, given, NOTHING)
    if first.methods.keys() != second.methods.keys():
        maps = " and ".join(", ".join(question.methods) for question in (first, second))
        raise ArchiveError(f"the archives are explained by different maps, {maps}; allowed: --methods or --set layer=NAME")
    return first, second


def _load(named: str, store: Path) -> Archive:
    """Load an archive by its path, or by its name in the store."""
    path = Path(named)
    if path.exists():
        keep_freed_memory()
        return Archive.load(path, "cuda" if torch.cuda.is_available() else "cpu")
    return load_archive(named, store)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is compared, how, and what is allowed to a command line."""
    for name in ("old", "new"):
        command.add_argument(name, metavar=name.upper(), help=f"the {name} archive: a path, or a name in the store")
    command.add_argument("--data", type=Path, required=True, help="pictures in a subfolder for each label, or without any")
    command.add_argument("--methods", help="names, or all (default: what the new archive explains by)")
    command.add_argument(
        "--target", choices=(PREDICTED, LABEL), default=PREDICTED, help="the explained class: what OLD predicts, or the label"
    )
    command.add_argument("--set", type=pair, action="append", default=[], metavar="NAME=VALUE", help="a method's parameter")
    command.add_argument("--out", type=Path, default=ROOT / "run" / "compared", help="where everything goes (run/compared)")
    command.add_argument("--batch", type=whole(1), default=8, help="pictures explained together (default: %(default)s)")
    command.add_argument("--store", type=Path, default=STORE, help="where archives are (default: model_store)")
    for option, (key, meaning) in LIMITS.items():
        command.add_argument(option, type=fraction, dest=key, metavar="FRACTION", help=meaning)


def main(options: argparse.Namespace) -> int:
    """Compare the archives that the command line names, write the page, and say which limits are kept."""
    try:
        check_out(options.out, options.data, Path("old", RECORDS))
        old, new = (_load(named, options.store) for named in (options.old, options.new))
        asked = questions(old, new, options)
        samples = find_samples(options.data, new.labels if options.target == PREDICTED else old.labels)
        limits = {key: getattr(options, key) for key, _ in LIMITS.values()}
        if samples[0].label is None and (options.target == LABEL or limits["accuracy_drop"] is not None):
            raise ArchiveError(f"the pictures of {options.data} have no labels, which --target label and accuracies need")
        sides = Sides(asked, options.out)
        pictures, skipped = explained(sides, options.data, samples, options.batch)
        if not pictures:
            raise ArchiveError(f"no picture of {options.data} can be compared: {next(iter(skipped.values()), 'all failed')}")
    except (ExplainError, ValueError, OSError) as reason:
        print(f"compare: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    found = thresholds(pictures, list(sides.asked[0].methods), limits)
    _write(sides, pictures, found, skipped, options)
    return 0 if all(one.met for one in found) else 1


def _write(
    sides: Sides, pictures: Sequence[Compared], found: Sequence[Threshold], skipped: dict[str, str], options: argparse.Namespace
) -> None:
    """Write the page and its numbers, and say what was measured."""
    for path, why in skipped.items():
        print(f"skipped {path}: {why}")
    named = zip((options.old, options.new), (question.archive for question in sides.asked), strict=True)
    archives = [{"archive": name, "version": archive.version, "digest": archive.digest} for name, archive in named]
    results = {"old": archives[0], "new": archives[1]} | as_json(pictures, found) | {"skipped": skipped}
    with in_one_step(options.out / COMPARISON) as unfinished:
        unfinished.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for one in found:
        kept = "kept" if one.met else "NOT KEPT"
        print(f"{one.name}: {one.measured:.4f}, {'at least' if one.least else 'at most'} {one.limit:g}: {kept}")
    print(f"{len(pictures)} pictures compared: {write_page(options.out, archives, pictures, found, skipped)}")
