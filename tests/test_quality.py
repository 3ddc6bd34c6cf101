"""The qualities against Captum under the same draws, closed forms and naive replicas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.metrics import infidelity, sensitivity_max
from conftest import NORMALIZATION, SIZE, WITHOUT_ATTENTION
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from scipy.stats import entropy, spearmanr
from skimage.metrics import structural_similarity
from torch import nn

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.complexity import Complexity, Sparseness
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.measure import pixel_ranks
from torchserve_explain.attribution.methods import Attribution, Case, Smoothing
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.gradient import InputXGradient, Saliency, Sensitivity
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.smoothing import SmoothingKind
from torchserve_explain.attribution.quality import (
    QUALITIES,
    Deletion,
    Infidelity,
    Insertion,
    MaxSensitivity,
    Measurement,
    RandomLogit,
)
from torchserve_explain.attribution.removal import Road, SingleDeletion, imputed

TARGET = 1


def case_of(classifier, image, **options):
    return Case(classifier, image, TARGET, known_score=float(classifier.logits(image[None])[0, TARGET]), **options)


def measured(quality, job, attribution=None, pack=16):
    engine = Engine(job.case.classifier, pack)
    if attribution is None:
        attribution = engine.results([job])[0].value
    return engine.results([Measurement(quality, job, attribution)])[0]


@pytest.mark.parametrize("method", [Saliency(), InputXGradient(), IntegratedGradients(steps=6)])
def test_max_sensitivity_is_captums_with_the_same_draws(classifier, image, method):
    quality, case = MaxSensitivity(radius=0.1, samples=6), case_of(classifier, image, seed=3)
    copies = torch.stack([quality.perturbed(case, k).input for k in range(6)])

    def explain(inputs):
        maps = [Engine(classifier, 4).results([Job(method, case_of(classifier, one))])[0].value.map for one in inputs[0]]
        return (torch.stack(maps),)

    expected = sensitivity_max(
        explain, image[None], perturb_func=lambda *_: (copies,), n_perturb_samples=6, max_examples_per_batch=100
    )
    found = measured(quality, Job(method, case))
    assert found.value.value == pytest.approx(float(expected), rel=1e-9)
    assert found.evaluations == 6 * method.evaluations(classifier)


def test_perturbations_fill_the_ball(classifier, image):
    quality, case = MaxSensitivity(radius=0.3), case_of(classifier, image)
    moves = torch.stack([quality.perturbed(case, k).input - image for k in range(40)])
    assert 0.29 < float(moves.abs().max()) <= 0.3
    assert float(moves.std()) == pytest.approx(0.3 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("method", [InputXGradient(), IntegratedGradients(steps=6), Saliency()])
def test_infidelity_is_captums_with_the_same_draws(classifier, image, method):
    quality, case = Infidelity(samples=30), case_of(classifier, image, seed=5)
    attribution = Engine(classifier, 8).results([Job(method, case)])[0].value
    black = Baseline.BLACK.image(case)
    squares = torch.stack([quality.square(case, k) for k in range(30)])
    draws = squares * (image - black)

    def perturb(inputs):
        return draws, inputs - draws

    options = {"target": TARGET, "n_perturb_samples": 30, "normalize": True}
    expected = infidelity(classifier.logits, perturb, image[None], attribution.map[None], **options)
    found = measured(quality, Job(method, case), attribution)
    assert found.value.value == pytest.approx(float(expected), rel=1e-6)
    assert found.evaluations == 30


def test_what_a_linear_model_hides_is_foretold_exactly(linear, linear_classifier, image):
    """The unit of the map does not matter, nor that it has one channel for all."""
    case = case_of(linear_classifier, image)
    exact = linear.weight(TARGET) * (image - Baseline.BLACK.image(case))
    job = Job(InputXGradient(), case)
    assert measured(Infidelity(), job, Attribution(7 * linear.weight(TARGET))).value.value == pytest.approx(0, abs=1e-12)
    assert measured(Infidelity(), job, Attribution(exact)).value.value > 1e-3


class Bright(nn.Module):
    """The target's logit grows with the pixels of the left half."""

    def forward(self, x):
        return torch.stack([torch.zeros(len(x), dtype=x.dtype), 10 * x[:, :, :, :8].mean((1, 2, 3))], 1)


@pytest.fixture
def bright():
    classifier = Classifier(Bright(), NORMALIZATION, SIZE)
    return case_of(classifier, NORMALIZATION(torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))))


def half(left):
    right_map = torch.zeros(1, *SIZE)
    right_map[..., :8] = 1.0 if left else -1.0
    return Attribution(right_map)


def test_curves_tell_a_right_map_from_a_wrong_one(bright):
    job = Job(Sensitivity(), bright)
    right, wrong = (measured(Deletion(), job, half(left)).value for left in (True, False))
    assert right.value < wrong.value
    assert right.curve[0] == pytest.approx(wrong.curve[0]) and right.curve[-1] == pytest.approx(wrong.curve[-1])
    assert right.curve[25] == pytest.approx(right.curve[-1])  # nothing counts in the other half
    assert wrong.curve[25] == pytest.approx(wrong.curve[0])
    right, wrong = (measured(Insertion(), job, half(left)).value for left in (True, False))
    assert right.curve[25] == pytest.approx(right.curve[-1]) and wrong.curve[25] == pytest.approx(wrong.curve[0])


@pytest.mark.parametrize("quality", [Deletion(steps=8), Insertion(steps=8)])
def test_a_curve_is_its_naive_replica(classifier, image, quality):
    case = case_of(classifier, image)
    job = Job(InputXGradient(), case)
    attribution = Engine(classifier, 4).results([job])[0].value
    order = attribution.map.sum(0).flatten().argsort(descending=True)  # no two values are equal
    pixels, other = image.flatten(1).clone(), quality.baseline.image(case).flatten(1)
    first, last = (pixels, other) if isinstance(quality, Deletion) else (other, pixels)
    expected = []
    for step in range(9):
        x = first.clone()
        chosen = order[: step * order.numel() // 8]
        x[:, chosen] = last[:, chosen]
        expected.append(float(classifier.logits(x.view(1, *image.shape)).softmax(1)[0, TARGET]))
    found = measured(quality, job, attribution)
    assert found.value.curve == pytest.approx(expected)
    assert found.value.value == pytest.approx(np.trapezoid(expected, dx=1 / 8)) and found.evaluations == 9


def test_equal_values_come_in_random_order_and_the_same_for_the_same_seed(classifier, image):
    ranks = [pixel_ranks(case_of(classifier, image, seed=s), Attribution(torch.zeros(1, *SIZE))) for s in (0, 0, 1)]
    assert torch.equal(ranks[0], ranks[1]) and not torch.equal(ranks[0], ranks[2])
    assert sorted(ranks[0].flatten().tolist()) == list(range(256))
    assert abs(float(ranks[0][:8].double().mean()) - 127.5) < 30  # no corner goes first


@pytest.mark.parametrize("name", QUALITIES)
@pytest.mark.parametrize("method", [pytest.param(method, id=name) for name, method in WITHOUT_ATTENTION.items()])
def test_every_method_has_every_quality(classifier, image, method, name):
    small = {"samples": 4} if "samples" in method.__dataclass_fields__ else {}
    job, quality = Job(method(**small), case_of(classifier, image, budget=17)), QUALITIES[name]()
    if name == "max_sensitivity" and job.evaluations > 100:
        quality = MaxSensitivity(samples=1)
    found = measured(quality, job)
    lowest = -1 if name in ("random_logit", "single_deletion", "road") else 0
    assert np.isfinite(found.value.value) and found.value.value >= lowest
    planned = Measurement(quality, job, Attribution(image)).evaluations
    assert found.evaluations >= planned if method().adaptive else found.evaluations == planned


def test_the_pack_does_not_matter(classifier, image):
    job = Job(GradientShap(samples=3, stdev=0.1), case_of(classifier, image), Smoothing(SmoothingKind.VARGRAD, 3, 0.1))
    for quality in (MaxSensitivity(), Infidelity(), Deletion(), Insertion()):
        values = [measured(quality, job, pack=pack).value.value for pack in (1, 5, 64)]
        assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_a_map_of_zeros_has_qualities_too(classifier, image):
    job = Job(GradCam(), case_of(classifier, image))
    for quality in (kind() for name, kind in QUALITIES.items() if name != "max_sensitivity"):
        assert np.isfinite(measured(quality, job, Attribution(torch.zeros(1, *SIZE))).value.value)


def test_settings_are_told():
    assert MaxSensitivity().settings() == {"radius": 0.02, "samples": 10, "norm": "fro"}
    assert Infidelity().settings()["perturbation"] == "square"


def value_of(quality, values, job):
    return measured(quality, job, Attribution(torch.as_tensor(values, dtype=torch.float64)[None])).value.value


def test_sparseness_is_the_gini_index(classifier, image):
    """The mean difference of all pairs over twice the mean, written out; 0 for an even map, nearly 1 for one pixel."""
    job, values = Job(Saliency(), case_of(classifier, image)), np.random.default_rng(0).normal(size=SIZE)
    sizes = np.abs(values).ravel()
    expected = np.abs(sizes[:, None] - sizes[None]).mean() / (2 * sizes.mean())
    assert value_of(Sparseness(), values, job) == pytest.approx(expected)
    assert value_of(Sparseness(), np.ones(SIZE), job) == pytest.approx(0) == value_of(Sparseness(), np.zeros(SIZE), job)
    assert value_of(Sparseness(), np.eye(256)[:1].reshape(SIZE), job) == pytest.approx(1 - 1 / 256)


def test_complexity_is_the_entropy_of_the_shares(classifier, image):
    job, values = Job(Saliency(), case_of(classifier, image)), np.random.default_rng(0).normal(size=SIZE)
    assert value_of(Complexity(), values, job) == pytest.approx(entropy(np.abs(values).ravel()))
    assert value_of(Complexity(), -np.ones(SIZE), job) == pytest.approx(np.log(256))
    assert value_of(Complexity(), np.eye(256)[:1].reshape(SIZE), job) == pytest.approx(0)


@pytest.mark.parametrize("versus", [None, 3, 0])
def test_random_logit_compares_with_the_map_of_another_class(classifier, image, versus):
    logits = classifier.logits(image[None])[0]
    case = Case(classifier, image, TARGET, known_score=float(logits[TARGET]), seed=4, versus=versus)
    other = RandomLogit().other(case)
    drawn = {RandomLogit().other(replace(case, seed=seed)).target for seed in range(40)}
    assert drawn == {0, 2, 3, 4} and other.versus == (TARGET if other.target == versus else versus)
    found = Engine(classifier, 8).results([Job(Saliency(), one) for one in (case, other)])
    first, second = (one.value.map.sum(0).numpy() for one in found)
    scaled = [values / np.abs(values).max() for values in (first, second)]
    spread = max(map(np.max, scaled)) - min(map(np.min, scaled))
    expected = structural_similarity(*scaled, win_size=7, data_range=spread)
    found = measured(RandomLogit(), Job(Saliency(), case))
    assert found.value.value == pytest.approx(expected) and found.evaluations == 1


def test_a_map_that_does_not_look_at_the_class_is_the_same_for_another(image):
    class Alike(nn.Module):
        def forward(self, x):
            return x.square().sum((1, 2, 3))[:, None] + torch.arange(3.0, dtype=x.dtype)

    job = Job(Saliency(), case_of(Classifier(Alike(), NORMALIZATION, SIZE), image))
    assert measured(RandomLogit(), job).value.value == pytest.approx(1)


def test_single_deletion_is_the_rank_correlation_of_patches(classifier, image):
    case = case_of(classifier, image)
    job = Job(InputXGradient(), case)
    attribution = Engine(classifier, 4).results([job])[0].value
    black, drops, held = Baseline.BLACK.image(case), [], []
    for top, left in np.ndindex(4, 4):
        place = (slice(None), slice(4 * top, 4 * top + 4), slice(4 * left, 4 * left + 4))
        without = image.clone()
        without[place] = black[place]
        drops.append(case.known_score - float(classifier.logits(without[None])[0, TARGET]))
        held.append(float(attribution.map[place].sum()))
    found = measured(SingleDeletion(), job, attribution)
    assert found.value.value == pytest.approx(spearmanr(drops, held).statistic) and found.evaluations == 17


def test_a_linear_models_own_shares_rank_patches_exactly(linear, linear_classifier, image):
    case = case_of(linear_classifier, image)
    exact = Attribution(linear.weight(TARGET) * (image - Baseline.BLACK.image(case)))
    assert measured(SingleDeletion(), Job(Saliency(), case), exact).value.value == pytest.approx(1)
    assert measured(SingleDeletion(), Job(Saliency(), case), Attribution(-exact.map)).value.value == pytest.approx(-1)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_imputation_is_that_of_pytorch_grad_cam(image, share):
    missing = np.random.default_rng(1).random(SIZE) < share
    known = torch.from_numpy(~missing).float()
    expected = NoisyLinearImputer(noise=0.0)(image.float(), known) if share else image
    np.testing.assert_allclose(imputed(image.numpy(), missing), expected.numpy(), atol=1e-5)


def test_road_is_its_naive_replica(classifier, image):
    case, quality = case_of(classifier, image), Road(fractions=(0.25, 0.5), noise=0.0)
    job = Job(InputXGradient(), case)
    attribution = Engine(classifier, 4).results([job])[0].value
    order = attribution.map.sum(0).flatten().argsort(descending=True)
    expected = []
    for count in (64, 128):
        left = []
        for chosen in (order[-count:], order[:count]):
            missing = torch.zeros(256, dtype=torch.bool).index_fill(0, chosen, True).view(SIZE).numpy()
            filled = torch.from_numpy(imputed(image.numpy(), missing))
            left.append(float(classifier.logits(filled[None]).softmax(1)[0, TARGET]))
        expected.append((left[0] - left[1]) / 2)
    found = measured(quality, job, attribution)
    assert found.value.value == pytest.approx(np.mean(expected)) and found.evaluations == 4
    assert measured(Road(noise=0.1), job, attribution).value.value != measured(Road(noise=0), job, attribution).value.value


def test_road_tells_a_right_map_from_a_wrong_one(bright):
    right, wrong = (measured(Road(), Job(Sensitivity(), bright), half(left)).value.value for left in (True, False))
    assert right > wrong
