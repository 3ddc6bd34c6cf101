"""Maps against masks: closed forms, a naive replica, and chance where a map says nothing."""

import numpy as np
import pytest

from torchserve_explain.attribution.localization import LOCALIZATIONS, centre_map, mass_accuracy, pointing_game, rank_accuracy
from torchserve_explain.errors import AttributionError

MASK = np.array([[True, True, False], [False, False, False]])


def test_a_map_that_is_known():
    values = np.array([[3.0, 1.0, 2.0], [0.0, -9.0, 2.0]])
    assert pointing_game(values, MASK) == 1
    assert mass_accuracy(values, MASK) == 0.5
    assert rank_accuracy(values, MASK) == 0.5  # the highest two are 3, within, and a 2, which lies without
    assert pointing_game(-values, MASK) == 0 == mass_accuracy(-values, MASK)  # 9 is the only one above 0


def test_equal_values_score_what_a_random_order_scores():
    values = np.array([[2.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    assert pointing_game(values, MASK) == 0.5
    assert rank_accuracy(values, MASK) == 0.5
    mask = np.array([[True, True, False], [False, False, True]])
    assert rank_accuracy(values, mask) == pytest.approx((1 + 0.5) / 3)


@pytest.mark.parametrize("name", LOCALIZATIONS)
def test_a_map_that_says_nothing_is_chance_and_the_mask_itself_is_perfect(name):
    generator = np.random.default_rng(0)
    mask = generator.random((9, 12)) < 0.3
    for nothing in (np.zeros(mask.shape), -np.ones(mask.shape), np.ones(mask.shape, np.float16)):
        assert LOCALIZATIONS[name](nothing, mask) == pytest.approx(mask.mean())
    assert LOCALIZATIONS[name](mask.astype(np.float32), mask) == 1
    random = [LOCALIZATIONS[name](generator.random(mask.shape), mask) for _ in range(400)]
    assert np.mean(random) == pytest.approx(mask.mean(), abs=0.06)


def test_the_naive_replica_agrees():
    generator = np.random.default_rng(1)
    values, mask = generator.normal(size=(16, 20)), np.zeros((16, 20), bool)
    mask[3:9, 5:14] = True
    order = sorted(np.ndindex(values.shape), key=lambda place: -values[place])
    assert pointing_game(values, mask) == mask[order[0]]
    assert rank_accuracy(values, mask) == sum(mask[place] for place in order[: mask.sum()]) / mask.sum()
    inside = sum(values[place] for place in order if values[place] > 0 and mask[place])
    assert mass_accuracy(values, mask) == pytest.approx(inside / sum(value for value in values.flat if value > 0))
    assert mass_accuracy(values.astype(np.float16) * np.float16(1e3), mask) == pytest.approx(mass_accuracy(values, mask), 1e-2)


def test_the_centre_is_symmetric_and_falls_off():
    values = centre_map(4, 6)
    np.testing.assert_allclose(values, values[::-1, ::-1])
    assert values.shape == (4, 6) and values[1, 2] == values.max() > values[0, 2] > values[0, 0]
    assert values[1, 2] == pytest.approx(np.exp(-(0.5**2 + (1 / 3) ** 2) / 2))  # half a pixel of four and of six sides


@pytest.mark.parametrize("name", LOCALIZATIONS)
@pytest.mark.parametrize("mask", [np.zeros((2, 3), bool), MASK.T, MASK.astype(float)], ids=["empty", "turned", "numbers"])
def test_another_mask_is_refused(name, mask):
    with pytest.raises(AttributionError, match=r"allowed: a boolean mask of the map's size \(2, 3\)"):
        LOCALIZATIONS[name](np.ones((2, 3)), mask)
