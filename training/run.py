"""An experiment is run: read, learn, evaluate, export, report."""

import platform
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.records import readable
from torchserve_explain.serving.settings import Limits
from training.data import SPLITS, Data, read_folder
from training.evaluation import Scores, evaluate
from training.experiment import Experiment, Learnt
from training.export import check_out, export, write_metrics, write_references
from training.gan import Drawing, draw_samples
from training.learning import learn, learn_direction
from training.located import ground_truth, locate
from training.recipe import Part
from training.report import write_report


def run(experiment: Experiment) -> dict[str, Any]:
    """Run an experiment; return its metrics, which lie in the classifier's folder too. Raises TrainingError."""
    began = time.perf_counter()
    check_out(experiment.out, experiment.folder)
    recipe, preprocessing, place = experiment.recipe, experiment.preprocessing, experiment.place
    watch = partial(place.progress.track, description="reading")
    data = read_folder(experiment.folder, preprocessing, recipe.ratio, experiment.seed, watch)
    truth = ground_truth(experiment, data)
    learnt = learn_direction(experiment, data) if recipe.part is Part.DIRECTION else learn(experiment, data)
    about = described(experiment, data)
    if experiment.drawing is not None:
        drawn = {"images": experiment.drawing.images, "steps": experiment.drawing.steps}
        about |= {"drawn": drawn, "without_drawn": asdict(scores(learnt, data)["test"])}
        learnt = learn(experiment, with_drawn(experiment, experiment.drawing, data))
    metrics = about | {
        **{split: asdict(score) for split, score in scores(learnt, data).items()},
        "epochs": [asdict(epoch) for epoch in learnt.epochs],
        **learnt.more,
        "seconds": time.perf_counter() - began + learnt.seconds_before,
    }
    write_metrics(experiment.out, metrics)  # first: the folder is known as training's own by it
    export(experiment.out, learnt.model, learnt.architecture, data.classes, preprocessing, recipe.method)
    write_references(experiment.out, data.splits["val"], preprocessing)
    engine = Engine(Classifier(learnt.model, preprocessing.normalization, preprocessing.size, place.device), Limits().pack)
    if truth is not None:
        located = locate(engine, data, learnt.logits["test"], preprocessing, recipe.method, truth)
        metrics |= {"localization": [asdict(row) for row in located], "unmasked": truth.missing}
        write_metrics(experiment.out, metrics)
    write_report(experiment.out, metrics, data, engine, learnt.logits["test"], preprocessing)
    return metrics


def described(experiment: Experiment, data: Data) -> dict[str, Any]:
    """Return what an experiment was made with."""
    return experiment.settings() | {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__},
        "device": str(experiment.place.device),
        "classes": data.classes,
        "images": {split: data.counts(split) for split in SPLITS},
        "skipped": {readable(path.relative_to(experiment.folder)): why for path, why in data.skipped.items()},
    }


def scores(learnt: Learnt, data: Data) -> dict[str, Scores]:
    """Evaluate the held-out splits."""

    def labels(split: str) -> Tensor:
        return torch.tensor([sample.label for sample in data.splits[split]])

    return {split: evaluate(logits, labels(split), data.classes) for split, logits in learnt.logits.items()}


def with_drawn(experiment: Experiment, drawing: Drawing, data: Data) -> Data:
    """Return the data with a GAN's images of each class among those to train on."""
    train = data.splits["train"]
    drawn = draw_samples(train, data.classes, drawing, experiment.seed)
    return replace(data, splits=data.splits | {"train": [*train, *drawn]})
