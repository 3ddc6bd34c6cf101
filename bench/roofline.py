"""The roofline: the least seconds that a work's multiply-adds and its bytes allow on this machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.captured import own_gradient
from bench.floor import FORWARD_ROWS, GRADIENT_ROWS, rows_of
from bench.machine import Speed
from bench.subjects import Subject
from torchserve_explain.serving.settings import Limits


@dataclass(frozen=True)
class Cost:
    """What passes cost: multiply-adds of a row, bytes of a row, and bytes of the weights, which each pass reads once."""

    multiply_adds: int
    row_bytes: int
    weight_bytes: int

    def seconds(self, rows: int, passes: int, speed: Speed) -> float:
        """Return the least seconds of so many rows: those of the multiply-adds or those of the bytes, whichever are more."""
        moved = rows * self.row_bytes + passes * self.weight_bytes
        return max(rows * self.multiply_adds / speed.multiply_adds, moved / speed.bytes)


def cost(network: nn.Module, image: Tensor, gradient: bool) -> Cost:
    """Return what a frozen network costs for an image [1, C, H, W]: forward, or forward and back to the input.

    Multiply-adds are those of convolutions and matrix products. Bytes are those of the layers with weights: the weights, and
    of a row each such layer's input and output. Back, a layer reads its output's gradient and its weights, and writes its
    input's gradient: as many bytes again. What lies between layers (norms, activations, sums, pooling) counts as free. Bytes
    that stay in a cache between two layers count, too: a small network may beat its bytes' seconds, not its multiply-adds'.
    """
    with FlopCounterMode(display=False) as counter, _moved(network) as moved, torch.set_grad_enabled(gradient):
        if gradient:
            own_gradient(network, 0)(image.detach().requires_grad_().clone())  # the counter's hooks refuse a leaf
        else:
            network(image)
    weights = sum(parameter.nbytes for layer in _layers(network) for parameter in layer.parameters(recurse=False))
    ways = 1 + gradient
    return Cost(counter.get_total_flops() // 2, ways * sum(moved), ways * weights)


def _layers(network: nn.Module) -> list[nn.Module]:
    """Return the convolutions and linear layers."""
    return [module for module in network.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]


@contextmanager
def _moved(network: nn.Module) -> Iterator[list[int]]:
    """Give the bytes of each layer's input and output, as they pass."""
    found: list[int] = []

    def note(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(inputs[0].nbytes + output.nbytes)

    handles = [layer.register_forward_hook(note) for layer in _layers(network)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def least_seconds(work: str, given: Callable[[], Subject], speed: Speed) -> float | None:
    """Return the least seconds of a work with a known number of rows, in passes as large as the engine's; None of others."""
    if work not in GRADIENT_ROWS and work not in FORWARD_ROWS:
        return None
    subject = given()
    rows = rows_of(work, subject)
    passes = -(-rows // Limits().pack)
    return cost(subject.classifier._model, subject.images[:1], work in GRADIENT_ROWS).seconds(rows, passes, speed)
