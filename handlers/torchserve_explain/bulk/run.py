"""Explains a lake of pictures on Ray Data: some processes read and decode, actors explain, rows are written as Parquet."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import ray  # on loopback only with what bulk/loopback.py sets before
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources, TaskPoolStrategy

from torchserve_explain.archive import Archive
from torchserve_explain.archiver import ensure_archive
from torchserve_explain.bulk.lake import Lake, LakePlace
from torchserve_explain.bulk.sources import find, portions
from torchserve_explain.bulk.stages import Decoder, LakeExplainer, LakeQuestion, Writer
from torchserve_explain.errors import ArchiveError, AttributionError, RequestError, ServerError
from torchserve_explain.gallery.question import LABEL
from torchserve_explain.paths import ROOT
from torchserve_explain.records import Record, check_apart, progress

FORMAT = 1  # of what a lake holds
ROWS = 256  # of a file, about
ACTOR_CPUS, OTHER_CPUS = 0.75, 0.125  # what an actor counts for, and a task beside it: explaining is most of the work
AHEAD = 512_000_000  # bytes that may wait between the stages, for each actor


@dataclass(frozen=True)
class LakeWork:
    """What is due, and who does it."""

    archive: Path
    asked: LakeQuestion
    decoder: Decoder
    lake: Lake
    due: pa.Table
    batch: int
    actors: int | None


@dataclass
class LakeTally:
    """How many maps have been written, how many of them failed, and why one did."""

    rows: int = 0
    failed: int = 0
    example: str | None = None


def main(options: argparse.Namespace) -> int:
    """Explain what the command line names, and say what came of it."""
    out = LakePlace(options.out or str(ROOT / "run" / "explained" / options.name))
    tally = LakeTally()
    try:
        work = prepare(options, out)
        if work.due.num_rows:
            with cluster():
                explain(work, tally)
    except (ArchiveError, RequestError, AttributionError, ServerError, ValueError, OSError) as reason:
        print(f"explain: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    if tally.failed:
        print(f"{tally.failed} failed, such as: {tally.example}")
    print(f"{tally.rows - tally.failed} maps made: {out.shown}")
    return 0


def prepare(options: argparse.Namespace, out: LakePlace) -> LakeWork:
    """Find out what is due; raises ArchiveError, RequestError or Unsupported, naming what is allowed."""
    data = LakePlace(options.data)
    if data.local and out.local:
        check_apart(Path(data.path()), Path(out.path()))
    path = ensure_archive(options.name, options.store)
    archive = Archive.load(path, compiles=False)
    if archive.settings.preprocessing.code is not None:
        raise ArchiveError("the archive prepares pictures by preprocess.py; allowed: without --engine ray")
    asked = LakeQuestion(options.methods, options.target, options.versus, dict(options.set), options.overlays)
    question = asked.of(archive)
    source = find(data, archive.labels)
    if source.unlabelled is not None:
        if options.target == LABEL:
            raise ArchiveError(f"--target label: the pictures have no labels: {source.unlabelled}; allowed: predicted")
        print(f"the pictures have no labels: {source.unlabelled}")
    lake = Lake(out)
    folder = PurePosixPath(data.path()).name
    about = {"classifier": options.name, "archive": archive.digest, "data": folder, "target": options.target}
    about["versus"] = options.versus
    lake.write_about({"format": FORMAT} | about | {"labels": archive.labels})
    stamps = dict(zip(source.items["path"].to_pylist(), source.items["stamp"].to_pylist(), strict=True))
    due = _due(source.items, lake.keys(question.settings, stamps), list(question.methods))
    return LakeWork(path, asked, Decoder(data, archive.settings), lake, due, options.batch, options.actors)


def explain(work: LakeWork, tally: LakeTally) -> None:
    """Make what is due, with a bar; raises ServerError where Ray fails."""
    total = sum(map(len, work.due["maps"].to_pylist()))
    try:
        with progress() as shown:
            bar = shown.add_task("explaining", total=total)
            for written in _written(work):
                tally.rows += written["rows"]
                tally.failed += written["failed"]
                tally.example = tally.example or written["example"]
                shown.advance(bar, written["rows"])
    except ray.exceptions.RayError as error:
        raise ServerError(f"Ray failed: {str(error).strip().splitlines()[-1]}") from error
    if tally.rows != total:
        raise ServerError(f"{total} maps were due and {tally.rows} written; the same command makes what is missing")


@contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(**quiet, **({} if "RAY_ADDRESS" in os.environ else {"address": "local"}))
    try:
        yield
    finally:
        ray.shutdown()


def _written(work: LakeWork) -> Iterator[Record]:
    """Yield what each written batch of rows held."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1)
    actors = _actors(work.actors, gpus, cpus)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=AHEAD * actors)
    archive = ray.put(work.archive.read_bytes())
    explaining = {"compute": ActorPoolStrategy(size=actors), "num_cpus": ACTOR_CPUS, "num_gpus": 1 if gpus else 0}
    helping = {"compute": TaskPoolStrategy(size=max(1, actors // 2)), "num_cpus": OTHER_CPUS}
    decoding = {"num_cpus": 1} if gpus else helping  # a GPU is faster than many decoders, a core is not
    rows = ray.data.from_arrow(list(portions(work.due)))
    rows = rows.map_batches(work.decoder, batch_size=None, batch_format="pyarrow", **decoding)
    rows = rows.map_batches(
        LakeExplainer, fn_constructor_args=(archive, work.asked), batch_size=work.batch, batch_format="pyarrow", **explaining
    )
    rows = rows.map_batches(Writer(work.lake.place), batch_size=ROWS, batch_format="pyarrow", **helping)
    for written in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from written.to_pylist()


def _actors(asked: int | None, gpus: int, cpus: float) -> int:
    """Return how many actors explain: a GPU each, or else a core each; raises ServerError where there are not so many."""
    most = gpus or max(1, int(cpus))
    if asked is not None and asked > most:
        raise ServerError(f"--actors {asked}: Ray has {gpus} GPUs and {cpus:g} cores; allowed: at most {most}")
    return asked or most


def _due(items: pa.Table, known: set[tuple[str, str]], names: list[str]) -> pa.Table:
    """Return the items that lack maps, and which."""
    maps = [[name for name in names if (path, name) not in known] for path in items["path"].to_pylist()]
    due = items.append_column("maps", pa.array(maps, pa.list_(pa.string())))
    return due.filter(pa.array([bool(names) for names in maps]))
