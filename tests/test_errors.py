"""The tree of errors."""

import subprocess
import sys

from conftest import ROOT

from torchserve_explain import errors


def test_every_error_is_of_the_one_tree():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 10 and all(issubclass(one, errors.ExplainError) for one in classes)


def test_the_tree_needs_no_library():
    code = "import sys; import torchserve_explain.errors; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "handlers")}, check=False).returncode == 0
