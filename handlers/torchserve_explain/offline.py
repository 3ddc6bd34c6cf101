"""What goes over many pictures without a server: an archive loaded, names of pictures, a bar, records line by line."""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torchserve_explain.archiver import CONFIG, Refused
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.loading import load_classifier
from torchserve_explain.paths import ROOT
from torchserve_explain.photo import photo_path
from torchserve_explain.servers.torchserve import ensure_archive
from torchserve_explain.serving.images import FORMATS, Picture, read_picture
from torchserve_explain.serving.settings import Preprocessing, Settings, read_settings

STORE = ROOT / "model_store"
PACKAGED = ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png")  # photos of scikit-image
SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
MANIFEST = "MAR-INF/MANIFEST.json"  # holds the time of its making

Record = dict[str, Any]


@dataclass(frozen=True)
class Archive:
    """An archive as a worker has it; classes without labels are called by their indices, `digest` tells its content."""

    classifier: Classifier
    labels: list[str]
    settings: Settings
    digest: str

    def classes(self, label: str | None) -> list[int]:
        """Return the classes that are called so: several may share a label."""
        return [index for index, name in enumerate(self.labels) if name == label]


def load_archive(name: str, store: Path = STORE, scale: int = 1) -> Archive:
    """Load an archive as a worker does, built if missing or stale, for inputs `scale` times as high and wide as served.

    Raises Refused where there is none, ValueError where the model cannot take such inputs.
    """
    ensure_archive(name, store)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, _opened(store / f"{name}.mar") as archive:
        archive.extractall(folder)
        members = sorted((member.filename, member.CRC) for member in archive.infolist() if member.filename != MANIFEST)
        settings = read_settings(yaml.safe_load(Path(folder, CONFIG).read_text(encoding="utf-8")))
        height, width = settings.preprocessing.size
        larger = settings.preprocessing.model_copy(update={"crop": (scale * height, scale * width)})
        device = "cuda" if torch.cuda.is_available() else "cpu"
        classifier, labels = load_classifier(Path(folder), settings.model_copy(update={"preprocessing": larger}), device)
    labels = labels or [str(index) for index in range(classifier.classes)]
    return Archive(classifier, labels, settings, hashlib.sha256(repr(members).encode()).hexdigest())


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise Refused(f"{path} is no archive: {error}") from None


def pictures(folder: Path | None, preprocessing: Preprocessing) -> Iterator[tuple[str, Picture]]:
    """Yield the photos of a folder by name, or those that scikit-image ships."""
    paths = [photo_path().with_name(name) for name in PACKAGED]
    if folder is not None:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for path in paths:
        yield path.stem, read_picture(path.read_bytes(), preprocessing, 10**8)


def progress() -> Progress:
    """Return a bar that tells what is at work, how far it is, and for how long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns)


def read_records(path: Path) -> list[Record]:
    """Read a file of one JSON object a line; a last line that was never finished is none, and is cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def add_record(path: Path, record: Record) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace a file of records in one step."""
    with in_one_step(path) as unfinished:
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Give another path to write to, which becomes `path` once it is whole, whoever else writes that meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    yield unfinished
    unfinished.replace(path)


def readable(path: Path | str) -> str:
    """Return a path as text that can be written, its bytes escaped where they are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def check_apart(data: Path, out: Path) -> None:
    """Raise Refused where what is written would lie among what is read."""
    if out.resolve().is_relative_to(data.resolve()):
        raise Refused(f"{out} lies inside {data}, and would be read as a part of it; allowed: a folder elsewhere")
