"""How the relevance of an operation's output is shared among its inputs, but for convolutions and linear layers."""

import torch
from torch import Tensor

from torchserve_explain.attribution.functions import (
    ACTIVATION_NODES,
    ACTIVATIONS,
    JOINING_NODES,
    MATRIX_PRODUCTS,
    FunctionCall,
    Replacements,
    going_back,
    surrogate,
)
from torchserve_explain.attribution.fused import OPENED
from torchserve_explain.attribution.norms import LayerNorm
from torchserve_explain.errors import Unsupported

STABILIZER = 1e-6
PROPORTIONAL = ("avg_pool2d", "adaptive_avg_pool2d", "mean", "sum")
AFFINE = ("batch_norm", "neg", "rsub")
UNRULED = (  # which autograd cannot tell from a linear layer or a convolution
    *("addmm", "addmv", "baddbmm", "convolution"),
    *("conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
# What autograd calls the operations that the rules replace.
RULED_NODES = ACTIVATION_NODES | JOINING_NODES | {"Sub of two"}


def sharing(attention: bool) -> Replacements:
    """Return the rules; without `attention` the weights that a softmax makes are constants, arXiv:2202.07304."""
    rules = OPENED | dict.fromkeys(ACTIVATIONS, _activation) | dict.fromkeys(PROPORTIONAL, _in_proportion)
    rules |= dict.fromkeys(AFFINE, _pass) | dict.fromkeys(MATRIX_PRODUCTS, _matrix_product) | dict.fromkeys(UNRULED, _refuse)
    rules |= {"add": _sum, "sub": _sum, "mul": _product, "div": _quotient, "layer_norm": _norm, "normalize": _pass}
    return rules | {"softmax": _softmax if attention else FunctionCall.value}


def own(x: Tensor) -> Tensor:
    """Return a copy: the model may go on to change the tensor in place."""
    return x.clone()


def stable(x: Tensor) -> Tensor:
    """Return a divisor that is not zero."""
    return x.new_tensor(STABILIZER).copysign(x).add_(x)


def _pass(call: FunctionCall) -> Tensor:
    return surrogate(call.value(), call.inputs[0])


def _activation(call: FunctionCall) -> Tensor:
    """Relevance passes unchanged: in place, it is the value alone that changes."""
    if not call.in_place:
        return _pass(call)
    x: Tensor = call.args[0]
    with torch.no_grad():
        call.function(x.detach(), *call.args[1:], **call.kwargs)
    return x


def _in_proportion(call: FunctionCall) -> Tensor:
    """Each input of a linear function gets its own contribution's share."""
    x, output = call.inputs[0], call.value()
    return surrogate(output, call.run(x * own(x.detach())) / stable(output))


def _sum(call: FunctionCall) -> Tensor:
    """Each summand gets its share; a constant tensor, such as a position's, keeps its own, but a number has none."""
    total, tensors = call.value(), [value for value in call.args[:2] if isinstance(value, Tensor)]
    if len(call.inputs) < 2 and (len(tensors) < 2 or call.name == "sub"):
        return _pass(call)
    first = call.args[0].detach() if isinstance(call.args[0], Tensor) else call.args[0]
    divisor = stable(total)
    shares = zip(call.args, (first, total - first), strict=False)
    shared = [(value, share / divisor) for value, share in shares if value.requires_grad]
    fractions = [(share, value.shape) for value, share in shared]

    def back(relevance: Tensor) -> tuple[Tensor, ...]:
        return tuple((relevance * fraction).sum_to_size(shape) for fraction, shape in fractions)

    return going_back(total, back, *(value for value, _ in shared))


def _product(call: FunctionCall) -> Tensor:
    """The signal takes all: a gate is the smaller factor, which the larger is stretched by; equals take one half each."""
    if len(call.inputs) < 2:
        return _pass(call)
    (a, b), product = call.inputs, call.value()
    if a.shape == b.shape or product.shape not in (a.shape, b.shape):
        return surrogate(product, (a + b).expand_as(product) / 2)
    return surrogate(product, a if a.shape == product.shape else b)


def _quotient(call: FunctionCall) -> Tensor:
    """What is divided takes all, as beside a norm: AttnLRP, proposition 3.4."""
    output = call.value()
    if not call.args[0].requires_grad or call.args[0].shape != output.shape:
        raise Unsupported("LRP has no rule for a division by a signal of more values")
    return surrogate(output, call.args[0])


def _matrix_product(call: FunctionCall) -> Tensor:
    """Each contribution a b to a sum of products gets its share, one half of it for each factor that is a signal.

    R_a = a sum(b R / (n z)) with n the number of signals; AttnLRP, proposition 3.3.
    """
    if call.signals != len(call.inputs):
        raise Unsupported(f"LRP has no rule for {call.name} of more than two signals")
    (a, b), output = call.args[:2], call.value()
    linear = torch.zeros_like(output)
    if a.requires_grad:
        linear = linear + call.run(a * own(a.detach()), b.detach())
    if b.requires_grad:
        linear = linear + call.run(a.detach(), b * own(b.detach()))
    return surrogate(output, linear / (len(call.inputs) * stable(output)))


def _softmax(call: FunctionCall) -> Tensor:
    """Its Taylor expansion at the input, whose constant term keeps the rest: R_x = x (R - s sum(R)); proposition 3.1."""
    x, weights = call.inputs[0], call.value()
    dim = call.args[1] if len(call.args) > 1 else call.kwargs["dim"]
    masked = x.isinf()
    at = x.masked_fill(masked, 0).to(weights.dtype) * x.detach().masked_fill(masked, 0)
    return surrogate(weights, torch.add(at, (weights * at).sum(dim, keepdim=True), alpha=-1))


def _norm(call: FunctionCall) -> Tensor:
    """The deviation takes nothing (proposition 3.4); what is left is linear, and each input gets its contribution's share."""
    x, output, norm = call.inputs[0], call.value(), LayerNorm.of(call)
    linear = norm.scaled(norm.centred(x * own(x.detach())) / norm.deviation(x))
    return surrogate(output, linear / stable(output))


def _refuse(call: FunctionCall) -> Tensor:
    raise Unsupported(f"LRP has no rule for {call.name}")
