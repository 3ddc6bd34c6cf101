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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchserve_explain.archive import ABOUT, CONFIG, LABELS, PREPROCESS, REFERENCES, WEIGHTS, Archive, about
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.attribution.randomisation import randomisation
from torchserve_explain.errors import ArchiveError
from torchserve_explain.network import MODEL, read_labels
from torchserve_explain.paths import HANDLER, PACKAGE, ROOT, STORE, classifier_folder, packaged
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.pictures import png
from torchserve_explain.serving.service import Service
from torchserve_explain.serving.settings import Settings

WEIGHT_FILES = (WEIGHTS, "weights.pth", "weights.pt")  # of a classifier's folder; the first that exists
LABEL_FILES = ("labels.txt", "labels.json", LABELS)
DEFAULT_CONFIG = packaged("deploy") / CONFIG
CLASSIC = {"batchSize": 8, "maxBatchDelay": 20}  # the defaults where a configuration says continuousBatching: false
CHECKED, UNNOTICED = 3, 0.5  # photos; a rank correlation above which a method is said to hardly notice shuffled weights
# What TorchServe 0.12 reads of a model-config.yaml.
FRONTEND_KEYS = {
    *("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "maxRetryTimeoutInSec"),
    *("jobQueueSize", "useJobTicket", "deviceType", "deviceIds", "parallelType", "parallelLevel", "torchrun", "useVenv"),
    *("asyncCommunication", "continuousBatching", "sequenceBatching"),
}


def check_name(what: str, text: str) -> None:
    """Raise ArchiveError where a text cannot be a model's name or version."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise ArchiveError(f"{text[:100]!r} is no {what}; allowed: up to 100 letters, digits, '.', '_' and '-'")


def build_archive(name: str, options: argparse.Namespace) -> Path:
    """Build, check and store an archive; return its path. Raises ArchiveError.

    Everything happens in a folder of its own, and the finished archive replaces the old one in one step.
    """
    check_name("model name", name)
    check_name("version", options.version)
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary, "stage")
        shutil.copytree(PACKAGE, stage / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "files"))
        shutil.copyfile(HANDLER, stage / HANDLER.name)
        (stage / ABOUT).write_text(about(), encoding="utf-8")
        collect(classifier_folder(name), options, stage)
        check(stage, options.check)
        archive = package(name, options.version, stage, Path(temporary))
        options.store.mkdir(parents=True, exist_ok=True)
        unfinished = options.store / f".{name}.{os.getpid()}.mar"
        shutil.copyfile(archive, unfinished)
        stored: Path = unfinished.replace(options.store / f"{name}.mar")
        return stored


def collect(folder: Path, options: argparse.Namespace, stage: Path) -> None:
    """Bring configuration, weights, labels and the user's model into the stage; options come before the folder's files."""
    if not folder.exists() and not options.weights:
        raise ArchiveError(
            f"there is no classifiers/{folder.name}; give --weights and --arch (or --model) to archive a checkpoint"
        )
    config = _first(options.config, folder / CONFIG) or DEFAULT_CONFIG
    content = complete(read_config(config))
    if options.arch or options.model:
        content["classifier"] = {**(content.get("classifier") or {}), "architecture": options.arch or MODEL}
    if not content.get("classifier"):
        raise ArchiveError(
            "the architecture is missing: give --arch or --model, or 'classifier: {architecture: resnet18}' in " + CONFIG
        )
    preprocess = _first(options.preprocess, folder / PREPROCESS)
    if preprocess is not None:
        shutil.copyfile(preprocess, stage / PREPROCESS)
        content["preprocessing"] = {**(content.get("preprocessing") or {}), "code": PREPROCESS}
    (stage / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    model = _first(options.model, folder / MODEL)
    if model is not None and content.get("classifier", {}).get("architecture") == MODEL:
        shutil.copyfile(model, stage / MODEL)
    references = _first(options.references, folder / REFERENCES)
    if references is not None:
        shutil.copytree(references, stage / REFERENCES, ignore=shutil.ignore_patterns(".*"))
    source = read_source(folder)
    weights = _first(options.weights, *(folder / name for name in WEIGHT_FILES))
    if weights is None and source is None:
        raise ArchiveError(
            f"no weights: give --weights, or put {', '.join(WEIGHT_FILES)} or source.py into classifiers/{folder.name}"
        )
    state = source.state_dict() if weights is None else read_weights(weights)
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in state.items()}, stage / WEIGHTS)
    labels = _first(options.labels, *(folder / name for name in LABEL_FILES))
    # A folder's source knows the labels of its own weights, not of others.
    names = _labels(labels) if labels else source.labels() if source and weights is None else []
    if names:
        (stage / LABELS).write_text(json.dumps(dict(enumerate(names)), ensure_ascii=False), encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """Read a model-config.yaml; raises ArchiveError where it is not a mapping, or holds a key that nobody reads."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArchiveError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ArchiveError(f"{path.name} holds a {type(content).__name__}; allowed: keys and values")
    known = {*Settings.model_fields, *FRONTEND_KEYS}
    if unknown := [str(key) for key in content if key not in known]:
        raise ArchiveError(f"{path.name}: unknown key {unknown[0]}; allowed: {', '.join(sorted(known))}")
    return content


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with what it leaves out as in the default one; batching depends on its mode."""
    classic = CLASSIC if given.get("continuousBatching") is False else {}
    return read_config(DEFAULT_CONFIG) | classic | given


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from a checkpoint, without running any code it may hold; raises ArchiveError."""
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ArchiveError(f"{path.name} is not a checkpoint: {error}") from None
    except Exception as error:  # weights_only refuses by pickle.UnpicklingError, and others with what they stumble on
        raise ArchiveError(f"{path.name} is not a state dict that is safe to load ({type(error).__name__}): "
                      "save model.state_dict(), not the model") from None  # fmt: skip
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    if not named or not content:
        raise ArchiveError(f"{path.name} holds no state dict: save model.state_dict()")
    if broken := [key for key, tensor in content.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise ArchiveError(f"{path.name}: {broken[0]} holds numbers that are not finite")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""  # of DataParallel
    return {key.removeprefix(prefix): tensor for key, tensor in content.items()}


def check(stage: Path, weights: bool = False) -> None:
    """Load the stage as a worker will; raises ArchiveError with the reason where that fails.

    With `weights` the randomisation test of the served methods is printed, too.
    """
    try:
        archive = Archive.load(stage, compiles=False)
        service = Service(
            archive.classifier, archive.labels, archive.settings, {"name": "check", "version": "0"}, archive.digest
        )
        service.warm_up(Engine(archive.classifier, service.limits.pack))
        read_picture(png(Image.new("RGB", (320, 240), "gray")), archive.settings.preprocessing, service.limits.pixels)
    except (Exception, SystemExit) as error:  # a user's model.py may raise anything
        raise ArchiveError(str(error) or type(error).__name__) from error
    for method, why in service.refused.items():
        print(f"{method} cannot serve it: {why}")
    if weights:
        print_randomisation(archive, service.methods, service.limits.pack)


def print_randomisation(archive: Archive, methods: Iterable[str], pack: int) -> None:
    """Print, method by method, how alike maps are once the weights are shuffled, over packaged photos."""
    from torchserve_explain.photo import pictures  # which asks for rich, as archiving alone does not

    trained = archive.classifier
    photos = [picture.input for _, picture in pictures(None, archive.settings.preprocessing)][:CHECKED]
    images = [photo.to(trained.device, trained.dtype) for photo in photos]
    engines = Engine(trained, pack), Engine(trained.shuffled(), pack)
    print(f"{'without its weights':24} {'rank correlation':>16} {'SSIM':>6} {'complexity rise':>16}")
    for name in methods:
        found = randomisation(METHODS[name](), *engines, images)
        if found is None:
            print(f"{name:24} no map")
            continue
        hardly = "  hardly notices that they are gone" if found.rank_correlation > UNNOTICED else ""
        figures = f"{found.rank_correlation:16.2f} {found.similarity:6.2f} {found.complexity_rise:16.0%}"
        print(f"{name:24} {figures}{hardly}", flush=True)
    for engine in engines:
        engine.close()


def package(name: str, version: str, stage: Path, temporary: Path) -> Path:
    """Pack the stage with TorchServe's archiver, which deletes what it finds in its temporary folder first."""
    arguments = {
        "--model-name": name,
        "--version": version,
        "--handler": stage / HANDLER.name,
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
        raise ArchiveError(f"torch-model-archiver failed: {result.stderr.strip()[-500:]}")
    return temporary / f"{name}.mar"


def is_stale(name: str, store: Path) -> bool:
    """Whether the archive is missing or older than what it is built from."""
    archive = store / f"{name}.mar"
    found = (path for top in (PACKAGE, classifier_folder(name)) for path in top.rglob("*") if path.is_file())
    sources = [HANDLER, DEFAULT_CONFIG, *(path for path in found if "__pycache__" not in path.parts)]
    return not archive.exists() or archive.stat().st_mtime < max(path.stat().st_mtime for path in sources)


def ensure_archive(name: str, store: Path = STORE) -> Path:
    """Build an archive if it is missing, or older than its sources; return its path. Raises ArchiveError."""
    archive, has_sources = store / f"{name}.mar", classifier_folder(name).exists()
    if has_sources and is_stale(name, store):
        print(f"building {archive}", flush=True)
        build_archive(name, parser().parse_args([name, "--store", str(store)]))
    elif not has_sources and not archive.exists():
        folders = (path for top in (ROOT / "classifiers", packaged("classifiers")) if top.exists() for path in top.iterdir())
        known = sorted({*(path.name for path in folders), *(path.stem for path in store.glob("*.mar"))})
        raise ArchiveError(f"{name} is neither in classifiers/ nor in {store.name}/; there are {', '.join(known)}")
    return archive


def load_archive(name: str, store: Path = STORE, scale: int = 1) -> Archive:
    """Load an archive by its name, built if missing or stale, onto the fastest device; see Archive.load."""
    keep_freed_memory()
    return Archive.load(ensure_archive(name, store), "cuda" if torch.cuda.is_available() else "cpu", scale)


def parser() -> argparse.ArgumentParser:
    """Return the command line that describes an archive."""
    command = argparse.ArgumentParser(description=__doc__)
    add_arguments(command)
    return command


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what an archive is made of to a command line."""
    command.add_argument("name", help="the model's name; classifiers/NAME/ is read if it exists")
    network = command.add_mutually_exclusive_group()
    network.add_argument("--arch", help="a torchvision architecture, such as resnet34; or timm/ and the name of one of timm's")
    network.add_argument("--model", type=_existing, help="a model.py that defines the network as an nn.Module")
    command.add_argument("--weights", type=_existing, help="a state dict: .safetensors, or .pt/.pth (loaded with weights_only)")
    command.add_argument("--labels", type=_existing, help='class names: a JSON list, {"0": name, ...}, or one name a line')
    command.add_argument("--config", type=_existing, help="a model-config.yaml (default: ImageNet preprocessing)")
    command.add_argument("--preprocess", type=_existing, help="a preprocess.py that makes the model's input of a picture")
    command.add_argument(
        "--references", type=_folder, help="a folder of pictures that explanations may compare with (baseline=references)"
    )
    command.add_argument("--version", default="1.0", help="the model's version (default: %(default)s)")
    command.add_argument("--check", action="store_true", help="tell which methods hardly notice when the weights are shuffled")
    command.add_argument("--store", type=Path, default=STORE, help="where archives go (default: model_store)")


def main(options: argparse.Namespace) -> int:
    """Build the archive that the command line describes."""
    try:
        archive = build_archive(options.name, options)
    except (ArchiveError, OSError) as reason:
        print(f"archive: {options.name} is not archived: {reason}", file=sys.stderr)
        return 1
    print(f"{archive} ({archive.stat().st_size / 1e6:.1f} MB)")
    return 0


def _first(*paths: Path | None) -> Path | None:
    """Return the first path that exists."""
    return next((path for path in paths if path is not None and path.exists()), None)


def _labels(path: Path) -> list[str]:
    try:
        return read_labels(path)
    except ValueError as error:  # neither UTF-8 nor JSON are ValueErrors too
        raise ArchiveError(f"{path.name} holds no labels: {error}") from None


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def _folder(text: str) -> Path:
    path = Path(text)
    if not (path.is_dir() and any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"{text} is no folder that holds pictures")
    return path


def read_source(folder: Path) -> Any:
    """Import a classifier's source.py, which says where weights and labels come from; it never travels."""
    if not (folder / "source.py").exists():
        return None
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("source", folder / "source.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:  # another classifier's source has another model.py
        sys.path.remove(str(folder))
        sys.modules.pop("model", None)
    return module
