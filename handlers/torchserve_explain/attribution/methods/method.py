"""What a method is: parameters, a cost in rows, and a computation that asks for rows and answers a map."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from math import nan
from typing import ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.rows import Evaluation, Rows, Score

METHODS: dict[str, type["Method"]] = {}

M = TypeVar("M", bound=type["Method"])


def register(name: str) -> Callable[[M], M]:
    """Make a method known by its name in the contract."""

    def decorate(method: M) -> M:
        METHODS[name] = method
        return method

    return decorate


class Draw(IntEnum):
    """What a random stream is for: streams of different purposes are independent."""

    NOISE = 0
    BASELINE = 1
    PATH = 2
    COALITION = 3
    MASK = 4
    PERTURBATION = 5
    ORDER = 6


@dataclass(frozen=True)
class Attribution:
    """A map [channels, H, W] of contributions, summed over its channels when shown (positive: raises the score).

    `baseline_score` and `completeness_error` are None where the method has no completeness axiom.
    """

    map: Tensor
    baseline_score: float | None = None
    completeness_error: float | None = None


@dataclass(frozen=True)
class Case:
    """What is explained: one input [C, H, W] (normalised), the target's score at it, and the seed of all draws.

    `known_score` is NaN for an input that nobody has evaluated, such as a noisy copy. `budget` is how many rows
    a method may take that decides for itself.
    """

    classifier: Classifier
    input: Tensor
    target: int
    score: Score = Score.LOGIT
    known_score: float = nan
    seed: int = 0
    copy: tuple[int, ...] = ()  # which noisy copy, of which noisy copy, ... this is
    budget: int = 400

    def rows(self, count: int, inputs: Callable[[int, int], Tensor], consume: Callable[..., None], **wanted: object) -> Rows:
        """Return `count` rows of this case's target; see Rows."""
        return Rows(count, inputs, consume, self.target, self.score, **wanted)  # type: ignore[arg-type]

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


class Method:
    """A technique of attribution; its dataclass fields are the parameters that a client may choose."""

    signed: ClassVar[bool] = True  # False: the map is never negative, by definition
    explains_probability: ClassVar[bool] = True  # False: it has no rule for the softmax
    needs_gradient: ClassVar[bool] = True  # False: the model's answers suffice
    adaptive: ClassVar[bool] = False  # True: it decides within `case.budget` how many rows it takes

    def evaluations(self, classifier: Classifier) -> int:
        """Return how many evaluations one map costs; for an adaptive method the least."""
        return 1

    def attribute(self, case: Case) -> Computation[Attribution]:
        """Ask for rows and return the map."""
        raise NotImplementedError

    @classmethod
    def unsupported(cls, classifier: Classifier) -> str | None:
        """Return why the method cannot serve the classifier, or None where it can."""
        return None


def stacked(make: Callable[[int], Tensor]) -> Callable[[int, int], Tensor]:
    """Return an input function that makes each row [C, H, W] by its number."""
    return lambda start, stop: torch.stack([make(number) for number in range(start, stop)])


def scores_into(kept: list[float]) -> Callable[[int, Evaluation], None]:
    """Return a consumer that keeps the rows' scores in order."""
    return lambda _start, evaluation: kept.extend(evaluation.scores.tolist())


def pixels_of(case: Case) -> NDArray[np.float64]:
    """Return the case's image [H, W, channels] with values in [0, 1], as segmentations want it."""
    pixels = case.classifier.normalization.inverse(case.input).clamp(0, 1)
    return pixels.movedim(0, -1).double().cpu().numpy()
