"""Torch's functions as a model calls them: seen, replaced, and the operations that they are made of."""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchserve_explain.errors import Unsupported

# Functions of one tensor that work on each value by itself.
ACTIVATIONS = {
    *("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "selu", "celu", "silu", "gelu", "mish", "softplus"),
    *("sigmoid", "hardsigmoid", "hardswish", "tanh", "clamp"),
}
ALIASES = {
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "__rsub": "rsub",
    "expit": "sigmoid",
}
ALIASES |= dict.fromkeys(("clip", "clamp_min", "clamp_max"), "clamp")
# Functions that sum products of two tensors' values.
MATRIX_PRODUCTS = ("matmul", "mm", "bmm", "mv", "dot", "inner", "tensordot", "einsum")
# What autograd calls the activations.
ACTIVATION_NODES = {
    *("Relu", "Hardtanh", "LeakyRelu", "PreluKernel", "Elu", "Silu", "Gelu", "Mish", "Softplus"),
    *("Sigmoid", "Hardsigmoid", "Hardswish", "Tanh", "Clamp", "ClampMin", "ClampMax"),
}
# Products and quotients of two tensors that depend on the image, and what norms and attention are made of.
JOINING_NODES = {
    *("Mul of two", "Div of two", "Bmm of two", "Mm of two", "Mv of two", "Dot of two", "Addcmul", "Addcmul of two"),
    *("LinalgVectorNorm", "NativeLayerNorm", "NativeGroupNorm", "Softmax", "SafeSoftmax", "Attention", "Attention of two"),
}
# Operations that are linear in all that they join.
LINEAR_NODES = {
    *("Convolution", "Addmm", "Mm", "Linear", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "Mean", "Sum"),
    *("AvgPool2D", "AdaptiveAvgPool2D", "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Add of two", "Cat", "Stack", "T"),
    *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Permute", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Clone"),
    *("Alias", "Slice", "Select", "Split", "SplitWithSizes", "Chunk", "Unbind", "ConstantPadNd", "Roll", "ToCopy"),
}


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function by its plain `name`; `inputs` are its tensors that depend on the image, as they were before it."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    replacing: TorchFunctionMode  # under it, the functions that are called are replaced, too

    @property
    def in_place(self) -> bool:
        """Whether the function changes its first argument."""
        name = self.function.__name__
        written = name.endswith("_") and not name.endswith("__")  # __rsub__ changes nothing
        return written or bool(self.kwargs.get("inplace"))

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the first two arguments that a gradient goes back to."""
        return [value for value in self.args[:2] if isinstance(value, Tensor) and value.requires_grad]

    @property
    def signals(self) -> int:
        """How many of the arguments are tensors that a gradient goes back to."""
        return sum(isinstance(value, Tensor) and value.requires_grad for value in self.args)

    def run(self, *first: Tensor) -> Tensor:
        """Call the function with other first arguments, which are left as they are."""
        changed = (first[0].clone(), *first[1:]) if self.in_place else first
        output: Tensor = self.function(*changed, *self.args[len(first) :], **self.kwargs)
        return output

    def value(self) -> Tensor:
        """Return the function's result without a gradient, its arguments left as they are."""
        with torch.no_grad():
            return self.run(self.args[0])

    def plain(self) -> Any:
        """Call the function as the model does."""
        return self.function(*self.args, **self.kwargs)


def _tensors_first(call: FunctionCall) -> FunctionCall:
    """Return a call whose arguments begin with its tensors: those of an einsum follow its equation, or come as a list."""
    if call.name != "einsum" or not isinstance(call.args[0], str):
        return call
    equation, *operands = call.args
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands

    def contract(*given: Tensor) -> Any:
        return call.function(equation, *given)

    return replace(call, function=contract, args=tuple(tensors))


Replacements = Mapping[str, Callable[[FunctionCall], Any]]


class _Replacing(TorchFunctionMode):
    """Hands the calls of functions to their replacements while it is active."""

    def __init__(self, replacements: Replacements, in_place: Container[str]) -> None:
        super().__init__()
        self._replacements, self._in_place = replacements, in_place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").rstrip("_")
        call = _tensors_first(FunctionCall(ALIASES.get(name, name), func, args, kwargs or {}, self))
        replacement = self._replacements.get(call.name)
        if replacement is not None and any(isinstance(v, Tensor) and v.requires_grad for v in call.kwargs.values()):
            raise Unsupported(f"the model calls {call.name} with its input by name, which no rule reaches")
        if replacement is None or not call.signals:
            return call.plain()
        if call.name in self._in_place or not call.in_place:
            return replacement(call)
        # What depends on the function's work in place finds the replacement's result there.
        return args[0].copy_(replacement(replace(call, args=(args[0].clone(), *args[1:]))))


def replacing(model: nn.Module, replacements: Callable[[], Replacements], in_place: Container[str] = ()) -> nn.Module:
    """Return a model of the same modules whose functions are replaced; `replacements` are made anew for each pass.

    A function is found whatever form it has: a module, one used several times, in place, or called as a function. The
    replacements of functions named by `in_place` work in place themselves where the model does; the others get a copy.
    """
    return _Replaced(model, replacements, in_place)


class _Replaced(nn.Module):
    """A model whose functions are replaced; its own hooks run once, as in the model."""

    def __init__(self, model: nn.Module, replacements: Callable[[], Replacements], in_place: Container[str]) -> None:
        super().__init__()
        self._model = [model]  # not a child: whose modules they are stays as it is
        self._replacements, self._in_place = replacements, in_place

    def forward(self, x: Tensor) -> Any:
        with _Replacing(self._replacements(), self._in_place):
            return self._model[0](x)


class _GoingBack(torch.autograd.Function):
    """A value from which a gradient goes back by a function of its own."""

    @staticmethod
    def forward(context: Any, value: Tensor, back: Callable[[Tensor], tuple[Tensor, ...]], *_inputs: Tensor) -> Tensor:
        context.back = back
        return value.detach()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *context.back(gradient)


def going_back(value: Tensor, back: Callable[[Tensor], tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
    """Return `value` from which `back` takes a gradient to a gradient of each of `inputs`."""
    found: Tensor = _GoingBack.apply(value.detach(), back, *inputs)
    return found


class _ChangedInPlace(torch.autograd.Function):
    """A tensor given another value in place, from which a gradient goes back by a function of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor, value: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        context.back = back
        context.mark_dirty(x)
        return x.copy_(value)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return context.back(gradient), None, None


def changed_in_place(x: Tensor, value: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `x` with its values changed, from which `back` takes a gradient to one of what it was."""
    found: Tensor = _ChangedInPlace.apply(x, value, back)
    return found


def surrogate(value: Tensor, linear: Tensor) -> Tensor:
    """Return `value` with the gradient of `linear`, which has its shape."""
    return going_back(value, lambda gradient: (gradient,), linear)


def operations(model: nn.Module, example: Tensor) -> set[str]:
    """Return the names of the operations between an image and the logits, as autograd has them.

    One that joins two tensors which both depend on the image is an 'Add of two', a 'Mul of two' and so on.
    """
    with torch.enable_grad():
        output: Tensor = model(example.detach().requires_grad_().clone())
    return set(node_names(output.grad_fn))


def node_names(last: Any) -> Iterator[str]:
    """Yield the names of the operations that lead to a node of the autograd graph, itself among them."""
    seen: set[Any] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [one for one, _ in node.next_functions if one is not None]
        waiting += before
        if before:
            name = operation_name(node)
            joins = len(before) > 1 and name not in ("Cat", "Stack")
            divides = name == "Div" and node.next_functions[0][0] is None
            yield f"{name} of two" if joins else f"{name} by the image" if divides else name


def operation_name(node: Any) -> str:
    """Return an operation's name; a function of the user's own keeps its whole name, which no rule knows."""
    full = type(node).__name__
    name = full.rstrip("0123456789").removesuffix("Backward") if full[-1].isdecimal() else full
    if name.startswith("ScaledDotProduct"):
        return "Attention"  # one for each device
    return f"{name} of the batch" if getattr(node, "_saved_training", False) else name
