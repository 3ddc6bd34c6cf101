"""The command line: its subcommands, and where the project's files are found."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from torchserve_explain import cli, paths

FILES = ("config.properties", "deploy/log4j2.xml", "deploy/metrics.yaml", "deploy/model-config.yaml")


def test_every_command_says_what_it_takes(capsys):
    for command in ("archive", "serve", "kserve", "drain", "demo", "ask", "explain", "gallery", "compare", "replay"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0 and f"torchserve-explain {command}" in capsys.readouterr().out


def test_what_a_command_refuses_is_told_with_its_status(capsys, tmp_path):
    assert cli.main(["archive", "nowhere", "--store", str(tmp_path)]) == 1
    assert "archive: nowhere is not archived: there is no classifiers/nowhere" in capsys.readouterr().err


def test_ray_is_asked_for_only_where_it_is_there(capsys, tmp_path, monkeypatch):
    given = ["explain", "small", "--data", "s3://lake/in", "--out", str(tmp_path)]
    assert cli.main(given) == 1 and "s3:// is of --engine ray" in capsys.readouterr().err
    assert cli.main([*given[:2], "--data", "here", "--overlays"]) == 1
    assert "--overlays is of --engine ray" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("lake", "run", "pages"):
        monkeypatch.delitem(sys.modules, f"torchserve_explain.bulk.{name}", raising=False)
    assert cli.main([*given, "--engine", "ray"]) == 1 and "install torchserve-explain[ray]" in capsys.readouterr().err
    assert cli.main(["gallery", "lake", "--out", str(tmp_path)]) == 1
    assert "install torchserve-explain[ray]" in capsys.readouterr().err


def test_a_checkout_holds_what_the_commands_need():
    assert paths.CHECKOUT == paths.ROOT == ROOT and paths.HANDLER.is_file()
    assert all(paths.packaged(name).is_file() for name in FILES)


def test_an_installed_package_brings_what_it_needs_and_works_in_the_current_folder(tmp_path):
    """A package as the wheel lays it out, without what the wheel brings beside it."""
    package = tmp_path / "site" / "torchserve_explain"
    (package / "files" / "classifiers" / "imagenet").mkdir(parents=True)
    shutil.copyfile(paths.PACKAGE / "paths.py", package / "paths.py")
    (package / "__init__.py").touch()
    (tmp_path / "here" / "classifiers" / "own").mkdir(parents=True)
    code = "from torchserve_explain import paths as p; print(p.ROOT, *map(p.classifier_folder, ('own', 'imagenet', 'new')))"
    options = {"cwd": tmp_path / "here", "env": {"PYTHONPATH": str(tmp_path / "site")}, "text": True, "check": True}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, **options).stdout.split()
    here, files = tmp_path / "here", package / "files"
    folders = (here / "classifiers" / "own", files / "classifiers" / "imagenet", here / "classifiers" / "new")
    assert told == [str(path) for path in (here, *folders)]
