"""Policy: whose rows go first, who may interrupt a pass, how many ride in one, and when time does not suffice any more."""

from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from statistics import median
from typing import Any

from torchserve_explain.attribution.rows import Form, Rows
from torchserve_explain.attribution.tasks import Task

AGEING = 8  # one pass in so many belongs to the request that has waited longest, so that nothing starves
LEARNT_FROM = 5  # the latest passes, whose median a row is expected to take: a first pass may take far longer
MEASURED = 3  # passes that must have been measured before they make anything certain
SHORT = 2  # rows in all of a request that may interrupt a pass, and shares passes with its like alone
GROWING = 50  # passes that must fit before a halved pack is tried at twice the size

Kind = tuple[bool, Any, Form]


class Pace:
    """How long rows of one kind take, learnt from passes of that kind."""

    def __init__(self) -> None:
        self.row_seconds: float | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=64)  # when a pass ended, and its seconds a row

    def learn(self, now: float, rows: int, seconds: float) -> None:
        """Take a pass into account."""
        self._recent.append((now, seconds / rows))
        self.row_seconds = median([latest for _, latest in list(self._recent)[-LEARNT_FROM:]])

    def fastest_since(self, moment: float) -> float:
        """Return the least seconds a row of the passes since a moment; 0 where too few have been measured."""
        since = [latest for ended, latest in self._recent if ended > moment]
        return min(since) if len(since) >= MEASURED else 0.0


class Paces:
    """The pace of each kind of rows."""

    def __init__(self) -> None:
        self._paces: dict[Any, Pace] = {}

    def of(self, kind: Kind) -> Pace:
        """Return a kind's pace; what parameters a changed model has does not matter."""
        backward, rule, form = kind
        return self._paces.setdefault((backward, type(rule), form), Pace())

    def expected(self, kind: Kind) -> float:
        """Return the seconds that a row is expected to take; one never seen is taken for an average one."""
        if (known := self.of(kind).row_seconds) is not None:
            return known
        others = [pace.row_seconds for pace in self._paces.values() if pace.row_seconds is not None]
        return sum(others) / len(others) if others else 1.0

    def cheapest(self) -> float:
        """Return the least seconds that a row of any kind is expected to take."""
        return min((pace.row_seconds for pace in self._paces.values() if pace.row_seconds is not None), default=1.0)

    def cheapest_since(self, moment: float) -> float:
        """Return the least seconds a row of any kind took since a moment; 0 where too few passes have been measured."""
        return min(filter(None, (pace.fastest_since(moment) for pace in self._paces.values())), default=0.0)


class PackLimit:
    """How many rows a pass may have: halved where memory does not suffice, tried at twice the size again after a while."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._fitted = 0
        self.rows = most

    def halve(self, rows: int) -> None:
        """Note that so many rows did not fit."""
        self.rows, self._fitted = max(1, rows // 2), 0

    def fitted(self) -> None:
        """Note a pass that fitted."""
        if self.rows == self._most:
            return
        self._fitted += 1
        if self._fitted == GROWING:
            self.rows, self._fitted = min(self._most, 2 * self.rows), 0


@dataclass
class UnderWay:
    """A pass under way: whose rows it holds, whether all of those are short, when it began, how long it was interrupted."""

    roots: Set[Task[Any]]
    short: bool
    began: float
    interrupted: float = 0.0

    def yields(self, now: float) -> bool:
        """Whether it may be interrupted: it gets one second in AGEING whatever else arrives.

        One of short requests may not: those that come later are no shorter, and would pass those that came first.
        """
        return not self.short and self.interrupted <= (AGEING - 1) * (now - self.began - self.interrupted)


def first_to_last(
    roots: Sequence[Task[Any]], remaining: Callable[[Task[Any]], float], oldest_first: bool = False
) -> list[Task[Any]]:
    """Return the tasks that wait for rows, in the order in which they get them.

    The request with the least remaining goes first, so that a prediction passes a long explanation; with `oldest_first`
    the one that has waited longest goes before it. Within a request the same order holds among its tasks.
    """
    waiting = [(root, leaves) for root in roots if (leaves := list(root.leaves))]
    waiting.sort(key=lambda pair: remaining(pair[0]))
    if waiting and oldest_first:
        oldest = min(range(len(waiting)), key=lambda index: waiting[index][0].arrived)
        waiting.insert(0, waiting.pop(oldest))
    return [leaf for _, leaves in waiting for leaf in sorted(leaves, key=remaining)]


def is_short(task: Task[Any]) -> bool:
    """Whether a request needs, with those that it has had, so few rows that nobody should make it wait."""
    return task.evaluations + remaining_seconds(task, lambda _rows: 1.0, 1.0, every=True) <= SHORT


def remaining_seconds(task: Task[Any], row_seconds: Callable[[Rows], float], cheapest: float, every: bool = False) -> float:
    """Return the seconds of passes that a task still needs, or the least of them.

    Tasks below it that have an earlier deadline, without which it goes on where it must, are left out unless `every` counts.
    """
    seconds = sum(block.left * block.rows.passes * row_seconds(block.rows) for block in task.blocks)
    for child in task.children:
        if every or child.deadline >= task.deadline:
            seconds += remaining_seconds(child, row_seconds, cheapest, every)
    return max(seconds, (task.work.evaluations - task.evaluations) * cheapest)
