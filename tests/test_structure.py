"""The house's own rules: imports point one way, and what travels in an archive is complete."""

import ast
import inspect
import re
import tomllib

import pytest
from conftest import ROOT

import explain_handler
from torchserve_explain import __version__

PACKAGE = ROOT / "handlers" / "torchserve_explain"
BASE = {"errors"}  # what everyone may use
# Who may import whom within the package, from the bottom up; what is not listed stands above.
ORDER = ("attribution", "serving")
# What uses the package; none of these uses another, but for experiments, which stands above them.
TOOLS = ("training", "study", "bench")
ABOVE = "experiments"


def modules():
    for top in ("handlers", *TOOLS, ABOVE):
        yield from (path for path in (ROOT / top).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from names


def rooms(path):
    """The rooms of the package that a module uses."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("torchserve_explain.")}


@pytest.mark.parametrize("path", list(modules()), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = next((part for part in parts if part in ORDER), None)
    assert not rooms(path) - set(ORDER[: ORDER.index(own) + 1]) - BASE if own else True
    roots = {name.split(".")[0] for name in imported(path)}
    assert "explain_handler" not in roots
    if parts[0] != ABOVE:
        assert not roots & ({*TOOLS, ABOVE} - {parts[0]})


def test_the_engine_knows_no_server_and_no_pictures():
    banned = {"ts", "json", "PIL", "pydantic", "captum"}
    for path in (PACKAGE / "attribution").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & banned, path


def test_no_captum_travels_in_an_archive():
    assert not [
        path for path in (ROOT / "handlers").rglob("*.py") if "captum" in {name.split(".")[0] for name in imported(path)}
    ]


def test_the_handler_module_defines_one_class():
    """TorchServe refuses a module with several."""
    defined = [c for _, c in inspect.getmembers(explain_handler, inspect.isclass) if c.__module__ == "explain_handler"]
    assert defined == [explain_handler.ExplainHandler]


def test_all_but_the_tests_must_say_their_types():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    (strict,) = (one["module"] for one in settings["overrides"] if one.get("disallow_untyped_defs"))
    assert {*strict} == {"explain_handler", *(f"{name}.*" for name in (PACKAGE.name, *TOOLS, ABOVE))}
    assert {*settings["files"]} == {"handlers", *TOOLS, ABOVE, "tests"}


def test_no_pickle_is_loaded():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path


def test_the_version_stands_in_one_place_and_the_changelog_tells_it():
    patterns = ("*.toml", "*.cff", "*.md", "docs/**/*.md", "deploy/**/*.*", "handlers/**/*.py", "handlers/**/*.html")
    files = {path for pattern in patterns for path in ROOT.glob(pattern)}
    holders = {path.name for path in files if re.search(rf"\b{re.escape(__version__)}\b", path.read_text(errors="replace"))}
    assert holders == {"__init__.py", "CHANGELOG.md"}
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == __version__
