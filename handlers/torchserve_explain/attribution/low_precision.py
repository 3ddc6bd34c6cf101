"""A network in narrower arithmetic, for rows whose scores and layers are all that is wanted."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def narrowed(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a network that computes in `dtype` and takes and answers what the network does.

    A linear layer that comes last stays as it was: rounded to the eight bits of bfloat16, logits would move in steps as
    large as what a hidden window does to them.
    """
    wide, copied = example.dtype, copy.deepcopy(model).to(dtype)
    head = _head(copied, example.to(dtype))
    if isinstance(head, nn.Linear):
        head.to(wide).register_forward_pre_hook(lambda _module, inputs: (inputs[0].to(wide),))
    copied.register_forward_pre_hook(lambda _module, inputs: (inputs[0].to(dtype),))
    copied.register_forward_hook(lambda _module, _inputs, logits: logits.to(wide))
    return copied


def _head(model: nn.Module, example: Tensor) -> nn.Module | None:
    """Return the module with parameters of its own that is called last."""
    called: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        called.append(module)

    modules = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.no_grad():
            model(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    return called[-1] if called else None
