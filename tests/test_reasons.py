"""What a class is known by: a shortcut that a network has learnt is on the pages, its clean twin raises no alarm."""

import csv
import re

import numpy as np
import pytest
import torch
from patches import PATCH, SIDE, patched
from PIL import Image
from torch import nn

from torchserve_explain.attribution.classifier import Classifier, Normalization
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.gallery.pages import Overview, map_path, overlay_path, seen_path
from torchserve_explain.gallery.reasons import top_segment
from torchserve_explain.gallery.site import write_gallery
from torchserve_explain.gallery.truth import read_truth
from torchserve_explain.serving.settings import Preprocessing

LABELS = ["red", "green"]
COUNT, TAGGED = 20, 8  # pictures of a class, of which so many of the red one have a tag instead of a red patch
TAG = slice(52, 62)  # rows and columns of a yellow tag in the lower right corner
NORMALIZATION = Normalization((0.5,) * 3, (0.25,) * 3)
AS_IT_IS = Preprocessing(resize=None, crop=SIDE)


def pictures(tagged, start):
    """Pictures [n, H, W, 3] of both classes, their labels, and where their patches or tags are [n, H, W]."""
    images, masks = [], np.zeros((2 * COUNT, SIDE, SIDE), np.bool_)
    for number in range(2 * COUNT):
        image, (top, left) = patched("red" if tagged <= number < COUNT else "green", start + number)
        pixels = np.array(image)
        if number < tagged:
            pixels[TAG, TAG] = (250, 230, 10)
        masks[number, top : top + PATCH, left : left + PATCH] = True
        images.append(pixels)
    return np.stack(images), [0] * COUNT + [1] * COUNT, masks


def inputs(images):
    return NORMALIZATION(torch.from_numpy(images / 255).float().movedim(-1, 1))


def trained(tagged):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 12, 5, 2, 2), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 2))
    images, labels, _ = pictures(tagged, 5000)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs(images)), torch.tensor(labels)).backward()
        optimizer.step()
    return Engine(Classifier(model.eval(), NORMALIZATION, (SIDE, SIDE)), 16)


def explained(tagged, folder, method="integrated_gradients"):
    """Train, explain other pictures, and write what a run of `explain` leaves: records, maps, pictures."""
    engine, (images, labels, masks) = trained(tagged), pictures(tagged, 9000)
    rows = list(inputs(images))
    probabilities = [logits.softmax(0) for logits in engine.logits(rows)]
    targets = [int(row.argmax()) for row in probabilities]
    jobs = [Job(METHODS[method](), Case(engine.classifier, row, target)) for row, target in zip(rows, targets, strict=True)]
    records = []
    for number, (target, found) in enumerate(zip(targets, engine.results(jobs), strict=True)):
        label, predicted = LABELS[labels[number]], LABELS[target]
        record = {"path": f"{label}/{number:02}.png", "map": method, "method": method, "label": label, "predicted": predicted,
                  "probability": float(probabilities[number][target]), "label_probability": 0.5, "correct": label == predicted,
                  "target": predicted, "versus": None, "failed": None, "signed": True, "parameters": {},
                  "completeness_error": None}  # fmt: skip
        map_path(folder / "out", record).parent.mkdir(parents=True)
        np.save(map_path(folder / "out", record), found.value.map.sum(0).numpy().astype("<f2"))
        for path in (seen_path(folder / "out", record), overlay_path(folder / "out", record)):
            Image.fromarray(images[number]).save(path, lossless=True)
        for top, pixels in (("data", images[number]), ("masks", 255 * masks[number].astype(np.uint8))):
            (folder / top / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / top / record["path"])
        records.append(record)
    return records


def gallery(folder, records, masks=None):
    """Write the gallery, and return its first page and which pictures it lists as right for a different reason."""
    paths = [record["path"] for record in records]
    truth = read_truth(masks, None, folder / "data", paths, AS_IT_IS, 10**8)
    write_gallery(folder / "out", records, Overview("tiny", LABELS, "data", "predicted", "nothing", {}), truth)
    lines = list(csv.DictReader((folder / "out" / "different.csv").open()))
    return (folder / "out" / "index.html").read_text(), [(line["path"], line["why"]) for line in lines]


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagged")
    return folder, explained(TAGGED, folder)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    return folder, explained(0, folder)


TAGS = {f"red/{number:02}.png" for number in range(TAGGED)}


def test_a_shortcut_that_a_network_has_learnt_is_found(tagged):
    folder, records = tagged
    assert sum(record["correct"] for record in records) >= 2 * COUNT - 2
    page, different = gallery(folder, records)
    assert {path for path, _ in different} == TAGS and {why for _, why in different} == {"a cluster of its own"}
    assert f"<b>{TAGGED} of {COUNT}</b> stand apart" in page and "None stand apart" not in page
    section = page.split("Right for a different reason")[1].split("What is shown")[0]
    assert set(re.findall(r"pictures/(red/\d\d\.png)/integrated_gradients\.webp", section)) <= TAGS
    boxes = re.findall(r"left:([\d.]+)%;top:([\d.]+)%;width:([\d.]+)%;height:([\d.]+)%", section)
    assert len(boxes) == 6
    for left, top, width, height in (map(float, box) for box in boxes):  # around the tag, not much wider
        assert left <= 100 * 54 / SIDE and left + width >= 100 * 60 / SIDE and width <= 35
        assert top <= 100 * 54 / SIDE and top + height >= 100 * 60 / SIDE and height <= 35
    of_class = (folder / "out" / "classes" / "0.html").read_text()
    assert "What the maps of integrated_gradients have in common" in of_class and f"{TAGGED} of {COUNT}" in of_class


def test_its_clean_twin_raises_no_alarm(clean):
    folder, records = clean
    page, different = gallery(folder, records, folder / "masks")
    assert different == [] and "None stand apart" in page


def test_masks_tell_what_lies_outside_of_them(tagged):
    """The masks hold the patches; the maps of the tagged pictures hold the tags, which clusters need not know for it."""
    folder, records = tagged
    page, different = gallery(folder, records, folder / "masks")
    assert {path for path, why in different if why == "outside the mask"} == TAGS
    assert "the map lies mostly outside of the mask" in page
    rows = {(row["class"], row["map"]): row for row in csv.DictReader((folder / "out" / "localization.csv").open())}
    right = [record for record in records if record["target"] == record["label"]]
    maps = [np.load(map_path(folder / "out", record)).astype(np.float64).clip(min=0) for record in right]
    masks = [np.asarray(Image.open(folder / "masks" / record["path"])) > 0 for record in right]
    mass = [values[mask].sum() / values.sum() for values, mask in zip(maps, masks, strict=True)]
    assert float(rows["", "integrated_gradients"]["mass_accuracy"]) == pytest.approx(np.mean(mass))
    red = [one for one, record in zip(mass, right, strict=True) if record["label"] == "red"]
    assert float(rows["red", "integrated_gradients"]["mass_accuracy"]) == pytest.approx(np.mean(red))
    assert float(rows["", "random"]["rank_accuracy"]) == pytest.approx((PATCH / SIDE) ** 2)
    assert {"", "red", "green"} == {label for label, _ in rows} and rows["red", "centre"]["pictures"] == str(len(red))
    assert "pointing game" in page and "Against the masks" in (folder / "out" / "classes" / "0.html").read_text()
    assert "within the mask" in (folder / "out" / "classes" / "0.html").read_text()


def test_a_run_without_masks_leaves_none_of_their_figures(tagged):
    folder, records = tagged
    gallery(folder, records, folder / "masks")
    page, _ = gallery(folder, records)
    assert not (folder / "out" / "localization.csv").exists() and "Against the masks" not in page


def test_a_wrong_prediction_is_not_measured_by_its_labels_mask(tagged):
    folder, records = tagged
    wrong = records[0] | {"predicted": "green", "target": "green", "correct": False}
    (folder / "masks" / records[1]["path"]).rename(folder / "masks" / "away.png")
    page, _ = gallery(folder, [wrong, *records[1:]], folder / "masks")
    (folder / "masks" / "away.png").rename(folder / "masks" / records[1]["path"])
    rows = list(csv.DictReader((folder / "out" / "localization.csv").open()))
    right = sum(record["correct"] for record in records)
    assert [row["pictures"] for row in rows if (row["class"], row["map"]) == ("", "centre")] == [str(right - 2)]
    assert "Without a mask: 1" in page and "there is none" in page


def test_the_foremost_segment_holds_what_the_map_does():
    values = np.zeros((60, 80), np.float32)
    values[40:50, 10:30] = 1
    pixels = np.full((60, 80, 3), 200, np.uint8)
    pixels[40:50, 10:30] = (20, 20, 220)
    segment = top_segment(values, Image.fromarray(pixels).resize((160, 120)))
    assert segment.share > 0.4 and segment.area < 0.06
    left, top, width, height = segment.box
    assert left >= 0.08 and left + width <= 0.42 and top >= 0.6 and top + height <= 0.88
    assert top_segment(-values, Image.fromarray(pixels)).share == 0
