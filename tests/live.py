"""Live servers for the tests: archives built for them, TorchServe started on free ports, stopped afterwards."""

import importlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import ts
from PIL import Image

from bench.stock import build_stock as archive_stock
from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.servers.torchserve import free_ports, serving

# A network of TorchServe's own convention: model.py defines one class that is made without arguments.
SMALL_MODEL = """
from torchvision.models.resnet import BasicBlock, ResNet

class Small(ResNet):
    def __init__(self):
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=7)
"""
SMALL_LABELS = ["ant", "bee", "cat", "dog", "emu", "cat", "new york, ny"]
SMALL_CONFIG = """
continuousBatching: false
minWorkers: 1
maxWorkers: 2  # one torch thread for the one worker that is started: steadier beside other processes
batchSize: 8
maxBatchDelay: 100
responseTimeout: 120
explanations:
  limits: {evaluations: 700, targets: 3, pixels: 1000000, seconds: 60, instances: 4, pack: 8}
"""
CONTINUOUS = "explanations:" + SMALL_CONFIG.partition("explanations:")[2]  # with the default's continuous batching


def small_files(folder: Path, config: str = SMALL_CONFIG) -> dict[str, Path]:
    """Write a small classifier's model.py, weights, labels and configuration."""
    namespace: dict[str, Any] = {"__name__": "model"}
    exec(SMALL_MODEL, namespace)
    torch.manual_seed(0)
    model = namespace["Small"]().eval()
    with torch.no_grad():
        model.fc.weight.mul_(20)  # so that its probabilities are not all alike
    files = {name: folder / name for name in ("model.py", "weights.pth", "labels.json", "model-config.yaml")}
    files["model.py"].write_text(SMALL_MODEL)
    torch.save(model.state_dict(), files["weights.pth"])
    files["labels.json"].write_text(json.dumps(SMALL_LABELS))
    files["model-config.yaml"].write_text(config)
    return files


def build_small(folder: Path, store: Path, config: str = SMALL_CONFIG) -> None:
    """Archive the small classifier as `small`."""
    files = small_files(folder, config)
    options = ["--model", files["model.py"], "--weights", files["weights.pth"], "--labels", files["labels.json"]]
    options += ["--config", files["model-config.yaml"], "--store", store]
    build_archive("small", parser().parse_args(["small", *map(str, options)]))


def build_stock(folder: Path, store: Path) -> None:
    """Archive the same classifier with TorchServe's own image_classifier as `stock`."""
    files = small_files(folder)
    archive_stock("stock", files["model.py"], files["weights.pth"], SMALL_LABELS, store, folder / "stock")


def served(names, store, run, **environment):
    """Serve archives on free ports from an empty folder, with nothing of this repository importable by the workers."""
    os.environ.pop("PYTHONPATH", None)
    return serving(names, store, free_ports() | environment, run)


def grpc_modules(folder: Path):
    """Compile the proto files that TorchServe ships; return its messages and its client."""
    from grpc_tools import protoc

    with zipfile.ZipFile(Path(ts.__file__).parent / "frontend" / "model-server.jar") as jar:
        jar.extractall(folder, [name for name in jar.namelist() if name.endswith(".proto")])
    options = [f"-I{folder}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    assert protoc.main(["protoc", *options, str(folder / "inference.proto"), str(folder / "google/rpc/status.proto")]) == 0
    sys.path.insert(0, str(folder))
    return importlib.import_module("inference_pb2"), importlib.import_module("inference_pb2_grpc")


def white(size=(240, 200)) -> bytes:
    """Return an encoded image without shapes."""
    stream = io.BytesIO()
    Image.new("RGB", size, "white").save(stream, "PNG")
    return stream.getvalue()


def picture(seed=0, size=(240, 200), form="JPEG") -> bytes:
    """Return an encoded image with shapes of its own."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(6, 7, 3, generator=generator) * 255).byte().numpy()
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(stream, form)
    return stream.getvalue()
