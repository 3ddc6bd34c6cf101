"""Bisection: the paths from baselines to an image, cut where the trapezoid rule errs most."""

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from math import ceil, inf, isfinite, sqrt
from statistics import fmean

import torch
from torch import Tensor

from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.methods.completeness import completeness_error, rise
from torchserve_explain.attribution.methods.method import Attribution, Case
from torchserve_explain.attribution.rows import Evaluation

FIRST_INTERVALS = 8  # of the bisected path
FIRST_PATHS = 6  # that are cut into so many; of more paths each has fewer, about 50 in all
BISECTED_AT_ONCE = 8  # intervals a round
# What is left of an interval's share of the map's error in each half: along a path of a network with kinks the gradient
# moves like a random walk, so half as long a piece has a change smaller by sqrt(2).
HALVED = 1 / sqrt(8)


class PathRule(StrEnum):
    """How a path's gradients are summed: as an integral, or each by how much the score rises after it."""

    RIEMANN = "riemann"
    IDGI = "idgi"


def first_intervals(paths: int) -> int:
    """Return in how many intervals each of some paths is cut before any is bisected: fewer of each where paths are many."""
    return max(1, FIRST_INTERVALS // ceil(paths / FIRST_PATHS))


class Paths:
    """The straight lines from baselines [n, C, H, W] to a case's input; their end is one."""

    def __init__(self, case: Case, baselines: Tensor) -> None:
        self._case = case
        self._baselines = baselines
        self._steps = case.input - baselines
        self._known: dict[tuple[int, float, float], float] = {}  # the roughness of intervals

    def bisected(self, max_error: float, max_map_error: float | None, rule: PathRule) -> Computation[Attribution]:
        """Bisect the intervals that err most: in the map, then in the score, whose rise on each is known."""
        rows = yield from self._first(first_intervals(len(self._steps)))
        starts, end = [row[0].score for row in rows], rows[-1][-1].score
        bounded = max_map_error if rule is PathRule.RIEMANN else None
        # An interval cut several times in one round meets completeness with fewer rows, but leaves the map farther off.
        halved = 0.0 if bounded is None else HALVED
        refinement = list[tuple[int, float]]()
        while True:
            intervals = _intervals(rows)
            refinement.append((len(intervals) + 1, self._error(intervals, starts, end)))
            left_over = self._case.budget - len(intervals) - 1
            if left_over > 0 and bounded is not None and self._map_error(rows) > bounded:
                error = self._roughness
            elif left_over > 0 and refinement[-1][1] > max_error:
                error = _miss
            else:
                break
            at = _middles(intervals, error, halved, min(BISECTED_AT_ONCE, left_over))
            for node in (yield from self._nodes(at)):
                insort(rows[node.path], node, key=lambda one: one.t)
        attribution, baseline_score = self._map(intervals, rule), fmean(starts)
        map_error = self._map_error(rows) if rule is PathRule.RIEMANN else inf
        missed = completeness_error(float(attribution.sum()), end, baseline_score)
        known = map_error if isfinite(map_error) else None
        return Attribution(attribution, baseline_score, missed, map_error=known, refinement=tuple(refinement))

    def _first(self, count: int) -> Computation[list[list["_Node"]]]:
        """Return each path's nodes, which cut it into `count` intervals of one length."""
        paths = range(len(self._steps))
        *nodes, end = yield from self._nodes([(path, i / count) for path in paths for i in range(count)] + [(paths[-1], 1.0)])
        slopes = torch.tensordot(self._steps, end.gradient, 3).tolist()
        return [[*nodes[path * count :][:count], replace(end, path=path, slope=slopes[path])] for path in paths]

    def _map_error(self, rows: Sequence[Sequence["_Node"]]) -> float:
        """Return the estimate of the map's own error; infinite where a path has no node that could be left out."""
        if any(len(row) < 3 for row in rows):
            return inf
        coarse = [[*row[:-1:2], row[-1]] for row in rows]
        fine, rough = (self._map(_intervals(nodes), PathRule.RIEMANN).sum(0) for nodes in (rows, coarse))
        return float((fine - rough).norm()) / sqrt(3) / (float(fine.norm()) or 1.0)

    def _roughness(self, one: "_Interval") -> float:
        """Return how much the map changes on an interval, times its width: the measure of what the interval errs by."""
        if (place := (one.left.path, one.left.t, one.right.t)) not in self._known:
            change = (one.right.gradient - one.left.gradient).mul_(self._steps[one.left.path]).sum(0)
            self._known[place] = one.width * float(change.norm())
        return self._known[place]

    def _error(self, intervals: list["_Interval"], starts: list[float], end: float) -> float:
        """Return the completeness error of the mean over the paths, or their own where that is larger: errors may cancel."""
        errors = [0.0] * len(starts)
        for interval in intervals:
            errors[interval.left.path] += interval.error
        own = fmean(map(abs, errors)) / fmean(rise(end, start) for start in starts)
        return max(own, abs(fmean(errors)) / rise(end, fmean(starts)))

    def _map(self, intervals: list["_Interval"], rule: PathRule) -> Tensor:
        """Return the map [C, H, W] of all intervals: the mean over the paths."""
        attribution, count = torch.zeros_like(self._case.input), len(self._steps)
        for one in intervals:
            if rule is PathRule.IDGI:
                share(attribution, one.left.gradient, (one.right.score - one.left.score) / count)
                continue
            for node in (one.left, one.right):
                attribution.addcmul_(node.gradient, self._steps[node.path], value=one.width / 2 / count)
        return attribution

    def _nodes(self, at: list[tuple[int, float]]) -> Computation[list["_Node"]]:
        """Evaluate points: of which path, at what fraction of its length."""
        nodes: list[_Node] = []
        path = torch.tensor([path for path, _ in at], device=self._steps.device)
        fractions = self._steps.new_tensor([t for _, t in at])[:, None, None, None]

        def points(start: int, stop: int) -> Tensor:
            return torch.lerp(self._baselines[path[start:stop]], self._case.input, fractions[start:stop])

        def add(start: int, evaluation: Evaluation) -> None:
            steps = self._steps[path[start : start + len(evaluation.scores)]]
            slopes = (evaluation.gradients * steps).sum((1, 2, 3)).tolist()
            scores = evaluation.scores.tolist()
            for place, score, slope, gradient in zip(at[start:], scores, slopes, evaluation.gradients, strict=False):
                # A view would keep the whole pass's gradients alive.
                nodes.append(_Node(*place, score, slope, gradient.clone()))

        yield [self._case.rows(len(at), points, add)]
        return nodes


@dataclass(frozen=True)
class _Node:
    """A point t of a path: its score, the score's slope along the path, and its gradient."""

    path: int
    t: float
    score: float
    slope: float
    gradient: Tensor


def share(shares: Tensor, gradient: Tensor, rise: float) -> None:
    """Add to shares what each value has of a rise of the score, by its squared gradient; of none where the gradient is zero."""
    squares = gradient.square()
    if (total := float(squares.sum())) > 0:
        shares.add_(squares, alpha=rise / total)


class _Interval:
    """A piece of a path, and the trapezoid rule's `error` for the score's rise on it."""

    def __init__(self, left: _Node, right: _Node) -> None:
        self.left, self.right = left, right
        self.width = right.t - left.t
        self.error = self.width * (left.slope + right.slope) / 2 - (right.score - left.score)


def _intervals(rows: Sequence[Sequence[_Node]]) -> list[_Interval]:
    """Return the pieces between the nodes of each path."""
    return [_Interval(left, right) for row in rows for left, right in pairwise(row)]


def _miss(one: _Interval) -> float:
    return abs(one.error)


def _middles(
    intervals: Iterable[_Interval], error: Callable[[_Interval], float], halved: float, count: int
) -> list[tuple[int, float]]:
    """Bisect the interval with the largest error `count` times, each half expected to have `halved` of it: path and place."""
    pieces = [(-error(one), one.left.path, one.left.t, one.right.t) for one in intervals]
    heapq.heapify(pieces)
    middles = []
    for _ in range(count):
        largest, path, start, stop = heapq.heappop(pieces)
        middles.append((path, middle := (start + stop) / 2))
        for half in ((start, middle), (middle, stop)):
            heapq.heappush(pieces, (largest * halved, path, *half))
    return middles
