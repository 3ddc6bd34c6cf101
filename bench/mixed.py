"""Requests of every kind that a server must stand, and whether an answer is what it is alone."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

MAP_TOLERANCE = 1e-5  # of a map's norm
NUMBER_TOLERANCE = 1e-3  # of a number in JSON; errors are differences of large ones
PIXEL_TOLERANCE = 1.0  # mean over a picture, of 255: a palette's colour may be another
HALF_TOLERANCE = 1e-3  # of values that JSON carries as float16
PICTURES = {"overlay_png", "heatmap_png"}
TIMES = {"milliseconds"}


@dataclass(frozen=True)
class MixedRequest:
    """One request: its kind, its path with {name} for the model, and httpx's options."""

    name: str
    kind: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    content_type: str
    body: bytes


def send(client: httpx.Client, base: str, name: str, case: MixedRequest) -> Reply:
    """Send a case to the model of that name; raises httpx.HTTPError."""
    answer = client.post(base + case.path.format(name=name), **case.options)
    return Reply(answer.status_code, answer.headers.get("content-type", ""), answer.content)


def friendly(image: bytes, methods: Mapping[str, dict[str, str]]) -> list[MixedRequest]:
    """Return predictions in every form, and each method as maps; some in every output and protocol."""
    encoded = base64.b64encode(image).decode()
    blob = {"name": "data", "datatype": "BYTES", "shape": [1], "data": [encoded]}
    v1, v2 = {"instances": [{"data": encoded}, {"data": encoded}]}, {"id": "mine", "inputs": [blob]}
    cam = {"method": "grad_cam"}
    explained = [
        MixedRequest(
            f"{method}, npy", method, "/explanations/{name}", _form(image, fields | {"method": method, "output": "npy"})
        )
        for method, fields in methods.items()
    ]
    return [
        MixedRequest("raw prediction", "prediction", "/predictions/{name}", {"content": image}),
        MixedRequest("prediction, form", "prediction", "/predictions/{name}", _form(image, {})),
        MixedRequest("prediction, JSON", "prediction", "/predictions/{name}", {"json": {"data": encoded, "top_k": 3}}),
        MixedRequest("prediction, v1", "prediction", "/v1/models/{name}:predict", {"json": v1}),
        MixedRequest("prediction, v2", "prediction", "/v2/models/{name}/infer", {"json": v2}),
        *explained,
        *(
            MixedRequest(f"grad_cam, {o}", "grad_cam", "/explanations/{name}", _form(image, cam | {"output": o}))
            for o in OUTPUTS
        ),
        MixedRequest("grad_cam, values", "grad_cam", "/explanations/{name}", _form(image, cam | {"values": "true"})),
        MixedRequest(
            "grad_cam, v1", "grad_cam", "/v1/models/{name}:explain", {"json": {"instances": [{"data": encoded} | cam]}}
        ),
        MixedRequest("grad_cam, v2", "grad_cam", "/v2/models/{name}/explain", {"json": v2 | {"parameters": cam}}),
    ]


OUTPUTS = ("json", "png", "html")


def hostile(image: bytes, pixels: int) -> list[MixedRequest]:
    """Return requests that must be refused, among them a picture of more than so many pixels in a few kilobytes."""
    stream = io.BytesIO()
    Image.new("1", (10_000, pixels // 10_000 + 1)).save(stream, "PNG")
    explain = "/explanations/{name}"
    broken = {"content": b'{"data": ', "headers": {"content-type": "application/json"}}
    return [
        MixedRequest("half an image", "hostile", explain, _form(image[: len(image) // 2], {})),
        MixedRequest("no image", "hostile", "/predictions/{name}", {"content": bytes(range(256)) * 9}),
        MixedRequest("nothing", "hostile", explain, _form(b"", {})),
        MixedRequest("a bomb", "hostile", explain, _form(stream.getvalue(), {"method": "grad_cam"})),
        MixedRequest("an unknown method", "hostile", explain, _form(image, {"method": "tea_leaves"})),
        MixedRequest("an unknown class", "hostile", explain, _form(image, {"target": "1000000"})),
        MixedRequest("over the budget", "hostile", explain, _form(image, {"method": "rise", "samples": "1000000"})),
        MixedRequest("half a JSON", "hostile", explain, broken),
        MixedRequest("JSON without an image", "hostile", "/v1/models/{name}:explain", {"json": {"instances": [{"method": 3}]}}),
    ]


def _form(image: bytes, fields: Mapping[str, str]) -> dict[str, Any]:
    return {"files": {"data": image}, "data": dict(fields)}


def difference(alone: Reply, reply: Reply) -> str | None:
    """Say in what an answer differs from what it is alone; None where it does not beyond rounding."""
    if (alone.status, alone.content_type) != (reply.status, reply.content_type):
        statuses = f"{reply.status} {reply.content_type}, alone {alone.status} {alone.content_type}"
        return statuses if reply.status == 200 else f"{statuses}: {reply.body[:300]!r}"
    if alone.content_type.startswith("application/json"):
        return _of_json(json.loads(alone.body), json.loads(reply.body), "answer")
    if alone.content_type == "application/x-npy":
        return _of_arrays(_array(alone.body), _array(reply.body), MAP_TOLERANCE, "maps")
    if alone.content_type == "image/png":
        return _of_pictures(alone.body, reply.body, "picture")
    texts = [re.sub(r"[0-9A-Za-z+/=]{200,}|[-0-9.]+", "", one.body.decode()) for one in (alone, reply)]
    return None if texts[0] == texts[1] else "the page's text differs"


def _of_json(alone: Any, found: Any, place: str) -> str | None:
    """Compare JSON by its structure: numbers to rounding, pictures and maps by what they hold, times not at all."""
    if isinstance(alone, dict) and isinstance(found, dict):
        if alone.keys() != found.keys():
            return f"{place} has {sorted(found)}, alone {sorted(alone)}"
        if "dtype" in alone:
            return _of_arrays(_values(alone), _values(found), HALF_TOLERANCE, place)
        return _first(_of_json(alone[key], found[key], f"{place}.{key}") for key in alone if key not in TIMES)
    if isinstance(alone, list) and isinstance(found, list) and len(alone) == len(found):
        return _first(_of_json(*pair, f"{place}[{index}]") for index, pair in enumerate(zip(alone, found, strict=True)))
    if isinstance(alone, float) and isinstance(found, float | int):
        same = math.isclose(alone, found, rel_tol=NUMBER_TOLERANCE, abs_tol=NUMBER_TOLERANCE / 10)
    elif isinstance(alone, str) and isinstance(found, str) and place.rpartition(".")[2] in PICTURES:
        return _of_pictures(base64.b64decode(alone), base64.b64decode(found), place)
    elif isinstance(alone, str) and isinstance(found, str) and alone[:1] + found[:1] == "{{":  # JSON within KServe's v2
        return _of_json(json.loads(alone), json.loads(found), place)
    else:
        same = bool(alone == found)
    return None if same else f"{place} is {str(found)[:200]}, alone {str(alone)[:200]}"


def _first(differences: Any) -> str | None:
    return next((one for one in differences if one is not None), None)


def _of_arrays(alone: Any, found: Any, tolerance: float, place: str) -> str | None:
    if alone.shape != found.shape:
        return f"{place} has the shape {found.shape}, alone {alone.shape}"
    off = float(np.linalg.norm(found - alone) / max(float(np.linalg.norm(alone)), 1e-30))
    return None if off <= tolerance else f"{place} is off by {off:.1e} of its norm"


def _of_pictures(alone: bytes, found: bytes, place: str) -> str | None:
    first, second = (np.asarray(Image.open(io.BytesIO(one)).convert("RGBA"), dtype=float) for one in (alone, found))
    if first.shape != second.shape:
        return f"{place} has the size {second.shape}, alone {first.shape}"
    off = float(np.abs(first - second).mean())
    return None if off <= PIXEL_TOLERANCE else f"{place} is off by {off:.1f} of 255"


def _array(body: bytes) -> Any:
    return np.load(io.BytesIO(body), allow_pickle=False).astype(float)


def _values(encoded: Mapping[str, Any]) -> Any:
    shape: Sequence[int] = encoded["shape"]
    return np.frombuffer(base64.b64decode(encoded["data"]), encoded["dtype"]).reshape(shape).astype(float)
