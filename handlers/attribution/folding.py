"""Batch norm folded into the convolution before it: the same function, fewer and faster layers."""

import logging
from collections import Counter

from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

log = logging.getLogger(__name__)


class _ConvolutionTracer(fx.Tracer):
    """Keeps user-defined convolutions whole, so that their weights can be found."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(model: nn.Module) -> int:
    """Fold, in place, each BatchNorm2d whose only input is a Conv2d that feeds nothing else; return how many.

    The model must be in evaluation mode. A model that torch.fx cannot trace is left as it is: its logits
    are the same either way.
    """
    try:
        nodes = list(_ConvolutionTracer().trace(model).nodes)
    except Exception as error:  # tracing runs the user's own forward: anything may be raised
        log.warning("batch norms are not folded, the model cannot be traced: %s", error)
        return 0
    modules = dict(model.named_modules())
    calls = Counter(id(modules[str(node.target)]) for node in nodes if node.op == "call_module")
    folded = 0
    for node in nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        norm, convolution = modules[str(node.target)], modules[str(before.target)]
        used_once = calls[id(norm)] == calls[id(convolution)] == len(before.users) == 1
        if used_once and _is_plainly(nn.Conv2d, convolution) and _is_plainly(nn.BatchNorm2d, norm) and _has_statistics(norm):
            _fold(convolution, norm)
            parent, _, name = str(node.target).rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
            folded += 1
    return folded


def _is_plainly(kind: type[nn.Module], module: nn.Module) -> bool:
    """Whether a module does what its class says: a subclass, a hook or a parametrization may do more (timm's norms do)."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked and not parametrize.is_parametrized(module)


def _has_statistics(norm: nn.Module) -> bool:
    return norm.running_mean is not None


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
