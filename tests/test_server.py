"""Starting and stopping TorchServe: what fails is told at once, what is in flight is waited for."""

import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import httpx
import pytest
from live import CONTINUOUS, build_small, picture, served

from torchserve_explain import cli
from torchserve_explain.errors import ServerError
from torchserve_explain.servers import drain, torchserve
from torchserve_explain.servers.torchserve_logs import Logs

LOG = """\
2026-01-01T00:00:00,1 [INFO ] W-9000-mine_1.0-stdout MODEL_LOG - Backend worker process died.
2026-01-01T00:00:00,1 [INFO ] W-9000-mine_1.0-stdout MODEL_LOG - Traceback (most recent call last):
2026-01-01T00:00:00,1 [INFO ] W-9000-mine_1.0-stdout MODEL_LOG -   File "explain_handler.py", line 41, in initialize
2026-01-01T00:00:00,1 [INFO ] W-9001-other_1.0-stdout MODEL_LOG - Error: of a worker that goes on
2026-01-01T00:00:00,1 [INFO ] W-9000-mine_1.0-stdout MODEL_LOG - {error}
"""
DEATH = "2026-01-01T00:00:00,1 [WARN ] W-9000-{name}_1.0 o.p.BatchAggregator - Load model failed: {name}, error: Worker died.\n"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "torchserve_explain.errors.ArchiveError: 3 labels: too few",
            "mine cannot be loaded: ArchiveError: 3 labels: too few",
        ),
        ("ModuleNotFoundError: No module named 'timm'", "mine cannot be loaded: ModuleNotFoundError: No module named 'timm'"),
        ("ModuleNotFoundError: No module named 'ts.torch_handler.handler'", None),
        ("    still being written", None),
    ],
)
def test_the_exception_of_a_worker_that_cannot_load_is_told(tmp_path, error, reason):
    logs = Logs(tmp_path)
    (tmp_path / "model_log.log").write_text(LOG.format(error=error))
    assert logs.load_failure() == reason


def test_what_an_earlier_run_wrote_is_not_told(tmp_path):
    assert Logs(tmp_path).load_failure() is None
    (tmp_path / "model_log.log").write_text(LOG.format(error="ValueError: of yesterday"))
    (tmp_path / "ts_log.log").write_text(3 * DEATH.format(name="mine"))
    assert Logs(tmp_path).load_failure() is None


def test_a_worker_that_dies_again_and_again_is_told(tmp_path):
    logs = Logs(tmp_path)
    (tmp_path / "ts_log.log").write_text(2 * DEATH.format(name="mine") + 2 * DEATH.format(name="other"))
    assert logs.load_failure() is None
    with (tmp_path / "ts_log.log").open("a") as log:
        log.write(DEATH.format(name="mine"))
    assert (logs.load_failure() or "").startswith("mine cannot be loaded: its worker has died 3 times")


def server_at(metrics):
    return SimpleNamespace(metrics=metrics, process=SimpleNamespace(poll=lambda: None))


@pytest.fixture
def metrics():
    """A server's metrics: the gauges that it tells one after the other, the last for ever."""
    told = []

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self):
            gauge = told.pop(0) if len(told) > 1 else told[0]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(gauge.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Metrics) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        yield told, server_at(address)
        running.shutdown()
        thread.join()


def gauge(*counts):
    """Two models with a version each."""
    labels = (f'ModelName="m{index}",ModelVersion="{index + 1}.0",Hostname="h",' for index in range(len(counts)))
    lines = [f"RequestsInFlight{{{one}}} {count}" for one, count in zip(labels, counts, strict=True)]
    return "\n".join(["# TYPE RequestsInFlight gauge", *lines, 'RequestsInFlightElse{a="b"} 7.0'])


def test_requests_in_flight_are_waited_for(metrics):
    told, server = metrics
    told += [gauge(2.0, 1.0), gauge(0.0, 0.0), gauge(0.0, 1.0), gauge(0.0, 0.0), gauge(0.0, 0.0), gauge(9.0, 9.0)]
    torchserve._drain(server)
    assert told == [gauge(9.0, 9.0)]


def test_requests_that_do_not_end_are_not_waited_for_any_longer(metrics, monkeypatch):
    told, server = metrics
    told.append(gauge(1.0))
    monkeypatch.setattr(torchserve, "DRAIN_SECONDS", 0.3)
    torchserve._drain(server)


def test_a_server_that_tells_nothing_is_not_waited_for(metrics):
    told, server = metrics
    told.append("Other 3.0")
    assert torchserve._in_flight(server) == 0
    assert torchserve._in_flight(server_at("http://127.0.0.1:9")) == 0


def test_the_drain_command_waits_for_the_names_alone(metrics, monkeypatch, capsys):
    told, server = metrics
    monkeypatch.setenv("TS_METRICS_ADDRESS", server.metrics)
    told += [gauge(2.0, 1.0), gauge(0.0, 1.0), gauge(1.0, 1.0), gauge(0.0, 1.0), gauge(0.0, 1.0), gauge(9.0, 9.0)]
    assert cli.main(["drain", "m0"]) == 0 and told == [gauge(9.0, 9.0)]
    assert cli.main(["drain", "m0", "m1", "--seconds", "0.3"]) == 1
    assert "18 requests of m0, m1 are still in flight after 0.3 s" in capsys.readouterr().err


def test_the_drain_command_says_what_it_cannot_see(metrics, monkeypatch, capsys):
    told, server = metrics
    told.append(gauge(0.0))
    monkeypatch.setenv("TS_METRICS_ADDRESS", server.metrics)
    for unknown in ("m1", "m0/2.0"):
        assert cli.main(["drain", unknown]) == 1 and f"has nothing of {unknown}; known: m0/1.0" in capsys.readouterr().err
    monkeypatch.setenv("TS_METRICS_ADDRESS", "http://127.0.0.1:9")
    assert cli.main(["drain", "m0"]) == 1 and "does not answer" in capsys.readouterr().err


def test_of_two_versions_the_one_that_is_named_is_waited_for(metrics, monkeypatch):
    told, server = metrics
    monkeypatch.setenv("TS_METRICS_ADDRESS", server.metrics)
    lines = 'RequestsInFlight{ModelName="m",ModelVersion="1.0",} %s\nRequestsInFlight{ModelVersion="2.0",ModelName="m",} 7.0'
    told += [lines % 1.0, lines % 0.0, lines % 0.0, lines % 9.0]
    assert cli.main(["drain", "m/1.0"]) == 0 and told == [lines % 9.0]
    assert drain.in_flight(server.metrics) == {"m": 16}
    assert cli.main(["drain", "m", "--seconds", "0.3"]) == 1


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store)
    return store


@pytest.mark.live
def test_an_archive_that_cannot_be_loaded_ends_the_start_with_the_reason(store, tmp_path):
    with zipfile.ZipFile(store / "small.mar") as whole, zipfile.ZipFile(store / "broken.mar", "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, b'{"format": 9}' if name == "archive.json" else whole.read(name))
    with (
        pytest.raises(ServerError, match=r"^broken cannot be loaded: ArchiveError: the archive has the format 9, .* anew"),
        served(["broken"], store, tmp_path),
    ):
        pass


@pytest.mark.live
def test_steps_are_not_logged_and_metrics_arrive(store, tmp_path):
    with served(["small"], store, tmp_path) as server:
        for _ in range(3):
            files = {"data": picture()}
            answer = httpx.post(f"{server.inference}/explanations/small", files=files, data={"method": "grad_cam"}, timeout=60)
            assert answer.status_code == 200
        told = httpx.get(f"{server.metrics}/metrics").text
    logs = {path.name: path.read_text() for path in (tmp_path / "torchserve.log", *(tmp_path / "logs").iterdir())}
    step = ("Flushing req.cmd", "Backend response time", "Looping backend", "[METRICS]", "Backend received inference")
    assert [(name, words) for name, text in logs.items() for words in step if words in text] == []
    assert logs["access_log.log"].count("POST /explanations/small") == 3 and "7 classes" in logs["model_log.log"]
    assert 'ExplainEvaluations{ModelName="small",Method="grad_cam"' in told and "ts_inference_requests_total{" in told
    assert 'PredictionTime{ModelName="small"' in told


@pytest.mark.live
def test_a_request_in_flight_is_answered_before_the_server_is_stopped(tmp_path, tmp_path_factory):
    store = tmp_path_factory.mktemp("continuous")
    build_small(tmp_path_factory.mktemp("small"), store, CONTINUOUS)
    answers = []
    with served(["small"], store, tmp_path) as server:
        fields = {"method": "integrated_gradients", "steps": "50"}
        url, files = f"{server.inference}/explanations/small", {"data": picture()}
        asking = threading.Thread(target=lambda: answers.append(httpx.post(url, files=files, data=fields, timeout=60)))
        asking.start()
        while not torchserve._in_flight(server):
            assert not answers
    asking.join()
    assert [answer.status_code for answer in answers] == [200]
