"""The contract over HTTP for servers other than TorchServe: requests as it hands them over, answers as responses."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Protocol
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from torchserve_explain.errors import RequestError
from torchserve_explain.serving.answers import Answer
from torchserve_explain.serving.errors import bad_request, shown
from torchserve_explain.serving.service import RawRequest, error_answer

LARGEST = 20_000_000  # bytes of a request, as config.properties has it for TorchServe
CLIENT_GONE = 499  # nobody reads it
OWN_HEADERS = ("explain", "url_path")  # which the server sets, never a client
PREDICT = (
    "/predictions/{model}",
    "/predictions/{model}/{version}",
    "/v1/models/{model}:predict",
    "/v2/models/{model}/infer",
    "/v2/models/{model}/versions/{version}/infer",
)
EXPLAIN = (
    "/explanations/{model}",
    "/explanations/{model}/{version}",
    "/explanations/{model}/{version}/{methods:path}",
    "/v1/models/{model}:explain",
    "/v2/models/{model}/explain",
    "/v2/models/{model}/versions/{version}/explain",
)


class Served(Protocol):
    """A model that can be asked."""

    async def version(self) -> str:
        """Return the version that its archive has."""
        ...

    async def ask(self, raw: RawRequest) -> Answer:
        """Return the answer to one request."""
        ...


def router(models: Mapping[str, Any]) -> APIRouter:
    """Return the contract's routes for models (each a `Served`) by their names; the mapping may change meanwhile."""
    routes = APIRouter()

    async def predict(request: Request) -> Response:
        return await _respond(request, models, explain=False)

    async def explain(request: Request) -> Response:
        return await _respond(request, models, explain=True)

    for paths, endpoint in ((PREDICT, predict), (EXPLAIN, explain)):
        for path in paths:
            routes.add_api_route(path, endpoint, methods=["GET", "POST", "PUT"], response_model=None, include_in_schema=False)
    return routes


async def raw_request(request: Request, explain: bool) -> RawRequest:
    """Read a request as TorchServe hands one over; raises RequestError 400 or 413."""
    headers = {name: value for name, value in request.headers.items() if name not in OWN_HEADERS}
    headers |= {"explain": "True"} if explain else {}
    headers |= {"url_path": request.path_params["methods"]} if "methods" in request.path_params else {}
    body = await _body(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        data = await _fields(kind, request.headers["content-type"], body)
    else:  # JSON stays bytes: what reads a request parses it, away from the event loop
        data = {"body": body.decode(errors="replace") if kind == "text/plain" else body}
    return RawRequest(data, headers, request.headers.get("x-request-id") or str(uuid4()))


def response(answer: Answer) -> Response:
    """Return an answer as a response."""
    return Response(answer.body, answer.status, {**answer.headers, "content-type": answer.content_type})


async def _respond(request: Request, models: Mapping[str, Any], explain: bool) -> Response:
    """Answer a request; whatever goes wrong becomes its answer."""
    try:
        served = await _model(request, models)
        return await _while_connected(request, served, await raw_request(request, explain))
    except Exception as error:
        return response(error_answer(error))


async def _model(request: Request, models: Mapping[str, Any]) -> Served:
    """Return the model that a path names; raises RequestError 404."""
    name, version = request.path_params["model"], request.path_params.get("version")
    served: Served | None = models.get(name)
    if served is None:
        raise RequestError(HTTPStatus.NOT_FOUND, f"model {shown(name)} is not served; allowed: {', '.join(models)}")
    if version is not None and version != (known := await served.version()):
        raise RequestError(HTTPStatus.NOT_FOUND, f"version {shown(version)} is not served; allowed: {known}")
    return served


async def _while_connected(request: Request, served: Served, raw: RawRequest) -> Response:
    """Await the answer as long as the client does."""
    answering = asyncio.ensure_future(served.ask(raw))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return response(answering.result())
        return Response(status_code=CLIENT_GONE)
    finally:
        for task in (answering, gone):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """Read a body; raises RequestError 413 as soon as it is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request has more than {LARGEST} bytes; allowed: at most {LARGEST}"
            )
    return bytes(body)


async def _fields(kind: str, content_type: str, body: bytes) -> dict[str, Any]:
    """Return a form's fields as bytes, files of a text type as text; raises RequestError 400."""
    parser: FormParser | MultiPartParser
    if kind == "multipart/form-data":
        # In latin-1 each byte is a character, so that an image in a field without a file name survives.
        headers = Headers({"content-type": f"{content_type}; charset=latin-1"})
        parser = MultiPartParser(headers, _whole(body), max_part_size=LARGEST)
    else:
        parser = FormParser(Headers(), _whole(body), max_part_size=LARGEST)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise bad_request(f"the form cannot be read: {shown(error.message)}") from None
    return {_bytes(name).decode(errors="replace"): await _value(value) for name, value in form.multi_items()}


async def _value(value: str | UploadFile) -> bytes | str:
    if isinstance(value, str):
        return _bytes(value)
    content: bytes = await value.read()
    await value.close()
    text = (value.content_type or "").startswith(("text/", "application/json"))
    return content.decode(errors="replace") if text else content


def _bytes(text: str) -> bytes:
    return text.encode("latin-1", errors="replace")


async def _whole(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
    yield b""
