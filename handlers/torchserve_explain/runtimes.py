"""Which runtimes and arithmetic an archive's passes have on this machine: tried when it is loaded, and remembered."""

import json
import logging
import os
import platform
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from torchserve_explain import __version__
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.compiled import openvino_version
from torchserve_explain.attribution.trial import Pays
from torchserve_explain.errors import RequestError
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import Settings

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
PHOTO = files("skimage") / "data" / "coffee.png"


def choose_runtimes(classifier: Classifier, settings: Settings, digest: str) -> None:
    """Let a classifier's passes be compiled, and in narrower arithmetic, where its archive allows it and it pays here.

    What was measured is kept beside the archive's digest, the processor and the versions, and not measured again.
    """
    explanations, installed = settings.explanations, openvino_version()
    compiles = explanations.runtime == "auto" and installed is not None and classifier.device.type == "cpu"
    weighs = explanations.arithmetic == "auto" and classifier.narrow is not None
    if not compiles and not weighs:
        return
    size = classifier.example.shape[-2:]
    try:
        photo = _photo(settings, size)
    except RequestError as reason:  # the user's own preprocess.py may refuse it
        log.warning("passes stay PyTorch's, and their arithmetic: the packaged photo cannot be prepared: %s", reason)
        if weighs:
            classifier.stay_wide()
        return
    versions = f"torch {torch.__version__}, openvino {installed}, torchserve-explain {__version__}"
    key = f"{digest}, {tuple(size)}, {processor(classifier.device)}, {torch.get_num_threads()} threads, {versions}"
    seconds = settings.startupTimeout / 2 / (compiles + weighs)

    def settle(name: str, trial: Callable[[Tensor, int, float, Pays | None], Pays | None]) -> None:
        known = _kept().get(name)
        pays = trial(photo, explanations.limits.pack, seconds, known)
        if pays is not None and known is None:
            _keep(_kept() | {name: pays})  # others may have written meanwhile

    if compiles:
        settle(key, classifier.compile)
    if weighs:
        settle(f"{key}, {classifier.narrow} beside {classifier.runtimes}", classifier.weigh_narrow)
    log.info("runtimes: %s, arithmetic %s", classifier.runtimes, classifier.arithmetic)


def processor(device: torch.device = CPU) -> str:
    """Return the name of the processor that a device is."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}{', TF32' if torch.backends.cudnn.allow_tf32 else ''}"
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _photo(settings: Settings, size: torch.Size) -> torch.Tensor:
    """Return the packaged photo as the model's input [C, H, W]."""
    picture = read_picture(PHOTO.read_bytes(), settings.preprocessing, 10**8).input
    return torch.nn.functional.interpolate(picture[None], tuple(size), mode="bilinear")[0]


def _file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "torchserve-explain", "runtimes.json")


def _kept() -> dict[str, Pays]:
    """Return what was measured before; a file that does not say so is none."""
    try:
        return {key: Pays(one is True, many is True) for key, (one, many) in json.loads(_file().read_text()).items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):  # RuntimeError: there is no home
        return {}


def _keep(measured: dict[str, Pays]) -> None:
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}")
        unfinished.write_text(json.dumps({key: [pays.one, pays.many] for key, pays in measured.items()}, indent=1))
        unfinished.replace(file)
    except (OSError, RuntimeError) as error:
        log.info("what was measured is not kept: %s", error)
