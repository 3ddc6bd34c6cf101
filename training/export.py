"""A trained model becomes classifiers/NAME: all that archive.sh needs, and nothing that needs training/ when it is served."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import nn

from torchserve_explain.archive import REFERENCES, WEIGHTS
from torchserve_explain.archiver import check_name
from torchserve_explain.errors import ArchiveError, TrainingError
from torchserve_explain.network import MODEL
from torchserve_explain.records import check_apart
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import Preprocessing
from training.architectures import direction
from training.data import PIXELS, Sample
from training.networks import BACKBONES

METRICS, LABELS, CONFIG = "metrics.json", "labels.json", "model-config.yaml"
REFERENCES_EACH, REFERENCES_MOST = 3, 30  # of a class, and of all
HEAD = "# TorchServe's keys that are left out here, and what they mean: deploy/model-config.yaml.\n"


@dataclass(frozen=True)
class Architecture:
    """The network as model-config.yaml names it, and the text of its model.py where it has one."""

    name: str
    source: str | None = None


def architecture_of(backbone: str) -> Architecture:
    """Return the architecture of a backbone with a head of its own."""
    path = BACKBONES[backbone].source
    return Architecture(backbone) if path is None else Architecture(MODEL, path.read_text(encoding="utf-8"))


def direction_architecture(backbone: str, length: int) -> Architecture:
    """Return the architecture of a direction among `length` features of a backbone: its own file, the class, the two joined."""
    path = BACKBONES[backbone].source
    if path is None:
        start, network = "from torchvision.models import get_model", f"get_model({backbone!r}, weights=None)"
    else:
        start, network = path.read_text(encoding="utf-8").rstrip(), "EfficientNetLite0()"
    joined = f"""class Model(Direction):
    def __init__(self) -> None:
        super().__init__({network}.features, {length})
"""
    return Architecture(MODEL, "\n\n\n".join([start, inspect.getsource(direction).rstrip(), joined]))


def check_out(out: Path, data: Path) -> None:
    """Raise TrainingError where a folder cannot be written or archived, or holds what training has not made."""
    if out.exists() and not out.is_dir():
        raise TrainingError(f"--out: {out} is a file; allowed: a folder, such as classifiers/NAME")
    try:
        check_name("model name", out.resolve().name)
        check_apart(data, out)
        new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        if new:
            out.rmdir()
    except (ArchiveError, OSError) as error:
        raise TrainingError(f"--out: {error}") from None
    if out.exists() and any(out.iterdir()) and not (out / METRICS).exists():
        raise TrainingError(f"--out: {out} holds another classifier; allowed: a new folder, or one that training has written")


def export(
    out: Path, model: nn.Module, architecture: Architecture, labels: list[str], preprocessing: Preprocessing, method: str
) -> None:
    """Write weights, labels, configuration and the network's file."""
    save_file({name: tensor.cpu().clone().contiguous() for name, tensor in model.state_dict().items()}, out / WEIGHTS)
    (out / LABELS).write_text(json.dumps(labels, ensure_ascii=False, indent=1), encoding="utf-8")
    config = {
        "classifier": {"architecture": architecture.name},
        "preprocessing": preprocessing.model_dump(mode="json"),
        "explanations": {"defaults": {"method": method}},
    }
    (out / CONFIG).write_text(HEAD + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if architecture.source is not None:
        (out / MODEL).write_text(architecture.source, encoding="utf-8")
    else:
        (out / MODEL).unlink(missing_ok=True)  # of an earlier training with another backbone


def write_references(out: Path, samples: Sequence[Sample], preprocessing: Preprocessing) -> None:
    """Write what the model sees of a few images of each class, or of as many classes as there may be references."""
    own: dict[int, list[Sample]] = {}
    for sample in samples:
        own.setdefault(sample.label, []).append(sample)
    step = max(1, len(own) / REFERENCES_MOST)
    chosen = [list(own.values())[int(place * step)] for place in range(min(len(own), REFERENCES_MOST))]
    found = [some[rank] for rank in range(REFERENCES_EACH) for some in chosen if rank < len(some)]
    shutil.rmtree(out / REFERENCES, ignore_errors=True)  # of an earlier training
    (out / REFERENCES).mkdir()
    for number, sample in enumerate(found[:REFERENCES_MOST]):
        seen = read_picture(sample.path.read_bytes(), preprocessing, PIXELS).seen
        seen.save(out / REFERENCES / f"{number:02d}.jpg", quality=95, subsampling=0)


def write_metrics(out: Path, metrics: dict[str, Any]) -> None:
    """Write what was measured; a folder that holds it was made by training."""
    out.mkdir(parents=True, exist_ok=True)
    (out / METRICS).write_text(json.dumps(metrics, ensure_ascii=False, indent=1), encoding="utf-8")
