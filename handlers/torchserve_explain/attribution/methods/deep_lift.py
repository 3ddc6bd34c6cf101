"""DeepLIFT: contributions of the difference from a baseline, handed back through each operation by a rule."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.functions import ACTIVATION_NODES, ACTIVATIONS, LINEAR_NODES, Call, replacing, surrogate
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.completeness import known_error
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, register, scores_into
from torchserve_explain.attribution.rows import Evaluation

RULED = LINEAR_NODES | ACTIVATION_NODES | {"MaxPool2DWithIndices", "Mul of two", "Sub of two"}


@dataclass(frozen=True)
class Rescale:
    """Every nonlinear operation passes back its difference quotient between image and baseline; arXiv:1704.02685, section 3.5.

    A row [2 C, H, W] holds an image and its baseline, one above the other in channels; the logits are the image's.
    The change of a product a b is split as da mean(b) + db mean(a), that of a maximum as Captum splits it.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed model: the same modules, run on pairs."""
        rules = dict.fromkeys(ACTIVATIONS, _activation) | {"max_pool2d": _max_pool, "mul": _product}
        return _InPairs(replacing(model, lambda: rules))


class _InPairs(nn.Module):
    """Runs a model on images and baselines that lie in the channels of one row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, pairs: Tensor) -> Tensor:
        logits: Tensor = self._model(torch.cat(pairs.chunk(2, dim=1)))
        return logits[: len(pairs)]


def _quotient(change: Tensor, step: Tensor, size: Tensor, otherwise: Tensor) -> Tensor:
    """Return change / step, or `otherwise` where the step is lost in the rounding of values of this size."""
    lost = step.abs() <= torch.finfo(step.dtype).eps ** 0.5 * size
    return torch.where(lost, otherwise, change / step.where(~lost, 1.0))


def _activation(call: Call) -> Tensor:
    """Rescale: the multiplier is the output's change over the input's."""
    before = call.inputs[0]
    with torch.enable_grad():
        at = before.detach().requires_grad_()
        output = call.run(at)
        (slope,) = torch.autograd.grad(output.sum(), at)
    (x, base), (y, base_y) = at.detach().chunk(2), output.detach().chunk(2)
    multiplier = _quotient(y - base_y, x - base, torch.maximum(x.abs(), base.abs()), slope[: len(x)])
    return surrogate(output, before * torch.cat([multiplier, multiplier]))


def _product(call: Call) -> Tensor:
    """Each factor's change counts with the other's mean over image and baseline; a constant factor is linear."""
    if len(call.inputs) < 2:
        return call.run(call.args[0])
    a, b = call.inputs
    mean_a, mean_b = ((t + t.roll(len(t) // 2, 0)).detach() / 2 for t in (a, b))
    return surrogate(call.value(), a * mean_b + mean_a * b)


def _max_pool(call: Call) -> Tensor:
    """What the maximum gained belongs to the image's largest value, what it lost to the baseline's."""
    before = call.inputs[0]
    options = dict(call.kwargs) | {"return_indices": True}
    output, places = functional.max_pool2d(before.detach(), *call.args[1:], **options)
    n = len(before) // 2
    (y, base_y), (place, base_place) = output.chunk(2), places.chunk(2)
    largest = torch.maximum(y, base_y)
    x, base = before[:n].flatten(2), before[n:].detach().flatten(2)
    linear = torch.zeros_like(y)
    for at, change, otherwise in ((place, largest - base_y, 1.0), (base_place, y - largest, 0.0)):
        chosen, chosen_base = (t.gather(2, at.flatten(2)).view_as(y) for t in (x, base))
        size = torch.maximum(chosen.detach().abs(), chosen_base.abs())
        step = chosen.detach() - chosen_base
        linear = linear + chosen * _quotient(change, step, size, torch.full_like(y, otherwise))
    return torch.cat([surrogate(y, linear), base_y])


@register("deep_lift")
@dataclass(frozen=True)
class DeepLift(Method):
    """What each value's difference from the baseline adds to the score, nonlinearities taken as their difference quotients.

    map = (x - b) * multiplier, by the Rescale rule; it sums to F(x) - F(b); arXiv:1704.02685, equations 3 to 5.
    """

    explains_probability: ClassVar[bool] = False

    baseline: Baseline = Baseline.BLACK

    def evaluations(self, classifier: Classifier) -> int:
        return 3  # image and baseline side by side, and the baseline's score

    def attribute(self, case: Case) -> Computation[Attribution]:
        baseline = self.baseline.image(case)
        found: list[Tensor] = []
        ends: list[float] = []

        def keep(_start: int, evaluation: Evaluation) -> None:
            found.append(evaluation.gradients[0, : len(case.input)])

        pair = torch.cat([case.input, baseline])[None]
        yield [
            case.rows(1, lambda _start, _stop: pair, keep, rule=Rescale(), passes=2),
            case.rows(1, lambda _start, _stop: baseline[None], scores_into(ends), gradient=False),
        ]
        attribution = (case.input - baseline) * found[0]
        return Attribution(attribution, ends[0], known_error(attribution, case, ends[0]))

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        unruled = sorted(classifier.operations - RULED)
        if unruled:
            return f"DeepLIFT has no rule for {', '.join(unruled)}"
        pair = torch.cat([classifier.example, classifier.example], 1)
        return classifier.refusal(Rescale(), pair, ACTIVATION_NODES | {"MaxPool2DWithIndices", "Mul of two"})
