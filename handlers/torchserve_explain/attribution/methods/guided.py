"""Guided backpropagation: ReLUs that let only positive gradients back."""

from dataclasses import dataclass

from torch import Tensor, nn

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.functions import Call, replacing
from torchserve_explain.attribution.methods.cam import GradCam, enlarged, layer_row
from torchserve_explain.attribution.methods.gradient import gradient_row, input_gradient
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, register
from torchserve_explain.attribution.rows import Layer

RELUS = ("relu", "relu6", "hardtanh")


@dataclass(frozen=True)
class GuidedRelus:
    """Each ReLU (and ReLU6) passes back the positive part of the gradient that reaches it; arXiv:1412.6806, section 3.4."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed model: the same modules, each ReLU with a guided gradient."""
        return replacing(model, lambda: dict.fromkeys(RELUS, _guided), in_place=True)


def _guided(call: Call) -> Tensor:
    output: Tensor = call.plain()
    output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]
    return output


class Guided(Method):
    """A method that goes back through guided ReLUs, and so needs some."""

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        if not {"Relu", "Hardtanh"} & classifier.operations:
            return "it has no ReLU to guide the gradient through"
        return classifier.refusal(GuidedRelus(), classifier.example)


@register("guided_backprop")
@dataclass(frozen=True)
class GuidedBackprop(Guided):
    """The gradient through ReLUs that let only positive gradients back: what excites the target, finely drawn.

    arXiv:1412.6806, section 3.4; signed. Other activations keep their own gradient.
    """

    def attribute(self, case: Case) -> Computation[Attribution]:
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

    def attribute(self, case: Case) -> Computation[Attribution]:
        found: list[Layer] = []
        guided: list[Tensor] = []
        yield [layer_row(case, self.layer, found), gradient_row(case, guided, GuidedRelus())]
        cam = enlarged(GradCam(self.layer).combined(found[0]).relu(), case.input)
        return Attribution(guided[0] * cam)

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        return super().unsupported(classifier) or GradCam.unsupported(classifier)
