"""DeepLIFT: contributions of the difference from a baseline, propagated back through each operation by a rule."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.functions import (
    ACTIVATION_NODES,
    ACTIVATIONS,
    JOINING_NODES,
    LINEAR_NODES,
    MATRIX_PRODUCTS,
    FunctionCall,
    changed_in_place,
    going_back,
    replacing,
    surrogate,
)
from torchserve_explain.attribution.fused import OPENED
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.completeness import known_error
from torchserve_explain.attribution.methods.method import Attribution, Case, Method, stacked
from torchserve_explain.attribution.norms import LayerNorm
from torchserve_explain.attribution.pairs import Pair, apart, paired, references
from torchserve_explain.attribution.rows import Evaluation, Score
from torchserve_explain.errors import Unsupported

NONLINEAR = ACTIVATION_NODES | JOINING_NODES | {"MaxPool2DWithIndices"}
RULED = NONLINEAR | LINEAR_NODES | {"Sub of two", "Bmm", "Mv", "Dot"}
PIECEWISE = {"relu", "relu6", "hardtanh", "leaky_relu", "prelu", "clamp"}  # made of straight pieces
NOTHING = 1e-30  # beside any change
TOLERANCE = 0.01  # of the largest logit: as far as the sum of contributions may miss the difference, by rounding


@dataclass(frozen=True)
class Rescale:
    """Every nonlinear operation passes back its difference quotient between image and baseline; arXiv:1704.02685, section 3.5.

    A row [2 C, H, W] holds an image and its baseline, one above the other in channels; logits and scores are pairs of both.
    The change of a product a b is split as da mean(b) + db mean(a), that of a maximum as Captum splits it. Quotients, norms
    and softmaxes are split as the products and functions of one value that they are made of, so that no change is lost.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed model: the same modules, run on pairs."""
        joining = dict.fromkeys((*MATRIX_PRODUCTS, "mul"), _product) | {"div": _division}
        others = {"max_pool2d": _max_pool, "softmax": _softmax, "layer_norm": _norm, "normalize": _unit}
        rules = OPENED | dict.fromkeys(ACTIVATIONS, _activation)
        rules |= {name: partial(_split, rule) for name, rule in (joining | others).items()}
        return _InPairs(replacing(model, lambda: rules, in_place=ACTIVATIONS))


class _InPairs(nn.Module):
    """Runs a model on images and baselines that lie in the channels of one row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, rows: Tensor) -> Tensor:
        images, baselines = (half.clone() for half in rows.chunk(2, dim=1))  # the model may work in place
        logits: Tensor = self._model(paired(images, baselines.detach()))
        return logits


def _split(rule: Callable[[FunctionCall, Tensor, Tensor], Tensor], call: FunctionCall) -> Any:
    """Return a function's answer with the gradient of what a rule returns; what is linear in its one signal has its own."""
    if call.signals == 1 and (rule is _product or (rule is _division and call.inputs[:1] and call.inputs[0] is call.args[0])):
        return call.plain()
    with apart():
        value, reference = call.value(), replace(call, args=references(call.args)).value()
        return paired(surrogate(value, rule(call, value, reference)), reference)


def _quotient(change: Tensor, step: Tensor, size: Tensor, otherwise: Tensor) -> Tensor:
    """Return change / step, or `otherwise` where the step is lost in the rounding of values of this size."""
    lost = step.abs() <= torch.finfo(step.dtype).eps ** 0.5 * size
    return torch.where(lost, otherwise, change / step.where(~lost, 1.0))


def _activation(call: FunctionCall) -> Tensor:
    """Rescale: the multiplier is the output's change over the input's, or the slope where the input does not change."""
    with apart():
        x, base = call.inputs[0], _other(call.inputs[0])
        with torch.enable_grad():
            y = call.run(at := x.detach().requires_grad_())
        (slope,) = torch.autograd.grad(y, at, y.new_ones(()).expand_as(y))
        y, base_y, step = y.detach(), call.run(base), x.detach() - base
        if call.name in PIECEWISE:  # no rounding in a change on one piece
            multiplier = (y - base_y).add_(slope, alpha=NOTHING).div_(step.add_(NOTHING))
        else:
            multiplier = _quotient(y - base_y, step, torch.maximum(x.detach().abs(), base.abs()), slope)
        if call.in_place:
            base.copy_(base_y)
            return changed_in_place(x, y, lambda gradient: gradient * multiplier)
        return paired(going_back(y, lambda gradient: (gradient * multiplier,), x), base_y)


def _other(x: Tensor) -> Tensor:
    """Return the baseline's values."""
    return cast(Pair, x).reference


def _mean(x: Tensor) -> Tensor:
    """Return the mean over image and baseline, without a gradient."""
    return (x.detach() + _other(x)) / 2


def _product(call: FunctionCall, _value: Tensor, _reference: Tensor) -> Tensor:
    """Each factor's change counts with the other's mean over image and baseline."""
    if call.signals != len(call.inputs):
        raise Unsupported(f"DeepLIFT has no rule for {call.name} of more than two signals")
    a, b = call.inputs
    return call.run(a, _mean(b)) + call.run(_mean(a), b)


def _division(call: FunctionCall, _value: Tensor, _reference: Tensor) -> Tensor:
    """A quotient is the product with an inverse, whose change is -db / (b b')."""
    a, b = call.args[:2]
    inverse = paired(b.detach().reciprocal(), _other(b).reciprocal())
    linear = b * -(inverse * _other(inverse))
    split: Tensor = linear * _mean(a) + a * _mean(inverse) if len(call.inputs) > 1 else linear * a
    return split


def _norm(call: FunctionCall, _value: Tensor, _reference: Tensor) -> Tensor:
    """A layer norm is the centred input over its deviation: see _over."""
    x, norm = call.inputs[0], LayerNorm.of(call)
    centred, deviation = (paired(part(x), part(_other(x))) for part in (norm.centred, norm.deviation))
    return norm.scaled(_over(centred, deviation, lambda c: c.mean(norm.dims, keepdim=True)))


def _unit(call: FunctionCall, _value: Tensor, _reference: Tensor) -> Tensor:
    """A vector over its length: see _over. One that is zero in the image or its baseline is stretched by the other's length."""
    names = ("p", "dim", "eps")
    given = {"p": 2.0, "dim": 1, "eps": 1e-12} | dict(zip(names, call.args[1:], strict=False)) | dict(call.kwargs)
    if given["p"] != 2:
        raise Unsupported("DeepLIFT has no rule for normalize by a norm other than p=2")
    x = call.inputs[0]
    length, other = (values.norm(dim=given["dim"], keepdim=True) for values in (x.detach(), _other(x)))
    longest = torch.maximum(length, other).clamp(min=given["eps"])
    whole = torch.minimum(length, other) > given["eps"]
    size = paired(length.where(whole, longest), other.where(whole, longest))
    return _over(x, size, lambda c: (c * whole).sum(given["dim"], keepdim=True))


def _over(x: Tensor, size: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the linear split of x / s, s^2 = reduce(x^2) but for a constant: a product with 1 / s.

    d(1 / s) = -d(s^2) / (s s' (s + s')), and d(s^2) = reduce(2 mean(x) dx): exact, and the gradient where nothing changes.
    """
    inverse, middle = paired(size.reciprocal(), _other(size).reciprocal()), _mean(x)
    slope = inverse * _other(inverse) / (size + _other(size))
    return x * _mean(inverse) + middle * (reduce(x * (2 * middle)) * -slope)


def _softmax(call: FunctionCall, weights: Tensor, base_weights: Tensor) -> Tensor:
    """ds_i = m_i (dx_i - sum_k m_k dx_k / sum_k m_k), with m the logarithmic mean of both weights: exact.

    For log s_i changes by dx_i and one number for all, m_i is what s_i changes by for each change of its logarithm, and
    the number is such that all weights sum to one before and after.
    """
    x, least = call.inputs[0], -torch.finfo(weights.dtype).max / 2  # of a masked place, too, a number
    dim = call.args[1] if len(call.args) > 1 else call.kwargs["dim"]
    logs, base_logs = (values.log_softmax(dim).clamp(min=least) for values in (x.detach(), _other(x)))
    size = torch.maximum(logs.abs(), base_logs.abs())
    middle = _quotient(weights - base_weights, logs - base_logs, size, (weights + base_weights) / 2)
    total = (middle * x).sum(dim, keepdim=True) / middle.sum(dim, keepdim=True)
    return middle * (x + total * -1)


def _max_pool(call: FunctionCall, y: Tensor, base_y: Tensor) -> Tensor:
    """What the maximum gains is attributed to the image's largest value, what it loses to the baseline's."""
    x, base = call.inputs[0], _other(call.inputs[0])
    options = dict(call.kwargs) | {"return_indices": True}
    at_x, at_base = (functional.max_pool2d(one, *call.args[1:], **options)[1].flatten(2) for one in (x.detach(), base))
    largest, linear = torch.maximum(y, base_y), torch.zeros_like(y)
    for at, change, otherwise in ((at_x, largest - base_y, 1.0), (at_base, y - largest, 0.0)):
        chosen, chosen_base = (values.flatten(2).gather(2, at).view_as(y) for values in (x, base))
        size = torch.maximum(chosen.detach().abs(), chosen_base.abs())
        step = chosen.detach() - chosen_base
        linear = linear + chosen * _quotient(change, step, size, torch.full_like(y, otherwise))
    return linear


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
        return 2 * self.baseline.size(classifier)  # image and baseline side by side

    def attribute(self, case: Case) -> Computation[Attribution]:
        baselines, total, scores = self.baseline.images(case), torch.zeros_like(case.input), list[float]()

        def pair(number: int) -> Tensor:
            return torch.cat([case.input, baselines[number]])

        def add(start: int, evaluation: Evaluation) -> None:
            multipliers = evaluation.gradients[:, : len(case.input)]
            total.add_(((case.input - baselines[start : start + len(multipliers)]) * multipliers).sum(0))
            scores.extend(_other(evaluation.scores).tolist())

        yield [case.rows(len(baselines), stacked(pair), add, rule=Rescale(), passes=2)]
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
    return "contributions would not sum to the difference"
