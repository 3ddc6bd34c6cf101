"""Training: a folder of images becomes a classifier that can be archived, served and explained."""

import deploy  # noqa: F401 (puts handlers/ on the path)
