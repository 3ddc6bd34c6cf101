"""An answer's JSON as types: what a client reads, and what the OpenAPI document tells; needs no torch.

A server that is newer than its client may tell more than stands here.
"""

import base64
import io
from functools import cached_property
from html import escape
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, RootModel

BOX = "display:inline-block;margin:0 1em 1em 0;vertical-align:top"


class AnswerPart(BaseModel):
    """A part of an answer: read-only."""

    model_config = ConfigDict(extra="allow", frozen=True)


class ServedModel(AnswerPart):
    """The model as it is registered."""

    name: str
    version: str


class ScoredClass(AnswerPart):
    """A class and the model's probability of it; a quantity has a value instead, several classes together no index."""

    index: int | None = Field(ge=0)
    label: str
    probability: float | None = Field(ge=0, le=1)
    value: float | None = Field(None, description="of a quantity")

    def __str__(self) -> str:
        if self.probability is not None:
            return f"{self.label} {self.probability:.1%}"
        return self.label if self.value is None else f"{self.label} {self.value:.4g}"


class ExplainedClass(ScoredClass):
    """The class that was explained, and its score: the logit, or the probability where that is explained."""

    score: float


class SeenImage(AnswerPart):
    """The image's size, and the part of it that the model saw."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    crop: list[float] = Field(min_length=4, max_length=4, description="left, top, right, bottom, in the image's pixels")


class ColorScale(AnswerPart):
    """The values that the first and the last colour of a colour map stand for."""

    colormap: str
    lowest: float = Field(alias="from")
    highest: float = Field(alias="to")
    unit: str | None = Field(None, description="logit, probability or value, of the score; null: no amount of it")


class HeatMap(AnswerPart):
    """The map's own size and range, and its pictures as base64 of PNG."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    minimum: float
    maximum: float
    scale: ColorScale
    overlay_png: str = Field(json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"})
    heatmap_png: str = Field(json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"})


class MapValues(AnswerPart):
    """A map's values: base64 of an array of a type and shape, in C order."""

    dtype: Literal["float16", "float32"]
    shape: list[int]
    data: str = Field(json_schema_extra={"contentEncoding": "base64"})


class Round(AnswerPart):
    """What a path's refinement has spent and reached after one of its rounds."""

    evaluations: int = Field(ge=0)
    completeness_error: float = Field(ge=0)


class ExplainedMap(AnswerPart):
    """One explanation: which pixels spoke for a class (positive) and which against it, by one method."""

    method: str
    target: ExplainedClass
    versus: ScoredClass | None = Field(None, description="what the target is explained rather than")
    parameters: dict[str, Any] = Field(description="what made this map, as the method took it")
    evaluations: int = Field(ge=0, description="rows that the model evaluated for it")
    completeness_error: float | None = Field(description="null where the method has no such axiom")
    map_error: float | None = Field(None, description="an estimate of the map's distance to the exact one, relative, l2")
    baseline_score: float | None
    sampling_error: float | None = Field(
        None, description="of methods that draw: how far the map varies from seed to seed, as a fraction of it"
    )
    quality: dict[str, float | None] = Field(description="null where it could not be measured")
    quality_details: dict[str, dict[str, Any]] = {}
    heatmap: HeatMap
    values: MapValues | None = Field(None, description="with values=true")
    refinement: list[Round] | None = Field(None, description="with values=true: of a path that was refined")
    milliseconds: float = Field(ge=0)

    @cached_property
    def array(self) -> NDArray[np.float32]:
        """The map [H, W], float32; raises ValueError where it was not asked for."""
        if self.values is None:
            raise ValueError("the answer holds no values; ask with values=True")
        stored = np.frombuffer(base64.b64decode(self.values.data), self.values.dtype)
        return stored.reshape(self.values.shape).astype(np.float32)

    @cached_property
    def overlay(self) -> Image.Image:
        """The map over the image."""
        return _picture(self.heatmap.overlay_png)

    @cached_property
    def picture(self) -> Image.Image:
        """The map alone."""
        return _picture(self.heatmap.heatmap_png)

    @property
    def question(self) -> str:
        """What is explained: a class, or one rather than another."""
        return str(self.target) if self.versus is None else f"{self.target} rather than {self.versus.label}"

    @property
    def numbers(self) -> dict[str, float]:
        """What the answer says of this map in numbers: its score, cost, errors and qualities, as far as it has them."""
        own = ("evaluations", "completeness_error", "map_error", "sampling_error")
        every = {"score": self.target.score} | {name: getattr(self, name) for name in own} | self.quality
        every |= {"milliseconds": self.milliseconds}
        return {name: value for name, value in every.items() if value is not None}

    def _repr_html_(self) -> str:
        numbers = "<br>".join(f"{escape(name)} {value:.4g}" for name, value in self.numbers.items())
        source, alt = (
            f"data:image/png;base64,{escape(self.heatmap.overlay_png)}",
            escape(f"{self.method} of {self.target.label}"),
        )
        return (
            f'<figure style="{BOX}"><img src="{source}" alt="{alt}"><figcaption><b>{escape(self.method)}</b><br>'
            f"{escape(self.question)}<br>{numbers}</figcaption></figure>"
        )


class ExplainedImage(AnswerPart):
    """An image, what the model sees in it, and why: a map for each method, target and layer."""

    model: ServedModel
    predicted: ScoredClass
    image: SeenImage
    explanations: list[ExplainedMap] = Field(min_length=1)
    audit: dict[str, Any] | None = Field(None, description="with audit=true: what made the maps, for replay")

    def _repr_html_(self) -> str:
        maps = "".join(one._repr_html_() for one in self.explanations)
        return f"<div><p><b>{escape(str(self.predicted))}</b> ({escape(self.model.name)})</p>{maps}</div>"


class Prediction(RootModel[dict[str, float]]):
    """The top classes: label to probability, highest first."""

    model_config = ConfigDict(frozen=True)

    @property
    def label(self) -> str:
        """The most probable class."""
        return next(iter(self.root))

    @property
    def probability(self) -> float:
        """The probability of that class."""
        return self.root[self.label]

    def _repr_html_(self) -> str:
        rows = (f"<tr><td>{escape(label)}</td><td>{probability:.1%}</td></tr>" for label, probability in self.root.items())
        return f"<table>{''.join(rows)}</table>"


class ErrorAnswer(AnswerPart):
    """What a request gets that cannot be answered; the message names the parameter, the value and what is allowed."""

    code: int
    type: str
    message: str


def _picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))
