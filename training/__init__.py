"""Fine-tuning recipes that end in a classifiers/ folder."""

import deploy  # noqa: F401 (puts handlers/ on the path)
