"""Error bars of methods that draw: their definition, that they are true from seed to seed, and samples until they are small."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from test_baseline_references import images
from test_methods import case_of, explain
from test_service import EXPLANATION, answers, service
from test_service import explain as asked

from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.drawing import DrawingMethod
from torchserve_explain.attribution.methods.expected_gradients import GradientShap, _Draws
from torchserve_explain.attribution.methods.method import Draw
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.perturbation import Rise, random_mask
from torchserve_explain.attribution.methods.superpixels import KernelShap, Lime, Superpixels, fitted

__all__ = ["service"]  # a fixture
DRAWING = [name for name, method in METHODS.items() if method.draws]


def test_the_methods_that_draw_are_four():
    assert DRAWING == ["gradient_shap", "rise", "lime", "kernel_shap"]
    assert all(issubclass(METHODS[name], DrawingMethod) for name in DRAWING)


def relative(one, other, whole):
    return float((one - other).sum(0).norm() / whole.sum(0).norm() / 2)


def test_rise_tells_half_the_distance_of_its_halves(classifier, image):
    case = case_of(classifier, image, seed=3)
    hidden = Baseline.BLACK.image(case)
    masks = torch.stack([random_mask(case, number) for number in range(15)])
    scores = classifier.logits(hidden + masks * (image - hidden))[:, 1]

    def of(part):
        return (masks[part] * scores[part, None, None, None]).sum(0) / masks[part].sum(0) - scores[part].mean()

    found = explain(Job(Rise(samples=15), case), pack=4).value
    torch.testing.assert_close(found.map, of(slice(None)))
    assert found.sampling_error == pytest.approx(relative(of(slice(0, None, 2)), of(slice(1, None, 2)), found.map))


@pytest.mark.parametrize("baseline", [Baseline.BLACK, Baseline.NOISE, Baseline.REFERENCES])
def test_gradient_shap_tells_half_the_distance_of_its_halves(classifier, image, baseline):
    classifier.compare_with(images(4))
    case = case_of(classifier, image, seed=3)
    halves = [[0, 2, 5, 7], [1, 3, 4, 6]] if baseline is Baseline.REFERENCES else [[0, 2, 4, 6], [1, 3, 5, 7]]
    order = case.draw(Draw.REFERENCE, 0).permutation(4).tolist()
    maps = []
    for half in halves:
        maps.append(torch.zeros_like(image))
        for k in half:
            start = baseline.image(case, order[k % 4] if baseline is Baseline.REFERENCES else k)
            x = torch.lerp(start, image, (k + case.draw(Draw.PATH, 0).random()) / 8).requires_grad_()
            (gradient,) = torch.autograd.grad(classifier._model(x[None])[0, 1], x)
            maps[-1] += gradient * (image - start) / 4
    found = explain(Job(GradientShap(baseline, samples=8), case), pack=3).value
    torch.testing.assert_close(found.map, (maps[0] + maps[1]) / 2)
    assert found.sampling_error == pytest.approx(
        relative(maps[0], maps[1], found.map) / (3**0.5 if baseline is Baseline.BLACK else 1)
    )


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_a_regressions_variances_are_those_of_its_residuals_over_what_is_left_of_them(ridge):
    draw = np.random.default_rng(0)
    x, y, weights = draw.normal(size=(12, 3)), draw.normal(size=12), draw.uniform(0.5, 2, 12)
    found = fitted(x, y, weights, ridge)
    gram = sum(w * np.outer(one, one) for w, one in zip(weights, x, strict=True)) + ridge * np.eye(3)
    values = np.linalg.solve(gram, sum(w * one * score for w, one, score in zip(weights, x, y, strict=True)))
    variances = np.zeros(3)
    for w, one, score in zip(weights, x, y, strict=True):
        reach = np.linalg.solve(gram, w * one)
        variances += reach**2 * (score - one @ values) ** 2 / (1 - one @ reach)
    np.testing.assert_allclose(found.values, values)
    assert found.variances is not None
    np.testing.assert_allclose(found.variances, variances)
    assert fitted(x[:5], y[:5], weights[:5]).variances is None  # two samples more than values tell nothing


CALIBRATED = [
    GradientShap(samples=20),
    GradientShap(samples=20, stdev=0.1),
    GradientShap(Baseline.NOISE, samples=20),
    GradientShap(Baseline.REFERENCES, samples=20),
    Rise(samples=60),
    Lime(samples=200),
    KernelShap(samples=200),
    KernelShap(Baseline.REFERENCES, samples=200),
]


@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_the_error_told_is_the_spread_over_seeds(classifier, image, method):
    """Within a factor of 1.5, on average over 24 seeds; GradientSHAP's with references is up to twice as large."""
    classifier.compare_with(images(4))
    found = [explain(Job(method, case_of(classifier, image, seed=seed))).value for seed in range(24)]
    maps = torch.stack([one.map.sum(0) for one in found])
    spread = (maps - maps.mean(0)).square().sum((1, 2)).sum() / 23
    real = float((spread / maps.square().sum((1, 2)).mean()).sqrt())
    told = float(np.sqrt(np.mean([one.sampling_error**2 for one in found])))
    assert real / 1.5 < told < (2 if method == GradientShap(Baseline.REFERENCES, samples=20) else 1.5) * real


def test_a_doubled_sample_is_no_copy_of_one_in_the_other_half(classifier, image):
    """Each round pairs the references anew with points, or the halves would agree without being right."""
    classifier.compare_with(images(4))
    draws = _Draws(GradientShap(Baseline.REFERENCES, samples=12), case_of(classifier, image, seed=3))
    assert [draws.turn(k) for k in range(12)] != [draws.turn(k) for k in range(12, 24)]
    assert all(sorted(draws.turn(k) for k in range(start, start + 4)) == [0, 1, 2, 3] for start in range(0, 24, 4))
    assert all(sum(draws.half(k) for k in range(start, start + 8)) == 4 for start in range(0, 24, 8))


@pytest.mark.parametrize("name", DRAWING)
def test_samples_are_doubled_until_the_error_is_small_enough_or_the_budget_is_out(classifier, image, name):
    method: Any = METHODS[name]
    case = case_of(classifier, image, budget=1000)
    once = explain(Job(method(samples=160), case))
    more = explain(Job(method(samples=160, max_sampling_error=0.7 * once.value.sampling_error), case))
    fixed = once.evaluations - 160
    assert more.evaluations - fixed in (320, 640) and more.value.sampling_error <= 0.7 * once.value.sampling_error
    satisfied = explain(Job(method(samples=160, max_sampling_error=once.value.sampling_error * 1.01), case))
    assert satisfied.evaluations == once.evaluations
    torch.testing.assert_close(satisfied.value.map, once.value.map)
    spent = explain(Job(method(samples=160, max_sampling_error=1e-9), case_of(classifier, image, budget=500)))
    assert spent.evaluations == 320 + fixed and spent.value.sampling_error > 1e-9


def test_masks_drawn_later_are_those_drawn_at_once(classifier, image):
    case = case_of(classifier, image, budget=90)
    at_once, later = (explain(Job(m, case)).value for m in (Rise(samples=80), Rise(samples=20, max_sampling_error=1e-9)))
    torch.testing.assert_close(later.map, at_once.map)
    assert later.sampling_error == pytest.approx(at_once.sampling_error)


def test_points_of_a_path_stay_evenly_spaced_when_they_are_doubled(classifier, image):
    draws = _Draws(GradientShap(samples=6), case_of(classifier, image))
    for count in (6, 12, 24, 48):
        at = np.sort([draws.fraction(sample) for sample in range(count)])
        assert at[0] >= 0 and at[-1] < 1
        np.testing.assert_allclose(np.diff(at), 1 / count)


@pytest.mark.parametrize("method", [Lime(samples=31, max_sampling_error=1e-9), KernelShap(samples=31, max_sampling_error=1e-9)])
def test_coalitions_drawn_later_are_others(classifier, image, method, monkeypatch):
    case, drawn, scores = case_of(classifier, image, budget=130), [], Superpixels.scores

    def noted(self, coalitions, baselines):
        drawn.extend(map(tuple, coalitions))
        return scores(self, coalitions, baselines)

    monkeypatch.setattr(Superpixels, "scores", noted)
    explain(Job(method, case))
    assert len(drawn) >= 124 and len(set(drawn)) > 0.95 * len(drawn)
    assert sum(all(one) for one in drawn) == 1  # the image itself


@pytest.mark.parametrize(("name", "samples"), [("rise", 1), ("gradient_shap", 1), ("lime", 1), ("kernel_shap", 6)])
def test_too_few_samples_tell_no_error(classifier, image, name, samples):
    method: Any = METHODS[name]
    assert explain(Job(method(samples=samples), case_of(classifier, image))).value.sampling_error is None


def told(service, **fields):
    (answer,) = answers(service, asked(EXPLANATION | {name: str(value).encode() for name, value in fields.items()}))
    return answer.status, json.loads(answer.body)


def test_an_answer_tells_the_sampling_error_of_what_is_drawn_and_of_nothing_else(service):
    status, body = told(service, method="rise,grad_cam,lime", samples=40)
    errors = {one["method"]: one.get("sampling_error", "none") for one in body["explanations"]}
    assert status == 200 and errors["grad_cam"] == "none" and 0 < errors["rise"] < 2 and "lime" in errors
    assert told(service, method="rise", samples=1)[1]["explanations"][0]["sampling_error"] is None
    assert "sampling error" in told_page(service)


def told_page(service):
    (answer,) = answers(service, asked(EXPLANATION | {"method": b"rise", "samples": b"40", "output": b"html"}))
    return answer.body.decode().casefold()


def test_a_client_asks_for_an_error_and_gets_what_the_archive_spends_on_it(service):
    status, body = told(service, method="rise", samples=25, max_sampling_error=0.0001)
    (one,) = body["explanations"]
    assert status == 200 and one["evaluations"] == 1600 and one["parameters"]["max_sampling_error"] == 0.0001
    for wrong in ("0", "2", "few", "nan"):
        status, body = told(service, method="rise", max_sampling_error=wrong)
        assert status == 400 and "a fraction above 0, at most 1" in body["message"]


def test_what_a_request_may_spend_is_shared_by_all_that_decide_for_themselves(service):
    """4,000 rows: two fixed maps of 226, two of RISE from 300 up, and two paths from 9 up."""
    methods = [Rise(max_sampling_error=0.1), IntegratedGradients()]
    fields = {"method": b"occlusion,rise,integrated_gradients", "target": b"0,1", "max_sampling_error": b"0.1"}
    (item,) = service._planner.items(service_request(service, fields))
    assert item.least_rows(service.classifier) == 2 * (226 + 300 + 9)
    assert item.spare == (4000 - 1070) // 4
    assert [service.limits.most(method) for method in methods] == [2000, 400]


def service_request(service, fields):
    from torchserve_explain.serving.requests import read_request

    return read_request(EXPLANATION | fields, {"explain": "True"}, "", 1)
