"""What the learning part sees: features of frozen parts, kept for images and their augmented views."""

import pytest
import torch
from patches import write_folder
from torch import nn
from torchvision import transforms

import training  # noqa: F401
from torchserve_explain.serving.images import read_picture
from training.data import Images, read_folder
from training.features import Kept, Live, Place, made_fast, read_source
from training.networks import build, preprocessing_for
from training.recipe import Part

CPU = torch.device("cpu")
PREPROCESSING = preprocessing_for("cnn", 32)
TURNED = transforms.RandomAffine(40)


class Counting(nn.Conv2d):
    """A frozen part that counts the images that it sees."""

    def __init__(self):
        super().__init__(3, 2, 3)
        self.seen = 0
        self.requires_grad_(False)

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


@pytest.fixture
def kept(tmp_path):
    """Read features of some samples and views with a frozen part; return them and how many were computed."""
    counting = Counting()

    def read(some, preprocessing=PREPROCESSING, augmentation=None, views=1, seed=0):
        counting.seen = 0
        images = Images(some, preprocessing, augmentation, seed)
        source = read_source(images, nn.Sequential(counting).eval(), Place(CPU, tmp_path / "features"), views)
        assert isinstance(source, Kept) and source.labels == [sample.label for sample in some]
        return source.features, counting.seen - 1  # one tells how large they are

    return read, counting


@pytest.fixture
def samples(tmp_path):
    return read_folder(write_folder(tmp_path / "images", count=6), PREPROCESSING, (0.6, 0.2, 0.2), 0).splits["train"]


def test_features_are_computed_once_for_an_image_a_network_and_a_preprocessing(kept, samples):
    read, counting = kept
    first, cost = read(samples[:6])
    assert cost == 6 and first.shape[:2] == (6, 1)
    torch.testing.assert_close(first[2], counting(Images(samples, PREPROCESSING)[2][0]))
    again, cost = read(samples)
    assert cost == len(samples) - 6 and torch.equal(again[:6], first)
    assert read(list(reversed(samples)))[1] == 0
    assert read(samples, preprocessing_for("cnn", 16))[1] == len(samples)
    with torch.no_grad():
        counting.weight.add_(1)
    assert read(samples)[1] == len(samples)


def test_features_of_augmented_views_are_computed_once_and_taken_in_turn(kept, samples, tmp_path):
    read, counting = kept
    three, cost = read(samples, augmentation=TURNED, views=3)
    assert cost == 3 * len(samples) and three.shape[:2] == (len(samples), 3)
    images = Images(samples, PREPROCESSING, TURNED)
    images.views = [2]
    torch.testing.assert_close(three[4, 2:], counting(images[4][0]))
    fewer, cost = read(samples[3:], augmentation=TURNED, views=2)
    assert cost == 0 and torch.equal(fewer, three[3:, :2])
    assert read(samples, augmentation=TURNED, views=2, seed=1)[1] == 2 * len(samples)
    assert read(samples, augmentation=transforms.RandomAffine(10), views=2)[1] == 2 * len(samples)
    source = Kept(three, [sample.label for sample in samples], CPU)
    for epoch in range(5):
        (batch,) = source.batches([[5, 1]], epoch)
        assert torch.equal(batch[0], three[[5, 1], epoch % 3])


def test_features_are_made_anew_where_nothing_is_frozen_or_every_epoch_draws(samples, tmp_path):
    place = Place(CPU, tmp_path / "features")
    drawn = read_source(Images(samples, PREPROCESSING, TURNED), nn.Sequential(nn.Identity()), place, 0)
    assert isinstance(drawn, Live)
    (first, _), (second, _) = (next(drawn.batches([[0]], epoch)) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert isinstance(read_source(Images(samples, PREPROCESSING), nn.Sequential(), place, 2), Live)


@pytest.mark.parametrize("augmentation", [None, TURNED])
def test_images_that_every_epoch_sees_are_decoded_once(samples, tmp_path, monkeypatch, augmentation):
    images = Images(samples, PREPROCESSING, augmentation)
    images.views = [2]
    expected = torch.cat([images[place][0] for place in range(4)])
    decoded = []

    def read_noted(*given):
        decoded.append(given)
        return read_picture(*given)

    monkeypatch.setattr("training.data.read_picture", read_noted)
    source = read_source(images, nn.Sequential(), Place(CPU, tmp_path / "features"), 0)
    for epoch in (1, 2):
        (batch, _) = next(source.batches([[0, 1, 2, 3]], epoch))
    assert len(decoded) == len(samples) and torch.equal(batch, expected)


def test_the_fast_copy_of_a_frozen_part_answers_the_same():
    frozen = build("lite0", "pretrained", 3, Part.LAST_STAGE).frozen
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    fast = made_fast(frozen)
    norms = [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), frozen(x), rtol=1e-3, atol=1e-3)
    assert not norms and all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())
    assert not any(p.requires_grad for p in fast.parameters())
