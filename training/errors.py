"""Why nothing is trained."""


class Unusable(Exception):
    """What was given cannot be trained on; the message says why, and what is allowed."""
