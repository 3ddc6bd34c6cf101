"""The floor: the same rows through the bare network, forward and back to the input, with nothing else; also compiled."""

import torch

from bench.captured import compiled_gradient
from bench.ours import PATHS, SMOOTHED, Outcome, Run
from bench.subjects import Subject
from torchserve_explain.attribution.compiled import Compiled
from torchserve_explain.attribution.methods.perturbation import Occlusion

PACKS = (8, 16, 25)  # rows a pass that are tried
GRADIENT_ROWS = {
    **PATHS,
    SMOOTHED: 200,
    "gradient_shap": 50,
    "saliency": 1,
}
FORWARD_ROWS = {"occlusion", "lime", "kernel_shap"}


def rows_of(work: str, subject: Subject) -> int:
    """Return how many rows a work of GRADIENT_ROWS or FORWARD_ROWS takes."""
    occlusion = Occlusion().evaluations(subject.classifier)
    return len(subject.images) * GRADIENT_ROWS.get(work, occlusion if work == "occlusion" else 200)


def compiled_run(work: str, subject: Subject, _pack: int | None) -> Run:
    """Return a run of a work's rows through the compiled forward pass, whether or not the engine would use it."""
    forward = subject.classifier.compiled or Compiled(subject.classifier._model, subject.classifier.example)
    rows = subject.images[:1].expand(rows_of(work, subject), -1, -1, -1)

    def run() -> Outcome:
        for part in torch.split(rows, PACKS[1]):
            forward(part)
        return Outcome(None, len(rows))

    return run


def compiled_gradient_run(work: str, subject: Subject, _pack: int | None) -> Run:
    """Return a run of a work's rows forward and back to the input by one compiled graph.

    A pass has as many rows, up to 16, as divide the work's: none is padded, and no row is run beyond them. The capture and
    the compilation are not part of the run; raises as `compiled_gradient`.
    """
    total, network = rows_of(work, subject), subject.classifier._model
    pack = next(rows for rows in range(PACKS[1], 0, -1) if total % rows == 0)
    rows = subject.images[:1].expand(pack, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    gradient = compiled_gradient(network, rows, subject.targets[0])

    def run() -> Outcome:
        for _ in range(total // pack):
            gradient(rows)
        return Outcome(None, total)

    return run


def floor_run(work: str, subject: Subject, pack: int | None) -> Run:
    """Return a run of a work's rows through the network as the engine has it: frozen, folded, channels-last."""
    gradient = work in GRADIENT_ROWS
    total, network = rows_of(work, subject), subject.classifier._model
    rows = subject.images[:1].expand(pack or PACKS[0], -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def run() -> Outcome:
        for done in range(0, total, len(rows)):
            some = rows[: total - done].requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                logits = network(some)
            if gradient:
                torch.autograd.grad(logits[:, subject.targets[0]].sum(), some)
        return Outcome(None, total)

    return run
