"""The additions that CONTRIBUTING.md shows: each applies to a copy of this project, and its tests pass there."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
PARTS = ("handlers", "tests", "docs", "classifiers/imagenet", "bench", "training", "study", "experiments", "deploy")
# What is run beside the test that the change brings: those that go over everything of its kind.
OVER_ALL = {
    "method": ("gradient_x_sign", "listed", "methods_in_their_order", "tells_every_method"),
    "parameter": ("windows", "every_parameter", "takes_can_be_asked_for", "occlusion_hides_each_window"),
    "output": ("output", "document_is_valid"),
}
FILES = ("methods", "parameters", "capabilities", "openapi", "readme", "baseline_references")
ROOMS = {
    "method": {"handlers/torchserve_explain/attribution/methods"},
    "parameter": {"handlers/torchserve_explain/attribution/methods"},
    "output": {"handlers/torchserve_explain/serving"},
}


def change(what):
    """Return the change that the page shows."""
    section = PAGE.split(f"## Add a {what}\n" if what != "output" else "## Add an output\n")[1].split("\n## ")[0]
    return re.findall(r"```diff\n(.*?)```", section, re.S)[0]


def changed(what):
    """Return the files that a change touches."""
    return re.findall(r"^\+\+\+ b/(.+)$", change(what), re.M)


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, of which nothing is a link to this one."""
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


@pytest.mark.live
@pytest.mark.parametrize("what", OVER_ALL)
def test_the_change_applies_and_its_tests_pass(copy, what):
    applied = subprocess.run(["git", "apply", "-C1", "-"], cwd=copy, input=change(what), text=True, capture_output=True)
    assert applied.returncode == 0, applied.stderr
    own = [name for name in changed(what) if name.startswith("tests/")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(copy / "handlers")}
    names = " or ".join((*OVER_ALL[what], *(name.removeprefix("tests/").removesuffix(".py") for name in own)))
    tests = [*own, *(f"tests/test_{file}.py" for file in FILES), "-k", names, "-m", "not live", "-p", "no:cacheprovider"]
    for command in (["pytest", *tests], ["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        ran = subprocess.run([sys.executable, "-m", *command], cwd=copy, env=environment, text=True, capture_output=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert command[0] != "pytest" or int(re.findall(r"(\d+) passed", ran.stdout)[0]) >= len(OVER_ALL[what]) + len(own)


@pytest.mark.parametrize("what", OVER_ALL)
def test_a_change_touches_no_more_rooms_than_it_says(what):
    touched = changed(what)
    assert {name.rpartition("/")[0] for name in touched if name.startswith("handlers/")} == ROOMS[what]
    assert sorted(name.partition("/")[0] for name in touched if not name.startswith("handlers/")) == ["docs", "tests"]
