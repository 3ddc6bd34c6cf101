"""A pass that is interrupted between its layers: who may, what it costs, and that nobody's numbers change."""

import time

import pytest
import torch
from conftest import NORMALIZATION, SIZE, watched_passes
from test_stepping import asking, ticking

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Piece, Result, results, succeeded
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.interruption import interrupted
from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.attribution.policy import AGEING
from torchserve_explain.attribution.rows import Score
from torchserve_explain.errors import AttributionError


class Arriving:
    """Adds work to an engine while a pass of it is under way, the first time it is asked."""

    def __init__(self, classifier, pack, *works):
        self.works, self.tasks = works, []
        self.engine = Engine(classifier, pack, self)

    def __call__(self):
        if self.engine._passes._under_way is not None and not self.tasks:
            self.tasks = [self.engine.add(work) for work in self.works]


@pytest.mark.parametrize("gradient", [False, True])
def test_a_short_request_that_arrives_during_a_pass_is_answered_within_it(classifier, image, gradient):
    order, other = [], image.flip(-1)
    note = lambda name: lambda _start, evaluation: order.append((name, evaluation))  # noqa: E731
    arriving = Arriving(classifier, 4, Piece(asking(other, 1, gradient=gradient, consume=note("short"))))
    long = arriving.engine.add(Piece(asking(image, 4, gradient=True, consume=note("long"))))
    while long.outcome is None:
        arriving.engine.step()
    (first, short), (second, rest) = order
    assert (first, second) == ("short", "long") and arriving.tasks[0].outcome.value == 1
    alone = classifier.evaluate(image.expand(4, -1, -1, -1), [0] * 4, [Score.LOGIT] * 4, gradient=True)
    assert torch.equal(rest.gradients, alone.gradients) and torch.equal(rest.scores, alone.scores)
    expected = classifier.evaluate(other[None], [0], [Score.LOGIT], gradient=gradient)
    assert torch.equal(short.scores, expected.scores)
    assert not gradient or torch.equal(short.gradients, expected.gradients)


def test_every_method_is_itself_beside_a_pass_that_it_interrupts(classifier, image):
    """Rules, captured layers and all: what runs aside does not reach the pass that waits, nor the other way round."""
    from test_architectures import case_of

    from torchserve_explain.attribution.job import Job

    case = case_of(classifier, image, 1)
    one_row = [method() for method in METHODS.values() if method().evaluations(classifier) <= 2 and not method().adaptive]
    assert len(one_row) > 8
    jobs = [Job(method, case) for method in one_row if method.unsupported(classifier) is None]
    alone = Engine(classifier, 4).results(jobs)
    arriving = Arriving(classifier, 4, *jobs)
    long = arriving.engine.add(Piece(asking(image, 12, gradient=True)))
    while arriving.engine.in_flight:
        arriving.engine.step()
    assert isinstance(long.outcome, Result) and long.outcome.value == 12
    for job, task, expected in zip(jobs, arriving.tasks, alone, strict=True):
        torch.testing.assert_close(task.outcome.value.map, expected.value.map, msg=job.method.name)


def test_long_requests_do_not_interrupt_and_short_ones_share_passes_with_their_like_alone(classifier, image):
    sizes = watched_passes(classifier)
    arriving = Arriving(classifier, 8, Piece(asking(image, 3)))
    arriving.engine.run([Piece(asking(image, 8))])
    assert arriving.tasks[0].outcome is None
    sizes.clear()
    arriving.engine.run([Piece(asking(image, 1)), Piece(asking(image, 2)), Piece(asking(image, 4))])
    assert sizes[0] == 3 and sum(sizes[1:]) == 7  # the two short ones; the long one's and the one that had arrived


def test_short_requests_do_not_interrupt_a_pass_of_their_like(classifier, image):
    """Those that came first are answered first, and who comes meanwhile shares the next pass."""
    sizes, order = watched_passes(classifier), []
    note = lambda name: lambda _start, _evaluation: order.append(name)  # noqa: E731
    arriving = Arriving(classifier, 4, *(Piece(asking(image, 1, consume=note("later"))) for _ in range(3)))
    arriving.engine.run([Piece(asking(image, 1, consume=note("first"))) for _ in range(3)])
    assert order == ["first"] * 3
    arriving.engine.step()
    assert order == ["first"] * 3 + ["later"] * 3 and sizes == [3, 3]


def test_one_row_is_not_paused_for(classifier, image):
    """Nobody may interrupt it, and pauses between its layers would be a tenth of its time."""
    arriving = Arriving(classifier, 4, Piece(asking(image, 1)))
    arriving.engine.run([Piece(asking(image, 1, gradient=True))])
    assert not arriving.tasks


def test_a_long_request_of_a_time_of_its_own_is_not_short(classifier, image):
    """Its rows belong to a part that has to be done earlier, as with a client's own timeout."""
    order = []
    note = lambda name: lambda _start, _evaluation: order.append(name)  # noqa: E731
    arriving = Arriving(classifier, 4, Piece(asking(image, 1, consume=note("short"))))
    part = Piece(asking(image, 4, gradient=True, consume=note("long")))
    arriving.engine.run([Piece(results([part], time.monotonic() + 600))])
    assert order == ["short", "long"]


def test_an_interrupted_pass_gets_its_share_of_the_time(classifier, image):
    """Short requests without end do not starve the pass that they interrupt."""
    now, evaluated = ticking(1.0, classifier), []
    engine = Engine(classifier, 1, lambda: arrive(), lambda: now[0])

    def arrive():
        if engine._passes._under_way is not None and sum(task.outcome is None for task in evaluated) < 3:
            evaluated.append(engine.add(Piece(asking(image, 1))))

    engine.run([Piece(asking(image, 10))])
    assert AGEING - 2 <= sum(task.outcome is not None for task in evaluated) / 10 <= AGEING


def test_what_interrupts_and_fails_fails_alone(classifier, image):
    def raising(_start, _stop):
        raise KeyError("a fault")

    bad = torch.zeros(3, SIZE[0] + 1, 3, dtype=image.dtype)
    works = Piece(asking(image, 1, inputs=raising)), Piece(asking(bad, 1)), Piece(asking(image, 1))
    arriving = Arriving(classifier, 4, *works)
    long = arriving.engine.add(Piece(asking(image, 8, gradient=True)))
    while long.outcome is None:
        arriving.engine.step()
    assert succeeded(long.outcome).value == 8
    faulty, _, fine = (task.outcome for task in arriving.tasks)
    assert isinstance(faulty, AttributionError) and fine.value == 1


def test_work_that_is_dropped_during_its_pass_takes_nothing_with_it(classifier, image):
    engine = Engine(classifier, 4, lambda: engine.drop(gone) if engine._passes._under_way is not None else None)
    gone, other = engine.add(Piece(asking(image, 2))), engine.add(Piece(asking(image, 2)))
    while other.outcome is None:
        engine.step()
    assert succeeded(other.outcome).value == 2 and isinstance(gone.outcome, AttributionError) and engine.in_flight == 0


def test_layers_are_told_on_the_way_there_and_back_and_the_hooks_are_gone_afterwards(classifier, image):
    paused = []
    classifier.evaluate(image[None], [0], [Score.LOGIT], gradient=True, pause=lambda: paused.append(torch.is_grad_enabled()))
    layers = sum(next(m.parameters(recurse=False), None) is not None for m in classifier._model.modules())
    assert len(paused) == 2 * layers and all(paused)
    with interrupted(classifier._model, lambda: paused.clear()):
        pass
    classifier.logits(image[None])
    assert paused  # nothing was called any more


def test_a_pass_under_a_rule_is_not_interrupted(classifier, image):
    consumed = []

    class Rule:
        def apply(self, model):
            return model

    arriving = Arriving(classifier, 4, Piece(asking(image, 1)))
    arriving.engine.run([Piece(asking(image, 4, gradient=True, rule=Rule(), consume=lambda *_: consumed.append(1)))])
    assert consumed == [1] and not arriving.tasks


def test_a_model_whose_copy_calls_itself_is_not_interrupted(model, image):
    classifier = Classifier(model, NORMALIZATION, SIZE)
    served = classifier._model
    served.forward = lambda x: type(served).forward(served, x)  # which a copy keeps
    assert classifier.aside is None
    arriving = Arriving(classifier, 4, Piece(asking(image, 1)))
    arriving.engine.run([Piece(asking(image, 4))])
    assert not arriving.tasks
