"""Passes: the rows that ride in the next one, the model's evaluation of them, and how long that takes."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.policy import (
    AGEING,
    SHORT,
    Kind,
    Paces,
    PackLimit,
    UnderWay,
    first_to_last,
    is_short,
    remaining_seconds,
)
from torchserve_explain.attribution.rows import Evaluation, Form, Rows
from torchserve_explain.attribution.tasks import Slice, Task


class Passes:
    """Runs passes of a classifier, each of at most `pack` rows; `clock` tells seconds."""

    def __init__(self, classifier: Classifier, pack: int, clock: Callable[[], float]) -> None:
        self.count = self.rows = 0  # so far
        self.seconds = 0.0  # spent so far
        self.limit = PackLimit(pack)
        self._classifier, self._clock = classifier, clock
        self._aside = classifier.aside  # which is copied while no pass is under way
        self._paces = Paces()
        self._due = 0  # the count when it was last the turn of who has waited longest
        self._under_way: UnderWay | None = None

    def next(self, roots: Sequence[Task[Any]]) -> list[Slice]:
        """Return what rides in the next pass; nothing where nobody waits for rows."""
        due = self.count - self._due >= AGEING  # those that interrupt count
        order = first_to_last(roots, self._remaining, due)
        if order and due:
            self._due = self.count
        return self._fill(order)

    @property
    def may_be_interrupted(self) -> bool:
        """Whether a pass is under way that others may interrupt now."""
        return self._under_way is not None and self._under_way.yields(self._clock())

    def interrupting(self, roots: Sequence[Task[Any]]) -> list[Slice]:
        """Return what rides in a pass that interrupts the one under way: rows of short requests that have none in it."""
        riding = set() if self._under_way is None else self._under_way.roots
        return self._fill(first_to_last([root for root in roots if root not in riding and is_short(root)], self._remaining))

    def evaluate(self, slices: Sequence[Slice], inputs: Tensor, pause: Callable[[], None]) -> tuple[Evaluation, float]:
        """Evaluate the slices' inputs; return the evaluation and its seconds, without those of passes that interrupted it.

        `pause` is called between layers, unless this pass interrupts another, or is so short that pauses would be felt.
        """
        began, outer = self._clock(), self._under_way
        if outer is not None and self._aside is not None:
            evaluation = self._evaluated(self._aside, slices, inputs)
            seconds = self._clock() - began
            outer.interrupted += seconds
        else:
            roots = {part.task.root for part in slices}
            self._under_way = pass_ = UnderWay(roots, all(map(is_short, roots)), began)
            brief = pass_.short and len(inputs) <= SHORT
            try:
                evaluation = self._evaluated(self._classifier, slices, inputs, None if brief or self._aside is None else pause)
            finally:
                self._under_way = None
            seconds = self._clock() - began - pass_.interrupted
        self.count, self.rows, self.seconds = self.count + 1, self.rows + len(inputs), self.seconds + seconds
        self.limit.fitted()
        self._paces.of(self._kind(slices[0].block.rows)).learn(self._clock(), len(inputs), seconds)
        return evaluation, seconds

    def halve(self, rows: int) -> None:
        """Let passes be smaller than one of so many rows, for which memory did not suffice."""
        if self._classifier.device.type == "cuda":
            torch.cuda.empty_cache()
        self.limit.halve(rows)

    def least_seconds(self, task: Task[Any]) -> float:
        """Return the seconds that a task takes at least, at the fastest pace seen since it came."""

        def fastest(rows: Rows) -> float:
            return self._paces.of(self._kind(rows)).fastest_since(task.arrived)

        return remaining_seconds(task, fastest, self._paces.cheapest_since(task.arrived))

    def _remaining(self, task: Task[Any]) -> float:
        """Return the seconds that a task is expected to take."""
        expected = self._paces.expected
        return remaining_seconds(task, lambda rows: expected(self._kind(rows)), self._paces.cheapest())

    def _kind(self, rows: Rows) -> Kind:
        """Rows of equal kind may share a pass: they all go back or none does, by one rule, in one form of the model."""
        return rows.gradient or bool(rows.layers), rows.rule, self._classifier.form(rows)

    def _fill(self, order: Sequence[Task[Any]]) -> list[Slice]:
        """Fill a pack: the first waiting block decides the kind of pass, blocks of that kind ride along.

        Where it is a short request's, only other short ones' do.
        """
        alike = takewhile(lambda task: is_short(task.root), order) if order and is_short(order[0].root) else order
        blocks = [(task, block) for task in alike for block in task.blocks]
        slices, free = list[Slice](), self.limit.rows
        for task, block in blocks:
            if free and self._kind(block.rows) == self._kind(blocks[0][1].rows):
                slices.append(Slice(task, block, min(free, block.left)))
                free -= slices[-1].count
        return slices

    @staticmethod
    def _evaluated(
        classifier: Classifier, slices: Sequence[Slice], inputs: Tensor, pause: Callable[[], None] | None = None
    ) -> Evaluation:
        """Evaluate the rows of slices of one kind in one pass."""
        wanted = [part.block.rows for part in slices for _ in range(part.count)]
        targets, scores, versus = ([getattr(rows, name) for rows in wanted] for name in ("target", "score", "versus"))
        layers, activations = (
            sorted({layer for rows in wanted for layer in getattr(rows, kind)}) for kind in ("layers", "activations")
        )
        form = classifier.form(wanted[0])
        if form is Form.COMPILED:
            return classifier.evaluate_compiled(inputs, targets, scores, versus, pause, layers, activations)
        return classifier.evaluate(
            inputs,
            targets,
            scores,
            gradient=any(rows.gradient for rows in wanted),
            each=any(rows.gradient and not rows.summed for rows in wanted),
            layers=layers,
            activations=activations,
            rule=wanted[0].rule,
            precise=form is not Form.NARROW,
            versus=versus,
            pause=pause,
        )
