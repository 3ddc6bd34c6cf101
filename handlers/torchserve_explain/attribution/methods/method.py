"""What a method is: parameters, a cost in rows, and a computation of a map from rows of the model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from math import nan
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.rows import BackwardRule, Evaluation, Known, Layer, Rows, Score, Versus


class OwnRow(StrEnum):
    """What a method wants of the image's own row, which the pass that predicts can answer too."""

    GRADIENT = "gradient"
    LAYER = "layer"
    ACTIVATION = "activation"


class Family(StrEnum):
    """What a method answers, in the order in which people ask."""

    WHERE = "where"
    PIXELS = "which pixels"
    PARTS = "which parts"
    NO_GRADIENTS = "without gradients"


class Draw(IntEnum):
    """What a random stream is for: streams of different purposes are independent."""

    NOISE = 0
    BASELINE = 1
    PATH = 2
    COALITION = 3
    MASK = 4
    PERTURBATION = 5
    ORDER = 6
    CLASS = 7
    REFERENCE = 8


@dataclass(frozen=True)
class Range:
    """Which numbers a parameter may be, and the words in which an error says it; a bound that is None bounds nothing."""

    words: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None


# Of what several methods take, the type; the field of a method says the default.
MaxError = Annotated[float, Range("a fraction above 0, at most 1", gt=0, le=1)]
Steps = Annotated[int | None, Range("a whole number from 1 to 2^63 - 1", ge=1, lt=2**63)]
Samples = Annotated[int, Range("a whole number from 1 to 2^63 - 1", ge=1, lt=2**63)]
Deviation = Annotated[float, Range("a fraction of the input's range from 0 to 1", ge=0, le=1)]


@dataclass(frozen=True)
class Attribution:
    """A map [channels, H, W] of contributions, summed over its channels when shown (positive: raises the score).

    `baseline_score` and `completeness_error` are None where the method has no completeness axiom, `sampling_error` where it
    draws nothing, or too little to know, `map_error` (an estimate of the l2 distance to the exact map, as a fraction of the
    map's norm) where it is not known. `refinement` holds rows and completeness error after each round of a refined path.
    """

    map: Tensor
    baseline_score: float | None = None
    completeness_error: float | None = None
    sampling_error: float | None = None
    map_error: float | None = None
    refinement: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Case:
    """What is explained: one input [C, H, W] (normalised), the target's score at it, and the seed of all draws.

    With `versus` the score is the target's less that of another class, or of all others. `known_score` is NaN for an
    input that has not been evaluated, such as a noisy copy. `budget` is the most rows that an adaptive method may take.
    """

    classifier: Classifier
    input: Tensor
    target: int
    score: Score = Score.LOGIT
    known_score: float = nan
    seed: int = 0
    copy: tuple[int, ...] = ()  # which noisy copy, of which noisy copy, ... this is
    budget: int = 400
    known: Known | None = None
    versus: Versus | None = None

    def gradient(self, rule: BackwardRule | None = None) -> Computation[Tensor]:
        """Return the gradient [C, H, W] of the score at the input, by the model's own layers or by a rule's."""
        evaluation = yield from self.evaluation(rule=rule)
        return evaluation.gradients[0]

    def layer(self, name: str) -> Computation[Layer]:
        """Return a layer's activation and the gradient of the score there, [1, channels, h, w], at the input; `last` is one."""
        resolved = self.classifier.grid_layer(name)
        evaluation = yield from self.evaluation(gradient=False, layers=(resolved,))
        return evaluation.layers[resolved]

    def activation(self, name: str) -> Computation[Tensor]:
        """Return a layer's output [channels, h, w] at the input; no gradient is computed."""
        resolved = self.classifier.grid_layer(name)
        evaluation = yield from self.evaluation(gradient=False, activations=(resolved,))
        return evaluation.activations[resolved][0]

    def scores(self, count: int, image: Callable[[int], Tensor]) -> Computation[list[float]]:
        """Return the scores of `count` images [C, H, W], each made when it is due; no gradient is computed."""
        scores: list[float] = []
        yield [self.rows(count, stacked(image), scores_into(scores), gradient=False)]
        return scores

    def weighted_gradient(self, weights: Tensor, inputs: Callable[[int, int], Tensor]) -> Computation[Tensor]:
        """Return the sum [C, H, W] of the gradients at n inputs, each times its weight [n]; memory does not grow with n."""
        total = torch.zeros_like(self.input)

        def add(start: int, evaluation: Evaluation) -> None:
            total.add_(evaluation.weighted_gradient(weights[start : start + len(evaluation.scores)]))

        yield [self.rows(len(weights), inputs, add, summed=True)]
        return total

    def evaluation(self, row: Tensor | None = None, **wanted: object) -> Computation[Evaluation]:
        """Return the evaluation of one row, the input where none is given; see Rows for what may be wanted."""
        image = self.input if row is None else row
        found: list[Evaluation] = []
        rows = self.rows(1, lambda _start, _stop: image[None], lambda _start, evaluation: found.append(evaluation), **wanted)
        yield [replace(rows, known=self.known) if row is None and self._knows(rows) else rows]
        return found[0]

    def _knows(self, rows: Rows) -> bool:
        """Whether the known evaluation is one of this very input and score, and holds what the rows want."""
        known = self.known
        if known is None or rows.rule is not None:
            return False
        explained = (known.target, known.score, known.versus) == (self.target, self.score, self.versus)
        same = known.input is self.input and explained
        found = known.evaluation
        held = set(rows.layers) <= found.layers.keys() and set(rows.activations) <= found.activations.keys()
        return same and held and (not rows.gradient or found.found is not None)

    def rows(self, count: int, inputs: Callable[[int, int], Tensor], consume: Callable[..., None], **wanted: object) -> Rows:
        """Return `count` rows of this case's target; see Rows."""
        return Rows(count, inputs, consume, self.target, self.score, versus=self.versus, **wanted)  # type: ignore[arg-type]

    def draw(self, purpose: Draw, index: int) -> np.random.Generator:
        """Return the random stream of sample `index`: the same whatever pass, machine or order it is drawn in."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(*self.copy, purpose, index)))

    def noise(self, index: int, stdev: float) -> Tensor:
        """Return sample `index` of Gaussian noise [C, H, W], `stdev` a fraction of the input's range."""
        scale = stdev * float(self.input.max() - self.input.min())
        drawn = self.draw(Draw.NOISE, index).standard_normal(tuple(self.input.shape), dtype=np.float32)
        return torch.from_numpy(drawn).to(self.input) * scale

    def noisy(self, index: int, stdev: float) -> "Case":
        """Return the case of this input's noisy copy number `index`, with draws of its own."""
        noisy_input = self.input + self.noise(index, stdev)
        return replace(self, input=noisy_input, known_score=nan, copy=(*self.copy, index))


@dataclass(frozen=True)
class Method:
    """A technique of attribution; its dataclass fields are the parameters that a client may choose."""

    name: ClassVar[str]
    family: ClassVar[Family] = Family.PIXELS
    first: ClassVar[bool] = False  # True: one of the few that a person is offered first
    signed: ClassVar[bool] = True  # False: the map is never negative, by definition
    in_score_units: ClassVar[bool] = True  # False: a signed map's values are no amounts of the score
    explains_probability: ClassVar[bool] = True  # False: it has no rule for the softmax, nor for a log-sum-exp
    asks_for_class: ClassVar[bool] = True  # False: its map is the same for every class
    needs_gradient: ClassVar[bool] = True  # False: the model's outputs suffice
    own_row: ClassVar[OwnRow | None] = None
    adaptive: ClassVar[bool] = False  # True: it chooses how many rows it takes, at most `case.budget`
    draws: ClassVar[bool] = False  # True: its map is an estimate from random samples

    def evaluations(self, classifier: Classifier) -> int:
        """Return how many evaluations one map costs; for an adaptive method the least."""
        return 1

    def attribute(self, case: Case) -> Computation[Attribution]:
        """Return the map of a case."""
        raise NotImplementedError

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        """Return why the method cannot explain the classifier, or None where it can."""
        return None


def stacked(make: Callable[[int], Tensor]) -> Callable[[int, int], Tensor]:
    """Return an input function of Rows that makes each row [C, H, W] by its number."""
    return lambda start, stop: torch.stack([make(number) for number in range(start, stop)])


def scores_into(kept: list[float]) -> Callable[[int, Evaluation], None]:
    """Return a consumer that keeps the rows' scores in order."""
    return lambda _start, evaluation: kept.extend(evaluation.scores.tolist())


def pixels_of(case: Case) -> NDArray[np.float64]:
    """Return the case's image [H, W, channels] with values in [0, 1], as segmentations want it."""
    pixels = case.classifier.normalization.inverse(case.input).clamp(0, 1)
    return pixels.movedim(0, -1).double().cpu().numpy()
