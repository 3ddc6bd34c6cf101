"""The documentation as a site: it builds strictly, holds every page, finds words, and asks nobody else for anything."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

FROM_ELSEWHERE = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//")


def build(folder, site):
    command = [sys.executable, "-m", "mkdocs", "build", "-f", folder / "mkdocs.yml", "-d", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, text=True, capture_output=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    return folder


@pytest.fixture
def copy(tmp_path):
    """The sources of the site, to be spoilt."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
        elif path.name in ("classifiers", "deploy", "handlers", "training"):  # what pages name
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_every_page_is_in_the_site_and_in_its_search(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages = {page.with_name("index.html") if page.name == "README.html" else page for page in pages}
    assert [str(page) for page in pages if not (site / page).is_file()] == []
    found = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert {entry["location"].partition("#")[0] for entry in found} >= {str(page) for page in pages}
    assert any("completeness error" in entry["text"] for entry in found)


def test_the_roots_pages_are_in_the_site_with_their_pictures(site):
    start = (site / "index.html").read_text()
    assert 'src="why.png"' in start and 'href="methods.html"' in start and 'href="license.txt"' in start
    assert (site / "why.png").is_file() and (site / "license.txt").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for name in ("architecture", "contributing", "changelog", "security"):
        assert (site / f"{name}.html").is_file()


def test_a_file_that_the_site_does_not_have_is_named_and_not_linked(site):
    text = (site / "production.html").read_text()
    assert "config.properties" in text and "../config.properties" not in text


def test_nothing_is_fetched_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10 and [page.name for page in pages if FROM_ELSEWHERE.search(page.read_text())] == []


@pytest.mark.parametrize(
    ("page", "text", "told"),
    [
        ("docs/methods.md", "[gone](nowhere.md)", "nowhere.md"),
        ("docs/methods.md", "[gone](asking.md#nothing)", "#nothing"),
        ("README.md", "[gone](docs/methods.md#nothing)", "#nothing"),
        ("README.md", "![gone](docs/nowhere.png)", "nowhere.png"),
        ("docs/untold.md", "# A page that nothing leads to", "untold.md"),
    ],
)
def test_what_leads_nowhere_ends_the_build(copy, tmp_path, page, text, told):
    with (copy / page).open("a") as stream:
        stream.write(f"\n\n{text}\n")
    built = build(copy, tmp_path / "site")
    assert built.returncode != 0 and told in built.stderr and built.stderr.count("WARNING") == 1
