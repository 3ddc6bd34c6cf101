"""One worker under fire with continuous batching: each request is answered as if it were alone."""

import json
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import grpc
import httpx
import pytest
from conftest import WITHOUT_ATTENTION
from live import CONTINUOUS, build_small, grpc_modules, picture, served

from bench.mixed import difference, friendly, hostile, send
from torchserve_explain.servers import drain

pytestmark = pytest.mark.live
IMAGE = picture(3)
IN_FLIGHT = 32
PLACES = 24  # of explanations, three quarters of those in flight
SAMPLES = {"samples": "12"}
DRAWN = ("gradient_shap", "rise", "lime", "kernel_shap")
CASES = friendly(IMAGE, {name: SAMPLES if name in DRAWN else {} for name in WITHOUT_ATTENTION})
HOSTILE = hostile(IMAGE, 1_000_000)
LONG = {"method": "occlusion", "output": "npy"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build_small(
        tmp_path_factory.mktemp("small"), store, "responseTimeout: 900\n" + CONTINUOUS.replace("seconds: 60", "seconds: 800")
    )  # slow machines
    with served(["small"], store, tmp_path_factory.mktemp("run")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.inference, timeout=900, limits=httpx.Limits(max_connections=100)) as client:
        yield client


@pytest.fixture(scope="module")
def alone(client):
    """What each request is answered while nobody else is there."""
    return {case.name: send(client, "", "small", case) for case in (*CASES, *HOSTILE)}


@pytest.fixture(autouse=True)
def idle(server):
    """Each test leaves the server without a request, as the handler's metrics tell."""
    yield
    drain.drain(["small"], server.metrics, 60)


def explain(client, **fields):
    return client.post("/explanations/small", files={"data": IMAGE}, data=fields)


def wait_for(condition):
    """Wait until something is so; how long that takes is not the question."""
    while not condition():
        time.sleep(0.01)


def in_flight(server):
    return drain.in_flight(server.metrics)["small"]


def test_alone_the_friendly_are_answered_and_the_hostile_refused(alone):
    assert {case.name: alone[case.name].status for case in CASES} == {case.name: 200 for case in CASES}
    statuses = {case.name: alone[case.name].status for case in HOSTILE}
    assert set(statuses.values()) == {400, 413, 422} and statuses["a bomb"] == 413


def test_mixed_requests_in_flight_are_each_answered_as_alone(client, alone):
    generator = random.Random(0)
    order = [CASES[index % len(CASES)] for index in range(72)] + [HOSTILE[index % len(HOSTILE)] for index in range(8)]
    generator.shuffle(order)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        replies = list(pool.map(lambda case: again(client, case), order))
    wrong = {
        case.name: told for case, reply in zip(order, replies, strict=True) if (told := difference(alone[case.name], reply))
    }
    assert wrong == {}


def again(client, case):
    """Send a case until it finds a place."""
    while (reply := send(client, "", "small", case)).status == 503:
        pass
    return reply


def test_predictions_pass_explanations_that_are_in_flight(client, server):
    with ThreadPoolExecutor(8) as pool:
        long = [pool.submit(explain, client, **LONG) for _ in range(4)]
        wait_for(lambda: in_flight(server) >= 1)
        short = [pool.submit(client.post, "/predictions/small", files={"data": IMAGE}) for _ in range(4)]
        order = [future in short for future in as_completed([*long, *short])]
        assert {future.result().status_code for future in (*long, *short)} == {200}
    assert order == [True] * 4 + [False] * 4


def test_explanations_beyond_their_places_are_told_to_come_again_and_predictions_are_not(client, server):
    with ThreadPoolExecutor(PLACES) as pool:
        long = [pool.submit(explain, client, **LONG, timeout="20") for _ in range(PLACES)]
        wait_for(lambda: in_flight(server) == PLACES)
        refused = explain(client, method="grad_cam")
        predicted = client.post("/predictions/small", files={"data": IMAGE})
        assert not any(future.done() for future in long)
        assert {future.result().status_code for future in long} <= {200, 504}
    assert predicted.status_code == 200
    assert refused.status_code == 503 and refused.headers["retry-after"].isdigit() and "at most 24" in refused.json()["message"]
    assert explain(client, method="grad_cam").status_code == 200


def test_who_leaves_blocks_nobody(client, server, alone):
    """Their requests end by their deadline, and their places are free again."""
    for _ in range(PLACES):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/explanations/small", files={"data": IMAGE}, data=LONG | {"timeout": "3"}, timeout=0.05)
    case = next(case for case in CASES if case.kind == "prediction")
    assert difference(alone[case.name], send(client, "", "small", case)) is None
    drain.drain(["small"], server.metrics, 60)
    with ThreadPoolExecutor(PLACES) as pool:
        assert {pool.submit(explain, client, method="grad_cam").result().status_code for _ in range(PLACES)} == {200}


def test_protocols_beside_each_other(server, client, alone, tmp_path_factory):
    messages, services = grpc_modules(tmp_path_factory.mktemp("proto"))
    rest = [case for case in CASES if case.kind in ("prediction", "grad_cam")]
    form = next(case for case in rest if case.name == "prediction, form")
    with grpc.insecure_channel(server.grpc) as channel, ThreadPoolExecutor(IN_FLIGHT) as pool:
        stub = services.InferenceAPIsServiceStub(channel)

        def ask(fields):
            return json.loads(stub.Predictions(messages.PredictionsRequest(model_name="small", input=fields)).prediction)

        remote = [pool.submit(ask, fields) for fields in GRPC * 3]
        beside = [(case, pool.submit(again, client, case)) for case in rest]
        assert {case.name: difference(alone[case.name], future.result()) for case, future in beside} == {
            case.name: None for case in rest
        }
        for index, future in enumerate(remote):
            told = future.result()
            if index % 3 == 0:
                assert told == pytest.approx(json.loads(alone[form.name].body), rel=1e-4)
            else:
                assert told["code"] == 400 if index % 3 == 1 else told["explanations"][0]["method"] == "grad_cam"


GRPC = [{"data": IMAGE}, {"data": b"no image"}, {"data": IMAGE, "explain": b"true", "method": b"grad_cam"}]


def worker(client, server):
    (model,) = httpx.get(f"{server.management}/models/small").json()
    return model["workers"][0]


def test_a_killed_worker_costs_those_in_flight_and_no_other(client, server, alone):
    killed = worker(client, server)["pid"]
    with ThreadPoolExecutor(8) as pool:
        held = [pool.submit(explain, client, **LONG) for _ in range(8)]
        wait_for(lambda: in_flight(server) == 8)
        os.kill(killed, signal.SIGKILL)
        assert all(future.result().status_code >= 500 for future in held)
    wait_for(lambda: (found := worker(client, server))["status"] == "READY" and found["pid"] != killed)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        replies = list(pool.map(lambda case: again(client, case), CASES))
    assert [told for case, reply in zip(CASES, replies, strict=True) if (told := difference(alone[case.name], reply))] == []


def test_the_metrics_tell_each_kind_and_nobody_is_left(client, server):
    assert explain(client, method="grad_cam").status_code == 200
    drain.drain(["small"], server.metrics, 60)
    told = httpx.get(f"{server.metrics}/metrics").text
    assert in_flight(server) == 0
    for kind in ("prediction", "explanation", "refused"):
        assert re.search(rf'RequestSeconds_count{{ModelName="small",Kind="{kind}"[^}}]*}} [1-9]', told), kind
    for name in ("WorkerMemory", "EnginePasses", "EngineRows"):
        assert re.search(rf'^{name}{{ModelName="small"[^}}]*}} [1-9]', told, re.MULTILINE), name
