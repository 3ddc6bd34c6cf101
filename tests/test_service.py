"""The service between TorchServe and the engine: time runs out for whom it must, and for nobody else."""

import base64
import io
import json

import pytest
import torch
from conftest import small_cnn
from live import picture
from PIL import Image

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.serving.service import Row, Service
from torchserve_explain.serving.settings import Settings

CONFIG = {
    "classifier": {"architecture": "model.py"},
    "preprocessing": {"resize": 32, "crop": 32},
    "responseTimeout": 100,
    "explanations": {"limits": {"seconds": 50}},
}


@pytest.fixture
def service():
    settings = Settings.model_validate(CONFIG)
    preprocessing = settings.preprocessing
    classifier = Classifier(small_cnn().float(), preprocessing.normalization, preprocessing.size)
    return Service(classifier, [], settings, {"name": "small", "version": "1.0"})


def statuses(service, monkeypatch, times, rows):
    """Answer rows on a clock that shows `times`, and then the last of them for ever."""
    clock = iter(times)
    last = times[-1]
    monkeypatch.setattr("torchserve_explain.serving.service.time.monotonic", lambda: next(clock, last))
    return [exchange.answer.status for exchange in service.answer(rows)]


PREDICTION = Row({"data": picture()}, {})
EXPLANATION = Row({"data": picture(), "method": b"sensitivity"}, {"explain": "True"})


def test_decoding_that_takes_too_long_is_cut_short(service, monkeypatch):
    assert statuses(service, monkeypatch, [0, 0, 51], [PREDICTION, PREDICTION]) == [200, 504]


def test_answers_that_would_come_after_the_worker_is_killed_are_not_drawn(service, monkeypatch):
    assert statuses(service, monkeypatch, [0, 0, 0, 10, 76], [PREDICTION, EXPLANATION]) == [200, 504]


def test_a_fault_of_ours_is_told_without_its_details(service, monkeypatch):
    monkeypatch.setattr("torchserve_explain.serving.service.Told", lambda *_: 1 / 0)
    failed, fine = (exchange.answer for exchange in service.answer([EXPLANATION, PREDICTION]))
    assert failed.status == 500 and b"log" in failed.body and b"division" not in failed.body
    assert fine.status == 200


def test_a_model_that_answers_nan_is_a_500_and_never_nan_in_json(service, monkeypatch):
    monkeypatch.setattr(service._engine, "logits", lambda inputs: torch.full((len(inputs), 5), float("nan")))
    for exchange in service.answer([PREDICTION, EXPLANATION]):
        assert exchange.answer.status == 500 and b"NaN" not in exchange.answer.body


def test_an_answer_larger_than_torchserve_can_carry_is_refused(service):
    service._limits = service._limits.model_copy(update={"answer_bytes": 1000})
    large, small = (exchange.answer for exchange in service.answer([EXPLANATION, PREDICTION]))
    assert large.status == 422 and b"bytes" in large.body
    assert small.status == 200


def test_predictions_refuse_every_unknown_parameter_and_take_null_as_not_given(service):
    encoded = base64.b64encode(picture()).decode()
    bodies = [{"top_k": 3, "bogus": 1}, {"bogus": 1, "top_k": 3}, {"top_k": None}]
    answers = [e.answer for e in service.answer([Row({"body": {"data": encoded} | body}, {}) for body in bodies])]
    assert [answer.status for answer in answers] == [400, 400, 200]
    assert len(json.loads(answers[2].body)) == 5


def test_the_accept_header_says_nothing_to_kserve(service):
    instances = {"instances": [{"data": base64.b64encode(picture()).decode(), "method": "sensitivity"}]}
    (exchange,) = service.answer([Row({"body": instances}, {"explain": "True", "Accept": "text/html"})])
    assert exchange.answer.status == 200 and exchange.answer.content_type == "application/json"


def test_more_maps_than_can_be_drawn_in_time_are_refused(service):
    fields = {"method": b"sensitivity", "target": b"0,1,2,3,4", "data": picture()}
    service._planner._limits = service._limits.model_copy(update={"explanations": 4})
    (exchange,) = service.answer([Row(fields, {"explain": "True"})])
    assert exchange.answer.status == 422 and b"5 explanations" in exchange.answer.body


def test_what_is_echoed_makes_the_same_map_again(service):
    def explain(**fields):
        row = Row({"data": picture(), "output": b"json"} | {k: str(v).encode() for k, v in fields.items()}, {"explain": "True"})
        return json.loads(service.answer([row])[0].answer.body)["explanations"][0]

    first = explain(method="gradient_shap", smoothing="smoothgrad", samples=3, values="true")
    again = explain(method="gradient_shap", values="true", **first["parameters"])
    assert first["values"] == again["values"] and first["parameters"] == again["parameters"]


def test_the_first_client_finds_a_service_that_has_explained(service):
    assert service.warm_up().evaluations == 17


def test_adaptive_paths_share_what_the_fixed_jobs_leave(service):
    service._planner._limits = service._limits.model_copy(update={"evaluations": 300})
    image = base64.b64encode(picture()).decode()
    asked = [{"data": image, "steps": 199}, {"data": image, "max_error": 1e-9, "target": [0, 1]}]
    (exchange,) = service.answer([Row({"body": {"instances": asked}}, {"explain": "True"})])
    fixed, adaptive = json.loads(exchange.answer.body)["explanations"]
    assert [one["evaluations"] for one in fixed["explanations"]] == [200]
    assert [one["evaluations"] for one in adaptive["explanations"]] == [50, 50]
    assert all(one["completeness_error"] > 1e-9 for one in adaptive["explanations"])


def test_a_quality_that_time_does_not_suffice_for_takes_no_explanation_with_it(service, monkeypatch):
    fields = {"data": picture(), "method": b"sensitivity", "quality": b"all", "output": b"json"}
    run, calls = service._engine.run, []

    def late(works, deadline):
        calls.append(len(works))
        return run(works, deadline if len(calls) == 1 else 0.0)

    monkeypatch.setattr(service._engine, "run", late)
    for output in (b"json", b"html"):
        calls.clear()
        (exchange,) = service.answer([Row(fields | {"output": output}, {"explain": "True"})])
        assert exchange.answer.status == 200 and calls == [1, 4]
        if output == b"json":
            (one,) = json.loads(exchange.answer.body)["explanations"]
            assert set(one["quality"].values()) == {None} and len(one["quality"]) == 4
            assert all("out of time" in details["reason"] for details in one["quality_details"].values())
        else:
            assert exchange.answer.body.count(b"not measured: out of time") == 4


def test_a_small_maps_pictures_are_large_enough_to_be_looked_at(service):
    (exchange,) = service.answer([EXPLANATION])
    heatmap = json.loads(exchange.answer.body)["explanations"][0]["heatmap"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(heatmap[name]))).size for name in ("overlay_png", "heatmap_png")]
    assert sizes == [(224, 224)] * 2 and (heatmap["width"], heatmap["height"]) == (32, 32)


def test_pages_are_what_they_say_and_stand_in_no_frame(service):
    report = Row({"data": picture(), "method": b"sensitivity", "output": b"html"}, {"explain": "True"})
    opened = Row({"body": b""}, {"explain": "True", "Accept": "text/html"})
    for exchange in service.answer([report, opened]):
        assert exchange.answer.content_type.startswith("text/html")
        assert exchange.answer.headers == {
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
        }
