"""Tasks: computations under way, what each of them waits for, and who is waiting for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Call, Group, Outcome, Work
from torchserve_explain.attribution.rows import Evaluation, Rows
from torchserve_explain.errors import AttributionError

T = TypeVar("T")


@dataclass
class Block:
    """Rows that a task has asked for, and how many of them have been evaluated."""

    rows: Rows
    done: int = 0

    @property
    def left(self) -> int:
        """How many rows are still to be evaluated."""
        return self.rows.count - self.done


class Task(Generic[T]):
    """A computation under way; it goes on once its blocks, calls and groups are done, or with an `error` thrown into it."""

    def __init__(
        self,
        work: Work[T],
        arrived: float,
        deadline: float,
        parent: "Task[Any] | None" = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.work = work
        self.computation = work.compute()
        self.arrived, self.deadline, self.parent, self.ended = arrived, deadline, parent, ended
        self.blocks: list[Block] = []
        self.calls: set[Call[Any]] = set()
        self.groups: list[RunningGroup[Any]] = []
        self.error: Exception | None = None
        self.outcome: Outcome[T] | None = None
        self.begun = False
        self.ready = False  # whether it is in the engine's queue
        self.evaluations = 0
        self.seconds = 0.0

    @property
    def waits(self) -> bool:
        """Whether something that it has asked for is not there yet."""
        return bool(self.blocks or self.calls or self.groups)

    @property
    def root(self) -> "Task[Any]":
        """The request that it belongs to: itself, where nobody has asked for it."""
        return self if self.parent is None else self.parent.root

    @property
    def children(self) -> "Iterator[Task[Any]]":
        """The tasks that it waits for."""
        return (child for group in self.groups for child in group.running.values())

    @property
    def leaves(self) -> "Iterator[Task[Any]]":
        """The tasks below it, itself among them, that wait for rows."""
        if self.blocks:
            yield self
        for child in self.children:
            yield from child.leaves

    @property
    def family(self) -> "Iterator[Task[Any]]":
        """The tasks below it, and then itself."""
        for child in list(self.children):
            yield from child.family
        yield self

    @property
    def calling(self) -> bool:
        """Whether it, or a task below it, waits for a thread."""
        return any(task.calls for task in self.family)

    def spend(self, evaluations: int, seconds: float) -> None:
        """Note what a pass has cost, also for those that wait for this task."""
        task: Task[Any] | None = self
        while task is not None:
            task.evaluations += evaluations
            task.seconds += seconds
            task = task.parent

    def let_go(self) -> None:
        """Forget all that it waits for, and end the tasks below it."""
        for child in self.children:
            child.end(AttributionError("nobody waits for it any more"))
        self.blocks, self.calls, self.groups = [], set(), []

    def end(self, outcome: Outcome[T]) -> None:
        """Take the outcome, and let go of everything else."""
        self.let_go()
        self.computation.close()
        self.outcome = outcome


class RunningGroup(Generic[T]):
    """Work of one task that runs side by side; outcomes are collected in the order of the work."""

    def __init__(self, group: Group[T], parent: Task[Any]) -> None:
        self._group, self._parent = group, parent
        self._early: dict[int, Outcome[T]] = {}  # that came before those ahead of them
        self._started = self._collected = 0
        self._exhausted = False
        self.running: dict[int, Task[T]] = {}

    def start(self, now: float) -> "Iterator[Task[T]]":
        """Yield new tasks, up to the group's width."""
        while not self._exhausted and self._started - self._collected < max(1, self._group.width):
            work = next(self._group.works, None)
            if work is None:
                self._exhausted = True
                return
            deadline = min(self._group.deadline, self._parent.deadline)
            task = Task(work, now, deadline, self._parent)
            self.running[self._started] = task
            self._started += 1
            yield task

    def end(self, task: Task[T], outcome: Outcome[T]) -> None:
        """Take a task's outcome, and collect what is due; raises what collecting raises."""
        index = next(index for index, one in self.running.items() if one is task)
        del self.running[index]
        self._early[index] = outcome
        while self._collected in self._early:
            collected = self._early.pop(self._collected)
            self._collected += 1
            self._group.collect(collected)

    @property
    def done(self) -> bool:
        """Whether all work has been started and collected."""
        return self._exhausted and self._collected == self._started


@dataclass(frozen=True)
class Slice:
    """Part of a block that rides in the next pass."""

    task: Task[Any]
    block: Block
    count: int

    def inputs(self) -> Tensor:
        """Make the rows' inputs [count, C, H, W]."""
        return self.block.rows.inputs(self.block.done, self.block.done + self.count)

    def consume(self, evaluation: Evaluation, seconds: float) -> None:
        """Hand the rows' evaluation to who asked for it; raises what that raises."""
        self.task.spend(self.count * self.block.rows.passes, seconds)
        start, self.block.done = self.block.done, self.block.done + self.count
        if not self.block.left:
            self.task.blocks = [block for block in self.task.blocks if block is not self.block]
        self.block.rows.consume(start, evaluation)


def evaluated(
    classifier: Classifier, slices: Sequence[Slice], inputs: Tensor, pause: Callable[[], None] | None = None
) -> Evaluation:
    """Evaluate the rows of slices of one kind in one pass; `pause` is called between its layers."""
    wanted = [part.block.rows for part in slices for _ in range(part.count)]
    return classifier.evaluate(
        inputs,
        [rows.target for rows in wanted],
        [rows.score for rows in wanted],
        gradient=any(rows.gradient for rows in wanted),
        each=any(rows.gradient and not rows.summed for rows in wanted),
        layers=sorted({layer for rows in wanted for layer in rows.layers}),
        activations=sorted({layer for rows in wanted for layer in rows.activations}),
        rule=wanted[0].rule,
        precise=any(rows.precise for rows in wanted),
        pause=pause,
    )
