"""One contract, three servers: the cases of the live test, and those of several models and of errors before a model."""

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address

import httpx
import psutil
import pytest
from live import CONTINUOUS, build_small, picture
from servers import SERVERS, installed
from test_live import (  # noqa: F401
    IMAGE,
    alike,
    comparable,
    mixed_request,
    refused,
    test_a_browser_that_opens_the_url_gets_the_page,
    test_a_default_explanation_holds_what_the_contract_says,
    test_a_quality_that_costs_too_much_or_does_not_exist_is_refused,
    test_a_refusal_names_the_parameter_the_value_and_what_is_allowed,
    test_all_methods_and_targets_are_explained_in_order,
    test_every_form_of_a_prediction_gets_the_same_answer,
    test_json_arrays_stand_for_comma_lists_and_labels_may_hold_commas,
    test_kserve_v1,
    test_kserve_v2,
    test_pictures_come_as_fields_and_by_accept_header,
    test_the_npy_answer_is_the_values,
    test_the_openapi_document_names_paths_that_are_served,
    test_the_path_names_methods_and_fields_outrank_it,
    test_the_report_is_one_self_contained_page,
    test_the_same_seed_is_the_same_map,
    test_top_k_changes_how_many_classes_are_told,
    test_values_are_the_map_and_sum_to_the_score_difference,
    test_what_is_no_image_is_refused,
)

pytestmark = pytest.mark.live
FIELDS = {"method": "grad_cam,gradient_shap", "values": "true"}
LONG = {"method": "occlusion,integrated_gradients", "steps": "300"}


class Again(httpx.Client):
    """A client of a server that was started again."""

    before: httpx.Response  # of the first start


@pytest.fixture(scope="module", params=[installed(name) for name in SERVERS])
def client(request, tmp_path_factory):
    """A client of a server that serves one archive under two names, and has been stopped in the midst of a request before."""
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store, CONTINUOUS)
    archives = dict.fromkeys(("small", "other"), store / "small.mar")
    start = SERVERS[request.param][0]
    with ThreadPoolExecutor(1) as thread:
        with start(archives, tmp_path_factory.mktemp("first")) as url:
            before = httpx.post(f"{url}/explanations/small", files={"data": IMAGE}, data=FIELDS, timeout=120)
            thread.submit(httpx.post, f"{url}/explanations/small", files={"data": IMAGE}, data=LONG, timeout=120)
            time.sleep(1)
        with pytest.raises(httpx.TransportError):  # refused, or reset by a process about to end
            httpx.get(url)
    with start(archives, tmp_path_factory.mktemp("run")) as url, Again(base_url=url, timeout=120) as one:
        one.before = before
        yield one


def test_a_server_that_is_started_again_answers_as_before(client):
    again = client.post("/explanations/small", files={"data": IMAGE}, data=FIELDS)
    assert client.before.status_code == again.status_code == 200
    assert alike(comparable(client.before), comparable(again))


def test_nothing_listens_beyond_this_machine(client):
    """Ray asks for no token on ports of its own, and listens on every address unless told otherwise."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    listening = {one.laddr.ip for one in psutil.net_connections("tcp") if one.pid in ours and one.status == psutil.CONN_LISTEN}
    assert listening and all(ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in listening)


def test_several_models_answer_under_their_own_names(client):
    for name in ("small", "other"):
        answer = client.post(f"/explanations/{name}", files={"data": IMAGE}, data={"method": "grad_cam"}).json()
        assert answer["model"] == {"name": name, "version": "1.0"}


def test_a_model_or_a_version_that_is_not_served_is_not_found(client):
    for path in ("/predictions/nobody", "/predictions/small/9.9", "/explanations/small/9.9/grad_cam"):
        assert client.post(path, files={"data": IMAGE}).status_code == 404
    assert client.post("/predictions/small/1.0", files={"data": IMAGE}).status_code == 200


def test_an_upload_beyond_the_limit_is_refused_and_the_next_is_answered(client):
    with suppress(httpx.TransportError):  # the server may close before all is sent
        assert client.post("/predictions/small", content=bytes(21_000_000)).status_code == 413
    assert client.post("/predictions/small", files={"data": IMAGE}).status_code == 200


def test_a_field_without_a_file_name_may_hold_an_image(client):
    expected = client.post("/predictions/small", files={"data": IMAGE}).json()
    assert client.post("/predictions/small", files={"data": (None, IMAGE)}).json() == pytest.approx(expected, rel=1e-4)


def test_a_client_cannot_ask_for_an_explanation_by_a_header(client):
    answer = client.post("/predictions/small", files={"data": IMAGE}, headers={"explain": "True"}).json()
    assert "explanations" not in answer and len(answer) == 5


def test_a_mixed_storm_is_answered_as_if_each_were_alone(client):
    requests = [mixed_request(number) for number in random.Random(1).sample(range(200), 80)]

    def send(request):
        path, image, fields, _ = request
        return client.post(path, files={"data": image}, data=fields)

    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(send, requests))
    for request, answer in zip(requests, together, strict=True):
        assert answer.status_code == request[3], (request[0], request[2], answer.text)
    for request, answer in list(zip(requests, together, strict=True))[::8]:
        assert alike(comparable(answer), comparable(send(request))), request[2]


def test_a_client_that_goes_away_takes_nobody_with_it(client):
    with pytest.raises(httpx.ReadTimeout):
        client.post("/explanations/small", files={"data": picture(1)}, data={"method": "occlusion"}, timeout=0.05)
    assert client.post("/predictions/small", files={"data": IMAGE}).status_code == 200


def test_a_killed_replica_costs_those_in_flight_and_no_other(client, request):
    """Ray's replicas are processes of their own; the others are asked for in test_continuous, or are one process."""
    ours = psutil.Process().children(recursive=True)
    replicas = [one for one in ours if re.search(r"replica.*[:#]small\b", " ".join(one.cmdline()), re.IGNORECASE)]
    if "ray" not in request.node.name:
        pytest.skip("this server has no replicas")
    assert len(replicas) == 1
    fields = {"method": "grad_cam", "values": "true"}
    before = client.post("/explanations/small", files={"data": IMAGE}, data=fields)
    with ThreadPoolExecutor(4) as pool:
        held = [pool.submit(client.post, "/explanations/small", files={"data": IMAGE}, data=LONG) for _ in range(4)]
        other = pool.submit(client.post, "/explanations/other", files={"data": IMAGE}, data=fields)
        time.sleep(1)
        for one in replicas:
            one.kill()
        answers = [one.result() for one in held]
        assert other.result().status_code == 200
    assert {answer.status_code for answer in answers} == {503}
    assert all(answer.headers["retry-after"] == "1" and "has ended" in answer.json()["message"] for answer in answers)
    while (after := client.post("/explanations/small", files={"data": IMAGE}, data=fields)).status_code != 200:
        assert after.status_code == 503
    assert alike(comparable(before), comparable(after))
