"""Guided backpropagation: ReLUs that let only positive gradients back."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from attribution.classifier import Classifier
from attribution.methods.cam import GradCam, enlarged, layer_row
from attribution.methods.gradient import gradient_row, input_gradient
from attribution.methods.method import Attribution, Case, Method, register
from attribution.rows import Asking, Layer

RELUS: set[Any] = {functional.relu, functional.relu_, functional.relu6, functional.hardtanh, functional.hardtanh_}
RELUS |= {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class _WatchingRelus(TorchFunctionMode):
    """Shows every ReLU's output while it is active, be it a module, reused, in place or a function call."""

    def __init__(self, show: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._show = show

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if func in RELUS:
            self._show(output)
        return output


@dataclass(frozen=True)
class GuidedRelus:
    """Each ReLU (and ReLU6) passes back the positive part of the gradient that reaches it; arXiv:1412.6806, section 3.4."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed model: the same modules, run under a watch of its own."""
        changed = copy.copy(model)
        changed.forward = partial(self._forward, model)
        return changed

    def _forward(self, model: nn.Module, x: Tensor) -> Any:
        with _WatchingRelus(_keep_positive):
            return model(x)


def _keep_positive(output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]


class Guided(Method):
    """A method that goes back through guided ReLUs, and so needs some."""

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        seen: list[Tensor] = []
        with _WatchingRelus(seen.append):
            classifier.logits(classifier.example)
        return None if seen else "it has no ReLU to guide the gradient through"


@register("guided_backprop")
@dataclass(frozen=True)
class GuidedBackprop(Guided):
    """The gradient through ReLUs that let only positive gradients back: what excites the target, finely drawn.

    arXiv:1412.6806, section 3.4; signed. Other activations keep their own gradient.
    """

    def attribute(self, case: Case) -> Asking[Attribution]:
        gradient = yield from input_gradient(case, GuidedRelus())
        return Attribution(gradient)


@register("guided_grad_cam")
@dataclass(frozen=True)
class GuidedGradCam(Guided):
    """Guided backpropagation times Grad-CAM: fine lines, only where the target's region is.

    map = guided gradient * enlarged Grad-CAM; arXiv:1610.02391, section 3.2; signed.
    """

    layer: str = "last"

    def evaluations(self, classifier: Classifier) -> int:
        return 2

    def attribute(self, case: Case) -> Asking[Attribution]:
        found: list[Layer] = []
        guided: list[Tensor] = []
        yield [layer_row(case, self.layer, found), gradient_row(case, guided, GuidedRelus())]
        cam = enlarged(GradCam(self.layer).combined(found[0]).relu(), case.input)
        return Attribution(guided[0] * cam)

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        return super().unsupported(classifier) or GradCam.unsupported(classifier)
