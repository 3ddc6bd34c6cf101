"""A picture's maps: which are due, what each is a job of, and what a record tells of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from torchserve_explain.attribution.computation import Result
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Attribution
from torchserve_explain.errors import NotFinite
from torchserve_explain.gallery.pages import FAILED
from torchserve_explain.gallery.question import PREDICTED, GallerySample, Question
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
    """Plan a picture's maps; of several classes that share its label the likeliest is explained. Raises NotFinite."""
    if not logits.isfinite().all():
        raise NotFinite("the model's logits are not finite numbers for this image")
    classes = [int(logits.argmax())] if question.target == PREDICTED else question.archive.classes(due.sample.label)
    target = max(classes, key=lambda index: float(logits[index]))
    for name in due.names:
        yield Planned(due, logits, name, question.job(name, due.picture.input, target, logits))


def facts(question: Question, one: Planned) -> Record:
    """Return what a record tells whatever came of the map."""
    probabilities, predicted, sample = one.logits.softmax(0), int(one.logits.argmax()), one.due.sample
    archive, target = question.archive, one.job.case.target
    own = archive.classes(sample.label)
    return {
        "path": sample.path,
        "digest": one.due.digest,
        "map": one.name,
        "settings": question.settings[one.name],
        "method": one.job.method.name,
        "label": sample.label,
        "predicted": archive.labels[predicted],
        "probability": float(probabilities[predicted]),
        "label_probability": float(probabilities[own].max()) if own else None,
        "correct": predicted in own if own else None,
        "target": archive.labels[target],
        "target_probability": float(probabilities[target]),
        FAILED: None,
    }


def explained(question: Question, one: Planned, result: Result[Attribution]) -> tuple[Record, Explanation]:
    """Return what a record tells of a finished map, and the map, ready to be drawn."""
    record, job = facts(question, one), one.job
    target = Class(job.case.target, record["target"], record["target_probability"])
    explanation = Explanation(job, result, target, question.parameters, one.due.picture)
    cost = {"evaluations": result.evaluations, "completeness_error": result.value.completeness_error}
    return record | {"parameters": explanation.used(), "signed": job.signed} | cost, explanation
