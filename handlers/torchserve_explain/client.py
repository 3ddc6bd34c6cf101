"""A client of a server of classifiers: typed answers and typed errors, and patience where every place is taken.

It needs httpx, pydantic, NumPy and Pillow, and nothing of what serves.
"""

import asyncio
import base64
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from PIL import Image, ImageOps
from pydantic import BaseModel, ValidationError

from torchserve_explain.errors import BadRequest, KeyRefused, ServerError, request_error
from torchserve_explain.serving.answer_models import ExplainedImage, ExplainedMap, Prediction

__all__ = ["AsyncClient", "Client", "ExplainedImage", "ExplainedMap", "Photo", "Prediction"]
Photo = bytes | str | PathLike[str] | Image.Image  # an encoded image, where one lies, or a picture in memory
Answer = TypeVar("Answer", bound=BaseModel)
TIMEOUT = 130.0  # seconds; above the server's responseTimeout
PATIENCE = 60.0  # seconds that one question waits in all, where the server says when to ask again
SHORTEST_PAUSE = 0.1
FULL = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)
# What an answer's error is known by; anything else is the server's fault.
KNOWN = {400, 401, 403, 404, 413, 422, 429, 500, 503, 504}


class _Questions:
    """What both clients share: where a model is, and how questions to it are worded."""

    def __init__(
        self, url: str, key: str | None = None, *, model: str = "imagenet", version: str | None = None,
        timeout: float = TIMEOUT, patience: float = PATIENCE, **options: Any,
    ) -> None:  # fmt: skip
        """Ask `model` of the server at `url`, with the key that it wants; `options` are httpx's, such as `verify`."""
        self.patience = patience
        self._place = "/".join(quote(part, safe="") for part in (model, version) if part is not None)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._options = {"base_url": url, "timeout": timeout, "headers": headers, **options}

    def _prediction(self, image: Photo, top_k: int | None) -> dict[str, Any]:
        return {"url": f"/predictions/{self._place}", **_content(image, {} if top_k is None else {"top_k": top_k})}

    def _explanation(self, image: Photo, parameters: Mapping[str, object]) -> dict[str, Any]:
        if "output" in parameters:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "output is not for this client; allowed: json, which it asks for itself")
        return {"url": f"/explanations/{self._place}", **_content(image, {**parameters, "output": "json"})}


class Client(_Questions):
    """Asks a server for predictions and explanations; use it in a `with`, or close it."""

    def __init__(self, url: str, key: str | None = None, **options: Any) -> None:
        super().__init__(url, key, **options)
        with _server_errors(url):
            self._http = httpx.Client(**self._options)

    def predict(self, image: Photo, top_k: int | None = None) -> Prediction:
        """Return the most probable classes: `top_k` of them, or as many as the server tells unasked (five, or all of fewer)."""
        return _read(Prediction, self._ask(self._prediction(image, top_k)))

    def explain(self, image: Photo, *, values: bool = True, **parameters: object) -> ExplainedImage:
        """Return why the model sees what it sees; the parameters are the server's, such as `method` and `target`."""
        return _read(ExplainedImage, self._ask(self._explanation(image, {"values": values, **parameters})))

    def _ask(self, question: Mapping[str, Any]) -> httpx.Response:
        """Ask until there is an answer or patience ends; raises RequestError or ServerError."""
        patience = self.patience
        while True:
            with _server_errors(str(self._http.base_url)):
                response = self._http.post(**question)
            pause = _pause(response)
            if pause is None or pause > patience:
                return response
            patience -= pause
            time.sleep(pause)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncClient(_Questions):
    """As `Client`, from asyncio."""

    def __init__(self, url: str, key: str | None = None, **options: Any) -> None:
        super().__init__(url, key, **options)
        with _server_errors(url):
            self._http = httpx.AsyncClient(**self._options)

    async def predict(self, image: Photo, top_k: int | None = None) -> Prediction:
        """Return the most probable classes: `top_k` of them, or as many as the server tells unasked (five, or all of fewer)."""
        return _read(Prediction, await self._ask(await asyncio.to_thread(self._prediction, image, top_k)))

    async def explain(self, image: Photo, *, values: bool = True, **parameters: object) -> ExplainedImage:
        """Return why the model sees what it sees; the parameters are the server's, such as `method` and `target`."""
        question = await asyncio.to_thread(self._explanation, image, {"values": values, **parameters})
        return _read(ExplainedImage, await self._ask(question))

    async def _ask(self, question: Mapping[str, Any]) -> httpx.Response:
        patience = self.patience
        while True:
            with _server_errors(str(self._http.base_url)):
                response = await self._http.post(**question)
            pause = _pause(response)
            if pause is None or pause > patience:
                return response
            patience -= pause
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _content(image: Photo, parameters: Mapping[str, object]) -> dict[str, Any]:
    """Word a question: as a form, whose lists are comma lists; as JSON where an item holds a comma itself."""
    encoded = _encoded(image)
    given = {name: value for name, value in parameters.items() if value is not None}
    if any("," in str(item) for value in given.values() if isinstance(value, list | tuple) for item in value):
        return {"json": {"data": base64.b64encode(encoded).decode(), **given}}
    return {"files": {"data": encoded}, "data": {name: _text(value) for name, value in given.items()}}


def _text(value: object) -> str:
    """Return a value as a form has it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _encoded(image: Photo) -> bytes:
    """Return an image as a file's bytes."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        stream = io.BytesIO()
        ImageOps.exif_transpose(image).save(stream, "PNG")  # upright, as the server turns a file
        return stream.getvalue()
    return Path(image).read_bytes()


def _pause(response: httpx.Response) -> float | None:
    """Return for how many seconds a server that is full wants to be left alone; None where it does not say so."""
    after = response.headers.get("Retry-After")
    if response.status_code not in FULL or after is None:
        return None
    try:
        seconds = float(after) if after.isdecimal() else (parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # neither seconds nor a date with its zone
        return None
    return max(seconds, SHORTEST_PAUSE)


@contextmanager
def _server_errors(url: str) -> Iterator[None]:
    """Say that a server does not answer."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"{url} does not answer: {str(error) or type(error).__name__}") from error


def _read(kind: type[Answer], response: httpx.Response) -> Answer:
    """Return an answer, typed; raises RequestError or ServerError for one that is an error, or not of the contract."""
    if not response.is_success:
        raise _error(response)
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "JSON"
        raise ServerError(f"{response.url} answered what is no {kind.__name__}: {place}: {error.errors()[0]['msg']}") from None


def _error(response: httpx.Response) -> Exception:
    """Return what the status of an answer means, in the server's words where it has any."""
    status = response.status_code
    try:
        body = {"type": "", "message": "", **response.json()}
    except (ValueError, TypeError):
        body = {"type": "", "message": response.text[:200]}
    message = str(body["message"] or "") or f"{response.url} answered {status} {response.reason_phrase}"
    if status not in KNOWN:
        return ServerError(f"{response.url} answered {status}: {message}")
    if body["type"] == "InvalidKeyException":  # which TorchServe answers with 400
        return KeyRefused(HTTPStatus(status), message, response.headers)
    return request_error(HTTPStatus(status), message, response.headers)
