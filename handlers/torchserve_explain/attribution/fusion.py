"""Batch norm and padding folded into the convolution beside them: the same function, fewer and faster layers."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TypeGuard, TypeVar

from torch import fx, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


class _ConvolutionTracer(fx.Tracer):
    """Keeps user-defined convolutions whole, so that their weights can be found."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def fold_layers(model: nn.Module) -> int:
    """Fold, in place, what a Conv2d alone feeds or is fed by: BatchNorm2d after it, ZeroPad2d before it; return how many.

    The model must be in evaluation mode. A model that torch.fx cannot trace is left as it is: its logits are the same
    either way. The padding before the first convolution stays: relevance rules look at that one's kernel.
    """
    try:
        nodes = list(_ConvolutionTracer().trace(model).nodes)
    except Exception as error:  # tracing runs the user's own forward: anything may be raised
        log.warning("no layers are folded, the model cannot be traced: %s", error)
        return 0
    convolutions = (
        str(n.target) for n in nodes if n.op == "call_module" and isinstance(model.get_submodule(str(n.target)), nn.Conv2d)
    )
    stem, folded = next(convolutions, None), 0
    for first, second in _neighbours(model, nodes):
        before, after = model.get_submodule(first), model.get_submodule(second)
        if _is_plainly(before, nn.Conv2d) and _is_plainly(after, nn.BatchNorm2d) and _has_statistics(after):
            _fold(before, after)
            model.set_submodule(second, nn.Identity())
        elif _is_plainly(before, nn.ZeroPad2d) and _is_plainly(after, nn.Conv2d) and _takes(after, before) and second != stem:
            _merge(after, before)
            model.set_submodule(first, nn.Identity())
        else:
            continue
        folded += 1
    return folded


def _neighbours(model: nn.Module, nodes: list[fx.Node]) -> Iterator[tuple[str, str]]:
    """Yield the names of two modules of which each is called once, and the first feeds the second alone, not the image."""
    modules = dict(model.named_modules())
    calls = Counter(id(modules[str(node.target)]) for node in nodes if node.op == "call_module")
    for node in nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        names = str(before.target), str(node.target)
        if len(before.users) == 1 and all(calls[id(modules[name])] == 1 for name in names):
            yield names


def _is_plainly(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a module does what its class says: a subclass, a hook or a parametrization may do more (timm's norms do)."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked and not parametrize.is_parametrized(module)


def _has_statistics(norm: nn.Module) -> bool:
    return norm.running_mean is not None


def _takes(convolution: nn.Conv2d, padding: nn.ZeroPad2d) -> bool:
    """Whether a convolution without padding of its own can pad by itself, with its kernel moved."""
    left, right, top, bottom = padding.padding
    plain = convolution.padding == (0, 0) and convolution.padding_mode == "zeros" and convolution.dilation == (1, 1)
    return plain and 0 <= left <= right and 0 <= top <= bottom


def _merge(convolution: nn.Conv2d, padding: nn.ZeroPad2d) -> None:
    """Let a convolution pad by itself, alike on all sides; where it is one pixel too much the kernel begins with zeros."""
    left, right, top, bottom = padding.padding
    convolution.weight = nn.Parameter(pad(convolution.weight, (right - left, 0, bottom - top, 0)))
    convolution.kernel_size = (convolution.weight.shape[2], convolution.weight.shape[3])
    convolution.padding = (bottom, right)


def _fold(convolution: nn.Conv2d, norm: nn.Module) -> None:
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,  # type: ignore[arg-type]
        norm.running_var,  # type: ignore[arg-type]
        norm.eps,  # type: ignore[arg-type]
        norm.weight,  # type: ignore[arg-type]
        norm.bias,  # type: ignore[arg-type]
    )
