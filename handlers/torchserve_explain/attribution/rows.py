"""Rows: the model evaluations that a method asks for, whoever else's share the pass.

In evaluation mode the rows of a pass are independent of each other, and the gradient of the sum of
selected scores gives every row its own gradient. So a method only says which rows it needs and how
to reduce them; the engine alone decides how rows of different methods and requests are packed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn


class Score(StrEnum):
    """What is explained: the target's logit, or the probability that the classifier's head makes of it."""

    LOGIT = "logit"
    PROBABILITY = "probability"


class Contrast(StrEnum):
    """What a target's score is compared with where that is no class of the client's choice.

    `runner_up` is the likeliest class beside the target at the image; `rest` are all others: their log-sum-exp for
    logits, their sum for probabilities.
    """

    RUNNER_UP = "runner_up"
    REST = "rest"


Versus = int | Contrast  # a class, or what stands for one


class Form(StrEnum):
    """Which form of the model evaluates rows: the module, its copy in low precision, or its compiled forward pass."""

    MODULE = "module"
    NARROW = "narrow"
    COMPILED = "compiled"


class BackwardRule(Protocol):
    """A change of the model's layers under which a pass runs; equal rules share passes."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Return a changed copy that shares the parameters; `model` itself stays as it is."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Layer:
    """A layer's output `activation` [n, channels, h, w] and the score's `gradient` with respect to it."""

    activation: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients of the scores of some rows: `each` [n, C, H, W], unless nobody wants more than a sum of them.

    `early` [n, ...] are gradients where the image has come no further than through linear steps, and `pull` takes
    one of them, [...], the rest of the way to the image, [C, H, W].
    """

    each: Tensor | None
    early: Tensor
    pull: Callable[[Tensor], Tensor]

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum [C, H, W] of the rows' gradients, each times its weight [n]."""
        return self.pull(torch.tensordot(weights, self.early, 1))

    def slice(self, start: int, stop: int) -> "Gradients":
        """The rows `start` to `stop` alone."""
        return Gradients(None if self.each is None else self.each[start:stop], self.early[start:stop], self.pull)


@dataclass(frozen=True)
class Evaluation:
    """What a pass says of some rows: `logits` [n, classes], `scores` [n], gradients, and by name layers and activations."""

    logits: Tensor
    scores: Tensor
    found: Gradients | None
    layers: dict[str, Layer]
    activations: dict[str, Tensor]

    @property
    def gradients(self) -> Tensor:
        """The gradients [n, C, H, W] of the scores, where rows asked for each."""
        assert self.found is not None and self.found.each is not None
        return self.found.each

    def weighted_gradient(self, weights: Tensor) -> Tensor:
        """Return the sum [C, H, W] of the gradients, each times its weight [n], where rows asked for gradients."""
        assert self.found is not None
        return self.found.weighted(weights)

    def slice(self, start: int, stop: int) -> "Evaluation":
        """The rows `start` to `stop` alone."""
        return Evaluation(
            self.logits[start:stop],
            self.scores[start:stop],
            None if self.found is None else self.found.slice(start, stop),
            {name: Layer(layer.activation[start:stop], layer.gradient[start:stop]) for name, layer in self.layers.items()},
            {name: activation[start:stop] for name, activation in self.activations.items()},
        )


@dataclass(frozen=True)
class Known:
    """The evaluation of one row that has been made already: of which input and score, and the seconds it took."""

    evaluation: Evaluation
    input: Tensor
    target: int
    score: Score
    seconds: float
    versus: Versus | None = None


@dataclass(frozen=True)
class Rows:
    """`count` evaluations of one target's score; `target` None is the class that the model predicts for each row.

    With `versus` the score is the target's less that of another class, or of what stands for one.

    `inputs(start, stop)` makes rows start..stop-1 as [n, C, H, W] when they are due, and must make the
    same rows when asked again (a pass that ran out of memory is repeated). `consume(start, evaluation)`
    takes the result of rows start, start + 1, ...; every row is consumed exactly once, in order. With `summed` it
    takes the gradients as weighted sums alone, which cost less. `layers` want their activation and gradient, `activations`
    are layers whose gradient is not wanted. `precise` rows are never evaluated in low precision.
    `passes` is how many of the model's own evaluations one row costs. Where the evaluation of all rows is `known`, it
    is consumed at once.
    """

    count: int
    inputs: Callable[[int, int], Tensor]
    consume: Callable[[int, Evaluation], None]
    target: int | None = None
    score: Score = Score.LOGIT
    gradient: bool = True
    summed: bool = False
    layers: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    rule: BackwardRule | None = None
    precise: bool = False
    passes: int = 1
    known: Known | None = None
    versus: Versus | None = None

    @property
    def alone(self) -> bool:
        """Whether this is one row for its layers' sake, whose score is compared with no other row's."""
        return self.count == 1 and bool(self.layers)
