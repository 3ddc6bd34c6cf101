"""Attention: through which tokens the image came to be where the score is read."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.functions import FunctionCall
from torchserve_explain.attribution.gathering import TOTAL, Add, Gathering
from torchserve_explain.attribution.layers import Grid
from torchserve_explain.attribution.methods.cam import enlarged
from torchserve_explain.attribution.methods.method import Attribution, Case, Family, Method
from torchserve_explain.errors import Unsupported

NONE = "it has no attention among all of its patches"


@dataclass(frozen=True)
class Rollout:
    """Relevance of so many tokens, from where the score is read back through every layer's attention."""

    tokens: int

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model with its relevance [n, tokens] beside it."""
        return Gathering(model, (self.tokens,), {"softmax": self.attended})

    def attended(self, call: FunctionCall, rows: int) -> tuple[Tensor, Add | None]:
        """Return the weights of attention, and the step r + r A of relevance through them."""
        weights: Tensor = call.plain()
        if weights.dim() < 3:
            return weights, None
        windows = weights.dim() > 3 and len(weights) != rows
        if windows or weights.shape[-2:] != (self.tokens, self.tokens):
            raise Unsupported("its attention is not among all patches and at most a class token")
        held = weights.detach()

        def step(gradient: Tensor, relevance: Tensor) -> Tensor:
            heads = (rows, -1, self.tokens, self.tokens)
            begun = relevance.any(1, keepdim=True)
            if not begun.all():  # a row's last layer: only tokens that are read have a gradient
                read = (gradient != 0).reshape(heads).any(3).any(1).to(gradient)
                relevance = relevance.where(begun, read / read.sum(1, keepdim=True).clamp(min=1))
            attention = (gradient * held).clamp(min=0).reshape(heads).mean(1)
            return relevance + (relevance[:, None] @ attention)[:, 0]

        return weights, step


@dataclass(frozen=True)
class AttentionRollout(Method):
    """Which patches the read token attended to, through all layers, heads counting by how they speak for the target.

    R = (I + A_L) ... (I + A_1) at the tokens that are read, A = mean over heads of ReLU(dF/dA * A), enlarged bilinearly;
    never negative; arXiv:2103.15679, equations 5 and 6.
    """

    name: ClassVar[str] = "attention_rollout"
    family: ClassVar[Family] = Family.WHERE
    signed: ClassVar[bool] = False

    def attribute(self, case: Case) -> Computation[Attribution]:
        grid = _grid(case.classifier)
        evaluation = yield from case.evaluation(rule=_rollout(grid), layers=(TOTAL,))
        relevance = evaluation.layers[TOTAL].gradient
        return Attribution(enlarged(grid.channels_first(relevance[..., None]), case.input))

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        try:
            rule = _rollout(_grid(classifier))
        except Unsupported as reason:
            return str(reason)
        return classifier.refusal(rule, classifier.example) or _nothing(classifier, rule)


def _nothing(classifier: Classifier, rule: Rollout) -> str | None:
    found = classifier.evaluate(classifier.example, [0], [], gradient=True, layers=[TOTAL], rule=rule)
    return None if bool(found.layers[TOTAL].gradient.any()) else NONE


def _grid(classifier: Classifier) -> Grid:
    """Return how the last layer of tokens holds the patches; raises Unsupported."""
    grids = [grid for grid in classifier.spatial_layers.values() if grid.layout == "tokens"]
    if not grids:
        raise Unsupported(NONE)
    return grids[-1]


def _rollout(grid: Grid) -> Rollout:
    return Rollout(grid.height * grid.width + grid.skip)
