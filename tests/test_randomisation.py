"""The randomisation test: its measures by their formulas, a twin without what was learned, the table of the archiver."""

import numpy as np
import pytest
import torch
from conftest import NORMALIZATION, SIZE, small_cnn
from live import SMALL_CONFIG, small_files
from scipy.stats import entropy

from torchserve_explain.archiver import main, parser
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.methods.cam import EigenCam
from torchserve_explain.attribution.methods.gradient import Saliency
from torchserve_explain.attribution.randomisation import compared, randomisation


def test_the_twin_has_the_same_values_elsewhere_and_the_model_stays(classifier, image):
    before = classifier.logits(image[None])
    twin, again = classifier.shuffled(), classifier.shuffled()
    for own, other, same in zip(*(one._model.parameters() for one in (classifier, twin, again)), strict=True):
        assert torch.equal(own.flatten().sort().values, other.flatten().sort().values) and torch.equal(other, same)
        assert own.numel() < 5 or not torch.equal(own, other)
    assert torch.equal(classifier.logits(image[None]), before)
    assert not torch.allclose(twin.logits(image[None]), before)


def test_the_measures_are_those_of_ranks_and_of_the_histograms_entropy():
    random = np.random.default_rng(0)
    first, second = random.normal(size=SIZE), random.normal(size=SIZE) ** 3
    correlation, similarity, rise = compared(first, second)
    ranks = [np.abs(one).ravel().argsort().argsort() for one in (first, second)]
    assert correlation == pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1])
    counts = []
    for values in (first, second):
        bins = np.floor((values - values.min()) / np.ptp(values) * 100).clip(max=99).astype(int)
        counts.append(np.bincount(bins.ravel(), minlength=100))
    assert rise == pytest.approx(entropy(counts[1]) / entropy(counts[0]) - 1)
    assert compared(first, first) == pytest.approx((1, 1, 0)) and similarity < 0.5
    assert compared(first, -first)[0] == pytest.approx(1)  # sizes, whatever their sign
    assert compared(np.zeros(SIZE), first)[:2] == (0, 0) and compared(first, np.zeros(SIZE))[2] == -1


def test_a_method_is_measured_over_all_images_for_what_the_trained_model_predicts(classifier):
    images = NORMALIZATION(torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    engines = Engine(classifier, 4), Engine(classifier.shuffled(), 4)
    targets = classifier.logits(images).argmax(1).tolist()
    expected = []
    for image, target in zip(images, targets, strict=True):
        gradients = [e.classifier.evaluate(image[None], [target], [], gradient=True).gradients[0] for e in engines]
        expected.append(compared(*(one.abs().sum(0).numpy() for one in gradients)))
    found = randomisation(Saliency(), *engines, list(images))
    assert found is not None
    assert [found.rank_correlation, found.similarity, found.complexity_rise] == pytest.approx(np.mean(expected, 0))
    assert abs(found.rank_correlation) < 0.9
    same = randomisation(EigenCam(), engines[0], engines[0], list(images))
    assert same is not None and same.rank_correlation == pytest.approx(1) and same.complexity_rise == 0


def test_a_method_that_makes_no_map_of_one_is_not_measured(classifier):
    broken = small_cnn()
    broken.head.weight.data.fill_(float("nan"))
    images = [torch.rand(3, *SIZE, dtype=torch.float64)]
    assert randomisation(Saliency(), Engine(classifier, 4), Engine(Classifier(broken, NORMALIZATION, SIZE), 4), images) is None


def test_an_archive_is_checked_where_that_is_asked_for(tmp_path, capsys):
    files = small_files(tmp_path, SMALL_CONFIG + "  methods: [eigen_cam, grad_cam, saliency]\n  defaults: {method: saliency}\n")
    options = ["--model", files["model.py"], "--weights", files["weights.pth"], "--config", files["model-config.yaml"]]
    given = ["small", *map(str, options), "--store", str(tmp_path)]
    assert main(parser().parse_args(given)) == 0 and "rank correlation" not in capsys.readouterr().out
    assert main(parser().parse_args([*given, "--check"])) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(place for place, line in enumerate(lines) if "rank correlation" in line) + 1 : -1]
    assert [line.split()[0] for line in table] == ["grad_cam", "eigen_cam", "saliency"]
    assert all(line.split()[3].endswith("%") for line in table)
