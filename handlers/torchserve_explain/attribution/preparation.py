"""A module made ready to be run: copied, frozen, folded, or in narrower arithmetic, and whether it still answers alike."""

import copy
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from torchserve_explain.attribution.fusion import fold_layers
from torchserve_explain.attribution.low_precision import narrowed
from torchserve_explain.attribution.rows import BackwardRule
from torchserve_explain.attribution.trial import Forward

log = logging.getLogger(__name__)


def noisy_pixels(channels: int, size: Sequence[int]) -> Tensor:
    """Return two images of noise [2, channels, H, W], to try a model on."""
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(0))


def folded(model: nn.Module, noise: Tensor) -> tuple[nn.Module, int]:
    """Return a frozen copy in evaluation mode with layers folded, and how many; it answers what the model does."""
    copied = _copied(model)
    noise = noise.to(next((p for p in copied.parameters()), noise))
    with torch.no_grad():
        expected = copied(noise[:1].clone())
        count = fold_layers(copied)
        copied.requires_grad_(False)  # the folded weights are new
        if not count or not isinstance(expected, Tensor):
            return copied, count
        rounding = min(0.01, 1000 * torch.finfo(expected.dtype).eps)
        if alike(expected, copied(noise[:1].clone()), rounding):
            return copied, count
    log.warning("layers are not folded: the model would not answer as before")
    return _copied(model), 0


def _copied(model: nn.Module) -> nn.Module:
    """Return a frozen copy in evaluation mode; a tensor that it computed, such as a normed weight, is copied as it is."""
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    computed = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    return copy.deepcopy(model, computed).eval().requires_grad_(False)


def narrow_copy(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module | None:
    """Return a copy that computes in `dtype`, or None where the model does not run in it, which the log tells."""
    try:
        narrow = narrowed(model, example, dtype)
        with torch.no_grad():
            narrow(example.clone())
    except Exception as error:  # it is the user's own forward that runs here
        log.warning("the arithmetic stays %s: the model does not run in %s: %s", example.dtype, dtype, error)
        return None
    return narrow


def alike(expected: Tensor, found: Tensor, tolerance: float = 0.01) -> bool:
    """Whether logits agree within a fraction of the largest, or both are not finite."""
    scale = float(expected.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(expected, found, rtol=0, atol=tolerance * scale, equal_nan=True)


def check_rows(logits: Forward, noise: Tensor) -> None:
    """Raise ValueError where the logits of an image, of two [2, C, H, W], depend on chance or on its neighbour in a pass."""
    first, again, beside = logits(noise[:1]), logits(noise[:1]), logits(noise)[:1]
    if not alike(first, again):
        raise ValueError("the model answers the same image differently each time: is a dropout always on?")
    if not alike(first, beside):
        raise ValueError("the model's answer to an image depends on the other images of its pass")


def in_packs(logits: Forward, inputs: Tensor, pack: int) -> Tensor:
    """Return the logits of inputs [n, C, H, W], at most `pack` of them at a time."""
    return torch.cat([logits(part) for part in torch.split(inputs, pack)])


def by_rule(model: nn.Module) -> Callable[[BackwardRule], nn.Module]:
    """Return what makes the model changed by a rule; a few are kept: each holds layers, and a client chooses parameters."""
    return lru_cache(maxsize=4)(lambda rule: rule.apply(model))
