"""Explains every picture of a folder and writes maps, records, and a gallery with right and wrong predictions apart."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from torchserve_explain.archiver import load_archive
from torchserve_explain.attribution.computation import Outcome
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.methods import Attribution
from torchserve_explain.attribution.rows import Contrast
from torchserve_explain.bulk.loopback import stay_on_loopback
from torchserve_explain.errors import ArchiveError, AttributionError, ExplainError, NotFinite, RequestError
from torchserve_explain.gallery.pages import FAILED, QUALITY, Overview, map_path, overlay_path, seen_path
from torchserve_explain.gallery.planned import Due, Planned, explained, facts, plan
from torchserve_explain.gallery.question import LABEL, NOTHING, PREDICTED, GallerySample, Question, ask, digest_of, find_samples
from torchserve_explain.gallery.site import write_gallery
from torchserve_explain.gallery.truth import add_truth_arguments, read_truth
from torchserve_explain.options import whole
from torchserve_explain.paths import ROOT, STORE
from torchserve_explain.records import Record, add_record, check_apart, progress, read_records, readable, write_records
from torchserve_explain.serving.answers import Explanation
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.pictures import compact

RECORDS = "records.jsonl"


class Records:
    """What has been explained, a line for each picture and map; what is now asked otherwise is dropped."""

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self._path = path
        lines = read_records(path)
        kept = [line for line in lines if settings.get(line["map"], line["settings"]) == line["settings"]]
        if len(kept) < len(lines):
            write_records(path, kept)
        self._known = {(line["path"], line["map"]): line for line in kept}

    def find(self, sample: GallerySample, digest: str | None, name: str) -> Record | None:
        """Return the record of a map of the picture with this content and this label."""
        record = self._known.get((sample.path, name))
        same = record is not None and (record["digest"], record["label"]) == (digest, sample.label)
        return record if same else None

    def add(self, record: Record) -> None:
        """Keep a record."""
        self._known[record["path"], record["map"]] = record
        add_record(self._path, record)


class Run:
    """Explains pictures of the folder `data` into the folder `out`; `skipped` holds those that cannot be, and why."""

    def __init__(self, question: Question, data: Path, out: Path) -> None:
        self._question, self._archive, self._data, self._out = question, question.archive, data, out
        self._limits = self._archive.settings.explanations.limits
        self._engine = Engine(self._archive.classifier, self._limits.pack)
        out.mkdir(parents=True, exist_ok=True)
        (out / RECORDS).touch()
        self._records = Records(out / RECORDS, question.settings)
        self._digests: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def explain(self, samples: Sequence[GallerySample], batch: int) -> None:
        """Make the maps that are not there yet, `batch` pictures at a time; raises AttributionError, such as OutOfMemory."""
        with progress() as shown:
            bar = shown.add_task("explaining", total=len(samples))
            due = self._due(samples, lambda: shown.advance(bar))
            while some := list(islice(due, batch)):
                self._explain(some)
                shown.advance(bar, len(some))

    def found(self, samples: Sequence[GallerySample]) -> list[Record]:
        """Return the records of pictures as they now are, in order."""
        keys = ((sample, name) for sample in samples for name in self._question.methods)
        records = (self._records.find(sample, self._digests.get(sample.path), name) for sample, name in keys)
        return [record for record in records if record is not None]

    def _due(self, samples: Sequence[GallerySample], pass_by: Callable[[], None]) -> Iterator[Due]:
        for sample in samples:
            due = self._read(sample)
            if due is None:
                pass_by()
            else:
                yield due

    def _read(self, sample: GallerySample) -> Due | None:
        """Read a picture that lacks maps; None for one that is done or cannot be read."""
        if readable(sample.path) != sample.path:
            self.skipped[readable(sample.path)] = "its name is no UTF-8"
            return None
        try:
            data = (self._data / sample.path).read_bytes()
            digest = self._digests[sample.path] = digest_of(data)
            names = [name for name in self._question.methods if not self._has(sample, digest, name)]
            if not names:
                return None
            return Due(sample, digest, read_picture(data, self._archive.settings.preprocessing, self._limits.pixels), names)
        except (RequestError, OSError) as reason:
            self.skipped[sample.path] = str(reason)
            return None

    def _has(self, sample: GallerySample, digest: str, name: str) -> bool:
        record = self._records.find(sample, digest, name)
        return record is not None and (record[FAILED] is not None or map_path(self._out, record).exists())

    def _explain(self, some: Sequence[Due]) -> None:
        """Make the maps of some pictures together."""
        every = zip(some, self._engine.logits([due.picture.input for due in some]), strict=True)
        planned = [one for due, logits in every for one in self._plan(due, logits)]
        for one, outcome in zip(planned, self._engine.run([one.job for one in planned]), strict=True):
            self._keep(one, outcome)

    def _plan(self, due: Due, logits: Tensor) -> list[Planned]:
        try:
            return list(plan(self._question, due, logits))
        except NotFinite as reason:
            self.skipped[due.sample.path] = str(reason)
            return []

    def _keep(self, one: Planned, outcome: Outcome[Attribution]) -> None:
        """Write what came of a map, the record last; raises what is not the picture's own fault."""
        if isinstance(outcome, NotFinite):
            self._records.add(facts(self._question, one) | {FAILED: str(outcome)})
        elif isinstance(outcome, ExplainError):
            raise outcome
        else:
            record, explanation = explained(self._question, one, outcome)
            self._write(record, explanation)
            self._records.add(record)

    def _write(self, record: Record, explanation: Explanation) -> None:
        """Write a map, its overlay, and what the model saw."""
        path = map_path(self._out, record)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, compact(explanation.values), allow_pickle=False)
        explanation.drawn.overlay.save(overlay_path(self._out, record), quality=QUALITY)
        explanation.drawn.seen.convert("RGB").save(seen_path(self._out, record), quality=QUALITY)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is explained, and how, to a command line."""
    command.add_argument("name", help="the classifier: a folder of classifiers/, or an archive of the store")
    command.add_argument("--data", required=True, help="pictures in a subfolder for each label, or without any")
    command.add_argument("--methods", help="names, or all (default: what the archive explains by)")
    command.add_argument("--target", choices=(PREDICTED, LABEL), default=PREDICTED, help="the class that is explained")
    contrasts = (LABEL, *Contrast, NOTHING)
    command.add_argument("--versus", choices=contrasts, default=LABEL, help="what the class is compared with; the label: "
                         "only where the prediction is wrong (default: %(default)s)")  # fmt: skip
    command.add_argument("--set", type=pair, action="append", default=[], metavar="NAME=VALUE", help="a method's parameter")
    add_truth_arguments(command)
    command.add_argument("--out", help="where everything goes (default: run/explained/NAME)")
    command.add_argument("--batch", type=whole(1), default=8, help="pictures explained together (default: %(default)s)")
    command.add_argument("--store", type=Path, default=STORE, help="where the archive is (default: model_store)")
    command.add_argument("--engine", choices=("local", "ray"), default="local", help="what runs it; ray writes Parquet instead")
    ray = command.add_argument_group("--engine ray", "--data and --out may be s3://BUCKET/PREFIX, --data also Parquet")
    ray.add_argument("--actors", type=whole(1), help="processes that explain (default: one for each GPU, or else each core)")
    ray.add_argument("--overlays", action="store_true", help="keep the maps' pictures, too, which a gallery needs")


def main(options: argparse.Namespace) -> int:
    """Explain what the command line names where it says."""
    if options.engine == "local":
        return explain_here(options)
    if options.masks or options.boxes:
        print("explain: --masks and --boxes are of --engine local; allowed: with it", file=sys.stderr)
        return 1
    stay_on_loopback()
    try:
        from torchserve_explain.bulk.run import main as explain_on_ray
    except ImportError as error:
        print(f"explain: Ray Data is missing ({error.name}); install torchserve-explain[ray]", file=sys.stderr)
        return 1
    return explain_on_ray(options)


def explain_here(options: argparse.Namespace) -> int:
    """Explain the folder that the command line names, write the gallery, and say what is in it."""
    data, out = Path(options.data), Path(options.out or ROOT / "run" / "explained" / options.name)
    try:
        _check_engine(options)
        check_out(out, data, RECORDS)
        archive = load_archive(options.name, options.store)
        samples = find_samples(data, archive.labels)
        if options.target == LABEL and samples[0].label is None:
            raise ArchiveError(f"--target label: the pictures of {data} have no labels; allowed: predicted")
        pixels = archive.settings.explanations.limits.pixels
        paths = [sample.path for sample in samples]
        truth = read_truth(options.masks, options.boxes, data, paths, archive.settings.preprocessing, pixels)
        question = ask(archive, options.methods, options.target, dict(options.set), options.versus)
        run = Run(question, data, out)
        run.explain(samples, options.batch)
    except (ArchiveError, RequestError, AttributionError, ValueError, OSError) as reason:
        print(f"explain: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    for path, why in run.skipped.items():
        print(f"skipped {path}: {why}")
    asked_for = (data.resolve().name, options.target, options.versus)
    overview = Overview(options.name, archive.labels, *asked_for, run.skipped)
    print(f"{len(samples) - len(run.skipped)} pictures explained: {write_gallery(out, run.found(samples), overview, truth)}")
    return 0


def _check_engine(options: argparse.Namespace) -> None:
    """Raise ArchiveError where something is asked for that only the other engine has."""
    asked = [name for name in ("actors", "overlays") if getattr(options, name)]
    if asked or "://" in options.data + (options.out or ""):
        raise ArchiveError(f"{f'--{asked[0]}' if asked else 's3://'} is of --engine ray; allowed: with it")


def check_out(out: Path, data: Path, written: str | Path) -> None:
    """Raise ArchiveError where pages would be written over what is not theirs; `written` is a file that tells theirs."""
    check_apart(data, out)  # else the next run takes maps for pictures
    if out.is_dir() and any(out.iterdir()) and not (out / written).exists():
        raise ArchiveError(f"--out: {out} holds something else; allowed: a new folder, or one that was written by this command")


def pair(text: str) -> tuple[str, str]:
    """Read NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: NAME=VALUE, such as max_error=0.01")
    return name, value
