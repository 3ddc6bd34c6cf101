"""Plain gradients: one row a map."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, register
from torchserve_explain.attribution.rows import BackwardRule, Evaluation, Rows


def gradient_row(case: Case, found: list[Tensor], rule: BackwardRule | None = None) -> Rows:
    """Ask for one row's gradient [C, H, W] of the case's score with respect to its input, to be put into `found`."""

    def keep(_start: int, evaluation: Evaluation) -> None:
        found.append(evaluation.gradients[0])

    return case.rows(1, lambda _start, _stop: case.input[None], keep, rule=rule)


def input_gradient(case: Case, rule: BackwardRule | None = None) -> Computation[Tensor]:
    """Ask for the gradient [C, H, W] of the case's score with respect to its input."""
    found: list[Tensor] = []
    yield [gradient_row(case, found, rule)]
    return found[0]


def squared_norm(gradient: Tensor) -> Tensor:
    """Return the squared l2 norm over the colour channels, [1, H, W]."""
    return gradient.square().sum(0, keepdim=True)


@register("saliency")
@dataclass(frozen=True)
class Saliency(Method):
    """Absolute gradient of the score, channel by channel: how much each value matters, whatever the direction.

    map = |dF/dx|, never negative; arXiv:1312.6034, section 3 (summed over channels where that takes the largest).
    """

    signed: ClassVar[bool] = False

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradient = yield from input_gradient(case)
        return Attribution(gradient.abs())


@register("input_x_gradient")
@dataclass(frozen=True)
class InputXGradient(Method):
    """Normalised input times the score's gradient: what the model's first-order expansion gives each value.

    map = x * dF/dx, signed; arXiv:1605.01713, section 2.
    """

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradient = yield from input_gradient(case)
        return Attribution(case.input * gradient)


@register("sensitivity")
@dataclass(frozen=True)
class Sensitivity(Method):
    """Squared norm over colour channels of the score's gradient: where a small change moves the score most.

    map[y, x] = sum_c (dF/dx[c, y, x])^2, never negative; arXiv:1312.6034, section 3, with the squared norm.
    """

    signed: ClassVar[bool] = False

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradient = yield from input_gradient(case)
        return Attribution(squared_norm(gradient))
