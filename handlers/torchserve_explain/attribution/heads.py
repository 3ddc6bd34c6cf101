"""Heads: what the numbers mean that a network answers, and the layers at its end that a classifier takes off or adds."""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from torchserve_explain.attribution.functions import operation_name
from torchserve_explain.errors import Unsupported

# Operations that move or rename numbers, after which an activation is still the last.
MOVES = {"Squeeze", "Unsqueeze", "View", "UnsafeView", "ReshapeAlias", "Select", "Slice", "Alias", "Clone", "ToCopy"}


class Head(StrEnum):
    """What logits mean: one class of several, classes each by itself, or no probabilities but quantities."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities of logits [..., classes]; raises Unsupported where quantities are none."""
        if self is Head.NONE:
            raise Unsupported("the model answers quantities, which have no probability")
        return logits.softmax(-1) if self is Head.SOFTMAX else logits.sigmoid()

    def values(self, logits: Tensor) -> Tensor:
        """Return what is reported of each class [..., classes]: its probability, or the quantity itself."""
        return logits if self is Head.NONE else self.probabilities(logits)


ENDINGS = {"Softmax": Head.SOFTMAX, "Sigmoid": Head.SIGMOID}


def fit_head(model: nn.Module, example: Tensor, head: Head | None, labels: int) -> Head:
    """Make a network answer logits [n, classes] of its head, which is returned; where it is None it is found.

    An activation at the end is taken off: a probability near 1 hardly has a gradient. One logit z becomes two classes,
    -z and z. Raises ValueError, with the line to write, where the head does not fit or cannot be found; `labels` is
    their number, 0 where there are none.
    """
    outputs, ending, module = _run(model, example)
    head = head or ending or (Head.SOFTMAX if outputs > 1 else Head.SIGMOID if labels == 2 else None)
    if head is None:
        raise ValueError(
            "the network answers one number for an image, and its labels do not tell what that is; write 'classifier: {head: "
            "sigmoid}' with a label for each of both classes where it is the logit of the second, 'classifier: {head: none}' "
            "where it is a quantity"
        )
    if head is Head.SOFTMAX and outputs == 1:
        raise ValueError(
            "a softmax of one logit says nothing; write 'classifier: {head: sigmoid}' for two classes, 'classifier: {head: "
            "none}' for a quantity"
        )
    if head is not Head.NONE and ending is not None:
        _take_off(model, head, ending, module)
    if head is Head.SIGMOID and outputs == 1:
        model.register_forward_hook(_as_two_classes)
    elif outputs == 1:
        model.register_forward_hook(_as_column)
    return head


def _run(model: nn.Module, example: Tensor) -> tuple[int, Head | None, str]:
    """Return how many numbers a network answers, the head that its last operation is, and the module that does that."""
    made: dict[str, list[Any]] = {}

    def note(name: str) -> Any:
        return lambda _module, _inputs, output: made.setdefault(name, []).append(output.grad_fn)

    activations = [name for name, one in model.named_modules() if isinstance(one, nn.Softmax | nn.Sigmoid)]
    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in activations]
    try:
        with torch.enable_grad():
            output = model(example.detach().requires_grad_().clone())
    finally:
        for hook in hooks:
            hook.remove()
    outputs = _count(output, len(example))
    node = output.grad_fn
    while node is not None and operation_name(node) in MOVES:
        node = node.next_functions[0][0]
    ending = None if node is None else ENDINGS.get(operation_name(node))
    module = next((name for name, nodes in made.items() if nodes == [node]), "")
    return outputs, ending, module


def _count(output: Any, images: int) -> int:
    """Return how many numbers an output holds for each of some images; raises ValueError where that is no number."""
    if isinstance(output, Tensor) and len(output.shape) in (1, 2) and len(output) == images and output[0].numel():
        return output[0].numel()
    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(f"a classifier must answer logits [n, classes], this one answers {shape}")


def _take_off(model: nn.Module, head: Head, ending: Head, module: str) -> None:
    """Take the activation off that a network ends in; raises ValueError where it is another head's, or no module."""
    if ending is not head:
        raise ValueError(
            f"the network ends in a {ending}; write 'classifier: {{head: {ending}}}', or 'classifier: {{head: none}}'"
        )
    if not module:
        raise ValueError(
            f"the network's forward ends in a {ending}, and so answers no logits; take it off there and write 'classifier: "
            f"{{head: {ending}}}', or write 'classifier: {{head: none}}' to have what it answers explained as a quantity"
        )
    parent, _, name = module.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())


def _as_two_classes(_module: nn.Module, _inputs: Any, logit: Tensor) -> Tensor:
    """Return the logits [n, 2] of not being the second class, and of being it."""
    column = logit.reshape(-1, 1)
    return torch.cat([-column, column], 1)


def _as_column(_module: nn.Module, _inputs: Any, quantity: Tensor) -> Tensor:
    return quantity.reshape(-1, 1)
