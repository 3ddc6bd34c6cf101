"""What the learning part of a network sees of a split: features that are kept where they cannot change, or made anew."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchserve_explain.records import in_one_step
from training.data import Images, mixed

LARGEST = 2 * 2**30  # bytes of a split's features that are kept; larger ones are made in every epoch
BATCH = 64
Batch = tuple[Tensor, Tensor]  # inputs of the learning part, and labels


@dataclass(frozen=True)
class Place:
    """Where and how features are computed and kept."""

    device: torch.device
    folder: Path
    workers: int = 0
    progress: Progress = field(default_factory=lambda: Progress(disable=True))


class Source(Protocol):
    """A split, in batches."""

    labels: list[int]

    def batches(self, order: list[list[int]], epoch: int) -> Iterator[Batch]:
        """Yield the batches of images that `order` names."""
        ...


class Live:
    """Features made anew from the images, augmented for the epoch."""

    def __init__(self, images: Images, frozen: nn.Module, place: Place) -> None:
        self.images, self.frozen, self.place = images, frozen, place
        self.labels = [sample.label for sample in images.samples]

    def batches(self, order: list[list[int]], epoch: int) -> Iterator[Batch]:
        self.images.epoch = epoch
        for inputs, labels in DataLoader(self.images, batch_sampler=order, num_workers=self.place.workers):
            yield self._features(inputs.to(self.place.device)), labels.to(self.place.device)

    @torch.no_grad()
    def _features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.frozen(inputs)
        return features


class Kept:
    """Features that have been computed once."""

    def __init__(self, features: Tensor, labels: list[int], device: torch.device) -> None:
        self.features, self.labels, self.device = features, labels, device

    def batches(self, order: list[list[int]], epoch: int) -> Iterator[Batch]:
        for batch in order:  # indexed, so copied: a layer may work in place
            yield self.features[batch].to(self.device), torch.tensor([self.labels[i] for i in batch], device=self.device)


def read_source(images: Images, frozen: nn.Sequential, place: Place) -> Source:
    """Keep a split's features where a part of the network is frozen, no image changes, and memory allows it."""
    live = Live(images, frozen, place)
    if images.augmentation is not None or not len(frozen):
        return live
    (example, _) = next(live.batches([[0]], 0))
    if len(images) * example.numel() * example.element_size() > LARGEST:
        return live
    return Kept(_kept_features(live), live.labels, place.device)


def in_order(count: int, size: int = BATCH) -> list[list[int]]:
    """Return the places of `count` images, in batches."""
    return [list(range(start, min(count, start + size))) for start in range(0, count, size)]


def shuffled(count: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches; a single image that is left over, which has no variance for a norm, is left out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mixed(seed, epoch)))
    return [batch.tolist() for batch in torch.split(order, size) if len(batch) > 1 or size == 1 or count == 1]


def _kept_features(live: Live) -> Tensor:
    """Read the features [n, ...] of images that are known from the file of this network and preprocessing; add the others."""
    path = live.place.folder / f"{_key(live)}.safetensors"
    digests = [sample.digest for sample in live.images.samples]
    known = _known(path, digests)
    missing = [place for place, digest in enumerate(digests) if digest not in known]
    if missing:
        order = [missing[start : start + BATCH] for start in range(0, len(missing), BATCH)]
        for batch, (features, _) in zip(watched(live, order), live.batches(order, 0), strict=True):
            known |= {digests[place]: feature.cpu().clone() for place, feature in zip(batch, features, strict=True)}
        with in_one_step(path) as unfinished:
            save_file(_known(path) | known, unfinished)
    return torch.stack([known[digest] for digest in digests])


def watched(live: Live, order: list[list[int]]) -> Iterable[list[int]]:
    """Show how far the batches are."""
    return live.place.progress.track(order, description="features")


def _known(path: Path, digests: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Read kept features, of the images named or of all."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        held = set(file.keys())
        return {digest: file.get_tensor(digest) for digest in (held if digests is None else held.intersection(digests))}


def _key(live: Live) -> str:
    """Return what features depend on beside the image: the frozen modules, their weights, the preprocessing."""
    return digest_of(live.frozen, f"{live.images.preprocessing!r} {live.frozen!r}")


def digest_of(module: nn.Module, told: str) -> str:
    """Return what a module's weights, and what is told beside them, are known by."""
    digest = hashlib.sha256(told.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]
