"""What a request asks for, within what the archive allows, before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.methods import Method, Smoothing
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.method import OwnRow
from torchserve_explain.attribution.rows import Contrast, Score, Versus
from torchserve_explain.errors import Unsupported
from torchserve_explain.serving.answers import RENDERERS
from torchserve_explain.serving.capabilities import capability_report
from torchserve_explain.serving.errors import bad_request, over_limit, shown
from torchserve_explain.serving.parameters import Capabilities, Labels, Parameters, read_parameters
from torchserve_explain.serving.requests import Instance, Protocol, Request
from torchserve_explain.serving.settings import Explanations


@dataclass(frozen=True)
class Item:
    """What is to be explained of one image: every method for every target (None: the predicted class), alone or `versus`.

    `spare` is how many rows a method may take beside its least that decides for itself.
    """

    image: bytes
    parameters: Parameters
    methods: Sequence[Method]
    targets: Sequence[int | None]
    smoothing: Smoothing | None
    versus: Versus | None = None
    spare: int = 0
    sharing: int = 1  # pictures that share the room of the answer

    @property
    def maps(self) -> int:
        """How many explanations it asks for."""
        return len(self.methods) * len(self.targets)

    @property
    def copies(self) -> int:
        """How often each method is run for a map: for every noisy copy, and all that anew for qualities that repeat it."""
        repeats = sum(quality.repeats for quality in self.parameters.qualities().values())
        return (1 + repeats) * (1 if self.smoothing is None else self.smoothing.samples)

    def least_rows(self, classifier: Classifier) -> int:
        """Return how many rows its methods take at least."""
        return self.copies * len(self.targets) * sum(method.evaluations(classifier) for method in self.methods)

    @property
    def quality_rows(self) -> int:
        """How many rows the qualities take beside repeated explanations."""
        return self.maps * sum(quality.rows() for quality in self.parameters.qualities().values())

    @property
    def adaptive_runs(self) -> int:
        """How often an adaptive method is run."""
        return self.copies * len(self.targets) * sum(method.adaptive for method in self.methods)


class Planner:
    """Turns requests into items for one classifier."""

    def __init__(self, classifier: Classifier, labels: Labels, settings: Explanations) -> None:
        self.capabilities = Capabilities(classifier, settings.methods)
        self._classifier = classifier
        self._labels = labels
        self._defaults, self._limits = settings.defaults, settings.limits
        # Defaults that no request could use are reported when the archive loads, not to clients.
        parameters = read_parameters(self._defaults)
        names, _, _ = self._asked(parameters)
        self._methods(parameters, names)
        self._check_timeout(parameters)
        if parameters.output == "openapi":
            raise bad_request(f"output: openapi is no default; allowed: {', '.join(RENDERERS)}")

    def report(self, model: Mapping[str, str]) -> dict[str, Any]:
        """Return what clients may ask for, ready for JSON, and what computes it: arithmetic and runtimes."""
        defaults, layers = read_parameters(self._defaults), list(self._classifier.spatial_layers)
        report = capability_report(model, self.capabilities, defaults, self._labels, layers)
        report["parameters"]["timeout"]["maximum"] = self._limits.seconds
        report["head"] = self._classifier.head
        report["parameters"]["baseline"]["allowed"] = [one for one in Baseline if one.serves(self._classifier)]
        if self._classifier.head is Head.NONE:  # what _check_head refuses is not offered
            report["parameters"]["score"]["allowed"] = [Score.LOGIT.value]
            report["parameters"]["versus"]["also"] = [Contrast.RUNNER_UP.value]
        if self._classifier.classes == 1:
            del report["parameters"]["versus"]
        return report | {"arithmetic": self._classifier.arithmetic, "runtimes": self._classifier.runtimes}

    def items(self, request: Request) -> list[Item]:
        """Return what is to be explained of each image; raises RequestError for what is not there or not allowed."""
        items: list[Item] = []
        for index, instance in enumerate(request.instances):
            with request.naming(index):
                items.append(self._item(request, instance))
        return self._within_budget(items)

    def _item(self, request: Request, instance: Instance) -> Item:
        defaults = self._defaults if request.protocol is Protocol.PLAIN else self._defaults | {"output": "json"}
        parameters = read_parameters(defaults, request.defaults, instance.fields)
        if request.protocol is not Protocol.PLAIN and parameters.output != "json":
            raise bad_request(f"output: {shown(parameters.output)} is not for the KServe protocols; allowed: json")
        self._check_timeout(parameters)
        names, targets, versus = self._asked(parameters)
        for what, asked, allowed in (
            ("methods", len(names), self._limits.methods),
            ("targets", len(targets), self._limits.targets),
            ("layers", len(parameters.layer), self._limits.layers),
        ):
            if asked > allowed:
                raise over_limit(f"{asked} {what} asked for; allowed: at most {allowed}")
        return Item(instance.image, parameters, self._methods(parameters, names), targets, parameters.smoother(), versus)

    def _asked(self, parameters: Parameters) -> tuple[list[str], list[int | None], Versus | None]:
        """Return the methods, the targets, and what they are compared with; raises RequestError 400."""
        targets: list[int | None] = [None]
        if parameters.target is not None:
            targets = [*self._labels.targets(parameters.target)]
        versus = None if parameters.versus is None else self._labels.versus(parameters.versus, targets)
        self._check_head(parameters.score, versus)
        return self.capabilities.choose(parameters.method, parameters.score, versus), targets, versus

    def _check_head(self, score: Score, versus: Versus | None) -> None:
        """Raise RequestError 400 for a score that the classifier's head does not have."""
        if self._classifier.head is Head.NONE and score is Score.PROBABILITY:
            raise bad_request(
                "score: probability is not allowed: the model answers quantities; allowed: logit, the quantity itself"
            )
        if self._classifier.head is Head.NONE and versus is Contrast.REST:
            raise bad_request("versus: rest is not allowed: the model answers quantities; allowed: a class or runner_up")
        if self._classifier.classes == 1 and versus is not None:
            raise bad_request("versus: the model answers one quantity; allowed: none to compare it with")

    def _check_timeout(self, parameters: Parameters) -> None:
        if parameters.timeout is not None and parameters.timeout > self._limits.seconds:
            allowed = f"a number of seconds above 0, at most the archive's {self._limits.seconds:g}"
            raise bad_request(f"timeout: {parameters.timeout:g} is not allowed; allowed: {allowed}")

    def _methods(self, parameters: Parameters, names: Sequence[str]) -> list[Method]:
        return [self._checked(method) for name in names for method in parameters.methods(name)]

    def _checked(self, method: Method) -> Method:
        """Return the method if the layer or the baseline that it names exists; raises RequestError 400."""
        layer, baseline = (getattr(method, name, None) for name in ("layer", "baseline"))
        if layer is not None:
            try:
                self._classifier.grid_layer(layer)
            except Unsupported as reason:
                raise bad_request(f"layer: {shown(layer)} is not allowed: {reason}") from None
        if baseline is not None:
            try:
                baseline.size(self._classifier)
            except Unsupported as reason:
                raise bad_request(str(reason)) from None
        return method

    def _within_budget(self, items: list[Item]) -> list[Item]:
        """Refuse what costs more than a request may; what is left is shared by the methods that decide for themselves."""
        maps = sum(item.maps for item in items)
        if maps > self._limits.explanations:
            raise over_limit(f"{maps} explanations asked for; allowed: at most {self._limits.explanations} a request")
        limit = self._limits.evaluations
        least = sum(item.quality_rows + item.least_rows(self._classifier) for item in items)
        if least > limit:
            raise over_limit(f"{least} evaluations asked for; allowed: at most {limit} a request")
        spare = (limit - least) // max(1, sum(item.adaptive_runs for item in items))
        # A page shows what the model saw, too.
        return [replace(item, spare=spare, sharing=maps + (item.parameters.output == "html")) for item in items]


def own_row(item: Item, classifier: Classifier) -> dict[str, Any]:
    """Return what an item's methods want of the image's own row; see Rows."""
    methods = [] if item.smoothing is not None else item.methods

    def layers(kind: OwnRow) -> tuple[str, ...]:
        named = (getattr(method, "layer", "") for method in methods if method.own_row is kind)
        return tuple(sorted(set(map(classifier.grid_layer, named))))

    gradient = any(method.own_row is OwnRow.GRADIENT for method in methods)
    return {"gradient": gradient, "layers": layers(OwnRow.LAYER), "activations": layers(OwnRow.ACTIVATION)}


@dataclass(frozen=True)
class Shortlist:
    """Which classes a prediction tells: at most `count`, and only those whose value lies above `threshold`."""

    count: int
    threshold: float | None = None

    def of(self, values: Tensor) -> list[tuple[int, float]]:
        """Return the classes [classes] that it tells and their values, highest first."""
        top = values.topk(self.count)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [(index, value) for index, value in pairs if self.threshold is None or value > self.threshold]


def shortlist(instance: Instance, classifier: Classifier) -> Shortlist:
    """Return which classes a prediction tells: 5, those above `threshold`, or all quantities; raises RequestError 400."""
    head, classes = classifier.head, classifier.classes
    allowed = ("data", "top_k", "threshold") if head is Head.SIGMOID else ("data", "top_k")
    for name in instance.fields:
        if name == "threshold" and name not in allowed:
            raise bad_request(f"threshold: this classifier's head is {head}, and it is for sigmoid; allowed: top_k")
        if name not in ("top_k", "threshold"):
            raise bad_request(f"unknown parameter {shown(name)}; allowed for predictions: {', '.join(allowed)}")
    threshold = _threshold(instance.fields.get("threshold"))
    value = instance.fields.get("top_k")
    if value is None:
        return Shortlist(min(5, classes) if threshold is None and head is not Head.NONE else classes, threshold)
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal() and len(text) < 10) or not 1 <= int(text) <= classes:
        raise bad_request(f"top_k: {shown(value)} is not allowed; allowed: a whole number from 1 to {classes}")
    return Shortlist(int(text), threshold)


def _threshold(value: object) -> float | None:
    """Read a threshold, None where there is none; raises RequestError 400."""
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else nan
    except (ValueError, OverflowError):
        number = nan
    if not 0 <= number <= 1:
        raise bad_request(f"threshold: {shown(value)} is not allowed; allowed: a number from 0 to 1")
    return number
