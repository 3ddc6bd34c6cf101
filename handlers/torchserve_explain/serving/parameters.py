"""What a client may ask for, what is allowed, and how it is read from forms, JSON, paths and archives."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.methods import METHODS, Method, Smoothing
from torchserve_explain.attribution.methods.smoothing import SmoothingKind
from torchserve_explain.attribution.quality import QUALITIES, Quality
from torchserve_explain.attribution.rows import Contrast, Score, Versus
from torchserve_explain.errors import RequestError
from torchserve_explain.serving.colormaps import COLORMAPS
from torchserve_explain.serving.errors import bad_request, shown
from torchserve_explain.serving.regions import Region

# Far beyond every limit, and short enough to be split and looked at item by item.
LONGEST_LIST, LONGEST_TEXT = 1000, 100_000
# What an answer may be, and the type that an Accept header asks for it by.
OUTPUTS = {
    "json": "application/json",
    "png": "image/png",
    "npy": "application/x-npy",
    "html": "text/html",
    "openapi": "application/vnd.oai.openapi+json",
}


def _listed(value: object) -> object:
    """Read a comma list or a JSON array as a tuple of its items; the items of an array are not split."""
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(","))
    return tuple(value) if isinstance(value, list) else (value,)


def _without_bool(value: object) -> object:
    """A JSON true is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("a boolean is not a number")
    return value


def _one_of(values: Iterable[str]) -> str:
    return "one of " + ", ".join(values)


Whole = Annotated[int, BeforeValidator(_without_bool)]
Number = Annotated[float, BeforeValidator(_without_bool), Field(allow_inf_nan=False)]
Target = Annotated[str | int, BeforeValidator(_without_bool)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
QualityName = Annotated[str, Field(pattern=f"^({'|'.join(QUALITIES)}|all)$")]


class Parameters(BaseModel):
    """An explanation's parameters: these, and the fields of every method, of which None leaves the choice to the method.

    A field's description says what is allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Names = Field(("integrated_gradients",), description="names of methods, or 'all'")
    # A label may hold a comma, so a string is split only when the classes are known.
    target: Target | Annotated[tuple[Target, ...], Field(min_length=1)] | None = Field(
        None, description="a class index, a label, or a list of them"
    )
    versus: Target | None = Field(
        None,
        description=f"another class than the target, by index or label, or {_one_of(Contrast)}",
        json_schema_extra={"also": list(Contrast)},
    )
    output: str = Field(
        "json",
        pattern=f"^({'|'.join(OUTPUTS)})$",
        description=_one_of(OUTPUTS),
        json_schema_extra={"enum": list(OUTPUTS)},
    )
    values: bool = Field(False, description="true or false")
    audit: bool = Field(False, description="true or false")
    smoothing: SmoothingKind | None = Field(None, description=_one_of(SmoothingKind))
    score: Score = Field(Score.LOGIT, description=_one_of(Score))
    layer: Names = Field(("last",), description="a module's dotted name, 'last', or a list of them")
    quality: Annotated[tuple[QualityName, ...], BeforeValidator(_listed)] = Field(
        (), description=f"one or more of {', '.join(QUALITIES)}, or 'all'", json_schema_extra={"enum": list(QUALITIES)}
    )
    timeout: Number | None = Field(None, gt=0, description="seconds above 0, at most the archive's limits.seconds")
    seed: Whole = Field(0, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    colormap: str | None = Field(
        None,
        pattern=f"^({'|'.join(COLORMAPS)})$",
        description=_one_of(COLORMAPS),
        json_schema_extra={"enum": list(COLORMAPS)},
    )
    overlay: Number = Field(0.5, ge=0, le=1, description="an opacity from 0 to 1")
    region: Region = Field(Region.CROP, description=_one_of(Region))
    clip: Number = Field(99, gt=0, le=100, description="a percentile above 0, at most 100")

    def methods(self, name: str) -> list[Method]:
        """Return the named method with these parameters: one, or one for each layer where it has a layer."""
        kind = METHODS[name]
        own = {f.name: getattr(self, f.name) for f in fields(kind)}
        chosen = {key: value for key, value in own.items() if value is not None}
        if (smoothing := self.smoother()) is not None:  # samples and stdev mean the same inside and outside
            chosen |= {key: getattr(smoothing, key) for key in own if key in ("samples", "stdev")}
        layers = chosen.pop("layer", None)
        return [kind(**chosen)] if layers is None else [kind(**chosen | {"layer": layer}) for layer in layers]

    def qualities(self) -> dict[str, Quality]:
        """Return the qualities asked for."""
        return {name: QUALITIES[name]() for name in (QUALITIES if "all" in self.quality else self.quality)}

    def smoother(self) -> Smoothing | None:
        """Return the smoothing asked for."""
        if self.smoothing is None:
            return None
        chosen = {name: value for name in ("samples", "stdev") if (value := getattr(self, name)) is not None}
        return Smoothing(self.smoothing, **chosen)


def _field(parameter: Any) -> tuple[Any, Any]:
    """Return the type and the pydantic field of a method's parameter, by its type and the range that it names."""
    if isinstance(parameter, type) and issubclass(parameter, StrEnum):
        return parameter | None, Field(None, description=_one_of(parameter))
    kind, allowed = get_args(parameter)
    bounds = {"ge": allowed.ge, "gt": allowed.gt, "le": allowed.le, "lt": allowed.lt}
    return (Number if float in (kind, *get_args(kind)) else Whole) | None, Field(None, description=allowed.words, **bounds)


def _of_methods() -> dict[str, Any]:
    """Return the fields of all methods, each name once."""
    found = {field.name: field.type for method in METHODS.values() for field in fields(method)}
    return {name: _field(kind) for name, kind in found.items() if name not in Parameters.model_fields}


_Complete = create_model("Parameters", __base__=Parameters, **_of_methods())
PARAMETERS = _Complete.model_fields


def read_parameters(*layers: Mapping[str, object]) -> Parameters:
    """Merge layers, weakest first, and check them; raises RequestError 400 naming parameter, value and what is allowed."""
    merged: dict[str, object] = {}
    for layer in layers:
        given = {key: value for key, value in layer.items() if value is not None}  # JSON null: not given
        if given.keys() & {"max_error", "max_map_error"}:
            merged.pop("steps", None)  # steps chosen by a weaker layer would silence it
        merged |= given
    for name, value in merged.items():
        if name not in PARAMETERS:
            raise bad_request(f"unknown parameter {shown(name)}; allowed: {', '.join(PARAMETERS)}")
        _check_length(name, value)
    try:
        return _Complete.model_validate(merged)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise bad_request(f"{name}: {shown(merged[name])} is not allowed; allowed: {PARAMETERS[name].description}") from None


def _check_length(name: str, value: object) -> None:
    """Raise RequestError 400 for a text or a list, as JSON or between commas, that is too long to be looked into."""
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise bad_request(f"{name}: a text of {len(value)} characters is not allowed; allowed: at most {LONGEST_TEXT}")
    items = value.count(",") + 1 if isinstance(value, str) else len(value) if isinstance(value, list) else 1
    if items > LONGEST_LIST:
        raise bad_request(f"{name}: a list of {items} items is not allowed; allowed: at most {LONGEST_LIST}")


class Capabilities:
    """Which methods serve a classifier, and why others do not; those that are not `offered` are none (None: all are)."""

    def __init__(self, classifier: Classifier, offered: tuple[str, ...] | None = None) -> None:
        self._head = classifier.head
        known = {name: method for name, method in METHODS.items() if offered is None or name in offered}
        self.refused = {name: why for name, method in known.items() if (why := _refusal(method, classifier))}
        self.methods = [name for name in known if name not in self.refused]

    def choose(self, names: Iterable[str], score: Score = Score.LOGIT, versus: Versus | None = None) -> list[str]:
        """Return the names, each once, with `all` spelt out: what serves the model and the score, alone or `versus` others.

        Raises RequestError 400 for a name that is unknown or cannot serve.
        """
        joins = score is Score.PROBABILITY or versus is Contrast.REST  # all classes, by a softmax or a log-sum-exp
        suited = [name for name in self.methods if METHODS[name].explains_probability or not joins]
        suited = [name for name in suited if METHODS[name].asks_for_class or versus is None]
        chosen: list[str] = []
        for name in dict.fromkeys(names):
            if name in self.refused:
                raise bad_request(f"method: {name} cannot serve this model: {self.refused[name]}")
            if name != "all" and name not in self.methods:
                what = "not served by this archive" if name in METHODS else "unknown"
                raise bad_request(f"method: {shown(name)} is {what}; allowed: {', '.join(self.methods)}, all")
            if name != "all" and name not in suited:
                if not METHODS[name].asks_for_class:
                    raise bad_request(f"versus: {name} explains no class, so not rather than another; allowed: without versus")
                if score is Score.PROBABILITY:
                    raise bad_request(f"score: {name} has no rule for the {self._head}; allowed: logit")
                raise bad_request(f"versus: {name} has no rule for a log-sum-exp; allowed: a class or runner_up")
            chosen += suited if name == "all" else [name]
        return list(dict.fromkeys(chosen))


def _refusal(method: type[Method], classifier: Classifier) -> str | None:
    if method.needs_gradient and not classifier.operations:
        return "no gradient leads from its logits to the image"
    return method.unsupported(classifier)


class Labels:
    """The classes' names; without labels a class is called by its index."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._indices: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            self._indices.setdefault(name, []).append(index)

    def targets(self, asked: tuple[str | int, ...] | str | int) -> list[int]:
        """Return the class indices asked for; raises RequestError 400 for one that does not exist or is shared."""
        if isinstance(asked, str) and asked not in self._indices:
            return [self._index(item.strip()) for item in asked.split(",")]
        return [self._index(item) for item in (asked if isinstance(asked, tuple) else (asked,))]

    def versus(self, asked: str | int, targets: Iterable[int | None] = ()) -> Versus:
        """Return what the targets are to be compared with; raises RequestError 400 where it is no class, or one of them."""
        if isinstance(asked, str) and asked in list(Contrast):
            return Contrast(asked)
        index = self._index(asked, "versus", f", or {' or '.join(Contrast)}")
        if index in targets:
            raise self.no_contrast(index)
        return index

    def no_contrast(self, index: int) -> RequestError:
        """A class cannot be compared with itself."""
        contrasts = " or ".join(Contrast)
        return bad_request(f"versus: {shown(self.names[index])} is the target itself; allowed: another class, {contrasts}")

    def _index(self, item: str | int, parameter: str = "target", also: str = "") -> int:
        allowed = f"an index from 0 to {len(self.names) - 1}, or a label{also}"
        if isinstance(item, int) or (item.isascii() and item.isdecimal() and len(item) < 20):
            if 0 <= int(item) < len(self.names):
                return int(item)
            raise bad_request(f"{parameter}: {shown(item)} is not a class; allowed: {allowed}")
        indices = self._indices.get(item, [])
        if len(indices) > 1:
            raise bad_request(f"{parameter}: the label {shown(item)} is shared by the classes {_few(indices)}; give an index")
        if not indices:
            raise bad_request(f"{parameter}: {shown(item)} is no label; allowed: {allowed}")
        return indices[0]


def _few(indices: list[int]) -> str:
    """List indices, the first twenty of many."""
    return ", ".join(map(str, indices[:20])) + (", ..." if len(indices) > 20 else "")
