"""The errors that a client sees: one class, because a status and a sentence are all there is to them."""

from http import HTTPStatus
from typing import Any

from torchserve_explain.attribution.errors import AttributionError, DeadlinePassed, OutOfMemory, Unsupported

TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestException",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestEntityTooLargeException",
    HTTPStatus.UNPROCESSABLE_ENTITY: "UnprocessableEntityException",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerException",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableException",
    HTTPStatus.GATEWAY_TIMEOUT: "GatewayTimeoutException",
}


class ClientError(Exception):
    """A request that cannot be answered: the status it gets, and why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> dict[str, Any]:
        """Return TorchServe's own form of an error."""
        return {"code": self.status.value, "type": TYPES[self.status], "message": str(self)}


def bad_request(message: str) -> ClientError:
    """A request that is wrong in itself."""
    return ClientError(HTTPStatus.BAD_REQUEST, message)


def over_limit(message: str) -> ClientError:
    """A request that asks for more than the archive allows."""
    return ClientError(HTTPStatus.UNPROCESSABLE_ENTITY, message)


def from_engine(error: AttributionError) -> ClientError:
    """Say an engine's error to a client."""
    statuses: dict[type[AttributionError], HTTPStatus] = {
        OutOfMemory: HTTPStatus.SERVICE_UNAVAILABLE,
        DeadlinePassed: HTTPStatus.GATEWAY_TIMEOUT,
        Unsupported: HTTPStatus.BAD_REQUEST,
    }
    return ClientError(statuses.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR), str(error))


def shown(value: object) -> str:
    """Return a client's value fit for a message: ASCII, at most 60 characters."""
    try:
        text = ascii(value[:61] if isinstance(value, str | bytes) else value)  # of a long text no more than is shown
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
