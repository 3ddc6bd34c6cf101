"""Requests in flight: a host hands over all of them at every call and gets the answers of those that are done."""

import logging
import time
from collections.abc import Callable, Mapping
from math import inf

from torchserve_explain.attribution.computation import Piece
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.tasks import Task
from torchserve_explain.errors import ExplainError
from torchserve_explain.serving.answers import Answer
from torchserve_explain.serving.service import RawRequest, Service, error_answer

log = logging.getLogger(__name__)
TRANSFERS = 4  # a call lasts so many times as long as its hand-over, which so stays under a fifth
COMPANY = 2.0  # seconds after a short request in which another is expected
LONGEST = 1.0  # seconds of a call, however long the hand-over takes


class InFlight:
    """Answers requests by their ids; each call runs passes for about `quantum` seconds, or until a request is done.

    While short requests come, a call lasts half as long.
    """

    def __init__(self, service: Service, engine: Engine, quantum: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._service, self._engine, self._quantum, self._clock = service, engine, quantum, clock
        self._tasks: dict[str, Task[Answer]] = {}
        self._returned: float | None = None  # when the last call ended with requests in flight
        self._short = -inf  # when a short request was last answered

    def __len__(self) -> int:
        return len(self._tasks)

    def call(self, requests: Mapping[str, Callable[[], RawRequest]]) -> dict[str, Answer]:
        """Take in what is new, forget what is no longer handed over, and return the answers that are there by now.

        A request that is known is not read again.
        """
        began = self._clock()
        quantum = self._length(began)
        self._take(requests)
        now, longest = began, 0.0
        while not (finished := self._finished()) and (left := began + quantum - now) > longest:
            self._engine.step(left)
            now, longest = self._clock(), max(longest, self._clock() - now)  # a further step of that length must fit
        self._returned = self._clock() if self._tasks else None
        return finished

    def answer_all(self, requests: Mapping[str, Callable[[], RawRequest]]) -> dict[str, Answer]:
        """Return the answers of all requests, however long it takes."""
        self._take(requests)
        answers: dict[str, Answer] = {}
        while self._tasks:
            self._engine.step()
            answers |= self._finished()
        return answers

    def forget_all(self) -> None:
        """Drop every request, after something that should not happen."""
        for task in self._tasks.values():
            self._engine.drop(task)
        self._tasks.clear()

    def _take(self, requests: Mapping[str, Callable[[], RawRequest]]) -> None:
        for gone in self._tasks.keys() - requests.keys():
            log.info("a request is no longer handed over; it is dropped")
            self._engine.drop(self._tasks.pop(gone))
        for name, read in requests.items():
            if name not in self._tasks:
                raw = read()
                self._tasks[name] = self._engine.add(Piece(self._service.answer(raw)), self._service.deadline(raw))

    def _finished(self) -> dict[str, Answer]:
        """Return the answers of what has ended, and forget it."""
        ended = {name: task.outcome for name, task in self._tasks.items() if task.outcome is not None}
        for name in ended:
            if self._tasks.pop(name).seconds < self._quantum:
                self._short = self._clock()
        return {
            name: error_answer(outcome) if isinstance(outcome, ExplainError) else outcome.value
            for name, outcome in ended.items()
        }

    def _length(self, now: float) -> float:
        """Return how long this call may last: long enough that handing all requests over again costs little."""
        handed_over = 0.0 if self._returned is None else now - self._returned
        # Short requests come in company: while they do, those that arrive next wait for half as long.
        quantum = self._quantum / 2 if now < self._short + COMPANY else self._quantum
        return max(quantum, min(LONGEST, TRANSFERS * handed_over))
