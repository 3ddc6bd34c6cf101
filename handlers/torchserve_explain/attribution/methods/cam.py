"""Class activation maps: a layer's features, weighted by what they mean for the score."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, OwnRow, Samples
from torchserve_explain.attribution.rows import Layer
from torchserve_explain.errors import Unsupported


@dataclass(frozen=True)
class Cam(Method):
    """One row: a layer's activations and gradients, combined and enlarged bilinearly to the input; never negative."""

    signed: ClassVar[bool] = False
    own_row: ClassVar[OwnRow | None] = OwnRow.LAYER

    layer: str = "last"

    def attribute(self, case: Case) -> Computation[Attribution]:
        layer = yield from case.layer(self.layer)
        return Attribution(enlarged(self.combined(layer).relu(), case.input))

    def combined(self, layer: Layer) -> Tensor:
        """Return the weighted sum of the layer's feature maps, [1, 1, h, w]."""
        raise NotImplementedError

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        try:
            classifier.grid_layer("last")
        except Unsupported as reason:
            return str(reason)
        return None


@dataclass(frozen=True)
class GradCam(Cam):
    """ReLU of a layer's feature maps weighted by the mean gradient of each: which region speaks for the target.

    L = ReLU(sum_k alpha_k A_k), alpha_k the spatial mean of dF/dA_k; arXiv:1610.02391, equations 1 and 2.
    `layer` is a module's dotted name or `last`.
    """

    name: ClassVar[str] = "grad_cam"

    def combined(self, layer: Layer) -> Tensor:
        alpha = layer.gradient.mean((2, 3), keepdim=True)
        return (alpha * layer.activation).sum(1, keepdim=True)


@dataclass(frozen=True)
class GradCamPlusPlus(Cam):
    """Grad-CAM whose mean favours the positions that raise the score: finds several objects of the target.

    w_k = sum_ij alpha_ij ReLU(g_ij), alpha = g^2 / (2 g^2 + sum_ab(A_ab) g^3); arXiv:1710.11063, equations 5 and 19,
    for the exponential of the score, whose common factor is left out.
    """

    name: ClassVar[str] = "grad_cam_plus_plus"

    def combined(self, layer: Layer) -> Tensor:
        gradient, activation = layer.gradient, layer.activation
        divisor = 2 * gradient.square() + activation.sum((2, 3), keepdim=True) * gradient.pow(3)
        alpha = (gradient.square() / divisor).where(divisor != 0, 0.0)
        weights = (alpha * gradient.relu()).sum((2, 3), keepdim=True)
        return (weights * activation).sum(1, keepdim=True)


@dataclass(frozen=True)
class LayerCam(Cam):
    """Feature maps weighted position by position with their own positive gradient: sharp also at early layers.

    L = ReLU(sum_k ReLU(g_k) A_k); Jiang et al. 2021, doi:10.1109/TIP.2021.3089943, equations 6 and 7.
    """

    name: ClassVar[str] = "layer_cam"

    def combined(self, layer: Layer) -> Tensor:
        return (layer.gradient.relu() * layer.activation).sum(1, keepdim=True)


@dataclass(frozen=True)
class HiResCam(Cam):
    """Feature maps weighted position by position with their gradient: only places that the score really uses.

    L = ReLU(sum_k g_k A_k); of the last layer before a linear head it sums to the score less the bias, but for the ReLU;
    arXiv:2011.08891, equation 4.
    """

    name: ClassVar[str] = "hires_cam"

    def combined(self, layer: Layer) -> Tensor:
        return (layer.gradient * layer.activation).sum(1, keepdim=True)


@dataclass(frozen=True)
class EigenCam(Cam):
    """The strongest pattern among a layer's feature maps, whatever the class: what the layer sees, not what for.

    L = ReLU(+-A v), A the features [h w, channels] less their means, v their first right singular vector, its sign that
    under which the largest absolute value is positive; arXiv:2008.00299, equation 3.
    """

    name: ClassVar[str] = "eigen_cam"
    own_row: ClassVar[OwnRow | None] = OwnRow.ACTIVATION
    needs_gradient: ClassVar[bool] = False
    asks_for_class: ClassVar[bool] = False

    def attribute(self, case: Case) -> Computation[Attribution]:
        activation = yield from case.activation(self.layer)
        features = activation.flatten(1).T
        features = features - features.mean(0)
        _, _, directions = torch.linalg.svd(features, full_matrices=False)
        cam = features @ directions[0]
        cam = cam * cam[cam.abs().argmax()].sign()
        return Attribution(enlarged(cam.view(1, 1, *activation.shape[1:]).relu(), case.input))


@dataclass(frozen=True)
class ScoreCam(Cam):
    """Feature maps weighted by the score of the image seen through each of them: a Grad-CAM without gradients.

    L = ReLU(sum_k w_k A_k), w the softmax over channels of F(x * A_k), A_k enlarged and stretched to [0, 1];
    arXiv:1910.01279, equations 6 to 8. Of a layer with more than `samples` channels, those with the largest variance count.
    """

    name: ClassVar[str] = "score_cam"
    own_row: ClassVar[OwnRow | None] = OwnRow.ACTIVATION
    needs_gradient: ClassVar[bool] = False

    samples: Samples = 256

    def evaluations(self, classifier: Classifier) -> int:
        return 1 + min(self.samples, classifier.spatial_layers[classifier.grid_layer(self.layer)].channels)

    def attribute(self, case: Case) -> Computation[Attribution]:
        activation = yield from case.activation(self.layer)
        chosen = activation.flatten(1).var(1).topk(min(self.samples, len(activation))).indices.sort().values
        features = activation[chosen]

        def seen_through(channel: int) -> Tensor:
            mask = enlarged(features[None, channel : channel + 1], case.input)
            return case.input * (mask - mask.min()) / (mask.max() - mask.min()).clamp(min=1e-8)

        scores = yield from case.scores(len(features), seen_through)
        weights = features.new_tensor(scores).softmax(0)
        cam = torch.tensordot(weights, features, 1)[None, None]
        return Attribution(enlarged(cam.relu(), case.input))


def enlarged(cam: Tensor, like: Tensor) -> Tensor:
    """Return the map [1, H, W] of a cam [1, 1, h, w] at the input's size."""
    return interpolate(cam, size=like.shape[-2:], mode="bilinear", align_corners=False)[0]
