"""Networks built by the name of their architecture with weights loaded, and class names read."""

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.models import get_model, list_models

from torchserve_explain.errors import ArchiveError

MODEL = "model.py"
TIMM = "timm/"  # what an architecture of that library is called by


def build_network(architecture: str, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """Build the network with as many classes as the weights have, and load them; raises ArchiveError."""
    build = _builder(architecture, folder)
    network = build({})
    classes = _classes_of(network.state_dict(), state)
    if classes is not None:
        network = build({"num_classes": classes})
    missing, unknown, shapes = _misfits(network.state_dict(), state)
    missing = [key for key in missing if key not in _counters(network)]
    for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if keys:
            raise ArchiveError(
                f"the weights do not fit {architecture}: {len(keys)} tensors {what}, such as {', '.join(keys[:3])}"
            )
    network.load_state_dict(dict(state))
    return network


def read_labels(path: Path) -> list[str]:
    """Read class names: a JSON list, TorchServe's JSON {"0": name, ...}, or one name a line; raises ArchiveError."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        content: Any = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        content = json.loads(text)
    if isinstance(content, dict):
        try:
            content = [content[str(index)] for index in range(len(content))]
        except KeyError as missing:
            raise ArchiveError(f"{path.name}: class {missing} has no label; allowed: indices from 0 without a gap") from None
    if not isinstance(content, list) or not content:
        raise ArchiveError(f"{path.name}: allowed: a list of names, or an object from index to name")
    names = [name[-1] if isinstance(name, list) and name else name for name in content]  # ["n02123045", "tabby"]
    if not all(isinstance(name, str) for name in names):
        raise ArchiveError(f"{path.name}: a label is not a string")
    return names


Builder = Callable[[dict[str, Any]], nn.Module]


def _builder(architecture: str, folder: Path) -> Builder:
    if architecture == MODEL:
        return _own_builder(folder / MODEL)
    if architecture.startswith(TIMM):
        return _timm_builder(architecture.removeprefix(TIMM))
    if architecture not in list_models(module=models):
        raise ArchiveError(
            f"architecture {architecture!r} is unknown; allowed: {MODEL}, a torchvision classifier such as resnet18, "
            f"or {TIMM} and the name of one of timm's"
        )
    return lambda options: get_model(architecture, weights=None, **options)


def _timm_builder(name: str) -> Builder:
    try:
        import timm
    except ImportError:
        raise ArchiveError(f"architecture {TIMM}{name}: the package timm is not installed") from None
    if name not in timm.list_models():
        raise ArchiveError(f"architecture {TIMM}{name} is unknown to timm {timm.__version__}")
    return lambda options: timm.create_model(name, **options)


def _own_builder(path: Path) -> Builder:
    """Find the nn.Module that model.py defines: its only public one, or the one called Model."""
    if not path.exists():
        raise ArchiveError(f"architecture: {MODEL} does not exist")
    module = run_module(path)
    found = {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == "model" and not name.startswith("_")
    }
    chosen = found.get("Model") or (next(iter(found.values())) if len(found) == 1 else None)
    if chosen is None:
        raise ArchiveError(
            f"{MODEL} must define one public nn.Module, or call it Model; it defines {', '.join(found) or 'none'}"
        )
    resizable = "num_classes" in inspect.signature(chosen).parameters
    return lambda options: chosen(**options) if resizable else chosen()


def run_module(path: Path) -> ModuleType:
    """Run a Python file of an archive as a module that nothing else can import."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _classes_of(built: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int | None:
    """Return the weights' number of classes where it is all that distinguishes them from what was built."""
    other = {
        (len(built[key]), len(state[key]))
        for key in built.keys() & state.keys()
        if built[key].shape != state[key].shape and built[key].dim() and state[key].dim()
    }
    return next(iter(other))[1] if len(other) == 1 else None


def _counters(network: nn.Module) -> set[str]:
    """Return the batch norms' counters of batches: weights saved before torch 0.4.1 have none, and torch needs none."""
    norms = (name for name, module in network.named_modules() if isinstance(module, _BatchNorm))
    return {f"{name}.num_batches_tracked".removeprefix(".") for name in norms}


def _misfits(built: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    both = built.keys() & state.keys()
    shapes = (f"{key} {list(state[key].shape)} for {list(built[key].shape)}" for key in sorted(both))
    differing = [text for text, key in zip(shapes, sorted(both), strict=True) if built[key].shape != state[key].shape]
    return sorted(built.keys() - both), sorted(state.keys() - both), differing
