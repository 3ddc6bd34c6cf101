"""Pairs: an image's tensors with its baseline's beside them; what a model computes of one it computes of the other."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

apart = torch._C.DisableTorchFunctionSubclass  # in it a pair is the image's tensor alone


class Pair(Tensor):
    """A tensor of the image, to which gradients go back, with the baseline's as its `reference`."""

    reference: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with apart():
            found = func(*args, **kwargs)
            if func is torch.autograd.grad:
                return found
            return _beside(found, func(*references(args), **references(kwargs)))


def paired(image: Tensor, reference: Tensor) -> Pair:
    """Return an image's tensor with the baseline's beside it."""
    pair = image
    if image.requires_grad:  # made by the model: itself, since a view would make work in place dear
        image.__class__ = Pair
    else:  # it may be a constant of the model's
        pair = image.as_subclass(Pair)
    pair.reference = reference  # type: ignore[attr-defined]
    return cast(Pair, pair)


def references(given: Any) -> Any:
    """Return arguments with the baseline's tensors instead of the image's."""
    return tree_map(lambda one: one.reference if isinstance(one, Pair) else one, given)


def _beside(found: Any, reference: Any) -> Any:
    """Return a function's answers for image and baseline side by side; one made in place is a pair already."""
    if isinstance(found, tuple | list):
        both = [_beside(one, other) for one, other in zip(found, reference, strict=True)]
        return type(found)(both)
    return paired(found, reference) if isinstance(found, Tensor) and not isinstance(found, Pair) else found
