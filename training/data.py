"""A folder of images becomes three splits of samples; what cannot be read is listed and left out."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchserve_explain.errors import RequestError, TrainingError
from torchserve_explain.records import readable
from torchserve_explain.serving.images import as_input, read_picture
from torchserve_explain.serving.settings import Limits, Preprocessing

SPLITS = ("train", "val", "test")
ALIASES = {"valid": "val", "validation": "val"}
PIXELS = Limits().pixels  # what cannot be asked for cannot be trained on
LAYOUT = "one folder of images for each class, or train/, val/ and test/ with one for each class in each"


@dataclass(frozen=True)
class Sample:
    """An image that can be read: its file, its class, and the SHA-256 of its bytes."""

    path: Path
    label: int
    digest: str


@dataclass(frozen=True)
class Data:
    """Class names in the order of their indices, the samples of each split, and why files are left out."""

    classes: list[str]
    splits: dict[str, list[Sample]]
    skipped: dict[Path, str]

    def counts(self, split: str) -> list[int]:
        """Return how many images each class has in a split."""
        labels = [sample.label for sample in self.splits[split]]
        return [labels.count(label) for label in range(len(self.classes))]


def read_folder(
    folder: Path,
    preprocessing: Preprocessing,
    ratio: Sequence[float],
    seed: int,
    watch: Callable[[list[Path]], Iterable[Path]] = iter,
) -> Data:
    """Read a folder of images; splits that it does not have are divided off class by class, by `ratio` and `seed`.

    Every file is decoded once: what is no image, or has the bytes of another, is left out. `watch` sees each file
    go by. Raises TrainingError where a class is empty or alone, or has fewer images than there are splits.
    """
    tops = _splits(folder)
    classes = _classes(tops["train"])
    files = [(split, label, path) for split, top in tops.items() for label, path in _files(top, classes)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(lambda file: _examined(file[2], preprocessing), files)
        verdicts = [verdict for _, verdict in zip(watch([path for *_, path in files]), read, strict=True)]
    samples: dict[str, list[Sample]] = {split: [] for split in tops}
    skipped: dict[Path, str] = {}
    first: dict[str, Path] = {}
    for (split, label, path), (digest, fault) in zip(files, verdicts, strict=True):
        twin = first.setdefault(digest, path)
        if fault is not None or twin != path:
            skipped[path] = fault or f"the same bytes as {twin.relative_to(folder)}"
        else:
            samples[split].append(Sample(path, label, digest))
    data = Data(classes, _divided(samples, classes, ratio, seed), skipped)
    _check(data)
    return data


def _splits(folder: Path) -> dict[str, Path]:
    """Return the folder of each split that there is; the whole is `train` where there are none."""
    if not folder.is_dir():
        raise TrainingError(f"{folder} is no folder; allowed: {LAYOUT}")
    named: dict[str, Path] = {}
    for path in _folders(folder):
        split = ALIASES.get(path.name.casefold(), path.name.casefold())
        if split in SPLITS and split in named:
            raise TrainingError(f"{folder} holds both {named[split].name} and {path.name}; allowed: one folder for each split")
        named[split] = path
    if "train" not in named or not _folders(named["train"]):  # without folders in it, it is a class of that name
        return {"train": folder}
    return {split: named[split] for split in SPLITS if split in named}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(folder: Path) -> list[str]:
    """Return the classes' names, sorted."""
    names = [path.name for path in _folders(folder)]
    if len(names) < 2:
        found = f"the one class {names[0]}" if names else "no folder of images"
        raise TrainingError(f"{folder} holds {found}; allowed: two classes or more, {LAYOUT}")
    if broken := [name for name in names if readable(name) != name]:
        raise TrainingError(f"the class {readable(broken[0])} has a name that is no UTF-8; rename its folder")
    return names


def _files(folder: Path, classes: Sequence[str]) -> Iterable[tuple[int, Path]]:
    """Yield the class and path of every file of a split, in an order of its own."""
    if unknown := [path.name for path in _folders(folder) if path.name not in classes]:
        raise TrainingError(f"{folder} holds the class {unknown[0]}, which train/ does not; allowed: {', '.join(classes[:20])}")
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                yield label, path


def _examined(path: Path, preprocessing: Preprocessing) -> tuple[str, str | None]:
    """Return the digest of a file's bytes, and what is wrong with it as an image."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return str(path), f"it cannot be read: {error.strerror}"
    try:
        read_picture(content, preprocessing, PIXELS)
    except RequestError as error:
        return str(path), str(error)
    return hashlib.sha256(content).hexdigest(), None


def _divided(
    samples: Mapping[str, Sequence[Sample]], classes: Sequence[str], ratio: Sequence[float], seed: int
) -> dict[str, list[Sample]]:
    """Divide the missing splits off the training images, class by class, at least one image of each into each."""
    missing = [split for split in SPLITS[1:] if split not in samples]
    shares = dict(zip(SPLITS, ratio, strict=True))
    whole = shares["train"] + sum(shares[split] for split in missing)
    divided: dict[str, list[Sample]] = defaultdict(list, {split: list(samples[split]) for split in samples if split != "train"})
    for label in range(len(classes)):
        own = [sample for sample in samples["train"] if sample.label == label]
        order = np.random.default_rng([seed, label]).permutation(len(own)).tolist()
        for split in missing:
            count = max(1, round(len(own) * shares[split] / whole))
            divided[split] += [own[place] for place in order[:count]]
            order = order[count:]
        divided["train"] += [own[place] for place in sorted(order)]
    return {split: divided[split] for split in SPLITS}


def _check(data: Data) -> None:
    """Raise TrainingError where a class has too few images to be trained and evaluated."""
    counts = {split: data.counts(split) for split in SPLITS}
    for label, name in enumerate(data.classes):
        found = {split: counts[split][label] for split in SPLITS}
        if not sum(found.values()):
            raise TrainingError(f"the class {name} holds no image that can be read; allowed: {LAYOUT}")
        if not all(found.values()):
            listed = ", ".join(f"{count} to {split}" for split, count in found.items())
            raise TrainingError(
                f"the class {name} has too few images ({listed}); allowed: one or more to each of {', '.join(SPLITS)}"
            )


class Images(Dataset[tuple[Tensor, int]]):
    """Samples as the served classifier would see them, normalised: each is its `views` [views, C, H, W] and its label.

    Without augmentation the only view is the image itself. What a view shows is drawn from `seed`, the view's number
    and the file's bytes alone, whichever process draws it; a file is decoded once for all its views.
    """

    def __init__(
        self, samples: Sequence[Sample], preprocessing: Preprocessing, augmentation: nn.Module | None = None, seed: int = 0
    ) -> None:
        self.samples, self.preprocessing = samples, preprocessing
        self.augmentation, self.seed = augmentation, seed
        self.views: Sequence[int] = (0,)
        self.decoded: list[Image] = []  # those of all samples, or none

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        sample = self.samples[place]
        seen = self.decoded[place] if self.decoded else self._seen(sample)
        if self.augmentation is None:
            return as_input(seen, self.preprocessing)[None], sample.label
        drawn = (_drawn(self.augmentation, seen, self._seed(sample, view)) for view in self.views)
        return torch.stack([as_input(view, self.preprocessing) for view in drawn]), sample.label

    def decode(self) -> None:
        """Decode every file once for all epochs."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.decoded = list(pool.map(self._seen, self.samples))

    def _seen(self, sample: Sample) -> Image:
        return read_picture(sample.path.read_bytes(), self.preprocessing, PIXELS).seen

    def _seed(self, sample: Sample, view: int) -> int:
        return mixed(self.seed, view, int(sample.digest[:16], 16))


def _drawn(augmentation: nn.Module, seen: Image, seed: int) -> Image:
    """Augment a picture, leaving the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        augmented: Image = augmentation(seen)
    return augmented


def mixed(*numbers: int) -> int:
    """Return a seed that depends on all the numbers and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
