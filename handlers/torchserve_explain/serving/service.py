"""The service: a request in, one computation of its answer out; it knows no server."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from threading import Lock
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Computation, Piece, Result, background, results, side_by_side
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case, Method
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.quality import Measurement
from torchserve_explain.attribution.rows import Contrast, Evaluation, Known, Rows, Score, Versus
from torchserve_explain.attribution.scores import resolved, score_of
from torchserve_explain.errors import ArchiveError, AttributionError, NotFinite, RequestError
from torchserve_explain.serving import audit
from torchserve_explain.serving.answers import RENDERERS, Answer, Class, Explanation, Report, json_answer
from torchserve_explain.serving.errors import bad_request, from_engine, over_limit, shown
from torchserve_explain.serving.images import Picture, read_picture
from torchserve_explain.serving.openapi import openapi_document
from torchserve_explain.serving.page import try_it_page
from torchserve_explain.serving.parameters import OUTPUTS, Labels, read_parameters
from torchserve_explain.serving.planning import Item, Planner, own_row, shortlist
from torchserve_explain.serving.requests import Instance, Protocol, Request, read_request
from torchserve_explain.serving.settings import Settings

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
RETRY_AFTER = 1  # seconds, after which a place may be free
QUALITY_SHARE = 0.9  # of a request's time; what is left draws the explanations, with or without the qualities


@dataclass(frozen=True)
class RawRequest:
    """One request as a server hands it over, and when it came, in the clock's seconds."""

    data: Mapping[str, Any]
    headers: Mapping[str, Any]
    id: str = ""
    arrived: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Seen:
    """An image as the model saw it: the row that was evaluated, the logits and what is reported of them, on the CPU."""

    picture: Picture
    known: Known
    logits: Tensor
    values: Tensor


class Service:
    """Answers requests for one classifier; raises ArchiveError where labels or settings do not fit it."""

    def __init__(
        self, classifier: Classifier, labels: Sequence[str], settings: Settings, model: Mapping[str, str], digest: str
    ) -> None:
        if labels and len(labels) != classifier.classes:
            raise ArchiveError(f"{len(labels)} labels for a classifier of {classifier.classes} classes")
        self.limits = settings.explanations.limits
        self.classifier = classifier
        self._labels = Labels(list(labels) or [str(index) for index in range(classifier.classes)])
        self._preprocessing = settings.preprocessing
        self._planner = Planner(classifier, self._labels, settings.explanations)
        self._model = dict(model)
        self._auditor = audit.Auditor(digest, model, classifier.device, classifier.arithmetic)
        self._logs_audit = settings.explanations.audit == "log"
        self._places = settings.explanation_places
        self.explaining = 0  # requests
        self.stage_seconds = {"decode": 0.0, "draw": 0.0}  # spent so far
        self._lock = Lock()  # several threads add to them

    @property
    def refused(self) -> Mapping[str, str]:
        """The methods that cannot serve the classifier, and why."""
        return self._planner.capabilities.refused

    @property
    def methods(self) -> Sequence[str]:
        """The methods that it serves."""
        return self._planner.capabilities.methods

    def warm_up(self, engine: Engine) -> Result[Any]:
        """Explain a blank image, so that the first client does not pay for what the first passes prepare."""
        blank = self.classifier.example[0]
        engine.logits([blank])
        return engine.results([Job(IntegratedGradients(max_error=1e-9), Case(self.classifier, blank, 0, budget=17))])[0]

    def deadline(self, raw: RawRequest) -> float:
        """Return when a request's time is over; it may ask for less."""
        return raw.arrived + self.limits.seconds

    def answer(self, raw: RawRequest) -> Computation[Answer]:
        """Answer one request; whatever goes wrong on the way becomes its answer, and nobody else's."""
        try:
            answer = yield from self._answer(raw)
            if len(answer.body) > self.limits.answer_bytes:
                raise over_limit(
                    f"the answer has {len(answer.body)} bytes; allowed: at most {self.limits.answer_bytes}: "
                    "ask for fewer methods, targets or values"
                )
            for record in answer.audited:
                audit.write(record)
        except Exception as error:
            answer = error_answer(error)
        return replace(answer, seconds=time.monotonic() - raw.arrived)

    def _answer(self, raw: RawRequest) -> Computation[Answer]:
        request = yield from background(read_request, raw.data, raw.headers, raw.id, self.limits.instances)
        if request.page:
            return replace((yield from background(self._opened, request, raw.headers)), kind="page")
        if not request.explain:
            predictions = yield from self._each(request, [self._predict(request, one) for one in request.instances])
            return replace(self._worded(request, predictions), kind="prediction")
        with self._place():
            return (yield from self._explanations(request, raw))

    def _explanations(self, request: Request, raw: RawRequest) -> Computation[Answer]:
        items = self._planner.items(request)
        reports = yield from self._each(request, [self._explain(item, raw.arrived) for item in items])
        return (yield from self._timed("draw", self._told, request, raw.id, items, reports))

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Hold one of the places that explanations have; raises RequestError 503 where all are taken."""
        if self._places is not None and self.explaining >= self._places:
            raise RequestError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self.explaining} explanations are in flight; allowed: at most {self._places} at once; try again",
                {"Retry-After": str(RETRY_AFTER)},
            )
        self.explaining += 1
        try:
            yield
        finally:
            self.explaining -= 1

    def _timed(self, stage: str, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> Computation[T]:
        """Run a function in the background, and add its seconds to a stage's."""

        def run() -> T:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                with self._lock:
                    self.stage_seconds[stage] += time.perf_counter() - began

        return background(run)

    def _each(self, request: Request, computations: Sequence[Computation[T]]) -> Computation[list[T]]:
        """Run a request's instances side by side; raises the first error met, which says whose it is."""

        def named(index: int, computation: Computation[T]) -> Computation[T]:
            with request.naming(index):
                return (yield from computation)

        finished = yield from results(Piece(named(*pair)) for pair in enumerate(computations))
        return [one.value for one in finished]

    def _predict(self, request: Request, instance: Instance) -> Computation[dict[str, float]]:
        """Return classes as TorchServe's image_classifier does: label to probability (or quantity), highest first."""
        if "method" in request.defaults:
            raise bad_request(f"path: {shown(request.defaults['method'])} is not allowed; methods belong to /explanations")
        wanted = shortlist(instance, self.classifier)
        seen = yield from self._look(instance.image)
        answer: dict[str, float] = {}
        for index, value in wanted.of(seen.values):
            label = self._labels.names[index]
            answer[f"{label} ({index})" if label in answer else label] = value  # no shared label hides a class
        return answer

    def _explain(self, item: Item, arrived: float) -> Computation[Report]:
        """Return the explanations of one image, each measured as it is asked for."""
        deadline = arrived + (item.parameters.timeout or self.limits.seconds)
        (report,) = yield from results([Piece(self._explained(item, deadline), item.least_rows(self.classifier))], deadline)
        return report.value

    def _explained(self, item: Item, deadline: float) -> Computation[Report]:
        target, wanted = item.targets[0], own_row(item, self.classifier)
        seen = yield from self._look(item.image, target, item.parameters.score, versus=item.versus, **wanted)
        predicted = int(seen.logits.argmax())
        targets = [predicted if target is None else target for target in item.targets]
        if item.versus in targets:  # known only now where the predicted class is explained
            raise self._labels.no_contrast(predicted)
        jobs = [Job(one, self._case(item, seen, target, one), item.smoothing) for one in item.methods for target in targets]
        now = time.monotonic()
        patience = now + QUALITY_SHARE * (deadline - now)
        pieces = [Piece(self._explanation(job, item, seen, patience), job.evaluations) for job in jobs]
        explanations = yield from results(pieces)
        top = seen.values.topk(min(5, len(self._labels.names))).indices.tolist()
        classes = [self._class(seen, index) for index in top]
        return Report(self._model, self._class(seen, predicted), classes, seen.picture, [one.value for one in explanations])

    def _explanation(self, job: Job, item: Item, seen: Seen, quality_deadline: float) -> Computation[Explanation]:
        """Return one map; a quality that cannot be measured takes no explanation with it."""
        (explained,) = yield from results([job])
        qualities = item.parameters.qualities()
        works = [Measurement(quality, job, explained.value) for quality in qualities.values()]
        outcomes = yield from side_by_side(works, quality_deadline)
        measured = {name: (qualities[name], outcome) for name, outcome in zip(qualities, outcomes, strict=True)}
        target, versus = self._class(seen, job.case.target), self._versus(seen, job.case)
        return Explanation(job, explained, target, item.parameters, seen.picture, measured, versus, item.sharing)

    def _look(
        self,
        image: bytes,
        target: int | None = None,
        score: Score = Score.LOGIT,
        gradient: bool = False,
        versus: Versus | None = None,
        **wanted: Any,
    ) -> Computation[Seen]:
        """Decode an image and let the model see it; raises NotFinite where the model has no answer.

        What methods want of the same row, the target's gradient or a layer, is taken from the same pass.
        """
        picture = yield from self._timed("decode", read_picture, image, self._preprocessing, self.limits.pixels)
        placed = picture.input.to(self.classifier.device, self.classifier.dtype)
        found: list[Evaluation] = []

        def look() -> Computation[None]:
            keep: Callable[[int, Evaluation], None] = lambda _start, evaluation: found.append(evaluation)  # noqa: E731
            yield [Rows(1, lambda *_: placed[None], keep, target, score, gradient, precise=True, versus=versus, **wanted)]

        (result,) = yield from results([Piece(look())])
        logits = found[0].logits[0].cpu()
        if not logits.isfinite().all():
            raise NotFinite("the model's logits are not finite numbers for this image")
        target = int(logits.argmax()) if target is None else target
        known = Known(found[0], placed, target, score, result.seconds, resolved(versus, logits, target))
        return Seen(picture, known, logits, self.classifier.head.values(logits))

    def _case(self, item: Item, seen: Seen, target: int, method: Method) -> Case:
        score, seed, versus = item.parameters.score, item.parameters.seed, resolved(item.versus, seen.logits, target)
        known_score = score_of(self.classifier.head, seen.logits, target, score, versus)
        budget = min(self.limits.most(method), method.evaluations(self.classifier) + item.spare)
        return Case(
            self.classifier, seen.known.input, target, score, known_score, seed, budget=budget, known=seen.known, versus=versus
        )

    def _class(self, seen: Seen, index: int) -> Class:
        label, value = self._labels.names[index], float(seen.values[index])
        return Class(index, label, None, value) if self.classifier.head is Head.NONE else Class(index, label, value)

    def _versus(self, seen: Seen, case: Case) -> Class | None:
        """Return what a case's target is compared with, all others as one class without an index."""
        if isinstance(case.versus, int):
            return self._class(seen, case.versus)
        alone = self.classifier.head is Head.SOFTMAX  # else the others have no probability in common
        rest = 1 - float(seen.values[case.target]) if alone else None
        return Class(None, "the rest", rest) if case.versus is Contrast.REST else None

    def _opened(self, request: Request, headers: Mapping[str, Any]) -> Answer:
        """Answer who asks about the archive: a program with what may be asked for, a person with the page that asks."""
        report = self._planner.report(self._model)
        for instance in request.instances:
            read_parameters(instance.fields)
        if request.output == "openapi":
            return replace(json_answer(openapi_document(report)), content_type=OUTPUTS["openapi"])
        if request.output == "json":
            return json_answer(report)
        return try_it_page(report, keyed="authorization" in map(str.lower, headers))

    def _told(self, request: Request, name: str, items: Sequence[Item], reports: Sequence[Report]) -> Answer:
        """Draw the explanations of the request with this name, and word them as its protocol and output ask."""
        reports, audited = self._audited(name, items, reports)
        if request.protocol is Protocol.PLAIN:
            answer = RENDERERS[items[0].parameters.output](reports[0])
            if (record := reports[0].audit) is not None:
                answer = replace(answer, body=audit.put_into(answer.body, answer.content_type, record))
        else:
            answer = self._worded(request, [report.as_json() for report in reports])
        explanations = [one for report in reports for one in report.explanations]
        return replace(answer, kind="explanation", explanations=explanations, audited=audited)

    def _audited(
        self, name: str, items: Sequence[Item], reports: Sequence[Report]
    ) -> tuple[list[Report], list[dict[str, Any]]]:
        """Return the reports with their audit records where those are asked for, and the records that go to the log."""
        audited: list[Report] = []
        logged: list[dict[str, Any]] = []
        for item, report in zip(items, reports, strict=True):
            if item.parameters.audit or self._logs_audit:
                record = self._auditor.record(item.image, report, name)
                report = replace(report, audit=record) if item.parameters.audit else report
                logged += [record] if self._logs_audit else []
            audited.append(report)
        return audited, logged

    def _worded(self, request: Request, values: Sequence[Mapping[str, Any]]) -> Answer:
        """Word JSON values as the request's protocol does."""
        name = "explanations" if request.explain else "predictions"
        if request.protocol is Protocol.PLAIN:
            return json_answer(values[0])
        if request.protocol is Protocol.KSERVE_V1:
            return json_answer({name: values})
        data = [json_answer(value).body.decode() for value in values]  # what a BYTES tensor holds is text
        output = {"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data}
        model = {"model_name": self._model["name"], "model_version": self._model["version"]}
        return json_answer({**model, "id": request.id, "outputs": [output]})


def error_answer(error: Exception) -> Answer:
    """Word an error; what is no fault of the client's is logged, and not answered in detail."""
    if isinstance(error, AttributionError):
        error = from_engine(error)
    elif isinstance(error, MemoryError):
        error = RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "out of memory; send a smaller image, or try again")
    elif not isinstance(error, RequestError):
        log.error("a request could not be answered", exc_info=error)
        error = RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, "the answer failed inside the server; its log says why")
    return replace(json_answer(error.body(), error.status.value), headers=error.headers)
