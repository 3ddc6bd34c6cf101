"""The client: typed answers and errors of a live server, and its patience with one that is full."""

import asyncio
import base64
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import numpy as np
import pytest
from conftest import ROOT
from live import CONTINUOUS, SMALL_LABELS, build_small, picture, served
from PIL import Image

from torchserve_explain import client as client_module
from torchserve_explain import errors
from torchserve_explain.client import AsyncClient, Client

IMAGE = picture()
ONE_PLACE = CONTINUOUS + "continuousBatching: true\nminWorkers: 1\nmaxWorkers: 1\nbatchSize: 2\nmaxBatchDelay: 1\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with token authorization, whose one place for explanations is soon taken."""
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store, ONE_PLACE)
    with served(["small"], store, tmp_path_factory.mktemp("run"), TS_DISABLE_TOKEN_AUTHORIZATION="false") as running:
        yield running


@pytest.fixture
def connection(server):
    key = server.authorization()["Authorization"].removeprefix("Bearer ")
    return {"url": server.inference, "key": key, "model": "small"}


def answering(*responses, **options):
    """Return a client whose server gives these responses in turn, and the requests that it got."""
    left, got = iter(responses), []

    def answer(request):
        got.append(request)
        return next(left)

    return Client("http://server", model="small", transport=httpx.MockTransport(answer), **options), got


def test_how_many_classes_are_told_is_the_servers_choice_unless_it_is_asked_for():
    """A classifier of three classes refuses five."""
    client, got = answering(*(httpx.Response(200, json={"cat": 0.9}) for _ in range(2)))
    client.predict(IMAGE)
    client.predict(IMAGE, top_k=2)
    assert [b"top_k" in request.content for request in got] == [False, True]


# A live server


@pytest.mark.live
def test_a_prediction_is_the_servers(connection, server):
    told = httpx.post(f"{server.inference}/predictions/small", files={"data": IMAGE}, headers=server.authorization()).json()
    with Client(**connection) as client:
        found = client.predict(IMAGE)
        assert found.root == pytest.approx(told) and list(found.root) == list(told)
        assert (found.label, found.probability) == pytest.approx(next(iter(told.items())))
        assert len(client.predict(IMAGE, top_k=2).root) == 2


@pytest.mark.live
def test_an_explanation_holds_arrays_pictures_and_numbers(connection):
    with Client(**connection) as client:
        found = client.explain(IMAGE, method=["grad_cam", "input_x_gradient"], target=["bee", 2], quality="infidelity")
    assert [(one.method, one.target.index) for one in found.explanations] == [
        ("grad_cam", 1), ("grad_cam", 2), ("input_x_gradient", 1), ("input_x_gradient", 2),
    ]  # fmt: skip
    assert found.predicted.label in SMALL_LABELS and found.image.width == 240
    for one in found.explanations:
        assert one.array.shape == (224, 224) and one.array.dtype == np.float32
        assert one.array.max() == pytest.approx(one.heatmap.maximum, rel=2e-3)
        assert one.overlay.size == one.picture.size == (224, 224)
        assert one.overlay.tobytes() != one.picture.tobytes()
        assert set(one.numbers) == {"score", "evaluations", "infidelity", "milliseconds"}
        assert one.numbers["score"] == one.target.score and one.evaluations == 1


@pytest.mark.live
def test_every_form_of_a_photo_is_the_same_question(connection, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(picture(form="PNG"))
    with Client(**connection) as client, Image.open(path) as opened:
        expected = client.explain(path.read_bytes(), method="grad_cam").explanations[0].array
        for photo in (path, str(path), opened):
            np.testing.assert_array_equal(client.explain(photo, method="grad_cam").explanations[0].array, expected)


@pytest.mark.live
def test_a_label_with_a_comma_may_stand_in_a_list(connection):
    with Client(**connection) as client:
        found = client.explain(IMAGE, method="grad_cam", target=["new york, ny", 1], values=False)
    assert [one.target.index for one in found.explanations] == [6, 1]
    with pytest.raises(ValueError, match="values=True"):
        found.explanations[0].array  # noqa: B018


@pytest.mark.live
@pytest.mark.parametrize(
    ("kind", "options", "asked", "told"),
    [
        (errors.BadRequest, {}, {"method": "gradcam"}, "grad_cam"),
        (errors.OverLimit, {}, {"steps": 5000}, "5001"),
        (errors.OutOfTime, {}, {"timeout": 1e-6}, "out of time"),
        (errors.TooLarge, {}, {"image": picture(0, (1100, 1000))}, "1100x1000"),
        (errors.NotServed, {"model": "nobody"}, {}, "nobody"),
        (errors.NotServed, {"version": "9.9"}, {}, "9.9"),
        (errors.KeyRefused, {"key": "wrong"}, {}, "Token"),
        (errors.KeyRefused, {"key": None}, {}, "Token"),
    ],
)
def test_an_error_of_the_answer_is_raised_as_what_it_is(connection, kind, options, asked, told):
    with Client(**connection | options) as client, pytest.raises(kind, match=told) as raised:
        client.explain(**{"image": IMAGE} | asked)
    assert isinstance(raised.value, errors.RequestError) and raised.value.status >= 400


@pytest.mark.live
def test_who_finds_no_place_asks_again_until_there_is_one(connection):
    """Three clients, of whose explanations one is computed at a time."""
    codes = []
    hooks = {"response": [lambda response: codes.append(response.status_code)]}

    def ask(target):
        with Client(**connection, event_hooks=hooks) as client:
            return client.explain(IMAGE, method="gradient_shap", samples=100, target=target).explanations[0].target.index

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, (0, 1, 3))) == [0, 1, 3]
    assert codes.count(200) == 3 and 503 in codes


@pytest.mark.live
def test_the_asynchronous_client_gets_the_same(connection):
    async def ask():
        async with AsyncClient(**connection) as client:
            prediction, explained = await asyncio.gather(client.predict(IMAGE), client.explain(IMAGE, method="grad_cam"))
            with pytest.raises(errors.BadRequest):
                await client.explain(IMAGE, method="gradcam")
            return prediction, explained

    prediction, explained = asyncio.run(ask())
    with Client(**connection) as client:
        assert client.predict(IMAGE).root == pytest.approx(prediction.root)
        again = client.explain(IMAGE, method="grad_cam")
    np.testing.assert_array_equal(explained.explanations[0].array, again.explanations[0].array)


# A server that does as it is told


def full(after):
    headers = {} if after is None else {"Retry-After": after}
    return httpx.Response(503, json={"code": 503, "type": "ServiceUnavailableException", "message": "full"}, headers=headers)


@pytest.fixture
def slept(monkeypatch):
    pauses = []
    monkeypatch.setattr("torchserve_explain.client.time.sleep", pauses.append)
    return pauses


def test_the_client_waits_as_long_as_it_is_told(slept):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=7), usegmt=True)
    client, got = answering(full("2"), full(soon), full("0"), httpx.Response(200, json={"cat": 1.0}))
    assert client.predict(IMAGE).label == "cat" and len(got) == 4
    assert slept == [2, pytest.approx(6.5, abs=1.5), 0.1]
    assert all(IMAGE in request.content for request in got)


@pytest.mark.parametrize("after", [None, "soon", "61", "Wed, 21 Oct 2015 07:28:00"])
def test_without_a_time_to_wait_or_beyond_its_patience_it_tells(slept, after):
    client, got = answering(full(after))
    with pytest.raises(errors.Unavailable, match="full") as raised:
        client.predict(IMAGE)
    assert len(got) == 1 and slept == [] and raised.value.headers.get("Retry-After") == after


def test_patience_is_for_all_pauses_of_a_question(slept):
    client, got = answering(*(full("2") for _ in range(9)), patience=5)
    with pytest.raises(errors.Unavailable):
        client.predict(IMAGE)
    assert slept == [2, 2] and len(got) == 3


@pytest.mark.parametrize(
    ("response", "kind", "told"),
    [
        (httpx.Response(413), errors.TooLarge, "413"),  # TorchServe's own has no body
        (httpx.Response(502, text="<h1>bad gateway"), errors.ServerError, "502: <h1>bad"),
        (httpx.Response(507, json={"code": 507, "message": "Worker died."}), errors.ServerError, "Worker died"),
        (httpx.Response(400, json=["strange"]), errors.BadRequest, "strange"),
        (httpx.Response(200, text="<html>"), errors.ServerError, "no Prediction"),
        (httpx.Response(200, json={"cat": "sure"}), errors.ServerError, "no Prediction: cat"),
        (httpx.Response(301, headers={"Location": "https://server"}), errors.ServerError, "301"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_of_the_contract_is_told_too(response, kind, told):
    client, _ = answering(response)
    with pytest.raises(kind, match=told):
        client.predict(IMAGE)


def test_a_server_that_is_not_there_is_a_server_error():
    def refuse(request):
        raise httpx.ConnectError("refused", request=request)

    for client in (Client("http://server", transport=httpx.MockTransport(refuse)), Client("nonsense")):
        with pytest.raises(errors.ServerError, match="does not answer"):
            client.predict(IMAGE)
    with pytest.raises(errors.ServerError, match="does not answer"):
        Client("http://server:port")


def test_another_output_is_refused_before_it_is_asked_for():
    client, got = answering()
    with pytest.raises(errors.BadRequest, match="json"):
        client.explain(IMAGE, output="png")
    assert got == []


def test_a_picture_in_memory_is_sent_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter
    stream = io.BytesIO()
    Image.new("RGB", (4, 2)).save(stream, "JPEG", exif=exif)
    client, got = answering(httpx.Response(200, json={"cat": 1.0}))
    client.predict(Image.open(stream))
    sent = got[0].content.partition(b"\x89PNG")
    assert Image.open(io.BytesIO(sent[1] + sent[2])).size == (2, 4)


def test_the_model_and_its_version_stand_in_the_url():
    client, got = answering(httpx.Response(200, json={"cat": 1.0}), version="1.0")
    client.predict(IMAGE)
    assert got[0].url == "http://server/predictions/small/1.0"


# A notebook


def explained(**changed):
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG")
    png = base64.b64encode(stream.getvalue()).decode()
    one = {
        "method": "grad_cam", "target": {"index": 0, "label": "<b>cat", "probability": 0.5, "score": 1.5}, "parameters": {},
        "evaluations": 1, "completeness_error": None, "baseline_score": None, "quality": {"deletion": None},
        "heatmap": {"width": 2, "height": 2, "minimum": 0, "maximum": 1, "overlay_png": png, "heatmap_png": png,
                    "scale": {"colormap": "gray", "from": 0, "to": 1}},
        "milliseconds": 2,
    }  # fmt: skip
    told = {
        "model": {"name": "small", "version": "1.0"}, "predicted": {"index": 0, "label": "<b>cat", "probability": 0.5},
        "image": {"width": 2, "height": 2, "crop": [0, 0, 2, 2]}, "explanations": [one],
    }  # fmt: skip
    return client_module.ExplainedImage.model_validate(told | changed)


def test_a_notebook_shows_pictures_and_numbers_and_runs_no_label():
    html = explained()._repr_html_()
    assert "<b>cat" not in html and html.count("&lt;b&gt;cat") == 3
    assert html.count("<img") == 1 and "score 1.5" in html and "deletion" not in html
    assert "&lt;i&gt;" in client_module.Prediction({"<i>": 1.0})._repr_html_()


def test_what_a_newer_server_tells_beside_is_kept():
    assert explained(audit={"digest": "0"}).audit == {"digest": "0"}


def test_a_quantity_has_a_value_and_classes_together_have_a_label_alone():
    told = explained(predicted={"index": 0, "label": "price", "probability": None, "value": 12.5}).predicted
    assert str(told) == "price 12.5" and told.probability is None
    told = explained(predicted={"index": None, "label": "the rest", "probability": None}).predicted
    assert str(told) == "the rest" and told.value is None
    (one,) = explained().explanations
    assert one.model_copy(update={"versus": told}).question == "<b>cat 50.0% rather than the rest"


def test_the_client_needs_nothing_of_what_serves():
    absent = ("torch", "torchvision", "scipy", "skimage", "jinja2", "yaml", "ts", "rich")
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import torchserve_explain.client"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "handlers")}, check=True)


def test_the_worker_needs_no_http_client():
    code = "import sys; sys.modules['httpx'] = None; import explain_handler"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "handlers")}, check=True)
