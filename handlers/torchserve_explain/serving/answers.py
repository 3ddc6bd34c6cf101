"""Explanations become answers: JSON, PNG, NPY, HTML; each a body and its content type."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from torchserve_explain.attribution.computation import Outcome, Result
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Attribution
from torchserve_explain.attribution.methods.bisection import PathRule
from torchserve_explain.attribution.quality import Quality, QualityScore
from torchserve_explain.errors import ExplainError
from torchserve_explain.serving.capabilities import first_sentence
from torchserve_explain.serving.images import Picture
from torchserve_explain.serving.parameters import Parameters
from torchserve_explain.serving.pictures import (
    Cell,
    Map,
    Scale,
    compact,
    contact_sheet,
    draw_heatmap,
    draw_overlay,
    draw_scale,
    fitted,
    heatmap_png,
    png,
    small_png,
    with_scale,
)
from torchserve_explain.serving.regions import LARGEST, SMALLEST, Region, Whole

HERE = Path(__file__).parent
ROUND = ("evaluations", "completeness_error")  # of a path's refinement
FULL_COLOUR = 2_000_000  # pixels of a picture that is answered in all its colours
SHEET_SIDE = 512  # of a contact sheet's pictures, at most
# A page is what it says it is, stands in no frame of another site, and tells no other site where it is.
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}


@dataclass(frozen=True)
class Answer:
    """What goes back to a client, and the explanations that it tells of."""

    body: bytes
    content_type: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = "refused"  # or prediction, explanation, page
    explanations: Sequence["Explanation"] = ()
    audited: Sequence[Mapping[str, Any]] = ()  # audit records for the log
    seconds: float = 0.0  # since the request came


@dataclass(frozen=True)
class Class:
    """A class and what the model says of it for this image: its probability, or the value of a quantity.

    All classes but one together have no index, and a probability only where all of them have one.
    """

    index: int | None
    label: str
    probability: float | None
    value: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the contract's form of it."""
        numbers = {"index": self.index, "label": self.label, "probability": self.probability}
        return numbers if self.value is None else numbers | {"value": self.value}

    @property
    def measure(self) -> str:
        """Its probability or value in words, empty where it has neither."""
        if self.probability is not None:
            return f"{self.probability:.1%}"
        return "" if self.value is None else f"{self.value:.4g}"


@dataclass(frozen=True)
class Explanation:
    """One finished map of one request, ready to be reported and drawn."""

    job: Job
    explained: Result[Attribution]
    target: Class
    parameters: Parameters
    picture: Picture
    measured: dict[str, tuple[Quality, Outcome[QualityScore]]] = field(default_factory=dict)
    versus: Class | None = None
    sharing: int = 1  # pictures that share the room of the answer

    @property
    def question(self) -> str:
        """What is explained: a class, or one rather than another."""
        return self.target.label if self.versus is None else f"{self.target.label} rather than {self.versus.label}"

    @property
    def method(self) -> str:
        """The method's name."""
        return self.job.method.name

    @property
    def evaluations(self) -> int:
        """How many evaluations it took, those of its qualities among them."""
        measured = (outcome for _, outcome in self.measured.values() if isinstance(outcome, Result))
        return self.explained.evaluations + sum(outcome.evaluations for outcome in measured)

    @property
    def legend(self) -> str:
        """What the colours of its pictures say."""
        return self.drawn.scale.meaning(self.job.signed)

    @cached_property
    def values(self) -> Map:
        """The map [H, W], summed over channels."""
        return self.explained.value.map.sum(0).float().cpu().numpy()

    def used(self) -> dict[str, object]:
        """Return the parameters that made this map, as the method took them."""
        method = self.job.method
        own = {f.name: getattr(method, f.name) for f in fields(method)}
        if own.get("steps") is not None:
            own |= {"max_error": None, "max_map_error": None}
        if own.get("rule") is PathRule.RIEMANN:  # reported only where it is the other: a default answer stays as it was
            own.pop("rule")
        if "layer" in own:
            own["layer"] = self.job.case.classifier.grid_layer(str(own["layer"]))
        if (smoothing := self.job.smoothing) is not None:
            own |= {"smoothing": smoothing.kind, "samples": smoothing.samples, "stdev": smoothing.stdev}
        own |= {"score": self.job.case.score, "versus": self.job.case.versus, "seed": self.job.case.seed}
        return {key: value for key, value in own.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """Return the contract's form of the explanation."""
        attribution, drawn = self.explained.value, self.drawn
        entry: dict[str, Any] = {
            "method": self.method,
            "target": self.target.as_json() | {"score": self.job.case.known_score},
            "parameters": self.used(),
            "evaluations": self.explained.evaluations,
            "completeness_error": attribution.completeness_error,
            "baseline_score": attribution.baseline_score,
            "quality": {name: _value(outcome) for name, (_, outcome) in self.measured.items()},
            "heatmap": {
                "width": self.values.shape[1],
                "height": self.values.shape[0],
                "minimum": float(self.values.min()),
                "maximum": float(self.values.max()),
                "scale": drawn.scale.as_json(),
                "overlay_png": _base64(small_png(drawn.overlay)),
                "heatmap_png": _base64(heatmap_png(drawn.heatmap)),
            },
            "milliseconds": round(1000 * self.explained.seconds, 1),
        }
        if self.job.method.draws:
            entry["sampling_error"] = attribution.sampling_error
        if attribution.map_error is not None:
            entry["map_error"] = attribution.map_error
        if self.versus is not None:
            entry["versus"] = self.versus.as_json()
        if self.measured:
            entry["quality_details"] = {name: _details(*measured) for name, measured in self.measured.items()}
        if self.parameters.values:
            entry["values"] = _encoded(self.values)
            if attribution.refinement:
                entry["refinement"] = [dict(zip(ROUND, one, strict=True)) for one in attribution.refinement]
        return entry

    @cached_property
    def drawn(self) -> "Drawn":
        """The map's pictures."""
        asked = self.parameters
        if asked.region is Region.CROP:
            values, seen = fitted(self.values, self.picture.seen)
            scale = Scale.of(values, self.job.signed, asked.colormap, asked.clip, self.job.unit)
            return Drawn(scale, seen, draw_heatmap(values, scale), draw_overlay(values, scale, seen, asked.overlay))
        whole = Whole.of(self.picture, self.values, max(SMALLEST, LARGEST // self.sharing))
        scale = Scale.of(self.values, self.job.signed, asked.colormap, asked.clip, self.job.unit)
        heatmap = draw_heatmap(whole.values, scale)
        overlay = draw_overlay(whole.values, scale, whole.picture, asked.overlay)
        return Drawn(scale, *(whole.marked(one, one is not heatmap) for one in (whole.picture, heatmap, overlay)))


@dataclass(frozen=True)
class Drawn:
    """A map's pictures of one size, what the model saw among them, and the scale they share."""

    scale: Scale
    seen: Image.Image
    heatmap: Image.Image
    overlay: Image.Image


@dataclass(frozen=True)
class Report:
    """Everything that an answer to one image tells."""

    model: dict[str, str]
    predicted: Class
    top: Sequence[Class]
    picture: Picture
    explanations: Sequence[Explanation]
    audit: Mapping[str, Any] | None = None  # where it was asked for

    def as_json(self) -> dict[str, Any]:
        """Return the contract's JSON answer."""
        picture = self.picture
        body: dict[str, Any] = {
            "model": self.model,
            "predicted": self.predicted.as_json(),
            "image": {"width": picture.width, "height": picture.height, "crop": picture.crop},
            "explanations": [explanation.as_json() for explanation in self.explanations],
        }
        return body if self.audit is None else body | {"audit": self.audit}


def as_json(report: Report) -> Answer:
    """Answer the numbers and the pictures as JSON."""
    return json_answer(report.as_json())


def as_png(report: Report) -> Answer:
    """Answer the overlay with its scale, or a labelled contact sheet of several."""
    if len(report.explanations) == 1:
        drawn = report.explanations[0].drawn
        return Answer(_fit_png(with_scale(drawn.overlay, drawn.scale)), "image/png")
    predicted = report.predicted
    cells = [Cell(_on_sheet(report.explanations[0].drawn.seen), predicted.label, f"predicted, {predicted.measure}")]
    cells += [Cell(_on_sheet(e.drawn.overlay), e.method, describe(e), e.drawn.scale) for e in report.explanations]
    return Answer(_fit_png(contact_sheet(cells)), "image/png")


def _on_sheet(picture: Image.Image) -> Image.Image:
    """Return a picture reduced to what a contact sheet has room for."""
    ratio = SHEET_SIDE / max(picture.size)
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    return picture if ratio >= 1 else picture.resize((width, height), Image.Resampling.BICUBIC)


def _fit_png(picture: Image.Image) -> bytes:
    """Encode a picture in all its colours where that is small."""
    return png(picture) if picture.width * picture.height < FULL_COLOUR else small_png(picture)


def as_npy(report: Report) -> Answer:
    """Answer the maps as one float32 array [methods x targets, H, W] in NumPy's format."""
    stream = io.BytesIO()
    np.save(stream, np.stack([explanation.values for explanation in report.explanations]), allow_pickle=False)
    return Answer(stream.getvalue(), "application/x-npy")


def as_html(report: Report) -> Answer:
    """Answer one self-contained page for a person to read or print."""
    maps = [
        {
            "explanation": explanation,
            "overlay": _base64(small_png(explanation.drawn.overlay)),
            "heatmap": _base64(heatmap_png(explanation.drawn.heatmap)),
            "scale": _base64(png(draw_scale(explanation.drawn.scale, explanation.drawn.overlay.width))),
        }
        for explanation in report.explanations
    ]
    seen = _base64(small_png(report.explanations[0].drawn.seen))
    return html_answer(_templates().get_template("report.html").render(report=report, seen=seen, maps=maps))


RENDERERS: dict[str, Callable[[Report], Answer]] = {
    "json": as_json,
    "png": as_png,
    "npy": as_npy,
    "html": as_html,
}


def json_answer(content: object, status: int = 200) -> Answer:
    """Answer JSON; numbers that JSON has no word for are a fault of ours and raise ValueError."""
    return Answer(json.dumps(content, allow_nan=False).encode(), "application/json", status)


def html_answer(html: str) -> Answer:
    """Answer a page."""
    return Answer(html.encode(), "text/html; charset=utf-8", headers=PAGE_HEADERS)


def describe(explanation: Explanation) -> str:
    """Say in a few words what was explained, and with what error."""
    caption = f"{explanation.question}, {explanation.target.measure}"
    if (layer := explanation.used().get("layer")) is not None:
        caption += f", {layer}"
    found = explanation.explained.value
    errors = {"completeness": found.completeness_error, "sampling": found.sampling_error}
    return caption + "".join(f", {name} error {error:.1%}" for name, error in errors.items() if error is not None)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True)
    environment.filters |= {
        "exactly": _exactly,
        "describe": describe,
        "points": _points,
        "meaning": lambda one: first_sentence(type(one)),
    }
    return environment


def _exactly(one: Class) -> str:
    """Return a class's probability or value to four places, ready for more to follow."""
    pairs = (("probability", one.probability), ("value", one.value))
    return "".join(f"{name} {number:.4f}, " for name, number in pairs if number is not None)


def _points(curve: Sequence[float]) -> str:
    """Return a curve of values from 0 to 1 as the points of a line in a box of 100 by 50."""
    step = 100 / (len(curve) - 1)
    return " ".join(f"{place * step:.1f},{50 * (1 - value):.1f}" for place, value in enumerate(curve))


def _encoded(values: Map) -> dict[str, Any]:
    """Return the map's values for JSON."""
    stored = compact(values)
    return {"dtype": stored.dtype.name, "shape": list(stored.shape), "data": _base64(stored.tobytes())}


def _value(outcome: Outcome[QualityScore]) -> float | None:
    return None if isinstance(outcome, ExplainError) else outcome.value.value


def _details(quality: Quality, finished: Outcome[QualityScore]) -> dict[str, Any]:
    """Return what a quality was measured with, what it cost, its curve if it has one, or why it was not measured."""
    if isinstance(finished, ExplainError):
        return quality.settings() | {"reason": str(finished)}
    details = quality.settings() | {"evaluations": finished.evaluations, "milliseconds": round(1000 * finished.seconds, 1)}
    curve = finished.value.curve
    return details if curve is None else details | {"curve": [round(point, 4) for point in curve]}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
