"""A job: one map to be made of one image for one target."""

from dataclasses import dataclass
from math import isfinite

import torch

from torchserve_explain.attribution.computation import Computation
from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.methods import Attribution, Case, Method, Smoothing
from torchserve_explain.attribution.rows import Contrast, Score
from torchserve_explain.errors import NotFinite, Unsupported


@dataclass(frozen=True)
class Job:
    """One map to be made: a method, smoothed or not, on a case."""

    method: Method
    case: Case
    smoothing: Smoothing | None = None

    @property
    def signed(self) -> bool:
        """Whether the map can be negative."""
        return self.method.signed if self.smoothing is None else self.smoothing.signed(self.method)

    @property
    def unit(self) -> str | None:
        """What the map's values are amounts of: the score's unit; None where they are something else, as a squared gradient."""
        if not (self.signed and self.method.in_score_units):
            return None
        return "value" if self.case.classifier.head is Head.NONE else str(self.case.score)

    @property
    def copies(self) -> int:
        """How many inputs the method is applied to."""
        return 1 if self.smoothing is None else self.smoothing.samples

    @property
    def evaluations(self) -> int:
        """How many evaluations the job takes; for an adaptive method the least."""
        return self.copies * self.method.evaluations(self.case.classifier)

    def compute(self) -> Computation[Attribution]:
        """Ask for the job's rows and return its map; raises Unsupported, NotFinite."""
        if self.case.score is Score.PROBABILITY and not self.method.explains_probability:
            head = self.case.classifier.head
            raise Unsupported(f"{type(self.method).__name__} has no rule for the {head}; allowed: score=logit")
        if self.case.versus is Contrast.REST and not self.method.explains_probability:
            raise Unsupported(f"{type(self.method).__name__} has no rule for a log-sum-exp; allowed: versus a class")
        attribution = yield from self._attribute()
        scalars = (attribution.baseline_score or 0.0, attribution.completeness_error or 0.0)
        if not (torch.isfinite(attribution.map).all() and all(map(isfinite, scalars))):
            raise NotFinite("the model's score or its gradient is not a finite number for this image")
        return attribution

    def _attribute(self) -> Computation[Attribution]:
        if self.smoothing is None:
            return self.method.attribute(self.case)
        return self.smoothing.attribute(self.method, self.case)
