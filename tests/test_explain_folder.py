"""A folder explained: every record there, nothing computed twice, right and wrong apart, means as they are defined."""

import re
from contextlib import contextmanager
from functools import cache
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from live import SMALL_LABELS, build_small, picture
from PIL import Image

from torchserve_explain import records
from torchserve_explain.archiver import load_archive
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.cli import main
from torchserve_explain.errors import ArchiveError
from torchserve_explain.gallery import explain, question
from torchserve_explain.gallery.pages import ClassGroup, Shot, group, mean_map
from torchserve_explain.gallery.question import find_samples
from torchserve_explain.records import read_records
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.parameters import Capabilities

METHODS = ["grad_cam", "integrated_gradients"]
CLASSES = ("ant", "cat", "new york, ny")  # two classes are called cat


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store)
    return store


@contextmanager
def loading_once(module):
    """A run of a module loads its archive and tries every method on it; runs share what comes of it, to be quick."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(question, "Capabilities", cache(Capabilities))
        patched.setattr(module, "load_archive", cache(load_archive))
        yield


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    with loading_once(explain):
        yield


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, store):
    """Pictures of three classes, one labelled as it is predicted, and a file that is no picture."""
    data = tmp_path_factory.mktemp("data")
    archive = load_archive("small", store)
    for number in range(6):
        image = picture(number, (200, 240))
        seen = read_picture(image, archive.settings.preprocessing, 10**8).input
        predicted = archive.labels[int(archive.classifier.logits(seen[None])[0].argmax())]
        label = predicted if number == 0 else CLASSES[number % 3]
        (data / label).mkdir(exist_ok=True)
        (data / label / f"photo #{number}.jpg").write_bytes(image)
    (data / "cat" / "broken.png").write_bytes(b"not a picture")
    (data / "cat" / "notes.txt").write_text("no picture by its name either")
    return data


@pytest.fixture
def passes(monkeypatch):
    """The maps that the engine is asked for, one list of jobs a run."""
    runs, original = [], Engine.run

    def counted(self, works, *rest):
        if jobs := [work for work in works if isinstance(work, Job)]:  # predictions are works, too
            runs.append(jobs)
        return original(self, works, *rest)

    monkeypatch.setattr(Engine, "run", counted)
    return runs


def command(store, data, out, *more):
    usual = ["--methods", ",".join(METHODS), "--set", "steps=4"]  # of two --methods the later counts
    given = ["explain", "small", "--store", store, "--data", data, "--out", out, *usual, *more]
    return main(list(map(str, given)))


@pytest.fixture(scope="module")
def out(tmp_path_factory, store, labelled):
    out = tmp_path_factory.mktemp("out")
    assert command(store, labelled, out) == 0
    return out


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(out, record):
    return np.load(out / "pictures" / record["path"] / f"{record['map']}.npy", allow_pickle=False)


def test_every_picture_has_a_record_of_every_method(out, store, labelled):
    records = read_records(out / "records.jsonl")
    photos = sorted(path.relative_to(labelled).as_posix() for path in labelled.rglob("*.jpg"))
    assert sorted((r["path"], r["map"]) for r in records) == [(photo, name) for photo in photos for name in METHODS]
    archive = load_archive("small", store)
    for record in records:
        seen = read_picture((labelled / record["path"]).read_bytes(), archive.settings.preprocessing, 10**8).input
        probabilities = archive.classifier.logits(seen[None])[0].softmax(0)
        predicted = SMALL_LABELS[int(probabilities.argmax())]
        own = [float(p) for p, name in zip(probabilities, SMALL_LABELS, strict=True) if name == record["label"]]
        assert record["label"] == record["path"].split("/")[0]
        assert record["predicted"] == record["target"] == predicted and record["correct"] == (predicted == record["label"])
        assert record["probability"] == pytest.approx(float(probabilities.max()), rel=1e-4)
        assert record["label_probability"] == pytest.approx(max(own), rel=1e-4)
        assert record["evaluations"] == {"grad_cam": 1, "integrated_gradients": 5}[record["map"]]
        assert (record["completeness_error"] is None) == (record["map"] == "grad_cam")
        assert stored(out, record).shape == (224, 224)
    assert any(record["correct"] for record in records) and not all(record["correct"] for record in records)


def test_a_map_of_a_batch_is_the_map_alone(out, store, labelled, tmp_path):
    assert command(store, labelled, tmp_path, "--batch", "1") == 0
    for record in read_records(out / "records.jsonl"):
        together, alone = (stored(folder, record).astype(np.float64) for folder in (out, tmp_path))
        assert np.linalg.norm(together - alone) <= 2e-3 * np.linalg.norm(alone)  # float16, and sums in another order


def test_what_is_there_is_not_computed_again(out, store, labelled, passes):
    before = contents(out)
    assert command(store, labelled, out) == 0
    assert passes == [] and contents(out) == before


def test_an_interrupted_run_goes_on(out, store, labelled, tmp_path, passes, monkeypatch, capsys):
    keep, calls = explain.Run._keep, []

    def interrupted(self, *given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        keep(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(explain.Run, "_keep", interrupted)
        assert command(store, labelled, tmp_path, "--batch", "1") == 130
    assert "goes on where it was" in capsys.readouterr().err
    with (tmp_path / "records.jsonl").open("a") as torn:
        torn.write('{"path": "ant/pho')  # the machine went down while it wrote
    passes.clear()
    assert command(store, labelled, tmp_path, "--batch", "1") == 0
    assert sum(map(len, passes)) == 2 * 6 - 3
    assert {(r["path"], r["map"]) for r in read_records(tmp_path / "records.jsonl")} == {
        (r["path"], r["map"]) for r in read_records(out / "records.jsonl")
    }
    assert contents(tmp_path).keys() == contents(out).keys()


def test_a_changed_setting_or_picture_starts_anew_and_nothing_else_does(store, labelled, tmp_path, passes):
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "ant").mkdir(parents=True)
    for number in range(2):
        (data / "ant" / f"{number}.png").write_bytes(picture(number, (200, 240), "PNG"))

    def ran(*more):
        passes.clear()
        assert command(store, data, out, *more) == 0
        assert len(read_records(out / "records.jsonl")) >= 4
        return sum(map(len, passes))

    assert ran() == 4 and ran() == 0
    assert ran("--set", "steps=5") == 2  # Grad-CAM takes no steps
    assert ran("--set", "steps=5", "--target", "label") == 4
    (data / "ant" / "1.png").write_bytes(picture(9, (200, 240), "PNG"))
    assert ran("--set", "steps=5", "--target", "label") == 2
    next((out / "pictures").rglob("grad_cam.npy")).unlink()
    assert ran("--set", "steps=5", "--target", "label") == 1
    assert ran("--methods", "grad_cam,saliency", "--target", "label") == 2


def test_the_label_is_explained_where_it_is_asked_for(store, labelled, tmp_path):
    assert command(store, labelled, tmp_path, "--target", "label", "--methods", "grad_cam") == 0
    for record in read_records(tmp_path / "records.jsonl"):
        assert record["target"] == record["label"]
        assert record["target_probability"] == record["label_probability"]  # of two cats the likelier


def test_a_wrong_prediction_is_explained_against_the_right_label(out, store, labelled, tmp_path):
    records = read_records(out / "records.jsonl")
    for record in records:
        assert record["versus"] == (None if record["correct"] else record["label"])
    text = "".join(page.read_text() for page in (out / "classes").iterdir())
    wrong = next(record for record in records if not record["correct"])
    assert f"{wrong['target']} rather than {wrong['label']}" in text
    assert "the predicted class, rather than the label where it is wrong." in (out / "index.html").read_text()
    assert command(store, labelled, tmp_path, "--versus", "nothing") == 0
    plain = {(record["path"], record["map"]): record for record in read_records(tmp_path / "records.jsonl")}
    assert {record["versus"] for record in plain.values()} == {None}
    for record in records:
        alike = np.array_equal(stored(out, record), stored(tmp_path, plain[record["path"], record["map"]]))
        assert alike == record["correct"]
    assert "rather than" not in "".join(page.read_text() for page in tmp_path.rglob("*.html"))


@pytest.mark.parametrize("versus", ["runner_up", "rest"])
def test_all_pictures_may_be_compared(store, labelled, tmp_path, versus):
    assert command(store, labelled, tmp_path, "--methods", "grad_cam", "--versus", versus) == 0
    for record in read_records(tmp_path / "records.jsonl"):
        assert record["versus"] == "rest" if versus == "rest" else record["versus"] in SMALL_LABELS
    overview = (tmp_path / "index.html").read_text()
    assert f"rather than the {versus.replace('_', '-')}." in overview and "versus =" not in overview


def test_a_mean_map_is_the_mean_of_the_stored_maps(out):
    records = read_records(out / "records.jsonl")
    written = 0
    for label in CLASSES:
        for name in METHODS:
            for part, correct in (("correct", True), ("wrong", False)):
                path = out / "means" / f"{SMALL_LABELS.index(label)}-{part}-{name}.npy"
                own = [r for r in records if (r["label"], r["map"], r["correct"]) == (label, name, correct)]
                assert path.exists() == path.with_suffix(".png").exists() == bool(own)
                if own:
                    maps = [stored(out, record).astype(np.float64) for record in own]
                    naive = np.stack([one / np.abs(one).sum() for one in maps]).mean(0)
                    np.testing.assert_allclose(np.load(path), naive, rtol=1e-5, atol=1e-12)
                    written += 1
    assert written >= 2 * len(CLASSES)


def test_a_mean_weighs_pictures_alike_keeps_signs_and_survives_zeros():
    small, large, zero = (np.array([values], np.float32) for values in ((1, -1), (300, 100), (0, 0)))
    for other, expected in ((large, [[0.625, -0.125]]), (zero, [[0.25, -0.25]])):
        mean = mean_map([small, other])
        assert mean is not None
        np.testing.assert_allclose(mean, expected)
    assert mean_map([]) is None


def facts(path, label, predicted, probability):
    correct = None if label is None else label == predicted
    return {"path": path, "label": label, "predicted": predicted, "probability": probability, "correct": correct, "map": "m"}


def test_wrong_and_correct_are_apart_surest_first_and_the_worst_class_leads():
    told = [("a", "x", "x", 0.5), ("b", "x", "y", 0.4), ("c", "x", "y", 0.9), ("d", "x", "z", 0.6), ("e", "y", "y", 0.7)]
    worst, best = group([facts(*one) for one in told], ["z", "y", "x"])
    assert (worst.label, worst.number, worst.count, worst.right, worst.accuracy) == ("x", 2, 4, 1, 0.25)
    assert [shot.facts["path"] for shot in worst.parts["wrong"]] == ["c", "d", "b"]
    assert [shot.facts["path"] for shot in worst.parts["correct"]] == ["a"]
    assert worst.mistaken == [("y", 2), ("z", 1)]
    assert best == ClassGroup("y", 1, {"wrong": [], "correct": [Shot(record := facts(*told[4]), {"m": record})]})


def test_the_pages_tell_what_the_records_do(out, labelled):
    records = [record for record in read_records(out / "records.jsonl") if record["map"] == "grad_cam"]
    overview = (out / "index.html").read_text()
    right = sum(record["correct"] for record in records)
    assert f"6 pictures of {len({r['label'] for r in records})} classes; {right} predicted right" in overview
    assert "Skipped: 1" in overview and "cat/broken.png" in overview and "notes.txt" not in overview
    for label in {record["label"] for record in records}:
        page = (out / "classes" / f"{SMALL_LABELS.index(label)}.html").read_text()
        sections = dict(re.findall(r'<h2 class="(wrong|correct)">(.*?)</section>', page, re.S))
        for part, correct in (("wrong", False), ("correct", True)):
            own = [r for r in records if r["label"] == label and r["correct"] == correct]
            own.sort(key=lambda record: -record["probability"])
            assert re.findall(r"<small>(.*?)</small>", sections.get(part, "")) == [record["path"] for record in own]


def test_every_link_leads_somewhere_and_nothing_comes_from_elsewhere(out):
    for page in (out / "index.html", *(out / "classes").iterdir()):
        links = re.findall(r'(?:href|src)="(.*?)"', page.read_text())
        assert links
        for link in links:
            assert (page.parent / unquote(link)).is_file(), link
        assert not re.search(r"https?:|<script|@import|url\(", page.read_text())
        assert all('loading="lazy"' in image for image in re.findall(r"<img.*?>", page.read_text()))


def test_a_name_is_text_on_a_page(store, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "<b>&.jpg").write_bytes(picture())
    assert command(store, tmp_path / "data", tmp_path / "out", "--methods", "grad_cam") == 0
    (page,) = (tmp_path / "out" / "classes").iterdir()
    assert "&lt;b&gt;&amp;.jpg" in page.read_text() and "<b>&" not in page.read_text()


def test_maps_are_measured_against_masks(out, store, labelled, tmp_path, capsys):
    """Everything right of the middle lies within; the pictures are larger than what is seen of them."""
    for path in labelled.rglob("*.jpg"):
        mask = np.zeros((240, 200), np.uint8)
        mask[:, 100:] = 255
        (file := tmp_path / "masks" / path.relative_to(labelled).with_suffix(".png")).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(file)
    assert command(store, labelled, tmp_path / "out", "--methods", "grad_cam", "--masks", tmp_path / "masks") == 0
    records = [r for r in read_records(out / "records.jsonl") if r["map"] == "grad_cam" and r["correct"]]
    maps = [stored(out, record).astype(np.float64).clip(min=0) for record in records]
    (line,) = [line for line in (tmp_path / "out" / "localization.csv").open() if line.startswith(",grad_cam")]
    share = np.mean([one[:, 112:].sum() / one.sum() for one in maps])
    assert float(line.split(",")[4]) == pytest.approx(share, abs=2e-3) and int(line.split(",")[2]) == len(records)
    assert "grad_cam" in (tmp_path / "out" / "index.html").read_text().split("Against the masks")[1]
    assert command(store, labelled, tmp_path / "new", "--masks", tmp_path / "nowhere") == 1
    assert "knows none of the pictures" in capsys.readouterr().err
    assert command(store, labelled, tmp_path / "new", "--masks", tmp_path / "masks", "--engine", "ray") == 1
    assert "are of --engine local" in capsys.readouterr().err


def test_a_flat_folder_is_sorted_by_prediction(store, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for number in range(3):
        (data / f"{number}.jpg").write_bytes(picture(number, (200, 240)))
    assert command(store, data, out) == 0
    records = read_records(out / "records.jsonl")
    assert len(records) == 6 and {(r["label"], r["correct"], r["label_probability"]) for r in records} == {(None, None, None)}
    pages = {path.stem for path in (out / "classes").iterdir()}
    assert pages == {str(SMALL_LABELS.index(record["predicted"])) for record in records}
    assert "accuracy" not in (out / "index.html").read_text().split("</style>")[1]
    assert command(store, data, out, "--target", "label") == 1
    assert "allowed: predicted" in capsys.readouterr().err


def test_maps_of_several_layers_lie_side_by_side(store, labelled, tmp_path):
    assert command(store, labelled, tmp_path, "--methods", "grad_cam", "--set", "layer=layer2,last") == 0
    records = read_records(tmp_path / "records.jsonl")
    assert {(r["map"], r["parameters"]["layer"]) for r in records} == {
        ("grad_cam-layer2", "layer2"),
        ("grad_cam-last", "layer4"),
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "grad_cat"], "'grad_cat' is unknown; allowed: "),
        (["--set", "max_error=2"], "max_error: '2' is not allowed; allowed: a fraction above 0, at most 1"),
        (["--set", "output=png"], "'output' is not allowed; allowed: smoothing"),
        (["--set", "layer=nowhere"], "the last ones are"),
    ],
)
def test_what_cannot_be_asked_is_refused(store, labelled, tmp_path, capsys, more, said):
    assert command(store, labelled, tmp_path / "out", *more) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_does_not_fit_is_refused(store, tmp_path, capsys):
    def refused(*names):
        assert command(store, tmp_path, tmp_path.with_name("out"), *names) == 1
        return capsys.readouterr().err

    assert "holds no picture; allowed: names that end in" in refused()
    (tmp_path / "any").mkdir()
    assert "subfolder 'any' is no label of the classifier; allowed: ant" in refused()
    (tmp_path / "any" / "one.jpg").write_bytes(picture())
    (tmp_path / "any").rename(tmp_path / "ant")
    (tmp_path / "loose.jpg").write_bytes(picture())
    assert "pictures beside subfolders, such as loose.jpg" in refused()
    with pytest.raises(ArchiveError, match="is no folder"):
        find_samples(tmp_path / "nowhere", SMALL_LABELS)


def test_of_many_labels_the_nearest_are_named(tmp_path):
    (tmp_path / "clas 77").mkdir()
    with pytest.raises(ArchiveError, match=r"allowed: class 77, .* and 80 more"):
        find_samples(tmp_path, [f"class {number}" for number in range(100)])


def test_a_map_that_is_not_finite_is_told_and_not_tried_again(store, labelled, tmp_path, passes, monkeypatch):
    attribute = Job._attribute

    def broken(self):
        attribution = yield from attribute(self)
        if isinstance(self.method, GradCam):
            attribution.map[0, 0, 0] = torch.nan
        return attribution

    monkeypatch.setattr(Job, "_attribute", broken)
    assert command(store, labelled, tmp_path) == 0
    records = read_records(tmp_path / "records.jsonl")
    assert len(records) == 12 and {r["map"] for r in records if r["failed"]} == {"grad_cam"}
    assert "not a finite number" in records[0]["failed"]
    assert "not a finite number" in next((tmp_path / "classes").iterdir()).read_text()
    assert command(store, labelled, tmp_path) == 0 and len(passes) == 1


def test_a_folder_that_holds_something_else_is_left_alone(store, labelled, tmp_path, capsys):
    mine = tmp_path / "project" / "classes" / "Mine.java"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert command(store, labelled, tmp_path / "project") == 1
    assert "holds something else" in capsys.readouterr().err and mine.read_text() == "mine"
    assert command(store, labelled, labelled / "ant" / "out") == 1
    assert "lies inside" in capsys.readouterr().err


def test_what_is_hidden_is_no_picture(tmp_path):
    for folder in (".hidden", "seen"):
        (tmp_path / "ant" / folder).mkdir(parents=True)
        (tmp_path / "ant" / folder / "one.png").write_bytes(picture())
    assert [sample.path for sample in find_samples(tmp_path, ["ant"])] == ["ant/seen/one.png"]


def test_a_broken_archive_is_told(store, labelled, tmp_path, capsys):
    (tmp_path / "store").mkdir()
    whole = next(store.glob("*.mar"))
    (tmp_path / "store" / whole.name).write_bytes(whole.read_bytes()[:1000])
    assert command(tmp_path / "store", labelled, tmp_path / "out") == 1
    assert "is no archive" in capsys.readouterr().err


def test_without_methods_the_archives_own_explains(store):
    assert list(question.ask(load_archive("small", store), None, "predicted", {}).methods) == ["integrated_gradients"]


@pytest.mark.parametrize(("seconds", "told"), [(0.0, ["1/3", "2/3", "3/3", "3/3"]), (3600.0, ["1/3", "3/3"])])
def test_where_there_is_no_terminal_a_line_now_and_then_tells_how_far_it_is(monkeypatch, capsys, seconds, told):
    monkeypatch.setattr(records, "EVERY", seconds)
    with records.progress() as shown:
        bar = shown.add_task("explaining", total=3)
        for _ in range(3):
            shown.advance(bar)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(told) and all(part in line for part, line in zip(told, lines, strict=True))
