"""Class activation maps: a layer's features, weighted by what they mean for the score."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import interpolate

from attribution.classifier import Classifier
from attribution.errors import Unsupported
from attribution.methods.method import Attribution, Case, Method, register
from attribution.rows import Asking, Evaluation, Layer


@register("grad_cam")
@dataclass(frozen=True)
class GradCam(Method):
    """ReLU of a layer's feature maps weighted by the mean gradient of each: which region spoke for the target.

    L = ReLU(sum_k alpha_k A_k), alpha_k the spatial mean of dF/dA_k; arXiv:1610.02391, equations 1 and 2.
    Never negative; enlarged bilinearly to the input. `layer` is a module's dotted name or `last`.
    """

    signed: ClassVar[bool] = False

    layer: str = "last"

    def evaluations(self) -> int:
        return 1

    def attribute(self, case: Case) -> Asking[Attribution]:
        name = case.classifier.grid_layer(self.layer)
        found: list[Layer] = []

        def keep(_start: int, evaluation: Evaluation) -> None:
            found.append(evaluation.layers[name])

        yield [case.rows(1, lambda _start, _stop: case.input[None], keep, gradient=False, layers=(name,))]
        return Attribution(_enlarged(_weighted(found[0]), case.input))

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        try:
            classifier.grid_layer("last")
        except Unsupported as reason:
            return str(reason)
        return None


def _weighted(layer: Layer) -> Tensor:
    """Return ReLU(sum_k alpha_k A_k) as [n, 1, h, w]."""
    weights = layer.gradient.mean((2, 3), keepdim=True)
    return (weights * layer.activation).sum(1, keepdim=True).relu()


def _enlarged(cam: Tensor, like: Tensor) -> Tensor:
    """Return the map [1, H, W] at the input's size."""
    return interpolate(cam, size=like.shape[-2:], mode="bilinear", align_corners=False)[0]
