"""The wheel alone, in an environment of its own and an empty folder: it archives, serves, predicts and explains."""

import os
import signal
import subprocess
import sys
import time
import venv

import httpx
import pytest
from conftest import ROOT

from torchserve_explain import __version__
from torchserve_explain.servers.torchserve import _java_home, free_ports

pytestmark = pytest.mark.live
PIP = ("-m", "pip", "-q", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel, install it with the pinned versions of what it requires; return the folder of its commands."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    subprocess.run([sys.executable, *PIP, *map(str, build)], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    install = ("install", "-c", ROOT / "requirements.txt", wheel)
    subprocess.run([folder / "venv/bin/python", *PIP, *map(str, install)], check=True)
    return folder / "venv" / "bin"


@pytest.fixture
def environment():
    """No way to this repository, ports of its own."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("TS_")}
    return inherited | free_ports() | {"JAVA_HOME": _java_home()}


def until_it_answers(process):
    """Read what a server says until it says that it answers."""
    for line in process.stdout:
        if "imagenet answers" in line:
            return
    raise AssertionError(f"the server ended with {process.wait()}")


def test_the_wheel_archives_serves_and_explains(installed, environment, tmp_path, photo):
    command = installed / "torchserve-explain"

    def told(*arguments):
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
        return subprocess.run([command, *arguments], **options).stdout

    assert told("--version").strip() == __version__
    assert str(tmp_path / "model_store" / "imagenet.mar") in told("archive", "imagenet")
    server = subprocess.Popen([command, "serve"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        until_it_answers(server)
        address = environment["TS_INFERENCE_ADDRESS"]
        predictions = httpx.post(f"{address}/predictions/imagenet", files={"data": photo}, timeout=60).json()
        assert max(predictions, key=predictions.get) == "espresso"
        answer = httpx.post(f"{address}/explanations/imagenet", files={"data": photo}, data={"method": "grad_cam"}, timeout=60)
        assert answer.json()["explanations"][0]["target"]["label"] == "espresso"
        time.sleep(1)  # metrics travel over the worker's log
        assert "ExplainEvaluations{" in httpx.get(f"{environment['TS_METRICS_ADDRESS']}/metrics").text
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0 and server.stdout and server.stdout.read().rstrip().endswith("stopped")
