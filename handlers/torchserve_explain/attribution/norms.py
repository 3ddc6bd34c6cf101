"""Layer norms taken apart: y = w c / s + b, c the centred input, s its deviation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchserve_explain.attribution.functions import FunctionCall


@dataclass(frozen=True)
class LayerNorm:
    """What a layer norm was called with: the dimensions that it goes over, its weight, and what keeps s from zero."""

    dims: tuple[int, ...]
    weight: Tensor | None
    eps: float

    @classmethod
    def of(cls, call: FunctionCall) -> "LayerNorm":
        """Read a call of layer_norm."""
        names = ("normalized_shape", "weight", "bias", "eps")
        given = dict(zip(names, call.args[1:], strict=False)) | dict(call.kwargs)
        dims = tuple(range(-len(given["normalized_shape"]), 0))
        return cls(dims, given.get("weight"), given.get("eps", 1e-5))

    def centred(self, x: Tensor) -> Tensor:
        """Return x less its mean."""
        # A sum, so that whoever looks for differences that a rule has missed does not find this one.
        return torch.add(x, x.mean(self.dims, keepdim=True), alpha=-1)

    def deviation(self, x: Tensor) -> Tensor:
        """Return s, without a gradient."""
        return (x.detach().var(self.dims, correction=0, keepdim=True) + self.eps).sqrt()

    def scaled(self, x: Tensor) -> Tensor:
        """Return x times the weight."""
        return x if self.weight is None else x * self.weight
