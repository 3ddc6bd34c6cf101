"""The words of the README and of docs are kept: their commands run, their tables are those of the code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from live import served

from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.attribution.quality import QUALITIES
from torchserve_explain.photo import photo_path
from torchserve_explain.serving.parameters import Parameters
from torchserve_explain.serving.settings import Limits

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README, METHODS_PAGE, ASKING = ((ROOT / name).read_text() for name in ("README.md", "docs/methods.md", "docs/asking.md"))
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
    assert {name for cell in table(ASKING, "Parameters") for name in re.findall(r"`(\w+)`", cell)} == set(
        Parameters.model_fields
    )


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
    assert re.search(rf"^{''.join(command)}:", MAKEFILE, re.M)


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


@pytest.mark.live
def test_the_python_client_gets_its_explanations(server, photo, capsys):
    client = re.search(r"```python\n(.*?)```", ASKING, re.S)[1]
    exec(client, {"address": f"{server.inference}/explanations/imagenet", "photo": photo})
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["grad_cam", "espresso", "1"],
        ["saliency", "espresso", "1"],
    ]
