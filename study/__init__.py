"""The study of explanation techniques on photos: how stable, faithful, complete, well placed and costly each is."""

import deploy  # noqa: F401 (puts handlers/ on the path)
