"""The service: a batch of requests in, one answer for each out; a request that fails fails alone."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Result
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Attribution, Case
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.quality import Measurement
from torchserve_explain.errors import AttributionError, NotFinite, RequestError
from torchserve_explain.serving.answers import RENDERERS, Answer, Class, Explanation, Told, json_answer
from torchserve_explain.serving.errors import bad_request, from_engine, over_limit, shown
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.page import try_it_page
from torchserve_explain.serving.parameters import Labels
from torchserve_explain.serving.planning import Plan, Planner, Prepared, top_k
from torchserve_explain.serving.requests import Instance, Protocol, Request, read_request
from torchserve_explain.serving.settings import Settings

log = logging.getLogger(__name__)
LATEST = 0.75  # of responseTimeout, when the last answer of a batch may begin to be drawn


@dataclass(frozen=True)
class Row:
    """One request as TorchServe hands it over."""

    data: Mapping[str, Any]
    headers: Mapping[str, Any]
    id: str = ""


@dataclass
class Exchange:
    """A request on its way through the batch; once it has failed, the steps that follow pass it by."""

    row: Row
    request: Request = field(init=False)
    images: list[Prepared] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    explanations: list[list[Explanation]] = field(default_factory=list)
    finished: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The answer, once the batch is through."""
        assert self.finished is not None
        return self.finished

    def attempt(self, step: Callable[["Exchange"], None]) -> None:
        """Take a step; whatever it raises becomes this request's answer, and nobody else's."""
        if self.finished is not None:
            return
        try:
            step(self)
        except RequestError as error:
            self.fail(error)
        except AttributionError as error:
            self.fail(from_engine(error))
        except MemoryError:
            self.fail(RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "out of memory; send a smaller image, or try again"))
        except Exception:
            log.exception("a request could not be answered")
            self.fail(RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, "the answer failed inside the server; its log says why"))

    def fail(self, error: RequestError) -> None:
        """Answer the error."""
        self.finished = json_answer(error.body(), error.status.value)


class Service:
    """Answers requests for one classifier; raises ValueError where labels or settings do not fit it."""

    def __init__(self, classifier: Classifier, labels: Sequence[str], settings: Settings, model: Mapping[str, str]) -> None:
        if labels and len(labels) != classifier.classes:
            raise ValueError(f"{len(labels)} labels for a classifier of {classifier.classes} classes")
        self._labels = Labels(list(labels) or [str(index) for index in range(classifier.classes)])
        self._preprocessing = settings.preprocessing
        self._limits, self._timeout = settings.explanations.limits, settings.responseTimeout
        self._began = 0.0
        self._planner = Planner(classifier, self._labels, settings.explanations)
        self._engine = Engine(classifier, self._limits.pack)
        self._model = dict(model)

    @property
    def refused(self) -> Mapping[str, str]:
        """The methods that cannot serve the classifier, and why."""
        return self._planner.capabilities.refused

    def warm_up(self) -> Result[Attribution] | AttributionError:
        """Explain a blank image, so that the first client does not pay for what the first passes prepare."""
        classifier = self._engine.classifier
        self._engine.logits([classifier.example[0]])
        case = Case(classifier, classifier.example[0], 0, budget=17)
        return self._engine.run([Job(IntegratedGradients(max_error=1e-9), case)])[0]

    def answer(self, rows: Sequence[Row]) -> list[Exchange]:
        """Answer each request as if it had come alone."""
        self._began = time.monotonic()
        exchanges = [Exchange(row) for row in rows]
        for exchange in exchanges:
            exchange.attempt(self._read)
        self._evaluate([exchange for exchange in exchanges if exchange.finished is None])
        for exchange in exchanges:
            exchange.attempt(self._plan)
        self._explain(exchanges, self._began + self._limits.seconds)
        self._measure(exchanges, self._began + self._limits.seconds)
        for exchange in exchanges:
            exchange.attempt(self._respond)
        return exchanges

    def _read(self, exchange: Exchange) -> None:
        """Read the request and decode its images."""
        row = exchange.row
        exchange.request = request = read_request(row.data, row.headers, row.id)
        if len(request.instances) > self._limits.instances:
            raise over_limit(f"{len(request.instances)} instances asked for; allowed: at most {self._limits.instances}")
        for place, instance in enumerate(request.instances):
            self._check_time(self._limits.seconds)
            with request.naming(place):
                picture = read_picture(instance.image, self._preprocessing, self._limits.pixels)
            exchange.images.append(Prepared(picture))

    def _evaluate(self, exchanges: Sequence[Exchange]) -> None:
        """Let the model see the images of all requests together."""
        images = [image for exchange in exchanges for image in exchange.images]
        if not images:
            return
        try:
            for image, logits in zip(images, self._engine.logits([image.picture.input for image in images]), strict=True):
                image.logits, image.probabilities = logits, logits.softmax(0)
        except AttributionError as error:
            for exchange in exchanges:
                exchange.fail(from_engine(error))

    def _plan(self, exchange: Exchange) -> None:
        """Check that the model has an answer, and turn an explaining request into jobs."""
        if not all(image.logits.isfinite().all() for image in exchange.images):
            raise NotFinite("the model's logits are not finite numbers for this image")
        if exchange.request.explain:
            exchange.plans = self._planner.plan(exchange.request, exchange.images)

    def _explain(self, exchanges: Sequence[Exchange], deadline: float) -> None:
        """Run the jobs of all requests together."""
        planned = [(exchange, plan) for exchange in exchanges if exchange.finished is None for plan in exchange.plans]
        outcomes = iter(self._engine.run([job for _, plan in planned for job in plan.jobs], deadline))
        for exchange, plan in planned:
            found = [next(outcomes) for _ in plan.jobs]
            exchange.attempt(lambda exchange, plan=plan, found=found: self._collect(exchange, plan, found))  # type: ignore[misc]

    def _measure(self, exchanges: Sequence[Exchange], deadline: float) -> None:
        """Measure the qualities that requests ask for, again together; one that cannot be takes no explanation with it."""
        asked = [
            (explanation, name, Measurement(quality, explanation.job, explanation.explained.value))
            for exchange in exchanges
            if exchange.finished is None
            for explanation in (explanation for image in exchange.explanations for explanation in image)
            for name, quality in explanation.parameters.qualities().items()
        ]
        outcomes = self._engine.run([measurement for *_, measurement in asked], deadline)
        for (explanation, name, measurement), outcome in zip(asked, outcomes, strict=True):
            explanation.measured[name] = (measurement.quality, outcome)

    def _collect(self, exchange: Exchange, plan: Plan, found: Sequence[Result[Attribution] | AttributionError]) -> None:
        explanations: list[Explanation] = []
        for job, outcome in zip(plan.jobs, found, strict=True):
            if isinstance(outcome, AttributionError):
                raise outcome
            target = self._class(plan.prepared, job.case.target)
            explanations.append(Explanation(job, outcome, target, plan.parameters, plan.prepared.picture))
        exchange.explanations.append(explanations)

    def _respond(self, exchange: Exchange) -> None:
        """Word the answer as the request's protocol and output ask."""
        request = exchange.request
        self._check_time(LATEST * self._timeout)
        if request.page:
            exchange.finished = self._opened(exchange)
        elif not request.explain:
            pairs = zip(request.instances, exchange.images, strict=True)
            predictions = [self._predictions(request, *pair) for pair in pairs]
            exchange.finished = self._within_size(self._worded(request, predictions))
        else:
            told = [self._told(*pair) for pair in zip(exchange.images, exchange.explanations, strict=True)]
            if request.protocol is Protocol.PLAIN:
                answer = RENDERERS[exchange.plans[0].parameters.output](told[0])
            else:
                answer = self._worded(request, [one.as_json() for one in told])
            exchange.finished = self._within_size(answer)

    def _opened(self, exchange: Exchange) -> Answer:
        """Answer who sent nothing: a program with what may be asked for, a person with the page that asks."""
        report = self._planner.report(self._model)
        if exchange.request.defaults.get("output") == "json":
            return json_answer(report)
        return try_it_page(report, keyed="authorization" in map(str.lower, exchange.row.headers))

    def _check_time(self, seconds: float) -> None:
        """Raise 504 where the batch has taken longer than that: at responseTimeout TorchServe kills the worker."""
        if time.monotonic() - self._began > seconds:
            raise RequestError(HTTPStatus.GATEWAY_TIMEOUT, "the batch that the request was in has taken too long")

    def _predictions(self, request: Request, instance: Instance, image: Prepared) -> dict[str, float]:
        """Return the top classes as TorchServe's image_classifier does: label to probability, highest first."""
        if "method" in request.defaults:
            raise bad_request(f"path: {shown(request.defaults['method'])} is not allowed; methods belong to /explanations")
        top = image.probabilities.topk(top_k(instance, len(self._labels.names)))
        answer: dict[str, float] = {}
        for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            label = self._labels.names[index]
            answer[f"{label} ({index})" if label in answer else label] = probability  # no shared label hides a class
        return answer

    def _told(self, image: Prepared, explanations: Sequence[Explanation]) -> Told:
        top = image.probabilities.topk(min(5, len(self._labels.names))).indices.tolist()
        return Told(
            self._model,
            self._class(image, image.predicted),
            [self._class(image, index) for index in top],
            image.picture,
            explanations,
        )

    def _class(self, image: Prepared, index: int) -> Class:
        return Class(index, self._labels.names[index], float(image.probabilities[index]))

    def _worded(self, request: Request, results: Sequence[Mapping[str, Any]]) -> Answer:
        """Word JSON results as the request's protocol does."""
        name = "explanations" if request.explain else "predictions"
        if request.protocol is Protocol.PLAIN:
            return json_answer(results[0])
        if request.protocol is Protocol.KSERVE_V1:
            return json_answer({name: results})
        data = [json_answer(result).body.decode() for result in results]  # what a BYTES tensor holds is text
        output = {"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data}
        model = {"model_name": self._model["name"], "model_version": self._model["version"]}
        return json_answer({**model, "id": request.id, "outputs": [output]})

    def _within_size(self, answer: Answer) -> Answer:
        if len(answer.body) > self._limits.answer_bytes:
            raise over_limit(
                f"the answer has {len(answer.body)} bytes; allowed: at most {self._limits.answer_bytes}: "
                "ask for fewer methods, targets or values"
            )
        return answer
