"""A network's forward pass and its way back to the input, captured as one graph and compiled by Inductor."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

EQUAL = 1e-3  # largest difference of two gradients, over the largest value
Gradient = Callable[[Tensor], Tensor]  # rows [n, C, H, W] to the gradient of their logits' sum, as large


def own_gradient(network: nn.Module, target: int | Tensor) -> Gradient:
    """Return the gradient of a class's logits, summed over rows, to the rows, which must ask for one."""

    def gradient(rows: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(network(rows)[:, target].sum(), rows)
        return found

    return gradient


def captured(gradient: Gradient, rows: Tensor) -> nn.Module:
    """Return a gradient's forward and backward pass as one graph, for rows of this shape [n, C, H, W] alone."""
    both = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(rows.detach().requires_grad_())
    written_once = functionalize(both, remove="mutations_and_views")
    with torch.no_grad():
        graph: nn.Module = make_fx(written_once, tracing_mode="fake", _allow_non_fake_inputs=True)(rows.detach())
    return graph


def compiled_gradient(network: nn.Module, rows: Tensor, target: int | Tensor) -> Gradient:
    """Return the gradient of a class's logits to rows of this shape [n, C, H, W], compiled with the weights frozen.

    Raises what the capture and the compiler raise, and ValueError where it is not the network's own gradient.
    """
    own = own_gradient(network, target)
    compiled = torch.compile(captured(own, rows), dynamic=False)
    tried = rows * torch.linspace(0.5, 1, len(rows)).to(rows)[:, None, None, None]  # no row like another
    expected = own(tried.detach().requires_grad_())

    def gradient(rows: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = compiled(rows)
        return found

    with inductor.patch(freezing=True, compile_threads=1):
        found = gradient(tried)
    scale = float(expected.abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=EQUAL * scale):
        raise ValueError(f"its gradient differs by {float((found - expected).abs().max()) / scale:.1e} of the largest")
    return gradient
