"""Plain gradients: one row a map."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.methods.backward import Backward
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, OwnRow


def squared_norm(gradient: Tensor) -> Tensor:
    """Return the squared l2 norm over the colour channels, [1, H, W]."""
    return gradient.square().sum(0, keepdim=True)


@dataclass(frozen=True)
class PlainGradient(Method):
    """A method of one row's gradient; `backward` says which way back it takes."""

    backward: Backward = Backward.PLAIN

    @property
    def own_row(self) -> OwnRow | None:  # type: ignore[override]
        """The pass that predicts goes back the model's own way."""
        return OwnRow.GRADIENT if self.backward is Backward.PLAIN else None


@dataclass(frozen=True)
class Saliency(PlainGradient):
    """Absolute gradient of the score, channel by channel: how much each value matters, whatever the direction.

    map = |dF/dx|, never negative; arXiv:1312.6034, section 3 (summed over channels where that takes the largest).
    """

    name: ClassVar[str] = "saliency"
    signed: ClassVar[bool] = False

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradient = yield from case.gradient(self.backward.rule)
        return Attribution(gradient.abs())


@dataclass(frozen=True)
class InputXGradient(PlainGradient):
    """Normalised input times the score's gradient: what the model's first-order expansion gives each value.

    map = x * dF/dx, signed; arXiv:1605.01713, section 2.
    """

    name: ClassVar[str] = "input_x_gradient"

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradient = yield from case.gradient(self.backward.rule)
        return Attribution(case.input * gradient)


@dataclass(frozen=True)
class Sensitivity(PlainGradient):
    """Squared norm over colour channels of the score's gradient: where a small change moves the score most.

    map[y, x] = sum_c (dF/dx[c, y, x])^2, never negative; arXiv:1312.6034, section 3, with the squared norm.
    """

    name: ClassVar[str] = "sensitivity"
    signed: ClassVar[bool] = False

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradient = yield from case.gradient(self.backward.rule)
        return Attribution(squared_norm(gradient))
