"""The engine's side: each work as jobs of one run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.subjects import Subject
from torchserve_explain.archive import has_bfloat16
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.compiled import openvino_version
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case, Method, Smoothing
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.smoothing import SmoothingKind
from torchserve_explain.attribution.quality import MaxSensitivity, Measurement
from torchserve_explain.serving.settings import Limits


@dataclass(frozen=True)
class Outcome:
    """What a run gives: maps [n, H, W] summed over channels, the rows they took, the worst completeness error reported."""

    maps: Tensor | None
    rows: int | None = None
    error: float | None = None


Run = Callable[[], Outcome]
PATIENCE = 60.0  # seconds in which passes are compiled and measured, as when an archive is loaded

FIVE: tuple[Method, ...] = (
    IntegratedGradients(steps=50),
    GradientShap(samples=50),
    *(METHODS[name]() for name in ("saliency", "grad_cam", "guided_backprop")),
)
SMOOTHED = "integrated_gradients, 20 steps x 10 noisy copies"
PATHS = {f"integrated_gradients, {steps} steps": steps for steps in (25, 50, 100, 200)}
PATH = "integrated_gradients, 50 steps"
WITHIN = "integrated_gradients, error at most 5 %"
WORKS: dict[str, tuple[tuple[Method, Smoothing | None], ...]] = {
    **{work: ((IntegratedGradients(steps=steps), None),) for work, steps in PATHS.items()},
    SMOOTHED: ((IntegratedGradients(steps=20), Smoothing(SmoothingKind.SMOOTHGRAD, 10, 0.15)),),
    WITHIN: ((IntegratedGradients(max_error=0.05), None),),
    "five methods": tuple((method, None) for method in FIVE),
    **{
        name: ((METHODS[name](), None),)
        for name in (
            *("gradient_shap", "saliency", "input_x_gradient", "guided_backprop", "guided_grad_cam", "deep_lift", "lrp"),
            *("grad_cam", "grad_cam_plus_plus", "layer_cam", "occlusion", "lime", "kernel_shap"),
        )
    },
}
SENSITIVITIES = {f"max sensitivity of {work}": work for work in ("saliency", "grad_cam", "integrated_gradients, 25 steps")}
REPEATED = "max sensitivity of integrated_gradients, 25 steps"  # the dearest


def prepare(work: str, subject: Subject, _chunk: int | None) -> Run:
    """Return the run of a work by the engine as it is served, compiled where that pays."""
    if openvino_version() is not None:
        subject.classifier.compile(subject.images[0], Limits().pack, PATIENCE)
    return _prepared(work, subject)


def _prepared(work: str, subject: Subject) -> Run:
    engine = Engine(subject.classifier, Limits().pack)
    logits = engine.logits(list(subject.images))
    cases = [
        Case(subject.classifier, image, target, known_score=float(row[target]))
        for image, target, row in zip(subject.images, subject.targets, logits, strict=True)
    ]
    if work in SENSITIVITIES:
        repeated = _jobs(SENSITIVITIES[work], cases)
        return lambda: _sensitivity(engine, repeated)
    jobs = _jobs(work, cases)
    return lambda: _explain(engine, jobs)


def _jobs(work: str, cases: list[Case]) -> list[Job]:
    return [Job(method, case, smoothing) for case in cases for method, smoothing in WORKS[work]]


def prepare_torch(work: str, subject: Subject, _chunk: int | None) -> Run:
    """Return the run of a work by the engine with PyTorch's passes alone."""
    return _prepared(work, subject)


def prepare_narrow(work: str, subject: Subject, chunk: int | None) -> Run:
    """Return the run of a work by the engine with its rows without a gradient in bfloat16.

    Raises ValueError where the processor would emulate it, which takes forty times as long.
    """
    if not has_bfloat16("cpu"):
        raise ValueError("this processor has no bfloat16")
    served, size = subject.classifier, subject.images.shape[-2:]
    narrow = Classifier(subject.network, served.normalization, (size[0], size[1]), narrow=torch.bfloat16)
    return prepare(work, replace(subject, classifier=narrow), chunk)


def _explain(engine: Engine, jobs: list[Job]) -> Outcome:
    finished = engine.results(jobs)
    errors = [f.value.completeness_error for f in finished if f.value.completeness_error is not None]
    maps = torch.stack([one.value.map.sum(0) for one in finished])
    return Outcome(maps, sum(one.evaluations for one in finished), max(errors, default=None))


def _sensitivity(engine: Engine, jobs: list[Job]) -> Outcome:
    finished = engine.results(jobs)
    works = [Measurement(MaxSensitivity(), job, one.value) for job, one in zip(jobs, finished, strict=True)]
    measured = engine.results(works)
    return Outcome(None, sum(one.evaluations for one in finished) + sum(one.evaluations for one in measured))
