"""Threads that decode and draw while passes go on."""

from concurrent.futures import ThreadPoolExecutor
from math import inf
from queue import Empty, SimpleQueue
from typing import Any

from torchserve_explain.attribution.computation import Call
from torchserve_explain.attribution.tasks import Task

THREADS = 2

Ended = tuple[Task[Any], Call[Any]]


class Threads:
    """Runs calls, and tells which have ended; who waits for them can be woken from any thread."""

    def __init__(self) -> None:
        self.woken = False
        self._ended: SimpleQueue[Ended | None] = SimpleQueue()  # None: somebody has woken who waits
        self._pool: ThreadPoolExecutor | None = None

    def run(self, task: Task[Any], call: Call[Any]) -> None:
        """Run a task's call on a thread."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "engine")

        def run() -> None:
            call.run()
            self._ended.put((task, call))

        self._pool.submit(run)

    def ended(self, wait: float) -> list[Ended | None]:
        """Return the calls that have ended, after waiting up to `wait` seconds for the first; None stands for a wake."""
        found: list[Ended | None] = []
        while True:
            try:
                found.append(self._ended.get(timeout=None if wait == inf else wait) if wait else self._ended.get_nowait())
            except Empty:
                return found
            wait = 0.0

    def wake(self) -> None:
        """End the waiting that is under way, or the next."""
        self.woken = True
        self._ended.put(None)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
