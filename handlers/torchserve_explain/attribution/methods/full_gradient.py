"""FullGrad: the share of the score that goes back to the input, and that of every bias where it acts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.functions import ACTIVATION_NODES, ACTIVATIONS, LINEAR_NODES, FunctionCall
from torchserve_explain.attribution.gathering import TOTAL, Add, Gathering
from torchserve_explain.attribution.methods.method import Attribution, Case, Method

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
AFFINE = (*CONVOLUTIONS, "linear", "batch_norm", "add", "sub", "rsub")
RULED = LINEAR_NODES | ACTIVATION_NODES | {"MaxPool2DWithIndices", "Sub of two"}


@dataclass(frozen=True)
class BiasGradients:
    """Beside a pass of images height x width, where the biases of its functions act on the score."""

    height: int
    width: int

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model with their sum [n, 1, H, W] beside it."""
        rules = dict.fromkeys(AFFINE, self.affine) | dict.fromkeys(ACTIVATIONS, self.activation)
        return Gathering(model, (1, self.height, self.width), rules)

    def affine(self, call: FunctionCall, _rows: int) -> tuple[Tensor, Add | None]:
        """A function that is linear but for what it answers to zeros."""
        output: Tensor = call.plain()
        if call.signals > 1:
            return output, None
        with torch.no_grad():
            zeros = (torch.zeros_like(one[:1]) if one is call.inputs[0] else one for one in call.args[:2])
            return output, self._added(call.run(*zeros))

    def activation(self, call: FunctionCall, _rows: int) -> tuple[Tensor, Add | None]:
        """A function of each value is locally y = y' x + b."""
        with torch.enable_grad():
            x = call.args[0].detach().requires_grad_()
            output = call.run(x)
            (slope,) = torch.autograd.grad(output.sum(), x)
        return call.plain(), self._added(output.detach() - slope * x.detach())

    def _added(self, bias: Tensor) -> Add | None:
        return (lambda gradient, total: total + self.placed(gradient * bias)) if bias.any() else None

    def placed(self, shares: Tensor) -> Tensor:
        """Return where a bias acts, [n, 1, H, W], by its shares [n, channels, h, w] of the score; without a place nowhere."""
        if shares.dim() != 4:
            return shares.new_zeros(len(shares), 1, 1, 1)
        cam = stretched(shares).sum(1, keepdim=True)
        return interpolate(cam, (self.height, self.width), mode="bilinear", align_corners=False)


def stretched(shares: Tensor) -> Tensor:
    """Return the sizes of shares [n, channels, h, w], those of each channel stretched to [0, 1]."""
    sizes = shares.abs()
    sizes = sizes - sizes.amin((2, 3), keepdim=True)
    return sizes / sizes.amax((2, 3), keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)


@dataclass(frozen=True)
class FullGrad(Method):
    """Where the input and every layer's biases act, which together are all of the score: a CAM of all layers at once.

    map = psi(x * dF/dx) + sum over layers and channels of psi(b * dF/db), psi the absolute value stretched to [0, 1] and
    enlarged bilinearly; what psi takes sums to F(x); arXiv:1905.00780, equations 4 and 6. Never negative.
    """

    name: ClassVar[str] = "full_grad"
    signed: ClassVar[bool] = False
    explains_probability: ClassVar[bool] = False

    def attribute(self, case: Case) -> Computation[Attribution]:
        evaluation = yield from case.evaluation(rule=BiasGradients(*case.input.shape[-2:]), layers=(TOTAL,))
        of_input = stretched(case.input[None] * evaluation.gradients).sum(1)
        return Attribution(of_input + evaluation.layers[TOTAL].gradient[0])

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        unruled = sorted(classifier.operations - RULED)
        if unruled:
            return f"FullGrad has no rule for {', '.join(unruled)}"
        return classifier.refusal(BiasGradients(*classifier.example.shape[-2:]), classifier.example)
