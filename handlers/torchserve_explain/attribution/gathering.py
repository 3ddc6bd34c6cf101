"""Sums gathered on the way back: what an operation's gradient says of the image is added up beside the gradient itself."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchserve_explain.attribution.functions import FunctionCall, replacing
from torchserve_explain.attribution.fused import OPENED

TOTAL = "total"  # the layer whose gradient is the sum
Add = Callable[[Tensor, Tensor], Tensor]  # an output's gradient and the sum so far to the sum with it
# A call in a pass of so many rows: its result, and what its gradient adds.
Gather = Callable[[FunctionCall, int], tuple[Tensor, Add | None]]


class Gathering(nn.Module):
    """A model, and beside it a sum for each row: zeros of `shape`, to which operations add from the last to the first."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], rules: Mapping[str, Gather]) -> None:
        super().__init__()
        self.add_module(TOTAL, nn.Identity())
        self._model, self._shape, self._rules = [model], shape, rules  # not a child: whose modules they are stays as it is

    def forward(self, x: Tensor) -> Tensor:
        carried = [self.get_submodule(TOTAL)(x.new_zeros(len(x), *self._shape))]

        def gathered(rule: Gather) -> Callable[[FunctionCall], Tensor]:
            def replaced(call: FunctionCall) -> Tensor:
                output, add = rule(call, len(x))
                if add is not None:
                    output, carried[0] = _Gathered.apply(output, carried[0], add)
                return output

            return replaced

        rules = OPENED | {name: gathered(rule) for name, rule in self._rules.items()}
        logits: Tensor = replacing(self._model[0], lambda: rules)(x)
        return logits


class _Gathered(torch.autograd.Function):
    """An output and a sum as they are; the output's gradient is added to the sum's."""

    @staticmethod
    def forward(context: Any, output: Tensor, carried: Tensor, add: Add) -> tuple[Tensor, Tensor]:
        context.add = add
        return output.clone(), carried.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor, total: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, context.add(gradient, total), None
