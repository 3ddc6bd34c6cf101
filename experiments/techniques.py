"""Report 2: eight techniques on one photo of a triceratops, by two networks: how steady each map is, and how long it takes."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.models import get_model

from experiments.output import arguments, carried_out, heatmap, overlaid, save_sheet, write
from experiments.trained import PACK, Row
from study.techniques import EIGHT, Technique
from torchserve_explain.archiver import read_weights
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Result
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Attribution, Case
from torchserve_explain.attribution.quality import MaxSensitivity, Measurement
from torchserve_explain.serving.images import Picture, read_picture
from torchserve_explain.serving.settings import Preprocessing
from training.data import PIXELS
from training.networks import build_pretrained, preprocessing_for

CHEAP = tuple(Technique(name, METHODS[name]()) for name in ("grad_cam", "biased_layer"))  # that the report did not try
REPORTED = dict(zip((one.name for one in EIGHT), (0.400, 0.104, 0.088, 1.040, 0.030, 3.567, 0.152, 0.155), strict=True))
SQUEEZENET = "squeezenet1_1"


def main() -> None:
    """Run the experiment that the command line asks for."""
    options = arguments("techniques", __doc__, _more)
    names = ["lite0", *([SQUEEZENET] if options.squeezenet is not None else [])]
    tables: dict[str, list[Row]] = {}
    for name in names:
        picture = read_picture(options.data.read_bytes(), preprocessing_of(name), PIXELS)
        engine = engine_of(name, options.squeezenet)
        tables[name] = measure(engine, picture, options.perturbations, options.out / f"{name}.webp")
    write(options.out, {"perturbations": options.perturbations}, tables)


def _more(command: argparse.ArgumentParser) -> None:
    command.add_argument("--squeezenet", type=Path, help=f"the state dict of torchvision's {SQUEEZENET}, ImageNet's classes")
    command.add_argument("--perturbations", type=int, default=10, help="of max sensitivity (default: %(default)s)")


def preprocessing_of(name: str) -> Preprocessing:
    """Return how a photo becomes a network's input; SqueezeNet's is that of torchvision's others."""
    return preprocessing_for("resnet18" if name == SQUEEZENET else name, 224)


def engine_of(name: str, weights: Path | None) -> Engine:
    """Return the passes of a network with ImageNet's classes."""
    preprocessing = preprocessing_of(name)
    if name == SQUEEZENET and weights is not None:
        model = get_model(SQUEEZENET, weights=None)
        model.load_state_dict({key: tensor.float() for key, tensor in read_weights(weights).items()})
    else:
        model = build_pretrained(name)
    return Engine(Classifier(model, preprocessing.normalization, preprocessing.size), PACK)


def measure(engine: Engine, picture: Picture, perturbations: int, path: Path) -> list[Row]:
    """Explain the predicted class by each technique; draw positive and blended maps; return steadiness, time and rows."""
    logits = engine.logits([picture.input])[0]
    target = int(logits.argmax())
    case = Case(engine.classifier, picture.input, target, known_score=float(logits[target]))
    chosen = [one for one in (*EIGHT, *CHEAP) if one.method.unsupported(engine.classifier) is None]
    pixels = np.asarray(picture.seen)
    cells = [(Image.fromarray(pixels), f"class {target}", f"probability {float(logits.softmax(0)[target]):.3f}")] * 2
    rows: list[Row] = []
    for technique in chosen:
        job = Job(technique.method, case, technique.smoothing)
        finished, milliseconds = timed(engine, job)
        (steady,) = engine.results([Measurement(MaxSensitivity(samples=perturbations), job, finished.value)])
        values = finished.value.map.sum(0).float().cpu().numpy()
        cells += [(heatmap(values), technique.name, "positive part"), (overlaid(pixels, values), technique.name, "blended")]
        rows.append(
            {
                "technique": technique.name,
                "max sensitivity": steady.value.value,
                "in the report, on ResNet-18": REPORTED.get(technique.name),
                "processor, ms": round(milliseconds),
                "rows": finished.evaluations,
            }
        )
    save_sheet(path, cells, 112, 6)
    return rows


def timed(engine: Engine, job: Job) -> tuple[Result[Attribution], float]:
    """Make a map twice; return it, and the milliseconds of processor that the second one took, whatever else runs beside it."""
    engine.results([job])
    began = time.process_time()
    (finished,) = engine.results([job])
    return finished, 1000 * (time.process_time() - began)


if __name__ == "__main__":
    sys.exit(carried_out(main))
