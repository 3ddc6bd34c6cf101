"""The engine's promises: a job's map is its own, whoever shares its passes and whatever goes wrong beside it."""

import random

import pytest
import torch
from conftest import NORMALIZATION, SIZE, WITHOUT_ATTENTION, around_passes, small_cnn, watched_passes

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import succeeded
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Attribution, Case, Method, Smoothing
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.biased_layer import BiasedLayer, Reduction
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.gradient import Sensitivity
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.smoothing import SmoothingKind
from torchserve_explain.attribution.rows import Score
from torchserve_explain.errors import AttributionError, DeadlinePassed, NotFinite, OutOfMemory


def state_of(module):
    return {
        "tensors": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "training": [m.training for m in module.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
        "forwards": ["forward" in vars(m) for m in module.modules()],
        "gradients": [p.grad for p in module.parameters()],
        "trained": [p.requires_grad for p in module.parameters()],
    }


def assert_same_state(before, after):
    torch.testing.assert_close(before.pop("tensors"), after.pop("tensors"), rtol=0, atol=0)
    assert before == after


def mixed_jobs(classifier):
    """Jobs of every kind: methods, targets, scores, images, smoothing, rules, layers, draws."""
    generator = torch.Generator().manual_seed(4)
    images = [NORMALIZATION(torch.rand(3, *SIZE, generator=generator, dtype=torch.float64)) for _ in range(3)]
    methods = [method() for method in WITHOUT_ATTENTION.values()]
    methods += [IntegratedGradients(steps=7, baseline=Baseline.BLUR), BiasedLayer(0.1, Reduction.RELEVANCE), GradCam("stem")]
    jobs = []
    for number, method in enumerate(methods):
        score = Score.PROBABILITY if number % 3 == 2 and method.explains_probability else Score.LOGIT
        image = images[number % 3]
        logits = classifier.logits(image[None])[0]
        known = float((logits if score is Score.LOGIT else logits.softmax(0))[number % 5])
        jobs.append(Job(method, Case(classifier, image, number % 5, score, known, seed=number)))
    smoothed = [Job(job.method, job.case, Smoothing(SmoothingKind.VARGRAD, 3)) for job in jobs[:4]]
    return jobs + smoothed + [Job(GradientShap(samples=3, stdev=0.1, baseline=Baseline.NOISE), jobs[0].case)]


@pytest.mark.parametrize("pack", [1, 5, 64])
def test_a_batch_answers_each_job_as_if_it_were_alone(classifier, pack):
    jobs = mixed_jobs(classifier)
    together = Engine(classifier, pack).results(jobs)
    for job, found in zip(jobs, together, strict=True):
        (alone,) = Engine(classifier, 16).results([job])
        torch.testing.assert_close(found.value.map, alone.value.map, rtol=1e-7, atol=1e-9)
        assert found.evaluations == alone.evaluations
        assert found.value.completeness_error == pytest.approx(alone.value.completeness_error, abs=1e-9)


def test_the_order_of_the_batch_does_not_matter(classifier):
    jobs = mixed_jobs(classifier)
    order = random.Random(0).sample(range(len(jobs)), len(jobs))
    straight = Engine(classifier, 8).results(jobs)
    shuffled = Engine(classifier, 8).results([jobs[i] for i in order])
    for place, i in enumerate(order):
        torch.testing.assert_close(shuffled[place].value.map, straight[i].value.map, rtol=1e-7, atol=1e-9)


def test_the_same_seed_gives_the_same_map_and_another_seed_another(classifier, image):
    def shap(seed):
        job = Job(GradientShap(samples=4, stdev=0.1), Case(classifier, image, 0, known_score=0.0, seed=seed))
        return Engine(classifier, 8).results([job])[0].value.map

    assert torch.equal(shap(1), shap(1))
    assert not torch.allclose(shap(1), shap(2))


def test_rows_of_different_jobs_share_passes(classifier):
    jobs = [job for job in mixed_jobs(classifier) if isinstance(job.method, Sensitivity) and job.smoothing is None] * 6
    sizes = watched_passes(classifier)
    Engine(classifier, 4).run(jobs)
    assert sizes == [4, 2]


def test_the_module_given_is_never_touched_and_the_served_one_comes_back(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    given = state_of(model)
    classifier = Classifier(model.train(), NORMALIZATION, SIZE)
    model.eval()
    served = state_of(classifier._model)
    Engine(classifier, 8).run(mixed_jobs(classifier))
    assert_same_state(served, state_of(classifier._model))
    assert_same_state(given, state_of(model))


def test_the_served_model_comes_back_after_an_exception(classifier):
    served, jobs = state_of(classifier._model), mixed_jobs(classifier)
    engine = Engine(classifier, 8)
    broken = [one._model.head.register_forward_hook(lambda *_: 1 / 0) for one in (classifier, classifier.aside)]
    outcomes = engine.run(jobs)
    for hook in broken:
        hook.remove()
    assert all(isinstance(outcome, AttributionError) for outcome in outcomes)
    assert_same_state(served, state_of(classifier._model))


class Broken(Method):
    """Asks for a row, then fails."""

    def evaluations(self, classifier):
        return 1

    def attribute(self, case):
        yield [case.rows(1, lambda *_: case.input[None], lambda *_: None)]
        raise KeyError("a fault")


class BrokenReduction(Broken):
    def attribute(self, case):
        yield [case.rows(2, lambda start, stop: case.input.expand(stop - start, -1, -1, -1), lambda *_: 1 / 0)]
        raise AssertionError("not reached")


@pytest.mark.parametrize("method", [Broken(), BrokenReduction()], ids=["method", "reduction"])
def test_a_failing_job_takes_no_neighbour_with_it(classifier, image, method):
    case = Case(classifier, image, 0, known_score=0.0)
    before, failed, after = Engine(classifier, 8).run([Job(Sensitivity(), case), Job(method, case), Job(Sensitivity(), case)])
    assert isinstance(failed, AttributionError)
    assert torch.equal(succeeded(before).value.map, succeeded(after).value.map)


def limited(classifier, rows):
    """Let a classifier run out of memory beyond a number of rows, as a device does; return the sizes it managed."""
    logits, managed = classifier.logits, []

    def fits(inputs):
        if len(inputs) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        managed.append(len(inputs))

    around_passes(classifier, lambda evaluate, inputs, *a, **o: (fits(inputs), evaluate(inputs, *a, **o))[1])
    classifier.logits = lambda inputs: (fits(inputs), logits(inputs))[1]
    return managed


def test_out_of_memory_halves_the_pack_and_loses_no_row(classifier):
    jobs = mixed_jobs(classifier)
    expected = Engine(classifier, 16).results(jobs)
    managed = limited(classifier, 3)
    engine = Engine(classifier, 16)
    for found, one in zip(engine.results(jobs), expected, strict=True):
        torch.testing.assert_close(found.value.map, one.value.map, rtol=1e-7, atol=1e-9)
    assert max(managed) <= 3 and engine.pack <= 3


def test_out_of_memory_at_one_row_is_told_to_each_job(classifier, image):
    limited(classifier, 0)
    outcomes = Engine(classifier, 4).run([Job(Sensitivity(), Case(classifier, image, 0))] * 2)
    assert all(isinstance(outcome, OutOfMemory) for outcome in outcomes)


def test_predictions_survive_out_of_memory(classifier, image):
    expected = classifier.logits(torch.stack([image] * 5))
    limited(classifier, 2)
    torch.testing.assert_close(Engine(classifier, 8).logits([image] * 5), expected)


def test_cheap_jobs_are_answered_before_the_deadline_ends_the_others(classifier, image):
    ticks = iter(range(10**6))
    engine = Engine(classifier, 4, clock=lambda: float(next(ticks)))
    case = Case(classifier, image, 0, known_score=0.0)
    long, short = engine.run([Job(IntegratedGradients(steps=400), case), Job(GradCam(), case)], deadline=20)
    assert isinstance(long, DeadlinePassed)
    assert float(succeeded(short).value.map.max()) > 0
    assert next(ticks) < 30  # it stopped in time


def test_work_between_passes_is_held_to_the_deadline_too(classifier, image):
    now = [0.0]

    class Slow(Method):
        def attribute(self, case):
            now[0] += 7  # such as cutting the image into segments
            yield [case.rows(1, lambda *_: case.input[None], lambda *_: None)]
            return Attribution(torch.zeros_like(case.input))

    engine = Engine(classifier, 4, clock=lambda: now[0])
    jobs = [Job(Slow(), Case(classifier, image, 0)) for _ in range(9)]
    outcomes = engine.run(jobs, deadline=20)
    assert sum(isinstance(outcome, DeadlinePassed) for outcome in outcomes) >= 6 and now[0] <= 27


def test_one_slow_batch_does_not_refuse_the_next(classifier, image):
    times = iter([0.0, 50.0])  # the first batch's only pass takes 50 seconds, all later ones none
    engine = Engine(classifier, 4, clock=lambda: next(times, 50.0))
    job = Job(Sensitivity(), Case(classifier, image, 0, known_score=0.0))
    first, later = (succeeded(engine.run([job], deadline)[0]) for deadline in (60.0, 60.0))
    assert torch.equal(first.value.map, later.value.map)


def test_a_model_that_answers_nan_is_not_explained(image):
    model = small_cnn()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    classifier = Classifier(model, NORMALIZATION, SIZE)
    (outcome,) = Engine(classifier, 4).run([Job(IntegratedGradients(), Case(classifier, image, 0))])
    assert isinstance(outcome, NotFinite)


def test_memory_does_not_grow_with_steps_or_samples(classifier, image):
    """No tensor as large as a map per step or sample is alive while the rows are reduced."""
    import gc

    alive = []

    def count(*_):
        alive.append(sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[-2:] == SIZE))

    peaks = []
    for steps in (20, 100):
        alive.clear()
        hook = classifier._model.head.register_forward_hook(count)
        job = Job(IntegratedGradients(steps=steps), Case(classifier, image, 0), Smoothing(SmoothingKind.SMOOTHGRAD, 2))
        Engine(classifier, 20).run([job])
        hook.remove()
        peaks.append(max(alive))
    assert peaks[0] == peaks[1]
