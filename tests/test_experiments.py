"""Experiments on generated pictures: parts are found, changed and measured; each command writes its tables."""

import json
import sys

import numpy as np
import pytest
import torch
from patches import COLOURS, patched
from PIL import Image, ImageDraw

from experiments import birds, cifar100, leaves, techniques, vegetables
from experiments.backgrounds import Scene, changes, recoloured
from experiments.charts import save_chart, save_confusion, save_curves
from experiments.output import table
from experiments.regions import edge, mean_shares, share
from experiments.segmentation import leaf, lesions, without
from experiments.trained import Trained
from study.techniques import EIGHT
from torchserve_explain.attribution.classifier import Classifier, Normalization
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.quality import Deletion, Insertion
from torchserve_explain.serving.settings import Preprocessing

CHARTS = ("curves", "confusion")
GREEN, BROWN, GREY, BLUE = (60, 130, 40), (120, 75, 40), (150, 145, 150), (40, 60, 200)


def drawn_leaf(ground=GREY, lesion=True, seed=0, at=50):
    """Return a picture of a green disc with a brown spot on a ground, and where disc and spot are."""
    image, whole, spot = Image.new("RGB", (128, 128), ground), Image.new("1", (128, 128)), Image.new("1", (128, 128))
    for canvas, colour in ((image, GREEN), (whole, 1)):
        ImageDraw.Draw(canvas).ellipse((24, 30, 104, 98), fill=colour)
    for canvas, colour in ((image, BROWN), (spot, 1)) if lesion else ():
        ImageDraw.Draw(canvas).ellipse((at, 50, at + 24, 74), fill=colour)
    noise = np.random.default_rng(seed).normal(0, 4, (128, 128, 3))
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8), np.array(whole), np.array(spot)


def overlap(found, expected):
    return (found & expected).sum() / (found | expected).sum()


def test_a_leaf_and_its_lesion_are_found():
    pixels, whole, spot = drawn_leaf()
    found = leaf(pixels)
    assert overlap(found, whole) > 0.9 and overlap(lesions(pixels, found), spot) > 0.7
    pixels, whole, spot = drawn_leaf(at=20)  # the leaf's edge itself is brown
    assert overlap(leaf(pixels), whole | spot) > 0.9 and leaf(pixels)[62, 39:43].all()
    healthy, _, _ = drawn_leaf(lesion=False)
    assert lesions(healthy, leaf(healthy)).mean() < 0.002


def scene(**given):
    return Scene(*drawn_leaf(**given))


def test_each_change_leaves_what_it_does_not_name():
    own, other = scene(), scene(ground=BLUE, lesion=False)
    inside, outside = ~edge(own.leaf, 6) & own.leaf, ~edge(own.leaf, 6) & ~own.leaf

    def changed(name):
        return changes(GREY, GREEN)[name](own, other).astype(float)

    for name in ("as it is", "ground: one grey", "ground: blurred", "ground: of the other class"):
        assert np.abs(changed(name) - own.pixels)[inside].max() <= 1
    assert np.allclose(changed("ground: of the other class")[outside].mean(0), BLUE, atol=3)
    assert np.ptp(changed("ground: one grey")[outside], 0).max() <= 1
    assert changed("ground: blurred")[outside].std(0).max() < 2 < own.pixels[outside].std(0).min()
    painted, alone = changed("diseased places painted over"), changed("ground alone")
    assert np.allclose(painted[own.diseased].mean(0), GREEN, atol=8) and np.allclose(painted[outside], own.pixels[outside])
    assert np.allclose(alone[own.leaf].mean(0), GREY, atol=12)
    assert np.ptp(changed("no colour"), -1).max() == 0 and len(np.unique(changed("outline alone").reshape(-1, 3), axis=0)) == 2


def test_colours_become_those_of_another_picture():
    own, other = scene(), scene(ground=BLUE, seed=1)
    moved = recoloured(own.pixels, ~own.leaf, other.pixels, ~other.leaf)
    assert np.allclose(moved[~own.leaf].mean(0), BLUE, atol=1) and np.array_equal(moved[own.leaf], own.pixels[own.leaf])


def test_what_is_taken_out_is_filled_with_what_surrounds_it():
    pixels, whole, _ = drawn_leaf()
    assert np.abs(without(pixels, whole)[whole].mean(0) - GREY).max() < 6


def test_a_share_is_that_of_the_positive_part():
    region = np.zeros((4, 4), bool)
    region[:2] = True
    values = np.where(region, 3.0, 1.0) * np.where(region, [1, -1, 1, 1], 1)
    assert share(values, region).mass == pytest.approx(18 / 26) and share(values, region).area == 0.5
    assert share(-np.ones((4, 4), np.float32), region).mass == 0.5  # nothing positive is everywhere alike
    both = mean_shares([{"a": share(values, region)}, {"a": share(np.where(region, 0.0, 1.0), region)}])
    assert both["a"].mass == pytest.approx(9 / 26)


def test_an_outline_is_drawn_at_the_size_of_the_picture():
    mask = vegetables.drawn([[[64, 64], [191, 64], [191, 191], [64, 191]]], 128)
    assert mask.shape == (128, 128) and mask[32:96, 32:96].all() and mask.mean() == pytest.approx(0.25, abs=0.01)


def test_a_table_has_the_first_rows_columns():
    assert (
        table([{"a": 0.12345, "b": None}, {"a": 1234.5, "b": "x"}]) == "| a | b |\n|---|---|\n| 0.123 | - |\n| 1234.5 | x |\n"
    )


def test_charts_are_pictures(tmp_path):
    epochs = [{"loss": 1, "val_loss": 2, "accuracy": 0.5, "val_accuracy": 0.4}] * 2
    metrics = {"epochs": epochs, "classes": ["a", "b"], "test": {"confusion": [[3, 1], [0, 4]]}}
    save_curves(tmp_path / "curves.png", {"one": metrics})
    save_confusion(tmp_path / "confusion.png", metrics)
    save_chart(tmp_path / "roc.png", {"y": {"one": ([0, 0, 1], [0, 1, 1])}}, "x")
    for name, wide in (("curves", 840), ("roc", 420), ("confusion", 310)):
        assert Image.open(tmp_path / f"{name}.png").width == wide


class Redness(torch.nn.Module):
    """Tells red from blue."""

    def __init__(self):
        super().__init__()
        self.colours = torch.nn.Conv2d(3, 2, 1, bias=False)
        self.colours.weight = torch.nn.Parameter(torch.tensor([[1.0, -1, -1], [-1, -1, 1.0]])[:, :, None, None] / 100)

    def forward(self, x):
        return self.colours(x).relu().sum((2, 3))


def test_a_map_of_what_matters_is_worth_more_than_one_of_what_does_not():
    engine = Engine(Classifier(Redness(), Normalization((0.0,) * 3, (1.0,) * 3), (64, 64)), 16)
    trained = Trained(engine, Preprocessing(resize=64, crop=64, mean=(0,) * 3, std=(1,) * 3), ["red", "blue"], {})
    image, (top, left) = patched("red", 0)
    patch = np.zeros((64, 64), np.float32)
    patch[top : top + 20, left : left + 20] = 1
    pixels = np.asarray(image)
    for way, sign in ((Insertion, 1), (Deletion, -1)):
        right, wrong = (trained.quality([pixels], [0], [values], way(8)) for values in (patch, 1 - patch))
        assert sign * right > sign * wrong + 0.02


def test_a_map_of_the_centre_falls_from_it():
    centre = cifar100.centred(33)
    assert centre.max() == centre[16, 16] and centre[0, 0] == centre.min() and np.array_equal(centre, centre.T)


def run(monkeypatch, tmp_path, experiment, data, *options):
    """Run an experiment's command; return its tables, and the names of its pictures."""
    monkeypatch.setattr("training.__main__.RUN", tmp_path / "run")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["experiment", "--data", str(data), "--out", str(out), *map(str, options)])
    experiment.main()
    assert (out / "tables.md").read_text().count("### ") >= 1
    return json.loads((out / "figures.json").read_text()), {path.name for path in out.rglob("pictures/**/*.*")}


def write(folder, names, picture, count):
    """Write `count` pictures of each class into train/ and test/, called as GroceryStoreDataset calls them."""
    for split in ("train", "test"):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for place in range(1, count + 1):
                picture(number, place + (split == "test") * 500).save(folder / split / name / f"{split}_{name}_{place:03}.jpg")
    return folder


def colour(number, seed):
    return patched(list(COLOURS)[number], 1000 * number + seed)[0]


@pytest.mark.live
def test_the_vegetables_command(monkeypatch, tmp_path):
    data = write(tmp_path / "data", ("Carrots", "Cucumber", "Zucchini"), colour, 10)
    (tmp_path / "photos").mkdir()
    colour(1, 9).save(tmp_path / "photos" / "n07718472_cucumber.JPEG")
    quick = ("--backbone", "cnn", "--epochs", 2, "--cnn-epochs", 1, "--photos", tmp_path / "photos")
    tables, pictures = run(monkeypatch, tmp_path, vegetables, data, *quick)
    assert [row["classifier"] for row in tables["accuracy"]] == ["tuned", "cnn at 64 x 64"]
    parts = tables["where the maps lie on outlined pictures"]
    assert {row["part"] for row in parts} == {"vegetable", "hand", "label", "container", "anything else"}
    for method in vegetables.ALL:
        found = [row for row in parts if row["method"] == method and row["part"] in ("vegetable", "anything else")]
        assert all(0 <= row["share"] <= 1 and row["pictures"] == 7 for row in found)
    assert tables["photos from elsewhere"][0]["is"] == "Cucumber"
    assert {path.partition(".")[0] for path in pictures} == {*("carrots", "hands", "mistakes", "means", "elsewhere"), *CHARTS}


@pytest.mark.live
def test_the_leaves_command_sees_what_decides(monkeypatch, tmp_path):
    """Healthy leaves lie on grey, diseased ones on blue: a classifier may learn either."""

    def picture(number, seed):
        return Image.fromarray(drawn_leaf(BLUE if number else GREY, bool(number), seed)[0])

    tables, pictures = run(monkeypatch, tmp_path, leaves, write(tmp_path / "data", ("healthy", "sick"), picture, 6))
    assert [row["AUC, test"] for row in tables["mean difference"]] == [1, 1]
    plain, cut = (
        {row["change"]: row for row in tables[f"changed pictures, trained {name}"]} for name in ("as photographed", "cut out")
    )
    assert plain["ground alone"]["AUC"] > 0.9 > cut["ground alone"]["AUC"]  # it tells the class, but where it is cut off
    assert cut["diseased places painted over"]["g: sick"] < cut["as it is"]["g: sick"] - 0.05
    assert {"roc.png", "means.webp", "examples.webp"} == pictures


@pytest.mark.live
def test_the_birds_command(monkeypatch, tmp_path):
    monkeypatch.setattr(birds, "LONGER", {2: "twice"})
    data = write(tmp_path / "data", ("AMERICAN COOT", "OSTRICH"), colour, 6)
    quick = ("--backbone", "cnn", "--cnn-epochs", 1, "--cnn-size", 32, "--draw", 2, "--draw-steps", 2)
    tables, pictures = run(monkeypatch, tmp_path, birds, data, *quick)
    assert [(row["classifier"], row["epochs"]) for row in tables["accuracy"]][2:4] == [
        ("CNN, augmented, 2 GAN images a class", 1),
        ("CNN, augmented, twice the epochs", 2),
    ]
    assert [row["method"] for row in tables["maps of the AMERICAN COOT"]] == list(birds.METHODS)
    assert {"coots.webp", "means.webp", "curves.png", "confusion.png"} == pictures


@pytest.mark.live
def test_the_cifar100_command(monkeypatch, tmp_path):
    data = write(tmp_path / "data", ("apple", "bee", "can"), colour, 6)
    quick = ("--every", 2, "--epochs", 1, "--networks", "mobilenet_v3_large", "--explained", 4)
    tables, pictures = run(monkeypatch, tmp_path, cifar100, data, *quick)
    grids = {(row["network"], row["grid"]) for row in tables["Grad-CAM by layer"]}
    assert ("mobilenet_v3_large", "2 x 2") in grids and ("lite0, head, at 128", "4 x 4") in grids
    assert ("mobilenet_v3_large", "1 x 1") not in grids  # of one pixel there is no map
    assert len(tables["accuracy"]) == 4 and {"scratch.png", "mobilenet_v3_large means.webp"} <= pictures
    assert sorted(path.name for path in (tmp_path / "out" / "one-in-2" / "train").iterdir()) == ["apple", "can"]


@pytest.mark.live
def test_the_techniques_command(monkeypatch, tmp_path):
    monkeypatch.setattr(techniques, "EIGHT", EIGHT[5:7])
    photo = tmp_path / "photo.jpg"
    colour(0, 0).save(photo)
    tables, _ = run(monkeypatch, tmp_path, techniques, photo, "--perturbations", 1)
    rows = {row["technique"]: row for row in tables["lite0"]}
    assert list(rows) == ["lrp", "guided_backprop", "grad_cam", "biased_layer"]
    assert rows["lrp"]["in the report, on ResNet-18"] == 3.567 and all(row["max sensitivity"] > 0 for row in rows.values())
    assert (tmp_path / "out" / "lite0.webp").is_file()
