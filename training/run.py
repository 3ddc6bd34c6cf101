"""An experiment is run: read, learn, evaluate, export, report."""

import platform
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torchvision

from training.data import SPLITS, read_folder
from training.evaluation import evaluate
from training.experiment import Experiment
from training.export import check_out, export, write_metrics
from training.learning import learn, learn_direction
from training.recipe import Part
from training.report import write_report


def run(experiment: Experiment) -> dict[str, Any]:
    """Run an experiment; return its metrics, which lie in the classifier's folder too. Raises Unusable."""
    began = time.perf_counter()
    check_out(experiment.out)
    recipe, preprocessing = experiment.recipe, experiment.preprocessing
    watch = partial(experiment.place.progress.track, description="reading")
    data = read_folder(experiment.folder, preprocessing, recipe.ratio, experiment.seed, watch)
    learnt = learn_direction(experiment, data) if recipe.part is Part.DIRECTION else learn(experiment, data)
    labels = {split: torch.tensor([sample.label for sample in data.splits[split]]) for split in SPLITS}
    scores = {split: evaluate(logits, labels[split], data.classes) for split, logits in learnt.logits.items()}
    metrics = experiment.settings() | {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__},
        "device": str(experiment.place.device),
        "classes": data.classes,
        "images": {split: data.counts(split) for split in SPLITS},
        "skipped": {str(path.relative_to(experiment.folder)): why for path, why in data.skipped.items()},
        "epochs": [asdict(epoch) for epoch in learnt.epochs],
        **{split: asdict(score) for split, score in scores.items()},
        **learnt.more,
        "seconds": time.perf_counter() - began,
    }
    export(experiment.out, learnt.model, learnt.architecture, data.classes, preprocessing, recipe.method)
    write_metrics(experiment.out, metrics)
    write_report(experiment.out, metrics, data, learnt.model, learnt.logits["test"], preprocessing, experiment.place.device)
    return metrics
