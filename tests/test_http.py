"""HTTP as TorchServe hands it over: forms, headers, limits, and a client that goes away."""

import asyncio
import json
from typing import Any

import pytest
import yaml
from conftest import ROOT
from live import picture

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")

from fastapi import FastAPI

from torchserve_explain.errors import ServerError
from torchserve_explain.servers.host import named_archives
from torchserve_explain.servers.http import LARGEST, router
from torchserve_explain.serving.answers import Answer

IMAGE = picture()
BOUNDARY = b"--b\r\n"


class Model:
    """Answers what it was asked, or never."""

    def __init__(self, forever=False):
        self.forever, self.cancelled = forever, False
        self.raw: Any = None

    async def version(self):
        return "1.0"

    async def ask(self, raw):
        self.raw = raw
        try:
            await asyncio.sleep(60 if self.forever else 0)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return Answer(b"\x89PNG", "image/png", 200, {"X-Own": "1"})


def send(model, path, body=b"", headers=None, gone=False):
    """Send one request to the routes, as an ASGI server does; return status, headers and body."""
    app, sent = FastAPI(), []
    app.include_router(router({"small": model}))
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
             "scheme": "http", "http_version": "1.1", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
             "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()]}  # fmt: skip

    async def exchange():
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop(0)
            await asyncio.sleep(0.01 if gone else 60)
            return {"type": "http.disconnect"}

        async def collect(message):
            sent.append(message)

        await asyncio.wait_for(app(scope, receive, collect), 20)

    asyncio.run(exchange())
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(one.get("body", b"") for one in sent[1:])


def part(name, content, extra=b""):
    return BOUNDARY + b'Content-Disposition: form-data; name="' + name + b'"' + extra + b"\r\n\r\n" + content + b"\r\n"


def test_an_answer_keeps_its_status_its_type_and_its_headers():
    status, headers, body = send(Model(), "/explanations/small", IMAGE, {"content-type": "application/octet-stream"})
    assert (status, headers[b"content-type"], headers[b"x-own"], body) == (200, b"image/png", b"1", b"\x89PNG")


def test_a_form_is_handed_over_byte_by_byte():
    every = bytes(range(256))
    body = part(b"data", every) + part(b"file", every, b'; filename="x"\r\nContent-Type: image/png')
    body += part("été".encode(), "grün".encode()) + part(b"text", b"a,b", b'; filename="x"\r\nContent-Type: text/plain')
    model = Model()
    send(model, "/predictions/small", body + b"--b--\r\n", {"content-type": "multipart/form-data; boundary=b"})
    assert model.raw.data == {"data": every, "file": every, "été": "grün".encode(), "text": "a,b"}
    send(model, "/predictions/small", b"data=a%2Bb&top_k=2", {"content-type": "application/x-www-form-urlencoded"})
    assert model.raw.data == {"data": b"a+b", "top_k": b"2"}


def test_bodies_are_handed_over_as_they_are_and_text_as_text():
    model = Model()
    for kind, expected in (("application/json", b"{}"), ("text/plain", "{}"), ("image/png", b"{}")):
        send(model, "/predictions/small", b"{}", {"content-type": kind})
        assert model.raw.data == {"body": expected}


def test_what_asks_for_an_explanation_is_the_url_and_never_a_header():
    model, forged = Model(), {"explain": "True", "url_path": "methods/lrp", "x-request-id": "mine"}
    send(model, "/v1/models/small:predict", b"{}", forged)
    assert "explain" not in model.raw.headers and "url_path" not in model.raw.headers and model.raw.id == "mine"
    send(model, "/explanations/small/1.0/grad_cam,lrp", b"", forged)
    assert model.raw.headers["explain"] == "True" and model.raw.headers["url_path"] == "grad_cam,lrp"
    for path in ("/v2/models/small/explain", "/v2/models/small/versions/1.0/explain", "/v1/models/small:explain"):
        send(model, path)
        assert model.raw.headers["explain"] == "True" and "url_path" not in model.raw.headers


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "told"),
    [
        ("/predictions/nobody", b"", "image/png", 404, "small"),
        ("/explanations/small/2.0/lrp", b"", "image/png", 404, "1.0"),
        ("/predictions/small", bytes(LARGEST + 1), "image/png", 413, str(LARGEST)),
        ("/predictions/small", b"", "multipart/form-data", 400, "form"),
        ("/predictions/small", b"--c\r\nbroken", "multipart/form-data; boundary=b", 400, "form"),
    ],
)
def test_what_no_model_is_asked_is_refused_in_the_contracts_words(path, body, kind, status, told):
    model = Model()
    found, headers, answer = send(model, path, body, {"content-type": kind})
    content = json.loads(answer)
    assert found == content["code"] == status and told in content["message"] and model.raw is None
    assert headers[b"content-type"] == b"application/json"


def test_a_client_that_goes_away_cancels_its_request():
    model = Model(forever=True)
    status, _, _ = send(model, "/explanations/small", IMAGE, {"content-type": "image/png"}, gone=True)
    assert status == 499 and model.cancelled


def test_requests_may_be_as_large_as_torchserve_takes_them():
    assert f"max_request_size={LARGEST}\n" in (ROOT / "config.properties").read_text()


def test_archives_are_named_by_their_file_or_as_told(tmp_path):
    (tmp_path / "one.mar").touch()
    path = str(tmp_path / "one.mar")
    assert named_archives([path, f"two={path}"]) == dict.fromkeys(("one", "two"), tmp_path / "one.mar")
    with pytest.raises(ServerError, match="two archives are called one"):
        named_archives([path, f"one={path}"])
    with pytest.raises(ServerError, match="does not exist"):
        named_archives(["nowhere.mar"])


def test_the_serve_config_is_one_that_ray_takes_and_names_what_is_deployed():
    schema = pytest.importorskip("ray.serve.schema")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text()))
    (one,) = config.applications
    archives = [told.partition("=")[0] for told in one.runtime_env["env_vars"]["ARCHIVES"].split(",")]
    assert one.import_path == "torchserve_explain.servers.ray:app" and config.http_options.host == "127.0.0.1"
    assert [deployment.name for deployment in one.deployments] == ["routes", *archives]
