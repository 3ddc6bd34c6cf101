"""The OpenAPI document: valid, as strict as the service itself, and true of what it answers."""

import base64
import json

import pytest
from conftest import WITHOUT_ATTENTION, small_cnn
from jsonschema import Draft202012Validator
from live import picture
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel
from test_service import CONFIG, answers, explain, predict, service

from torchserve_explain import __version__
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.errors import RequestError
from torchserve_explain.serving.answer_models import ErrorAnswer, ExplainedImage, Prediction
from torchserve_explain.serving.answers import RENDERERS
from torchserve_explain.serving.parameters import OUTPUTS, PARAMETERS, read_parameters
from torchserve_explain.serving.service import Service
from torchserve_explain.serving.settings import Settings

__all__ = ["service"]  # a fixture
IMAGE = picture()
MEDIA_TYPE = OUTPUTS["openapi"]


@pytest.fixture
def document(service):
    (answer,) = answers(service, explain({"output": b"openapi"}))
    assert answer.status == 200 and answer.content_type == MEDIA_TYPE
    return json.loads(answer.body)


def validator(document, kind):
    return Draft202012Validator({"$ref": f"#/components/schemas/{kind}", **document})


def extra(part):
    """Return the keys of an answer that its types do not know."""
    if isinstance(part, list):
        return {key for one in part for key in extra(one)}
    if not isinstance(part, BaseModel):
        return set()
    return set(part.model_extra or ()) | {key for name in type(part).model_fields for key in extra(getattr(part, name))}


def test_the_document_is_valid(document):
    OpenAPIV31SpecValidator(document).validate()
    assert document["info"] == {
        "title": "small: what is it, and why?",
        "version": "1.0",
        "description": f"torchserve-explain {__version__}",
    }
    assert list(document["paths"]) == ["/predictions/small", "/explanations/small", "/explanations/small/1.0/{methods}"]


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        ({"output": b"openapi"}, {}),
        ({"body": b'{"output": "openapi"}'}, {"Content-Type": "application/json"}),
        ({"body": b""}, {"Accept": MEDIA_TYPE}),
        ({"data": IMAGE, "output": b"openapi", "method": b"grad_cam"}, {}),
        ({"data": IMAGE}, {"Accept": MEDIA_TYPE}),
    ],
)
def test_it_is_answered_to_whoever_asks(service, document, data, headers):
    (answer,) = answers(service, explain(data, headers | {"explain": "True"}))
    assert answer.kind == "page" and json.loads(answer.body) == document


def test_it_is_no_answer_of_another_question(service):
    page, report, map_, refused, kserve, prediction = answers(
        service,
        explain({"body": b""}),
        explain({"body": b""}, {"explain": "True", "Accept": "application/json"}),
        explain({"data": IMAGE, "method": b"saliency", "output": b"json"}, {"explain": "True", "Accept": MEDIA_TYPE}),
        explain({"output": b"openapi", "metod": b"grad_cam"}),
        explain({"body": {"instances": [{"data": base64.b64encode(IMAGE).decode(), "output": "openapi"}]}}),
        predict({"data": IMAGE, "output": b"openapi"}),
    )
    assert page.content_type.startswith("text/html") and "parameters" in json.loads(report.body)
    assert "explanations" in json.loads(map_.body)
    assert (refused.status, kserve.status, prediction.status) == (400, 400, 400)
    assert b"metod" in refused.body and b"allowed: json" in kserve.body and b"top_k" in prediction.body


def test_it_is_no_archives_default():
    settings = Settings.model_validate(CONFIG | {"explanations": {"defaults": {"output": "openapi"}}})
    classifier = Classifier(small_cnn().float(), settings.preprocessing.normalization, settings.preprocessing.size)
    with pytest.raises(RequestError, match="no default; allowed: json, png, npy, html"):
        Service(classifier, [], settings, {"name": "small", "version": "1.0"}, "0" * 64)


def test_every_output_is_drawn_as_its_type_or_is_the_document(service, document):
    assert {*RENDERERS, "openapi"} == set(OUTPUTS)
    content = document["paths"]["/explanations/small"]["post"]["responses"]["200"]["content"]
    assert list(content) == list(OUTPUTS.values())
    data = {"data": IMAGE, "method": b"saliency"}
    for output, media_type in OUTPUTS.items():
        by_field, by_header = answers(
            service, explain(data | {"output": output.encode()}), explain(data, {"explain": "True", "Accept": media_type})
        )
        assert (
            by_field.status == 200
            and by_field.content_type.partition(";")[0] == media_type == by_header.content_type.partition(";")[0]
        )


def properties(document, kind, path="/explanations/small"):
    return document["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]["properties"]


def test_both_forms_take_every_parameter(document):
    for kind in ("multipart/form-data", "application/json"):
        assert list(properties(document, kind)) == ["data", *PARAMETERS]
        assert list(properties(document, kind, "/predictions/small")) == ["data", "top_k"]


# Of each kind something inside, at and beyond the bounds.
VALUES = [
    True, 0, 1, 2, 50, 51, 100, 101, -1, 2**63 - 1, 2**63, 0.0, 1e-9, 0.5, 1.0, 1.5, 49.9, 99.9, 100.5,
    [], ["last"], ["reduce", "stem"], [1, "2"], ["all"],
    *(name for name in METHODS), ["grad_cam", "saliency"], ["nonsense"],
    "json", "openapi", "gif", "black", "green", "crop", "smoothgrad", "logit", "probability", "sensitivity", "relevance",
    "epsilon_plus", "idgi", "libra", "detached", "runner_up", ["infidelity", "deletion"], ["beauty"],
    "inferno", "jet", {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_schema_allows_what_the_service_allows(service, document, name):
    """JSON's own types; a form's texts stand for them."""
    schema = Draft202012Validator(properties(document, "application/json")[name])
    taken = []
    for value in VALUES:
        if isinstance(value, str) and "string" not in schema.schema["type"]:
            continue  # a number may come as text
        if name in ("method", "layer", "quality", "target") and isinstance(value, str | int | float):
            continue  # what a comma list may hold is checked as a list
        if name in ("values", "audit") and value in (0, 1) and not isinstance(value, bool):
            continue  # a form's flag may be a number
        assert schema.is_valid(value) is accepted(service, name, value), value
        taken += [value] if schema.is_valid(value) else []
    assert taken


def accepted(service, name, value):
    try:
        parameters = read_parameters({name: value})
        service._planner.capabilities.choose(parameters.method)
        service._planner._check_timeout(parameters)
    except RequestError:
        return False
    return True


def test_every_answer_is_of_its_type(service, document):
    """Unknown keys are allowed to clients, and not here: what an answer tells, the document tells."""
    every = {"data": IMAGE, "method": b"all", "samples": b"10", "values": b"true"}
    measured = {"data": IMAGE, "method": b"saliency", "quality": b"all"}
    smooth = {"data": IMAGE, "method": b"saliency,grad_cam", "smoothing": b"vargrad", "samples": b"2", "target": b"0,1"}
    refusal, *found = answers(service, *map(explain, ({"data": b"none"}, every, measured, smooth)))
    told = validator(document, "ExplainedImage")
    for answer in found:
        told.validate(json.loads(answer.body))
        read = ExplainedImage.model_validate_json(answer.body)
        assert extra(read) == set() and read.model_dump(mode="json", by_alias=True, exclude_unset=True) == json.loads(
            answer.body
        )
    assert {one["method"] for one in json.loads(found[0].body)["explanations"]} == set(WITHOUT_ATTENTION)
    with pytest.raises(Exception, match="label"):
        told.validate(json.loads(found[0].body) | {"predicted": {"index": 0, "probability": 1}})
    (prediction,) = answers(service, predict())
    validator(document, "Prediction").validate(json.loads(prediction.body))
    assert Prediction.model_validate_json(prediction.body).label == next(iter(json.loads(prediction.body)))
    validator(document, "ErrorAnswer").validate(json.loads(refusal.body))
    assert extra(ErrorAnswer.model_validate_json(refusal.body)) == set()
