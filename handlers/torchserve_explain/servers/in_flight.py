"""Requests in flight: a frontend hands over all of them at every call and gets the answers of those that are done."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait

from torchserve_explain.servers.host import Host
from torchserve_explain.serving.answers import Answer
from torchserve_explain.serving.service import RawRequest

TRANSFERS = 4  # a call lasts so many times as long as its hand-over, which so stays under a fifth
LONGEST = 1.0  # seconds of a call, however long the hand-over takes
ALONE = 4  # quanta that a call may last while there are only predictions

Requests = Mapping[str, Callable[[], RawRequest]]  # by their ids; reading one costs time


class InFlight:
    """Answers requests by their ids; a call lasts `quantum` seconds, or until a request is done.

    While there are only predictions, which hardly any newcomer may pass, it may last four: to hand them over again would slow
    them down.
    """

    def __init__(self, host: Host, quantum: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._quantum, self._clock = host, quantum, clock
        self._waiting: dict[str, Future[Answer]] = {}
        self._returned: float | None = None  # when the last call ended with requests in flight

    def __len__(self) -> int:
        return len(self._waiting)

    def call(self, requests: Requests) -> dict[str, Answer]:
        """Take in what is new, forget what is no longer handed over, and return the answers that are there by now.

        A request that is known is not read again.
        """
        length = self._length(self._clock())
        self._take(requests)
        self._wait(length)
        finished = {name: waiting.result() for name, waiting in self._waiting.items() if waiting.done()}
        self._waiting = {name: waiting for name, waiting in self._waiting.items() if name not in finished}
        self._returned = self._clock() if self._waiting else None
        return finished

    def answer_all(self, requests: Requests) -> dict[str, Answer]:
        """Return the answers of all requests, however long it takes."""
        self._take(requests)
        answers = {name: waiting.result() for name, waiting in self._waiting.items()}
        self._waiting.clear()
        return answers

    def forget_all(self) -> None:
        """Drop every request, after something that should not happen."""
        self._take({})

    def _take(self, requests: Requests) -> None:
        for gone in self._waiting.keys() - requests.keys():
            self._waiting.pop(gone).cancel()
        for name, read in requests.items():
            if name not in self._waiting:
                self._waiting[name] = self._host.submit(read())

    def _wait(self, length: float) -> None:
        """Wait until a request is done, or for so long, or longer where there are only predictions."""
        until = self._clock() + max(length, ALONE * self._quantum)
        while not wait(self._waiting.values(), length, FIRST_COMPLETED).done:
            length = min(length, until - self._clock())
            if not self._waiting or self._host.explains or length <= 0:
                return

    def _length(self, now: float) -> float:
        """Return how long this call may last: long enough that handing all requests over again costs little."""
        handed_over = 0.0 if self._returned is None else now - self._returned
        return max(self._quantum, min(LONGEST, TRANSFERS * handed_over))
