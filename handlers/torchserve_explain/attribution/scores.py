"""Scores: what is explained of a row's logits, a class's own score or how far it leads another's."""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.rows import Contrast, Score, Versus


def selected(
    head: Head,
    logits: Tensor,
    targets: Sequence[int | None],
    scores: Sequence[Score],
    versus: Sequence[Versus | None] = (),
) -> Tensor:
    """Return each row's score [n] of its target, less that of what it is compared with; target None is the predicted class."""
    index, values = _targets(logits, targets)[:, None], logits
    if Score.PROBABILITY in scores:
        values = torch.where(_are(Score.PROBABILITY, scores, logits)[:, None], head.probabilities(logits), logits)
    chosen = values.gather(1, index)[:, 0]
    if all(one is None for one in versus):
        return chosen
    return chosen - _compared(logits, values, index, scores, versus)


def score_of(head: Head, logits: Tensor, target: int, score: Score, versus: Versus | None = None) -> float:
    """Return the score of one row's logits [classes]."""
    return float(selected(head, logits[None], [target], [score], [versus])[0])


def resolved(versus: Versus | None, logits: Tensor, target: int) -> Versus | None:
    """Return what a target is compared with, a runner-up as the class that it is by the logits [classes] of the image."""
    if versus is not Contrast.RUNNER_UP:
        return versus
    return int(_runners_up(logits[None], torch.tensor([[target]], device=logits.device))[0])


def _targets(logits: Tensor, targets: Sequence[int | None]) -> Tensor:
    predicted = logits.detach().argmax(1).tolist() if None in targets else []
    chosen = [predicted[row] if target is None else target for row, target in enumerate(targets)]
    return torch.tensor(chosen, device=logits.device)


def _runners_up(logits: Tensor, index: Tensor) -> Tensor:
    return logits.detach().scatter(1, index, -inf).argmax(1)


def _are(kind: object, of: Sequence[object], logits: Tensor) -> Tensor:
    """Return which rows [n] are of a kind."""
    return torch.tensor([one is kind for one in of], device=logits.device)


def _compared(
    logits: Tensor, values: Tensor, index: Tensor, scores: Sequence[Score], versus: Sequence[Versus | None]
) -> Tensor:
    """Return what is taken from each row's score [n]: another class's, the others' together, or nothing."""
    named = torch.tensor([one if isinstance(one, int) else -1 for one in versus], device=logits.device)
    others = torch.where(named < 0, _runners_up(logits, index), named)
    single = values.gather(1, others[:, None])[:, 0]
    added, joined = values.scatter(1, index, 0).sum(1), logits.scatter(1, index, -inf).logsumexp(1)
    together = torch.where(_are(Score.PROBABILITY, scores, logits), added, joined)
    rest, none = (_are(kind, versus, logits) for kind in (Contrast.REST, None))
    return torch.where(none, 0.0, torch.where(rest, together, single))
