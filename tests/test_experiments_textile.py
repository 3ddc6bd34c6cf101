"""The defect is found without the classifier, and what points at it is told from what does not."""

import numpy as np
import pytest
from PIL import Image
from scipy.signal import lfilter

from experiments.textile import RADIUS, Weave, point
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.pictures import png
from torchserve_explain.serving.settings import Preprocessing

PREPROCESSING = Preprocessing(resize=128, crop=128)


def weave(seed, defect=None):
    """Return an autoregressive texture, in which the pixels of a small square are noise of their own."""
    generator = np.random.default_rng(seed)
    values = lfilter([1], [1, -0.6], lfilter([1], [1, -0.6], generator.normal(0, 20, (128, 128)), 0), 1) + 128
    if defect is not None:
        row, column = defect
        values[row - 5 : row + 5, column - 5 : column + 5] = generator.uniform(0, 255, (10, 10))
    return read_picture(png(Image.fromarray(values.clip(0, 255).astype(np.uint8))), PREPROCESSING, 10**6)


def test_a_defect_is_where_a_pixel_cannot_be_told_from_its_neighbours():
    predictor = Weave([weave(seed) for seed in range(4)])
    for seed, defect in enumerate([(40, 60), (90, 20), (64, 110)]):
        found = predictor.defect(weave(100 + seed, defect))
        assert np.hypot(found[0] - defect[0], found[1] - defect[1]) < 6
        assert predictor.surprise(weave(100 + seed, defect)).max() > 2 * predictor.surprise(weave(100 + seed)).max()


def test_a_map_points_at_a_defect_by_its_maximum_and_by_its_share():
    spot, even = np.zeros((128, 128), np.float32), np.ones((128, 128), np.float32)
    spot[40, 60] = 1
    disc = np.pi * RADIUS**2 / 128**2
    assert point(spot, (40, 60)).hit and point(spot, (40, 60)).times == pytest.approx(1 / disc, rel=0.02)
    assert not point(spot, (90, 60)).hit and point(spot, (90, 60)).times == 0
    assert point(even, (64, 64)).times == pytest.approx(1)
