"""Runs the study: explains every photo with every technique, measures, and writes table, CSV and montage."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from study.located import (
    draw_located,
    is_costly,
    located_markdown,
    located_means,
    located_photos,
    located_techniques,
    measure_located,
)
from study.measure import PACK, Photo, StudySettings, make_grids, measure_grid, measure_photo, read_photo
from study.tables import markdown, montage, write_csv
from study.techniques import Technique, techniques
from torchserve_explain.archive import Archive
from torchserve_explain.archiver import load_archive
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.errors import ArchiveError
from torchserve_explain.paths import ROOT
from torchserve_explain.photo import photo_path, pictures
from torchserve_explain.records import Record, add_record, progress, read_records, write_records
from torchserve_explain.serving.images import Picture, read_picture


class StudyRecords:
    """What has been measured so far, line by line in a file, so that a study that was stopped goes on where it was."""

    def __init__(self, path: Path, name: str, photos: list[Photo], settings: StudySettings) -> None:
        self._path = path
        question = {"classifier": name, "photos": [photo.name for photo in photos], "settings": asdict(settings)}
        lines = read_records(path)
        if not lines or lines[0] != json.loads(json.dumps(question)):  # another study
            lines = [question]
            write_records(path, lines)
        self.all: list[Record] = lines[1:]
        self._known = {(record["photo"], record["technique"]) for record in self.all}

    def has(self, photo: str, technique: str) -> bool:
        """Whether this has been measured."""
        return (photo, technique) in self._known

    def add(self, record: Record) -> None:
        """Keep a measurement."""
        self.all.append(record)
        self._known.add((record["photo"], record["technique"]))
        add_record(self._path, record)


def run(photos: list[Photo], engine: Engine, large: Engine | None, settings: StudySettings, records: StudyRecords) -> None:
    """Measure what has not been measured."""
    chosen = list(techniques(engine.classifier))
    every = max(1, len(photos) // max(1, settings.disturbed))
    disturbed = {photo.name for photo in photos[::every][: settings.disturbed]}
    grids = list(make_grids(photos, settings.grids)) if large is not None else []
    with progress() as shown:
        bar = shown.add_task("", total=len(chosen) * (len(photos) + len(grids)))

        def each(name: str) -> Iterator[Technique]:
            for technique in chosen:
                shown.update(bar, description=f"{name}: {technique.name}"[:60])
                if not records.has(name, technique.name):
                    yield technique
                shown.advance(bar)

        for name, image, target, cell in grids:
            assert large is not None
            for technique in each(name):
                records.add(measure_grid(large, technique, name, image, target, cell))
        for photo in photos:
            for technique in each(photo.name):
                records.add(measure_photo(engine, technique, photo, settings, photo.name in disturbed))


def locate(options: argparse.Namespace, archive: Archive, engine: Engine, console: Console) -> None:
    """Measure every technique on photos with boxes, the costly ones on the first; tell of all networks so far."""
    photos = list(located_photos(options.boxes, options.photos or options.boxes.parent, archive, engine))
    records = StudyRecords(
        options.out / f"located-{options.name}.jsonl", options.name, [photo for photo, _ in photos], StudySettings()
    )
    chosen = [(technique, is_costly(technique, engine.classifier)) for technique in located_techniques(engine.classifier)]
    with progress() as shown:
        for place, (photo, mask) in enumerate(shown.track(photos, description="photos")):
            for technique, costly in chosen:
                if not records.has(photo.name, technique.name) and (place < options.costly or not costly):
                    for record in measure_located(engine, technique, photo, mask):
                        if not records.has(photo.name, record["technique"]):
                            records.add(record)
    files = sorted(options.out.glob("located-*.jsonl"))
    found = {path.stem.removeprefix("located-"): located_means(read_records(path)[1:]) for path in files}
    (options.out / "located.md").write_text(located_markdown(found))
    draw_located(found, options.out / "located.png")
    console.print(located_markdown(found), markup=False)


def draw(engine: Engine, picture: Picture, path: Path) -> None:
    """Draw the montage of one photo."""
    photo = read_photo("", picture.input, engine)
    case = Case(engine.classifier, photo.input, photo.target, known_score=photo.score)
    chosen = list(techniques(engine.classifier))
    jobs = [Job(technique.method, case, technique.smoothing) for technique in chosen]
    maps = []
    for technique, job, finished in zip(chosen, jobs, engine.results(jobs), strict=True):
        maps.append((technique.name, finished.value.map.sum(0).float().cpu().numpy(), job.signed))
    montage(picture.seen, maps).save(path)


def main() -> int:
    """Run the study that the command line asks for."""
    command = argparse.ArgumentParser(prog="make study", description=__doc__)
    command.add_argument("name", nargs="?", default="imagenet", help="the classifier (default: %(default)s)")
    command.add_argument("--photos", type=Path, help="a folder of photos (default: those that scikit-image ships)")
    command.add_argument("--boxes", type=Path, help="a CSV of boxes around what photos show: where maps lie is measured alone")
    command.add_argument("--costly", type=int, default=10**6, help="of those, how many methods of many rows get (default: all)")
    command.add_argument("--montage", type=Path, default=photo_path(), help="the photo of the montage")
    command.add_argument("--out", type=Path, default=ROOT / "run" / "study", help="where the results go (default: run/study)")
    command.add_argument("--disturbed", type=int, help="how many photos max sensitivity is measured on")
    options = command.parse_args()
    settings = StudySettings() if options.disturbed is None else replace(StudySettings(), disturbed=options.disturbed)
    try:
        archive = load_archive(options.name)
    except ArchiveError as reason:
        print(f"study: {reason}", file=sys.stderr)
        return 1
    console = Console()
    engine, preprocessing = Engine(archive.classifier, PACK), archive.settings.preprocessing
    options.out.mkdir(parents=True, exist_ok=True)
    if options.boxes is not None:
        locate(options, archive, engine, console)
        return 0
    try:
        large: Engine | None = Engine(load_archive(options.name, scale=2).classifier, PACK)
    except ValueError as reason:
        console.print(f"no grid pointing game: {reason}")
        large = None
    draw(engine, read_picture(options.montage.read_bytes(), preprocessing, 10**8), options.out / "montage.png")
    photos = [read_photo(name, picture.input, engine) for name, picture in pictures(options.photos, preprocessing)]
    records = StudyRecords(options.out / "records.jsonl", options.name, photos, settings)
    run(photos, engine, large, settings, records)
    table = markdown(records.all)
    (options.out / "table.md").write_text(table)
    write_csv(options.out / "table.csv", records.all)
    console.print(table, markup=False)
    console.print(
        f"{len(photos)} photos; {settings}; torch {torch.__version__}, {torch.get_num_threads()} threads", markup=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
