"""Gradients of a changed model: the same output, another way back."""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.interruption import sharing_copy
from torchserve_explain.attribution.methods.gradient import squared_norm
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, Range


@dataclass(frozen=True)
class BiasedLayers:
    """Every Conv2d and Linear keeps its output z and gets the gradient of zb, its twin biased to excitation.

    z = zb * stop(z / zb), zb computed with w + gamma * max(0, w) and b + gamma * max(0, b). Where inputs and z are
    not negative, as between ReLUs, the ratio lies in (0, 1]. Elsewhere (the first layer's input, the linear
    ends of residual branches) zb can pass through zero and the ratio through infinity: there it is bounded to
    [-1, 1], without which the map of a deep residual network is a few overflowing pixels.
    """

    gamma: float

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed copy; parameters are shared with `model`."""
        changed = sharing_copy(model)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                changed.get_submodule(name).forward = partial(self._forward, layer)
        return changed

    def _forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            z: Tensor = layer(x)
        biased = {name: p + self.gamma * p.clamp(min=0) for name, p in layer.named_parameters()}
        zb: Tensor = functional_call(layer, biased, (x,))
        with torch.no_grad():
            ratio = torch.where(zb == 0, 1.0, z / zb).clamp(-1, 1)
            rest = z - zb * ratio  # so that the output is z where the ratio was bounded
        return zb * ratio + rest


class Reduction(StrEnum):
    """How a gradient becomes a map: squared norm over channels, or input x gradient."""

    SENSITIVITY = "sensitivity"
    RELEVANCE = "relevance"


@dataclass(frozen=True)
class BiasedLayer(Method):
    """Gradient through layers biased to their excitations by gamma: the same logits, a sharper map.

    See BiasedLayers for the equation. `sensitivity`: squared norm over channels, never negative;
    `relevance`: input x gradient, signed. gamma = 0 is the plain gradient.
    """

    name: ClassVar[str] = "biased_layer"

    gamma: Annotated[float, Range("a number from 0 to 100", ge=0, le=100)] = 0.25
    reduction: Reduction = Reduction.SENSITIVITY

    @property
    def signed(self) -> bool:  # type: ignore[override]
        """Relevance has a sign, a squared norm has none."""
        return self.reduction is Reduction.RELEVANCE

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradient = yield from case.gradient(BiasedLayers(self.gamma))
        return Attribution(case.input * gradient if self.signed else squared_norm(gradient))
