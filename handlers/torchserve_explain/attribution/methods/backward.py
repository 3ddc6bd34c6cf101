"""Which way back a gradient takes: the model's own, or one in which what only weighs a signal is a number."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from torchserve_explain.attribution.functions import MATRIX_PRODUCTS, FunctionCall, replacing, surrogate
from torchserve_explain.attribution.fused import OPENED
from torchserve_explain.attribution.norms import LayerNorm
from torchserve_explain.attribution.rows import BackwardRule

GATED = ("gelu", "silu", "hardswish", "mish", "tanh", "elu", "selu", "celu")  # f(x) = x g(x)


class Backward(StrEnum):
    """The model's own gradient, or LibraGrad's."""

    PLAIN = "plain"
    LIBRA = "libra"

    @property
    def rule(self) -> BackwardRule | None:
        """The rule by which passes go back; None is the model's own."""
        return None if self is Backward.PLAIN else Libra()


@dataclass(frozen=True)
class Libra:
    """Gates, deviations and the weights of attention are numbers; each factor of a product of signals gets half its gradient.

    Then input x gradient, with what biases add, sums to the score; arXiv:2411.16760, theorems on FullGrad-completeness.
    ReLUs, poolings and batch norms, which are linear where they are, keep their own gradient.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed model: the same modules, their functions with other gradients."""
        rules = OPENED | dict.fromkeys(GATED, _gated) | dict.fromkeys((*MATRIX_PRODUCTS, "mul"), _product)
        rules |= {"softmax": FunctionCall.value, "layer_norm": _norm, "normalize": _unit, "div": _quotient}
        return replacing(model, lambda: rules)


def _gated(call: FunctionCall) -> Tensor:
    """f(x) = x g(x) with g(x) a number; at zero the limit from above."""
    x = call.inputs[0]
    at = x.detach()
    at = at.where(at != 0, torch.finfo(at.dtype).eps)
    with torch.no_grad():
        gate = call.run(at) / at
    return surrogate(call.value(), x * gate)


def _product(call: FunctionCall) -> Tensor:
    """Two factors in halves, but a gate is a number: what a sigmoid answers, or else the smaller of two."""
    if len(call.inputs) < 2:
        return call.run(call.args[0])
    (a, b), product = call.inputs, call.value()
    sides = [_is_gate(one) or one.shape != product.shape for one in (a, b)]
    if call.name == "mul" and sides[0] != sides[1]:
        return surrogate(product, a.detach() * b if sides[0] else a * b.detach())
    return surrogate(product, (call.run(a, b.detach()) + call.run(a.detach(), b)) / 2)


def _is_gate(factor: Tensor) -> bool:
    return type(factor.grad_fn).__name__.startswith(("Sigmoid", "Hardsigmoid"))


def _quotient(call: FunctionCall) -> Tensor:
    """What divides is a number."""
    divisor = call.args[1]
    return call.run(call.args[0], divisor.detach() if isinstance(divisor, Tensor) else divisor)


def _norm(call: FunctionCall) -> Tensor:
    """A layer norm whose deviation is a number."""
    x, norm = call.inputs[0], LayerNorm.of(call)
    return surrogate(call.value(), norm.scaled(norm.centred(x) / norm.deviation(x)))


def _unit(call: FunctionCall) -> Tensor:
    """A vector over its length, which is a number."""
    x, output = call.inputs[0], call.value()
    return surrogate(output, x * (output / x.detach()).nan_to_num(0, 0, 0))
