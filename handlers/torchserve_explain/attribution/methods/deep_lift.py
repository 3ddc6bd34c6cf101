"""DeepLIFT: contributions of the difference from a baseline, propagated back through each operation by a rule."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, asking, both
from torchserve_explain.attribution.functions import (
    ACTIVATION_NODES,
    ACTIVATIONS,
    JOINING_NODES,
    LINEAR_NODES,
    MATRIX_PRODUCTS,
    FunctionCall,
    replacing,
    surrogate,
)
from torchserve_explain.attribution.fused import OPENED
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.completeness import known_error
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, stacked
from torchserve_explain.attribution.norms import LayerNorm
from torchserve_explain.attribution.rows import Evaluation, Score
from torchserve_explain.errors import Unsupported

NONLINEAR = ACTIVATION_NODES | JOINING_NODES | {"MaxPool2DWithIndices"}
RULED = NONLINEAR | LINEAR_NODES | {"Sub of two", "Bmm", "Mv", "Dot"}
TOLERANCE = 0.01  # of the largest logit: as far as the sum of contributions may miss the difference, by rounding


@dataclass(frozen=True)
class Rescale:
    """Every nonlinear operation passes back its difference quotient between image and baseline; arXiv:1704.02685, section 3.5.

    A row [2 C, H, W] holds an image and its baseline, one above the other in channels; the logits are the image's.
    The change of a product a b is split as da mean(b) + db mean(a), that of a maximum as Captum splits it. Quotients, norms
    and softmaxes are split as the products and functions of one value that they are made of, so that no change is lost.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed model: the same modules, run on pairs."""
        rules = OPENED | dict.fromkeys(ACTIVATIONS, _activation) | dict.fromkeys((*MATRIX_PRODUCTS, "mul"), _product)
        rules |= {"max_pool2d": _max_pool, "div": _division, "softmax": _softmax, "layer_norm": _norm, "normalize": _unit}
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


def _activation(call: FunctionCall) -> Tensor:
    """Rescale: the multiplier is the output's change over the input's."""
    before = call.inputs[0]
    with torch.enable_grad():
        at = before.detach().requires_grad_()
        output = call.run(at)
        (slope,) = torch.autograd.grad(output.sum(), at)
    (x, base), (y, base_y) = at.detach().chunk(2), output.detach().chunk(2)
    multiplier = _quotient(y - base_y, x - base, torch.maximum(x.abs(), base.abs()), slope[: len(x)])
    return surrogate(output, before * torch.cat([multiplier, multiplier]))


def _mean(x: Tensor) -> Tensor:
    """Return the mean over image and baseline, for both of them, without a gradient."""
    return (x + _other(x)).detach() / 2


def _other(x: Tensor) -> Tensor:
    """Return the baseline's values beside the image's, and the image's beside the baseline's."""
    return x.roll(len(x) // 2, 0)


def _product(call: FunctionCall) -> Tensor:
    """Each factor's change counts with the other's mean over image and baseline; a constant factor is linear."""
    if call.signals != len(call.inputs):
        raise Unsupported(f"DeepLIFT has no rule for {call.name} of more than two signals")
    if len(call.inputs) < 2:
        return call.run(call.args[0])
    a, b = call.inputs
    return surrogate(call.value(), call.run(a, _mean(b)) + call.run(_mean(a), b))


def _division(call: FunctionCall) -> Tensor:
    """A quotient is the product with an inverse, whose change is -db / (b b')."""
    a, b = call.args[:2]
    if not (isinstance(b, Tensor) and b.requires_grad):
        return call.run(a)
    inverse = b.detach().reciprocal()
    slope = _mean(a) if isinstance(a, Tensor) and a.requires_grad else a
    linear = slope * (b * -(inverse * _other(inverse)))
    if slope is not a:
        linear = linear + a * _mean(inverse)
    return surrogate(call.value(), linear)


def _norm(call: FunctionCall) -> Tensor:
    """A layer norm is the centred input over its deviation: see _over."""
    x, norm = call.inputs[0], LayerNorm.of(call)
    centred = norm.centred(x)
    return surrogate(call.value(), norm.scaled(_over(centred, norm.deviation(x), lambda c: c.mean(norm.dims, keepdim=True))))


def _unit(call: FunctionCall) -> Tensor:
    """A vector over its length: see _over. One that is zero in the image or its baseline is stretched by the other's length."""
    names = ("p", "dim", "eps")
    given = {"p": 2.0, "dim": 1, "eps": 1e-12} | dict(zip(names, call.args[1:], strict=False)) | dict(call.kwargs)
    if given["p"] != 2:
        raise Unsupported("DeepLIFT has no rule for normalize by a norm other than p=2")
    x = call.inputs[0]
    length = x.detach().norm(dim=given["dim"], keepdim=True)
    longest = torch.maximum(length, _other(length))
    whole = torch.minimum(length, _other(length)) > given["eps"]
    size = length.where(whole, longest.clamp(min=given["eps"]))
    return surrogate(call.value(), _over(x, size, lambda c: (c * whole).sum(given["dim"], keepdim=True)))


def _over(x: Tensor, size: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the linear split of x / s, s^2 = reduce(x^2) but for a constant: a product with 1 / s.

    d(1 / s) = -d(s^2) / (s s' (s + s')), and d(s^2) = reduce(2 mean(x) dx): exact, and the gradient where nothing changes.
    """
    inverse, middle = size.reciprocal(), _mean(x)
    slope = inverse * _other(inverse) / (size + _other(size))
    return x * _mean(inverse) + middle * (reduce(x * (2 * middle)) * -slope)


def _softmax(call: FunctionCall) -> Tensor:
    """ds_i = m_i (dx_i - sum_k m_k dx_k / sum_k m_k), with m the logarithmic mean of both weights: exact.

    For log s_i changes by dx_i and one number for all, m_i is what s_i changes by for each change of its logarithm, and
    the number is such that all weights sum to one before and after.
    """
    x, weights = call.inputs[0], call.value()
    dim = call.args[1] if len(call.args) > 1 else call.kwargs["dim"]
    logs = x.detach().log_softmax(dim).clamp(min=-torch.finfo(x.dtype).max / 2)  # of a masked place, too, a number
    size = torch.maximum(logs.abs(), _other(logs).abs())
    middle = _quotient(weights - _other(weights), logs - _other(logs), size, _mean(weights))
    total = (middle * x).sum(dim, keepdim=True) / middle.sum(dim, keepdim=True)
    return surrogate(weights, middle * (x + total * -1))


def _max_pool(call: FunctionCall) -> Tensor:
    """What the maximum gains is attributed to the image's largest value, what it loses to the baseline's."""
    before = call.inputs[0]
    options = dict(call.kwargs) | {"return_indices": True}
    output, positions = functional.max_pool2d(before.detach(), *call.args[1:], **options)
    n = len(before) // 2
    (y, base_y), (at_x, at_base) = output.chunk(2), positions.chunk(2)
    largest = torch.maximum(y, base_y)
    x, base = before[:n].flatten(2), before[n:].detach().flatten(2)
    linear = torch.zeros_like(y)
    for at, change, otherwise in ((at_x, largest - base_y, 1.0), (at_base, y - largest, 0.0)):
        chosen, chosen_base = (t.gather(2, at.flatten(2)).view_as(y) for t in (x, base))
        size = torch.maximum(chosen.detach().abs(), chosen_base.abs())
        step = chosen.detach() - chosen_base
        linear = linear + chosen * _quotient(change, step, size, torch.full_like(y, otherwise))
    return torch.cat([surrogate(y, linear), base_y])


@dataclass(frozen=True)
class DeepLift(Method):
    """What each value's difference from the baseline adds to the score, nonlinearities taken as their difference quotients.

    map = (x - b) * multiplier, by the Rescale rule; it sums to F(x) - F(b); arXiv:1704.02685, equations 3 to 5. With
    references the mean over them, which sums to F(x) - mean F(b).
    """

    name: ClassVar[str] = "deep_lift"
    explains_probability: ClassVar[bool] = False

    baseline: Baseline = Baseline.BLACK

    def evaluations(self, classifier: Classifier) -> int:
        # image and baseline side by side, and the baseline's score where it is not known
        return 2 * self.baseline.size(classifier) + self.baseline.score_rows

    def attribute(self, case: Case) -> Computation[Attribution]:
        baselines, total = self.baseline.images(case), torch.zeros_like(case.input)

        def pair(number: int) -> Tensor:
            return torch.cat([case.input, baselines[number]])

        def add(start: int, evaluation: Evaluation) -> None:
            multipliers = evaluation.gradients[:, : len(case.input)]
            total.add_(((case.input - baselines[start : start + len(multipliers)]) * multipliers).sum(0))

        pairs = asking(case.rows(len(baselines), stacked(pair), add, rule=Rescale(), passes=2))
        _, scores = yield from both(pairs, self.baseline.scores(case))
        attribution, baseline_score = total / len(baselines), fmean(scores)
        return Attribution(attribution, baseline_score, known_error(attribution, case, baseline_score))

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        unruled = sorted(classifier.operations - RULED)
        if unruled:
            return f"DeepLIFT has no rule for {', '.join(unruled)}"
        noise = torch.rand(classifier.example.shape, generator=torch.Generator().manual_seed(0)).to(classifier.example)
        images = torch.cat([noise, torch.zeros_like(noise)])
        return classifier.refusal(Rescale(), images.flatten(0, 1)[None], NONLINEAR) or _loses(classifier, images)


def _loses(classifier: Classifier, images: Tensor) -> str | None:
    """Return why the contributions of an image and its baseline, [2, C, H, W], do not sum to the difference, if so."""
    found = classifier.evaluate(images.flatten(0, 1)[None], [0], [Score.LOGIT], gradient=True, rule=Rescale()).gradients
    logits = classifier.logits(images)
    total = (found[0, : images.shape[1]] * (images[0] - images[1])).sum()
    if (total - (logits[0, 0] - logits[1, 0])).abs() <= TOLERANCE * logits.abs().max():
        return None
    return "contributions would not sum to the difference, as where images do not lie along the first dimension of every layer"
