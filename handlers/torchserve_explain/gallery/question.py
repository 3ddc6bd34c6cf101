"""What is asked: which pictures of a folder, which methods with which parameters, which class is explained."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from torch import Tensor

from torchserve_explain.archive import Archive
from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case, Method
from torchserve_explain.attribution.rows import Contrast, Versus
from torchserve_explain.attribution.scores import resolved, score_of
from torchserve_explain.errors import ArchiveError
from torchserve_explain.records import SUFFIXES
from torchserve_explain.serving.errors import shown
from torchserve_explain.serving.parameters import PARAMETERS, Capabilities, Parameters, read_parameters

PREDICTED, LABEL = "predicted", "label"  # the class that is explained
NOTHING = "nothing"  # that it is compared with
# Options of their own, or of an answer to a client.
APART = {"method", "target", "versus", "output", "values", "quality", "audit", "region"}
NAMED = 20  # labels that an error names, the nearest ones


@dataclass(frozen=True)
class GallerySample:
    """A picture by its path in the folder, and its label where subfolders tell one."""

    path: str
    label: str | None


def find_samples(folder: Path, labels: Sequence[str]) -> list[GallerySample]:
    """Return a folder's pictures in order: those of a subfolder for each label, or unlabelled ones; raises ArchiveError."""
    if not folder.is_dir():
        raise ArchiveError(f"{folder} is no folder")
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = _pictures(folder, folder.iterdir())
    if subfolders and loose:
        raise ArchiveError(f"{folder} holds pictures beside subfolders, such as {loose[0].name}; allowed: one or the other")
    for subfolder in subfolders:
        check_label("subfolder", subfolder.name, labels)
    labelled = [(path, subfolder.name) for subfolder in subfolders for path in _pictures(folder, subfolder.rglob("*"))]
    samples = [
        GallerySample(path.relative_to(folder).as_posix(), label) for path, label in (*labelled, *((p, None) for p in loose))
    ]
    if not samples:
        raise ArchiveError(f"{folder} holds no picture; allowed: names that end in {', '.join(sorted(SUFFIXES))}")
    return samples


def check_label(what: str, name: str, labels: Sequence[str]) -> None:
    """Raise ArchiveError where a name, such as a subfolder's, is no label; names the nearest ones."""
    if name not in labels:
        near = ", ".join(get_close_matches(name, labels, NAMED, 0))
        more = f" and {len(set(labels)) - NAMED} more" if len(set(labels)) > NAMED else ""
        raise ArchiveError(f"{what} {shown(name)} is no label of the classifier; allowed: {near}{more}")


def _pictures(folder: Path, paths: Iterator[Path]) -> list[Path]:
    """Return the pictures among paths below a folder; what is hidden, or lies in something hidden, is none."""
    pictures = (path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in pictures if not any(part.startswith(".") for part in path.relative_to(folder).parts))


@dataclass(frozen=True)
class Question:
    """What is asked of every picture: the methods under the names that their maps get, which class they explain, and
    what it is compared with: nothing, a contrast, or where the prediction is wrong the label."""

    archive: Archive
    parameters: Parameters
    methods: dict[str, Method]
    target: str
    versus: str = LABEL

    @cached_property
    def settings(self) -> dict[str, str]:
        """All that a map and its overlay depend on beside the picture, for each map's name, as a digest."""
        asked, limits = self.parameters, self.archive.settings.explanations.limits
        explained = (self.target, self.versus, asked.score)
        common = (self.archive.digest, explained, asked.smoother(), asked.seed)
        drawing = (asked.colormap, asked.overlay, asked.clip)
        return {
            name: digest_of(repr((common, limits.most(method), drawing, method)).encode())
            for name, method in self.methods.items()
        }

    def classes(self, label: str | None, logits: Tensor) -> tuple[int, Versus | None]:
        """Return the class of a picture with logits [classes] that is explained, and what it is compared with.

        Of several classes that share its label the likeliest counts.
        """
        predicted = int(logits.argmax())
        own = max(self.archive.classes(label), key=lambda index: float(logits[index]), default=predicted)
        target = predicted if self.target == PREDICTED else own
        if self.versus == LABEL:
            return target, None if own == target else own
        return target, None if self.versus == NOTHING else resolved(Contrast(self.versus), logits, target)

    def job(self, name: str, image: Tensor, target: int, versus: Versus | None, logits: Tensor) -> Job:
        """Return the job of a map of an image [C, H, W] with logits [classes]."""
        classifier, asked = self.archive.classifier, self.parameters
        score = score_of(classifier.head, logits, target, asked.score, versus)
        method, limits = self.methods[name], self.archive.settings.explanations.limits
        placed = image.to(classifier.device, classifier.dtype)
        case = Case(classifier, placed, target, asked.score, score, asked.seed, budget=limits.most(method), versus=versus)
        return Job(method, case, asked.smoother())


def ask(archive: Archive, methods: str | None, target: str, given: Mapping[str, str], versus: str = LABEL) -> Question:
    """Read the methods' names and `given` parameters as the server does, the archive's defaults beneath.

    Raises ArchiveError, RequestError or Unsupported, naming what is allowed.
    """
    allowed = [name for name in PARAMETERS if name not in APART]
    if unknown := [name for name in given if name not in allowed]:
        raise ArchiveError(f"--set {shown(unknown[0])} is not allowed; allowed: {', '.join(allowed)}")
    if archive.classifier.head is Head.NONE:
        raise ArchiveError("the archive answers quantities; allowed: a classifier, by whose classes a gallery is sorted")
    asked = {"method": methods} if methods else {}
    parameters = read_parameters(archive.settings.explanations.defaults, asked, given, {"region": "crop"})
    chosen: dict[str, Method] = {}
    contrast = Contrast(versus) if versus in list(Contrast) else None
    capabilities = Capabilities(archive.classifier, archive.settings.explanations.methods)
    for name in capabilities.choose(parameters.method, parameters.score, contrast):
        for method in (several := parameters.methods(name)):
            layer = getattr(method, "layer", None)
            if layer is not None:
                archive.classifier.grid_layer(layer)
            if (baseline := getattr(method, "baseline", None)) is not None:
                baseline.size(archive.classifier)
            chosen[name if len(several) == 1 else f"{name}-{layer}"] = method
    return Question(archive, parameters, chosen, target, versus)


def digest_of(data: bytes) -> str:
    """Return what tells contents apart."""
    return hashlib.sha256(data).hexdigest()
