"""The words of the README and of docs are kept: their commands run, their tables are those of the code."""

import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path

import pytest
from conftest import ROOT
from live import served

from torchserve_explain import client, errors
from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.attribution.quality import QUALITIES
from torchserve_explain.photo import photo_path
from torchserve_explain.serving.parameters import OUTPUTS, PARAMETERS
from torchserve_explain.serving.settings import Limits

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = ("README.md", "docs/methods.md", "docs/asking.md", "docs/client.md")
README, METHODS_PAGE, ASKING, CLIENT_PAGE = ((ROOT / name).read_text() for name in NAMES)
EVERYTHING = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```sh\n(.*?)```", README + METHODS_PAGE, re.S)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
MAKEFILE = (ROOT / "Makefile").read_text()


def table(page, heading):
    """Return the first column of the table under a heading."""
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]


def targets(page):
    """Return the page's links to files of this project."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_methods_table_lists_the_methods_in_their_order():
    assert [cell.strip(" `") for cell in table(METHODS_PAGE, "All methods")] == list(METHODS)


def test_the_methods_that_are_recommended_exist():
    recommended = METHODS_PAGE.split("## Which to choose\n")[1].split("\n## ")[0]
    named = {name for row in recommended.splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row)}
    assert named and named <= set(METHODS)


def test_the_qualities_table_lists_the_qualities():
    assert [cell.strip(" `") for cell in table(METHODS_PAGE, "Qualities: is this very explanation any good?")] == list(
        QUALITIES
    )


def test_the_parameters_table_lists_every_parameter_and_only_those():
    assert {name for cell in table(ASKING, "Parameters") for name in re.findall(r"`(\w+)`", cell)} == set(PARAMETERS)


def test_the_outputs_are_those_of_the_code():
    outputs = ASKING.split("## Outputs\n")[1].split("\n## ")[0]
    assert re.findall(r"^- `(\w+)`:", outputs, re.M) == list(OUTPUTS)


def test_the_limits_table_lists_every_limit_with_its_default():
    rows = (ROOT / "docs" / "production.md").read_text().split("## Limits\n")[1].split("\n## ")[0].splitlines()
    told = {}
    for row in rows:
        if row.startswith("| `"):
            names, defaults = row.split("|")[1:3]
            told |= dict(zip(re.findall(r"\w+", names), map(float, defaults.split(",")), strict=True))
    assert told == {name: field.default for name, field in Limits.model_fields.items()}


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", EVERYTHING, re.M))))
def test_every_make_command_exists(command):
    name = "".join(command)
    assert any(fnmatch(name, target.replace("%", "*")) for target in re.findall(r"^([\w%-]+):", MAKEFILE, re.M))
    if name.startswith("experiment-"):
        assert (ROOT / "experiments" / f"{name.removeprefix('experiment-')}.py").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if targets(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    assert [link for link in targets(page) if not (page.parent / link.partition("#")[0]).exists()] == []


def test_every_page_is_linked_from_another():
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in targets(page)}
    assert [page for page in PAGES if page.name != "README.md" and page not in linked] == []


def test_every_module_of_the_package_is_in_a_room_that_the_architecture_tells():
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    rooms = set(re.findall(r"^\| `(handlers/[^`]+/)` \|", architecture, re.M))
    package = ROOT / "handlers" / "torchserve_explain"
    modules = {path for path in package.rglob("*.py") if path.name != "__init__.py"}
    untold = [
        path for path in modules if f"{path.parent.relative_to(ROOT)}/" not in rooms and f"`{path.name}`" not in architecture
    ]
    assert modules and untold == []


def test_what_the_architecture_names_exists():
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    files = {path.name for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".venv")}
    assert {Path(name).name for name in re.findall(r"[\w/]+\.py\b", architecture)} <= files
    rooms = re.findall(r"^\| `([^`]+/)`", architecture, re.M)
    assert rooms and [room for room in rooms if not (ROOT / room).is_dir()] == []
    sources = "\n".join(path.read_text() for path in (ROOT / "handlers").rglob("*.py"))
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)", architecture):
        assert re.search(rf"^class {owner}\b", sources, re.M) and re.search(rf"^    def {name}\b", sources, re.M), (owner, name)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build_archive("imagenet", parser().parse_args(["imagenet", "--store", str(store)]))
    with served(["imagenet"], store, tmp_path_factory.mktemp("run")) as running:
        yield running


def run(command, server, folder):
    command = command.replace("http://127.0.0.1:8080", server.inference)
    environment = os.environ | {"photo": str(photo_path()), "PYTHONPATH": str(ROOT / "handlers")}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, check=True, text=True).stdout


def test_the_photo_is_where_the_readme_finds_it():
    command = next(c for c in COMMANDS if c.startswith("photo=")).replace(".venv/bin/python", sys.executable)
    told = subprocess.run(f"{command}; echo $photo", shell=True, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert told.strip() == str(photo_path())


@pytest.mark.live
def test_the_first_curl_answers_what_the_readme_says(server, tmp_path):
    command = next(c for c in COMMANDS if c.endswith("predictions/imagenet"))
    told = json.loads(re.findall(r"```json\n(.*?)```", README, re.S)[0])
    assert json.loads(run(command, server, tmp_path)) == pytest.approx(told, rel=1e-3)


@pytest.mark.live
def test_the_second_curl_answers_what_the_readme_says(server, tmp_path):
    command = next(c for c in COMMANDS if c.endswith("explanations/imagenet"))
    answer = json.loads(run(command, server, tmp_path))
    (one,) = answer["explanations"]
    told = re.findall(r"```\n(\{\"model\".*?)```", README, re.S)[0]
    # Another processor rounds otherwise, and may need a round of refinement more or less.
    assert abs(one["evaluations"] - int(re.findall(r'"evaluations": (\d+)', told)[0])) <= 16
    assert one["completeness_error"] <= one["parameters"]["max_error"]
    assert one["target"]["score"] == pytest.approx(float(re.findall(r'"score": ([\d.]+)', told)[0]), rel=1e-4)
    keys = set(re.findall(r'"(\w+)":', told))
    assert keys == set(re.findall(r'"(\w+)":', json.dumps(answer)))


@pytest.mark.live
def test_the_curl_with_a_quality_answers_it(server, tmp_path):
    command = next(c for c in COMMANDS if "quality=" in c)
    (one,) = json.loads(run(command, server, tmp_path))["explanations"]
    assert set(one["quality"]) == {"deletion", "insertion"} and 0 < one["quality"]["deletion"] < one["quality"]["insertion"]


@pytest.mark.live
def test_the_curls_for_the_openapi_document_answer_it(server, tmp_path):
    commands = [line for line in ASKING.splitlines() if line.startswith("curl") and "openapi" in line]
    first, second = (json.loads(run(command, server, tmp_path)) for command in commands)
    assert first == second and first["openapi"] == "3.1.0"


@pytest.mark.live
def test_the_commands_that_ask_are_answered(server, photo, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(photo)
    commands = [line for line in CLIENT_PAGE.splitlines() if line.startswith("torchserve-explain ask")]
    program = f"{sys.executable} -m torchserve_explain ask --url {server.inference} "
    shown, saved = (
        run(line.replace("torchserve-explain ask ", program).replace(" --show", ""), server, tmp_path) for line in commands
    )
    assert shown.startswith("espresso 95.1%") and "grad_cam at features" in shown and "saliency of espresso" in shown
    assert "deletion 0." in saved and (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.live
def test_the_third_curl_writes_a_picture(server, tmp_path):
    run(next(c for c in COMMANDS if "why.png" in c), server, tmp_path)
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.live
def test_the_python_clients_get_their_answers(server, photo, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"url": server.inference, "key": None, "photo": photo}
    for block in re.findall(r"```python\n(.*?)```", ASKING + CLIENT_PAGE, re.S):
        exec(block, dict(names))
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == ["espresso", "grad_cam espresso 1 (224, 224)", "saliency espresso 1 (224, 224)"]
    assert told[3].startswith("espresso {'score': 11.4") and "'deletion':" in told[3] and told[4].startswith("cup {")
    assert told[5:] == ["['espresso', 'espresso']"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grad_cam.png", "saliency.png"]


def test_the_clients_errors_table_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)`.*?\| (.*?) \|$", CLIENT_PAGE.split("## Errors\n")[1].split("\n## ")[0], re.M)
    told = {
        int(status): name
        for name, statuses in rows
        if name != "ServerError"
        for status in re.findall(r"(?<!TorchServe's )\b\d{3}\b", statuses)
    }
    for status, name in told.items():
        assert type(errors.request_error(HTTPStatus(status), "")).__name__ == name
    assert set(told) == client.KNOWN
