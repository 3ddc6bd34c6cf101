"""Pictures of an archive as what explanations compare with: closed forms, replicas, axioms, and what is refused."""

import itertools
import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NORMALIZATION, SIZE, small_cnn, watched_passes
from live import picture
from test_archive import archive, mobilenet
from test_methods import case_of, explain
from test_service import EXPLANATION, answers
from test_service import explain as asked
from torch import nn

from torchserve_explain.archive import MOST_REFERENCES, Archive
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.bisection import PathRule
from torchserve_explain.attribution.methods.deep_lift import DeepLift
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.method import Draw
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.perturbation import Occlusion, Rise, _windows, random_mask
from torchserve_explain.attribution.methods.superpixels import KernelShap, Lime, fitted, paired, shapley_coalitions
from torchserve_explain.attribution.rows import Contrast, Score
from torchserve_explain.errors import ArchiveError
from torchserve_explain.serving.service import Service
from torchserve_explain.serving.settings import Settings

__all__ = ["archive"]  # a fixture

REFERENCES = Baseline.REFERENCES
COMPARING: list[Any] = [method for method in METHODS.values() if "baseline" in {field.name for field in fields(method)}]
COMPLETE = [
    IntegratedGradients(REFERENCES),
    IntegratedGradients(REFERENCES, steps=3),
    IntegratedGradients(REFERENCES, rule=PathRule.IDGI),
    IntegratedGradients(REFERENCES, steps=3, rule=PathRule.IDGI),
    GradientShap(REFERENCES, samples=8),
    DeepLift(REFERENCES),
    KernelShap(REFERENCES, samples=42),
]


def images(count=4):
    return NORMALIZATION(torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(7), dtype=torch.float64))


@pytest.fixture
def comparing(classifier):
    classifier.compare_with(images())
    return classifier


@pytest.fixture
def linear_comparing(linear_classifier):
    linear_classifier.compare_with(images())
    return linear_classifier


def in_turn(case):
    """The references as a method takes them, by a replica of the draw."""
    order = case.draw(Draw.REFERENCE, 0).permutation(len(images())).tolist()
    return lambda row: images()[order[row % len(order)]]


@pytest.mark.parametrize(
    "method", [m for m in COMPLETE if getattr(m, "rule", None) is not PathRule.IDGI and not isinstance(m, KernelShap)]
)
def test_of_a_linear_model_it_is_weight_times_difference_from_the_mean_reference(linear, linear_comparing, image, method):
    explained = explain(Job(method, case_of(linear_comparing, image)))
    torch.testing.assert_close(explained.value.map, linear.weight(1) * (image - images().mean(0)))
    assert explained.value.completeness_error < 1e-9
    assert explained.evaluations == method.evaluations(linear_comparing)  # no path errs, so none is refined


@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY])
@pytest.mark.parametrize("versus", [None, 3, Contrast.REST])
@pytest.mark.parametrize("method", COMPLETE, ids=repr)
def test_the_completeness_error_is_against_the_mean_score_over_the_references(comparing, image, method, score, versus):
    if isinstance(method, DeepLift) and (score is Score.PROBABILITY or versus is Contrast.REST):
        pytest.skip("no rule")
    logits = comparing.logits(torch.cat([image[None], images()]))
    values = logits if score is Score.LOGIT else logits.softmax(1)
    scores = values[:, 1]
    if versus == 3:
        scores = scores - values[:, 3]
    elif versus is Contrast.REST:
        rest = values[:, [0, 2, 3, 4]]
        scores = scores - (rest.logsumexp(1) if score is Score.LOGIT else rest.sum(1))
    case = Case(comparing, image, 1, score, float(scores[0]), versus=versus)
    found = explain(Job(method, case)).value
    mean = float(scores[1:].mean())
    assert found.baseline_score == pytest.approx(mean)
    expected = abs(float(found.map.sum()) - (case.known_score - mean)) / abs(case.known_score - mean)
    assert found.completeness_error == pytest.approx(expected, abs=1e-9)
    if not isinstance(method, GradientShap) and getattr(method, "steps", None) is None:
        assert found.completeness_error <= 0.05


@pytest.mark.parametrize("rule", list(PathRule))
def test_the_path_is_the_mean_of_the_paths_from_each_reference(comparing, image, rule):
    """Each reference as the only one, by the same fixed nodes, or by all nodes of the first round."""
    case = case_of(comparing, image, budget=33)  # 4 x 8 + 1: no bisection
    for options, alone in (({"steps": 7}, 7), ({}, 8)):
        found = explain(Job(IntegratedGradients(REFERENCES, rule=rule, **options), case))
        maps = []
        for reference in images():
            single = Classifier(small_cnn(), NORMALIZATION, SIZE)
            single.compare_with(reference[None])
            maps.append(explain(Job(IntegratedGradients(REFERENCES, rule=rule, **options), case_of(single, image, budget=9))))
        torch.testing.assert_close(found.value.map, sum(one.value.map for one in maps) / 4)
        assert found.evaluations == (4 * alone + (4 if rule is PathRule.IDGI else 0) if options else 33)


def test_paths_are_refined_until_each_is_complete_and_never_beyond_the_budget(comparing, image):
    exact = explain(Job(IntegratedGradients(REFERENCES, steps=300), case_of(comparing, image))).value.map
    coarse, fine = (
        explain(Job(IntegratedGradients(REFERENCES, e), case_of(comparing, image, budget=600))) for e in (0.5, 0.01)
    )
    assert coarse.evaluations < fine.evaluations < 600 and fine.value.completeness_error <= 0.01
    assert float((fine.value.map - exact).norm()) < 0.3 * float((coarse.value.map - exact).norm())
    short = explain(Job(IntegratedGradients(REFERENCES, 1e-12), case_of(comparing, image, budget=70)))
    assert short.evaluations == 70 and short.value.completeness_error > 1e-12


def test_the_errors_of_two_paths_do_not_cancel():
    class Odd(nn.Module):
        def forward(self, x):
            score = (20 * x[:, 0, 0, 0]).tanh() + x[:, 0, 0, 1]
            return torch.stack([score, -score], 1)

    classifier = Classifier(Odd(), NORMALIZATION, SIZE)
    references = torch.zeros(2, 3, *SIZE)
    references[:, 0, 0, 0] = torch.tensor([1.0, -1.0])
    references[:, 0, 0, 1] = -5
    classifier.compare_with(references)
    case = Case(classifier, torch.zeros(3, *SIZE), 0, known_score=0.0)
    found = explain(Job(IntegratedGradients(REFERENCES, 0.01), case))
    assert found.evaluations > 2 * 8 + 1
    assert abs(float(found.value.map[0, 0, 0])) < 0.1


@pytest.mark.parametrize("count", [1, 6, 7, 13, 25, 50])
def test_many_paths_start_with_about_fifty_rows(classifier, image, count):
    classifier.compare_with(images(count))
    method = IntegratedGradients(REFERENCES, 1.0)
    least = method.evaluations(classifier)
    assert count < least <= 51
    assert explain(Job(method, case_of(classifier, image, budget=least))).evaluations == least


def test_gradient_shap_is_its_naive_replica(comparing, image):
    case, total = case_of(comparing, image, seed=3), torch.zeros_like(image)
    offset, reference = case.draw(Draw.PATH, 0).random(), in_turn(case)
    for k in range(10):
        x = torch.lerp(reference(k), image, (k + offset) / 10).requires_grad_()
        (gradient,) = torch.autograd.grad(comparing._model(x[None])[0, 1], x)
        total += gradient * (image - reference(k)) / 10
    explained = explain(Job(GradientShap(REFERENCES, samples=10), case), pack=3)
    torch.testing.assert_close(explained.value.map, total)
    assert explained.evaluations == 10  # no reference is scored again


def test_deep_lift_is_the_mean_over_the_references(comparing, image):
    found = explain(Job(DeepLift(REFERENCES), case_of(comparing, image)), pack=3)
    maps = []
    for reference in images():
        single = Classifier(small_cnn(), NORMALIZATION, SIZE)
        single.compare_with(reference[None])
        maps.append(explain(Job(DeepLift(REFERENCES), case_of(single, image))).value.map)
    torch.testing.assert_close(found.value.map, sum(maps) / 4)
    assert found.evaluations == 8 and not torch.allclose(maps[0], maps[1])


def test_occlusion_hides_each_window_behind_the_next_reference(comparing, image):
    case = case_of(comparing, image, seed=3)
    left, covered, reference = torch.zeros(SIZE).double(), torch.zeros(SIZE), in_turn(case)
    for index, (rows, columns) in enumerate(_windows(*SIZE)):
        hidden = image.clone()
        hidden[:, rows, columns] = reference(index)[:, rows, columns]
        left[rows, columns] += comparing.logits(hidden[None])[0, 1]
        covered[rows, columns] += 1
    found = explain(Job(Occlusion(REFERENCES), case)).value.map[0]
    torch.testing.assert_close(found, case.known_score - left / covered)


def test_rise_hides_each_mask_behind_the_next_reference(comparing, image):
    case = case_of(comparing, image, seed=3)
    masks = torch.stack([random_mask(case, number) for number in range(20)])
    hidden = torch.stack([in_turn(case)(number) for number in range(20)])
    scores = comparing.logits(hidden + masks * (image - hidden))[:, 1]
    expected = (masks * scores[:, None, None, None]).sum(0) / masks.sum(0) - scores.mean()
    torch.testing.assert_close(explain(Job(Rise(REFERENCES, 20), case)).value.map, expected)


def test_the_values_of_several_games_are_those_of_their_mean():
    """Two games of five players, every second pair of coalitions from each: exact values by enumeration of all orders."""
    draw = np.random.default_rng(0)
    games = [dict(zip(itertools.product((0, 1), repeat=5), draw.normal(size=32), strict=True)) for _ in range(2)]
    nothing, whole = (np.array([game[(one,) * 5] for game in games]) for one in (0, 1))
    exact = np.zeros(5)
    for order in itertools.permutations(range(5)):
        shown = [0] * 5
        for player in order:
            before = [game[tuple(shown)] for game in games]
            shown[player] = 1
            exact[player] += np.mean([game[tuple(shown)] - b for game, b in zip(games, before, strict=True)]) / 120
    coalitions = shapley_coalitions(5, 40_000, np.random.default_rng(1))
    turn = np.arange(40_000) // 2 % 2
    scores = np.array([games[t][tuple(map(int, one))] for t, one in zip(turn, coalitions, strict=True)])
    totals = whole - nothing
    found = fitted(*paired(coalitions, scores - nothing[turn], totals[turn])).values + totals.mean() / 5
    assert np.abs(found - exact).max() < 0.05 and found.sum() == pytest.approx((whole - nothing).mean())


def test_kernel_shap_and_lime_hide_behind_references_in_turn(comparing, image, monkeypatch):
    """What hidden pixels show in each row, whole pairs behind the same reference."""
    case, seen = case_of(comparing, image, seed=3), []
    evaluate = comparing.evaluate

    def watched(inputs, *arguments, **options):
        seen.extend(inputs.clone())
        return evaluate(inputs, *arguments, **options)

    comparing.evaluate = watched
    for method, skipped, step in ((KernelShap(REFERENCES, samples=9), 1, 2), (Lime(REFERENCES, samples=9), 0, 1)):
        seen.clear()
        explained = explain(Job(method, case))
        assert explained.evaluations == len(seen) == method.evaluations(comparing) == 9 + skipped
        for number, row in enumerate(seen[skipped:]):
            mine, hidden = row != image, in_turn(case)(number // step)
            assert torch.equal(row[mine], hidden[mine])
        assert any((row != image).any() for row in seen)


def test_one_reference_is_a_baseline_like_any_other(comparing, image):
    """References that are the black image: every method gives the map of baseline=black."""
    comparing.compare_with(Baseline.BLACK.images(case_of(comparing, image)))
    for method in COMPARING:
        options = {"samples": 20} if "samples" in {field.name for field in fields(method)} else {}
        found, expected = (
            explain(Job(method(baseline=one, **options), case_of(comparing, image))).value.map
            for one in (REFERENCES, Baseline.BLACK)
        )
        torch.testing.assert_close(found, expected)


def test_in_company_maps_are_those_made_alone(comparing, image):
    other = NORMALIZATION(torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    jobs = [Job(method(baseline=REFERENCES), case_of(comparing, one, seed=5)) for method in COMPARING for one in (image, other)]
    sizes = watched_passes(comparing)
    together = Engine(comparing, 8).results(jobs)
    assert max(sizes) == 8
    for job, found in zip(jobs, together, strict=True):
        torch.testing.assert_close(found.value.map, explain(job, pack=5).value.map)


@pytest.mark.parametrize("method", COMPARING)
def test_the_order_of_the_references_is_the_seeds(comparing, image, method):
    turns = {tuple(map(REFERENCES.turns(case_of(comparing, image, seed=seed)), range(8))) for seed in range(9)}
    assert len(turns) > 1 and all(sorted(one[:4]) == [0, 1, 2, 3] and one[:4] == one[4:] for one in turns)
    again = [explain(Job(method(baseline=REFERENCES), case_of(comparing, image, seed=4))).value.map for _ in range(2)]
    assert torch.equal(*again)


CONFIG = {"classifier": {"architecture": "model.py"}, "preprocessing": {"resize": 32, "crop": 32}}


def service_of(references, **limits):
    settings = Settings.model_validate(CONFIG | {"explanations": {"limits": limits}})
    classifier = Classifier(small_cnn().float(), settings.preprocessing.normalization, settings.preprocessing.size)
    if references:
        classifier.compare_with(torch.randn(references, 3, 32, 32))
    return Service(classifier, [], settings, {"name": "small", "version": "1.0"}, "0" * 64)


def test_a_client_compares_with_the_archives_references():
    service = service_of(3)
    fields = EXPLANATION | {"method": b"all", "baseline": b"references", "samples": b"20"}
    (answer,) = answers(service, asked(fields))
    told = json.loads(answer.body)
    assert answer.status == 200, told
    compared = [one for one in told["explanations"] if "baseline" in one["parameters"]]
    assert len(compared) == len(COMPARING) and {one["parameters"]["baseline"] for one in compared} == {"references"}
    scores = {round(one["baseline_score"], 4) for one in compared if one["baseline_score"] is not None}
    assert len(scores) == 1


def test_without_references_it_is_a_400_that_names_what_is_allowed_and_is_not_listed():
    alone, with_some = service_of(0), service_of(2)
    (answer,) = answers(alone, asked(EXPLANATION | {"method": b"occlusion", "baseline": b"references"}))
    assert answer.status == 400
    message = json.loads(answer.body)["message"]
    assert "references" in message and "allowed: black, white, mean, blur, noise" in message
    listed = [
        service._planner.report({"name": "a", "version": "1"})["parameters"]["baseline"] for service in (alone, with_some)
    ]
    assert ["references" in one["allowed"] for one in listed] == [False, True]


@pytest.fixture
def weights(tmp_path):
    torch.save(mobilenet().state_dict(), tmp_path / "w.pth")
    return ["--arch", "mobilenet_v3_small", "--weights", tmp_path / "w.pth"]


def test_an_archive_brings_its_references(archive, weights, tmp_path):
    folder = tmp_path / "shown"
    (folder / "cat").mkdir(parents=True)
    for number in range(3):
        (folder / "cat" / f"{number}.jpg").write_bytes(picture(number))
    (folder / ".hidden").write_text("no picture")
    plain = Archive.load(archive(*weights))
    loaded = Archive.load(archive(*weights, "--references", folder))
    references = loaded.classifier.references
    assert plain.classifier.references is None and references is not None and references.inputs.shape == (3, 3, 32, 32)
    torch.testing.assert_close(references.logits, loaded.classifier.logits(references.inputs))
    assert plain.digest != loaded.digest


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.jpg": picture(), "b.jpg": b"GIF89a no picture"}, "references/b.jpg: these 17 bytes are not an image"),
        ({f"{n}.png": picture(n, (8, 8), "PNG") for n in range(MOST_REFERENCES + 1)}, "51 references; allowed: at most 50"),
    ],
    ids=["undecodable", "many"],
)
def test_what_cannot_be_compared_with_is_refused(archive, weights, tmp_path, files, reason):
    folder = tmp_path / "shown"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=reason):
        archive(*weights, "--references", folder)
    assert not (tmp_path / "store").exists()


def test_a_folder_without_pictures_is_refused(archive, weights, tmp_path, capsys):
    with pytest.raises(SystemExit):
        archive(*weights, "--references", tmp_path / "nowhere")
    assert "no folder that holds pictures" in capsys.readouterr().err


def test_a_reference_without_a_finite_score_is_refused(classifier):
    with torch.no_grad():
        classifier._model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits of reference 1"):
        classifier.compare_with(images())
