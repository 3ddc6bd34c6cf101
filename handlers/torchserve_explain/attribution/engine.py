"""The engine: many pieces of work in, one result each out; rows of all of them share passes.

The engine alone decides how rows are packed, when a pack is halved because memory ran out, and when the
deadline is reached. Work that fails takes none of its neighbours with it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.errors import AttributionError, DeadlinePassed, OutOfMemory
from torchserve_explain.attribution.rows import BackwardRule, Evaluation, Rows

log = logging.getLogger(__name__)
LATE = "out of time before the batch's deadline; ask for fewer methods, steps or samples"
T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)


class Work(Protocol[R_co]):
    """What the engine runs: it asks for rows and comes to a result."""

    @property
    def evaluations(self) -> int:
        """How many evaluations it takes, or the least of them."""
        ...

    def compute(self) -> Computation[R_co]:
        """Ask for rows and return the result."""
        ...


@dataclass(frozen=True)
class Finished(Generic[T]):
    """Finished work: its result, the evaluations spent on it, and its share of the passes' seconds."""

    result: T
    evaluations: int
    seconds: float


@dataclass
class _Block:
    """Rows that a job has asked for, and how many of them have been evaluated."""

    rows: Rows
    done: int = 0


@dataclass
class _Task(Generic[T]):
    """Work under way; `waiting` are the blocks it needs before it can go on."""

    work: Work[T]
    computation: Computation[T]
    waiting: list[_Block] = field(default_factory=list)
    outcome: Finished[T] | AttributionError | None = None
    evaluations: int = 0
    seconds: float = 0.0

    def go_on(self) -> None:
        """Let the work reduce what it has and ask for more, or finish."""
        try:
            self.waiting = [_Block(rows) for rows in next(self.computation) if rows.count]
        except StopIteration as finished:
            self.outcome = Finished(finished.value, self.evaluations, self.seconds)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the work without a result; an error that is not an AttributionError is a fault of ours and is logged."""
        if not isinstance(error, AttributionError):
            log.error("%s failed", type(self.work).__name__, exc_info=error)
            error = AttributionError("the explanation failed inside the server; its log says why")
        self.computation.close()
        self.waiting, self.outcome = [], error


@dataclass(frozen=True)
class _Slice:
    """Part of a block that rides in the next pass."""

    task: _Task[Any]
    block: _Block
    count: int

    def inputs(self) -> Tensor:
        return self.block.rows.inputs(self.block.done, self.block.done + self.count)

    def consume(self, evaluation: Evaluation, seconds: float) -> None:
        try:
            self.block.rows.consume(self.block.done, evaluation)
        except Exception as error:
            self.task.fail(error)
        self.block.done += self.count
        self.task.evaluations += self.count * self.block.rows.passes
        self.task.seconds += seconds
        if self.block.done == self.block.rows.count:
            self.task.waiting = [block for block in self.task.waiting if block is not self.block]


class Engine:
    """Runs work on one classifier with at most `pack` rows a pass; a pack that does not fit is halved for good."""

    def __init__(self, classifier: Classifier, pack: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.classifier = classifier
        self.pack = pack
        self._clock = clock
        self._longest = 0.0  # seconds of a pass of this batch, to foresee its deadline

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the logits [n, classes] of inputs [C, H, W], on the CPU; raises OutOfMemory."""
        parts: list[Tensor] = []
        done = 0
        while done < len(inputs):
            chunk = torch.stack(list(inputs[done : done + self.pack]))
            logits = self._within_memory(lambda chunk=chunk: self.classifier.logits(chunk).cpu(), len(chunk))  # type: ignore[misc]
            if logits is not None:
                parts.append(logits)
                done += len(chunk)
        return torch.cat(parts)

    def run(self, works: Sequence[Work[T]], deadline: float = inf) -> list[Finished[T] | AttributionError]:
        """Return each work's result or the error that it alone met; `deadline` is a time of the engine's clock.

        Cheap work goes first, so that the deadline, if it comes, costs as few answers as possible.
        """
        self._longest = 0.0
        tasks = [_Task(work, work.compute()) for work in works]
        live = sorted(tasks, key=lambda task: task.work.evaluations)
        self._go_on(live, deadline)
        while live := [task for task in live if task.outcome is None]:
            idle = [task for task in live if not task.waiting]
            if idle:
                self._go_on(idle, deadline)
            else:
                self._pass(self._fill(live), deadline, live)
        return [task.outcome for task in tasks if task.outcome is not None]

    def results(self, works: Sequence[Work[T]]) -> list[Finished[T]]:
        """Return each work's result; raises the first AttributionError met."""
        finished: list[Finished[T]] = []
        for outcome in self.run(works):
            if isinstance(outcome, AttributionError):
                raise outcome
            finished.append(outcome)
        return finished

    def _go_on(self, tasks: Sequence[_Task[T]], deadline: float) -> None:
        """Let tasks reduce what they have; some take their time over it, so the clock is looked at before each."""
        for task in tasks:
            if self._clock() > deadline:
                task.fail(DeadlinePassed(LATE))
            else:
                task.go_on()

    def _fill(self, live: Sequence[_Task[T]]) -> list[_Slice]:
        """Fill a pack: the first waiting block decides the kind of pass, blocks of that kind ride along."""
        blocks = [(task, block) for task in live for block in task.waiting]
        kind, free = self._kind(blocks[0][1].rows), self.pack
        slices: list[_Slice] = []
        for task, block in blocks:
            if free and self._kind(block.rows) == kind:
                slices.append(_Slice(task, block, min(free, block.rows.count - block.done)))
                free -= slices[-1].count
        return slices

    def _kind(self, rows: Rows) -> tuple[bool, BackwardRule | None, bool]:
        """Rows of equal kind may share a pass: they all go back or none does, by one rule, in one arithmetic."""
        narrow = self.classifier.narrow is not None and not rows.gradient
        return rows.gradient or bool(rows.layers), rows.rule, narrow

    def _pass(self, slices: list[_Slice], deadline: float, live: Sequence[_Task[T]]) -> None:
        count = sum(part.count for part in slices)
        began = self._clock()
        if began + self._longest > deadline:
            for task in live:
                task.fail(DeadlinePassed(LATE))
            return
        try:
            evaluation = self._within_memory(lambda: self._evaluate(slices), count)
        except Exception as error:
            for part in slices:
                part.task.fail(error)
            return
        if evaluation is None:
            return  # the rows are still due, in smaller packs
        seconds = self._clock() - began
        self._longest = max(self._longest, seconds)
        start = 0
        for part in slices:
            part.consume(evaluation.slice(start, start + part.count), seconds * part.count / count)
            start += part.count

    def _evaluate(self, slices: list[_Slice]) -> Evaluation:
        first = slices[0].block.rows
        return self.classifier.evaluate(
            torch.cat([part.inputs() for part in slices]),
            [part.block.rows.target for part in slices for _ in range(part.count)],
            [part.block.rows.score for part in slices for _ in range(part.count)],
            gradient=any(part.block.rows.gradient for part in slices),
            each=any(part.block.rows.gradient and not part.block.rows.summed for part in slices),
            layers=sorted({layer for part in slices for layer in part.block.rows.layers}),
            activations=sorted({layer for part in slices for layer in part.block.rows.activations}),
            rule=first.rule,
        )

    def _within_memory(self, run: Callable[[], T], rows: int) -> T | None:
        """Run a pass of `rows` rows; out of memory halves the pack and answers None, at one row it raises OutOfMemory."""
        try:
            return run()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        # Outside the handler: the exception no longer holds the pass's tensors.
        if self.classifier.device.type == "cuda":
            torch.cuda.empty_cache()
        if rows == 1:
            raise OutOfMemory("not even one row of this model fits into the memory that is left")
        self.pack = rows // 2
        return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
