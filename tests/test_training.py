"""Every recipe end to end on images with a known answer: trained, exported, loaded as a worker would, explained, served."""

import json

import httpx
import numpy as np
import pytest
import torch
import yaml
from live import served
from patches import COLOURS, patched, times_by_chance, write_folder
from PIL import Image
from safetensors.torch import load_file

import training  # noqa: F401
from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.network import build_network
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.pictures import png
from torchserve_explain.serving.settings import Preprocessing, read_settings
from training.__main__ import main
from training.architectures.cnn import Cnn
from training.data import Sample, read_folder
from training.evaluation import evaluate
from training.export import write_references
from training.maps import explain
from training.recipe import read_recipe, recipe_names

pytestmark = pytest.mark.live
TWO = ("blue", "red")
# Recipe: classes, and options that make it small.
SMALL = {
    "vegetables": (tuple(COLOURS), ["--backbone", "cnn", "--epochs", "20", "--batch", "8", "--learning-rate", "1e-3"]),
    "birds": (TWO, ["--epochs", "12", "--batch", "8"]),
    "cifar100": (tuple(COLOURS), ["--backbone", "lite0", "--epochs", "4", "--batch", "8"]),
    "leaves": (TWO, ["--backbone", "lite0"]),
    "textile": (tuple(COLOURS), ["--epochs", "4", "--batch", "8"]),
}

# The plain gradient of a CNN from scratch is as strong in the noise that it has learnt to ignore.
MAPS = {"vegetables": "biased_layer", "birds": "biased_layer"}


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
                patch.setattr("training.__main__.RUN", top / "run")
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
    engine, method = Engine(classifier, 16), METHODS[MAPS.get(recipe, "sensitivity")]()
    for target, colour in enumerate(metrics["classes"]):
        pictures = [patched(colour, 5000 + 10 * target + place) for place in range(3)]
        inputs = [read_picture(png(image), preprocessing, 10**6).input for image, _ in pictures]
        maps = explain(engine, [Job(method, Case(classifier, image, target)) for image in inputs])
        times = [times_by_chance(values, corner) for values, (_, corner) in zip(maps, pictures, strict=True)]
        assert sum(times) / 3 > 2, (colour, times)


@pytest.mark.parametrize("recipe", ["vegetables", "leaves", "textile"])
def test_the_exported_classifier_answers_what_the_trained_one_did(trained, folders, recipe):
    """The test images' confusion and loss, measured anew through the server's own preprocessing and loading."""
    folder = trained(recipe)
    metrics = json.loads((folder / "metrics.json").read_text())
    classifier, preprocessing = loaded(folder)
    samples = read_folder(folders[SMALL[recipe][0]], preprocessing, read_recipe(recipe)[0].ratio, 0).splits["test"]
    inputs = [read_picture(sample.path.read_bytes(), preprocessing, 10**6).input for sample in samples]
    scores = evaluate(Engine(classifier, 8).logits(inputs), torch.tensor([s.label for s in samples]), metrics["classes"])
    assert scores.confusion == metrics["test"]["confusion"]
    assert scores.loss == pytest.approx(metrics["test"]["loss"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("recipe", SMALL)
def test_the_report_page_tells_what_was_measured(trained, recipe):
    folder = trained(recipe)
    metrics = json.loads((folder / "metrics.json").read_text())
    page = (folder / "report.html").read_text()
    assert f"{100 * metrics['test']['accuracy']:.1f} %" in page
    assert page.count("<polyline") == (2 if recipe == "leaves" else 4)
    assert page.count("data:image/png;base64,") >= 4 and all(f"<td>{name}</td>" in page for name in metrics["classes"])
    if recipe == "leaves":
        assert len(metrics["roc"]["val"]["true_positives"]) > 1 and metrics["held_out_accuracy"] > 0.85


def small_run(folder, out, *options):
    arguments = ["--data", folder, "--out", out, "--size", 32, "--epochs", 2, "--workers", 0, *options]
    assert main(["birds", *map(str, arguments)]) == 0
    return json.loads((out / "metrics.json").read_text()), load_file(out / "weights.safetensors")


@pytest.fixture
def kept_here(tmp_path, monkeypatch):
    """Keep features, states and drawn images in a folder of the test's own; return how to start afresh."""

    def afresh(name):
        monkeypatch.setattr("training.__main__.RUN", tmp_path / name)

    return afresh


def test_the_same_seed_trains_the_same_classifier(folders, tmp_path, kept_here):
    results = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        kept_here(place)
        results.append(small_run(folders[TWO], tmp_path / f"out-{place}", "--seed", seed))
    (first, weights), (again, same), (_, other) = results
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert first["test"] == again["test"] and not torch.equal(weights["classifier.3.weight"], other["classifier.3.weight"])


def test_the_same_command_goes_on_and_a_longer_one_starts_anew(folders, tmp_path, kept_here):
    kept_here("states")
    first, weights = small_run(folders[TWO], tmp_path / "out")
    again, same = small_run(folders[TWO], tmp_path / "out")
    assert again["epochs"] == first["epochs"]  # their seconds too: none was trained again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert len(small_run(folders[TWO], tmp_path / "out", "--epochs", 3)[0]["epochs"]) == 3


def test_a_few_validation_images_of_each_class_become_references(folders, tmp_path, kept_here):
    kept_here("states")
    metrics, _ = small_run(folders[TWO], tmp_path / "out")
    _, preprocessing = loaded(tmp_path / "out")
    samples = read_folder(folders[TWO], preprocessing, read_recipe("birds")[0].ratio, 0).splits["val"]
    seen = [read_picture(sample.path.read_bytes(), preprocessing, 10**6).input for sample in samples]
    paths = sorted((tmp_path / "out" / "references").iterdir())
    kept = [read_picture(path.read_bytes(), preprocessing, 10**6).input for path in paths]
    nearest = [min(range(len(seen)), key=lambda k: float((one - seen[k]).norm())) for one in kept]
    for one in kept:  # but for what JPEG loses
        first, second = sorted(float((one - other).norm()) for other in seen)[:2]
        assert first < 0.3 * second
    labels = [samples[k].label for k in nearest]
    assert len(set(nearest)) == len(kept) and all(labels.count(k) == min(3, metrics["images"]["val"][k]) for k in (0, 1))


@pytest.mark.parametrize(("classes", "count"), [(2, 6), (15, 30), (70, 30)])
def test_references_are_few_and_of_as_many_classes_as_can_be(tmp_path, classes, count):
    for k in range(4 * classes):
        Image.new("L", (8, 8), k // 4 * 3).save(tmp_path / f"{k}.png")
    samples = [Sample(tmp_path / f"{k}.png", k // 4, "") for k in range(4 * classes)]
    for _ in range(2):  # those of an earlier training go
        write_references(tmp_path, samples, Preprocessing(resize=8, crop=8))
        paths = sorted((tmp_path / "references").iterdir())
        shown = {round(float(np.asarray(Image.open(path).convert("L"))[4, 4]) / 3) for path in paths}
        assert len(paths) == count and len(shown) == min(classes, count)


def test_the_report_measures_maps_against_masks(folders, tmp_path, kept_here):
    kept_here("states")
    white = Image.new("L", (64, 64), 255)
    white.paste(0, (0, 0, 64, 32))  # the lower half lies within
    for path in folders[TWO].rglob("*.png"):
        (file := tmp_path / "masks" / path.relative_to(folders[TWO])).parent.mkdir(parents=True, exist_ok=True)
        white.save(file)
    metrics, _ = small_run(folders[TWO], tmp_path / "out", "--masks", tmp_path / "masks", "--epochs", 8)
    rows = {(row["label"], row["map"]): row for row in metrics["localization"]}
    right = sum(metrics["test"]["confusion"][place][place] for place in range(2))
    assert right > 0 and rows[None, "grad_cam"]["pictures"] == right and metrics["unmasked"] == {}
    assert set(rows[None, "random"]["scores"].values()) == {0.5}
    classifier, preprocessing = loaded(tmp_path / "out")
    engine, half = Engine(classifier, 8), preprocessing.size[0] // 2
    shares = []
    for sample in read_folder(folders[TWO], preprocessing, read_recipe("birds")[0].ratio, 0).splits["test"]:
        image = read_picture(sample.path.read_bytes(), preprocessing, 10**6).input
        if int(engine.logits([image])[0].argmax()) == sample.label:
            values = explain(engine, [Job(METHODS["grad_cam"](), Case(classifier, image, sample.label))])[0].clip(min=0)
            shares.append(values[half:].sum() / values.sum() if values.any() else 0.5)
    assert rows[None, "grad_cam"]["scores"]["mass_accuracy"] == pytest.approx(sum(shares) / len(shares), abs=1e-3)
    assert "Maps against the masks" in (tmp_path / "out" / "report.html").read_text()


def test_masks_of_other_images_are_refused_before_training(folders, tmp_path, kept_here, capsys):
    kept_here("states")
    arguments = ["birds", "--data", folders[TWO], "--out", tmp_path / "out", "--masks", tmp_path]
    assert main([*map(str, arguments)]) == 1
    assert "knows none of the pictures" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_drawn_images_are_trained_on_and_compared(folders, tmp_path, kept_here):
    kept_here("states")
    metrics, _ = small_run(folders[TWO], tmp_path / "out", "--draw", 2, "--draw-steps", 1)
    assert metrics["drawn"] == {"images": 2, "steps": 1} and metrics["images"]["train"] == [12, 12]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Without the 2 images" in page and f"{100 * metrics['without_drawn']['accuracy']:.1f} %" in page


def test_a_trained_classifier_is_served(trained, tmp_path):
    folder = trained("textile")
    files = {"model": "model.py", "weights": "weights.safetensors", "labels": "labels.json", "config": "model-config.yaml"}
    options = [part for option, name in files.items() for part in (f"--{option}", str(folder / name))]
    build_archive("patches", parser().parse_args(["patches", *options, "--store", str(tmp_path / "store")]))
    classifier, preprocessing = loaded(folder)
    with served(["patches"], tmp_path / "store", tmp_path / "run") as server:
        for number, colour in enumerate(sorted(COLOURS)):
            data = png(patched(colour, 7000 + number)[0])
            answer = httpx.post(f"{server.inference}/predictions/patches", content=data, timeout=60).json()
            logits = classifier.logits(read_picture(data, preprocessing, 10**6).input[None])[0]
            expected = dict(zip(sorted(COLOURS), logits.softmax(0).tolist(), strict=True))
            assert answer == pytest.approx(expected, abs=1e-4) and max(answer, key=answer.get) == colour
            why = httpx.post(f"{server.inference}/explanations/patches", content=data, timeout=60).json()
            assert why["explanations"][0]["method"] == read_recipe("textile")[0].method and why["predicted"]["label"] == colour


def test_other_weights_under_the_same_name_start_anew(folders, tmp_path, kept_here):
    kept_here("states")
    weights, found = tmp_path / "weights.pth", []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(Cnn(2).state_dict(), weights)
        found.append(small_run(folders[TWO], tmp_path / "out", "--backbone", "cnn", "--weights", weights)[1])
    start = "features.0.0.weight"
    assert not torch.allclose(found[0][start], found[1][start], atol=0.1)
    assert torch.nn.functional.cosine_similarity(found[1][start].flatten(), torch.load(weights)[start].flatten(), dim=0) > 0.9


def test_other_images_start_anew(tmp_path, kept_here):
    kept_here("states")
    seconds = []
    for top in ("first", "second"):
        data = write_folder(tmp_path / top, TWO, 5 if top == "first" else 6)
        metrics, _ = small_run(data, tmp_path / "out")
        seconds.append([epoch["seconds"] for epoch in metrics["epochs"]])
    assert seconds[0] != seconds[1]


def test_a_state_that_was_cut_off_is_told(folders, tmp_path, kept_here, capsys):
    kept_here("states")
    small_run(folders[TWO], tmp_path / "out")
    (state,) = (tmp_path / "states" / "training").iterdir()
    state.write_bytes(state.read_bytes()[:100])
    arguments = ["--data", folders[TWO], "--out", tmp_path / "out", "--size", 32, "--epochs", 2, "--workers", 0]
    assert main(["birds", *map(str, arguments)]) == 1
    assert f"{state.name} is no state of a training" in capsys.readouterr().err
