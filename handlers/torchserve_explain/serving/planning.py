"""What a request asks for becomes jobs, within what the archive allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case, Method
from torchserve_explain.attribution.rows import Score
from torchserve_explain.errors import Unsupported
from torchserve_explain.serving.capabilities import capability_report
from torchserve_explain.serving.errors import bad_request, over_limit, shown
from torchserve_explain.serving.images import Picture
from torchserve_explain.serving.parameters import Capabilities, Labels, Parameters, read_parameters
from torchserve_explain.serving.requests import Instance, Protocol, Request
from torchserve_explain.serving.settings import Explanations


@dataclass
class Prepared:
    """One image of a request, decoded, and then the model's `logits` and `probabilities` [classes] for it."""

    picture: Picture
    logits: Tensor = field(init=False)
    probabilities: Tensor = field(init=False)

    @property
    def predicted(self) -> int:
        """The index of the predicted class."""
        return int(self.logits.argmax())


@dataclass(frozen=True)
class Plan:
    """The jobs of one image, in the order of their explanations."""

    prepared: Prepared
    parameters: Parameters
    jobs: Sequence[Job]

    @property
    def times(self) -> int:
        """How often each job is run: once, and anew for the qualities that repeat it."""
        return 1 + sum(quality.repeats for quality in self.parameters.qualities().values())

    @property
    def quality_rows(self) -> int:
        """How many rows the qualities take beside."""
        return len(self.jobs) * sum(quality.rows() for quality in self.parameters.qualities().values())


class Planner:
    """Turns requests into jobs for one classifier."""

    def __init__(self, classifier: Classifier, labels: Labels, settings: Explanations) -> None:
        self.capabilities = Capabilities(classifier)
        self._classifier = classifier
        self._labels = labels
        self._defaults, self._limits = settings.defaults, settings.limits
        # Defaults that no request could use are told when the archive loads, not to clients.
        parameters = read_parameters(self._defaults)
        self._methods(parameters, self.capabilities.choose(parameters.method, parameters.score))
        labels.targets(parameters.target if parameters.target is not None else 0)

    def report(self, model: Mapping[str, str]) -> dict[str, Any]:
        """Return what clients may ask for, ready for JSON, and the arithmetic of rows without a gradient."""
        defaults, layers = read_parameters(self._defaults), list(self._classifier.spatial_layers)
        report = capability_report(model, self.capabilities, defaults, self._labels, layers)
        narrow = self._classifier.narrow or torch.float32
        return report | {"arithmetic": str(narrow).removeprefix("torch.")}

    def plan(self, request: Request, images: Sequence[Prepared]) -> list[Plan]:
        """Return a plan for each image; raises RequestError where a request asks for what is not there or not allowed."""
        plans: list[Plan] = []
        for place, (instance, prepared) in enumerate(zip(request.instances, images, strict=True)):
            with request.naming(place):
                plans.append(self._plan_one(request, instance, prepared))
        return self._within_budget(plans)

    def _plan_one(self, request: Request, instance: Instance, prepared: Prepared) -> Plan:
        defaults = self._defaults if request.protocol is Protocol.PLAIN else self._defaults | {"output": "json"}
        parameters = read_parameters(defaults, request.defaults, instance.fields)
        if request.protocol is not Protocol.PLAIN and parameters.output != "json":
            raise bad_request(f"output: {shown(parameters.output)} is not for the KServe protocols; allowed: json")
        names = self.capabilities.choose(parameters.method, parameters.score)
        targets = [prepared.predicted] if parameters.target is None else self._labels.targets(parameters.target)
        for what, asked, allowed in (
            ("methods", len(names), self._limits.methods),
            ("targets", len(targets), self._limits.targets),
            ("layers", len(parameters.layer), self._limits.layers),
        ):
            if asked > allowed:
                raise over_limit(f"{asked} {what} asked for; allowed: at most {allowed}")
        methods = self._methods(parameters, names)
        cases = [self._case(parameters, prepared, target) for target in targets]
        return Plan(prepared, parameters, [Job(m, case, parameters.smoother()) for m in methods for case in cases])

    def _methods(self, parameters: Parameters, names: Sequence[str]) -> list[Method]:
        return [self._checked(method) for name in names for method in parameters.methods(name)]

    def _checked(self, method: Method) -> Method:
        """Return the method if the layer it names exists; raises RequestError 400."""
        layer = getattr(method, "layer", None)
        if layer is not None:
            try:
                self._classifier.grid_layer(layer)
            except Unsupported as reason:
                raise bad_request(f"layer: {shown(layer)} is not allowed: {reason}") from None
        return method

    def _case(self, parameters: Parameters, prepared: Prepared, target: int) -> Case:
        scores = prepared.logits if parameters.score is Score.LOGIT else prepared.probabilities
        image = prepared.picture.input.to(self._classifier.device, self._classifier.dtype)
        return Case(self._classifier, image, target, parameters.score, float(scores[target]), parameters.seed)

    def _within_budget(self, plans: list[Plan]) -> list[Plan]:
        """Refuse what costs more than a request may; what the fixed rows leave is shared by the adaptive paths."""
        jobs = [(job, plan.times) for plan in plans for job in plan.jobs]
        if len(jobs) > self._limits.explanations:
            raise over_limit(f"{len(jobs)} explanations asked for; allowed: at most {self._limits.explanations} a request")
        extra, limit = sum(plan.quality_rows for plan in plans), self._limits.evaluations
        least = extra + sum(times * job.evaluations for job, times in jobs)
        if least > limit:
            raise over_limit(f"{least} evaluations asked for; allowed: at most {limit} a request")
        fixed = extra + sum(times * job.evaluations for job, times in jobs if not job.method.adaptive)
        paths = sum(times * job.copies for job, times in jobs if job.method.adaptive)
        budget = min(self._limits.path_evaluations, (limit - fixed) // max(1, paths))

        def budgeted(job: Job) -> Job:
            return replace(job, case=replace(job.case, budget=budget))

        return [replace(plan, jobs=[budgeted(job) for job in plan.jobs]) for plan in plans]


def top_k(instance: Instance, classes: int) -> int:
    """Return how many classes a prediction tells, 5 unless asked otherwise; raises RequestError 400."""
    for name in instance.fields:
        if name != "top_k":
            raise bad_request(f"unknown parameter {shown(name)}; allowed for predictions: data, top_k")
    value = instance.fields.get("top_k")
    if value is None:
        return min(5, classes)
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal() and len(text) < 10) or not 1 <= int(text) <= classes:
        raise bad_request(f"top_k: {shown(value)} is not allowed; allowed: a whole number from 1 to {classes}")
    return int(text)
