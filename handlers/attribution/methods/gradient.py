"""Plain gradients: one row a map."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attribution.methods.method import Attribution, Case, Method, register
from attribution.rows import Asking, Evaluation, Rule


def input_gradient(case: Case, rule: Rule | None = None) -> Asking[Tensor]:
    """Ask for the gradient [C, H, W] of the case's score with respect to its input."""
    found: list[Tensor] = []

    def keep(_start: int, evaluation: Evaluation) -> None:
        assert evaluation.gradients is not None
        found.append(evaluation.gradients[0])

    yield [case.rows(1, lambda _start, _stop: case.input[None], keep, rule=rule)]
    return found[0]


def squared_norm(gradient: Tensor) -> Tensor:
    """Return the squared l2 norm over the colour channels, [1, H, W]."""
    return gradient.square().sum(0, keepdim=True)


@register("sensitivity")
@dataclass(frozen=True)
class Sensitivity(Method):
    """Squared norm over colour channels of the score's gradient: where a small change moves the score most.

    map[y, x] = sum_c (dF/dx[c, y, x])^2, never negative; arXiv:1312.6034, section 3, with the squared norm.
    """

    signed: ClassVar[bool] = False

    def evaluations(self) -> int:
        return 1

    def attribute(self, case: Case) -> Asking[Attribution]:
        gradient = yield from input_gradient(case)
        return Attribution(squared_norm(gradient))
