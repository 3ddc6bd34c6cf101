"""The README's words are kept: its commands run, its tables are those of the code."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from live import served

from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.photo import photo_path
from torchserve_explain.serving.parameters import Parameters

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
MAKEFILE = (ROOT / "Makefile").read_text()


def table(heading):
    """Return the first column of the table under a heading."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]


def test_the_methods_table_lists_the_methods_in_their_order():
    assert [cell.strip(" `") for cell in table("Methods")] == list(METHODS)


def test_the_parameters_table_lists_every_parameter_and_only_those():
    assert {name for cell in table("Asking") for name in re.findall(r"`(\w+)`", cell)} == set(Parameters.model_fields)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^make (\w+)|`make (\w+)", README, re.M))))
def test_every_make_command_exists(command):
    assert re.search(rf"^{''.join(command)}:", MAKEFILE, re.M)


def test_every_link_leads_to_a_file():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build_archive("imagenet", parser().parse_args(["imagenet", "--store", str(store)]))
    with served(["imagenet"], store, tmp_path_factory.mktemp("run")) as running:
        yield running


def run(command, server, folder):
    command = command.replace("http://127.0.0.1:8080", server.inference)
    environment = os.environ | {"photo": str(photo_path())}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, check=True, text=True).stdout


def test_the_photo_is_where_the_readme_finds_it():
    command = next(c for c in COMMANDS if c.startswith("photo=")).replace(".venv/bin/python", sys.executable)
    told = subprocess.run(f"{command}; echo $photo", shell=True, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert told.strip() == str(photo_path())


@pytest.mark.live
def test_the_first_curl_answers_what_the_readme_says(server, tmp_path):
    command = next(c for c in COMMANDS if c.endswith("predictions/imagenet"))
    told = json.loads(re.search(r"```json\n(.*?)```", README, re.S)[1])
    assert json.loads(run(command, server, tmp_path)) == pytest.approx(told, rel=1e-3)


@pytest.mark.live
def test_the_second_curl_answers_what_the_readme_says(server, tmp_path):
    command = next(c for c in COMMANDS if c.endswith("explanations/imagenet"))
    answer = json.loads(run(command, server, tmp_path))
    (one,) = answer["explanations"]
    told = re.search(r"```\n(\{\"model\".*?)```", README, re.S)[1]
    # Another processor rounds otherwise, and may need a round of refinement more or less.
    assert abs(one["evaluations"] - int(re.search(r'"evaluations": (\d+)', told)[1])) <= 16
    assert one["completeness_error"] <= one["parameters"]["max_error"]
    assert one["target"]["score"] == pytest.approx(float(re.search(r'"score": ([\d.]+)', told)[1]), rel=1e-4)
    keys = set(re.findall(r'"(\w+)":', told))
    assert keys == set(re.findall(r'"(\w+)":', json.dumps(answer)))


@pytest.mark.live
def test_the_curl_with_a_quality_answers_it(server, tmp_path):
    command = next(c for c in COMMANDS if "quality=" in c)
    (one,) = json.loads(run(command, server, tmp_path))["explanations"]
    assert set(one["quality"]) == {"deletion", "insertion"} and 0 < one["quality"]["deletion"] < one["quality"]["insertion"]


@pytest.mark.live
def test_the_third_curl_writes_a_picture(server, tmp_path):
    run(next(c for c in COMMANDS if "why.png" in c), server, tmp_path)
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
