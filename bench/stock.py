"""TorchServe's own image_classifier, archived as its documentation says."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# A process of its own: the archiver clears a folder named after the model under TMPDIR.
PACK = "from model_archiver.model_packaging import generate_model_archive; generate_model_archive()"


def build_stock(
    name: str, model: Path, weights: Path, labels: Sequence[str], store: Path, scratch: Path, beside: Sequence[Path] = ()
) -> None:
    """Archive a network, the one class of `model` with a state dict, for the stock handler.

    `beside` are files that `model` imports; `scratch` is a folder to be made.
    """
    scratch.mkdir()
    names, config = scratch / "index_to_name.json", scratch / "stock.yaml"
    names.write_text(json.dumps(dict(enumerate(labels))))
    config.write_text("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\n")
    options = {
        "--model-name": name,
        "--version": "1.0",
        "--handler": "image_classifier",
        "--model-file": model,
        "--serialized-file": weights,
        "--extra-files": ",".join(map(str, (names, *beside))),
        "--config-file": config,
        "--export-path": store,
    }
    (scratch / "tmp").mkdir()
    command = [sys.executable, "-c", PACK, *(str(part) for pair in options.items() for part in pair)]
    subprocess.run(command, check=True, env=os.environ | {"TMPDIR": str(scratch / "tmp")})
