"""Every recipe end to end on images with a known answer: trained, exported, loaded as a worker would, explained, served."""

import json

import pytest
import yaml
from patches import COLOURS, patched, times_by_chance, write_folder
from safetensors.torch import load_file

import training  # noqa: F401
from attribution.classifier import Classifier
from attribution.engine import Engine
from attribution.job import Job
from attribution.methods import METHODS, Case
from serving.images import read_picture
from serving.loading import build_network
from serving.pictures import png
from serving.settings import read_settings
from training.__main__ import main
from training.recipe import recipe_names
from training.report import explain

TWO = ("blue", "red")
# Recipe: classes, and options that make it small.
SMALL = {
    "vegetables": (tuple(COLOURS), ["--backbone", "cnn", "--epochs", "20", "--batch", "8", "--learning-rate", "1e-3"]),
    "birds": (TWO, ["--epochs", "12", "--batch", "8"]),
    "cifar100": (tuple(COLOURS), ["--backbone", "lite0", "--epochs", "4", "--batch", "8"]),
    "leaves": (TWO, ["--backbone", "lite0"]),
    "textile": (tuple(COLOURS), ["--epochs", "4", "--batch", "8"]),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of two and of three classes."""
    top = tmp_path_factory.mktemp("images")
    return {colours: write_folder(top / str(len(colours)), colours) for colours in (TWO, tuple(COLOURS))}


@pytest.fixture(scope="session")
def trained(folders, tmp_path_factory):
    """Train by a recipe, once; return the classifier's folder."""
    top, kept = tmp_path_factory.mktemp("trained"), {}

    def run(recipe):
        if recipe not in kept:
            colours, options = SMALL[recipe]
            kept[recipe] = top / recipe
            size = "96" if recipe != "vegetables" else "64"
            with pytest.MonkeyPatch.context() as patch:
                for name, place in (("training.features.FOLDER", "features"), ("training.experiment.STATES", "states")):
                    patch.setattr(name, top / place)
                common = ["--data", folders[colours], "--out", kept[recipe], "--size", size, "--workers", 0]
                assert main([recipe, *map(str, common), *options]) == 0
        return kept[recipe]

    return run


def loaded(folder):
    """Load a classifier's folder as its archive will be."""
    settings = read_settings(yaml.safe_load((folder / "model-config.yaml").read_text()))
    network = build_network(settings.classifier.architecture, folder, load_file(folder / "weights.safetensors"))
    return Classifier(network, settings.preprocessing.normalization, settings.preprocessing.size), settings.preprocessing


def test_every_recipe_is_tried():
    assert set(SMALL) == set(recipe_names())


@pytest.mark.parametrize("recipe", SMALL)
def test_a_recipe_learns_what_tells_the_classes_apart_and_its_maps_show_it(trained, recipe):
    folder = trained(recipe)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.85 and metrics["classes"] == sorted(SMALL[recipe][0])
    classifier, preprocessing = loaded(folder)
    engine, times = Engine(classifier, 16), []
    for seed in range(5000, 5006):
        colour = metrics["classes"][seed % len(metrics["classes"])]
        image, corner = patched(colour, seed)
        picture = read_picture(png(image), preprocessing, 10**6)
        target = metrics["classes"].index(colour)
        (values,) = explain(engine, [Job(METHODS["biased_layer"](), Case(classifier, picture.input, target))])
        times.append(times_by_chance(values, corner))
    assert min(times) > 2 and sorted(times)[3] > 3, times
