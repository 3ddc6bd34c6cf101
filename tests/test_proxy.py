"""deploy/nginx in front of a stub that tells what reached it, and in front of TorchServe."""

import json
import resource
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from live import build_small, picture, served
from proxy import CLIENT, TOKEN, certificate, proxied, rendered, wait_for

KEY = "AbC-_123"
IDLE = 1000


class Stub(BaseHTTPRequestHandler):
    """Answers with what it was asked."""

    protocol_version = "HTTP/1.1"
    delay = 0.0

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.delay)
        told = {"method": self.command, "path": self.path, "headers": dict(self.headers), "bytes": len(body)}
        answer = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT = do_OPTIONS = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def key_file(path, key=KEY):
    keys = {"management": {"key": "no"}, "inference": {"key": key}, "API": {"key": "never"}}
    path.write_text(json.dumps(keys, indent=2))
    return path


@pytest.fixture(scope="module")
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("proxy")


@pytest.fixture(scope="module")
def proxy(stub, folder):
    upstream = f"127.0.0.1:{stub.server_address[1]}"
    with proxied(folder, free_port(), upstream, key_file(folder / "key_file.json")) as address:
        yield address


@pytest.fixture
def client(proxy):
    with httpx.Client(base_url=proxy, verify=False, headers=CLIENT, timeout=30) as client:
        yield client


def refused(answer, status):
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["code"] == status and set(body) == {"code", "type", "message"}
    assert answer.headers["content-type"] == "application/json"


def raw(proxy, request: bytes) -> bytes:
    """Send bytes as they stand; httpx would tidy them up."""
    host, port = proxy.removeprefix("https://").split(":")
    context = ssl._create_unverified_context()
    with socket.create_connection((host, int(port)), timeout=20) as plain, context.wrap_socket(plain) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def asked(proxy, path: str, method="GET", headers=f"Authorization: Bearer {TOKEN}\r\n") -> bytes:
    return raw(proxy, f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}Connection: close\r\n\r\n".encode())


def test_what_clients_need_reaches_the_server(client):
    paths = [
        "/predictions/imagenet",
        "/explanations/imagenet/1.0/grad_cam,sensitivity",
        "/explanations/im-a.b_2/1.0/methods/ig",
    ]
    paths += ["/v1/models/imagenet:explain", "/v2/models/imagenet/infer", "/v2/models/imagenet/versions/1.0/explain"]
    for path in paths:
        told = client.post(path, content=b"x" * 70_000, headers={"Accept": "image/png"})
        assert told.status_code == 200, (path, told.text)
        assert told.json()["path"] == path and told.json()["bytes"] == 70_000
        assert told.json()["headers"]["Accept"] == "image/png"


def test_the_server_hears_its_own_key_and_never_the_clients(client):
    headers = client.post("/predictions/imagenet").json()["headers"]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert TOKEN not in json.dumps(headers)


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": ""}])
def test_a_wrong_token_ends_at_the_proxy(proxy, header):
    with httpx.Client(base_url=proxy, verify=False) as anyone:
        refused(anyone.post("/predictions/imagenet", headers=header), 401)


UNKNOWN = """/ /ping /models /models/imagenet /metrics /token?type=inference /api-description /v1/models/a /predictions
/predictions/ /predictions/a/b /imagenet/predict /invocations /wf-predict/a /v2/repository/index
/predictions/imagenet/1.0/../../../models /predictions/%2e%2e/models"""


@pytest.mark.parametrize("path", UNKNOWN.split())
def test_all_other_paths_are_unknown(client, path):
    refused(client.get(path), 404)


def test_what_is_looked_at_is_what_is_sent(proxy):
    for path in (
        "/x/../predictions/imagenet",
        "//predictions//imagenet",
        "/predictions/%69magenet",
        "/explanations/../predictions/imagenet",
    ):
        assert b'"path": "/predictions/imagenet"' in asked(proxy, path), path
    for path in (
        "/predictions/a%0d%0aX:1",
        "/predictions/a%0a",
        "/predictions/a%20b",
        "/predictions/a%00",
        "/predictions/a%3fb",
    ):
        answer = asked(proxy, path)
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")) and b'"path"' not in answer, path


def test_customized_is_refused_and_no_query_is_sent(client):
    refused(client.get("/predictions/imagenet?customized=true"), 400)
    refused(client.get("/v2/models/imagenet/infer?a=1&Customized=TRUE"), 400)
    for query in ("%63ustomized=true", "top_k=3"):
        assert client.get(f"/predictions/imagenet?{query}").json()["path"] == "/predictions/imagenet"


def test_other_methods_are_refused(client):
    for method in ("DELETE", "OPTIONS", "PATCH"):
        refused(client.request(method, "/predictions/imagenet"), 405)


def test_a_body_over_the_limit_ends_at_the_proxy(client):
    assert client.post("/predictions/imagenet", content=b"x" * 19_999_999).json()["bytes"] == 19_999_999
    refused(client.post("/predictions/imagenet", content=b"x" * 20_000_001), 413)


def test_forms_whose_fields_would_fill_the_servers_memory_end_at_the_proxy(client, proxy):
    for kind in ("application/x-www-form-urlencoded", "Application/X-WWW-Form-URLencoded; charset=utf-8"):
        refused(client.post("/predictions/imagenet", content=b"a=&", headers={"Content-Type": kind}), 415)
    assert client.post("/predictions/imagenet", data={"a": "b"}, files={"data": b"x"}).status_code == 200
    token = f"Authorization: Bearer {TOKEN}\r\nContent-Length: 0\r\n"
    kinds = "Content-Type: {}\r\nContent-Type: {}\r\n"
    for first, second in (("a/b", "application/x-www-form-urlencoded"), ("application/x-www-form-urlencoded", "a/b")):
        answer = asked(proxy, "/predictions/imagenet", "POST", token + kinds.format(first, second))
        assert not answer.startswith(b"HTTP/1.1 200") or b"x-www-form" not in answer


def test_a_chunked_body_reaches_the_server_as_one_of_known_length(client):
    told = client.post("/predictions/imagenet", content=(b"x" * 1000 for _ in range(100))).json()
    assert told["bytes"] == 100_000 and told["headers"]["Content-Length"] == "100000"
    assert "Transfer-Encoding" not in told["headers"] and told["headers"]["Connection"] == "close"


CONTRADICTIONS = [
    "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    "Content-Length: 5\r\nContent-Length: 6\r\n",
    "Transfer-Encoding: chunked, chunked\r\n",
    "Content-Length: +5\r\n",
]


@pytest.mark.parametrize("headers", CONTRADICTIONS)
def test_a_request_of_two_lengths_is_refused(proxy, headers):
    token = f"Authorization: Bearer {TOKEN}\r\n"
    answer = asked(proxy, "/predictions/imagenet", "POST", token + headers)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")) and b'"path"' not in answer


def test_too_many_requests_at_once_are_refused(client, monkeypatch):
    monkeypatch.setattr(Stub, "delay", 0.5)
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda _: client.get("/predictions/imagenet"), range(60)))
    status = [answer.status_code for answer in answers]
    assert set(status) == {200, 429} and status.count(200) <= 50  # 41 at once by rate; 32 by connections
    refused(next(answer for answer in answers if answer.status_code == 429), 429)
    time.sleep(2.1)  # what was spent of 20 requests a second is forgotten


def idle_connections(address, count, first: bytes):
    """Open connections that send so much and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * count)), hard))
    host, port = address.removeprefix("https://").split(":")
    connections = [socket.create_connection((host, int(port)), timeout=20) for _ in range(count)]
    for connection in connections:
        connection.sendall(first)
    return connections


def closed(connection):
    connection.setblocking(False)
    try:
        return connection.recv(4096) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def idle_do_no_harm(proxy, ask):
    """Hold a thousand connections, half of them silent, half with a piece of a TLS handshake; ask meanwhile."""
    held = idle_connections(proxy, IDLE // 2, b"") + idle_connections(proxy, IDLE // 2, b"\x16\x03\x01\x02")
    assert sum(map(closed, held)) == 0
    ask()
    end = time.monotonic() + 40
    while (left := [one for one in held if not closed(one)]) and time.monotonic() < end:
        held = left
        time.sleep(0.5)
    assert not left, f"{len(left)} are still open"


def test_a_thousand_idle_connections_do_no_harm(client, proxy):
    idle_do_no_harm(proxy, lambda: [client.get("/predictions/imagenet").raise_for_status() for _ in range(20)])


def test_a_body_that_never_ends_is_given_up(proxy):
    head = f"POST /predictions/imagenet HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\nhalf"
    start = time.monotonic()
    answer = raw(proxy, head.encode())
    assert time.monotonic() - start < 19 and b'"path"' not in answer


def test_a_new_key_and_new_tokens_are_taken_up(client, folder):
    key_file(folder / "key_file.json", "another1")
    tokens = folder / "conf" / "tokens" / "tokens.map"
    tokens.write_text(tokens.read_text() + f'"Bearer {"a7" * 32}" team-b;\n')
    other = {"Authorization": f"Bearer {'a7' * 32}"}

    def taken():
        return (
            client.get("/predictions/imagenet", headers=other).json().get("headers", {}).get("Authorization")
            == "Bearer another1"
        )

    wait_for(taken, folder / "proxy.log")
    assert client.get("/predictions/imagenet").status_code == 200  # the first is still known


def test_the_log_has_no_token_and_no_query(client, folder):
    client.get("/predictions/imagenet?name=private", headers={"Cookie": "private"})
    line = json.loads((folder / "write" / "access.log").read_text().splitlines()[-1])
    assert line["client"] == "team-a" and line["path"] == "/predictions/imagenet" and line["status"] == 200
    text = (folder / "write" / "access.log").read_text()
    assert TOKEN not in text and KEY not in text and "private" not in text


def test_client_certificates(stub, tmp_path):
    """The lines of listen.conf that are commented out work as they stand."""
    listen = free_port()
    conf = rendered(tmp_path, listen, f"127.0.0.1:{stub.server_address[1]}")
    (tmp_path / "write" / "torchserve_key.conf").write_text("")
    tls = conf / "tls"
    certificate(tls, "clients")
    certificate(tls, "friend", issuer="clients")
    path = conf / "listen.conf"
    path.write_text(path.read_text().replace("# ssl_", "ssl_"))
    process = subprocess.Popen(["nginx", "-p", tmp_path / "write", "-c", conf / "nginx.conf", "-g", "daemon off;"])
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", listen)), path)
        url = f"https://127.0.0.1:{listen}/predictions/imagenet"
        refused(httpx.get(url, verify=False, headers=CLIENT), 400)
        context = ssl._create_unverified_context()
        context.load_cert_chain(tls / "friend.crt", tls / "friend.key")
        assert httpx.get(url, verify=context, headers=CLIENT).status_code == 200
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.live
def test_in_front_of_torchserve(tmp_path):
    """With tokens on: predictions, explanations and KServe's paths pass, and what should end at the proxy does."""
    build_small(tmp_path, tmp_path)
    with (
        served(["small"], tmp_path, tmp_path / "run", TS_DISABLE_TOKEN_AUTHORIZATION="false") as server,
        proxied(tmp_path, free_port(), server.inference.removeprefix("http://"), server.run / "key_file.json") as proxy,
        httpx.Client(base_url=proxy, verify=False, headers=CLIENT, timeout=60) as client,
    ):
        image = {"data": picture()}

        def predict():
            assert len(client.post("/predictions/small", files=image).raise_for_status().json()) == 5

        predict()
        answer = client.post("/explanations/small/1.0/grad_cam", files=image)
        assert answer.json()["explanations"][0]["method"] == "grad_cam"
        assert "<html" in client.get("/explanations/small", headers={"Accept": "text/html"}).text
        refused(client.post("/predictions/small", files=image, headers={"Authorization": "Bearer wrong"}), 401)
        refused(client.post("/predictions/small", content=b"x" * 20_000_001), 413)
        refused(client.get("/models/small?customized=true"), 404)
        refused(client.get("/predictions/small?customized=true"), 400)
        assert client.post("/predictions/none", files=image).status_code == 404  # TorchServe's own answer
        idle_do_no_harm(proxy, predict)
        predict()
