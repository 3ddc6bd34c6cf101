"""The engine's steps: who goes first, how large a pass is, what a failure and a deadline mean, what threads do meanwhile."""

import threading
import time

import pytest
import torch
from conftest import NORMALIZATION, SIZE, around_passes, small_cnn

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Piece, background, results, side_by_side, succeeded, together
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.policy import AGEING, GROWING, MEASURED, PackLimit
from torchserve_explain.attribution.rows import Rows, Score
from torchserve_explain.errors import AttributionError, DeadlinePassed, OutOfMemory


def rows(image, count, gradient=False, consume=lambda *_: None, inputs=None, **wanted):
    def repeated(start, stop):
        return image.expand(stop - start, -1, -1, -1)

    return Rows(count, inputs or repeated, consume, 0, Score.LOGIT, gradient, **wanted)


def asking(image, *counts, **wanted):
    """A computation that asks for so many rows, one block after the other, and answers how many it got."""
    for count in counts:
        yield [rows(image, count, **wanted)]
    return sum(counts)


def ticking(seconds_a_row, classifier):
    """Let passes take time by their rows, on a clock of its own."""
    now = [0.0]

    def slow(evaluate, inputs, *arguments, **options):
        now[0] += seconds_a_row * len(inputs)
        return evaluate(inputs, *arguments, **options)

    around_passes(classifier, slow)
    return now


def test_the_least_remaining_goes_first_and_nothing_starves(classifier, image):
    """A stream of short requests passes a long one, which still gets its share of all passes."""
    ticking(1.0, classifier)
    engine, short_rows, passes = Engine(classifier, 1), [], 0
    long = engine.add(Piece(asking(image, 20)))
    while long.outcome is None:
        if not any(task.outcome is None for task in short_rows):
            short_rows.append(engine.add(Piece(asking(image, 2))))
        before = engine.passes
        engine.step()
        passes += engine.passes - before
        assert passes < 200
    assert 20 * (AGEING - 1) < passes <= 20 * AGEING  # one pass in so many was the long one's
    assert len(short_rows) >= 20 * (AGEING - 2) / 2  # the others were the short ones


def test_a_short_request_overtakes_long_ones_that_were_there_before(classifier, image):
    engine = Engine(classifier, 1)
    longs = [engine.add(Piece(asking(image, 50))) for _ in range(3)]
    for _ in range(8):
        engine.step()
    short = engine.add(Piece(asking(image, 1)))
    for _ in range(AGEING):
        engine.step()
    assert short.outcome is not None and not any(task.outcome for task in longs)


def test_an_expensive_row_counts_for_what_it_takes(classifier, image):
    """Twenty cheap rows go before three that take ten times as long, once that is known."""
    now = [0.0]

    def slow(evaluate, inputs, *arguments, **options):
        now[0] += len(inputs) * (10.0 if options["gradient"] else 1.0)
        return evaluate(inputs, *arguments, **options)

    around_passes(classifier, slow)
    engine = Engine(classifier, 1, clock=lambda: now[0])
    engine.run([Piece(asking(image, 1)), Piece(asking(image, 1, gradient=True))])
    expensive, cheap = engine.add(Piece(asking(image, 3, gradient=True))), engine.add(Piece(asking(image, 20)))
    while cheap.outcome is None:
        engine.step()
    assert expensive.outcome is None


def test_a_halved_pack_grows_again_and_never_beyond_what_was_given():
    limit = PackLimit(16)
    limit.halve(16)
    limit.halve(8)
    sizes = []
    for _ in range(3 * GROWING):
        limit.fitted()
        sizes.append(limit.rows)
    assert sizes[GROWING - 2] == 4 and sizes[GROWING - 1] == 8 and sizes[2 * GROWING - 1] == 16 and sizes[-1] == 16


def test_inputs_that_raise_fail_their_own_work_alone(classifier, image):
    def raising(_start, _stop):
        raise KeyError("a fault")

    outcomes = Engine(classifier, 8).run(
        [Piece(asking(image, 2)), Piece(asking(image, 2, inputs=raising)), Piece(asking(image, 2))]
    )
    assert [isinstance(outcome, AttributionError) for outcome in outcomes] == [False, True, False]


def test_rows_that_make_a_pass_fail_are_found_and_cost_their_neighbours_nothing(classifier, image):
    bad = torch.full_like(image, 9.0)

    def failing(evaluate, inputs, *arguments, **options):
        if bool((inputs == 9).flatten(1).all(1).any()):
            raise RuntimeError("the user's forward cannot take this")
        return evaluate(inputs, *arguments, **options)

    around_passes(classifier, failing)
    fine, guilty, other = Engine(classifier, 8).run([Piece(asking(image, 3)), Piece(asking(bad, 1)), Piece(asking(image, 2))])
    assert isinstance(guilty, AttributionError) and succeeded(other).value == 2
    assert succeeded(fine).value == succeeded(fine).evaluations == 3  # no row was counted twice


def test_a_predicted_target_is_the_likeliest_class_of_each_row(classifier, image):
    other = NORMALIZATION(torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    inputs, found = torch.stack([image, other]), []
    asked = Rows(2, lambda a, b: inputs[a:b], lambda _, evaluation: found.append(evaluation), None, gradient=True)
    Engine(classifier, 4).run([Piece(one for one in [[asked]])])
    logits = classifier.logits(inputs)
    torch.testing.assert_close(found[0].scores, logits.max(1).values)
    torch.testing.assert_close(found[0].logits, logits)
    expected = classifier.evaluate(inputs, logits.argmax(1).tolist(), [Score.LOGIT] * 2, gradient=True).gradients
    torch.testing.assert_close(found[0].gradients, expected)


def test_threads_work_while_passes_go_on(classifier, image):
    release = threading.Event()

    def blocked():
        assert release.wait(30)
        return "done"

    engine = Engine(classifier, 4)
    waiting, riding = engine.add(Piece(background(blocked))), engine.add(Piece(asking(image, 8, 8)))
    while riding.outcome is None:
        engine.step()
    assert engine.in_flight == 1
    release.set()
    while waiting.outcome is None:
        engine.step()
    assert succeeded(waiting.outcome).value == "done"


def test_a_step_with_nothing_but_threads_waits_for_the_first_or_until_it_is_woken(classifier):
    release = threading.Event()
    engine = Engine(classifier, 4)
    task = engine.add(Piece(background(release.wait, 30)))
    threading.Timer(0.3, engine.wake).start()
    began, cpu = time.perf_counter(), time.process_time()
    engine.step()
    assert time.perf_counter() - began > 0.2 and time.process_time() - cpu < 0.15  # it slept
    assert task.outcome is None
    release.set()
    engine.step()
    assert task.outcome is not None


def test_what_a_thread_raises_is_raised_where_it_was_asked_for():
    def asked():
        try:
            yield from background(int, "x")
        except ValueError as error:
            return str(error)

    (found,) = Engine(Classifier(small_cnn(), NORMALIZATION, SIZE), 4).results([Piece(asked())])
    assert "invalid literal" in found.value


def test_outcomes_are_collected_in_order_whatever_ends_first(classifier, image):
    collected, alive = [], []

    def one(number, rounds):
        alive.append(number)
        yield from asking(image, *[1] * rounds)
        alive.remove(number)
        return number

    def all_of_them():
        most = []
        counted = (watched(one(number, 5 - number % 5), most) for number in range(10))
        yield from together(counted, collected.append, width=3)
        return max(most)

    def watched(computation, most):
        most.append(len(alive) + 1)
        return computation

    (found,) = Engine(classifier, 2).results([Piece(all_of_them())])
    assert collected == list(range(10)) and found.value <= 3
    assert found.evaluations == 2 * (5 + 4 + 3 + 2 + 1)


def test_an_error_beside_others_is_an_outcome_or_is_raised_as_asked(classifier, image):
    def failing():
        yield from asking(image, 1)
        raise DeadlinePassed("too late")

    def tolerant():
        outcomes = yield from side_by_side([Piece(asking(image, 3)), Piece(failing())])
        return [type(outcome).__name__ for outcome in outcomes]

    def strict():
        yield from results([Piece(failing()), Piece(asking(image, 100))])

    engine = Engine(classifier, 4)
    kept, raised = engine.run([Piece(tolerant()), Piece(strict())])
    assert succeeded(kept).value == ["Result", "DeadlinePassed"] and isinstance(raised, DeadlinePassed)
    assert engine.rows < 100  # what ran beside it was given up


def test_a_computation_may_answer_its_deadline(classifier, image):
    now = ticking(1.0, classifier)

    def answering():
        try:
            yield from asking(image, 50)
        except DeadlinePassed:
            return "a 504 of its own"

    engine = Engine(classifier, 1, clock=lambda: now[0])
    task, other = engine.add(Piece(answering()), deadline=20.0), engine.add(Piece(asking(image, 60)))
    while task.outcome is None:
        engine.step()
    assert succeeded(task.outcome).value == "a 504 of its own"
    assert engine.passes == MEASURED + 1  # as soon as it was certain; the other one's row is the last
    while other.outcome is None:
        engine.step()
    assert succeeded(other.outcome).value == 60


def test_dropped_work_is_closed_and_asks_for_no_more_rows(classifier, image):
    closed = []

    def long():
        try:
            yield from asking(image, 1000)
        finally:
            closed.append(True)

    engine = Engine(classifier, 4)
    task = engine.add(Piece(long()))
    engine.step()
    engine.drop(task)
    engine.step()
    assert closed == [True] and engine.rows == 4 and engine.in_flight == 0


@pytest.mark.parametrize("pack", [1, 3])
def test_low_precision_never_reaches_precise_rows(image, pack):
    classifier = Classifier(small_cnn().float(), NORMALIZATION, SIZE, narrow=torch.bfloat16)
    image = image.float()
    expected = classifier.logits(image[None])[0]
    together_with_others = Engine(classifier, pack)
    for task in [together_with_others.add(Piece(asking(image, 5))) for _ in range(2)]:
        assert task.outcome is None
    assert torch.equal(together_with_others.logits([image])[0], expected)


def test_inputs_that_do_not_fit_halve_the_pack_and_fail_nobody(classifier, image):
    def made(start, stop):
        if stop - start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return image.expand(stop - start, -1, -1, -1)

    engine = Engine(classifier, 16)
    found = engine.results([Piece(asking(image, 9, inputs=made)), Piece(asking(image, 3))])
    assert [one.value for one in found] == [9, 3] and engine.pack <= 2
    assert [one.evaluations for one in found] == [9, 3]


def test_inputs_of_which_not_one_fits_fail_their_own_work_alone(classifier, image):
    def none(_start, _stop):
        raise MemoryError

    large, small = Engine(classifier, 4).run([Piece(asking(image, 2, inputs=none)), Piece(asking(image, 2))])
    assert isinstance(large, OutOfMemory) and succeeded(small).value == 2
