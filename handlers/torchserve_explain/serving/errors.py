"""Ways to word an error for a client."""

from http import HTTPStatus

from torchserve_explain.errors import AttributionError, DeadlinePassed, OutOfMemory, RequestError, Unsupported, request_error


def bad_request(message: str) -> RequestError:
    """A request that is wrong in itself."""
    return request_error(HTTPStatus.BAD_REQUEST, message)


def over_limit(message: str) -> RequestError:
    """A request that asks for more than the archive allows."""
    return request_error(HTTPStatus.UNPROCESSABLE_ENTITY, message)


def from_engine(error: AttributionError) -> RequestError:
    """Say an engine's error to a client."""
    statuses: dict[type[AttributionError], HTTPStatus] = {
        OutOfMemory: HTTPStatus.SERVICE_UNAVAILABLE,
        DeadlinePassed: HTTPStatus.GATEWAY_TIMEOUT,
        Unsupported: HTTPStatus.BAD_REQUEST,
    }
    return request_error(statuses.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR), str(error))


def shown(value: object) -> str:
    """Return a client's value fit for a message: ASCII, at most 60 characters."""
    try:
        text = ascii(value[:61] if isinstance(value, str | bytes) else value)  # of a long text no more than is shown
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
