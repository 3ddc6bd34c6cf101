"""A new version under load, by the very commands of docs/production.md: nothing is lost, and everything moves."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import pytest
from conftest import ROOT
from live import CONTINUOUS, picture, served, small_files

from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.servers import drain

pytestmark = pytest.mark.live
IMAGE = picture()
# No deadline of a slow machine's, and small images, so that many answers are seen.
CONFIG = "responseTimeout: 900\npreprocessing: {resize: 64, crop: 64}\n" + CONTINUOUS.replace("seconds: 60", "seconds: 800")
CLIENTS = 8
ASKED = (
    ("predictions", {}),
    ("explanations", {"method": "grad_cam"}),
    ("explanations", {"method": "integrated_gradients", "steps": "30"}),
    ("explanations", {"method": "occlusion"}),
)


def commands():
    """The recipe's commands, each with what it waits for."""
    page = (ROOT / "docs" / "production.md").read_text()
    block = re.findall(r"## A new version under load\n.*?```sh\n(.*?)```", page, re.S)[0]
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def build(folder, store, version):
    files = small_files(folder, CONFIG)
    options = ["--model", files["model.py"], "--weights", files["weights.pth"], "--labels", files["labels.json"]]
    options += ["--config", files["model-config.yaml"], "--store", store, "--version", version]
    build_archive("imagenet", parser().parse_args(["imagenet", *map(str, options)]))


def run(command, server):
    """Run a command of the page against a server of the test."""
    command = command.replace("http://127.0.0.1:8080", server.inference).replace("http://127.0.0.1:8081", server.management)
    command = command.replace(".venv/bin/torchserve-explain", f"{sys.executable} -m torchserve_explain")
    told = {"TS_METRICS_ADDRESS": server.metrics, "photo": str(server.run / "photo"), "PYTHONPATH": str(ROOT / "handlers")}
    done = subprocess.run(command, shell=True, env=os.environ | told, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def server(tmp_path, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build(tmp_path_factory.mktemp("old"), store, "1.0")
    run = tmp_path / "a-folder-whose-path-is-longer-than-that-of-a-socket-of-a-worker-may-be-on-any-system-that-it-runs-on"
    run.mkdir()
    (run / "photo").write_bytes(IMAGE)
    with served(["imagenet"], store, run, TS_ENABLE_MODEL_API="true") as running:
        build(tmp_path_factory.mktemp("new"), store, "2.0")  # over the old one, which is unpacked elsewhere
        yield running


def test_a_new_version_takes_over_and_no_request_is_lost(server):
    stop, answers = Event(), []

    def ask(number):
        kind, fields = ASKED[number % len(ASKED)]
        while not stop.is_set():
            answer = httpx.post(f"{server.inference}/{kind}/imagenet", files={"data": IMAGE}, data=fields, timeout=300)
            answers.append((kind, answer.status_code, answer.json().get("model", {}).get("version")))

    def explained(version):
        return sum(one[2] == version for one in answers)

    archive, register, try_it, move, wait, unregister = commands()
    assert archive.startswith("./archive.sh imagenet --version 2.0")  # the fixture does it, with a smaller classifier
    with ThreadPoolExecutor(CLIENTS) as clients:
        asking = [clients.submit(ask, number) for number in range(CLIENTS)]
        try:
            wait_for(lambda: explained("1.0") >= 5)
            assert json.loads(run(register, server))["status"].startswith('Model "imagenet" Version: 2.0 registered')
            assert json.loads(run(try_it, server))["model"]["version"] == "2.0"
            before = len(answers)
            wait_for(lambda: len(answers) > before + 5)
            assert {version for _, _, version in answers[before:]} <= {None, "1.0"}  # the old one still has the traffic
            run(move, server)
            run(wait, server)
            assert drain.versions_in_flight(server.metrics)["imagenet", "1.0"] == 0
            wait_for(lambda: explained("2.0") >= 5)  # under load all the while
            run(unregister, server)
            after = explained("2.0")
            wait_for(lambda: explained("2.0") >= after + 10)
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert Counter(status for _, status, _ in answers) == {200: len(answers)}
    known = httpx.get(f"{server.management}/models/imagenet/all").json()
    assert [one["modelVersion"] for one in known] == ["2.0"]


def wait_for(condition):
    """Wait until something is so; how long that takes is not the question."""
    pause = Event()
    while not condition():
        pause.wait(0.05)
