"""Every form in which TorchServe hands a request over is read alike, and whatever else comes is a 400."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchserve_explain.errors import RequestError
from torchserve_explain.serving.errors import bad_request
from torchserve_explain.serving.parameters import read_parameters
from torchserve_explain.serving.requests import Instance, Protocol, Request, read_request

IMAGE = b"\x89PNG any bytes \xff\x00"
TEXT = base64.b64encode(IMAGE).decode()
JSON = {"Content-Type": "application/json"}
EXPLAIN = {"explain": "True"}


def one(request):
    (instance,) = request.instances
    return instance


def refusal(row, headers=None):
    with pytest.raises(RequestError) as caught:
        read_request(row, headers or {})
    checked(caught.value)
    return str(caught.value)


def checked(error):
    assert error.status == 400
    assert str(error).isascii() and len(str(error)) <= 200, str(error)


def v2_body(data, **rest):
    return {"inputs": [{"name": "data", "datatype": "BYTES", "shape": [len(data)], "data": data}], **rest}


# One image and its fields


@pytest.mark.parametrize(
    "row",
    [
        {"body": bytearray(IMAGE)},
        {"body": IMAGE},
        {"data": bytearray(IMAGE)},
        {"data": IMAGE},
        {"body": {"data": TEXT}},
        {"body": {"body": TEXT}},
        {"body": TEXT},
        {"data": TEXT},
        {"body": f"data:image/png;base64,{TEXT}"},
        {"body": {"data": f"data:image/png;base64,{TEXT}"}},
        {"body": "\n".join([TEXT[:7], TEXT[7:], ""])},
    ],
    ids=[
        "raw body",
        "raw bytes",
        "form field",
        "gRPC field",
        "JSON",
        "JSON body",
        "text",
        "text field",
        "data URL",
        "JSON data URL",
        "lines of base64",
    ],
)
def test_the_image_arrives_in_every_form(row):
    assert read_request(row, {}) == Request(Protocol.PLAIN, False, (Instance(IMAGE, {}),), {})


def test_the_image_is_bytes_and_no_bytearray():
    assert type(one(read_request({"body": bytearray(IMAGE)}, {})).image) is bytes


def test_form_fields_are_text():
    row = {"data": bytearray(IMAGE), "method": bytearray(b"grad_cam"), "layer": bytearray("caf\u00e9".encode())}
    assert one(read_request(row, {})).fields == {"method": "grad_cam", "layer": "caf\u00e9"}


def test_json_fields_keep_their_types():
    fields = {"target": [1, "cat"], "steps": 8, "values": True, "max_error": 0.1, "layer": None}
    assert one(read_request({"body": {"data": TEXT, **fields}}, JSON)).fields == fields


def test_a_form_without_an_image_has_an_empty_one():
    assert one(read_request({"method": bytearray(b"lime"), "seed": bytearray(b"1")}, {})) == Instance(
        b"", {"method": "lime", "seed": "1"}
    )


@pytest.mark.parametrize("body", [{}, {"data": None}, {"data": ""}])
def test_json_without_an_image_has_an_empty_one(body):
    assert one(read_request({"body": body}, JSON)) == Instance(b"", {})


def test_an_image_that_looks_like_json_stays_an_image():
    assert one(read_request({"body": b'{"data": 1}'}, {"Content-Type": "application/octet-stream"})).image == b'{"data": 1}'


def test_a_form_field_that_is_not_utf_8_is_refused_by_name():
    message = refusal({"data": IMAGE, "method": b"\xff\xfe"})
    assert message.startswith("'method'") and "UTF-8" in message


@pytest.mark.parametrize("data", ["no base64!", "QUJ", "data:image/png;base64,\u00e9", "\ud800"])
def test_text_that_is_not_base64_is_refused(data):
    message = refusal({"body": {"data": data}})
    assert message.startswith("data:") and "base64" in message


@pytest.mark.parametrize("data", [1, 1.5, True, [TEXT], {"b64": TEXT}])
def test_an_image_of_another_type_is_refused(data):
    message = refusal({"body": {"data": data}})
    assert message.startswith("data:") and "allowed" in message


@pytest.mark.parametrize("body", [[], [1, 2], 3, 1.5, True])
def test_a_json_body_that_is_no_object_is_refused(body):
    message = refusal({"body": body}, JSON)
    assert type(body).__name__ in message and "instances" in message


# JSON that TorchServe did not decode


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/JSON", "application/vnd.api+json"])
def test_json_bytes_are_decoded(kind):
    body = bytearray(json.dumps({"data": TEXT, "seed": 3}).encode())
    assert one(read_request({"body": body}, {"content-type": kind})) == Instance(IMAGE, {"seed": 3})


@pytest.mark.parametrize("body", [b"{", b"{'data': 1}", b"\xff\xfe\xff", b'{"data": "\xff"}', bytearray(IMAGE)])
def test_invalid_json_is_said_to_be_invalid(body):
    assert "not valid JSON" in refusal({"body": body}, JSON)


@pytest.mark.parametrize("body", [b"null", b"[]", b"7"])
def test_json_bytes_that_are_no_object_are_refused(body):
    assert "allowed: an object" in refusal({"body": body}, JSON)


def test_json_nested_too_deep_is_refused():
    assert "JSON" in refusal({"body": b"[" * 100_000}, JSON)


def test_a_value_nested_deep_is_refused():
    value = []
    for _ in range(5000):
        value = [value]
    assert refusal({"body": {"data": value}}, JSON).startswith("data:")


# Explain or predict


@pytest.mark.parametrize(
    ("headers", "explain"),
    [
        ({"explain": "True"}, True),
        ({"Explain": "true"}, True),
        ({"explain": "False"}, False),
        ({"explain": ""}, False),
        ({}, False),
    ],
)
def test_the_explain_header_asks_for_an_explanation(headers, explain):
    assert read_request({"body": IMAGE}, headers).explain is explain


@pytest.mark.parametrize("truth", [b"true", b"True", b"1", "true", True, 1])
def test_the_explain_field_asks_for_an_explanation(truth):
    request = read_request({"data": IMAGE, "explain": truth, "method": b"grad_cam"}, {})
    assert request.explain and one(request).fields == {"method": "grad_cam"}


@pytest.mark.parametrize("truth", [b"false", b"0", False])
def test_the_explain_field_is_stronger_than_the_header(truth):
    assert not read_request({"data": IMAGE, "explain": truth}, EXPLAIN).explain


@pytest.mark.parametrize("truth", [b"", b"maybe", "2", [True]])
def test_an_explain_field_that_is_no_truth_is_refused(truth):
    message = refusal({"data": IMAGE, "explain": truth})
    assert message.startswith("explain:") and message.endswith("allowed: true or false")


# Without a body


@pytest.mark.parametrize("row", [{"body": b""}, {"body": bytearray()}, {"body": ""}, {}])
@pytest.mark.parametrize("headers", [{}, {"Content-Length": "0"}, {"Accept": "text/html"}])
def test_a_browser_that_opens_the_explanations_gets_the_page(row, headers):
    assert read_request(row, {**EXPLAIN, **headers}).page


@pytest.mark.parametrize("headers", [{"Content-Type": "image/png"}, {"CONTENT-LENGTH": "3"}])
def test_an_empty_upload_is_no_page(headers):
    request = read_request({"body": b""}, {**EXPLAIN, **headers})
    assert not request.page and one(request).image == b""


def test_an_empty_prediction_is_no_page():
    request = read_request({"body": b""}, {})
    assert not request.page and one(request).image == b""


def test_a_request_with_an_image_is_no_page():
    assert not read_request({"body": IMAGE}, EXPLAIN).page


# Headers


@pytest.mark.parametrize("name", ["accept", "Accept", "ACCEPT"])
def test_a_headers_case_does_not_matter(name):
    assert read_request({"body": IMAGE}, {name: "image/png"}).defaults == {"output": "png"}


def test_form_fields_among_the_headers_are_passed_by():
    headers = {"data": {"content-type": "image/png"}, "accept": {"content-type": "text/html"}, "explain": {"a": "true"}}
    request = read_request({"data": IMAGE}, headers)
    assert not request.explain and request.defaults == {}


@pytest.mark.parametrize(
    ("accept", "output"),
    [
        ("image/png", "png"),
        ("text/html", "html"),
        ("application/json", "json"),
        ("IMAGE/PNG", "png"),
        ("image/png; charset=x", "png"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/png,*/*;q=0.8", "html"),
        ("text/html;q=0.2, image/png;q=0.9", "png"),
        ("image/png;q=0.5, application/json", "json"),
        ("image/png;level=1;q=0.1,text/html;q=.2", "html"),
        ("image/png;q=oops, application/json;q=0.1", "json"),
    ],
)
def test_the_accept_header_chooses_the_output(accept, output):
    assert read_request({"body": IMAGE}, {"Accept": accept}).defaults == {"output": output}


@pytest.mark.parametrize("accept", ["", "*/*", "image/*", "application/xml", ",", ";q=1"])
def test_an_accept_header_without_our_kinds_chooses_nothing(accept):
    assert read_request({"body": IMAGE}, {"Accept": accept}).defaults == {}


@pytest.mark.parametrize(
    ("accept", "defaults"), [("image/png;q=0", {}), ("image/png;q=0.0, text/html;q=0.1", {"output": "html"})]
)
def test_a_kind_of_quality_zero_is_not_chosen(accept, defaults):
    assert read_request({"body": IMAGE}, {"Accept": accept}).defaults == defaults


@pytest.mark.parametrize("path", ["grad_cam,lime", "/grad_cam,lime/"])
def test_the_path_names_the_methods(path):
    assert read_request({"body": IMAGE}, {"url_path": path}).defaults == {"method": "grad_cam,lime"}


@pytest.mark.parametrize("path", ["", "/"])
def test_an_empty_path_names_nothing(path):
    assert read_request({"body": IMAGE}, {"url_path": path}).defaults == {}


def test_fields_are_stronger_than_path_and_accept():
    headers = {"url_path": "lime", "Accept": "image/png"}
    request = read_request({"data": IMAGE, "method": b"grad_cam", "output": b"npy"}, headers)
    parameters = read_parameters(request.defaults, one(request).fields)
    assert (parameters.method, parameters.output) == (("grad_cam",), "npy")


# KServe v1


def test_v1_has_one_image_for_each_instance():
    body = {"instances": [{"data": TEXT}, {"data": base64.b64encode(b"two").decode()}]}
    request = read_request({"body": body}, EXPLAIN)
    assert request.protocol is Protocol.KSERVE_V1 and request.explain
    assert [instance.image for instance in request.instances] == [IMAGE, b"two"]


def test_v1_fields_beside_the_instances_are_for_all_and_weaker():
    body = {"instances": [{"data": TEXT}, {"data": TEXT, "seed": 2}], "seed": 1, "method": "lime"}
    first, second = read_request({"body": body}, {}).instances
    assert (first.fields, second.fields) == ({"seed": 1, "method": "lime"}, {"seed": 2, "method": "lime"})


@pytest.mark.parametrize("instances", [None, [], {}, "x", 1, [TEXT], [{"data": TEXT}, None]])
def test_v1_without_proper_instances_is_refused(instances):
    assert refusal({"body": {"instances": instances}}).startswith("instances:")


def test_v1_is_read_from_json_bytes():
    body = json.dumps({"instances": [{"data": TEXT}]}).encode()
    assert one(read_request({"body": body}, {"content-type": "application/json;charset=utf-8"})).image == IMAGE


# KServe v2


def test_v2_has_one_image_for_each_element():
    request = read_request({"body": v2_body([TEXT, TEXT])}, EXPLAIN)
    assert request.protocol is Protocol.KSERVE_V2 and request.explain
    assert [instance.image for instance in request.instances] == [IMAGE, IMAGE]


def test_v2_parameters_are_for_every_image():
    request = read_request({"body": v2_body([TEXT, TEXT], parameters={"method": "lime"})}, {})
    assert [instance.fields for instance in request.instances] == [{"method": "lime"}] * 2


def test_v2_parameters_may_be_null():
    assert one(read_request({"body": v2_body([TEXT], parameters=None)}, {})).fields == {}


def test_v2_needs_no_shape():
    body = {"inputs": [{"name": "data", "datatype": "BYTES", "data": [TEXT]}]}
    assert one(read_request({"body": body}, {})).image == IMAGE


def test_v2_answers_to_the_clients_id():
    assert read_request({"body": v2_body([TEXT], id="mine")}, {}, "servers").id == "mine"


@pytest.mark.parametrize("rest", [{}, {"id": 7}, {"id": None}])
def test_v2_without_a_proper_id_answers_to_the_servers(rest):
    assert read_request({"body": v2_body([TEXT], **rest)}, {}, "servers").id == "servers"


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        [],
        {},
        [TEXT],
        v2_body([TEXT])["inputs"] * 2,
        [{"name": "data", "datatype": "FP32", "shape": [1], "data": [1.0]}],
        [{"name": "data", "datatype": "BYTES", "shape": [0], "data": []}],
        [{"name": "data", "datatype": "BYTES", "shape": [1], "data": TEXT}],
        [{"name": "data", "datatype": "BYTES", "shape": [1]}],
    ],
)
def test_v2_without_one_bytes_tensor_is_refused(inputs):
    message = refusal({"body": {"inputs": inputs}})
    assert message.startswith("inputs:") and "BYTES" in message


@pytest.mark.parametrize("shape", [[2], [1, 1], 1, None, "x" * 500])
def test_v2_with_another_shape_than_its_data_is_refused(shape):
    body = {"inputs": [{"name": "data", "datatype": "BYTES", "shape": shape, "data": [TEXT]}]}
    message = refusal({"body": body})
    assert message.startswith("shape:") and message.endswith("allowed: [1]")


@pytest.mark.parametrize("parameters", [[1], "x", 3])
def test_v2_parameters_that_are_no_object_are_refused(parameters):
    assert refusal({"body": v2_body([TEXT], parameters=parameters)}).startswith("parameters:")


def test_v2_parameters_hold_no_image():
    assert one(read_request({"body": v2_body([None], parameters={"body": TEXT})}, {})).image == b""


@pytest.mark.parametrize("image", [5, "no base64!"])
def test_v2_with_an_element_that_is_no_image_is_refused(image):
    assert refusal({"body": v2_body([TEXT, image])}).startswith("instance 1: data:")


# Which instance an error is about


@pytest.mark.parametrize("body", [{"instances": [{"data": TEXT}] * 2}, v2_body([TEXT] * 2)], ids=["v1", "v2"])
def test_an_error_names_its_instance(body):
    request = read_request({"body": body}, {})
    with pytest.raises(RequestError, match=r"^instance 1: steps: wrong$") as caught, request.naming(1):
        raise bad_request("steps: wrong")
    assert caught.value.status == 400


def test_an_error_of_a_plain_request_names_no_instance():
    request = read_request({"body": IMAGE}, {})
    with pytest.raises(RequestError, match=r"^steps: wrong$"), request.naming(0):
        raise bad_request("steps: wrong")


# Junk

NAMES = st.sampled_from(["data", "body", "instances", "inputs", "parameters", "explain", "id", "method", "shape", "datatype"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(TEXT) | st.just("BYTES")
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
ROWS = st.fixed_dictionaries({"body": JUNK | st.binary(max_size=30)}) | st.dictionaries(
    NAMES | st.text(max_size=80), JUNK | st.binary(max_size=30), max_size=4
)
HEADERS = st.dictionaries(
    st.sampled_from(["Accept", "explain", "url_path", "Content-Type", "content-length"]) | st.text(max_size=5),
    st.sampled_from(["application/json", "True", "0", "image/png;q=1"]) | st.text() | st.dictionaries(st.text(), st.text()),
    max_size=4,
)


def read_or_refused(row, headers):
    try:
        request = read_request(row, headers)
    except RequestError as error:
        checked(error)
    else:
        assert all(type(instance.image) is bytes for instance in request.instances)
        assert request.defaults.keys() <= {"method", "output"}


@settings(max_examples=250, deadline=None)
@given(ROWS, HEADERS)
def test_any_junk_is_read_or_refused(row, headers):
    read_or_refused(row, headers)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional={"instances": JUNK, "inputs": JUNK, "parameters": JUNK, "id": JUNK, "data": JUNK}))
def test_any_junk_in_a_protocols_fields_is_read_or_refused(body):
    read_or_refused({"body": body}, {})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional={"datatype": JUNK, "shape": JUNK, "data": JUNK}), max_size=2), JUNK)
def test_any_junk_in_a_tensor_is_read_or_refused(inputs, parameters):
    read_or_refused({"body": {"inputs": inputs, "parameters": parameters}}, {})


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40) | JUNK.map(lambda junk: json.dumps(junk).encode()))
def test_any_bytes_called_json_are_read_or_refused(body):
    read_or_refused({"body": body}, JSON)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=" ;,=q.01/*aeghilmnptx-", max_size=60))
def test_any_accept_header_is_read(accept):
    assert read_request({"body": IMAGE}, {"Accept": accept}).defaults.get("output") in {None, "json", "png", "html"}
