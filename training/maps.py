"""The maps of images, by the engine that serves them."""

from collections.abc import Sequence

from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.serving.images import Picture
from torchserve_explain.serving.pictures import Map


def job_of(engine: Engine, picture: Picture, target: int, method: str) -> Job:
    """Return the job of a method's map of a picture's target."""
    classifier = engine.classifier
    return Job(METHODS[method](), Case(classifier, picture.input.to(classifier.device, classifier.dtype), target))


def explain(engine: Engine, jobs: Sequence[Job]) -> list[Map]:
    """Return the maps [H, W] of jobs; raises what the engine cannot explain."""
    return [finished.value.map.sum(0).float().cpu().numpy() for finished in engine.results(jobs)]
