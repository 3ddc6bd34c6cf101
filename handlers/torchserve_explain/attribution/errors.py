"""What can go wrong while an explanation is computed."""


class AttributionError(Exception):
    """An explanation that could not be computed; its neighbours are not concerned."""


class OutOfMemory(AttributionError):
    """A single row does not fit into the device's memory."""


class DeadlinePassed(AttributionError):
    """The explanation would not be finished before the batch's deadline."""


class NotFinite(AttributionError):
    """The model answered NaN or infinity, so there is nothing to explain."""


class Unsupported(AttributionError):
    """The method cannot serve this model, or a name it was given does not exist in it."""
