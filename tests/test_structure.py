"""The house's own rules: imports point one way, and what travels in an archive is complete."""

import ast
import inspect

import pytest
from conftest import ROOT

import explain_handler

# Who may import whom, from the bottom up.
ORDER = ["attribution", "serving", "explain_handler", "deploy", "training", "study", "bench"]


def modules():
    for top in ("handlers", "deploy", "training", "study", "bench"):
        yield from (path for path in (ROOT / top).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = next(part for part in path.relative_to(ROOT).with_suffix("").parts if part in ORDER)
    above = ORDER[ORDER.index(own) + 1 :]
    assert not set(imported(path)) & set(above)


def test_the_engine_knows_no_server_and_no_pictures():
    banned = {"ts", "json", "PIL", "pydantic", "captum"}
    for path in (ROOT / "handlers" / "attribution").rglob("*.py"):
        assert not set(imported(path)) & banned, path


def test_no_captum_travels_in_an_archive():
    assert not [path for path in (ROOT / "handlers").rglob("*.py") if "captum" in set(imported(path))]


def test_the_handler_module_defines_one_class():
    """TorchServe refuses a module with several."""
    defined = [c for _, c in inspect.getmembers(explain_handler, inspect.isclass) if c.__module__ == "explain_handler"]
    assert defined == [explain_handler.ExplainHandler]


def test_no_pickle_is_loaded():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path
