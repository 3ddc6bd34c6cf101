"""A picture's maps: which are due, what each is a job of, and what a record tells of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from torchserve_explain.attribution.computation import Result
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Attribution
from torchserve_explain.errors import NotFinite
from torchserve_explain.gallery.pages import FAILED
from torchserve_explain.gallery.question import GallerySample, Question
from torchserve_explain.records import Record
from torchserve_explain.serving.answers import Class, Explanation
from torchserve_explain.serving.images import Picture


@dataclass(frozen=True)
class Due:
    """A picture, and the names of the maps that are not there yet."""

    sample: GallerySample
    digest: str
    picture: Picture
    names: Sequence[str]


@dataclass(frozen=True)
class Planned:
    """A map to be made of a picture with logits [classes]: its name, and the job."""

    due: Due
    logits: Tensor
    name: str
    job: Job


def plan(question: Question, due: Due, logits: Tensor) -> Iterator[Planned]:
    """Plan a picture's maps; raises NotFinite."""
    if not logits.isfinite().all():
        raise NotFinite("the model's logits are not finite numbers for this image")
    target, versus = question.classes(due.sample.label, logits)
    for name in due.names:
        yield Planned(due, logits, name, question.job(name, due.picture.input, target, versus, logits))


def facts(question: Question, one: Planned) -> Record:
    """Return what a record tells whatever came of the map."""
    archive, case, sample = question.archive, one.job.case, one.due.sample
    probabilities, predicted = archive.classifier.head.probabilities(one.logits), int(one.logits.argmax())
    own = archive.classes(sample.label)
    return {
        "path": sample.path,
        "digest": one.due.digest,
        "crop": list(one.due.picture.crop),
        "map": one.name,
        "settings": question.settings[one.name],
        "method": one.job.method.name,
        "label": sample.label,
        "predicted": archive.labels[predicted],
        "probability": float(probabilities[predicted]),
        "label_probability": float(probabilities[own].max()) if own else None,
        "correct": predicted in own if own else None,
        "target": archive.labels[case.target],
        "target_probability": float(probabilities[case.target]),
        "versus": archive.labels[case.versus] if isinstance(case.versus, int) else case.versus,
        FAILED: None,
    }


def explained(question: Question, one: Planned, result: Result[Attribution]) -> tuple[Record, Explanation]:
    """Return what a record tells of a finished map, and the map, ready to be drawn."""
    record, job = facts(question, one), one.job
    target = Class(job.case.target, record["target"], record["target_probability"])
    explanation = Explanation(job, result, target, question.parameters, one.due.picture)
    cost = {"evaluations": result.evaluations, "completeness_error": result.value.completeness_error}
    return record | {"parameters": explanation.used(), "signed": job.signed} | cost, explanation
