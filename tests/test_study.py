"""The study on a small network: every technique measured once, what is known not measured again, the table right."""

import csv
import json
from math import isfinite

import pytest
import torch
from conftest import NORMALIZATION
from PIL import Image

from study.__main__ import StudyRecords, run
from study.measure import PACK, StudySettings, make_grids, read_photo, share_in_cell
from study.tables import COLUMNS, markdown, medians, montage, write_csv
from study.techniques import EIGHT, techniques
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine

SIDE = 32


@pytest.fixture
def engines(model):
    return [Engine(Classifier(model.float(), NORMALIZATION, (side, side)), PACK) for side in (SIDE, 2 * SIDE)]


@pytest.fixture
def photos(engines):
    images = NORMALIZATION(torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    images *= torch.linspace(0.2, 4, 8)[:, None, None, None]
    return [read_photo(f"photo {number}", image, engines[0]) for number, image in enumerate(images)]


def small_settings():
    return StudySettings(disturbed=1, grids=1)


def test_a_study_measures_everything_once_and_goes_on_where_it_was(engines, photos, tmp_path, monkeypatch):
    path, settings = tmp_path / "records.jsonl", small_settings()
    chosen = [technique.name for technique in techniques(engines[0].classifier)]
    assert chosen[:8] == [technique.name for technique in EIGHT]
    monkeypatch.setattr("study.__main__.techniques", lambda classifier: list(techniques(classifier))[:8:3])
    records = StudyRecords(path, "small", photos[:2], settings)
    run(photos[:2], engines[0], None, settings, records)
    assert [(r["photo"], r["technique"]) for r in records.all] == [(p.name, n) for p in photos[:2] for n in chosen[:8:3]]
    for record in records.all:
        measured = {key for key in record if isinstance(record[key], float) and isfinite(record[key])}
        assert {"milliseconds", "infidelity", "deletion", "insertion"} <= measured
        assert ("max_sensitivity" in record) == (record["photo"] == "photo 0")
    again = StudyRecords(path, "small", photos[:2], settings)
    assert again.all == json.loads(json.dumps(records.all))
    monkeypatch.setattr("study.__main__.measure_photo", lambda *_: pytest.fail("measured twice"))
    run(photos[:2], engines[0], None, settings, again)
    assert StudyRecords(path, "other", photos[:2], settings).all == []


def test_the_grid_game_is_played_with_the_surest_photos_of_different_classes(engines, photos, tmp_path, monkeypatch):
    grids = list(make_grids(photos, 1))
    targets = {photo.target for photo in photos}
    assert len(grids) == (1 if len(targets) >= 4 else 0)
    fours = [photo.__class__(**{**vars(photo), "target": number}) for number, photo in enumerate(photos[:4])]
    ((name, image, target, cell),) = make_grids(fours, 1)
    assert image.shape == (3, 2 * SIDE, 2 * SIDE) and name == "grid 0" and cell == 0
    surest = max(fours, key=lambda photo: photo.probability)
    assert target == surest.target and torch.equal(image[:, :SIDE, :SIDE], surest.input)
    monkeypatch.setattr("study.__main__.techniques", lambda classifier: list(techniques(classifier))[9:12])
    records, settings = StudyRecords(tmp_path / "r.jsonl", "small", fours, small_settings()), small_settings()
    run(fours, engines[0], engines[1], settings, records)
    shares = [record["localisation"] for record in records.all if record["photo"] == "grid 0"]
    assert len(shares) == 3 and all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("cell", range(4))
def test_the_share_is_that_of_the_positive_part_in_the_cell(cell):
    attribution = torch.full((1, 8, 8), -1.0)
    attribution[0, (cell // 2) * 4 : (cell // 2) * 4 + 4, (cell % 2) * 4 : (cell % 2) * 4 + 4] = 3.0
    assert share_in_cell(attribution, cell) == 1
    assert share_in_cell(torch.ones(2, 8, 8), cell) == 0.25


def test_the_table_holds_the_medians(tmp_path):
    records = [
        {"photo": str(n), "technique": "occlusion", "infidelity": float(n), "rows": 226, "completeness_error": None}
        for n in range(5)
    ]
    records.append({"photo": "grid 0", "technique": "occlusion", "localisation": 0.5})
    assert medians(records) == {"occlusion": {"infidelity": 2.0, "rows": 226, "localisation": 0.5}}
    head, _, line = markdown(records).splitlines()
    assert line == "| occlusion * | - | 2.00 | - | - | - | 50.0% | - | 226 |" and head.count("|") == len(COLUMNS) + 2
    write_csv(tmp_path / "table.csv", records)
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(lines) == 6 and lines[3]["infidelity"] == "3.0" and lines[5]["localisation"] == "0.5"


def test_the_montage_shows_a_positive_and_a_blended_map_for_each():
    seen = Image.new("RGB", (64, 64), "gray")
    values = torch.linspace(-1, 1, 64 * 64).view(64, 64).numpy()
    sheet = montage(seen, [("one", values, True), ("two", abs(values), False)])
    assert sheet.width > 2 * 2 * 64 and len(sheet.getcolors(10**6) or []) > 100
