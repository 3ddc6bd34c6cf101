"""The peers' side: the same works by Captum, pytorch-grad-cam and zennit, called as their documentation does."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import captum.attr as captum
import torch
from captum.metrics import sensitivity_max
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, LayerCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from skimage.segmentation import slic
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus
from zennit.torchvision import ResNetCanonizer

from bench.ours import PATH, PATHS, REPEATED, SENSITIVITIES, SMOOTHED, WITHIN, Outcome, Run
from bench.subjects import Subject

# Captum's attributions [n, channels, H, W] of a subject, `chunk` rows a pass (None: its default).
Attribute = Callable[[Subject, int | None], Tensor]


def _path(subject: Subject, chunk: int | None, steps: int = 50) -> Tensor:
    method, inputs = captum.IntegratedGradients(subject.network), subject.images
    chunk = None if chunk is None else max(chunk, len(inputs))
    return method.attribute(inputs, subject.baselines, subject.targets, n_steps=steps, internal_batch_size=chunk)


def _steps_within(subject: Subject, error: float) -> int:
    """Return the first number of steps, 25 by 25, whose completeness error is small enough."""
    for steps in range(50, 1000, 25):
        outcome = _attributed([_path(subject, 25, steps)], subject, WITHIN)
        if outcome.error is not None and outcome.error <= error:
            return steps
    raise ValueError(f"an error of {error} is not reached with 1000 steps")


def _within(subject: Subject) -> Attribute:
    """Return what explains image by image, each with its own number of steps, found beforehand."""
    singles = [
        replace(subject, images=image[None], targets=[int(target)])
        for image, target in zip(subject.images, subject.targets, strict=True)
    ]
    steps = [_steps_within(single, 0.05) for single in singles]
    return lambda _, chunk: torch.cat([_path(single, chunk, n) for single, n in zip(singles, steps, strict=True)])


def _tunnel(subject: Subject, chunk: int | None) -> Tensor:
    method = captum.NoiseTunnel(captum.IntegratedGradients(subject.network))
    spread = 0.15 * float(subject.images.max() - subject.images.min())
    packing = {} if chunk is None else {"nt_samples_batch_size": 1, "internal_batch_size": max(chunk, len(subject.images))}
    return method.attribute(
        subject.images,
        "smoothgrad",
        10,
        stdevs=spread,
        baselines=subject.baselines,
        target=subject.targets,
        n_steps=20,
        **packing,
    )


def _shap(subject: Subject, _chunk: int | None) -> Tensor:
    method = captum.GradientShap(subject.network)
    return method.attribute(subject.images, subject.baselines[:1], n_samples=50, stdevs=0.0, target=subject.targets)


def _simple(method: type, subject: Subject, _chunk: int | None, **arguments: Any) -> Tensor:
    inputs = subject.images.clone()
    return method(subject.network).attribute(inputs, target=subject.targets, **arguments)


def _deep_lift(subject: Subject, _chunk: int | None) -> Tensor:
    return captum.DeepLift(subject.network).attribute(subject.images, subject.baselines, target=subject.targets)


def _grad_cam(subject: Subject, _chunk: int | None) -> Tensor:
    cam = captum.LayerGradCam(subject.network, subject.layer).attribute(subject.images, subject.targets, relu_attributions=True)
    return captum.LayerAttribution.interpolate(cam, subject.images.shape[-2:], "bilinear")


def _guided_grad_cam(subject: Subject, _chunk: int | None) -> Tensor:
    method = captum.GuidedGradCam(subject.network, subject.layer)
    return method.attribute(subject.images, subject.targets, interpolate_mode="bilinear")


def _occlusion(subject: Subject, chunk: int | None) -> Tensor:
    height, width = subject.images.shape[-2:]
    windows, strides = (3, height // 8, width // 8), (3, height // 16, width // 16)
    with torch.no_grad():
        return captum.Occlusion(subject.network).attribute(
            subject.images, windows, strides, subject.baselines, subject.targets, perturbations_per_eval=chunk or 1
        )


def _surrogate(method: type, subject: Subject, chunk: int | None) -> Tensor:
    """One image at a time: Captum's surrogates take no more."""
    maps = []
    for image, baseline, target in zip(subject.images, subject.baselines, subject.targets, strict=True):
        pixels = subject.classifier.normalization.inverse(image).clamp(0, 1).movedim(0, -1).double().numpy()
        mask = torch.from_numpy(slic(pixels, n_segments=50, compactness=10, sigma=1, start_label=0, channel_axis=-1))
        with torch.no_grad():
            maps.append(
                method(subject.network).attribute(
                    *(image[None], baseline[None]),
                    target=target,
                    feature_mask=mask[None, None],
                    n_samples=200,
                    perturbations_per_eval=chunk or 1,
                )
            )
    return torch.cat(maps)


CAPTUM: dict[str, Attribute] = {
    **{work: partial(_path, steps=steps) for work, steps in PATHS.items()},
    SMOOTHED: _tunnel,
    "gradient_shap": _shap,
    "saliency": partial(_simple, captum.Saliency),
    "input_x_gradient": partial(_simple, captum.InputXGradient),
    "guided_backprop": partial(_simple, captum.GuidedBackprop),
    "guided_grad_cam": _guided_grad_cam,
    "deep_lift": _deep_lift,
    "lrp": partial(_simple, captum.LRP),
    "grad_cam": _grad_cam,
    "occlusion": _occlusion,
    "lime": partial(_surrogate, captum.Lime),
    "kernel_shap": partial(_surrogate, captum.KernelShap),
}
FIVE = (PATH, "gradient_shap", "saliency", "grad_cam", "guided_backprop")
CHUNKS = (5, 10, 25)  # rows a pass that are tried where there is a setting for them
CHUNKED = {*PATHS, SMOOTHED, "five methods"}
CHUNKED |= {"occlusion", "lime", "kernel_shap", WITHIN, REPEATED}
CAMS = {"grad_cam": GradCAM, "grad_cam_plus_plus": GradCAMPlusPlus, "layer_cam": LayerCAM}


def captum_run(work: str, subject: Subject, chunk: int | None) -> Run:
    """Return a run by Captum, with its default arguments or `chunk` rows a pass."""
    if work in SENSITIVITIES:
        attribute = CAPTUM[SENSITIVITIES[work]]
        return lambda: _sensitivity(attribute, subject, chunk)
    if work == WITHIN:
        attribute = _within(subject)
        return lambda: _attributed([attribute(subject, chunk)], subject, work)
    works = FIVE if work == "five methods" else (work,)
    return lambda: _attributed([CAPTUM[one](subject, chunk) for one in works], subject, work)


def _attributed(found: list[Tensor], subject: Subject, work: str) -> Outcome:
    maps = torch.stack([one.sum(1) for one in found], 1)  # [n, methods, H, W], as the engine's jobs are ordered
    error = None
    if work in (*PATHS, WITHIN, "gradient_shap", "deep_lift"):
        with torch.no_grad():
            ends = [subject.network(x)[range(len(x)), subject.targets] for x in (subject.images, subject.baselines)]
        risen = ends[0] - ends[1]
        error = float(((maps.sum((1, 2, 3)) - risen) / risen).abs().max())
    return Outcome(maps.flatten(0, 1).detach(), error=error)


def _sensitivity(attribute: Attribute, subject: Subject, chunk: int | None) -> Outcome:
    def explain(inputs: tuple[Tensor], target: list[int] | Tensor) -> tuple[Tensor]:
        repeated = Subject(subject.network, subject.classifier, inputs[0], target)
        return (attribute(repeated, chunk),)

    sensitivity_max(explain, (subject.images,), target=torch.tensor(subject.targets))
    return Outcome(None)


def grad_cam_run(work: str, subject: Subject, _chunk: int | None) -> Run:
    """Return a run by pytorch-grad-cam; it wants its hooks set once."""
    cam = CAMS[work](subject.network, [subject.layer])
    targets = [ClassifierOutputTarget(target) for target in subject.targets]
    return lambda: Outcome(torch.from_numpy(cam(subject.images.clone(), targets)))


def zennit_run(_work: str, subject: Subject, _chunk: int | None) -> Run:
    """Return a run by zennit's EpsilonPlus composite, its hooks set once."""
    residual = hasattr(subject.network, "layer4")
    composite = EpsilonPlus(canonizers=[ResNetCanonizer() if residual else SequentialMergeBatchNorm()])
    attributor = Gradient(subject.network, composite).__enter__()
    chosen = nn.functional.one_hot(torch.tensor(subject.targets), subject.classifier.classes).to(subject.images)

    def run() -> Outcome:
        output, relevance = attributor(subject.images, chosen)
        return Outcome(relevance.sum(1) * output.detach()[range(len(chosen)), subject.targets][:, None, None])

    return run
