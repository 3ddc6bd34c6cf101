"""Interruption: between two layers of a long pass somebody else's short one may be run."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def interrupted(model: nn.Module, pause: Callable[[], None] | None) -> Iterator[None]:
    """Call `pause` after each layer with parameters while the model runs, on the way to the logits and on the way back.

    What `pause` does finds gradients switched on, as they are outside a pass, and must not run this model's modules.
    """
    if pause is None:
        yield
        return

    def back(_gradient: Tensor) -> None:
        with torch.enable_grad():
            pause()

    def forth(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(back)  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            pause()

    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_hook(forth) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree that shares every parameter and buffer with the original."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def is_independent(copied: nn.Module, model: nn.Module, example: Tensor) -> bool:
    """Whether a copy runs without the original's modules, which one that keeps functions of its own may not."""
    called: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        called.append(module)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            copied(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    return not called
