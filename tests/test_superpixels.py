"""LIME, KernelSHAP and XRAI: closed forms, enumerated Shapley values, and the reference libraries under the same draws."""

from itertools import permutations

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression, SkLearnRidge
from captum.attr import KernelShap as CaptumKernelShap
from captum.attr import Lime as CaptumLime
from captum.attr._core.lime import get_exp_kernel_similarity_function
from conftest import NORMALIZATION, SIZE
from saliency.core import XRAI as PairXrai  # noqa: N811
from saliency.core import XRAIParameters

from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.method import Draw
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.superpixels import (
    KernelShap,
    Lime,
    Superpixels,
    fitted,
    local_ridge,
    paired,
    shapley_coalitions,
)
from torchserve_explain.attribution.methods.xrai import Xrai, gathered, segments

TARGET = 3


def case_of(classifier, image, **options):
    return Case(classifier, image, TARGET, known_score=float(classifier.logits(image[None])[0, TARGET]), **options)


def explained(method, case):
    (found,) = Engine(case.classifier, 7).results([Job(method, case)])
    return found.value


def weights_of(attribution, regions):
    """Sum a map over each region."""
    labels = regions._labels.flatten()
    return torch.zeros(regions.count, dtype=attribution.dtype).index_add(0, labels, attribution.flatten())


def captum_arguments(case, regions, coalitions):
    """The forward function, regions and fixed draws that Captum is to use."""
    draws = iter(torch.from_numpy(coalitions))
    return {
        "inputs": case.input[None],
        "baselines": Baseline.BLACK.image(case)[None],
        "target": TARGET,
        "feature_mask": regions._labels[None, None],
        "return_input_shape": False,
    }, lambda *_, **__: next(draws)[None]


def test_lime_is_captums_with_the_same_draws(classifier, image):
    case = case_of(classifier, image, seed=4)
    regions = Superpixels(case, Baseline.BLACK)
    coalitions = (case.draw(Draw.COALITION, 0).random((60, regions.count)) < 0.5).astype(float)
    coalitions[0] = 1
    arguments, draw = captum_arguments(case, regions, coalitions)

    def similarity(original, perturbed, coalition, **_):
        return get_exp_kernel_similarity_function("cosine", 0.25)(torch.ones_like(coalition), coalition, coalition)

    captum = CaptumLime(classifier.logits, SkLearnRidge(alpha=1), similarity, draw)
    expected = captum.attribute(n_samples=60, **arguments)[0]
    found = weights_of(explained(Lime(samples=60), case).map, regions)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-5, atol=1e-6)


def test_kernel_shap_is_captums_with_the_same_draws(classifier, image):
    """Captum holds to the ends with large weights, which the constraint does exactly."""
    case = case_of(classifier, image, seed=4)
    regions = Superpixels(case, Baseline.BLACK)
    drawn = shapley_coalitions(regions.count, 200, case.draw(Draw.COALITION, 0))
    ends = np.stack([np.ones(regions.count), np.zeros(regions.count)])
    arguments, draw = captum_arguments(case, regions, np.concatenate([ends, drawn]))
    captum = CaptumKernelShap(classifier.logits)
    captum.perturb_func, captum.interpretable_model = draw, SkLearnLinearRegression()
    expected = captum.attribute(n_samples=202, **arguments)[0]
    found = weights_of(explained(KernelShap(samples=200), case).map, regions)
    torch.testing.assert_close(found, expected.to(found), rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def game(players):
    """A value function with interactions, and its Shapley values by enumeration."""
    draw = np.random.default_rng(0)
    table = {coalition: draw.normal() for coalition in np.ndindex(*(2,) * players)}

    def worth(coalition):
        return table[tuple(int(z) for z in coalition)]

    orders = list(permutations(range(players)))
    values = np.zeros(players)
    for order in orders:
        shown = np.zeros(players)
        for player in order:
            before = worth(shown)
            shown[player] = 1
            values[player] += (worth(shown) - before) / len(orders)
    return worth, values


def test_kernel_shap_reaches_the_enumerated_shapley_values():
    worth, expected = game(5)
    nothing, whole = worth(np.zeros(5)), worth(np.ones(5))
    coalitions = shapley_coalitions(5, 40_000, np.random.default_rng(1))
    rises = np.array([worth(z) - nothing for z in coalitions])
    total = np.full(len(rises), whole - nothing)
    found = fitted(*paired(coalitions, rises, total)).values + (whole - nothing) / 5
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert found.sum() == pytest.approx(whole - nothing)


def test_coalitions_follow_the_kernel_in_complementing_pairs():
    coalitions = shapley_coalitions(6, 20_000, np.random.default_rng(0))
    sizes = coalitions.sum(1).astype(int)
    assert np.array_equal(coalitions[1::2], 1 - coalitions[::2])
    chances = np.array([1 / (size * (6 - size)) for size in range(1, 6)])
    np.testing.assert_allclose(np.bincount(sizes, minlength=7)[1:6] / len(sizes), chances / chances.sum(), atol=0.01)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_few_coalitions_leave_what_they_do_not_tell_to_all_alike(samples):
    coalitions = shapley_coalitions(12, samples, np.random.default_rng(0))
    values = fitted(*paired(coalitions, coalitions.sum(1) * 0.5, np.full(samples, 6.0))).values + 6.0 / 12
    np.testing.assert_allclose(values, 0.5)  # the game is additive and fair


@pytest.mark.parametrize("method", [Lime(samples=400), KernelShap(samples=400)])
def test_a_linear_model_has_each_regions_own_share(linear, linear_classifier, image, method):
    case = case_of(linear_classifier, image)
    regions = Superpixels(case, Baseline.BLACK)
    shares = (linear.weight(TARGET) * (image - Baseline.BLACK.image(case))).sum(0)
    expected = weights_of(shares, regions)
    found = weights_of(explained(method, case).map, regions)
    if isinstance(method, KernelShap):
        torch.testing.assert_close(found, expected)
    else:  # ridge regression shrinks
        assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.97


def test_kernel_shap_tells_an_error_of_rounding_alone(classifier, image):
    attribution = explained(KernelShap(samples=20), case_of(classifier, image))
    assert attribution.completeness_error < 1e-9 and attribution.baseline_score is not None


def test_the_ridge_is_the_weighted_normal_equation():
    draw = np.random.default_rng(2)
    coalitions, scores = (draw.random((30, 4)) < 0.5).astype(float), draw.normal(size=30)
    weights = np.exp(-((1 - np.sqrt(coalitions.mean(1))) ** 2) / (2 * 0.25**2))
    found = local_ridge(coalitions, scores).values
    intercept = np.average(scores - coalitions @ found, weights=weights)
    slope = coalitions.T @ (weights * (scores - intercept - coalitions @ found))
    np.testing.assert_allclose(slope, found, atol=1e-9)  # the gradient of half the squares is ridge times the weights


def naive_gathering(attribution, masks):
    """Algorithm 1 of arXiv:1906.02825, as it is written."""
    density, covered = np.zeros_like(attribution), np.zeros(attribution.shape, dtype=bool)
    while not covered.all() and any((mask & ~covered).any() for mask in masks):
        best = max((m & ~covered for m in masks if (m & ~covered).any()), key=lambda new: attribution[new].mean())
        density[best] = attribution[best].mean()
        covered |= best
    return density


def test_regions_are_gathered_as_the_algorithm_says_and_as_its_authors_do(classifier):
    image = NORMALIZATION(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    image[:, :20, :15] += 2
    masks = segments(Case(classifier, image, TARGET))
    attribution = np.random.default_rng(0).normal(size=(40, 40))
    found = gathered(attribution, masks)
    np.testing.assert_allclose(found, naive_gathering(attribution, masks))
    parameters = XRAIParameters(area_threshold=1.0)
    parameters.experimental_params["min_pixel_diff"] = 1
    given = {"segments": list(masks), "base_attribution": np.repeat(attribution[..., None], 3, 2)}
    theirs = PairXrai().GetMask(image.movedim(0, -1).numpy(), None, extra_parameters=parameters, **given)
    np.testing.assert_allclose(found, theirs)


def test_segments_cover_the_image_and_find_its_parts(classifier, image):
    image = torch.full_like(image, -1.0)
    image[:, :, 8:] = 2.0
    masks = segments(Case(classifier, image, TARGET))
    assert masks.any(0).all() and masks.shape[1:] == SIZE
    left = np.zeros(SIZE, dtype=bool)
    left[:, :8] = True
    assert any(not (mask & left).any() or not (mask & ~np.pad(left, ((0, 0), (1, 0)))[:, :16]).any() for mask in masks)


def test_xrai_keeps_the_sum_and_the_cost_of_its_path(classifier, image):
    case = case_of(classifier, image)
    path = IntegratedGradients(steps=12)
    (plain,) = Engine(classifier, 7).results([Job(path, case)])
    (regions,) = Engine(classifier, 7).results([Job(Xrai(steps=12), case)])
    assert regions.evaluations == plain.evaluations
    assert float(regions.value.map.sum()) == pytest.approx(float(plain.value.map.sum()))
