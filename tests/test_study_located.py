"""The study on photos with boxes: masks as the model sees them, targets, costly techniques on few photos, table and picture."""

import csv
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import NORMALIZATION
from PIL import Image

from study.located import (
    draw_located,
    is_costly,
    located_markdown,
    located_means,
    located_photos,
    located_techniques,
    measure_located,
)
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.localization import rank_accuracy
from torchserve_explain.serving.settings import Preprocessing

SIDE = 32


@pytest.fixture
def engine(model):
    return Engine(Classifier(model.float(), NORMALIZATION, (SIDE, SIDE)), 16)


@pytest.fixture
def photos(tmp_path, engine):
    """Two photos of 96 x 64 of which the middle 64 x 64 is seen, half as large; the box of the third lies outside."""
    random = np.random.default_rng(0)
    lines = [("a.png", 3, 16, 0, 48, 64), ("b.png", 1, 32, 16, 64, 48), ("c.png", 0, 0, 0, 15, 64)]
    with (tmp_path / "boxes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "class_index", "xmin", "ymin", "xmax", "ymax", "width", "height"])
        writer.writerows([*line, 96, 64] for line in lines)
    for name, *_ in lines:
        Image.fromarray(random.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(tmp_path / name)
    archive: Any = SimpleNamespace(settings=SimpleNamespace(preprocessing=Preprocessing(resize=SIDE, crop=SIDE)))
    return list(located_photos(tmp_path / "boxes.csv", tmp_path, archive, engine))


def test_boxes_lie_where_the_model_sees_them_and_their_class_is_explained(photos, engine):
    assert [(photo.name, photo.target) for photo, _ in photos] == [("a.png", 3), ("b.png", 1)]
    first, second = (np.zeros((SIDE, SIDE), bool) for _ in range(2))
    first[:, :16] = True
    second[8:24, 8:24] = True
    assert np.array_equal(photos[0][1], first) and np.array_equal(photos[1][1], second)
    for photo, _ in photos:
        assert photo.score == pytest.approx(float(engine.logits([photo.input])[0][photo.target]))


def test_a_technique_is_measured_beside_the_guesses(photos, engine):
    chosen = {one.name: one for one in located_techniques(engine.classifier)}
    costly = {name for name, one in chosen.items() if is_costly(one, engine.classifier)}
    assert {"rise", "integrated_gradients", "integrated_gradients idgi", "xrai"} < costly
    assert {"grad_cam", "deep_lift", "saliency smoothgrad"} < chosen.keys() - costly
    (photo, mask), _ = photos
    own, centre, chance = measure_located(engine, chosen["saliency"], photo, mask)
    gradient = engine.classifier.evaluate(photo.input[None], [3], [], gradient=True).gradients[0].abs().sum(0).numpy()
    assert own["rank_accuracy"] == pytest.approx(rank_accuracy(gradient, mask)) and own["rows"] == 1
    assert (centre["technique"], chance["technique"]) == ("centre", "random") and chance["mass_accuracy"] == 0.5


def records():
    scores = {"one": (0.9, 0.7), "few": (0.8,), "centre": (0.5, 0.7), "random": (0.2, 0.2)}
    for name, found in scores.items():
        for place, score in enumerate(found):
            measured = dict.fromkeys(("pointing_game", "mass_accuracy", "rank_accuracy"), score)
            yield {"photo": str(place), "technique": name, "rows": 1, "milliseconds": 5.0, **measured}


def test_the_centre_is_compared_with_on_the_same_photos(tmp_path):
    means = located_means(list(records()))
    assert list(means) == ["few", "one", "centre", "random"]
    assert means["few"]["above"] == pytest.approx(0.3) and means["one"]["above"] == pytest.approx(0.2)
    few = {name: one for name, one in means.items() if name != "one"}
    lines = located_markdown({"first": means, "second": few}).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 12 and "| second: rank accuracy |" in lines[0]
    assert lines[2] == "| few | 80% | 80% | 80% | +30% | 1 | 80% | 80% | 80% | +30% | 1 |"
    assert lines[3] == "| one | 80% | 80% | 80% | +20% | 2 | - | - | - | - | - |"
    draw_located({"first": means, "second": few}, tmp_path / "located.png")
    assert len(Image.open(tmp_path / "located.png").convert("RGB").getcolors(10**6) or []) > 10
