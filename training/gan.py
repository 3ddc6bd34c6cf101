"""A small GAN for each class (DCGAN, arXiv:1511.06434) draws more images of it to train on."""

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from torchserve_explain.serving.settings import Preprocessing
from training.data import Images, Sample, mixed

SIDE, NOISE, WIDTH = 64, 100, 32  # pixels, numbers that an image is drawn from, channels of the finest layer


@dataclass(frozen=True)
class Drawing:
    """How many images of each class are drawn, and after how many steps of learning, each on `batch` images."""

    images: int
    steps: int
    folder: Path
    device: torch.device
    batch: int = 32
    progress: Progress = field(default_factory=lambda: Progress(disable=True))


class Generator(nn.Sequential):
    """Images [n, 3, 64, 64] in [-1, 1] of noise [n, 100, 1, 1]: five transposed convolutions."""

    def __init__(self) -> None:
        widths = (NOISE, 8 * WIDTH, 4 * WIDTH, 2 * WIDTH, WIDTH)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths)):
            stride, padding = (1, 0) if number == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False), nn.BatchNorm2d(after)]
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1), nn.Tanh())


class Discriminator(nn.Sequential):
    """Logits [n] that images [n, 3, 64, 64] are real."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in pairwise((WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH)):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * WIDTH, 1, 4), nn.Flatten(0))


def draw_samples(samples: Sequence[Sample], classes: Sequence[str], drawing: Drawing, seed: int) -> list[Sample]:
    """Return new samples, `images` of each class, drawn by a GAN trained on those of that class; kept once drawn."""
    drawn: list[Sample] = []
    for label, name in enumerate(classes):
        own = [sample for sample in samples if sample.label == label]
        key = [drawing.images, drawing.steps, drawing.batch, seed, *(sample.digest for sample in own)]
        folder = drawing.folder / hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        if not folder.exists():
            _draw(own, folder, drawing, mixed(seed, label), name)
        files = sorted(folder.iterdir())
        drawn += [Sample(path, label, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return drawn


def _draw(own: Sequence[Sample], folder: Path, drawing: Drawing, seed: int, name: str) -> None:
    """Train a GAN on a class, and write its images; the folder appears once it is complete."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = train_gan(_real(own), drawing, name)
        with torch.no_grad():
            noise = torch.randn(drawing.images, NOISE, 1, 1, device=drawing.device)
            images = torch.cat([generator(part) for part in torch.split(noise, 64)]).cpu()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    for number, image in enumerate(images):
        pixels = ((image.movedim(0, -1) + 1) * 127.5).round().numpy().astype(np.uint8)
        Image.fromarray(pixels).save(unfinished / f"{number:05}.png")
    try:
        unfinished.rename(folder)
    except OSError:  # another run was faster, with the same images
        if not folder.exists():
            raise
        shutil.rmtree(unfinished)


def _real(own: Sequence[Sample]) -> Tensor:
    """Return a class's images [n, 3, 64, 64] in [-1, 1]."""
    preprocessing = Preprocessing(resize=SIDE, crop=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = Images(own, preprocessing)
    return torch.cat([images[place][0] for place in range(len(images))])


def train_gan(real: Tensor, drawing: Drawing, name: str = "") -> Generator:
    """Train generator and discriminator against each other on images [n, 3, 64, 64]; return the generator, ready to draw."""
    generator, discriminator = Generator().to(drawing.device), Discriminator().to(drawing.device)
    artist, critic = (torch.optim.Adam(model.parameters(), 2e-4, betas=(0.5, 0.999)) for model in (generator, discriminator))
    for _ in drawing.progress.track(range(drawing.steps), description=f"drawing {name}"[:60]):
        batch = real[torch.randint(len(real), (drawing.batch,))].to(drawing.device)
        drawn = generator(torch.randn(drawing.batch, NOISE, 1, 1, device=drawing.device))
        _step(critic, _loss(discriminator(batch), 1) + _loss(discriminator(drawn.detach()), 0))
        _step(artist, _loss(discriminator(drawn), 1))
    return generator.eval()


def _loss(logits: Tensor, real: int) -> Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
