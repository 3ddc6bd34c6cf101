"""What a pass is asked for beside its scores: layers' outputs, and the scores' gradients there."""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge


def gradients_at(selected: Tensor, wanted: Sequence[Tensor | GradientEdge]) -> list[Tensor | None]:
    """Return the gradient of the summed scores to each tensor; None where the scores do not depend on it."""
    found: list[Tensor | None] = [None] * len(wanted)
    positions = [position for position, one in enumerate(wanted) if isinstance(one, GradientEdge) or one.requires_grad]
    if selected.requires_grad and positions:
        reached = [wanted[position] for position in positions]
        gradients = torch.autograd.grad(selected, reached, torch.ones_like(selected), allow_unused=True)  # type: ignore[arg-type]
        for position, gradient in zip(positions, gradients, strict=True):
            found[position] = gradient
    return found


@contextmanager
def captured(model: nn.Module, layers: Set[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the named layers' outputs while the model runs; the autograd graph starts at the first of them if not before."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            starts_graph = torch.is_grad_enabled() and not output.requires_grad
            outputs[name] = output.detach().requires_grad_() if starts_graph else output
            return outputs[name].clone()  # the next layer may work in place

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
