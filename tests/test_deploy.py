"""What is in deploy/: checked by its own tools, against each other, and by watching a live server."""

import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kubernetes_validate
import pytest
import ts
import yaml
from conftest import ROOT
from watch import declared, metric_names, run

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
OWN_KINDS = {"Kustomization", "ScaledObject", "ServingRuntime", "InferenceService"}  # not Kubernetes' own


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


# The image


def test_dockerfile_by_its_linter():
    run("hadolint", DEPLOY / "Dockerfile")


def test_what_the_image_copies_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == name or source.startswith(f"{name}/") for name in allowed), source
    assert all((ROOT / name).exists() for name in allowed)


def test_the_image_runs_as_nobody_in_particular_and_asks_its_own_question():
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)", text, re.M) == ["10001:10001"]
    health = text[text.index("HEALTHCHECK") :]
    assert "health.py" in health.splitlines()[1] and "/ping" not in health


# Its health


class Management(BaseHTTPRequestHandler):
    """A management API with one key and models; answers as TorchServe 0.12.0 does."""

    server: "Managed"

    def do_GET(self):
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        state = self.server
        if self.path.startswith("/token"):
            assert key == "api" and self.path == "/token?type=management"
            state.key = "new"
            keys(state.folder, "new", minutes=60)
            return self.answer(b"")
        if self.path == "/metrics":
            left = state.in_flight.pop(0) if len(state.in_flight) > 1 else state.in_flight[0]
            return self.answer(f'# TYPE\nRequestsInFlight{{ModelName="a",Hostname="h",}} {left}\nOther{{}} 7.0\n'.encode())
        if key != state.key:
            return self.answer(b'{"code": 400}', 400)
        if self.path.startswith("/models?"):
            return self.answer(json.dumps({"models": [{"modelName": name} for name in state.models]}).encode())
        status = state.models[self.path.split("/")[2]]
        return self.answer(json.dumps([{"workers": [{"status": one} for one in status]}]).encode())

    def answer(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Managed(ThreadingHTTPServer):
    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Management)
        self.key, self.models, self.in_flight, self.folder = "old", {"a": ["READY"]}, [0.0], folder


def keys(folder, key, minutes):
    end = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat().replace("+00:00", "123Z")  # Java's nanoseconds
    content = {"management": {"key": key, "expiration time": end}, "API": {"key": "api"}}
    (folder / "key_file.json").write_text(json.dumps(content))


@pytest.fixture
def management(tmp_path):
    server = Managed(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    keys(tmp_path, "old", minutes=60)
    yield server
    server.shutdown()


def health(server, *question):
    address = f"http://0.0.0.0:{server.server_address[1]}"  # as in the container: it listens everywhere
    environment = {"TS_MANAGEMENT_ADDRESS": address, "TS_METRICS_ADDRESS": address, "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, DEPLOY / "health.py", *question]
    return subprocess.run(command, cwd=server.folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ({"a": ["READY"], "b": ["UNLOADED", "READY"]}, None),
        ({"a": ["READY"], "b": ["UNLOADED"]}, "b has no worker"),
        ({"a": []}, "a has no worker"),
        ({}, "no model"),
    ],
)
def test_ready_means_that_each_model_has_a_worker(management, models, reason):
    management.models = models
    done = health(management, "ready")
    assert done.returncode == (0 if reason is None else 1)
    assert reason is None or reason in done.stderr


def test_a_key_that_ends_is_renewed_and_a_dead_server_is_not_ready(management):
    assert health(management, "ready").returncode == 0 and management.key == "old"
    keys(management.folder, "old", minutes=3)
    assert health(management, "ready").returncode == 0 and management.key == "new"
    keys(management.folder, "wrong", minutes=60)
    assert "400" in health(management, "ready").stderr
    management.shutdown()
    management.server_close()
    assert health(management, "ready").returncode == 1


def test_drained_waits_for_the_last_request(management):
    management.in_flight = [2.0, 1.0, 0.0, 1.0, 0.0]
    assert health(management, "drained", "--seconds", "20").returncode == 0
    assert management.in_flight == [0.0]
    management.in_flight = [3.0]
    done = health(management, "drained", "--seconds", "1")
    assert done.returncode == 1 and "3 requests" in done.stderr


# Clusters


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_by_their_schema(path):
    for document in documents(path):
        if document["kind"] not in OWN_KINDS:
            kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("folder", ["kubernetes", "kserve"])
def test_kustomizations_name_what_there_is(folder):
    for name in documents(DEPLOY / folder / "kustomization.yaml")[0]["resources"]:
        path = DEPLOY / folder / name
        assert path.exists() and (path.is_file() or (path / "kustomization.yaml").exists()), name
    for name in documents(DEPLOY / "nginx" / "kustomization.yaml")[0]["configMapGenerator"][0]["files"]:
        assert (DEPLOY / "nginx" / name).is_file()


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl builds the kustomizations; no package brings it")
@pytest.mark.parametrize("folder", ["kubernetes", "kserve"])
def test_kustomizations_build(folder):
    built = [one for one in yaml.safe_load_all(run("kubectl", "kustomize", DEPLOY / folder)) if one]
    for document in built:
        if document["kind"] not in OWN_KINDS:
            kubernetes_validate.validate(document, "1.34", strict=True)
    [settings] = [one for one in built if one["kind"] == "ConfigMap"]
    assert set(settings["data"]) == {"nginx.conf", "listen.conf", "forward.conf", "start.sh"}
    [pod] = [pod_of(one) for one in built if one["kind"] in ("Deployment", "ServingRuntime")]
    assert sources(pod)["configMap"] == settings["metadata"]["name"]


def pod_of(document):
    return document["spec"]["template"]["spec"] if document["kind"] == "Deployment" else document["spec"]


def sources(pod):
    """The projected volume of the proxy: its ConfigMap, and the paths of its secrets."""
    projected = next(volume["projected"]["sources"] for volume in pod["volumes"] if "projected" in volume)
    paths = {item["path"] for source in projected if "secret" in source for item in source["secret"]["items"]}
    return {"configMap": projected[0]["configMap"]["name"], "paths": paths}


def pods():
    for path in (DEPLOY / "kubernetes" / "deployment.yaml", DEPLOY / "kserve" / "serving_runtime.yaml"):
        yield from (pod_of(one) for one in documents(path) if one["kind"] in ("Deployment", "ServingRuntime"))


@pytest.mark.parametrize("pod", list(pods()), ids=["kubernetes", "kserve"])
def test_pods_are_locked_down_and_their_probes_work_with_tokens(pod):
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        security = pod.get("securityContext", {}) | container["securityContext"]
        assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["runAsUser"] == 10001 and security["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert "memory" in container["resources"]["limits"]
    server = pod["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["exec"]["command"] == ["python", "/etc/torchserve/health.py", "ready"]
        assert server[probe]["timeoutSeconds"] > 4
    drain = server["lifecycle"]["preStop"]["exec"]["command"]
    grace = pod.get("terminationGracePeriodSeconds", 150)
    assert float(drain[drain.index("--after") + 1]) + float(drain[drain.index("--seconds") + 1]) < grace


def test_selectors_find_the_pods():
    every = [one for path in MANIFESTS for one in documents(path)]
    labels = next(one for one in every if one["kind"] == "Deployment")["spec"]["template"]["metadata"]["labels"]
    found = {one["kind"]: one["spec"].get("podSelector", one["spec"].get("selector")) for one in every if "spec" in one}
    for kind in ("Deployment", "NetworkPolicy", "PodDisruptionBudget"):
        assert found[kind]["matchLabels"] == labels, kind
    assert found["Service"] == labels


def test_the_proxys_files_are_where_its_configuration_looks():
    text = "".join((DEPLOY / "nginx" / name).read_text() for name in ("nginx.conf", "listen.conf", "forward.conf"))
    assert {"tls/tls.crt", "tls/tls.key"} <= set(re.findall(r"\S+(?=;)", text)) and "include tokens/*.map;" in text
    deployment, runtime = pods()
    assert sources(deployment)["paths"] == {"tls/tls.crt", "tls/tls.key", "tokens/tokens.map"}
    assert sources(runtime)["paths"] == {"tokens/tokens.map"}  # the gateway ends TLS
    port = re.findall(r"^listen (\d+)", (DEPLOY / "kserve" / "listen.conf").read_text(), re.M)[0]
    assert runtime["containers"][0]["ports"] == [{"name": "http1", "containerPort": int(port), "protocol": "TCP"}]


def test_the_number_of_replicas_follows_a_gauge():
    [scaled] = documents(DEPLOY / "kubernetes" / "scaled_object.yaml")
    [trigger] = scaled["spec"]["triggers"]
    names = metric_names(trigger["metadata"]["query"], declared())
    assert names and all(declared()[name][0] == "gauge" for name in names)
    assert scaled["spec"]["scaleTargetRef"]["name"] == "torchserve-explain"


def test_compose_mounts_what_there_is_and_opens_one_port():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        for source in (volume.split(":")[0] for volume in service.get("volumes", []) if volume.startswith(".")):
            assert source.startswith("./secrets/") or (DEPLOY / source).resolve().exists(), source
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert ports.pop("proxy") == ["8443:8443"]
    assert all(port.startswith("127.0.0.1:") for several in ports.values() for port in several)
    assert services["torchserve"]["network_mode"] == "service:proxy" and services["torchserve"]["read_only"]
    target = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == [f"{services['proxy']['networks']['watch']['aliases'][0]}:8082"]


def test_the_image_copies_all_that_the_package_carries():
    """The wheel is built inside the image, from what is copied there alone."""
    carried = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "force-include"
    ]
    before_install = (DEPLOY / "Dockerfile").read_text().split("pip install --no-cache-dir --no-deps .")[0]
    copied = {name for line in re.findall(r"^COPY (.+)$", before_install, re.M) for name in line.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(carried) <= copied and set(carried) <= allowed


# The page


def test_the_page_tells_the_versions_that_are_bundled():
    page = (ROOT / "docs" / "production.md").read_text()
    with zipfile.ZipFile(Path(ts.__file__).parent / "frontend" / "model-server.jar") as jar:
        netty = set(re.findall(r"\.version=(\S+)\.Final", jar.read("META-INF/io.netty.versions.properties").decode()))
    assert netty and all(version in page for version in netty), netty  # of netty itself, and of its native TLS
    assert ts.__version__ == "0.12.0" and "0.12.0" in page


def test_the_page_names_files_that_are_there():
    page = (ROOT / "docs" / "production.md").read_text()
    for name in set(re.findall(r"`(deploy/[\w./-]+)`", page)) | set(re.findall(r"\]\(\.\./([\w./-]+)\)", page)):
        assert (ROOT / name).exists() or name.startswith("deploy/secrets"), name
