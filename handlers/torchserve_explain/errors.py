"""Every error that this project raises on purpose, in one tree; its message says what is wrong and what is allowed.

ExplainError
    RequestError            a client's request, with the status that it gets
        BadRequest          400
        KeyRefused          the server's token authorization, or a proxy's
        NotServed           404
        TooLarge            413
        OverLimit           422
        Unavailable         503, or a proxy's 429
        OutOfTime           504
    ArchiveError            what is to be served, or explained from a folder
    AttributionError        one explanation; its neighbours are not concerned
        OutOfMemory
        DeadlinePassed
        NotFinite
        Unsupported
    ServerError             a server that cannot be started, or does not answer
    TrainingError           what is to be trained on
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

# What TorchServe calls the errors of a status.
TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestException",
    HTTPStatus.NOT_FOUND: "ModelNotFoundException",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestEntityTooLargeException",
    HTTPStatus.UNPROCESSABLE_ENTITY: "UnprocessableEntityException",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerException",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableException",
    HTTPStatus.GATEWAY_TIMEOUT: "GatewayTimeoutException",
}


class ExplainError(Exception):
    """The root: what was asked for cannot be done, and the message says why."""


class RequestError(ExplainError):
    """A request that cannot be answered: the status it gets, why, and headers that tell a client what to do."""

    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}

    def body(self) -> dict[str, Any]:
        """Return TorchServe's own form of an error."""
        return {"code": self.status.value, "type": TYPES[self.status], "message": str(self)}


class BadRequest(RequestError):
    """A request that is wrong in itself."""


class KeyRefused(RequestError):
    """A request whose key is missing, unknown or expired."""


class NotServed(RequestError):
    """A request for a model, or a version of one, that is not served."""


class TooLarge(RequestError):
    """A request of more bytes, or an image of more pixels, than is allowed."""


class OverLimit(RequestError):
    """A request for more rows, methods, targets or bytes of answer than the archive allows."""


class Unavailable(RequestError):
    """A request that found every place taken, or the memory full; the same request may be answered later."""


class OutOfTime(RequestError):
    """A request whose time would be over before its answer."""


_OF_STATUS: dict[int, type[RequestError]] = {
    HTTPStatus.BAD_REQUEST: BadRequest,
    HTTPStatus.UNAUTHORIZED: KeyRefused,
    HTTPStatus.FORBIDDEN: KeyRefused,
    HTTPStatus.NOT_FOUND: NotServed,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: TooLarge,
    HTTPStatus.UNPROCESSABLE_ENTITY: OverLimit,
    HTTPStatus.TOO_MANY_REQUESTS: Unavailable,
    HTTPStatus.SERVICE_UNAVAILABLE: Unavailable,
    HTTPStatus.GATEWAY_TIMEOUT: OutOfTime,
}


def request_error(status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> RequestError:
    """Return the error of a status."""
    return _OF_STATUS.get(status, RequestError)(status, message, headers)


class ArchiveError(ExplainError, ValueError):
    """An archive, its parts or a folder of pictures that cannot be used."""


class AttributionError(ExplainError):
    """An explanation that could not be computed; its neighbours are not concerned."""


class OutOfMemory(AttributionError):
    """A single row does not fit into the device's memory."""


class DeadlinePassed(AttributionError):
    """The explanation would not be finished before the request's deadline."""


class NotFinite(AttributionError):
    """The model answered NaN or infinity, so there is nothing to explain."""


class Unsupported(AttributionError):
    """The method cannot serve this model, or a name it was given does not exist in it."""


class ServerError(ExplainError):
    """A server that cannot be started, or does not answer."""


class TrainingError(ExplainError):
    """Data, weights or options that nothing can be trained with."""
