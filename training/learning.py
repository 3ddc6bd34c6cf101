"""The two ways to learn: by gradient, and by the mean difference of features."""

from dataclasses import asdict

import torch
from torch import nn

from torchserve_explain.errors import TrainingError
from training.architectures.direction import Direction
from training.data import SPLITS, Data
from training.experiment import Experiment, Learnt, read_sources, state_key
from training.export import architecture_of, direction_architecture
from training.fit import Training, balanced, fit, predict
from training.mean_difference import best_threshold, held_out_accuracy, mean_difference
from training.networks import build, check_size
from training.recipe import Part


def learn(experiment: Experiment, data: Data) -> Learnt:
    """Train a backbone's learning part by gradient."""
    torch.manual_seed(experiment.seed)
    recipe = experiment.recipe
    network = build(
        experiment.backbone, experiment.weights, len(data.classes), recipe.part, recipe.first.get(experiment.backbone)
    )
    check_size(network.model, recipe.size, experiment.backbone)
    network.model.to(experiment.place.device).to(memory_format=torch.channels_last)
    sources = read_sources(experiment, data, network.frozen, recipe.augmentation)
    weights = balanced(data.counts("train")).to(experiment.place.device)
    path = experiment.states / f"{state_key(experiment, data, network.model)}.pt"
    training = Training(network.trained, recipe, weights, experiment.seed, path)
    seconds_before = sum(epoch.seconds for epoch in training.epochs)
    epochs = fit(training, sources["train"], sources["val"], experiment.place.progress)
    logits = {split: predict(network.trained, sources[split])[0] for split in SPLITS[1:]}
    return Learnt(network.model.eval(), architecture_of(experiment.backbone), logits, epochs, seconds_before)


def learn_direction(experiment: Experiment, data: Data) -> Learnt:
    """Find the mean difference of a backbone's features, and its threshold on the validation images."""
    if len(data.classes) != 2:
        raise TrainingError(f"a mean difference tells two classes apart, not {len(data.classes)}")
    torch.manual_seed(experiment.seed)
    network = build(experiment.backbone, experiment.weights, 2, Part.HEAD)
    check_size(network.model, experiment.recipe.size, experiment.backbone)
    body = network.model.features
    assert isinstance(body, nn.Module)
    frozen = nn.Sequential(body, nn.Flatten()).eval().to(experiment.place.device)
    sources = read_sources(experiment, data, frozen, None)
    features = {split: predict(nn.Identity(), sources[split]) for split in SPLITS}
    direction = mean_difference(*features["train"])
    g = {split: values @ direction for split, (values, _) in features.items()}
    rocs = {split: best_threshold(g[split], features[split][1]) for split in SPLITS[1:]}
    threshold = rocs["val"].threshold
    model = Direction(body, len(direction)).eval()
    model.load_state_dict({"direction": direction, "threshold": torch.tensor([threshold])}, strict=False)
    everything, labels = (torch.cat(parts) for parts in zip(*features.values(), strict=True))
    more = {
        "roc": {split: asdict(roc) for split, roc in rocs.items()},
        "held_out_accuracy": held_out_accuracy(everything, labels, experiment.seed),
    }
    logits = {split: torch.stack([threshold - g[split], g[split] - threshold], 1) for split in SPLITS[1:]}
    return Learnt(model, direction_architecture(experiment.backbone, len(direction)), logits, more=more)
