"""What surrounds the server: archives are built, served and shown."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where an archive's code lies flat, it lies here in handlers/.
sys.path.insert(0, str(ROOT / "handlers"))
