"""The stem: a model's first convolution, through which it sees the image; linear, so sums go back through it as one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchserve_explain.attribution.functions import LINEAR_NODES, node_names


class _Reached(Exception):
    """The stem has answered; what the model would do next is of no interest."""


class Stem:
    """A convolution whose output [n, ...] is an affine function of the image and all that the model takes from it."""

    def __init__(self, name: str, input: Tensor, output: GradientEdge) -> None:
        self.name = name
        self._input, self._output = input, output  # of one row; where the gradient is taken does not matter to it

    def pull(self, gradient: Tensor) -> Tensor:
        """Return the gradient [C, H, W] at the image of a gradient [...] at the stem's output."""
        (found,) = torch.autograd.grad(self._output, self._input, gradient[None], retain_graph=True)
        return found[0]


@contextmanager
def passing(model: nn.Module, stem: Stem | None) -> Iterator[list[GradientEdge]]:
    """Keep the place in the autograd graph where the stem answers, if there is one; what follows may work in place."""
    found: list[GradientEdge] = []
    if stem is None:
        yield found
        return
    handle = model.get_submodule(stem.name).register_forward_hook(
        lambda _m, _i, output: found.append(get_gradient_edge(output))
    )
    try:
        yield found
    finally:
        handle.remove()


def find_stem(model: nn.Module, images: Tensor) -> Stem | None:
    """Return the stem of a model, tried on two images [2, C, H, W]; None where its first convolution is none."""
    called: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: called.append(name)

    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_hook(note(name)) for name, module in convolutions]
    try:
        with torch.no_grad():
            model(images[:1].clone())
    finally:
        for handle in handles:
            handle.remove()
    if not called or called.count(called[0]) != 1:
        return None
    name = called[0]
    first, second, middle = (
        _output(model, name, image)[1].detach() for image in (images[:1], images[1:], images.mean(0, keepdim=True))
    )
    # What is linear to autograd may still have constants taken from the image: that shows between two images.
    affine = torch.allclose((first + second) / 2, middle, rtol=0, atol=1e-4 * float(middle.abs().max()))
    if not affine or not _is_all_that_is_seen(model, name, images[:1]):
        return None
    x, output = _output(model, name, images[:1])
    if len(output) != len(x) or not set(node_names(output.grad_fn)) <= LINEAR_NODES | {"AccumulateGrad"}:
        return None
    return Stem(name, x, get_gradient_edge(output))


def _output(model: nn.Module, name: str, image: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model as far as the named module; return the image and the module's output, with the graph between."""
    outputs: list[Tensor] = []

    def stop(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.append(output)
        raise _Reached

    x = image.detach().requires_grad_()
    handle = model.get_submodule(name).register_forward_hook(stop)
    try:
        model(x.clone())
    except _Reached:
        pass
    finally:
        handle.remove()
    return x, outputs[0]


def _is_all_that_is_seen(model: nn.Module, name: str, image: Tensor) -> bool:
    """Whether a gradient leads from the logits to the image, and none does once the named module's output is detached."""

    def leads() -> bool:
        x = image.detach().requires_grad_()
        logits: Tensor = model(x.clone())
        return logits.requires_grad and torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] is not None

    handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, output: output.detach())
    try:
        around = leads()
    finally:
        handle.remove()
    return leads() and not around
