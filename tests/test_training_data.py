"""Folders of images: what is split, what is left out, what is refused; augmentation that depends on its seed alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from patches import COLOURS, write_folder
from PIL import Image
from torch import nn
from torchvision import transforms

import training  # noqa: F401
from torchserve_explain.errors import TrainingError
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import Preprocessing
from training.data import SPLITS, Images, read_folder

PREPROCESSING = Preprocessing(resize=32, crop=32)
RATIO = (0.5, 0.25, 0.25)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", count=8)


def read(folder, seed=0):
    return read_folder(folder, PREPROCESSING, RATIO, seed)


def digests(data, split):
    return {sample.digest for sample in data.splits[split]}


def test_a_folder_is_split_class_by_class_by_its_seed(folder):
    data = read(folder)
    assert data.classes == sorted(COLOURS) and not data.skipped
    assert [data.counts(split) for split in SPLITS] == [[4] * 3, [2] * 3, [2] * 3]
    assert (
        sum(len(digests(data, split)) for split in SPLITS) == len(set.union(*(digests(data, split) for split in SPLITS))) == 24
    )
    for split in SPLITS:
        assert digests(data, split) == digests(read(folder), split)
        assert digests(data, split) != digests(read(folder, 1), split)
        assert all(sample.path.parent.name == data.classes[sample.label] for sample in data.splits[split])


@pytest.mark.parametrize(("given", "counts"), [(("train", "test"), (5, 3, 8)), (("train", "validation", "test"), (8, 8, 8))])
def test_splits_that_the_folder_brings_are_kept(tmp_path, given, counts):
    for number, split in enumerate(given):
        write_folder(tmp_path / split, count=8, start=100 * number)
    data = read_folder(tmp_path, PREPROCESSING, (0.6, 0.4, 0.4), 0)
    assert tuple(data.counts(split)[0] for split in SPLITS) == counts


def test_what_is_no_image_is_left_out_with_the_reason(folder):
    red = folder / "red"
    (red / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (red / "cut.png").write_bytes((red / "000.png").read_bytes()[:200])
    (red / "empty.png").write_bytes(b"")
    (red / "twin.png").write_bytes((red / "000.png").read_bytes())
    (red / ".hidden").write_text("not looked at")
    skipped = {path.name: why for path, why in read(folder).skipped.items()}
    assert set(skipped) == {"broken.jpg", "cut.png", "empty.png", "twin.png"}
    assert "not an image" in skipped["broken.jpg"] and skipped["twin.png"] == "the same bytes as red/000.png"
    assert read(folder).counts("train") == [4] * 3


def remove_all_but(folder, count):
    for path in sorted(folder.iterdir())[count:]:
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda folder: [remove_all_but(folder / name, 0) or (folder / name).rmdir() for name in COLOURS],
            "no folder of images",
        ),
        (
            lambda folder: [remove_all_but(folder / n, 0) or (folder / n).rmdir() for n in ("red", "green")],
            "the one class blue",
        ),
        (lambda folder: remove_all_but(folder / "red", 0), "the class red holds no image"),
        (
            lambda folder: remove_all_but(folder / "red", 2),
            "the class red has too few images (0 to train, 1 to val, 1 to test)",
        ),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "is no folder"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_the_reason(folder, spoil, reason):
    spoil(folder)
    with pytest.raises(TrainingError) as refused:
        read(folder)
    assert reason in str(refused.value) and "allowed: " in str(refused.value)


def test_a_class_that_training_does_not_know_is_refused(folder, tmp_path):
    write_folder(tmp_path / "split" / "test", count=2)
    folder.rename(tmp_path / "split" / "train")
    (tmp_path / "split" / "test" / "red").rename(tmp_path / "split" / "test" / "pink")
    with pytest.raises(TrainingError, match="the class pink, which train/ does not"):
        read(tmp_path / "split")


def test_an_image_that_is_not_augmented_is_what_the_server_sees(folder):
    samples = read(folder).splits["train"]
    images = Images(samples, PREPROCESSING)
    assert len(images) == len(samples)
    for place, sample in enumerate(samples):
        inputs, label = images[place]
        assert label == sample.label
        assert torch.equal(inputs, read_picture(sample.path.read_bytes(), PREPROCESSING, 10**6).input[None])


def test_augmentation_depends_on_seed_view_and_image_alone(folder):
    samples = read(folder).splits["train"]
    turned = nn.Sequential(transforms.RandomAffine(40, (0.2, 0.2), (0.8, 1.2)), transforms.RandomHorizontalFlip())

    def drawn(seed, views, before, order=samples):
        images = Images(order, PREPROCESSING, turned, seed)
        images.views = views
        torch.manual_seed(before)
        return images[order.index(samples[0])][0]

    both = drawn(0, [0, 1], 5)
    assert both.shape == (2, 3, 32, 32) and not torch.equal(both[0], both[1])
    assert torch.equal(drawn(0, [1], 6, samples[::-1]), both[1:])  # wherever the image lies in the list
    assert not torch.equal(drawn(1, [0], 5), both[:1])
    same = Images([replace(samples[0], digest=samples[1].digest)], PREPROCESSING, turned)
    assert not torch.equal(same[0][0], both[:1])


def test_augmentation_leaves_the_random_state_as_it_was(folder):
    images = Images(read(folder).splits["train"], PREPROCESSING, transforms.RandomAffine(40))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    images[0]
    assert torch.equal(torch.rand(1), expected)


def test_an_image_is_decoded_once_for_all_its_views(folder, monkeypatch):
    decoded = []

    def read_noted(*given):
        decoded.append(given)
        return read_picture(*given)

    monkeypatch.setattr("training.data.read_picture", read_noted)
    images = Images(read(folder).splits["train"], PREPROCESSING, transforms.RandomAffine(40))
    decoded.clear()
    images.views = range(5)
    assert len(images[0][0]) == 5 and len(decoded) == 1


def test_deep_photos_are_reduced_as_the_server_does(tmp_path):
    folder = write_folder(tmp_path, count=4)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(folder / "red" / "deep.png")
    assert not read(folder).skipped
