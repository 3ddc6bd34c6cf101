"""The audit record: it holds what made a map, a replay of it is the same, and what is another one is told as such."""

import base64
import io
import json
import logging
from dataclasses import replace

import httpx
import numpy as np
import pytest
from conftest import WITHOUT_ATTENTION
from live import SMALL_CONFIG, build_small, picture, served
from PIL import Image

from torchserve_explain.archive import Archive
from torchserve_explain.attribution.computation import Piece
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.cli import main
from torchserve_explain.serving import audit
from torchserve_explain.serving.service import RawRequest, Service
from torchserve_explain.serving.settings import read_settings

IMAGE = picture()
FEW = {"samples": "8"}
SIDE = 64
AUDITED = SMALL_CONFIG.replace("explanations:", "explanations:\n  audit: log")
AUDITED += f"preprocessing: {{resize: {SIDE}, crop: {SIDE}}}\n"  # small and quick


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store, AUDITED)
    return store


@pytest.fixture(scope="module")
def archive(store):
    return Archive.load(store / "small.mar")


def answers(archive, *requests):
    """Return the answers to requests that are in flight together."""
    service = Service(archive.classifier, archive.labels, archive.settings, {"name": "small", "version": "1.0"}, archive.digest)
    raws = (RawRequest({"data": IMAGE} | fields, {"explain": "True"}, f"id-{n}") for n, fields in enumerate(requests))
    return [one.value for one in Engine(archive.classifier, 8).results([Piece(service.answer(raw)) for raw in raws])]


@pytest.fixture(scope="module")
def answer(archive):
    """An answer with every method, smoothed Integrated Gradients among them, and its neighbours in the same passes."""
    everything = {"method": "all", "audit": "true", "target": "3", **FEW}
    return json.loads(answers(archive, everything, {"method": "occlusion"}, {"method": "saliency"})[0].body)


def replayed(store, tmp_path, told, *more, image=IMAGE):
    (tmp_path / "record.json").write_text(told if isinstance(told, str) else json.dumps(told))
    (tmp_path / "image").write_bytes(image)
    given = [tmp_path / "record.json", "--image", tmp_path / "image", "--archive", store / "small.mar", "--device", "cpu"]
    return main(["replay", *map(str, given), *more])


def test_a_record_holds_what_made_the_maps(answer, archive):
    told = answer["audit"]
    assert told["digest"] == archive.digest and len(archive.digest) == 64 and told["image_sha256"] == audit.sha256(IMAGE)
    assert told["model"] == {"name": "small", "version": "1.0"} and told["request"] == "id-0" and told["device"] == "cpu"
    assert {"torchserve-explain", "torch", "torchvision", "python"} <= set(told["versions"])
    for one, recorded in zip(answer["explanations"], told["explanations"], strict=True):
        assert (one["method"], one["target"]["index"], one["parameters"], one["evaluations"]) == (
            *(recorded[key] for key in ("method", "target", "parameters", "evaluations")),
        )
        assert recorded["parameters"]["seed"] == 0 and recorded["score"] == one["target"]["score"]


def test_a_record_is_told_only_where_it_is_asked_for(archive):
    asked, silent = answers(archive, {"method": "saliency", "audit": "true"}, {"method": "saliency"})
    assert "audit" in json.loads(asked.body) and "audit" not in json.loads(silent.body)


@pytest.mark.parametrize("output", ["png", "html"])
def test_a_picture_and_a_page_have_the_record_inside(archive, store, tmp_path, capsys, output):
    fields = {"method": "grad_cam,saliency", "output": output}
    asked, silent = answers(archive, fields | {"audit": "true"}, fields)
    record = json.loads(audit.taken_from(asked.body))
    assert [one["method"] for one in record["explanations"]] == ["grad_cam", "saliency"]
    assert not audit.taken_from(silent.body)
    kept = audit.put_into(silent.body, silent.content_type, record)
    assert json.loads(audit.taken_from(kept)) == record
    if output == "png":
        assert Image.open(io.BytesIO(kept)).tobytes() == Image.open(io.BytesIO(silent.body)).tobytes()
    (tmp_path / "answer").write_bytes(asked.body)
    given = [tmp_path / "answer", "--image", tmp_path / "image", "--archive", store / "small.mar", "--device", "cpu"]
    (tmp_path / "image").write_bytes(IMAGE)
    assert main(["replay", *map(str, given)]) == 0 and capsys.readouterr().out.count("the same") == 2


def test_a_picture_that_is_cut_off_is_no_record(archive, tmp_path, store, capsys):
    asked = answers(archive, {"method": "saliency", "output": "png", "audit": "true"})[0]
    (tmp_path / "cut").write_bytes(asked.body[:50])
    assert main(["replay", str(tmp_path / "cut"), "--image", str(tmp_path / "cut"), "--archive", str(store / "small.mar")]) == 1
    assert "is no record" in capsys.readouterr().err


def test_a_label_that_looks_like_a_record_is_none_and_breaks_no_page(archive):
    evil = "</script><script>alert(1)</script>" + "{}".join(audit.SCRIPT)
    page = b"<!doctype html><body></body>"
    kept = audit.put_into(page, "text/html; charset=utf-8", {"model": {"name": evil}})
    assert kept.count(b"</script>") == 1 and json.loads(audit.taken_from(kept)) == {"model": {"name": evil}}


def test_the_digest_of_the_values_is_that_of_the_npy_answer(archive):
    fields = {"method": "grad_cam", "audit": "true"}
    told = json.loads(answers(archive, fields)[0].body)["audit"]["explanations"][0]
    values = answers(archive, fields | {"output": "npy"})[0].body
    assert told["sha256"] == audit.sha256(values[-SIDE * SIDE * 4 :])


def test_every_method_is_the_same_when_it_is_replayed(answer, store, tmp_path, capsys):
    assert replayed(store, tmp_path, answer) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "image and archive are those of the record"
    served = list(WITHOUT_ATTENTION)
    assert [line.split(" ")[0] for line in lines[1:]] == served and all(": the same" in line for line in lines[1:])


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "integrated_gradients", "smoothing": "smoothgrad", "samples": "3", "score": "probability"},
        {"method": "grad_cam", "layer": "layer2,last", "target": "dog,0"},
        {"method": "integrated_gradients", "max_error": "0.000001"},  # until its budget ends
        {"method": "gradient_shap", "seed": "7", "samples": "5", "baseline": "noise"},
        {"method": "rise", "samples": "20", "max_sampling_error": "0.0001"},
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_what_was_asked_for_is_replayed_with_its_parameters(archive, store, tmp_path, fields):
    told = json.loads(answers(archive, fields | {"audit": "true"})[0].body)
    assert replayed(store, tmp_path, told) == 0


def test_a_budget_that_others_shared_is_the_replays_too(archive, store, tmp_path):
    """The rows that fixed methods leave of the archive's limit, here 700, are shared by the paths."""
    fields = {"method": "lime,integrated_gradients", "samples": "200", "max_error": "0.000001", "audit": "true"}
    fields |= {"target": "0,1,2"}
    told = json.loads(answers(archive, fields)[0].body)
    assert told["audit"]["explanations"][-1]["budget"] == 33
    assert replayed(store, tmp_path, told) == 0


@pytest.mark.parametrize("changed", [{"seed": 1}, {"samples": 7}, {"baseline": "white"}])
def test_another_parameter_is_not_the_same(archive, store, tmp_path, capsys, changed):
    told = json.loads(answers(archive, {"method": "gradient_shap", "audit": "true", **FEW})[0].body)
    told["audit"]["explanations"][0]["parameters"] |= changed
    assert replayed(store, tmp_path, told) == 1
    assert "gradient_shap of class" in (said := capsys.readouterr().out) and "NOT THE SAME" in said


def test_what_else_is_another_one_is_told_first(answer, store, tmp_path, capsys):
    assert replayed(store, tmp_path, answer, image=picture(1)) == 1
    out, said = capsys.readouterr()
    assert not out and "the image is another one" in said and answer["audit"]["image_sha256"] in said
    other = answer | {"audit": answer["audit"] | {"digest": "f" * 64}}
    assert replayed(store, tmp_path, other) == 1
    out, said = capsys.readouterr()
    assert not out and "the archive is another one" in said and "f" * 64 in said
    old = answer["audit"] | {"versions": answer["audit"]["versions"] | {"torch": "1.0"}, "explanations": []}
    assert replayed(store, tmp_path, old) == 0
    assert "torch was 1.0 and is " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("", "holds no audit record"),
        ('{"explanations": []}', "ask for the explanation with audit=true"),
        ("nonsense", "is no record: allowed: a JSON, PNG or HTML answer"),
        ("<!doctype html><body></body>", "holds no audit record"),
        ('{"image_sha256": "0"}', "a record's time: Field required"),
    ],
)
def test_what_is_no_record_is_refused(store, tmp_path, capsys, told, said):
    assert replayed(store, tmp_path, told) == 1
    assert said in capsys.readouterr().err


def test_a_missing_archive_is_refused(answer, tmp_path, capsys):
    assert replayed(tmp_path, tmp_path, answer) == 1
    assert "small.mar does not exist; allowed: --archive" in capsys.readouterr().err


def test_the_log_holds_a_line_for_each_answer_and_none_for_a_refusal(archive, store, tmp_path, caplog):
    caplog.set_level(logging.INFO, audit.log.name)
    limits = archive.settings.explanations.limits.model_copy(update={"answer_bytes": 40_000})
    settings = archive.settings.model_copy(
        update={"explanations": archive.settings.explanations.model_copy(update={"limits": limits})}
    )
    asked = ({"method": "saliency"}, {"method": "nonsense"}, {"method": "saliency,grad_cam", "values": "true"})
    answered = answers(replace(archive, settings=settings), *asked)
    assert [one.status for one in answered] == [200, 400, 422]
    (line,) = (record.message for record in caplog.records if record.name == audit.log.name)
    assert line.isascii() and json.loads(line.removeprefix(audit.MARK))["request"] == "id-0"
    assert replayed(store, tmp_path, f"{line}\n{line}\n") == 0  # with the mark, or without
    caplog.clear()
    silent = settings.model_copy(update={"explanations": settings.explanations.model_copy(update={"audit": None})})
    assert [one.status for one in answers(replace(archive, settings=silent), asked[0] | {"audit": "true"})] == [200]
    assert not caplog.records


def test_only_log_is_a_place_for_records():
    with pytest.raises(ValueError, match=r"explanations\.audit: Input should be 'log'"):
        read_settings({"classifier": {"architecture": "model.py"}, "explanations": {"audit": "file"}})


def test_a_sketch_tells_how_far_maps_are_apart():
    draw = np.random.default_rng(0)
    first = draw.standard_normal((40, 30)).astype("f4")
    for scale in (1e-6, 1e-2, 1.0):
        second = first + np.float32(scale) * draw.standard_normal((40, 30)).astype("f4")
        apart = np.linalg.norm(audit.sketch(second).astype(float) - audit.sketch(first)) / 8
        assert apart == pytest.approx(np.linalg.norm(second - first), rel=0.35)
    assert audit.sketch(first).shape == (64,)
    # What an earlier version wrote is read by later ones: the signs are part of the format.
    assert audit.sketch(np.eye(2, 3, dtype="f4"))[:6].tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0, 0.0]


@pytest.mark.live
@pytest.mark.parametrize("mode", ["continuous", "classic"])
def test_live_records_are_in_the_answer_and_in_a_log_of_their_own(mode, tmp_path, tmp_path_factory, capsys):
    store = tmp_path_factory.mktemp("store")
    continuous = "explanations:" + AUDITED.partition("explanations:")[2]
    build_small(tmp_path_factory.mktemp("small"), store, AUDITED if mode == "classic" else continuous)
    with served(["small"], store, tmp_path) as server:
        url = f"{server.inference}/explanations/small"
        fields = {"method": "integrated_gradients,lime", "samples": "20", "audit": "true"}
        answer = httpx.post(url, files={"data": IMAGE}, data=fields, headers={"Authorization": "Bearer secret"}, timeout=60)
        instances = {"instances": [{"data": base64.b64encode(IMAGE).decode(), "method": "grad_cam", "audit": True}]}
        kserve = httpx.post(f"{server.inference}/v1/models/small:explain", json=instances, timeout=60)
        picture_of_it = httpx.post(url, files={"data": IMAGE}, data={"method": "saliency", "output": "png"}, timeout=60)
        assert picture_of_it.headers["content-type"] == "image/png"
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert [name for name, text in logs.items() if audit.MARK in text or "image_sha256" in text] == ["audit_log.log"]
    lines = [json.loads(line) for line in logs["audit_log.log"].splitlines()]
    methods = [[one["method"] for one in line["explanations"]] for line in lines]
    assert methods == [["integrated_gradients", "lime"], ["grad_cam"], ["saliency"]]
    assert lines[0] == answer.json()["audit"] and lines[0]["request"] == answer.headers["x-request-id"]
    assert "secret" not in "".join(logs.values())
    for told in (answer.text, kserve.text, logs["audit_log.log"]):
        assert replayed(store, tmp_path, told) == 0
