"""The engine: computations in flight, stepped by a host; the rows of all of them share passes.

The engine alone decides whose rows go first, how many ride in a pass, what a failing pass means, and when a deadline
is reached. A computation that fails takes none of its neighbours with it. A pass under way is interrupted, between two
layers, by the rows of who needs only few.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Call, Need, Outcome, Piece, Result, Work, logits_of, succeeded
from torchserve_explain.attribution.memory import is_out_of_memory
from torchserve_explain.attribution.policy import (
    AGEING,
    Kind,
    Paces,
    PackLimit,
    UnderWay,
    first_to_last,
    is_short,
    remaining_seconds,
)
from torchserve_explain.attribution.rows import Evaluation, Rows
from torchserve_explain.attribution.tasks import Block, RunningGroup, Slice, Task, evaluated
from torchserve_explain.attribution.threads import Threads
from torchserve_explain.errors import AttributionError, DeadlinePassed, ExplainError, OutOfMemory

log = logging.getLogger(__name__)
LATE = "out of time before the request's deadline; ask for fewer methods, steps or samples"
T = TypeVar("T")


class Engine:
    """Runs computations on one classifier with at most `pack` rows a pass. `clock` tells seconds.

    `arrivals` is called between steps and between the layers of a pass; it may add work, and drop it.
    """

    def __init__(
        self,
        classifier: Classifier,
        pack: int,
        arrivals: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.classifier = classifier
        self.passes = self.rows = 0  # so far
        self.seconds = 0.0  # spent on passes so far
        self._arrivals, self._clock = arrivals, clock
        self._aside = classifier.aside  # which is copied while no pass is under way
        self._limit, self._paces = PackLimit(pack), Paces()
        self._roots: list[Task[Any]] = []  # in order of arrival
        self._ready: deque[Task[Any]] = deque()
        self._threads = Threads()
        self._due = 0  # the passes when it was last the turn of who has waited longest
        self._under_way: UnderWay | None = None
        self._news = False  # whether anything has gone on since it was last looked for somebody who may interrupt

    @property
    def pack(self) -> int:
        """How many rows a pass may have now."""
        return self._limit.rows

    @property
    def in_flight(self) -> int:
        """How many computations have been added and not ended."""
        return len(self._roots)

    def add(self, work: Work[T], deadline: float = inf, ended: Callable[[], None] = lambda: None) -> Task[T]:
        """Take work in; its task's `outcome` is set once it has ended, and `ended` is called.

        `deadline` is a time of the engine's clock.
        """
        task = Task(work, self._clock(), deadline, ended=ended)
        self._roots.append(task)
        self._queue(task)
        return task

    def drop(self, task: Task[Any]) -> None:
        """Forget work that nobody waits for any more."""
        if task in self._roots:
            self._roots.remove(task)
            task.end(AttributionError("nobody waits for it any more"))

    def wake(self) -> None:
        """End the waiting of the step under way, or of the next; the one method that another thread may call."""
        self._threads.wake()

    def step(self) -> None:
        """Run one pass, and let go on what is ready before and after it.

        Where all wait for threads, the first of them is waited for instead, or until the engine is woken.
        """
        self._go_on()
        self._end_the_late()
        due = self.passes - self._due >= AGEING  # those that interrupt count
        order = first_to_last(self._roots, self._remaining, due)
        if order:
            self._due = self.passes if due else self._due
            self._pass(self._fill(order))
        elif not self._threads.woken and any(root.calling for root in self._roots):
            self._take_calls(inf)
        self._go_on()
        self._threads.woken = False

    def run(self, works: Sequence[Work[T]], deadline: float = inf) -> list[Outcome[T]]:
        """Return each work's result or the error that it alone met."""
        tasks = [self.add(work, deadline) for work in works]
        while any(task.outcome is None for task in tasks):
            self.step()
        return [task.outcome for task in tasks if task.outcome is not None]

    def results(self, works: Sequence[Work[T]]) -> list[Result[T]]:
        """Return each work's result; raises the first error met."""
        return [succeeded(outcome) for outcome in self.run(works)]

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the logits [n, classes] of inputs [C, H, W], on the CPU; raises OutOfMemory."""
        task = self.add(Piece(logits_of(inputs)))
        while task.outcome is None:
            self.step()
        return succeeded(task.outcome).value

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    # Going on: computations ask, and what they asked for comes back.

    def _queue(self, task: Task[Any]) -> None:
        if not task.ready and task.outcome is None:
            task.ready = True
            self._ready.append(task)

    def _go_on(self) -> None:
        """Let every task go on that has what it asked for."""
        self._arrivals()
        self._take_calls(0.0)
        while self._ready:
            task = self._ready.popleft()
            task.ready = False
            if task.outcome is None:
                self._resume(task)

    def _resume(self, task: Task[Any]) -> None:
        self._news = True
        error, task.error = task.error, None
        if not task.begun and self._clock() > task.deadline:
            error = DeadlinePassed(LATE)
        task.begun = True
        try:
            needs = next(task.computation) if error is None else task.computation.throw(error)
        except StopIteration as end:
            self._end(task, Result(end.value, task.evaluations, task.seconds))
        except Exception as raised:
            self._end(task, _as_explain_error(raised, task))
        else:
            for need in needs:
                self._guarded(task, lambda need=need: self._ask(task, need))  # type: ignore[misc]
            if not task.waits:
                self._queue(task)

    def _guarded(self, task: Task[Any], action: Callable[[], object]) -> None:
        """Do something on a task's behalf; what it raises is thrown into the task's computation."""
        try:
            action()
        except Exception as error:
            self._throw(task, error)

    def _throw(self, task: Task[Any], error: Exception) -> None:
        task.let_go()
        task.error = error
        self._queue(task)

    def _ask(self, task: Task[Any], need: Need) -> None:
        """Take down what a task needs."""
        if isinstance(need, Rows):
            if need.known is not None:
                task.spend(need.count * need.passes, need.known.seconds)
                need.consume(0, need.known.evaluation)
            elif need.count:
                task.blocks.append(Block(need))
        elif isinstance(need, Call):
            self._call(task, need)
        else:
            group = RunningGroup(need, task)
            task.groups.append(group)
            self._start(group)
            self._dismiss(task)

    def _call(self, task: Task[Any], call: Call[Any]) -> None:
        if self._clock() > task.deadline:
            raise DeadlinePassed(LATE)
        task.calls.add(call)
        self._threads.run(task, call)

    def _start(self, group: RunningGroup[Any]) -> None:
        for child in group.start(self._clock()):
            self._queue(child)

    def _dismiss(self, task: Task[Any]) -> None:
        """Forget groups that are done."""
        task.groups = [group for group in task.groups if not group.done]

    def _end(self, task: Task[Any], outcome: Outcome[Any]) -> None:
        task.end(outcome)
        if task.parent is None:
            self._roots = [root for root in self._roots if root is not task]
            task.ended()
            return
        parent = task.parent
        group = next((group for group in parent.groups if task in group.running.values()), None)
        if group is None:
            return

        def collect() -> None:
            group.end(task, outcome)
            self._start(group)

        self._guarded(parent, collect)
        self._dismiss(parent)
        if not parent.waits:
            self._queue(parent)

    # Threads.

    def _take_calls(self, wait: float) -> None:
        """Note which calls have ended, after waiting for the first of them."""
        for task, call in filter(None, self._threads.ended(wait)):
            if call in task.calls:
                task.calls.discard(call)
                if not task.waits:
                    self._queue(task)

    # Passes.

    def _end_the_late(self) -> None:
        """Tell those for which time does not suffice, as far as measured passes make it certain."""
        now = self._clock()
        for task in [task for root in self._roots for task in root.family if task.deadline < inf]:
            if (task.blocks or task.groups) and now + self._least(task) > task.deadline:
                self._throw(task, DeadlinePassed(LATE))
        self._go_on()

    def _least(self, task: Task[Any]) -> float:
        """Return the seconds that a task takes at least, at the fastest pace seen since it came."""

        def fastest(rows: Rows) -> float:
            return self._paces.of(self._kind(rows)).fastest_since(task.arrived)

        return remaining_seconds(task, fastest, self._paces.cheapest_since(task.arrived))

    def _remaining(self, task: Task[Any]) -> float:
        """Return the seconds that a task is expected to take."""
        expected = self._paces.expected
        return remaining_seconds(task, lambda rows: expected(self._kind(rows)), self._paces.cheapest())

    def _kind(self, rows: Rows) -> Kind:
        """Rows of equal kind may share a pass: they all go back or none does, by one rule, in one arithmetic."""
        low = self.classifier.narrow is not None and not rows.gradient and not rows.precise
        return rows.gradient or bool(rows.layers), rows.rule, low

    def _fill(self, order: Sequence[Task[Any]]) -> list[Slice]:
        """Fill a pack: the first waiting block decides the kind of pass, blocks of that kind ride along.

        Where it is a short request's, only other short ones' do.
        """
        alike = takewhile(lambda task: is_short(task.root), order) if is_short(order[0].root) else order
        blocks = [(task, block) for task in alike for block in task.blocks]
        kind = self._kind(blocks[0][1].rows)
        slices, free = list[Slice](), self._limit.rows
        for task, block in blocks:
            if free and self._kind(block.rows) == kind:
                slices.append(Slice(task, block, min(free, block.left)))
                free -= slices[-1].count
        return slices

    def _pass(self, slices: Sequence[Slice]) -> None:
        """Run a pass; one that fails is repeated task by task, so that only the guilty one fails."""
        try:
            made = [(part, inputs) for part in slices if (inputs := self._inputs(part)) is not None]
            if not made:
                return
            evaluation, seconds = self._evaluate([part for part, _ in made], torch.cat([inputs for _, inputs in made]))
        except Exception as error:
            failure = None if is_out_of_memory(error) else error.with_traceback(None)
        else:
            self._hand_out([part for part, _ in made], evaluation, seconds)
            return
        # Outside the handler: the exception no longer holds the pass's tensors.
        self._recover([part for part in slices if part.block in part.task.blocks], failure)

    def _inputs(self, part: Slice) -> Tensor | None:
        """Make a slice's inputs; raises where memory is short, and anything else is its task's own failure."""
        try:
            return part.inputs()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._throw(part.task, error)
            return None

    def _evaluate(self, slices: Sequence[Slice], inputs: Tensor) -> tuple[Evaluation, float]:
        """Return a pass's evaluation and its seconds, without those of passes that have interrupted it."""
        if self._under_way is not None and self._aside is not None:  # this one interrupts
            began = self._clock()
            evaluation = evaluated(self._aside, slices, inputs)
            seconds = self._clock() - began
            self._under_way.interrupted += seconds
            return evaluation, seconds
        self._under_way = pass_ = UnderWay({part.task.root for part in slices}, self._clock())
        try:
            evaluation = evaluated(self.classifier, slices, inputs, None if self._aside is None else self._let_pass)
        finally:
            self._under_way = None
        return evaluation, self._clock() - pass_.began - pass_.interrupted

    def _let_pass(self) -> None:
        """Between two layers of a pass, run the passes of those who need only few rows."""
        self._go_on()
        while (short := self._short()) and self._under_way is not None and self._under_way.yields(self._clock()):
            self._pass(self._fill(short))
            self._go_on()

    def _short(self) -> list[Task[Any]]:
        """Return the tasks that may interrupt the pass under way, in the order in which they get rows."""
        if self._under_way is None or not self._news:
            return []
        others = [root for root in self._roots if root not in self._under_way.roots]
        short = [root for root in others if is_short(root)]
        self._news = bool(order := first_to_last(short, self._remaining))
        return order

    def _hand_out(self, slices: Sequence[Slice], evaluation: Evaluation, seconds: float) -> None:
        """Give every task its rows of a pass."""
        rows = sum(part.count for part in slices)
        self.passes, self.rows, self.seconds = self.passes + 1, self.rows + rows, self.seconds + seconds
        self._limit.fitted()
        self._paces.of(self._kind(slices[0].block.rows)).learn(self._clock(), rows, seconds)
        start = 0
        for part in slices:
            own, share = evaluation.slice(start, start + part.count), seconds * part.count / rows
            if part.block in part.task.blocks:  # else another of its slices has made it fail
                self._guarded(part.task, lambda part=part, own=own, share=share: part.consume(own, share))  # type: ignore[misc]
            if not part.task.waits:
                self._queue(part.task)
            start += part.count

    def _recover(self, slices: Sequence[Slice], failure: Exception | None) -> None:
        """After a pass that failed: out of memory halves the pack, anything else is repeated task by task.

        The rows are still due; without a `failure` memory was short.
        """
        tasks, rows = list(dict.fromkeys(part.task for part in slices)), sum(part.count for part in slices)
        if failure is None:
            if self.classifier.device.type == "cuda":
                torch.cuda.empty_cache()
            self._limit.halve(rows)
            if rows == 1:
                self._throw(tasks[0], OutOfMemory("not even one row of this model fits into the memory that is left"))
        elif len(tasks) == 1:
            self._throw(tasks[0], failure)
        else:
            for task in tasks:
                self._pass([part for part in slices if part.task is task])


def _as_explain_error(error: Exception, task: Task[Any]) -> ExplainError:
    """Return an error as the outcome of a task; one that is not an ExplainError is a fault of ours and is logged."""
    if isinstance(error, ExplainError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("out of memory; send a smaller image, or try again")
    log.error("%s failed", type(task.work).__name__, exc_info=error)
    return AttributionError("the explanation failed inside the server; its log says why")
