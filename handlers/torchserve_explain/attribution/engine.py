"""The engine: computations in flight, stepped by a host; the rows of all of them share passes.

The engine alone decides whose rows go first, how many ride in a pass, what a failing pass means, and when a deadline
is reached. A computation that fails takes none of its neighbours with it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Call, Need, Outcome, Piece, Result, Work, logits_of, succeeded
from torchserve_explain.attribution.memory import is_out_of_memory
from torchserve_explain.attribution.policy import Kind, Paces, PackLimit, first_to_last, remaining_seconds
from torchserve_explain.attribution.rows import Evaluation, Rows
from torchserve_explain.attribution.tasks import Block, RunningGroup, Slice, Task, evaluated
from torchserve_explain.attribution.threads import Threads
from torchserve_explain.errors import AttributionError, DeadlinePassed, ExplainError, OutOfMemory

log = logging.getLogger(__name__)
LATE = "out of time before the request's deadline; ask for fewer methods, steps or samples"
GRACE = 0.015  # seconds for which a thread just started is waited for: most are shorter than a pass
T = TypeVar("T")


class Engine:
    """Runs computations on one classifier with at most `pack` rows a pass.

    A pass is kept within `quantum` seconds while more than one request is in flight. `clock` tells seconds.
    """

    def __init__(
        self, classifier: Classifier, pack: int, quantum: float = inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.classifier = classifier
        self.passes = self.rows = 0  # so far
        self.seconds = 0.0  # spent on passes so far
        self._quantum, self._clock = quantum, clock
        self._limit, self._paces = PackLimit(pack), Paces()
        self._roots: list[Task[Any]] = []  # in order of arrival
        self._ready: deque[Task[Any]] = deque()
        self._threads = Threads()
        self._latest_call = -inf

    @property
    def pack(self) -> int:
        """How many rows a pass may have now."""
        return self._limit.rows

    @property
    def in_flight(self) -> int:
        """How many computations have been added and not ended."""
        return len(self._roots)

    def add(self, work: Work[T], deadline: float = inf) -> Task[T]:
        """Take work in; its task's `outcome` is set once it has ended. `deadline` is a time of the engine's clock."""
        task = Task(work, self._clock(), deadline)
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

    def step(self, within: float = inf) -> None:
        """Run one pass, of at most about `within` seconds, and let go on what is ready before and after it.

        Where all wait for threads, the first of them is waited for instead, at most `within` seconds.
        """
        self._go_on()
        if within < inf or self._quantum < inf:
            self._wait_for_young_calls()
        self._end_the_late()
        order = first_to_last(self._roots, self._remaining, self.passes)
        if order:
            self._pass(self._fill(order, within))
        else:
            self._wait_for_a_call(within)
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
        self._take_calls(0.0)
        while self._ready:
            task = self._ready.popleft()
            task.ready = False
            if task.outcome is None:
                self._resume(task)

    def _resume(self, task: Task[Any]) -> None:
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
        self._latest_call = self._clock()
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

    def _take_calls(self, wait: float) -> bool:
        """Note which calls have ended, after waiting for the first of them; return whether the wait has ended early."""
        ended = self._threads.ended(wait)
        for task, call in filter(None, ended):
            if call in task.calls:
                task.calls.discard(call)
                if not task.waits:
                    self._queue(task)
        return bool(ended)

    def _wait_for_young_calls(self) -> None:
        """Wait a moment for calls that have just begun: most are shorter than a pass, and what comes after them is short."""
        until = self._clock() + GRACE
        while any(root.calling for root in self._roots):
            now = self._clock()
            left = min(until, self._latest_call + GRACE) - now
            if left <= 0 or not self._take_calls(left):
                return
            self._go_on()

    def _wait_for_a_call(self, seconds: float) -> None:
        """Wait for the first call under way to end, where nothing else is to be done."""
        if not self._threads.woken and any(root.calling for root in self._roots) and self._take_calls(seconds):
            self._go_on()

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

    def _fill(self, order: Sequence[Task[Any]], within: float) -> list[Slice]:
        """Fill a pack: the first waiting block decides the kind of pass, blocks of that kind ride along."""
        blocks = [(task, block) for task in order for block in task.blocks]
        kind = self._kind(blocks[0][1].rows)
        quantum = self._quantum if len(self._roots) > 1 else inf
        free = self._paces.of(kind).rows_within(min(quantum, within), self._limit.rows)
        slices: list[Slice] = []
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
            began = self._clock()
            evaluation = evaluated(self.classifier, [part for part, _ in made], torch.cat([inputs for _, inputs in made]))
        except Exception as error:
            failure = None if is_out_of_memory(error) else error.with_traceback(None)
        else:
            self._hand_out([part for part, _ in made], evaluation, began)
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

    def _hand_out(self, slices: Sequence[Slice], evaluation: Evaluation, began: float) -> None:
        """Give every task its rows of a pass."""
        rows, now = sum(part.count for part in slices), self._clock()
        self.passes, self.rows, self.seconds = self.passes + 1, self.rows + rows, self.seconds + now - began
        self._limit.fitted()
        self._paces.of(self._kind(slices[0].block.rows)).learn(now, rows, now - began)
        start = 0
        for part in slices:
            own, share = evaluation.slice(start, start + part.count), (now - began) * part.count / rows
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
