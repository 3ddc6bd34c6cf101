"""Two versions compared: the same ones are, moved maps are told by how much, and limits decide the exit status."""

import json
import re
import shutil
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from live import SMALL_CONFIG, SMALL_LABELS, picture, small_files
from PIL import Image
from test_explain_folder import loading_once

from torchserve_explain.archiver import build_archive, load_archive, parser
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.cli import main
from torchserve_explain.gallery import compare
from torchserve_explain.gallery.comparison import (
    Compared,
    Movement,
    Threshold,
    Version,
    most_moved,
    movement,
    on_one_frame,
    segments_of,
    thresholds,
)
from torchserve_explain.records import read_records

CROP = "preprocessing: {{resize: 72, crop: {}}}\n"
METHODS = ["grad_cam", "sensitivity"]


def build(name, folder, store, crop=64, labels=SMALL_LABELS, change=lambda state: None):
    """Archive the small classifier with other weights, or another crop."""
    files = small_files(folder, SMALL_CONFIG + CROP.format(crop))
    state = torch.load(files["weights.pth"], weights_only=True)
    change(state)
    torch.save(state, files["weights.pth"])
    files["labels.json"].write_text(json.dumps(labels))
    options = {"--model": "model.py", "--weights": "weights.pth", "--labels": "labels.json", "--config": "model-config.yaml"}
    given = [str(part) for option, file in options.items() for part in (option, files[file])]
    build_archive(name, parser().parse_args([name, *given, "--store", str(store)]))


def retrained(state):
    """Move the weights as a training might: the head most of all, so that predictions change."""
    draw = torch.Generator().manual_seed(1)
    for key, weight in state.items():
        if key.startswith(("fc", "layer4")) and weight.is_floating_point():
            weight += (0.5 if key.startswith("fc") else 0.1) * weight.std() * torch.randn(weight.shape, generator=draw)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build("old", tmp_path_factory.mktemp("old"), store)
    build("same", tmp_path_factory.mktemp("same"), store)
    build("new", tmp_path_factory.mktemp("new"), store, change=retrained)
    return store


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    with loading_once(compare):
        yield


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for number in range(8):
        label = ("ant", "dog", "new york, ny")[number % 3]
        (data / label).mkdir(exist_ok=True)
        (data / label / f"photo #{number}.png").write_bytes(picture(number, (200, 240), "PNG"))
    (data / "dog" / "broken.png").write_bytes(b"not a picture")
    return data


def command(store, data, out, old="old", new="new", *more):
    given = ["compare", old, new, "--data", data, "--store", store, "--out", out, "--methods", ",".join(METHODS), *more]
    return main(list(map(str, given)))


@pytest.fixture(scope="module")
def out(tmp_path_factory, store, labelled):
    out = tmp_path_factory.mktemp("out")
    assert command(store, labelled, out) == 0
    return out


def told(out):
    return json.loads((out / "comparison.json").read_text())


def test_what_is_the_same_moves_nothing_and_keeps_the_narrowest_limits(store, labelled, tmp_path, capsys):
    limits = ("--max-changed", 0, "--max-accuracy-drop", 0, "--min-cosine", 1, "--min-rank-correlation", 1, "--max-moved", 0)
    assert command(store, labelled, tmp_path, "old", store / "same.mar", *limits) == 0
    assert capsys.readouterr().out.count(": kept") == 2 + 3 * len(METHODS)
    for one in told(tmp_path)["pictures"]:
        assert not one["changed"] and one["old"] == one["new"]
        assert one["maps"] == {name: {"rank_correlation": 1.0, "cosine": 1.0, "moved_mass": 0.0} for name in METHODS}


def test_each_limit_decides_the_exit_status(store, labelled, out, capsys):
    measured = told(out)
    assert 0 < measured["changed"] < 1
    medians = {
        (measure, name): float(np.median([one["maps"][name][measure] for one in measured["pictures"]]))
        for measure in ("rank_correlation", "cosine", "moved_mass")
        for name in METHODS
    }
    drop = measured["accuracy"]["old"] - measured["accuracy"]["new"]
    for option, measure in (("--min-cosine", "cosine"), ("--min-rank-correlation", "rank_correlation")):
        lowest = min(medians[measure, name] for name in METHODS)
        assert command(store, labelled, out, "old", "new", option, max(0, lowest - 1e-3)) == 0
        assert command(store, labelled, out, "old", "new", option, lowest + 1e-3) == 1
    highest = max(medians["moved_mass", name] for name in METHODS)
    for option, limit in (("--max-moved", highest), ("--max-changed", measured["changed"])):
        assert command(store, labelled, out, "old", "new", option, limit + 1e-3) == 0
        assert command(store, labelled, out, "old", "new", option, limit - 1e-3) == 1
    assert command(store, labelled, out, "old", "new", "--max-accuracy-drop", max(0, drop)) == 0
    assert "NOT KEPT" in capsys.readouterr().out


def test_both_versions_explain_the_class_that_the_old_one_predicts(store, labelled, out):
    old, new = (read_records(out / side / "records.jsonl") for side in ("old", "new"))
    predicted = {record["path"]: record["predicted"] for record in old}
    assert {record["path"]: record["target"] for record in new} == predicted
    assert any(record["predicted"] != record["target"] for record in new)
    archive = load_archive("new", store)
    for one in told(out)["pictures"]:
        now = next(record for record in new if record["path"] == one["path"])
        assert one["label"] == one["path"].split("/")[0] and one["target"] == one["old"]["predicted"]
        assert one["new"] == {"predicted": now["predicted"], "probability": now["probability"]}
        assert now["target"] in archive.labels


def test_accuracies_are_those_of_the_labels(out):
    measured = told(out)
    for side in ("old", "new"):
        right = [one[side]["predicted"] == one["label"] for one in measured["pictures"]]
        assert measured["accuracy"][side] == pytest.approx(np.mean(right))
    assert list(measured["skipped"]) == ["dog/broken.png"] and len(measured["pictures"]) == 8


def test_the_label_may_be_explained_instead(store, labelled, tmp_path):
    assert command(store, labelled, tmp_path, "old", "new", "--target", "label") == 0
    assert all(one["target"] == one["label"] for one in told(tmp_path)["pictures"])


def test_a_second_run_computes_nothing_and_another_old_version_anew(store, labelled, tmp_path, monkeypatch):
    asked, run = [], Engine.run

    def counted(self, works, *rest):
        asked.extend(work for work in works if isinstance(work, Job))
        return run(self, works, *rest)

    monkeypatch.setattr(Engine, "run", counted)
    assert command(store, labelled, tmp_path) == 0 and len(asked) == 2 * 8 * len(METHODS)
    asked.clear()
    assert command(store, labelled, tmp_path) == 0 and asked == []
    # The old version is now another one, so that the new one explains other classes of some pictures.
    moved = {one["path"] for one in told(tmp_path)["pictures"] if one["changed"]}
    assert command(store, labelled, tmp_path, "new", "new") == 0
    assert len(asked) == 8 * len(METHODS) + len(moved) * len(METHODS)
    assert {one["maps"]["grad_cam"]["moved_mass"] for one in told(tmp_path)["pictures"]} == {0.0}


def test_a_page_tells_what_the_numbers_do_and_loads_nothing_from_elsewhere(out):
    page, measured = (out / "index.html").read_text(), told(out)
    changed = [one for one in measured["pictures"] if one["changed"]]
    assert f"{100 * measured['changed']:.1f} % of the predictions changed" in page
    assert all(measured[side]["archive"] == side and measured[side]["digest"][:16] in page for side in ("old", "new"))
    section = page.split("<h2>Changed predictions</h2>")[1].split("<h2>Moved most")[0]
    assert section.count('class="shot"') == len(changed)
    assert all(f"{one['old']['predicted']} became {one['new']['predicted']}" in section for one in changed)
    for name in METHODS:
        moved = page.split(f"<h2>Moved most: {name}</h2>")[1].split("<h2>")[0]
        order = sorted(measured["pictures"], key=lambda one: -one["maps"][name]["moved_mass"])
        assert re.findall(r"<small>(.*?)[<;]", moved) == [one["path"] for one in order]
    links = re.findall(r'(?:href|src)="(.*?)"', page)
    assert links and all((out / unquote(link)).is_file() for link in links)
    assert not re.search(r"https?:|<script|@import|url\(", page)


def test_pictures_without_labels_are_compared_by_their_predictions(store, labelled, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in labelled.rglob("photo*"):
        shutil.copyfile(path, data / path.name)
    assert command(store, data, tmp_path / "out") == 0
    assert told(tmp_path / "out")["accuracy"] is None
    assert command(store, data, tmp_path / "out", "old", "new", "--max-accuracy-drop", "0") == 2
    assert "have no labels" in capsys.readouterr().err


def test_versions_that_see_other_parts_of_a_picture_are_compared_on_what_both_see(store, labelled, tmp_path, tmp_path_factory):
    build("narrow", tmp_path_factory.mktemp("narrow"), store, crop=48)
    assert command(store, labelled, tmp_path, "old", "narrow") == 0
    assert all(0.2 < one["maps"]["grad_cam"]["cosine"] <= 1 for one in told(tmp_path)["pictures"])


def test_what_cannot_be_compared_is_refused(store, labelled, tmp_path, tmp_path_factory, capsys):
    build("fewer", tmp_path_factory.mktemp("fewer"), store, labels=["ANT", *SMALL_LABELS[1:]])
    cases = {
        ("old", "fewer"): "has no class 'ant', which the old one has",
        ("nowhere", "new"): "nowhere is neither in classifiers/",
        ("old", "new", "--set", "layer=nowhere"): "the last ones are",
        ("old", "new", "--methods", "grad_cat"): "'grad_cat' is unknown",
    }
    for more, said in cases.items():
        assert command(store, labelled, tmp_path / "out", *more) == 2, more
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    assert command(store, labelled, tmp_path / "mine") == 2 and (tmp_path / "mine" / "index.html").read_text() == "mine"
    with pytest.raises(SystemExit):
        command(store, labelled, tmp_path / "out", "old", "new", "--max-changed", "2")
    assert "allowed: a number from 0 to 1" in capsys.readouterr().err


# The measures, in closed form

HALVES = np.repeat([[0, 1]], 4, 0).repeat(3, 1)  # [4, 6]: left and right


def test_mass_that_moves_to_another_segment_is_told_and_its_scale_is_not():
    left, right = (HALVES == 0).astype("f4"), (HALVES == 1).astype("f4")
    assert movement(left, right, HALVES).moved_mass == 1 and movement(left, 7 * left, HALVES).moved_mass == 0
    assert movement(left, 3 * left + right, HALVES).moved_mass == pytest.approx(0.25)
    assert movement(left - right, left, HALVES).moved_mass == 0  # what is negative weighs nothing
    assert movement(left, -left, HALVES).moved_mass is None


def test_ranks_and_angle_are_those_of_their_definitions():
    draw = np.random.default_rng(0)
    first, second = draw.standard_normal((2, 4, 6)).astype("f4")
    told = movement(first, second, HALVES)
    ranks = [values.ravel().argsort().argsort() for values in (first, second)]
    assert told.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert told.cosine == pytest.approx((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))
    assert movement(first, first**3, HALVES).rank_correlation == pytest.approx(1)
    flat = movement(first, np.zeros((4, 6), "f4"), HALVES)
    assert flat == Movement(None, None, None)


def test_a_common_frame_is_what_both_see():
    values = np.arange(64, dtype="f4").reshape(8, 8)
    old, new, crop = on_one_frame(values, (0, 0, 16, 16), values[2:6, 2:6], (4, 4, 12, 12))
    assert crop == (4, 4, 12, 12) and np.array_equal(old, new) and np.array_equal(new, values[2:6, 2:6])
    coarse = values[2:6, 2:6].reshape(2, 2, 2, 2).mean((1, 3))
    old, new, _ = on_one_frame(values, (0, 0, 16, 16), coarse, (4, 4, 12, 12))
    assert old == pytest.approx(coarse) and np.array_equal(new, coarse)


def test_segments_follow_the_picture():
    halves = Image.fromarray((255 * HALVES).astype("u1")).resize((60, 40), Image.Resampling.NEAREST)
    found = segments_of(halves, (0, 0, 60, 40), (0, 0, 60, 40), (60, 40))
    assert found.shape == (40, 60) and not set(found[:, :28].ravel()) & set(found[:, 32:].ravel())


def pictures(*moved):
    return [
        Compared(str(n), "a", "a", Version("a", 0.9), Version("b" if n else "a", 0.8), {"m": Movement(None, 1 - m, m)})
        for n, m in enumerate(moved)
    ]


def test_a_measure_that_nobody_has_keeps_no_limit():
    some = pictures(0.1, 0.5, 0.2)
    found = thresholds(
        some, ["m"], {"moved_mass": 0.2, "cosine": 0.9, "rank_correlation": 0.0, "changed": 0.7, "accuracy_drop": None}
    )
    assert [(one.name, one.met) for one in found] == [
        ("changed", True),
        ("rank_correlation, m", False),
        ("cosine, m", False),
        ("moved_mass, m", True),
    ]
    assert [one.path for one in most_moved(some, "m", 2)] == ["1", "2"]
    assert Threshold("x", 0.5, 0.5, least=True).met and Threshold("x", 0.5, 0.5, least=False).met
