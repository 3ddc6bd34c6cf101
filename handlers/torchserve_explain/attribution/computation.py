"""Computations: generators that ask for rows and go on once all of them have been consumed."""

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from torchserve_explain.attribution.rows import Rows

T = TypeVar("T")
Computation = Generator[list[Rows], None, T]


def together(computations: Iterable[Computation[T]], collect: Callable[[T], None], width: int = 4) -> Computation[None]:
    """Run computations side by side, at most `width` at a time so that memory stays flat, and collect their results."""
    waiting = iter(computations)
    running: list[tuple[Computation[T], list[Rows]]] = []

    def advance(computation: Computation[T]) -> None:
        try:
            running.append((computation, next(computation)))
        except StopIteration as finished:
            collect(finished.value)

    while True:
        while len(running) < width and (computation := next(waiting, None)) is not None:
            advance(computation)
        if not running:
            return
        yield [rows for _, needed in running for rows in needed]
        before, running = running, []
        for computation, _ in before:
            advance(computation)
