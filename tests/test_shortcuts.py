"""Maps that form a cluster of their own: a planted shortcut is found, and its clean twin raises no alarm."""

import numpy as np
import pytest
import torch
from patches import SIDE, patched
from torch import nn

from torchserve_explain.attribution.classifier import Classifier, Normalization
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.gallery.shortcuts import find_clusters

TAG = slice(54, 62)  # rows and columns of a yellow tag in the lower right corner
TAGGED = 8  # of COUNT pictures
COUNT = 30


class RedOrYellow(nn.Module):
    """Tells pictures with something red, or something yellow, from those without."""

    def __init__(self):
        super().__init__()
        self.colours = nn.Conv2d(3, 2, 1)
        weight = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, -2.0]])
        self.colours.weight = nn.Parameter(weight[:, :, None, None])
        self.colours.bias = nn.Parameter(torch.tensor([-0.3, -1.2]))

    def forward(self, x):
        found = torch.relu(self.colours(x)).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(found), found], 1)


@pytest.fixture(scope="module")
def engine():
    return Engine(Classifier(RedOrYellow(), Normalization((0.0,) * 3, (1.0,) * 3), (SIDE, SIDE)), 16)


def maps_of(engine, tagged):
    """Explain pictures of the red class, of which the first few have a tag in the corner instead of a red patch."""
    images = []
    for seed in range(COUNT):
        pixels = np.array(patched("green" if seed < tagged else "red", 1300 + seed)[0])
        if seed < tagged:
            pixels[TAG, TAG] = (250, 230, 10)
        images.append(torch.from_numpy(pixels / 255).float().movedim(-1, 0))
    jobs = [Job(METHODS["integrated_gradients"](), Case(engine.classifier, image, 1)) for image in images]
    return [one.value.map.sum(0).numpy() for one in engine.results(jobs)]


def suspicious(maps):
    return [cluster for cluster in find_clusters(maps) if cluster.suspicious(len(maps))]


def test_a_planted_shortcut_is_found(engine):
    (cluster,) = suspicious(maps_of(engine, TAGGED))
    assert sorted(cluster.places) == list(range(TAGGED))
    assert cluster.within > 0.9 and cluster.between < 0.3


def test_its_clean_twin_raises_no_alarm(engine):
    assert not suspicious(maps_of(engine, 0))


def test_a_class_that_is_all_alike_is_one_cluster():
    generator = np.random.default_rng(0)
    centre = np.zeros((32, 32), np.float32)
    centre[10:22, 10:22] = 1
    maps = [(centre + 0.1 * generator.random((32, 32))).astype(np.float32) for _ in range(20)]
    assert not suspicious(maps) and sum(len(one.places) for one in find_clusters(maps)) == 20


def test_few_maps_and_maps_of_zeros_are_no_error():
    zeros = [np.zeros((8, 8), np.float32)] * 9
    assert not suspicious(zeros)
    assert [one.places for one in find_clusters(zeros[:3])] == [[0, 1, 2]]


def drawn_maps(seed, tagged):
    """Draw maps that are one where an object lies: at a place of its own, or in the corner."""
    generator = np.random.default_rng(seed)
    maps = np.zeros((COUNT, SIDE, SIDE), np.float32)
    for number, values in enumerate(maps):
        top, left = generator.integers(2, 42, 2)
        values[(TAG, TAG) if number < tagged else (slice(top, top + 20), slice(left, left + 20))] = 1
    return list(maps)


def test_a_shortcut_of_most_pictures_is_found():
    found = [any(sorted(one.places) == list(range(20)) for one in suspicious(drawn_maps(s, 20))) for s in range(10)]
    assert all(found)


def test_shortcuts_are_found_far_more_often_than_alarms_are_false():
    found = [any(sorted(one.places) == list(range(8)) for one in suspicious(drawn_maps(s, 8))) for s in range(40)]
    false = [bool(suspicious(drawn_maps(seed, 0))) for seed in range(40)]
    assert sum(found) >= 34 and sum(false) <= 2
