"""What TorchServe hands over becomes requests: raw bodies, forms, JSON, KServe v1 and v2, gRPC fields."""

import base64
import binascii
import json
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torchserve_explain.errors import RequestError
from torchserve_explain.serving.errors import bad_request, over_limit, shown
from torchserve_explain.serving.parameters import OUTPUTS

MOST_FIELDS, MOST_INSTANCES = 100, 1000  # more than anybody needs, and few enough to be copied one by one
ACCEPTED = {media_type: output for output, media_type in OUTPUTS.items()}


class Protocol(Enum):
    """How a request is worded, which decides how its answer is."""

    PLAIN = "plain"
    KSERVE_V1 = "v1"
    KSERVE_V2 = "v2"


@dataclass(frozen=True)
class Instance:
    """One image, still encoded, and the fields that came with it."""

    image: bytes
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Request:
    """One client's request: several instances only in the KServe protocols.

    `defaults` are weaker than the instances' fields: the methods of the URL path, the output of the Accept header.
    """

    protocol: Protocol
    explain: bool
    instances: tuple[Instance, ...]
    defaults: Mapping[str, object]
    id: str = ""

    @contextmanager
    def naming(self, place: int) -> Iterator[None]:
        """Say in an error which of several instances it is about."""
        try:
            yield
        except RequestError as error:
            if self.protocol is Protocol.PLAIN:
                raise
            raise RequestError(error.status, f"instance {place}: {error}") from None

    @property
    def output(self) -> object:
        """The output that it names, in a field or in its Accept header."""
        fields = self.instances[0].fields if self.instances else {}
        return fields.get("output") or self.defaults.get("output")

    @property
    def page(self) -> bool:
        """Whether it asks about the archive: nothing was sent, as by a browser, or its OpenAPI document is wanted."""
        document = self.protocol is Protocol.PLAIN and self.output == "openapi"
        return self.explain and (document or not self.instances)


def read_request(
    row: Mapping[str, Any], raw_headers: Mapping[str, Any], request_id: str = "", most_instances: int = MOST_INSTANCES
) -> Request:
    """Read one request as a server hands it over; raises RequestError 400, or 422 for more instances than `most_instances`.

    Fields and instances are counted before any is copied or decoded.
    """
    _check_count(row)
    # Form fields stand in the header dictionary too, as dictionaries; headers keep the client's case.
    headers = {name.lower(): value for name, value in raw_headers.items() if isinstance(value, str)}
    defaults = _defaults(headers)
    explain = headers.get("explain", "").lower() == "true"
    content = _content(row, headers)
    if content is None:
        # The HTTP method is not handed over, and the frontend adds a length of 0: an empty POST without a type looks alike.
        opened = explain and headers.get("content-length", "0") == "0" and "content-type" not in headers
        return Request(Protocol.PLAIN, explain, () if opened else (Instance(b"", {}),), defaults)
    if "instances" in content:
        return Request(Protocol.KSERVE_V1, explain, _v1(content, most_instances), {})
    if "inputs" in content:
        name = content.get("id")
        images = _v2(content, most_instances)
        return Request(Protocol.KSERVE_V2, explain, images, {}, name if isinstance(name, str) else request_id)
    fields = dict(content)
    if "body" in fields:
        fields.setdefault("data", fields.pop("body"))  # as TorchServe's own handlers take it
    asked = fields.pop("explain", None)  # how a gRPC request says it
    if asked is not None:
        explain = _truth("explain", asked)
    return Request(Protocol.PLAIN, explain, (_instance(fields),), defaults)


def _defaults(headers: Mapping[str, str]) -> dict[str, object]:
    path = headers.get("url_path", "").strip("/")
    return {key: value for key, value in (("method", path or None), ("output", _accepted(headers.get("accept", "")))) if value}


def _accepted(accept: str) -> str | None:
    """Return the output that an Accept header prefers, or None where it prefers none of ours."""
    ranked: list[tuple[float, str]] = []
    for item in accept.lower().split(","):
        kind, *options = (part.strip() for part in item.split(";"))
        quality = next((o[2:] for o in options if o.startswith("q=")), "1")
        weight = float(quality) if quality.replace(".", "", 1).isdecimal() else 0.0
        if kind in ACCEPTED and weight > 0:
            ranked.append((weight, ACCEPTED[kind]))
    return max(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _content(row: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the request as fields, or None where it is empty."""
    body = row.get("body")
    if set(row) != {"body"}:
        return {key: _text(key, value) for key, value in row.items()} or None
    if isinstance(body, bytes | bytearray) and "json" in headers.get("content-type", "").lower():
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            raise bad_request('the body is not valid JSON; allowed: {"data": "<base64>", ...}') from None
    if isinstance(body, bytes | bytearray | str):
        return {"data": bytes(body) if isinstance(body, bytearray) else body} if body else None
    if not isinstance(body, dict):
        raise bad_request(f"the body is a JSON {type(body).__name__}; allowed: an object with 'data', 'instances' or 'inputs'")
    _check_count(body)
    return body


def _check_count(fields: Mapping[str, Any]) -> None:
    if len(fields) > MOST_FIELDS:
        raise bad_request(f"{len(fields)} fields are not allowed; allowed: at most {MOST_FIELDS}")


def _text(name: str, value: object) -> object:
    """Return a form field as text; the image stays as it is."""
    if name in ("data", "body") or not isinstance(value, bytes | bytearray):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise bad_request(f"{shown(name)}: {shown(bytes(value[:20]))} is not UTF-8 text; an image goes in 'data'") from None


def _instance(fields: Mapping[str, object]) -> Instance:
    rest = dict(fields)
    image = rest.pop("data", None)
    return Instance(_image_bytes(image), rest)


def _image_bytes(image: object) -> bytes:
    """Return an image's bytes; text is base64, with or without a data URL's head."""
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if image is None:
        return b""
    if not isinstance(image, str):
        raise bad_request(f"data: {shown(image)} is not an image; allowed: its bytes, or their base64 in JSON")
    text = image.partition(",")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode(text.encode("ascii").translate(None, string.whitespace.encode()), validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"data: {shown(image)} is not base64") from None


def _numbered(instances: list[dict[str, Any]]) -> tuple[Instance, ...]:
    """Read several instances, saying in an error which it is about."""
    read: list[Instance] = []
    for place, fields in enumerate(instances):
        try:
            read.append(_instance(fields))
        except RequestError as error:
            raise RequestError(error.status, f"instance {place}: {error}") from None
    return tuple(read)


def _check_instances(asked: list[Any], most: int) -> None:
    if len(asked) > most:
        raise over_limit(f"{len(asked)} instances asked for; allowed: at most {most}")


def _v1(content: Mapping[str, Any], most: int) -> tuple[Instance, ...]:
    instances = content["instances"]
    if isinstance(instances, list):
        _check_instances(instances, most)
    if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
        raise bad_request('instances: allowed: a list of one or more objects {"data": "<base64>", ...}')
    for instance in instances:
        _check_count(instance)
    shared = {key: value for key, value in content.items() if key != "instances"}
    if "data" in shared:
        shared["data"] = _image_bytes(shared["data"])  # once for all
    return _numbered([{**shared, **instance} for instance in instances])


def _v2(content: Mapping[str, Any], most: int) -> tuple[Instance, ...]:
    inputs, parameters = content["inputs"], content.get("parameters") or {}
    tensor = inputs[0] if isinstance(inputs, list) and len(inputs) == 1 else None
    data = tensor.get("data") if isinstance(tensor, dict) else None
    if not isinstance(tensor, dict) or tensor.get("datatype") != "BYTES" or not isinstance(data, list) or not data:
        raise bad_request('inputs: allowed: one {"name": "data", "datatype": "BYTES", "shape": [n], "data": ["<base64>", ...]}')
    if tensor.get("shape", [len(data)]) != [len(data)]:
        raise bad_request(f"shape: {shown(tensor['shape'])} is not that of {len(data)} images; allowed: [{len(data)}]")
    if not isinstance(parameters, dict):
        raise bad_request(f"parameters: {shown(parameters)} is not allowed; allowed: an object")
    _check_instances(data, most)
    _check_count(parameters)
    return _numbered([{**parameters, "data": image} for image in data])


def _truth(name: str, value: object) -> bool:
    truths = {"true": True, "1": True, "false": False, "0": False}
    text = str(value).lower()
    if text not in truths:
        raise bad_request(f"{name}: {shown(value)} is not allowed; allowed: true or false")
    return truths[text]
