"""What the learning part of a network sees of a split: features that are kept where they cannot change, or made anew."""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchserve_explain.attribution.fusion import fold_layers
from torchserve_explain.records import in_one_step
from training.data import Images, mixed

LARGEST = 2 * 2**30  # bytes of a split's features or decoded images that are kept; larger ones are made in every epoch
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
        for features, labels in self.views(order, [epoch]):
            yield features[:, 0], labels

    def views(self, order: list[list[int]], views: Sequence[int]) -> Iterator[Batch]:
        """Yield the features [n, views, ...] of the batches' views, and labels."""
        self.images.views = views
        for inputs, labels in DataLoader(self.images, batch_sampler=order, num_workers=self.place.workers):
            features = self._features(inputs.flatten(0, 1).to(self.place.device))
            yield features.reshape(len(labels), len(views), *features.shape[1:]), labels.to(self.place.device)

    @torch.no_grad()
    def _features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.frozen(inputs.contiguous(memory_format=torch.channels_last))
        return features


class Kept:
    """Features [n, views, ...] that have been computed once; epochs take the views in turn."""

    def __init__(self, features: Tensor, labels: list[int], device: torch.device) -> None:
        self.features, self.labels, self.device = features, labels, device

    def batches(self, order: list[list[int]], epoch: int) -> Iterator[Batch]:
        view = epoch % self.features.shape[1]
        for batch in order:  # indexed, so copied: a layer may work in place
            features = self.features[batch, view].to(self.device)
            yield features, torch.tensor([self.labels[place] for place in batch], device=self.device)


def made_fast(frozen: nn.Sequential) -> nn.Sequential:
    """Return a copy of frozen modules that answers the same to rounding, faster: norms folded, laid out channels-last."""
    fast = copy.deepcopy(frozen)
    fold_layers(fast)
    return fast.requires_grad_(False).to(memory_format=torch.channels_last)  # the folded weights are new


def read_source(images: Images, frozen: nn.Sequential, place: Place, views: int) -> Source:
    """Keep the features of so many views of a split's images where a part of the network is frozen and memory allows it.

    An image that is not augmented has one view. With no views to keep, an augmented image is another in every epoch.
    """
    live = Live(images, frozen, place)
    numbers = range(1 if images.augmentation is None else views)
    if not len(frozen) or not numbers:
        if 3 * len(images) * prod(images.preprocessing.size) <= LARGEST:
            images.decode()
        return live
    (example, _) = next(live.batches([[0]], 0))
    if len(images) * len(numbers) * example.numel() * example.element_size() > LARGEST:
        return live
    return Kept(_kept_features(live, numbers), live.labels, place.device)


def in_order(count: int, size: int = BATCH) -> list[list[int]]:
    """Return the places of `count` images, in batches."""
    return [list(range(start, min(count, start + size))) for start in range(0, count, size)]


def shuffled(count: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches; a single image that is left over, which has no variance for a norm, is left out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mixed(seed, epoch)))
    return [batch.tolist() for batch in torch.split(order, size) if len(batch) > 1 or size == 1 or count == 1]


def _kept_features(live: Live, views: range) -> Tensor:
    """Read the features [n, views, ...] that are known from the file of this network and preprocessing; add the others."""
    path = live.place.folder / f"{_key(live)}.safetensors"
    digests = [sample.digest for sample in live.images.samples]
    known = _known(path, {_name(digest, view) for digest in digests for view in views})
    missing = [place for place, digest in enumerate(digests) if any(_name(digest, view) not in known for view in views)]
    if missing:
        size = max(1, BATCH // len(views))
        order = [missing[start : start + size] for start in range(0, len(missing), size)]
        for batch, (features, _) in zip(watched(live, order), live.views(order, views), strict=True):
            for place, of_image in zip(batch, features.cpu(), strict=True):
                known |= {
                    _name(digests[place], view): one.clone(memory_format=torch.contiguous_format)
                    for view, one in zip(views, of_image, strict=True)
                }
        with in_one_step(path) as unfinished:
            save_file(_known(path) | known, unfinished)
    return torch.stack([torch.stack([known[_name(digest, view)] for view in views]) for digest in digests])


def _name(digest: str, view: int) -> str:
    """Return what a view's features are called in the file."""
    return f"{digest}.{view}"


def watched(live: Live, order: list[list[int]]) -> Iterable[list[int]]:
    """Show how far the batches are."""
    return live.place.progress.track(order, description="features")


def _known(path: Path, names: Set[str] | None = None) -> dict[str, Tensor]:
    """Read kept features, those named or all."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        held = set(file.keys())
        return {name: file.get_tensor(name) for name in (held if names is None else held & names)}


def _key(live: Live) -> str:
    """Return what features depend on beside the image: frozen modules, their weights, preprocessing, how views are drawn."""
    images = live.images
    drawn = "" if images.augmentation is None else f" {images.augmentation!r} {images.seed}"
    return digest_of(live.frozen, f"{images.preprocessing!r} {live.frozen!r}{drawn}")


def digest_of(module: nn.Module, beside: str) -> str:
    """Return what a module's weights, and what stands beside them, are known by."""
    digest = hashlib.sha256(beside.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]
