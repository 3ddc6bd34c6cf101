"""Computations: generators that ask for what they need and go on once it is there.

A method, a quality and a whole request are computations. One asks for rows of the model, for a function to be run on
a thread, or for other computations to be run side by side; the engine serves all that are in flight.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from torchserve_explain.attribution.rows import Rows
from torchserve_explain.errors import ExplainError

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Result(Generic[T]):
    """What a computation came to, the evaluations spent on it, and its share of the passes' seconds."""

    value: T
    evaluations: int
    seconds: float


Outcome = Result[T] | ExplainError


class Call(Generic[T]):
    """A function to be run on a thread, and what it answers."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._future: Future[T] = Future()

    def run(self) -> None:
        """Run the function and keep what it returns or raises."""
        try:
            self._future.set_result(self._function())
        except BaseException as error:
            self._future.set_exception(error)

    def result(self) -> T:
        """Return what the function returned, or raise what it raised."""
        return self._future.result()


@dataclass(frozen=True)
class Group(Generic[T]):
    """Work to be run side by side, at most `width` at a time, until `deadline`, a time of the engine's clock.

    `collect` takes the outcomes in the order of the work, whatever order it ends in, so that sums are the same each time.
    """

    works: Iterator["Work[T]"]
    collect: Callable[[Outcome[T]], None]
    width: int
    deadline: float


Need = Rows | Call[Any] | Group[Any]
Computation = Generator[Sequence[Need], None, T]


class Work(Protocol[R_co]):
    """What the engine runs: a computation, and the least number of evaluations that it takes."""

    @property
    def evaluations(self) -> int:
        """How many evaluations it takes, or the least of them."""
        ...

    def compute(self) -> Computation[R_co]:
        """Ask for what is needed and return the result."""
        ...


@dataclass(frozen=True)
class Piece(Generic[T]):
    """A computation as work."""

    computation: Computation[T]
    evaluations: int = 0

    def compute(self) -> Computation[T]:
        """Return the computation, which can be run once."""
        return self.computation


def background(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> Computation[T]:
    """Run a function on a thread while passes go on; return what it returns, raise what it raises."""
    call = Call(partial(function, *args, **options))
    yield [call]
    return call.result()


def side_by_side(works: Iterable[Work[T]], deadline: float = inf) -> Computation[list[Outcome[T]]]:
    """Run work side by side; return each one's result or the error that it alone met."""
    outcomes: list[Outcome[T]] = []
    queue = list(works)
    yield [Group(iter(queue), outcomes.append, len(queue), deadline)]
    return outcomes


def results(works: Iterable[Work[T]], deadline: float = inf) -> Computation[list[Result[T]]]:
    """Run work side by side; return each one's result, or raise the first error met."""
    finished: list[Result[T]] = []

    def collect(outcome: Outcome[T]) -> None:
        finished.append(succeeded(outcome))

    queue = list(works)
    yield [Group(iter(queue), collect, len(queue), deadline)]
    return finished


def together(computations: Iterable[Computation[T]], collect: Callable[[T], None], width: int = 4) -> Computation[None]:
    """Run computations side by side, few at a time so that memory stays flat, and collect their values in order."""
    pieces = (Piece(computation) for computation in computations)
    yield [Group(pieces, lambda outcome: collect(succeeded(outcome).value), width, inf)]


def both(first: Computation[A], second: Computation[B]) -> Computation[tuple[A, B]]:
    """Run two computations side by side; return what each returns, or raise the first error met."""
    pieces: list[Work[Any]] = [Piece(first), Piece(second)]
    one, other = yield from results(pieces)
    return one.value, other.value


def asking(rows: Rows) -> Computation[None]:
    """Ask for rows, whose results their consumer keeps."""
    yield [rows]


def logits_of(inputs: Sequence[Tensor]) -> Computation[Tensor]:
    """Ask for the logits [n, classes] of inputs, on the CPU."""
    parts: list[Tensor] = []

    def made(start: int, stop: int) -> Tensor:
        return torch.stack(list(inputs[start:stop]))

    yield [
        Rows(len(inputs), made, lambda _start, evaluation: parts.append(evaluation.logits.cpu()), gradient=False, precise=True)
    ]
    return torch.cat(parts)


def succeeded(outcome: Outcome[T]) -> Result[T]:
    """Return a result, or raise the error that came instead."""
    if isinstance(outcome, ExplainError):
        raise outcome
    return outcome
