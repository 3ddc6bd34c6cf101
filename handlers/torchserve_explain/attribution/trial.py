"""A trial of another form of a network, where it serves: does it answer alike, and is it faster?"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Forward = Callable[[Tensor], Tensor]  # [n, C, H, W] to logits [n, classes]
Difference = Callable[[Tensor, Tensor, int], str | None]  # of two forms' logits of the rows tried, so many of them hidden
SLOWER = 0.9  # of the network's seconds, which another form may take at most
EQUAL, SAME_MAP = 1e-4, 0.9999  # largest difference of logits over their range; least cosine of maps
LIKE_MAP = 0.98  # least cosine of maps in narrower arithmetic
ROUNDING = 16 * torch.finfo(torch.float32).eps
WINDOWS = 4  # hidden one after another, so many side by side: the rows of a map
ROUNDS = 3


@dataclass(frozen=True)
class Pays:
    """Whether another form of a network is worth it for rows that a request asks for alone, and for each of many."""

    one: bool
    many: bool

    def of(self, rows: int) -> bool:
        """Whether it is worth it for a request's rows."""
        return self.one if rows == 1 else self.many


NEITHER = Pays(one=False, many=False)


def unequal(expected: Tensor, found: Tensor, hidden: int) -> str | None:
    """Return how logits [rows, classes] are not equal, of a picture and of it with windows hidden and more, or None."""
    scale = float(expected.max() - expected.min())
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=0, atol=EQUAL * scale):
        return f"its logits, over a range of {scale:.3g}, differ by {float((expected - found).abs().max()):.1e}"
    top = int(expected[0].argmax())
    ours = _map(expected, expected, top, hidden)
    for whole in (found, expected):  # a single row may have the other form
        theirs = _map(whole, found, top, hidden)
        if torch.allclose(ours, theirs, rtol=0, atol=ROUNDING * scale):  # to it, and what is hidden may matter as little
            continue
        if not (cosine := float(torch.cosine_similarity(ours, theirs, 0))) >= SAME_MAP:
            return f"its maps differ: cosine {cosine:.5f}"
    return None


def unlike(expected: Tensor, found: Tensor, hidden: int) -> str | None:
    """Return how the map of the windows, which narrower arithmetic may move a little, is another one, or None."""
    top = int(expected[0].argmax())
    ours, theirs = (_map(rows, rows, top, hidden) for rows in (expected, found))
    cosine = float(torch.cosine_similarity(ours, theirs, 0))
    return None if cosine >= LIKE_MAP else f"its maps differ: cosine {cosine:.3f}"


def _map(whole: Tensor, rows: Tensor, top: int, hidden: int) -> Tensor:
    """Return what each hidden window takes from a class's logit of the whole picture."""
    return whole[0, top] - rows[1 : hidden + 1, top]


def tried(
    module: Forward, other: Forward, picture: Tensor, deadline: float, known: Pays | None, difference: Difference = unequal
) -> Pays:
    """Return what another form is worth beside the module's passes, as known or as measured until `deadline`.

    Raises ValueError where there is a difference: of the picture [C, H, W], it with windows hidden, noise, and black.
    """
    hidden = _hidden(picture)
    noise = torch.randn(2, *picture.shape, generator=torch.Generator().manual_seed(0)).to(picture)
    rows = torch.cat([picture[None], hidden, noise, torch.zeros_like(noise[:1])])
    if known is None:
        began = time.monotonic()
        module(rows[:1])
        ahead = 2 * (len(rows) + 1 + len(hidden)) * (time.monotonic() - began)  # the comparison, and a round of each
        if began + ahead > deadline:
            raise ValueError("its measurement takes longer than startup may")
    if found := difference(module(rows), other(rows), len(hidden)):
        raise ValueError(found)
    if known is not None:
        return known
    return Pays(_pays(module, other, hidden[:1], deadline), _pays(module, other, hidden, deadline))


def weighed(wide: Forward, narrow: Forward, picture: Tensor, seconds: float, known: Pays | None) -> Pays | None:
    """Return what narrower arithmetic is worth; None where it does not run, its maps are others, or time does not suffice."""
    if known == NEITHER:
        return known
    try:
        return tried(wide, narrow, picture, time.monotonic() + seconds, known, unlike)
    except Exception as error:  # it is the user's own forward that runs here
        log.warning("the arithmetic stays as it is: %s", in_words(error))
        return None


def in_words(error: Exception) -> str:
    """Return an error on one line, not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _hidden(picture: Tensor) -> Tensor:
    """Return copies [n, C, H, W] of a picture, a window of each made zero."""
    height, width = (-(-side // WINDOWS) for side in picture.shape[1:])
    copies = picture.repeat(WINDOWS * WINDOWS, 1, 1, 1)
    for number, copied in enumerate(copies):
        top, left = number // WINDOWS * height, number % WINDOWS * width
        copied[:, top : top + height, left : left + width] = 0
    return copies


def _pays(module: Forward, other: Forward, rows: Tensor, deadline: float) -> bool:
    """Whether the other form is faster by a tenth for these rows; raises ValueError where no round is over in time."""
    forms, best = (module, other), [float("inf")] * 2
    for done in range(ROUNDS):
        for place, form in enumerate(forms):
            began = time.monotonic()
            form(rows).cpu()  # which waits for a GPU
            best[place] = min(best[place], time.monotonic() - began)
        if time.monotonic() > deadline:
            if not done:
                raise ValueError("its measurement takes longer than startup may")
            break
    return best[1] <= SLOWER * best[0]
