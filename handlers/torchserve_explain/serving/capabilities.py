"""What an archive can be asked for, as data: the page builds its fields from it, and programs read it."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from torchserve_explain import __version__
from torchserve_explain.attribution.methods import METHODS, Smoothing
from torchserve_explain.attribution.methods.method import Family
from torchserve_explain.attribution.quality import QUALITIES
from torchserve_explain.serving.colormaps import COLORMAPS, table
from torchserve_explain.serving.parameters import PARAMETERS, Capabilities, Labels, Parameters

STOPS = 16  # colours that stand for a colour map of 256
KINDS: dict[Any, str] = {bool: "flag", int: "whole", float: "number"}
SUGGESTED = {"target": "labels", "versus": "labels", "layer": "layers"}  # parameters that are free text with known values


def capability_report(
    model: Mapping[str, str], capabilities: Capabilities, defaults: Parameters, labels: Labels, layers: list[str]
) -> dict[str, Any]:
    """Return what can be asked for, ready for JSON; `defaults` are the parameters of a request that names none."""
    return {
        "model": dict(model),
        "served_by": f"torchserve-explain {__version__}",
        "methods": [_method(name) for name in capabilities.methods],
        "families": list(Family),
        "refused": capabilities.refused,
        "parameters": _parameters(defaults),
        "qualities": {name: first_sentence(quality) for name, quality in QUALITIES.items()},
        "layers": layers,
        "labels": labels.names,
        "colormaps": {name: _stops(name) for name in COLORMAPS},
    }


def _method(name: str) -> dict[str, Any]:
    method = METHODS[name]
    own = fields(method)
    return {
        "name": name,
        "family": method.family,
        "first": method.first,
        "description": first_sentence(method),
        "parameters": [field.name for field in own],
        "defaults": {field.name: field.default for field in own if isinstance(field.default, str | int | float)},
    }


def first_sentence(documented: type) -> str:
    """Return the first sentence of a docstring, which says what a map or a measure means."""
    paragraph = " ".join((documented.__doc__ or "").split("\n\n")[0].split())
    return paragraph.split(". ")[0].removesuffix(".") + "."


def _parameters(defaults: Parameters) -> dict[str, dict[str, Any]]:
    """Describe each parameter; a general one belongs to no method, and one `with` another needs that one set."""
    values = defaults.model_dump(mode="json")
    methods = {field.name for method in METHODS.values() for field in fields(method)}
    smoothing = {field.name for field in fields(Smoothing)}
    return {
        name: _range(info)
        | {"description": info.description, "default": values[name], "general": name not in methods | smoothing}
        | ({"with": "smoothing"} if name in smoothing else {})
        | ({"suggestions": SUGGESTED[name]} if name in SUGGESTED else {})
        for name, info in PARAMETERS.items()
    }


def _range(info: FieldInfo) -> dict[str, Any]:
    """Return a field's kind, and what it allows as far as its type and bounds tell."""
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    leaves = list(_leaves(info.annotation))
    leaf = leaves[0] if len(leaves) == 1 else str
    if "enum" in extra:
        return {"kind": "choices" if get_origin(leaf) is tuple else "choice", "allowed": extra["enum"]}
    if allowed := _allowed(leaf):
        return {"kind": "choice", "allowed": allowed}
    also = {"also": extra["also"]} if "also" in extra else {}
    return {"kind": KINDS.get(leaf, "text")} | also | _bounds(info)


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation unites, without None and without what Annotated adds."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _leaves(part)
    elif annotation is not NoneType:
        yield annotation


def _allowed(leaf: Any) -> list[str]:
    """Return the values of an enumeration or a Literal; of anything else none."""
    if get_origin(leaf) is Literal:
        return [str(value) for value in get_args(leaf)]
    return [str(member.value) for member in leaf] if isinstance(leaf, type) and issubclass(leaf, Enum) else []


def _bounds(info: FieldInfo) -> dict[str, Any]:
    bounds: dict[str, Any] = {}
    for rule in info.metadata:
        for key, bound, excluded in (("ge", "minimum", False), ("gt", "minimum", True), ("le", "maximum", False),
                                     ("lt", "maximum", True)):  # fmt: skip
            if (value := getattr(rule, key, None)) is not None:
                bounds |= {bound: value} | ({f"exclusive_{bound}": True} if excluded else {})
    return bounds


def _stops(name: str) -> list[str]:
    colours = table(name)
    places = [round(stop * (len(colours) - 1) / (STOPS - 1)) for stop in range(STOPS)]
    return ["#" + bytes(colours[place]).hex() for place in places]
