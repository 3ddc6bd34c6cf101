"""Qualities against Quantus, where it is installed: it brings a second OpenCV, and so is no requirement."""

import numpy as np
import pytest
import torch
from test_methods import case_of

from torchserve_explain.attribution.complexity import Complexity, Sparseness
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.measure import Measurement
from torchserve_explain.attribution.methods import Attribution
from torchserve_explain.attribution.methods.gradient import Saliency
from torchserve_explain.attribution.quality import RandomLogit, structural_similarity
from torchserve_explain.attribution.randomisation import compared

quantus = pytest.importorskip(
    "quantus", reason="Quantus is not installed: pip install --no-deps quantus==0.6.0 cachetools pandas"
)


def by_quantus(metric, values):
    one = np.zeros((1, 3, *values.shape[-2:]), np.float32)
    options = {"abs": True, "normalise": False, "disable_warnings": True, "display_progressbar": False}
    return metric(**options)(model=None, x_batch=one, y_batch=np.array([0]), a_batch=values[None], channel_first=True)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("quality, metric", [(Sparseness, "Sparseness"), (Complexity, "Complexity")])
def test_sparseness_and_complexity(classifier, image, quality, metric, seed):
    values = torch.randn(1, *image.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    job = Job(Saliency(), case_of(classifier, image))
    (found,) = Engine(classifier, 4).results([Measurement(quality(), job, Attribution(values))])
    assert found.value.value == pytest.approx(by_quantus(getattr(quantus, metric), values.numpy()), abs=1e-5)


def test_random_logit_is_its_similarity_of_the_maps_as_images(classifier, image):
    """Quantus itself compares them as one row of numbers, and of what is divided by the largest of both."""
    job, quality = Job(Saliency(), case_of(classifier, image)), RandomLogit()
    other = Job(Saliency(), quality.other(job.case))
    maps = [one.value.map.sum(0).numpy() for one in Engine(classifier, 4).results([job, other])]
    (found,) = Engine(classifier, 4).results([Measurement(quality, job, Attribution(torch.from_numpy(maps[0])[None]))])
    expected = quantus.similarity_func.ssim(*(one / np.abs(one).max() for one in maps))
    assert found.value.value == pytest.approx(expected, abs=1e-5)
    assert structural_similarity(*maps) == pytest.approx(expected, abs=1e-5)


def test_the_rise_of_complexity_is_of_its_discrete_entropy():
    first, second = np.random.default_rng(0).normal(size=(2, 16, 16)) ** np.array([1, 3])[:, None, None]
    before, after = (quantus.complexity_func.discrete_entropy(one, one) for one in (first, second))
    assert compared(first, second)[2] == pytest.approx((after - before) / before, abs=1e-5)
