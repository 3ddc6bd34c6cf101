"""Layer-wise relevance propagation: the score is propagated back layer by layer, by a rule for each."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.functions import ACTIVATIONS, LINEAR_NODES, FunctionCall, going_back, replacing, surrogate
from torchserve_explain.attribution.methods.method import Attribution, Case, Method
from torchserve_explain.attribution.methods.relevance import RULED_NODES, own, sharing, stable

RULED = LINEAR_NODES | RULED_NODES | {"MaxPool2DWithIndices", "Bmm", "Mv", "Dot"}
GAMMA = 0.25
LAYERS = ("conv2d", "linear")


class Composite(StrEnum):
    """Which rule each layer has, as zennit names them: epsilon for linear layers, and for convolutions as follows."""

    EPSILON_PLUS = "epsilon_plus"
    EPSILON_PLUS_FLAT = "epsilon_plus_flat"  # the first: spread evenly
    EPSILON_GAMMA_BOX = "epsilon_gamma_box"  # gamma; the first: by the range of pixels
    EPSILON_ALPHA2_BETA1 = "epsilon_alpha2_beta1"


class Attention(StrEnum):
    """Whether relevance also goes through attention's weights to queries and keys, or the weights are constants."""

    PROPAGATED = "propagated"
    DETACHED = "detached"


@dataclass(frozen=True)
class _Term:
    """A layer run on a changed input with changed parameters; `sign` is that of its part."""

    input: Callable[[Tensor], Tensor]
    parameter: Callable[[Tensor], Tensor]
    bias: bool = True
    sign: int = 1


@dataclass(frozen=True)
class _Part:
    """Terms that share the output's relevance in proportion: `weight` of it, only `where` the output is so."""

    terms: tuple[_Term, ...]
    weight: float = 1.0
    where: Callable[[Tensor], Tensor] | None = None


def _same(parameter: Tensor) -> Tensor:
    return parameter


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _negative(x: Tensor) -> Tensor:
    return x.clamp(max=0)


def _favouring(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda parameter: parameter + GAMMA * part(parameter)


OWN = _Term(own, _same)
EPSILON = (_Part((OWN,)),)
FLAT = (_Part((_Term(torch.ones_like, torch.ones_like, bias=False),)),)
EXCITING = (_Term(_positive, _positive), _Term(_negative, _negative, bias=False))
INHIBITING = (_Term(_positive, _negative), _Term(_negative, _positive, bias=False))
PLUS = (_Part(EXCITING),)
ALPHA2_BETA1 = (_Part(EXCITING, 2.0), _Part(INHIBITING, -1.0))
RAISING = (_Term(_positive, _favouring(_positive)), _Term(_negative, _favouring(_negative), bias=False))
LOWERING = (_Term(_positive, _favouring(_negative)), _Term(_negative, _favouring(_positive), bias=False))
GAMMA_RULE = (_Part(RAISING, where=lambda z: z > 0), _Part(LOWERING, where=lambda z: z < 0))


def _box(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[_Part, ...]:
    def bound(values: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
        return lambda x: x.new_tensor(values)[:, None, None].expand_as(x)

    below, above = _Term(bound(low), _positive, sign=-1), _Term(bound(high), _negative, sign=-1)
    return (_Part((OWN, below, above)),)


@dataclass(frozen=True)
class RelevanceRules:
    """Every operation distributes the relevance of its output to its inputs; a logit's own is the logit.

    Convolutions and linear layers by the composite's rules; sums, poolings and means in proportion; activations and
    batch norms unchanged; the largest value takes all of a max pooling, the signal all of a product with a smaller
    gate. Layer norms as if their deviation were a number; products of signals in halves; softmax by its Taylor expansion.
    arXiv:1509.06321 (epsilon, alpha-beta), 10.1007/978-3-030-28954-6_10 (composites), arXiv:1706.07206 (gates),
    arXiv:2402.05602 (AttnLRP: norms, products of signals, attention).
    `low` and `high` are the normalised values of black and white by channel.
    """

    composite: Composite
    low: tuple[float, ...]
    high: tuple[float, ...]
    attention: Attention = Attention.PROPAGATED

    @classmethod
    def of(cls, classifier: Classifier, composite: Composite, attention: Attention) -> "RelevanceRules":
        """Return the rules for a classifier's range of inputs."""
        pixels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, len(classifier.normalization.mean), 1, 1)
        low, high = classifier.normalization(pixels)[..., 0, 0].tolist()
        return cls(composite, tuple(low), tuple(high), attention)

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the changed model: the same modules, their functions with other gradients."""
        shared = sharing(self.attention is Attention.PROPAGATED)
        return _FromLogits(replacing(model, lambda: {**shared, **dict.fromkeys(LAYERS, _Layers(self))}, in_place=ACTIVATIONS))

    def parts(self, call: FunctionCall, first: bool) -> tuple[_Part, ...]:
        """Return the rule of a convolution or linear layer."""
        if call.name == "linear":
            return EPSILON
        match self.composite:
            case Composite.EPSILON_PLUS:
                return PLUS
            case Composite.EPSILON_PLUS_FLAT:
                return FLAT if first else PLUS
            case Composite.EPSILON_GAMMA_BOX:
                return _box(self.low, self.high) if first else GAMMA_RULE
            case Composite.EPSILON_ALPHA2_BETA1:
                return ALPHA2_BETA1


class _FromLogits(nn.Module):
    """Starts the relevance: each logit has its own value, so that those of a difference stay apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._model(x)
        return surrogate(logits, logits * logits.detach())


class _Layers:
    """The convolutions and linear layers of one pass: the first convolution may have a rule of its own."""

    def __init__(self, rules: RelevanceRules) -> None:
        self._rules = rules
        self._first = True

    def __call__(self, call: FunctionCall) -> Tensor:
        parts = self._rules.parts(call, self._first)
        self._first = self._first and call.name == "linear"
        with torch.enable_grad():
            found = [[one for term in part.terms if (one := _run(call, term))] for part in parts]
        output = found[0][0][1].detach() if parts[0].terms[0] is OWN else call.value()
        shares = [_Share(part, terms, output) for part, terms in zip(parts, found, strict=True)]
        return going_back(output, lambda relevance: (reduce(torch.add, [s.back(relevance) for s in shares]),), call.inputs[0])


def _run(call: FunctionCall, term: _Term) -> tuple[Tensor, Tensor] | None:
    """Return a layer's changed input and what it answers; None where both are zero."""
    at = term.input(call.inputs[0].detach())
    if not term.bias and at.amin() == at.amax() == 0:  # far faster than any()
        return None
    weight, bias, options = _parameters(call)
    own_bias = term.parameter(bias) if bias is not None and term.bias else None
    answer: Tensor = call.function(at.requires_grad_(), term.parameter(weight), own_bias, **options)
    return at, answer if term.sign > 0 else -answer


class _Share:
    """A part of a rule as it was run: what it hands back of the output's relevance."""

    def __init__(self, part: _Part, terms: list[tuple[Tensor, Tensor]], output: Tensor) -> None:
        self._inputs = [at for at, _ in terms]
        with torch.enable_grad():
            total = reduce(torch.add, [answer for _, answer in terms])
        self._total = get_gradient_edge(total)
        self._divisor = stable(total.detach())
        if part.weight != 1:
            self._divisor /= part.weight
        self._where = part.where and part.where(output)

    def back(self, relevance: Tensor) -> Tensor:
        """Return the relevance of the input."""
        share = relevance / self._divisor
        if self._where is not None:
            share *= self._where
        gradients = torch.autograd.grad(self._total, self._inputs, share)
        return reduce(torch.add, [gradient.mul_(at) for gradient, at in zip(gradients, self._inputs, strict=True)])


def _parameters(call: FunctionCall) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Return a layer's weight, bias and options, however they were given."""
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, call.args[1:], strict=False)) | dict(call.kwargs)
    return given.pop("weight"), given.pop("bias", None), given


@dataclass(frozen=True)
class LayerwiseRelevance(Method):
    """The target's logit handed back to the pixels, each layer sharing what reaches it among its inputs by a rule.

    map = relevance, signed; layers without bias pass all of it on. arXiv:1509.06321, section 2.3; `composite` says
    which rule each layer has, `attention` whether attention's weights take part. What biases keep is not measured.
    """

    name: ClassVar[str] = "lrp"
    explains_probability: ClassVar[bool] = False

    composite: Composite = Composite.EPSILON_PLUS
    attention: Attention = Attention.PROPAGATED

    def attribute(self, case: Case) -> Computation[Attribution]:
        rules = RelevanceRules.of(case.classifier, self.composite, self.attention)
        evaluation = yield from case.evaluation(rule=rules)
        return Attribution(evaluation.gradients[0])

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        unruled = sorted(classifier.operations - RULED)
        if unruled:
            return f"LRP has no rule for {', '.join(unruled)}"
        rules = RelevanceRules.of(classifier, Composite.EPSILON_PLUS, Attention.PROPAGATED)
        return classifier.refusal(rules, classifier.example, RULED_NODES)
