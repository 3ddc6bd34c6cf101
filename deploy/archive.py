"""Builds model_store/NAME.mar: everything that a TorchServe needs to serve and explain one classifier."""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "handlers"))

import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from serving.loading import LABELS, MODEL, WEIGHTS, load_classifier, read_labels  # noqa: E402
from serving.service import Service  # noqa: E402
from serving.settings import read_settings  # noqa: E402

CONFIG = "model-config.yaml"
DEFAULT_CONFIG = ROOT / "deploy" / CONFIG


class Refused(Exception):
    """What was given cannot be served; the message says why."""


def build_archive(name: str, options: argparse.Namespace) -> Path:
    """Build, check and store an archive; return its path. Raises Refused.

    Everything happens in a folder of its own, and the finished archive replaces the old one in one step.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise Refused(f"{name!r} is no model name; allowed: letters, digits, '.', '_' and '-'")
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary, "stage")
        shutil.copytree(ROOT / "handlers", stage, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        collect(ROOT / "classifiers" / name, options, stage)
        check(stage)
        archive = package(name, options.version, stage, Path(temporary))
        options.store.mkdir(parents=True, exist_ok=True)
        unfinished = options.store / f".{name}.{os.getpid()}.mar"
        shutil.copyfile(archive, unfinished)
        stored: Path = unfinished.replace(options.store / f"{name}.mar")
        return stored


def collect(folder: Path, options: argparse.Namespace, stage: Path) -> None:
    """Bring configuration, weights, labels and the user's model into the stage; options come before the folder's files."""
    if not folder.exists() and not (options.weights and (options.arch or options.model)):
        raise Refused(f"there is no classifiers/{folder.name}; give --weights and --arch (or --model) to archive a checkpoint")
    config = _first(options.config, folder / CONFIG) or DEFAULT_CONFIG
    content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    if options.arch or options.model:
        content["classifier"] = {"architecture": options.arch or MODEL}
    (stage / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    model = _first(options.model, folder / MODEL)
    if model is not None and content.get("classifier", {}).get("architecture") == MODEL:
        shutil.copyfile(model, stage / MODEL)
    source = _source(folder)
    weights = _first(options.weights, folder / WEIGHTS)
    if weights is None and source is None:
        raise Refused(f"no weights: give --weights, or put {WEIGHTS} or source.py into classifiers/{folder.name}")
    state = source.state_dict() if weights is None else read_weights(weights)
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in state.items()}, stage / WEIGHTS)
    labels = _first(options.labels, folder / LABELS, folder / "labels.json", folder / "labels.txt")
    # A folder's source knows the labels of its own weights, not of others.
    names = read_labels(labels) if labels else source.labels() if source and weights is None else []
    if names:
        (stage / LABELS).write_text(json.dumps(dict(enumerate(names)), ensure_ascii=False), encoding="utf-8")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from a checkpoint, without running any code it may hold; raises Refused."""
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise Refused(f"{path.name} is not a checkpoint: {error}") from None
    except Exception as error:  # weights_only refuses by pickle.UnpicklingError, and others with what they stumble on
        raise Refused(f"{path.name} is not a state dict that is safe to load ({type(error).__name__}): "
                      "save model.state_dict(), not the model") from None  # fmt: skip
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise Refused(f"{path.name} holds no state dict: save model.state_dict()")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""  # of DataParallel
    return {key.removeprefix(prefix): tensor for key, tensor in content.items()}


def check(stage: Path) -> None:
    """Load the stage as a worker will; raises Refused with the reason where that fails."""
    try:
        settings = read_settings(yaml.safe_load((stage / CONFIG).read_text(encoding="utf-8")))
        classifier, labels = load_classifier(stage, settings)
        Service(classifier, labels, settings, {"name": "check", "version": "0"})
    except Exception as error:  # a user's model.py may raise anything
        raise Refused(str(error)) from error


def package(name: str, version: str, stage: Path, temporary: Path) -> Path:
    """Pack the stage with TorchServe's archiver, which deletes what it finds in its temporary folder first."""
    arguments = {
        "--model-name": name,
        "--version": version,
        "--handler": stage / "explain_handler.py",
        "--extra-files": stage,
        "--config-file": stage / CONFIG,
        "--export-path": temporary,
    }
    started = "from model_archiver.model_packaging import generate_model_archive; generate_model_archive()"
    command = [sys.executable, "-c", started, *(str(part) for pair in arguments.items() for part in pair)]
    scratch = temporary / "scratch"
    scratch.mkdir()
    result = subprocess.run(command, env=os.environ | {"TMPDIR": str(scratch)}, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Refused(f"torch-model-archiver failed: {result.stderr.strip()[-500:]}")
    return temporary / f"{name}.mar"


def is_stale(name: str, store: Path) -> bool:
    """Whether the archive is missing or older than what it is built from."""
    archive = store / f"{name}.mar"
    sources = [p for top in ("handlers", f"classifiers/{name}", "deploy") for p in (ROOT / top).rglob("*") if p.is_file()]
    sources = [path for path in sources if "__pycache__" not in path.parts]
    return not archive.exists() or archive.stat().st_mtime < max(path.stat().st_mtime for path in sources)


def parser() -> argparse.ArgumentParser:
    """The command line of archive.sh."""
    command = argparse.ArgumentParser(prog="./archive.sh", description=__doc__)
    command.add_argument("name", help="the model's name; classifiers/NAME/ is read if it exists")
    network = command.add_mutually_exclusive_group()
    network.add_argument("--arch", help="a torchvision architecture, such as resnet34")
    network.add_argument("--model", type=_existing, help="a model.py that defines the network as an nn.Module")
    command.add_argument("--weights", type=_existing, help="a state dict: .safetensors, or .pt/.pth (loaded with weights_only)")
    command.add_argument("--labels", type=_existing, help='class names: a JSON list, {"0": name, ...}, or one name a line')
    command.add_argument("--config", type=_existing, help="a model-config.yaml (default: ImageNet preprocessing)")
    command.add_argument("--version", default="1.0", help="the model's version (default: %(default)s)")
    command.add_argument("--store", type=Path, default=ROOT / "model_store", help="where archives go (default: model_store)")
    return command


def main() -> int:
    """Build the archive that the command line asks for."""
    options = parser().parse_args()
    try:
        archive = build_archive(options.name, options)
    except Refused as reason:
        print(f"archive.sh: {options.name} is not archived: {reason}", file=sys.stderr)
        return 1
    print(f"{archive} ({archive.stat().st_size / 1e6:.1f} MB)")
    return 0


def _first(*paths: Path | None) -> Path | None:
    """Return the first path that exists."""
    return next((path for path in paths if path is not None and path.exists()), None)


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def _source(folder: Path) -> Any:
    """Import a classifier's source.py, which says where weights and labels come from; it never travels."""
    if not (folder / "source.py").exists():
        return None
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("source", folder / "source.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
