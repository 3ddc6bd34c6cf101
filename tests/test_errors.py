"""The tree of errors."""

import subprocess
import sys
from http import HTTPStatus

from conftest import ROOT

from torchserve_explain import errors


def test_every_error_is_of_the_one_tree():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 17 and all(issubclass(one, errors.ExplainError) for one in classes)


def test_the_tree_needs_no_library():
    code = "import sys; import torchserve_explain.errors; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "handlers")}, check=False).returncode == 0


def test_an_error_is_of_the_class_of_its_status():
    names = {400: "BadRequest", 401: "KeyRefused", 403: "KeyRefused", 404: "NotServed", 413: "TooLarge", 422: "OverLimit"}
    names |= {429: "Unavailable", 503: "Unavailable", 504: "OutOfTime", 500: "RequestError"}
    for status, name in names.items():
        error = errors.request_error(HTTPStatus(status), "why")
        assert type(error) is getattr(errors, name) and error.status == status and str(error) == "why"
