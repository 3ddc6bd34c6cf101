"""The contract through a real TorchServe: every request form, every output, every error, batches of all sorts."""

import base64
import io
import json
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from conftest import WITHOUT_ATTENTION
from live import CONTINUOUS, SMALL_CONFIG, build_small, build_stock, grpc_modules, picture, served
from PIL import Image

from torchserve_explain.attribution.quality import QUALITIES
from torchserve_explain.errors import ServerError
from torchserve_explain.servers.torchserve import free_ports, serving

IMAGE = picture()
CORRELATIONS = ("random_logit", "single_deletion", "road")
pytestmark = pytest.mark.live


@pytest.fixture(scope="module", params=[CONTINUOUS, SMALL_CONFIG], ids=["continuous", "classic"])
def server(request, tmp_path_factory):
    """A server of the small classifier, in both modes of batching, and of the stock handler beside it."""
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store, request.param)
    build_stock(tmp_path_factory.mktemp("stock"), store)
    with served(["small", "stock"], store, tmp_path_factory.mktemp("run")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.inference, timeout=120) as client:
        yield client


def b64(data):
    return base64.b64encode(data).decode()


def predict(client, **options):
    answer = client.post("/predictions/small", **options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def explain(client, image=IMAGE, path="", headers=None, **fields):
    answer = client.post(f"/explanations/small{path}", files={"data": image}, data=fields, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def refused(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body["code"] == status and set(body) == {"code", "type", "message"} and body["message"].isascii()
    return body["message"]


def values_of(explanation):
    values = explanation["values"]
    return np.frombuffer(base64.b64decode(values["data"]), values["dtype"]).reshape(values["shape"]).astype(float)


def test_every_form_of_a_prediction_gets_the_same_answer(client):
    expected = predict(client, content=IMAGE, headers={"content-type": "application/octet-stream"})
    assert predict(client, files={"data": IMAGE}) == pytest.approx(expected)
    assert predict(client, json={"data": b64(IMAGE)}) == pytest.approx(expected)
    assert predict(client, json={"data": "data:image/jpeg;base64," + b64(IMAGE)}) == pytest.approx(expected)
    assert predict(client, content=b64(IMAGE), headers={"content-type": "text/plain"}) == pytest.approx(expected)
    with_charset = {"content-type": "application/json; charset=utf-8"}
    assert predict(client, content=json.dumps({"data": b64(IMAGE)}), headers=with_charset) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(6))
def test_predictions_are_those_of_the_stock_handler(client, seed):
    image = picture(seed, (300 - 20 * seed, 240 + 30 * seed), "PNG")
    stock = client.post("/predictions/stock", files={"data": image}).json()
    ours = predict(client, files={"data": image})
    shared = "cat"  # two classes have this label: the stock answer keeps one of them
    assert {k: v for k, v in ours.items() if not k.startswith(shared)} == pytest.approx(
        {k: v for k, v in stock.items() if k != shared}, rel=1e-4
    )
    assert [k for k in ours if not k.startswith(shared)] == [k for k in stock if k != shared]
    assert len(ours) == 5


def test_top_k_changes_how_many_classes_are_told(client):
    everything = predict(client, json={"data": b64(IMAGE), "top_k": 7})
    assert sum(everything.values()) == pytest.approx(1) and list(everything.values()) == sorted(everything.values())[::-1]
    assert list(predict(client, files={"data": IMAGE}, data={"top_k": "2"})) == list(everything)[:2]


def test_a_default_explanation_holds_what_the_contract_says(client):
    answer = explain(client)
    assert len(answer.content) < 200_000
    told = answer.json()
    assert told["model"] == {"name": "small", "version": "1.0"}
    assert told["image"]["width"] == 240 and told["image"]["height"] == 200
    (one,) = told["explanations"]
    assert one["method"] == "integrated_gradients"
    assert one["target"] | told["predicted"] == one["target"]  # the predicted class, plus its score
    assert one["parameters"] == {"baseline": "black", "max_error": 0.05, "score": "logit", "seed": 0}
    assert one["evaluations"] >= 9 and one["milliseconds"] > 0
    assert one["completeness_error"] <= 0.05 or one["evaluations"] == 400
    assert one["quality"] == {} and "values" not in one
    heatmap = one["heatmap"]
    for name in ("overlay_png", "heatmap_png"):
        drawn = Image.open(io.BytesIO(base64.b64decode(heatmap[name])))
        assert drawn.size == (heatmap["width"], heatmap["height"]) == (224, 224)


def test_values_are_the_map_and_sum_to_the_score_difference(client):
    (one,) = explain(client, values="true", max_error="0.01").json()["explanations"]
    values = values_of(one)
    assert values.shape == (224, 224)
    assert values.min() == pytest.approx(one["heatmap"]["minimum"], rel=1e-2)
    difference = one["target"]["score"] - one["baseline_score"]
    assert abs(values.sum() - difference) / abs(difference) == pytest.approx(one["completeness_error"], abs=0.01)


def test_all_methods_and_targets_are_explained_in_order(client):
    told = explain(client, method="all", target="dog,0", samples="10").json()["explanations"]
    assert [(e["method"], e["target"]["index"]) for e in told] == [(name, t) for name in WITHOUT_ATTENTION for t in (3, 0)]


def test_quality_is_told_with_what_it_was_measured_with(client):
    fields = {"method": "sensitivity,grad_cam", "quality": "all"}
    first, second = explain(client, **fields).json()["explanations"]
    for one in (first, second):
        assert set(one["quality"]) == set(one["quality_details"]) == set(QUALITIES) and one["evaluations"] == 1
        assert all(value >= (-1 if name in CORRELATIONS else 0) for name, value in one["quality"].items())
        details = one["quality_details"]
        assert details["max_sensitivity"]["radius"] == 0.02 and details["max_sensitivity"]["norm"] == "fro"
        assert details["max_sensitivity"]["evaluations"] == details["max_sensitivity"]["samples"] == 10
        curve = details["deletion"]["curve"]
        assert len(curve) == details["deletion"]["steps"] + 1 and curve[0] == pytest.approx(
            one["target"]["probability"], abs=1e-3
        )
        assert one["quality"]["deletion"] == pytest.approx(np.trapezoid(curve) / details["deletion"]["steps"], abs=1e-3)
    assert first["quality"] != second["quality"]
    assert "quality_details" not in explain(client, method="sensitivity").json()["explanations"][0]


def test_the_report_draws_the_curves(client):
    text = explain(client, method="grad_cam", quality="deletion,infidelity", output="html").text
    assert text.count("<polyline") == 1 and "Infidelity" in text and "lower is better" in text


def test_a_quality_that_costs_too_much_or_does_not_exist_is_refused(client):
    many = client.post("/explanations/small", files={"data": IMAGE}, data={"method": "occlusion", "quality": "max_sensitivity"})
    assert "2486 evaluations" in refused(many, 422)
    unknown = client.post("/explanations/small", files={"data": IMAGE}, data={"quality": "beauty"})
    assert "quality" in (message := refused(unknown, 400)) and "infidelity" in message


def test_middle_layers_are_drawn_side_by_side(client):
    fields = {"method": "grad_cam", "layer": "layer1,layer2,layer3,last"}
    told = explain(client, **fields).json()["explanations"]
    assert [one["parameters"]["layer"] for one in told] == ["layer1", "layer2", "layer3", "layer4"]
    assert Image.open(io.BytesIO(explain(client, output="png", **fields).content)).width > 3 * 224


def test_what_has_no_rule_for_the_probability_is_left_out_of_all_and_refused_by_name(client):
    told = explain(client, method="all", score="probability", samples="5").json()["explanations"]
    assert {one["method"] for one in told} == set(WITHOUT_ATTENTION) - {"deep_lift", "lrp", "full_grad"}
    answer = client.post("/explanations/small", files={"data": IMAGE}, data={"method": "lrp", "score": "probability"})
    assert "softmax" in refused(answer, 400)


def test_the_npy_answer_is_the_values(client):
    fields = {"method": "sensitivity,grad_cam", "target": "1,2"}
    maps = np.load(io.BytesIO(explain(client, output="npy", **fields).content), allow_pickle=False)
    told = explain(client, values="true", **fields).json()["explanations"]
    assert maps.shape == (4, 224, 224) and maps.dtype == np.float32
    for found, one in zip(maps, told, strict=True):
        np.testing.assert_allclose(found, values_of(one), rtol=2e-3, atol=1e-2 * np.abs(found).max())


def test_pictures_come_as_fields_and_by_accept_header(client):
    by_field = explain(client, output="png", method="grad_cam")
    by_header = explain(client, headers={"Accept": "image/png"}, method="grad_cam")
    assert by_field.headers["content-type"] == by_header.headers["content-type"] == "image/png"
    assert by_field.content == by_header.content
    assert Image.open(io.BytesIO(by_field.content)).size == (224, 224)
    sheet = Image.open(io.BytesIO(explain(client, output="png", method="all", samples="10").content))
    assert sheet.width > 3 * 224 and sheet.height > 2 * 224


def test_the_report_is_one_self_contained_page(client):
    answer = explain(client, headers={"Accept": "text/html,*/*;q=0.8"}, method="all", samples="10")
    assert answer.headers["content-type"].startswith("text/html")
    assert all(name in answer.text for name in WITHOUT_ATTENTION)
    assert "http://" not in answer.text and "https://" not in answer.text and "<script" not in answer.text


def test_a_browser_that_opens_the_url_gets_the_page(client):
    answer = client.get("/explanations/small")
    assert answer.status_code == 200 and "<form" in answer.text
    assert answer.headers["content-type"].startswith("text/html")


def test_the_openapi_document_names_paths_that_are_served(client):
    by_header = client.get("/explanations/small", headers={"Accept": "application/vnd.oai.openapi+json"})
    by_field = client.post("/explanations/small", data={"output": "openapi"})
    assert by_header.json() == by_field.json() and by_header.headers["content-type"].startswith("application/vnd.oai.openapi")
    for path, operations in by_header.json()["paths"].items():
        for verb in operations.keys() & {"get", "post"}:
            form = {"files": {"data": IMAGE}, "data": {} if "predict" in path else {"method": "grad_cam"}}
            answer = client.request(verb, path.replace("{methods}", "grad_cam,saliency"), **form if verb == "post" else {})
            assert answer.status_code == 200, (verb, path, answer.text)


def test_the_path_names_methods_and_fields_outrank_it(client):
    told = explain(client, path="/1.0/grad_cam,sensitivity").json()["explanations"]
    assert [e["method"] for e in told] == ["grad_cam", "sensitivity"]
    (one,) = explain(client, path="/1.0/grad_cam", method="sensitivity").json()["explanations"]
    assert one["method"] == "sensitivity"


def test_json_arrays_stand_for_comma_lists_and_labels_may_hold_commas(client):
    body = {"data": b64(IMAGE), "method": ["grad_cam"], "target": ["new york, ny", 1], "layer": ["layer3", "last"]}
    told = client.post("/explanations/small", json=body).json()["explanations"]
    assert [(e["parameters"]["layer"], e["target"]["index"]) for e in told] == [
        ("layer3", 6), ("layer3", 1), ("layer4", 6), ("layer4", 1),
    ]  # fmt: skip
    assert explain(client, method="grad_cam", target="new york, ny").json()["explanations"][0]["target"]["index"] == 6


def test_the_same_seed_is_the_same_map(client):
    fields = {"method": "gradient_shap", "samples": "4", "stdev": "0.1", "output": "npy"}
    first, again, other = (explain(client, seed=seed, **fields).content for seed in ("3", "3", "4"))
    assert first == again != other


def test_probability_can_be_explained(client):
    (one,) = explain(client, score="probability", method="integrated_gradients").json()["explanations"]
    assert one["target"]["score"] == pytest.approx(one["target"]["probability"], rel=1e-4)


def test_kserve_v1(client):
    instances = {"instances": [{"data": b64(IMAGE), "top_k": 3}, {"data": b64(picture(2))}]}
    predictions = client.post("/v1/models/small:predict", json=instances).json()["predictions"]
    assert predictions[0] == pytest.approx(dict(list(predict(client, files={"data": IMAGE}).items())[:3]), rel=1e-4)
    assert predictions[1] == pytest.approx(predict(client, files={"data": picture(2)}), rel=1e-4)
    asked = {"instances": [{"data": b64(IMAGE), "method": "grad_cam"}, {"data": b64(IMAGE), "method": "sensitivity"}]}
    told = client.post("/v1/models/small:explain", json=asked).json()["explanations"]
    assert [one["explanations"][0]["method"] for one in told] == ["grad_cam", "sensitivity"]


def test_kserve_v2(client):
    tensor = {"name": "data", "datatype": "BYTES", "shape": [2], "data": [b64(IMAGE), b64(picture(2))]}
    body: dict[str, Any] = {"id": "mine", "inputs": [tensor]}
    answer = client.post("/v2/models/small/infer", json=body).json()
    assert answer["model_name"] == "small" and answer["id"] == "mine"
    (output,) = answer["outputs"]
    assert output["shape"] == [2] and output["datatype"] == "BYTES"
    assert json.loads(output["data"][1]) == pytest.approx(predict(client, files={"data": picture(2)}), rel=1e-4)
    body["parameters"] = {"method": "grad_cam", "target": 2}
    (output,) = client.post("/v2/models/small/explain", json=body).json()["outputs"]
    assert json.loads(output["data"][0])["explanations"][0]["target"]["index"] == 2


def test_grpc(server, client, tmp_path_factory):
    messages, services = grpc_modules(tmp_path_factory.mktemp("proto"))
    with grpc.insecure_channel(server.grpc) as channel:
        stub = services.InferenceAPIsServiceStub(channel)

        def ask(**fields):
            return json.loads(stub.Predictions(messages.PredictionsRequest(model_name="small", input=fields)).prediction)

        assert ask(data=IMAGE) == pytest.approx(predict(client, files={"data": IMAGE}), rel=1e-4)
        told = ask(data=IMAGE, explain=b"true", method=b"grad_cam", target=b"1")
        assert told["explanations"][0]["target"]["label"] == "bee"
        assert ask(data=b"no image")["code"] == 400


REFUSALS = [
    (400, {"method": "gradcam"}, ("method", "gradcam", "grad_cam")),
    (400, {"steps": "zero"}, ("steps", "zero", "whole number")),
    (400, {"max_error": "0"}, ("max_error", "0", "above 0")),
    (400, {"stesp": "3"}, ("stesp", "steps")),
    (400, {"target": "cat"}, ("target", "cat", "2, 5")),
    (400, {"target": "7"}, ("target", "7", "0 to 6")),
    (400, {"method": "grad_cam", "layer": "layer9"}, ("layer", "layer9", "layer4")),
    (400, {"output": "gif"}, ("output", "gif", "png")),
    (400, {"method": "sensitivity\r\n\u00e4" + "x" * 500}, ("method", "...")),
    (422, {"steps": "5000"}, ("5001", "700")),
    (422, {"method": "gradient_shap", "samples": "700"}, ("701", "700")),
    (422, {"target": "0,1,3,4"}, ("4 targets", "3")),
]


@pytest.mark.parametrize(("status", "fields", "told"), REFUSALS, ids=lambda value: str(value)[:30])
def test_a_refusal_names_the_parameter_the_value_and_what_is_allowed(client, status, fields, told):
    message = refused(client.post("/explanations/small", files={"data": IMAGE}, data=fields), status)
    assert all(part in message for part in told), message
    assert len(message) < 400


def test_what_is_no_image_is_refused(client):
    assert "JPEG" in refused(client.post("/predictions/small", files={"data": b"garbage"}), 400)
    assert "-F data=@FILE" in refused(client.post("/predictions/small", files={"data": (None, b"leaf.png")}), 400)
    assert "goes in 'data'" in refused(client.post("/predictions/small", files={"image": IMAGE}), 400)
    assert "JPEG" in refused(client.post("/explanations/small", files={"data": IMAGE[:2000]}), 400)
    assert "no image" in refused(client.post("/explanations/small", files={"method": (None, "grad_cam")}), 400)
    assert "base64" in refused(client.post("/predictions/small", json={"data": "?"}), 400)
    assert "1100x1000" in refused(client.post("/predictions/small", files={"data": picture(0, (1100, 1000))}), 413)


def workers(server):
    described = httpx.get(f"{server.management}/models/small", headers=server.authorization("management")).json()
    return [(worker["pid"], worker["startTime"]) for worker in described[0]["workers"]]


def mixed_request(number):
    """Return request number `number` of a stream of every kind, one in ten with a corrupt image, and its status."""
    if number % 10 == 9:
        return ("/predictions/small" if number % 20 == 9 else "/explanations/small"), picture(number)[:300], {}, 400
    kinds = [
        ("/predictions/small", {}, 200),
        ("/explanations/small", {"method": "sensitivity", "values": "true", "target": str(number % 5)}, 200),
        ("/explanations/small", {"method": "grad_cam,biased_layer", "values": "true"}, 200),
        ("/explanations/small", {"method": "gradient_shap", "samples": "3", "seed": str(number), "output": "npy"}, 200),
        ("/explanations/small", {"steps": "4", "score": "probability", "output": "npy"}, 200),
        ("/explanations/small", {"method": "grad_cam", "output": "png"}, 200),
        ("/explanations/small", {"method": "nonsense"}, 400),
        ("/predictions/small", {"top_k": "3"}, 200),
        ("/explanations/small", {"smoothing": "smoothgrad_sq", "samples": "2", "steps": "2", "output": "npy"}, 200),
    ]
    path, fields, status = kinds[number % len(kinds)]
    return path, picture(number % 7), fields, status


def comparable(answer):
    """Return what must not depend on the neighbours: everything but the time taken, and rounding."""
    kind = answer.headers["content-type"]
    if answer.status_code != 200 or kind == "image/png":
        return answer.content
    if kind == "application/x-npy":
        return np.load(io.BytesIO(answer.content))
    content = answer.json()
    if "explanations" not in content:
        return np.array(list(content.values()))
    return np.stack([values_of(one) for one in content["explanations"]])


def alike(found, expected):
    """Whether two answers say the same, up to float32 and the kinks of ReLUs."""
    if isinstance(found, bytes):
        return found[:8] == expected[:8] and abs(len(found) - len(expected)) < 0.05 * len(expected)
    return np.linalg.norm(found - expected) <= 1e-2 * np.linalg.norm(expected)


def test_two_hundred_mixed_requests_are_each_answered_as_if_alone(server, client):
    requests = [mixed_request(number) for number in random.Random(0).sample(range(200), 200)]
    before = workers(server)

    def send(request):
        path, image, fields, _ = request
        return client.post(path, files={"data": image}, data=fields)

    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(send, requests))
    for request, answer in zip(requests, together, strict=True):
        assert answer.status_code == request[3], (request[0], request[2], answer.text)
    for request, answer in list(zip(requests, together, strict=True))[::5]:
        assert alike(comparable(answer), comparable(send(request))), request[2]
    assert workers(server) == before


def test_what_was_explained_is_measured(server, client):
    explain(client, method="grad_cam")
    refused(client.post("/explanations/small", files={"data": b"?"}), 400)
    exposed = httpx.get(f"{server.metrics}/metrics").text
    assert 'ExplainSeconds_count{ModelName="small",Method="grad_cam"' in exposed
    assert 'ExplainRefusals{ModelName="small",Status="400"' in exposed


def test_keys_are_asked_for_where_they_are_on(tmp_path_factory, monkeypatch):
    temporary = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store)
    run = tmp_path_factory.mktemp("run")
    with served(["small"], store, run, TS_DISABLE_TOKEN_AUTHORIZATION="false") as running:
        url = f"{running.inference}/predictions/small"
        assert httpx.post(url, files={"data": IMAGE}).status_code == 400
        assert httpx.post(url, files={"data": IMAGE}, headers=running.authorization()).status_code == 200
        assert list(temporary.glob("ts-*"))
    assert not list(temporary.glob("ts-*"))


def test_a_taken_port_is_told_at_once(server, tmp_path):
    taken = {"TS_INFERENCE_ADDRESS": server.inference}
    with pytest.raises(ServerError, match="is taken"), serving(["small"], tmp_path, taken, tmp_path):
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    "exposed",
    [
        {"TS_INFERENCE_ADDRESS": "http://0.0.0.0:8080"},
        {"TS_METRICS_ADDRESS": "http://192.0.2.1:8082", "TS_DISABLE_TOKEN_AUTHORIZATION": "TRUE"},
        {"TS_GRPC_INFERENCE_ADDRESS": "0.0.0.0"},
    ],
    ids=lambda exposed: next(iter(exposed)),
)
def test_without_keys_nothing_but_loopback_is_served(tmp_path, exposed):
    with (
        pytest.raises(ServerError, match="not loopback"),
        serving(["small"], tmp_path, free_ports() | exposed, tmp_path),
    ):
        raise AssertionError("not reached")
