"""An archive as the handler, the gallery, the study and the benchmarks load it: its classifier, ready on a device."""

import hashlib
import json
import logging
import platform
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from torchserve_explain import __version__
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.errors import ArchiveError, RequestError
from torchserve_explain.network import build_network, read_labels, run_module
from torchserve_explain.runtimes import choose_runtimes
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import Prepare, Settings, read_settings

log = logging.getLogger(__name__)
CONFIG, WEIGHTS, LABELS, ABOUT = "model-config.yaml", "weights.safetensors", "index_to_name.json", "archive.json"
REFERENCES = "references"  # the folder of pictures that explanations compare with
MOST_REFERENCES = 50
PREPROCESS = "preprocess.py"
MANIFEST = "MAR-INF"  # the folder of TorchServe's manifest, which holds the time of its making
FORMAT = 1  # of what an archive holds; an archive without a number has this one, too


@dataclass(frozen=True)
class Archive:
    """A classifier on its device, its labels (indices where it has none), its settings; `digest` tells contents apart.

    `version` is the model's, as the archive's manifest has it.
    """

    classifier: Classifier
    labels: list[str]
    settings: Settings
    digest: str
    version: str = "1.0"

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", scale: int = 1, compiles: bool = True) -> "Archive":
        """Load a .mar, or the folder of an unpacked one, for inputs `scale` times as high and wide as served.

        References are there for inputs of the served size alone. Unless it `compiles`, passes are PyTorch's, and nothing is
        measured. Raises ArchiveError where it cannot be read, or its parts do not fit each other.
        """
        with _unpacked(path) as folder:
            _check_format(path, folder)
            settings = read_settings(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) or {})
            if settings.preprocessing.code is not None:
                loaded = settings.preprocessing.prepared_by(_own_preprocessing(folder / PREPROCESS))
                settings = settings.model_copy(update={"preprocessing": loaded})
            height, width = (scale * side for side in settings.preprocessing.size)
            labels = read_labels(folder / LABELS) if (folder / LABELS).exists() else []
            classifier = load_classifier(folder, settings, device, (height, width), len(labels))
            if labels and len(labels) != classifier.classes:
                raise ArchiveError(f"{len(labels)} labels for a classifier of {classifier.classes} classes")
            if scale == 1:
                _refer(classifier, folder / REFERENCES, settings)
            names = labels or [str(index) for index in range(classifier.classes)]
            digest = digest_of(folder)
            if compiles:
                choose_runtimes(classifier, settings, digest)
            elif settings.explanations.arithmetic == "auto":
                classifier.stay_wide()
            return cls(classifier, names, settings, digest, _version(folder))

    def classes(self, label: str | None) -> list[int]:
        """Return the classes that are called so: several may share a label."""
        return [index for index, name in enumerate(self.labels) if name == label]


def load_classifier(
    folder: Path, settings: Settings, device: torch.device | str, size: tuple[int, int], labels: int = 0
) -> Classifier:
    """Build the network of an unpacked archive for inputs of height and width `size`; raises ArchiveError."""
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ArchiveError(f"{WEIGHTS} cannot be read: {error}") from None
    network = build_network(settings.classifier.architecture, folder, state)
    narrow = settings.explanations.arithmetic != "float32" and has_bfloat16(device)
    low = torch.bfloat16 if narrow else None
    try:
        head = settings.classifier.head
        return Classifier(network, settings.preprocessing.normalization, size, device, low, head, labels)
    except ValueError as error:
        raise ArchiveError(str(error)) from None
    except RuntimeError as error:
        raise ArchiveError(f"the model cannot take a {size[0]}x{size[1]} image: {error}") from None


def _own_preprocessing(path: Path) -> Prepare:
    """Return the function of a preprocess.py; raises ArchiveError."""
    if not path.exists():
        raise ArchiveError(f"preprocessing.code: {PREPROCESS} does not exist")
    function: Prepare | None = getattr(run_module(path), "preprocess", None)
    if not callable(function):
        raise ArchiveError(f"{PREPROCESS} must define preprocess(image), which returns pixels [C, H, W] and the part they show")
    return function


def _refer(classifier: Classifier, folder: Path, settings: Settings) -> None:
    """Give a classifier the pictures of a folder, if any, as references; raises ArchiveError naming one that is none."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if len(paths) > MOST_REFERENCES:
        raise ArchiveError(f"{len(paths)} references; allowed: at most {MOST_REFERENCES}")
    inputs: list[Tensor] = []
    for path in paths:
        try:
            picture = read_picture(path.read_bytes(), settings.preprocessing, settings.explanations.limits.pixels)
        except RequestError as reason:
            raise ArchiveError(f"{path.relative_to(folder.parent)}: {str(reason).removeprefix('data: ')}") from None
        inputs.append(picture.input)
    if inputs:
        try:
            classifier.compare_with(torch.stack(inputs))
        except ValueError as error:
            raise ArchiveError(str(error)) from None


def digest_of(folder: Path) -> str:
    """Return what tells the contents of unpacked archives apart, whenever they were built: a SHA-256 of their files'."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = ((path, path.relative_to(folder)) for path in files)
    members = [
        (name.as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path, name in relative
        if name.parts[0] != MANIFEST and "__pycache__" not in name.parts
    ]
    return hashlib.sha256(repr(members).encode()).hexdigest()


def about() -> str:
    """Return what an archive says of itself: its format, and what made it."""
    return json.dumps({"format": FORMAT, "made_by": f"torchserve-explain {__version__}"})


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        except (zipfile.BadZipFile, OSError) as error:
            raise ArchiveError(f"{path} is no archive: {error}") from None
        yield Path(folder)


def _check_format(path: Path, folder: Path) -> None:
    """Refuse what is no archive of this project, or one of another format."""
    what = "the archive" if path.is_dir() else path  # a worker's folder has no name of its own
    if not (folder / CONFIG).exists():
        raise ArchiveError(f"{what} holds no {CONFIG}; build it anew with torchserve-explain archive")
    about = folder / ABOUT
    found = json.loads(about.read_text(encoding="utf-8")).get("format") if about.exists() else FORMAT
    if found != FORMAT:
        raise ArchiveError(
            f"{what} has the format {found}, and torchserve-explain {__version__} reads {FORMAT}; "
            "build it anew with torchserve-explain archive"
        )


def _version(folder: Path) -> str:
    """Return the model's version of an unpacked archive, 1.0 where nothing tells it."""
    manifest = folder / MANIFEST / "MANIFEST.json"
    model = json.loads(manifest.read_text(encoding="utf-8")).get("model", {}) if manifest.exists() else {}
    return str(model.get("modelVersion", "1.0"))


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 is faster than float32 on a device; tells in the log where it is not."""
    cuda = torch.device(device).type == "cuda"
    has = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not cuda and platform.machine() == "x86_64":  # oneDNN emulates it on any AVX-512, and is slower then
        has = has and torch.cpu._is_avx512_bf16_supported()
    if not has:
        log.warning("explanations.arithmetic stays float32: this processor has no bfloat16")
    return bool(has)
