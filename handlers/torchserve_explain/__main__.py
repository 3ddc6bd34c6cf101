"""Makes `python -m torchserve_explain` the command torchserve-explain."""

import sys

from torchserve_explain.cli import main

sys.exit(main())
