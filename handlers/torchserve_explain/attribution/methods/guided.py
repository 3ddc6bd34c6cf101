"""Guided backpropagation: ReLUs that let only positive gradients back."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, both
from torchserve_explain.attribution.functions import FunctionCall, replacing
from torchserve_explain.attribution.methods.cam import GradCam, enlarged
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, OwnRow

RELUS = ("relu", "relu6", "hardtanh")


@dataclass(frozen=True)
class GuidedRelus:
    """Each ReLU (and ReLU6) passes back the positive part of the gradient that reaches it; arXiv:1412.6806, section 3.4."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed model: the same modules, each ReLU with a guided gradient."""
        return replacing(model, lambda: dict.fromkeys(RELUS, _guided), in_place=RELUS)


def _guided(call: FunctionCall) -> Tensor:
    output: Tensor = call.plain()
    output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]
    return output


class Guided(Method):
    """A method that goes back through guided ReLUs, and so needs some."""

    in_score_units: ClassVar[bool] = False

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        if not {"Relu", "Hardtanh"} & classifier.operations:
            return "it has no ReLU to guide the gradient through"
        return classifier.refusal(GuidedRelus(), classifier.example)


@dataclass(frozen=True)
class GuidedBackprop(Guided):
    """The gradient through ReLUs that let only positive gradients back: what excites the target, finely drawn.

    arXiv:1412.6806, section 3.4; signed. Other activations keep their own gradient.
    """

    name: ClassVar[str] = "guided_backprop"

    def attribute(self, case: Case) -> Computation[Attribution]:
        gradient = yield from case.gradient(GuidedRelus())
        return Attribution(gradient)


@dataclass(frozen=True)
class GuidedGradCam(Guided):
    """Guided backpropagation times Grad-CAM: fine lines, only where the target's region is.

    map = guided gradient * enlarged Grad-CAM; arXiv:1610.02391, section 3.2; signed.
    """

    name: ClassVar[str] = "guided_grad_cam"
    own_row: ClassVar[OwnRow | None] = OwnRow.LAYER

    layer: str = "last"

    def evaluations(self, classifier: Classifier) -> int:
        return 2

    def attribute(self, case: Case) -> Computation[Attribution]:
        layer, gradient = yield from both(case.layer(self.layer), case.gradient(GuidedRelus()))
        cam = GradCam(self.layer).combined(layer).relu()
        return Attribution(gradient * enlarged(cam, case.input))

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        return super().unsupported(classifier) or GradCam.unsupported(classifier)
