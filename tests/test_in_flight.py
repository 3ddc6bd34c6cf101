"""TorchServe's two modes without TorchServe: who is answered when, who stays in flight, who is forgotten."""

import json
import time
from concurrent import futures
from threading import Event, Timer
from typing import Any

import pytest
from conftest import small_cnn
from live import picture

import explain_handler
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.servers.host import Host
from torchserve_explain.servers.in_flight import InFlight
from torchserve_explain.serving import service as service_module
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.service import RawRequest, Service
from torchserve_explain.serving.settings import Settings

CONFIG = {
    "classifier": {"architecture": "model.py"},
    "preprocessing": {"resize": 32, "crop": 32},
    "continuousBatching": True,
    "batchSize": 8,
}
PREDICTION = {"data": picture()}
LONG = {"data": picture(), "method": b"occlusion"}


def predict():
    """A request that arrives now: its time begins when it is made."""
    return RawRequest(PREDICTION, {})


def explain():
    return RawRequest(LONG, {"explain": "True"})


@pytest.fixture
def service():
    settings = Settings.model_validate(CONFIG)
    preprocessing = settings.preprocessing
    classifier = Classifier(small_cnn().float(), preprocessing.normalization, preprocessing.size)
    return Service(classifier, [], settings, {"name": "small", "version": "1.0"}, "0" * 64)


@pytest.fixture
def in_flight(service):
    host = Host(service)
    yield InFlight(host, 0.02)
    host.close()


def until(in_flight, requests, name, calls=2000):
    """Call as a frontend does until a request is answered; return all answers by then, in order."""
    answers, left = {}, dict(requests)
    for _ in range(calls):
        found = in_flight.call(left)
        answers |= found
        left = {key: read for key, read in left.items() if key not in found}
        if name in answers:
            return answers
    raise AssertionError(f"{name} was not answered in {calls} calls")


def test_a_short_request_is_answered_while_a_long_one_stays_in_flight(in_flight):
    requests = {"long": explain, "short": predict}
    answers = until(in_flight, requests, "short")
    assert "long" not in answers and len(in_flight) == 1
    assert until(in_flight, {"long": explain}, "long")["long"].status == 200
    assert len(in_flight) == 0


def test_what_is_handed_over_again_is_not_read_again(in_flight):
    read = []

    def reading():
        read.append(1)
        return explain()

    until(in_flight, {"long": reading}, "long")
    assert read == [1]


def test_a_request_that_is_no_longer_handed_over_is_dropped_and_its_place_is_free(service, in_flight):
    service._places = 1
    assert in_flight.call({"gone": explain}) == {}
    gone = in_flight._waiting["gone"]
    until(in_flight, {"short": predict}, "short")
    assert gone.cancelled() and len(in_flight) == 0 and in_flight._host.engine.in_flight == 0
    assert until(in_flight, {"next": explain}, "next")["next"].status == 200


def test_a_call_lasts_longer_where_handing_over_takes_long(in_flight):
    assert in_flight._length(0.0) == 0.02
    in_flight._returned = 1.0
    assert in_flight._length(1.004) == 0.02
    assert in_flight._length(1.1) == pytest.approx(0.4) and in_flight._length(9.0) == 1.0


def test_a_call_with_nothing_finished_waits_and_takes_no_processor_time(service, in_flight, monkeypatch):
    release = Event()
    monkeypatch.setattr(service_module, "read_request", lambda *_: release.wait(30))
    in_flight._quantum = 0.4
    began, cpu = time.perf_counter(), time.process_time()
    assert in_flight.call({"waiting": predict}) == {}
    assert time.perf_counter() - began > 0.3 and time.process_time() - cpu < 0.2
    release.set()


def test_a_call_goes_on_while_there_are_only_predictions(service, in_flight, monkeypatch):
    """Nobody who came meanwhile would pass them; beside an explanation it ends, so that they may."""
    release = Event()
    monkeypatch.setattr(service_module, "read_picture", lambda *given: release.wait(30) and read_picture(*given))
    in_flight._quantum = 0.5
    timer = Timer(0.7, release.set)
    timer.start()
    assert in_flight.call({"short": predict})["short"].status == 200 and release.is_set()
    timer.join()
    release.clear()
    in_flight.call({"long": explain})
    assert service.explaining == 1
    waits = []

    def counted(*given):
        waits.append(1)
        return futures.wait(*given)

    monkeypatch.setattr("torchserve_explain.servers.in_flight.wait", counted)
    assert in_flight.call({"long": explain, "other": predict}) == {} and waits == [1]
    release.set()


class Context:
    """What TorchServe gives a handler with each call."""

    def __init__(self, names):
        self.request_ids, self.headers, self.statuses, self.types = dict(enumerate(names)), {}, {}, {}
        self.model_name = "small"

    def get_request_id(self, index=0):
        return self.request_ids[index]

    def get_all_request_header(self, index):
        return {"explain": "True"} if self.request_ids[index].startswith("long") else {}

    def set_response_content_type(self, index, value):
        self.types[index] = value

    def set_response_status(self, code, phrase, idx):
        self.statuses[idx] = code

    def set_response_header(self, index, name, value):
        self.headers[index, name] = value


class Counted:
    """Metrics that go nowhere."""

    def answered(self, answer):
        """Take an answer."""

    def __init__(self):
        self.told = []

    def tell_in_flight(self, count):
        self.told.append(count)

    def after_call(self, in_flight):
        self.in_flight = in_flight


def handler_of(in_flight, continuous):
    handler: Any = explain_handler.ExplainHandler()
    handler._in_flight, handler._continuous, handler._metrics = in_flight, continuous, Counted()
    return handler


def test_the_handler_leaves_what_is_in_flight_out_of_the_answer(in_flight):
    handler, data = handler_of(in_flight, continuous=True), {"long": LONG, "short": PREDICTION}
    for _ in range(2000):
        context = Context(data)
        bodies = handler.handle(list(data.values()), context)
        assert len(bodies) == len(data)  # as TorchServe wants it
        if context.request_ids:
            break
    assert context.request_ids == {1: "short"} and json.loads(bodies[1]) and bodies[0] == b""
    assert context.types == {1: "application/json"} and handler._metrics.in_flight == 1


def test_the_handler_answers_whole_batches_without_continuous_batching(in_flight):
    context = Context(["long", "short"])
    bodies = handler_of(in_flight, continuous=False).handle([LONG, PREDICTION], context)
    assert set(context.request_ids) == {0, 1} and all(map(json.loads, bodies))


def test_requests_are_told_before_the_first_pass(in_flight, monkeypatch):
    """Who drains a version looks only now and then, and a pass may be long."""
    handler = handler_of(in_flight, continuous=True)
    seen, call = [], in_flight.call

    def first_told(requests):
        seen.extend(handler._metrics.told)
        return call(requests)

    monkeypatch.setattr(in_flight, "call", first_told)
    handler.handle([LONG, PREDICTION], Context(["long", "short"]))
    assert seen == [2]


def test_nothing_leaves_the_handler_as_an_exception(in_flight, monkeypatch):
    handler = handler_of(in_flight, continuous=True)
    monkeypatch.setattr(in_flight._host.engine, "add", lambda *_: 1 / 0)
    context = Context(["long", "short"])
    bodies = handler.handle([LONG, PREDICTION], context)
    assert context.statuses == {0: 500, 1: 500} and b"division" not in bodies[0] and len(in_flight) == 0
    monkeypatch.undo()
    assert until(in_flight, {"short": predict}, "short")["short"].status == 200


def test_settings_refuse_what_breaks_continuous_batching():
    for wrong, told in (({"maxWorkers": 2}, "2 workers hang"), ({"useJobTicket": True}, "useJobTicket")):
        with pytest.raises(ValueError, match=told):
            Settings.model_validate(CONFIG | wrong)
    assert Settings.model_validate(CONFIG).explanation_places == 6
