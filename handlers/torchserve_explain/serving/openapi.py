"""An archive's OpenAPI 3.1 document, made of the capability report and of the types of answers, so that none drifts."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic.json_schema import models_json_schema

from torchserve_explain.errors import TYPES
from torchserve_explain.serving.answer_models import ErrorAnswer, ExplainedImage, Prediction
from torchserve_explain.serving.parameters import OUTPUTS

JsonObject = dict[str, Any]
LISTS = ("method", "layer", "target", "quality")  # taken as comma lists, too
KINDS = {"flag": "boolean", "whole": "integer", "number": "number", "choice": "string", "text": "string"}
BOUNDS = {"minimum": "Minimum", "maximum": "Maximum"}
ANY_IMAGE: JsonObject = {"image/*": {"schema": {}}, "application/octet-stream": {"schema": {}}}
DATA = "the image, in a format that the archive decodes"
RETRY_AFTER: JsonObject = {
    "Retry-After": {"description": "seconds after which a place may be free", "schema": {"type": "integer"}}
}


def openapi_document(report: Mapping[str, Any]) -> JsonObject:
    """Return the document of what `capability_report` tells, ready for JSON."""
    name, version = report["model"]["name"], report["model"]["version"]
    explain = _operation("explain", "Say why.", _parameters(report), _explanation_answers())
    predict = _operation("predict", "Tell what it is.", _shortlist(report), _prediction_answers())
    by_path = explain | {"operationId": "explain_by_path", "summary": "Say why, by the methods of the path."}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{name}: what is it, and why?", "version": version, "description": report["served_by"]},
        "paths": {
            f"/predictions/{name}": {"post": predict},
            f"/explanations/{name}": {"get": _about(), "post": explain},
            f"/explanations/{name}/{version}/{{methods}}": {"parameters": [_path(report)], "post": by_path},
        },
        "components": {
            "schemas": _schemas(),
            "responses": _refusals(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],  # a server has token authorization on or off
    }


def parameter_schema(name: str, parameter: Mapping[str, Any], report: Mapping[str, Any]) -> JsonObject:
    """Return the JSON schema of a parameter, as JSON has it or a form's text stands for it."""
    schema: JsonObject = {"description": parameter["description"]}
    if parameter["default"] is not None:
        schema["default"] = parameter["default"]
    if name in LISTS:
        return schema | _list_schema(name, parameter, report)
    kind = ["string", "integer"] if parameter.get("suggestions") == "labels" else KINDS[parameter["kind"]]
    schema |= {"type": kind} | ({"enum": parameter["allowed"]} if "allowed" in parameter else {})
    for bound, word in BOUNDS.items():
        if bound in parameter:
            schema[f"exclusive{word}" if parameter.get(f"exclusive_{bound}") else bound] = parameter[bound]
    return schema


def _list_schema(name: str, parameter: Mapping[str, Any], report: Mapping[str, Any]) -> JsonObject:
    """Return the schema of a list, whose items may also stand in one text between commas."""
    allowed = [*_names(report), "all"] if name == "method" else [*parameter.get("allowed", ()), "all"]
    items: dict[str, JsonObject] = {
        "method": {"type": "string", "enum": allowed},
        "quality": {"type": "string", "enum": allowed},
        "layer": {"type": "string", "examples": ["last", *report["layers"]]},
        "target": {"type": ["string", "integer"], "examples": report["labels"][:3]},
    }
    kinds = ["array", "string", "integer"] if name == "target" else ["array", "string"]
    return {"type": kinds, "items": items[name]} | ({} if name == "quality" else {"minItems": 1})


def _names(report: Mapping[str, Any]) -> list[str]:
    return [method["name"] for method in report["methods"]]


def _parameters(report: Mapping[str, Any]) -> JsonObject:
    return {name: parameter_schema(name, parameter, report) for name, parameter in report["parameters"].items()}


def _shortlist(report: Mapping[str, Any]) -> JsonObject:
    """Describe what a prediction takes, which depends on the head."""
    most = len(report["labels"])
    shortlist = {"type": "integer", "minimum": 1, "maximum": most, "description": "how many classes are listed"}
    above = {"type": "number", "minimum": 0, "maximum": 1, "description": "only classes of a probability above it are listed"}
    if report["head"] == "sigmoid":
        return {"top_k": shortlist, "threshold": above}
    return {"top_k": shortlist | ({"default": min(5, most)} if report["head"] == "softmax" else {})}


def _path(report: Mapping[str, Any]) -> JsonObject:
    """Describe the methods of a path: a comma list."""
    schema = {"type": "array", "items": {"type": "string", "enum": [*_names(report), "all"]}, "minItems": 1}
    return {"name": "methods", "in": "path", "required": True, "style": "simple", "schema": schema}


def _operation(name: str, summary: str, parameters: JsonObject, answers: JsonObject) -> JsonObject:
    """Describe a POST of an image with parameters: as a form, as JSON, or the image alone."""
    form = {"type": "object", "required": ["data"], "properties": {"data": {"description": DATA}, **parameters}}
    encoded = {"type": "string", "contentEncoding": "base64", "description": DATA}
    as_json = form | {"properties": {"data": encoded, **parameters}, "additionalProperties": False}
    lists = {one: {"style": "form", "explode": False} for one in LISTS if one in parameters}
    content = {
        "multipart/form-data": {"schema": form | {"additionalProperties": False}, "encoding": lists},
        "application/json": {"schema": as_json},
    }
    refused = {str(status.value): {"$ref": f"#/components/responses/{status.name}"} for status in TYPES}
    body = {"required": True, "content": content | ANY_IMAGE}
    return {"operationId": name, "summary": summary, "requestBody": body, "responses": {"200": answers, **refused}}


def _explanation_answers() -> JsonObject:
    """Describe an explanation's answer in every output; only JSON's holds anything to describe."""
    schemas = {"json": {"$ref": "#/components/schemas/ExplainedImage"}}
    content = {media_type: {"schema": schemas.get(output, {})} for output, media_type in OUTPUTS.items()}
    return {"description": "why: as the parameter `output` or an Accept header asks", "content": content}


def _prediction_answers() -> JsonObject:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Prediction"}}}
    return {"description": "the most probable classes, highest first", "content": content}


def _about() -> JsonObject:
    """Describe the GET: what an empty request is answered, by its Accept header."""
    about = {"html": "a page to try the model", "json": "what can be asked for", "openapi": "this document"}
    content = {OUTPUTS[output]: {"schema": {"description": text}} for output, text in about.items()}
    answers = {"200": {"description": "what this archive is, and can be asked", "content": content}}
    return {"operationId": "about", "summary": "Tell what can be asked.", "responses": answers}


def _refusals() -> JsonObject:
    """Describe the answers that are errors, by the names of their statuses."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    responses = {status.name: {"description": status.phrase, "content": content} for status in TYPES}
    responses[HTTPStatus.SERVICE_UNAVAILABLE.name] |= {"headers": RETRY_AFTER}
    return responses


def _schemas() -> JsonObject:
    models = [(model, "validation") for model in (Prediction, ExplainedImage, ErrorAnswer)]
    _, found = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: JsonObject = found["$defs"]
    return schemas
