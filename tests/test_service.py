"""The straight line from a request to its answer: time runs out for whom it must, and for nobody else."""

import base64
import io
import json
import time
from typing import Any

import pytest
import torch
from conftest import small_cnn
from live import picture, white
from PIL import Image

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Piece
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.quality import QUALITIES
from torchserve_explain.errors import ArchiveError, ExplainError, RequestError
from torchserve_explain.serving import service as service_module
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.service import RawRequest, Service, error_answer
from torchserve_explain.serving.settings import Settings, read_settings

CONFIG = {
    "classifier": {"architecture": "model.py"},
    "preprocessing": {"resize": 32, "crop": 32},
    "responseTimeout": 100,
    "explanations": {"limits": {"seconds": 50}},
}
PREDICTION = {"data": picture()}
EXPLANATION = {"data": picture(), "method": b"sensitivity"}
ASKED = {"explain": "True"}


@pytest.fixture
def service():
    settings = Settings.model_validate(CONFIG)
    preprocessing = settings.preprocessing
    classifier = Classifier(small_cnn().float(), preprocessing.normalization, preprocessing.size)
    return Service(classifier, [], settings, {"name": "small", "version": "1.0"}, "0" * 64)


def predict(data=PREDICTION, **when):
    return RawRequest(data, {}, **when)


def explain(data=EXPLANATION, headers=ASKED, **when):
    return RawRequest(data, headers, **when)


def answers(service, *raws, classifier=None):
    """Return the answers to requests that are in flight together."""
    engine = Engine(classifier or service.classifier, 8)
    tasks = [engine.add(Piece(service.answer(raw)), service.deadline(raw)) for raw in raws]
    while any(task.outcome is None for task in tasks):
        engine.step()
    outcomes = [task.outcome for task in tasks if task.outcome is not None]
    return [error_answer(outcome) if isinstance(outcome, ExplainError) else outcome.value for outcome in outcomes]


def test_a_request_whose_time_is_over_is_a_504_and_its_neighbour_is_answered(service):
    late, fine = answers(service, explain(arrived=time.monotonic() - 51), explain())
    assert late.status == 504 and b"out of time" in late.body
    assert fine.status == 200


def test_a_client_may_ask_for_less_time_and_not_for_more(service, monkeypatch):
    def decode(*arguments):
        time.sleep(0.3)
        return read_picture(*arguments)

    monkeypatch.setattr(service_module, "read_picture", decode)
    late, fine, refused = answers(
        service,
        explain(EXPLANATION | {"timeout": b"0.1"}),
        explain(EXPLANATION | {"timeout": b"40"}),
        explain(EXPLANATION | {"timeout": b"51"}),
    )
    assert [late.status, fine.status, refused.status] == [504, 200, 400]
    assert b"at most the archive's 50" in refused.body


def test_a_fault_of_ours_is_told_without_its_details(service, monkeypatch):
    monkeypatch.setattr(service_module, "Report", lambda *_: 1 / 0)
    failed, fine = answers(service, explain(), predict())
    assert failed.status == 500 and b"log" in failed.body and b"division" not in failed.body
    assert fine.status == 200


@pytest.mark.parametrize("fails", [MemoryError("no memory"), RuntimeError("a fault")], ids=["memory", "fault"])
@pytest.mark.parametrize("step", ["read_request", "read_picture", "try_it_page"])
def test_whatever_fails_on_the_way_is_the_answer_of_that_request_alone(service, monkeypatch, fails, step):
    real = getattr(service_module, step)

    def failing(*arguments, **options):
        if step == "try_it_page" or b"guilty" in str(arguments[0]).encode():
            raise fails
        return real(*arguments, **options)

    monkeypatch.setattr(service_module, step, failing)
    guilty = explain({"body": b""}, ASKED) if step == "try_it_page" else explain({"data": b"guilty"})
    failed, fine = answers(service, guilty, explain())
    assert failed.status == (503 if isinstance(fails, MemoryError) else 500)
    assert fine.status == 200


def test_a_model_that_answers_nan_is_a_500_and_never_nan_in_json(service):
    with torch.no_grad():
        service.classifier._model.head.bias.fill_(float("nan"))
    for answer in answers(service, predict(), explain()):
        assert answer.status == 500 and b"NaN" not in answer.body


def test_a_forward_that_raises_for_one_image_fails_its_request_alone(service, monkeypatch):
    """The pass that they share is repeated for each of them."""
    logits, calls = service.classifier._model.forward, []

    def forward(x):
        calls.append(len(x))
        if bool((x.amin((1, 2, 3)) > 2).any()):  # the white image
            raise RuntimeError("a fault of the user's own forward")
        return logits(x)

    monkeypatch.setattr(service.classifier._model, "forward", forward)
    for _ in range(50):  # until they happen to share one
        failed, *fine = answers(service, predict({"data": white()}), predict(), explain())
        assert failed.status == 500 and [answer.status for answer in fine] == [200, 200]
        if max(calls) > 1:
            return
    pytest.fail("no two rows shared a pass")


def test_explanations_beyond_their_places_are_refused_at_once_and_predictions_are_not(service):
    service._places = 2
    found = answers(service, explain(), explain(), explain(), predict())
    assert sorted(answer.status for answer in found[:3]) == [200, 200, 503] and found[3].status == 200
    (refused,) = (answer for answer in found if answer.status == 503)
    assert refused.headers == {"Retry-After": "1"} and b"at most 2" in refused.body
    assert answers(service, explain())[0].status == 200  # the places are free again


def test_what_an_answer_took_is_told_to_the_host(service):
    explained, predicted, page, refused = answers(
        service, explain(EXPLANATION | {"quality": b"deletion"}), predict(), explain({"body": b""}), predict({"data": b"x"})
    )
    assert [a.kind for a in (explained, predicted, page, refused)] == ["explanation", "prediction", "page", "refused"]
    (explanation,) = explained.explanations
    assert explanation.evaluations == 1 + 51  # the quality's rows among them
    assert all(answer.seconds > 0 for answer in (explained, predicted, page, refused))
    assert all(seconds > 0 for seconds in service.stage_seconds.values())


def test_an_answer_larger_than_torchserve_can_carry_is_refused(service):
    service.limits = service.limits.model_copy(update={"answer_bytes": 1000})
    large, small = answers(service, explain(), predict())
    assert large.status == 422 and b"bytes" in large.body
    assert small.status == 200


def test_predictions_refuse_every_unknown_parameter_and_take_null_as_not_given(service):
    encoded = base64.b64encode(picture()).decode()
    bodies: list[dict[str, Any]] = [{"top_k": 3, "bogus": 1}, {"bogus": 1, "top_k": 3}, {"top_k": None}]
    found = answers(service, *(predict({"body": {"data": encoded} | body}) for body in bodies))
    assert [answer.status for answer in found] == [400, 400, 200]
    assert len(json.loads(found[2].body)) == 5


def test_the_accept_header_says_nothing_to_kserve(service):
    instances = {"instances": [{"data": base64.b64encode(picture()).decode(), "method": "sensitivity"}]}
    (answer,) = answers(service, explain({"body": instances}, ASKED | {"Accept": "text/html"}))
    assert answer.status == 200 and answer.content_type == "application/json"


def test_more_maps_than_can_be_drawn_in_time_are_refused(service):
    fields = {"method": b"sensitivity", "target": b"0,1,2,3,4", "data": picture()}
    service._planner._limits = service.limits.model_copy(update={"explanations": 4})
    (answer,) = answers(service, explain(fields))
    assert answer.status == 422 and b"5 explanations" in answer.body


def test_what_is_echoed_makes_the_same_map_again(service):
    def explained(**fields):
        data = {"data": picture(), "output": b"json"} | {k: str(v).encode() for k, v in fields.items()}
        return json.loads(answers(service, explain(data))[0].body)["explanations"][0]

    first = explained(method="gradient_shap", smoothing="smoothgrad", samples=3, values="true")
    again = explained(method="gradient_shap", values="true", **first["parameters"])
    assert first["values"] == again["values"] and first["parameters"] == again["parameters"]


def asked(service, **fields):
    """Return the answers' explanations, or the refusal."""
    (answer,) = answers(service, explain({"data": picture()} | {k: str(v).encode() for k, v in fields.items()}))
    told = json.loads(answer.body)
    return told["explanations"] if answer.status == 200 else (answer.status, told["message"])


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_a_difference_is_told_with_what_it_is_compared_with(service, score):
    plain = {one["target"]["index"]: one for one in asked(service, method="grad_cam", target="0,1,2,3,4", score=score)}
    first, second = sorted(plain, key=lambda index: -plain[index]["target"]["score"])[:2]
    (rival,) = asked(service, method="grad_cam", versus="runner_up", score=score)
    assert (rival["target"]["index"], rival["versus"]["index"]) == (first, second) and "versus" not in plain[first]
    assert rival["parameters"]["versus"] == second and rival["versus"]["label"] == str(second)
    difference = plain[first]["target"]["score"] - plain[second]["target"]["score"]
    assert rival["target"]["score"] == pytest.approx(difference, abs=1e-6)
    assert rival["target"]["probability"] == pytest.approx(plain[first]["target"]["probability"])
    (same,) = asked(service, method="grad_cam", target=first, versus=second, score=score)
    assert same["heatmap"] == rival["heatmap"] and same["evaluations"] == 1
    (rest,) = asked(service, method="grad_cam", versus="rest", score=score)
    assert rest["versus"] == {"index": None, "label": "the rest", "probability": 1 - rest["target"]["probability"]}
    if score == "probability":
        assert rest["target"]["score"] == pytest.approx(2 * rest["target"]["probability"] - 1, abs=1e-6)


def test_the_pass_that_predicts_answers_the_difference_too(service, monkeypatch):
    sizes, evaluate = [], service.classifier.evaluate

    def watched(inputs, *arguments, **options):
        sizes.append(len(inputs))
        return evaluate(inputs, *arguments, **options)

    monkeypatch.setattr(service.classifier, "evaluate", watched)
    for versus in ("runner_up", "rest"):
        asked(service, method="sensitivity,grad_cam", versus=versus)
    assert sizes == [1, 1]
    (first, second) = asked(service, method="sensitivity", target="0,1", versus=2, values="true")
    assert first["values"] != second["values"] and sizes[2:] == [1, 1]


def test_the_difference_is_in_the_report_and_the_contact_sheet(service):
    index = asked(service, method="sensitivity", target=1)[0]["target"]["index"]
    fields = {"data": picture(), "target": b"1", "versus": b"3", "method": b"grad_cam,sensitivity"}
    html, png = answers(service, *(explain(fields | {"output": output}) for output in (b"html", b"png")))
    assert index == 1 and b"<h2>grad_cam: 1 rather than 3</h2>" in html.body and b"Rather than" in html.body
    assert png.status == 200


def test_a_class_is_not_compared_with_itself(service):
    predicted = asked(service, method="sensitivity")[0]["target"]["index"]
    for fields in ({"target": "0,1", "versus": 1}, {"versus": predicted}):
        status, message = asked(service, method="sensitivity", **fields)
        assert (
            status == 400
            and message == f"versus: '{fields['versus']}' is the target itself; allowed: another class, runner_up or rest"
        )
    assert asked(service, versus="lion") == (
        400,
        "versus: 'lion' is no label; allowed: an index from 0 to 4, or a label, or runner_up or rest",
    )
    assert asked(service, method="lrp", versus="rest") == (
        400,
        "versus: lrp has no rule for a log-sum-exp; allowed: a class or runner_up",
    )
    settings = Settings.model_validate(CONFIG | {"explanations": {"defaults": {"target": "1", "versus": "1"}}})
    with pytest.raises(RequestError, match="is the target itself"):
        Service(service.classifier, [], settings, {}, "0" * 64)


def test_an_archive_serves_the_methods_that_it_lists(service):
    settings = Settings.model_validate(CONFIG | {"explanations": {"methods": ["grad_cam"], "defaults": {"method": "grad_cam"}}})
    few = Service(service.classifier, [], settings, {"name": "few", "version": "1"}, "0" * 64)
    report = json.loads(answers(few, explain({"body": b""}, ASKED | {"Accept": "application/json"}))[0].body)
    assert [method["name"] for method in report["methods"]] == ["grad_cam"] and report["refused"] == {}
    assert [one["method"] for one in asked(few, method="all")] == ["grad_cam"] and asked(few, method="lrp")[0] == 400
    without = Settings.model_validate(CONFIG | {"explanations": {"methods": ["grad_cam"]}})
    with pytest.raises(RequestError, match="'integrated_gradients' is not served by this archive"):
        Service(service.classifier, [], without, {}, "0" * 64)
    for wrong, why in ((["grad_cat"], "'grad_cat' is no method; allowed: integrated_gradients, "), ([], "at least 1 item")):
        with pytest.raises(ArchiveError, match=why):
            read_settings(CONFIG | {"explanations": {"methods": wrong}})


def test_the_rule_of_a_path_is_told_where_it_is_no_default(service):
    told = [asked(service, steps=3, **fields)[0]["parameters"] for fields in ({}, {"rule": "riemann"}, {"rule": "idgi"})]
    assert [parameters.get("rule") for parameters in told] == [None, None, "idgi"]


def test_the_first_client_finds_a_service_that_has_explained(service):
    assert service.warm_up(Engine(service.classifier, 8)).evaluations == 17


def test_adaptive_paths_share_what_the_fixed_jobs_leave(service):
    service._planner._limits = service.limits.model_copy(update={"evaluations": 300})
    image = base64.b64encode(picture()).decode()
    asked = [{"data": image, "steps": 199}, {"data": image, "max_error": 1e-9, "target": [0, 1]}]
    (answer,) = answers(service, explain({"body": {"instances": asked}}))
    fixed, adaptive = json.loads(answer.body)["explanations"]
    assert [one["evaluations"] for one in fixed["explanations"]] == [200]
    assert [one["evaluations"] for one in adaptive["explanations"]] == [50, 50]
    assert all(one["completeness_error"] > 1e-9 for one in adaptive["explanations"])


@pytest.mark.parametrize("output", [b"json", b"html"])
def test_a_quality_that_time_does_not_suffice_for_takes_no_explanation_with_it(service, monkeypatch, output):
    monkeypatch.setattr(service_module, "QUALITY_SHARE", 0.0)
    fields = {"data": picture(), "method": b"sensitivity", "quality": b"all", "output": output}
    (answer,) = answers(service, explain(fields))
    assert answer.status == 200
    if output == b"json":
        (one,) = json.loads(answer.body)["explanations"]
        assert set(one["quality"].values()) == {None} and len(one["quality"]) == len(QUALITIES)
        assert all("out of time" in details["reason"] for details in one["quality_details"].values())
    else:
        assert answer.body.count(b"not measured: out of time") == len(QUALITIES)


def test_a_small_maps_pictures_are_large_enough_to_be_looked_at(service):
    (answer,) = answers(service, explain())
    heatmap = json.loads(answer.body)["explanations"][0]["heatmap"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(heatmap[name]))).size for name in ("overlay_png", "heatmap_png")]
    assert sizes == [(224, 224)] * 2 and (heatmap["width"], heatmap["height"]) == (32, 32)


@pytest.mark.parametrize(
    ("fields", "units"),
    [
        ({"method": b"integrated_gradients,input_x_gradient,occlusion,lime"}, ["logit"] * 4),
        ({"method": b"grad_cam,saliency,biased_layer,guided_backprop"}, [None] * 4),
        ({"method": b"biased_layer", "reduction": b"relevance"}, ["logit"]),
        ({"method": b"occlusion", "score": b"probability"}, ["probability"]),
        ({"method": b"input_x_gradient", "smoothing": b"smoothgrad", "samples": b"2"}, ["logit"]),
        ({"method": b"input_x_gradient", "smoothing": b"vargrad", "samples": b"2"}, [None]),
    ],
)
def test_a_scale_tells_the_unit_of_what_is_an_amount_of_the_score(service, fields, units):
    (answer,) = answers(service, explain({"data": picture(), **fields}))
    found = {one["method"]: one["heatmap"]["scale"]["unit"] for one in json.loads(answer.body)["explanations"]}
    assert [found[name] for name in fields["method"].decode().split(",")] == units


def test_values_come_with_the_paths_refinement(service):
    fields = {"data": picture(), "method": b"integrated_gradients,saliency", "max_error": b"0.001"}
    plain, full = answers(service, explain(fields), explain(fields | {"values": b"true"}))
    assert b"refinement" not in plain.body
    path, gradient = json.loads(full.body)["explanations"]
    assert path["refinement"][0]["evaluations"] == 9 and path["refinement"][-1]["evaluations"] == path["evaluations"]
    assert path["refinement"][-1]["completeness_error"] == pytest.approx(path["completeness_error"], abs=1e-4)
    assert "refinement" not in gradient


def test_pages_are_what_they_say_and_stand_in_no_frame(service):
    report = explain(EXPLANATION | {"output": b"html"})
    opened = explain({"body": b""}, ASKED | {"Accept": "text/html"})
    for answer in answers(service, report, opened):
        assert answer.content_type.startswith("text/html")
        assert answer.headers == {
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
        }
