"""One class rather than another: every method explains the difference as if the network itself had it as an output."""

from dataclasses import replace

import pytest
import torch
from conftest import NORMALIZATION, SIZE, WITHOUT_ATTENTION, SmallCnn, small_cnn
from torch import nn

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Attribution, Case
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.gradient import InputXGradient, Sensitivity
from torchserve_explain.attribution.methods.lrp import LayerwiseRelevance
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.quality import Deletion, Infidelity, Measurement
from torchserve_explain.attribution.rows import Contrast, Known, Score
from torchserve_explain.attribution.scores import resolved, score_of
from torchserve_explain.errors import Unsupported

TARGET, OTHER = 1, 3
CONTRASTS = [OTHER, Contrast.RUNNER_UP, Contrast.REST]
QUICK = {"samples": 12}


def naive(logits, score, versus):
    """The difference for logits [n, classes], written out."""
    values = logits if score is Score.LOGIT else logits.exp() / logits.exp().sum(1, keepdim=True)
    others = [0, 2, 3, 4]
    if isinstance(versus, int):
        return values[:, TARGET] - values[:, versus]
    together = values[:, others].sum(1) if score is Score.PROBABILITY else values[:, others].exp().sum(1).log()
    return values[:, TARGET] - together


class WithDifference(SmallCnn):
    """The small network with one more output: the difference itself."""

    question = (Score.LOGIT, OTHER)

    def forward(self, x):
        logits = super().forward(x)
        return torch.cat([logits, naive(logits, *self.question)[:, None]], 1)


def case_of(classifier, image, versus, score=Score.LOGIT, target=TARGET, **options):
    logits = classifier.logits(image[None])[0]
    versus = resolved(versus, logits, target)
    return Case(
        classifier, image, target, score, score_of(classifier.head, logits, target, score, versus), versus=versus, **options
    )


def explained(*jobs, pack=16):
    return Engine(jobs[0].case.classifier, pack).results(jobs)


def quick(name):
    method = METHODS[name]
    return method(**{key: value for key, value in QUICK.items() if key in method.__dataclass_fields__})


@pytest.mark.parametrize("versus", CONTRASTS)
@pytest.mark.parametrize("score", list(Score))
def test_the_score_is_the_difference(classifier, image, score, versus):
    logits = classifier.logits(image[None])
    best = max((index for index in range(5) if index != TARGET), key=lambda index: float(logits[0, index]))
    expected = naive(logits, score, best if versus is Contrast.RUNNER_UP else versus)
    found = classifier.evaluate(torch.stack([image, image]), [TARGET, 0], [score, Score.LOGIT], versus=[versus, None]).scores
    torch.testing.assert_close(found, torch.stack([expected[0], logits[0, 0]]))
    assert resolved(Contrast.RUNNER_UP, logits[0], TARGET) == best
    assert score_of(classifier.head, logits[0], TARGET, score, versus) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
@pytest.mark.parametrize(("score", "versus"), [(s, v) for s in Score for v in (OTHER, Contrast.REST)])
def test_every_method_explains_the_difference_as_an_output_of_its_own(image, name, score, versus):
    torch.manual_seed(0)
    method, model = quick(name), WithDifference().double()
    model.load_state_dict(small_cnn().state_dict())
    model.question = (score, versus)
    plain, widened = (Classifier(one, NORMALIZATION, SIZE) for one in (small_cnn(), model))
    job = Job(method, case_of(plain, image, versus, score, budget=17))
    if not method.explains_probability and (score, versus) != (Score.LOGIT, OTHER):
        with pytest.raises(Unsupported, match="no rule"):
            explained(job)
        return
    if name == "lrp":  # which would share the difference out anew: see below
        return
    own = float(widened.logits(image[None])[0, 5])
    (found,), (expected,) = explained(job), explained(Job(method, Case(widened, image, 5, known_score=own, budget=17)))
    torch.testing.assert_close(found.value.map, expected.value.map, rtol=1e-6, atol=1e-9)
    assert job.case.known_score == pytest.approx(own) and found.evaluations == expected.evaluations
    assert found.value.baseline_score == pytest.approx(expected.value.baseline_score)
    assert found.value.completeness_error == pytest.approx(expected.value.completeness_error, abs=1e-9)


def test_the_relevance_of_a_difference_is_that_of_the_target_less_that_of_the_other(classifier, image):
    both = [Job(LayerwiseRelevance(), case_of(classifier, image, None, target=target)) for target in (TARGET, OTHER)]
    target, other = (one.value.map for one in explained(*both))
    (difference,) = explained(Job(LayerwiseRelevance(), case_of(classifier, image, OTHER)))
    torch.testing.assert_close(difference.value.map, target - other)


@pytest.mark.parametrize("method", [IntegratedGradients(), IntegratedGradients(steps=2), GradientShap(samples=3)])
def test_a_path_on_a_linear_model_is_the_weights_difference_times_the_step(linear, linear_classifier, image, method):
    (found,) = explained(Job(method, case_of(linear_classifier, image, OTHER)))
    step = image - NORMALIZATION(torch.zeros_like(image))
    torch.testing.assert_close(found.value.map, (linear.weight(TARGET) - linear.weight(OTHER)) * step)
    assert found.value.completeness_error < 1e-9


def test_against_the_rest_a_linear_model_has_the_softmax_of_the_others(linear, linear_classifier, image):
    (found,) = explained(Job(InputXGradient(), case_of(linear_classifier, image, Contrast.REST)))
    others = [0, 2, 3]
    shares = linear_classifier.logits(image[None])[0, others].softmax(0)
    rest = sum(share * linear.weight(index) for share, index in zip(shares, others, strict=True))
    torch.testing.assert_close(found.value.map, image * (linear.weight(TARGET) - rest))


@pytest.mark.parametrize("baseline", [Baseline.BLACK, Baseline.BLUR])
@pytest.mark.parametrize("versus", CONTRASTS)
@pytest.mark.parametrize("score", list(Score))
def test_integrated_gradients_is_complete_for_the_difference(classifier, image, baseline, versus, score):
    case = case_of(classifier, image, versus, score)
    (found,) = explained(Job(IntegratedGradients(baseline=baseline, max_error=1e-3), case))
    start = naive(classifier.logits(baseline.image(case)[None]), score, case.versus)
    assert found.value.baseline_score == pytest.approx(float(start))
    assert float(found.value.map.sum()) == pytest.approx(case.known_score - float(start), rel=1e-3)


def test_grad_cam_of_a_known_head_is_that_of_the_difference_of_its_weights(image):
    torch.manual_seed(0)
    convolution, head = nn.Conv2d(3, 6, 3, stride=4), nn.Linear(6, 4)
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    features = convolution(image[None]).detach()[0]
    weight = (head.weight[TARGET] - head.weight[OTHER]).detach()
    cam = (weight[:, None, None] * features).sum(0).relu() / features[0].numel()
    expected = nn.functional.interpolate(cam[None, None], SIZE, mode="bilinear")[0]
    (found,) = explained(Job(GradCam(), case_of(Classifier(model, NORMALIZATION, SIZE), image, OTHER)))
    torch.testing.assert_close(found.value.map, expected)


def test_differences_of_all_sorts_share_passes_and_stay_apart(classifier, image):
    questions = [(v, s, t) for v in [None, *CONTRASTS, 4] for s in Score for t in (TARGET, 2)]
    jobs = [
        Job(method, case_of(classifier, image, versus, score, target))
        for method in (Sensitivity(), GradCam(), IntegratedGradients(steps=3))
        for versus, score, target in questions
    ]
    for job, shared in zip(jobs, explained(*jobs, pack=64), strict=True):
        (alone,) = explained(job)
        torch.testing.assert_close(shared.value.map, alone.value.map)


def test_qualities_are_those_of_the_difference(classifier, image):
    case = case_of(classifier, image, OTHER)
    job = Job(InputXGradient(), case)
    (attribution,) = explained(job)
    curve, plain = (
        Engine(classifier, 8).results([Measurement(Deletion(), Job(job.method, one), attribution.value)])[0].value.curve
        for one in (case, case_of(classifier, image, None))
    )
    logits = classifier.logits(image[None])[0]
    assert curve is not None and plain is not None
    assert curve[0] == pytest.approx(float(logits[[TARGET, OTHER]].softmax(0)[0]), rel=1e-5)
    assert plain[0] == pytest.approx(float(logits.softmax(0)[TARGET]), rel=1e-5)


def test_infidelity_is_measured_against_the_difference(linear, linear_classifier, image):
    exact = Attribution(linear.weight(TARGET) - linear.weight(OTHER))
    good, bad = (
        Engine(linear_classifier, 8).results([Measurement(Infidelity(), Job(Sensitivity(), case), exact)])[0].value.value
        for case in (case_of(linear_classifier, image, versus) for versus in (OTHER, None))
    )
    assert good == pytest.approx(0, abs=1e-12) and bad > 1e-6


def test_a_row_that_is_known_of_another_score_is_evaluated_anew(classifier, image):
    plain, compared = case_of(classifier, image, None), case_of(classifier, image, OTHER)
    evaluation = classifier.evaluate(image[None], [TARGET], [Score.LOGIT], gradient=True)
    known = Known(evaluation, image, TARGET, Score.LOGIT, 0.0)
    fresh, kept = explained(*(Job(Sensitivity(), case) for case in (compared, replace(compared, known=known))))
    torch.testing.assert_close(kept.value.map, fresh.value.map)
    (reused,) = explained(Job(Sensitivity(), replace(plain, known=known)))
    assert reused.seconds == 0.0 and not torch.allclose(reused.value.map, kept.value.map)
